"""Upsample, filter and downsample images: the resampling of StyleGAN2 (arXiv 1912.04958).

A filter is [fh, fw]; [n], which stands for its outer product with itself; or None, the identity.
"""

import torch
import torch.nn.functional as F


def upfirdn2d(x, f, up=1, down=1, padding=0, flip_filter=False, gain=1, impl="auto"):
    """Upsample, pad, filter and downsample every channel of a batch of images, in this order:

      1. Insert `up - 1` zeros after every pixel.
      2. Pad with zeros, or crop where the padding is negative.
      3. Convolve with `f` (correlate if `flip_filter`), keeping the outputs whose support lies
         inside the padded image, and multiply by `gain`.
      4. Keep every `down`-th pixel, starting with the first.

    x: [B, C, H, W], any floating type. f: [fh, fw], [n] or None, cast to the type of x.
    up, down: n or (x, y). padding, in pixels of the upsampled image: n, (x, y) or
    (x0, x1, y0, y1). impl: "ref" for the reference here, "cuda" for the CUDA kernel, or "auto" for
    the kernel on a CUDA tensor if it can be had, and else the reference.
    Returns [B, C, H', W'] of x's type, H' = (H * up_y + pad_y0 + pad_y1 - fh) // down_y + 1,
    and W' alike.

    Linear in x and differentiable in it to any order; `f` is a constant. Raises RuntimeError if
    `f` is larger than the padded image or the kernel is asked for and cannot be had, ValueError
    if impl is unknown.
    Semantics: the published `torch_utils/ops/upfirdn2d.py`.
    """
    (up_x, up_y), (down_x, down_y) = _pair(up), _pair(down)
    x0, x1, y0, y1 = _padding(padding)
    if f is None:
        f = torch.ones(1, 1)
    f = f.detach()
    if use_kernel(impl, x):
        from ._cuda import upfirdn2d as kernel

        f = f.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        if f.ndim == 2:
            up, down = [up_x, up_y], [down_x, down_y]
            return kernel(x, f, up, down, [x0, x1, y0, y1], flip_filter, float(gain))
        gain = gain**0.5
        x = kernel(x, f[None], [up_x, 1], [down_x, 1], [x0, x1, 0, 0], flip_filter, gain)
        return kernel(x, f[:, None], [1, up_y], [1, down_y], [0, 0, y0, y1], flip_filter, gain)

    f = f.to(x)
    if not flip_filter:
        f = f.flip(tuple(range(f.ndim)))  # for conv2d correlates

    batch, channels, height, width = x.shape
    if up_x > 1 or up_y > 1:
        x = x.reshape(batch, channels, height, 1, width, 1)
        x = F.pad(x, [0, up_x - 1, 0, 0, 0, up_y - 1])
        x = x.reshape(batch, channels, height * up_y, width * up_x)
    x = F.pad(x, [x0, x1, y0, y1])
    # One group per channel: on a CPU some 30 times faster than channels folded into the batch.
    if f.ndim == 1:  # along x, then along y
        f = (f * gain**0.5).expand(channels, 1, 1, -1)
        x = F.conv2d(x, f, stride=(1, down_x), groups=channels)
        return F.conv2d(x, f.mT, stride=(down_y, 1), groups=channels)
    f = (f * gain).expand(channels, 1, -1, -1)
    return F.conv2d(x, f, stride=(down_y, down_x), groups=channels)


def setup_filter(f, gain=1, normalize=True, flip_filter=False, separable=None):
    """The float32 filter [fh, fw] or [n] for `upfirdn2d`, from numbers in any form, or None.

    A 1-D filter stays 1-D if `separable`, by default from 8 taps on, and else becomes its outer
    product with itself. `normalize` makes its sum 1; `gain` then scales the 2-D response.
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
    """Filter at the same size [H, W]; `padding` comes on top."""
    (fw, fh), (x0, x1, y0, y1) = filter_size(f), _padding(padding)
    padding = [x0 + fw // 2, x1 + (fw - 1) // 2, y0 + fh // 2, y1 + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=padding, flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(x, f, up=2, padding=0, flip_filter=False, gain=1, impl="auto"):
    """Enlarge to [H * up, W * up] at the same brightness; `padding` comes on top."""
    (up_x, up_y), (fw, fh) = _pair(up), filter_size(f)
    x0, x1, y0, y1 = _padding(padding)
    padding = [
        x0 + (fw + up_x - 1) // 2, x1 + (fw - up_x) // 2,
        y0 + (fh + up_y - 1) // 2, y1 + (fh - up_y) // 2,
    ]
    gain = gain * up_x * up_y
    return upfirdn2d(x, f, up=up, padding=padding, flip_filter=flip_filter, gain=gain, impl=impl)


def downsample2d(x, f, down=2, padding=0, flip_filter=False, gain=1, impl="auto"):
    """Shrink to [H / down, W / down]; `padding`, in pixels of x, comes on top."""
    (down_x, down_y), (fw, fh) = _pair(down), filter_size(f)
    x0, x1, y0, y1 = _padding(padding)
    padding = [
        x0 + (fw - down_x + 1) // 2, x1 + (fw - down_x) // 2,
        y0 + (fh - down_y + 1) // 2, y1 + (fh - down_y) // 2,
    ]
    return upfirdn2d(
        x, f, down=down, padding=padding, flip_filter=flip_filter, gain=gain, impl=impl
    )


def use_kernel(impl, x):
    """Whether `impl` means the CUDA kernel for the tensor x.

    Raises RuntimeError with the reason if it does and the kernel cannot be had, ValueError if it
    is none of "auto", "cuda" and "ref".
    """
    if impl not in ("auto", "cuda", "ref"):
        raise ValueError(f'impl must be "auto", "cuda" or "ref", not {impl!r}')
    if impl == "ref" or (impl == "auto" and not x.is_cuda):
        return False
    from ._cuda import usable

    return usable(impl, x.device, x.dtype)


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


def filter_size(f):
    """(width, height)."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])
