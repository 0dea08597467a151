// Enough of CUDA for a C++ compiler to run the kernels: a grid is a loop, and so is a block.

#include <cmath>
#include <cstring>
#include <tuple>

#include <c10/util/Half.h>  // PyTorch's conversions

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

static float widen(half x) { return c10::Half(x.bits, c10::Half::from_bits()); }
static void narrow(float x, half& y) { y.bits = c10::Half(x).x; }

#define PARAMETERS unsigned blocks, unsigned threads, int count, const int* bytes, void** arguments
#define RUN(kernel) return run(kernel, blocks, threads, count, bytes, arguments);

// The kernel over its grid, if each argument has as many bytes as the kernel takes. Else 0.
template <class... A>
int run(void (*kernel)(A...), PARAMETERS)
{
    int i = 0, j = 0;
    if (count != sizeof...(A) || ((bytes[i++] != sizeof(A)) || ...)) return 0;
    const std::tuple<A...> values{*static_cast<A*>(arguments[j++])...};
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) std::apply(kernel, values);
    return 1;
}
