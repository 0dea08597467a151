// The types of numbers in memory. Arithmetic is in double for double and in float for the others.
//
// half and bfloat16 are defined here because NVRTC has no such types, and the headers that do are
// not on every machine that has PyTorch.

struct half { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

__device__ inline void narrow(double x, double& y) { y = x; }
__device__ inline void narrow(float x, float& y) { y = x; }
__device__ inline void narrow(float x, bfloat16& y)  // to the nearest, ties to even; any NaN to one
{
    const unsigned bits = __float_as_uint(x);
    y.bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
}

#ifdef __CUDACC__  // a host compiler, as in the tests, has to bring these two
__device__ inline float widen(half x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ inline void narrow(float x, half& y)
{
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
#endif
