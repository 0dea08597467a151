"""Upsample, FIR-filter and downsample images (StyleGAN2, arXiv 1912.04958, App. B).

Images are [B, C, H, W]. A filter is [fh, fw], or [n] for the separable filter that is its outer
product with itself, or None for the identity.
"""

import torch
import torch.nn.functional as F


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl="auto"):
    """Upsample, pad, filter and downsample each channel of a batch of images.

    In this order:
      1. Insert `up - 1` zeros after every pixel.
      2. Pad with zeros; a negative padding crops.
      3. Convolve with `f` (correlate if `flip_filter`), keeping only outputs whose whole support
         lies inside the padded image, and multiply by `gain`.
      4. Keep every `down`-th pixel, starting with the first.

    x: [B, C, H, W], any floating type. f: [fh, fw], [n] or None, float32 by convention, cast to
    the type of x. up, down: int or (x, y). padding, in pixels of the upsampled image: int,
    (x, y) or (x0, x1, y0, y1). impl: "auto" or "ref" for this reference, "cuda" for the kernel.
    Returns [B, C, H', W'] of x's type, with
    H' = (H * up_y + pad_y0 + pad_y1 - fh) // down_y + 1, and W' alike.

    Linear in x, so differentiable to any order in x; `f` is a constant and gets no gradient.
    Raises ValueError for an unknown `impl` or arguments that leave no pixel, RuntimeError for
    impl="cuda". The semantics are those of the published `torch_utils/ops/upfirdn2d.py`.
    """
    check_impl(impl)
    (up_x, up_y), (down_x, down_y) = _pair(up), _pair(down)
    x0, x1, y0, y1 = _padding(padding)
    if f is None:
        f = torch.ones(1, 1)
    f = f.detach().to(x)
    if not flip_filter:                       # conv2d correlates
        f = f.flip(tuple(range(f.ndim)))

    batch, channels, height, width = x.shape
    if up_x > 1 or up_y > 1:
        x = x.reshape(batch, channels, height, 1, width, 1)
        x = F.pad(x, [0, up_x - 1, 0, 0, 0, up_y - 1])
        x = x.reshape(batch, channels, height * up_y, width * up_x)
    x = F.pad(x, [x0, x1, y0, y1])
    # One group per channel: on CPUs far faster than folding the channels into the batch.
    if f.ndim == 1:                           # along x, then along y, each with sqrt(gain)
        f = (f * gain**0.5).expand(channels, 1, 1, -1)
        x = F.conv2d(x, f, stride=(1, down_x), groups=channels)
        return F.conv2d(x, f.mT, stride=(down_y, 1), groups=channels)
    f = (f * gain).expand(channels, 1, -1, -1)
    return F.conv2d(x, f, stride=(down_y, down_x), groups=channels)


def setup_filter(f, gain=1, normalize=True, flip_filter=False, separable=None):
    """The float32 filter that `upfirdn2d` takes, from a number, list, array or None.

    A 1-D filter of 8 or more taps stays 1-D, a shorter one becomes its outer product with
    itself, unless `separable` says otherwise. `normalize` divides by the sum; `gain` scales the
    2-D response (so a 1-D filter by its root). None and numbers give a 1x1 filter.
    """
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    if f.ndim == 0:
        f = f[None]
    if separable is None:
        separable = f.ndim == 1 and len(f) >= 8
    if f.ndim == 1 and not separable:
        f = f.outer(f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(tuple(range(f.ndim)))
    return f * gain ** (f.ndim / 2)


def filter2d(x, f, padding=0, flip_filter=False, gain=1, impl="auto"):
    """Filter, keeping the size: `padding` is relative to that."""
    (fw, fh), (x0, x1, y0, y1) = _filter_size(f), _padding(padding)
    padding = [x0 + fw // 2, x1 + (fw - 1) // 2, y0 + fh // 2, y1 + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=padding, flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl="auto"):
    """Enlarge by `up`, keeping the brightness: `padding` is relative to the size H*up x W*up."""
    (up_x, up_y), (fw, fh) = _pair(up), _filter_size(f)
    x0, x1, y0, y1 = _padding(padding)
    padding = [
        x0 + (fw + up_x - 1) // 2, x1 + (fw - up_x) // 2,
        y0 + (fh + up_y - 1) // 2, y1 + (fh - up_y) // 2,
    ]
    gain = gain * up_x * up_y
    return upfirdn2d(x, f, up=up, padding=padding, flip_filter=flip_filter, gain=gain, impl=impl)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1, impl="auto"):
    """Shrink by `down`: `padding` is relative to the size H/down x W/down."""
    (down_x, down_y), (fw, fh) = _pair(down), _filter_size(f)
    x0, x1, y0, y1 = _padding(padding)
    padding = [
        x0 + (fw - down_x + 1) // 2, x1 + (fw - down_x) // 2,
        y0 + (fh - down_y + 1) // 2, y1 + (fh - down_y) // 2,
    ]
    return upfirdn2d(
        x, f, down=down, padding=padding, flip_filter=flip_filter, gain=gain, impl=impl
    )


def check_impl(impl):
    """Accept "auto" and "ref", refuse "cuda" (RuntimeError) and anything else (ValueError)."""
    if impl == "cuda":
        raise RuntimeError('this version has no CUDA kernel: use impl="ref"')
    if impl not in ("auto", "ref"):
        raise ValueError(f'impl must be "auto", "ref" or "cuda", not {impl!r}')


def _pair(value):
    """n or (x, y) -> x, y."""
    return (value, value) if isinstance(value, int) else tuple(value)


def _padding(value):
    """n, (x, y) or (x0, x1, y0, y1) -> x0, x1, y0, y1."""
    if isinstance(value, int):
        return (value,) * 4
    if len(value) == 2:
        x, y = value
        return x, x, y, y
    return tuple(value)


def _filter_size(f):
    """(width, height)."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])
