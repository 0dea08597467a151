// y = clamp(gain * act(x + b)), or a derivative of it. After scalar.cuh, with these macros:
//   T      the type in memory: float, double, half or bfloat16
//   INT    int or long long, whichever counts the elements
//   PACK   how many adjacent elements a thread takes, in one memory access if there are several
//   ACT    a name from the list below
//   ORDER  0: y.  1: g * dy/dx.  2: g * v * d2y/dx2.
//
// All tensors are in one and the same order in memory, without gaps, and `step` is the distance
// there between neighbours along the axis of b. So element i meets b[i / step % channels].
// b is null for no bias; g and v are read from order 1 and 2 on.

enum { LINEAR, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH };

typedef INT Int;
typedef decltype(widen(T())) Real;

struct alignas(PACK * sizeof(T)) Pack { T at[PACK]; };

struct Curve { Real y, dy, ddy; };  // an activation with its derivatives; unused ones are not computed

__device__ inline Curve activation(Real x, Real alpha)
{
    const Real zero = 0, one = 1, two = 2;
    if (ACT == LINEAR) return {x, one, zero};
    if (ACT == RELU) return x <= 0 ? Curve{zero, zero, zero} : Curve{x, one, zero};  // keeps a NaN
    if (ACT == LRELU) return x > 0 ? Curve{x, one, zero} : Curve{alpha * x, alpha, zero};
    if (ACT == TANH) {
        const Real t = tanh(x), dt = one - t * t;
        return {t, dt, -two * t * dt};
    }
    if (ACT == ELU || ACT == SELU) {  // constants: arXiv 1706.02515
        const Real scale = ACT == ELU ? 1 : 1.0507009873554804934193349852946;
        const Real slope = ACT == ELU ? 1 : scale * Real(1.6732632423543772848170429916717);
        if (x > 0) return {scale * x, scale, zero};
        return {slope * expm1(x), slope * exp(x), slope * exp(x)};
    }
    const Real s = one / (one + exp(-x)), ds = s * (one - s);
    if (ACT == SIGMOID) return {s, ds, ds * (one - two * s)};
    if (ACT == SOFTPLUS) return {(x > 0 ? x : zero) + log1p(exp(x > 0 ? -x : x)), s, ds};
    return {x * s, s + x * ds, ds * (two + x * (one - two * s))};  // SWISH
}

extern "C" __global__ void bias_act(
    const T* x, const T* b, const T* g, const T* v, T* y,
    Int count, Int step, Int channels, Real alpha, Real gain, Real clamp)
{
    const Int i = PACK * (Int(blockIdx.x) * Int(blockDim.x) + Int(threadIdx.x));
    if (i >= count) return;
    const Pack xs = *(const Pack*)(x + i);
    Pack gs, vs, ys;
    if (ORDER > 0) gs = *(const Pack*)(g + i);
    if (ORDER > 1) vs = *(const Pack*)(v + i);

    Int inside = 0, channel = 0;
    if (b) { inside = i % step; channel = i / step % channels; }
#pragma unroll
    for (int k = 0; k < PACK; ++k) {
        Real in = widen(xs.at[k]);
        if (b) {
            in += widen(b[channel]);
            if (++inside == step) {
                inside = 0;
                if (++channel == channels) channel = 0;
            }
        }
        const Curve curve = activation(in, alpha);
        Real out = gain * curve.y;
        const bool above = out > clamp, below = out < -clamp;
        if (ORDER == 0) out = above ? clamp : below ? -clamp : out;
        if (ORDER == 1) out = above || below ? Real(0) : gain * curve.dy * widen(gs.at[k]);
        if (ORDER == 2)
            out = above || below ? Real(0)
                                 : gain * curve.ddy * widen(gs.at[k]) * widen(vs.at[k]);
        narrow(out, ys.at[k]);
    }
    *(Pack*)(y + i) = ys;
}
