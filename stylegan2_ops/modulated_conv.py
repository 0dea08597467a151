"""Modulated convolution (StyleGAN2, arXiv 1912.04958, Sec. 2.2)."""

import torch
import torch.nn.functional as F

from .upfirdn2d import _filter_size, upfirdn2d


def modulated_conv2d(
    x, weight, styles, noise=None, up=1, padding=0,
    resample_filter=None, demodulate=True, flip_weight=True,
):
    """Convolve each image with its own weights, `weight * styles[b]`, brought to unit norm.

    In this order: upsample by `up` with `resample_filter`, pad, convolve, demodulate, add noise.
    Computed as scale - convolve - scale with one kernel for the whole batch, which is equal:
        w'[b, o, i, k] = weight[o, i, k] * styles[b, i]                    Eq. (1)
        d[b, o] = 1 / sqrt(sum over i, k of w'[b, o, i, k]^2 + 1e-8)       Eq. (3)
        y[b, o] = d[b, o] * conv(styles[b] * x[b], weight)[o] + noise

    x: [B, in, H, W]. weight: [out, in, kh, kw]. styles: [B, in]. noise: broadcastable to the
    output, e.g. [H', W'] or [B, 1, H', W']. padding: int, in pixels of the upsampled image.
    resample_filter: [fh, fw] with unit sum, or None; used if up > 1.
    flip_weight: True correlates, like torch.nn.functional.conv2d; False convolves.
    Returns [B, out, H', W'] with H' = H * up + 2 * padding - kh + 1.

    Differentiable in x, weight, styles and noise to any order. The semantics are those of
    `modulated_conv2d` in the published `training/networks.py`.
    """
    x = x * styles[:, :, None, None]
    if up == 1:
        x = F.conv2d(x, weight if flip_weight else weight.flip(2, 3), padding=padding)
    else:
        # Convolution and filter commute. A transposed convolution inserts the zeros, flips the
        # weights and pads by kernel - 1 in front and kernel - up behind.
        weight_up = (weight.flip(2, 3) if flip_weight else weight).transpose(0, 1)
        x = F.conv_transpose2d(x, weight_up, stride=up)
        (fw, fh), (kh, kw) = _filter_size(resample_filter), weight.shape[2:]
        x0, x1 = padding + (fw + up - 1) // 2 - (kw - 1), padding + (fw - up) // 2 - (kw - up)
        y0, y1 = padding + (fh + up - 1) // 2 - (kh - 1), padding + (fh - up) // 2 - (kh - up)
        x = upfirdn2d(x, resample_filter, padding=[x0, x1, y0, y1], gain=up**2)
    if demodulate:
        norm2 = styles.square() @ weight.square().sum([2, 3]).T           # [B, out]
        scale = (norm2 + 1e-8).rsqrt()[:, :, None, None]
        return x * scale if noise is None else torch.addcmul(noise, x, scale)
    return x if noise is None else x + noise
