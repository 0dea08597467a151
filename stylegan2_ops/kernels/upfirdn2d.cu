// Upsample, pad, filter and downsample images. After scalar.cuh, with these macros:
//   T                   the type in memory: float, double, half or bfloat16
//   INT                 int or long long, whichever counts the elements
//   CHANNELS_LAST       1 if channels are adjacent in y, 0 if columns are
//   ROWS                outputs of a thread, one below the other; a multiple of UP_Y
//   UP_X, UP_Y          zeros are inserted to make every pixel so many
//   DOWN_X, DOWN_Y      every so-many-th output is computed
//   PHASE_X, PHASE_Y    padding at the left and at the top, modulo UP
//   TAPS_X, TAPS_Y      width and height of the filter
//
// One axis at a time: pixel p of x stands at UP * p + padding of the padded image, and output o
// covers DOWN * o + k for the taps 0 <= k < TAPS. With p = start + q, start = -floor(padding / UP),
// they meet at tap
//     k = UP * q + PHASE - DOWN * o.
// Only these taps are visited: inserted zeros cost nothing. Along y every thread sees the same
// pattern of taps, known to the compiler; along x the pattern depends on o.

typedef INT Int;
typedef decltype(widen(T())) Real;

constexpr int SPAN = ((ROWS - 1) * DOWN_Y + TAPS_Y - 1) / UP_Y + 1;  // rows of pixels they cover
constexpr int COLUMNS = (TAPS_X + UP_X - 1) / UP_X;
constexpr int UNROLL = TAPS_X * TAPS_Y <= 64 ? SPAN * COLUMNS * ROWS : 1;  // fully, or not at all

extern "C" __global__ void upfirdn2d(
    const T* x, const Real* f, T* y,
    Int threads, Int channels, Int height, Int width, Int out_height, Int out_width,
    Int start_y, Int start_x, Int x_n, Int x_c, Int x_h, Int x_w,
    Int y_n, Int y_c, Int y_h, Int y_w, Int flip, Real gain)
{
    Int i = Int(blockIdx.x) * Int(blockDim.x) + Int(threadIdx.x);
    if (i >= threads) return;
    const Int strips = (out_height + ROWS - 1) / ROWS;
    Int channel = 0;
    if (CHANNELS_LAST) { channel = i % channels; i /= channels; }
    const Int out_x = i % out_width; i /= out_width;
    const Int out_y = i % strips * ROWS; i /= strips;
    if (!CHANNELS_LAST) { channel = i % channels; i /= channels; }
    x += i * x_n + channel * x_c;
    y += i * y_n + channel * y_c + out_x * y_w;

    const Int q = (DOWN_X * out_x - PHASE_X + UP_X - 1) / UP_X;
    const int first = int(UP_X * q + PHASE_X - DOWN_X * out_x);  // the first tap to meet a pixel
    Real tap[TAPS_Y][COLUMNS];
#pragma unroll UNROLL
    for (int row = 0; row < TAPS_Y; ++row)
#pragma unroll UNROLL
        for (int column = 0; column < COLUMNS; ++column) {
            const int k = first + UP_X * column, index = row * TAPS_X + k;
            const int turned = TAPS_Y * TAPS_X - 1 - index;  // as a convolution has it
            tap[row][column] = k < TAPS_X ? gain * f[flip ? index : turned] : Real(0);
        }

    const Int left = start_x + q, top = start_y + out_y / UP_Y * DOWN_Y;
    Real sum[ROWS] = {};
#pragma unroll UNROLL
    for (int row = 0; row < SPAN; ++row)
#pragma unroll UNROLL
        for (int column = 0; column < COLUMNS; ++column) {
            const Int in_y = top + row, in_x = left + column;
            const bool inside = 0 <= in_y && in_y < height && 0 <= in_x && in_x < width;
            const bool tapped = first + UP_X * column < TAPS_X;
            const Real pixel = inside && tapped ? widen(x[in_y * x_h + in_x * x_w]) : Real(0);
#pragma unroll UNROLL
            for (int o = 0; o < ROWS; ++o) {
                const int k = UP_Y * row + PHASE_Y - DOWN_Y * o;
                if (0 <= k && k < TAPS_Y) sum[o] += pixel * tap[k][column];
            }
        }
#pragma unroll UNROLL
    for (int o = 0; o < ROWS; ++o)
        if (out_y + o < out_height) narrow(sum[o], y[(out_y + o) * y_h]);
}
