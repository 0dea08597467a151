// Enough of CUDA for a C++ compiler to run the kernels: a grid is a loop, and so is a block.

#include <cmath>
#include <cstring>
#include <utility>

#define __global__
#define __device__

using std::exp;
using std::expm1;
using std::log1p;
using std::tanh;

struct Index { unsigned x; };
static Index threadIdx, blockIdx, blockDim;

static float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }

#include "scalar.cuh"

// A half is steps * 2^spacing, where spacing >= -24 and steps <= 2048, and steps >= 1024 if
// spacing > -24. Its bits are steps + 1024 * (spacing + 24).
static float widen(half x)
{
    const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
    float y = exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    if (exponent == 31) y = mantissa ? NAN : INFINITY;
    return x.bits >> 15 ? -y : y;
}
static void narrow(float x, half& y)
{
    int exponent = 0;
    std::frexp(x, &exponent);
    const int spacing = x == 0 || exponent < -13 ? -24 : exponent - 11;
    const float steps = std::nearbyint(std::ldexp(std::fabs(x), -spacing));
    const bool huge = !(std::ldexp(steps, spacing) < 65536);
    y.bits = x != x ? 0x7e00 : huge ? 0x7c00 : int(steps) + 1024 * (spacing + 24);
    if (std::signbit(x)) y.bits |= 0x8000;
}

// The kernel over its grid, if each argument has as many bytes as the kernel takes. Else false.
template <class... A, std::size_t... I>
bool run(void (*kernel)(A...), unsigned blocks, unsigned threads, int count, const int* bytes,
         void** arguments, std::index_sequence<I...>)
{
    if (count != sizeof...(A) || ((bytes[I] != sizeof(A)) || ...)) return false;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
            kernel(*static_cast<A*>(arguments[I])...);
    return true;
}
template <class... A>
bool run(void (*kernel)(A...), unsigned blocks, unsigned threads, int count, const int* bytes,
         void** arguments)
{
    return run(kernel, blocks, threads, count, bytes, arguments, std::index_sequence_for<A...>());
}

#define PARAMETERS unsigned blocks, unsigned threads, int count, const int* bytes, void** arguments
#define RUN(kernel) return run(kernel, blocks, threads, count, bytes, arguments);
