"""Modulated convolution (StyleGAN2, arXiv 1912.04958, Sec. 2.2)."""

import torch
import torch.nn.functional as F

from .upfirdn2d import filter_size, upfirdn2d


def modulated_conv2d(
    x, weight, styles, noise=None, up=1, padding=0,
    resample_filter=None, demodulate=True, flip_weight=True,
):
    """Convolve each image with weights of its own, scaled by its styles and brought to unit norm.

    In this order: upsample by `up` with `resample_filter`, where the filter also fills the margin
    of `padding` pixels; convolve; demodulate; add noise.
        w'[b, o, i, k] = weight[o, i, k] * styles[b, i]                            Eq. (1)
        y[b, o] = sum_i conv(x[b, i], w'[b, o, i]) / sqrt(sum_ik w'[b, o, i, k]^2 + 1e-8)   Eq. (3)
    Computed as scale x, convolve with the shared weight, scale y: equal, and one plain convolution.

    x: [B, in, H, W]. weight: [out, in, kh, kw]. styles: [B, in]. noise: None, or broadcastable to
    y, as [H', W'] or [B, 1, H', W']. padding: int, in pixels of the upsampled image.
    resample_filter: [fh, fw] of sum 1, or None; for up > 1 only. demodulate: False leaves the
    square root out. flip_weight: True correlates, as conv2d does; False convolves.
    Returns y: [B, out, H', W'], H' = H * up + 2 * padding - kh + 1.

    x may be of a smaller type than the other tensors: it is that of y, and styles, weight and noise
    are cast to it after the norms were taken. In float16 weight and styles are first scaled to a
    maximum of 1 / sqrt(in * kh * kw) and 1, so that nothing overflows; demodulation cancels that.

    Differentiable in x, weight, styles and noise to any order.
    Semantics: `modulated_conv2d` of the published `training/networks.py`.
    """
    if demodulate:
        if x.dtype == torch.float16:
            peak = weight.detach().abs().amax([1, 2, 3], keepdim=True)
            weight = weight / (peak * weight[0].numel() ** 0.5)
            styles = styles / styles.detach().abs().amax(1, keepdim=True)
        norm2 = styles.square() @ weight.square().sum([2, 3]).T  # [B, out]
        scale = (norm2 + 1e-8).rsqrt()[:, :, None, None].to(x.dtype)
    weight, noise = weight.to(x.dtype), None if noise is None else noise.to(x.dtype)
    x = x * styles[:, :, None, None].to(x.dtype)
    if up == 1:
        x = F.conv2d(x, weight if flip_weight else weight.flip(2, 3), padding=padding)
    else:
        # Convolution and filter commute. The transposed convolution inserts the zeros, flips the
        # weight, and pads by k - 1 before and k - up behind the image.
        flipped = weight.flip(2, 3) if flip_weight else weight
        x = F.conv_transpose2d(x, flipped.transpose(0, 1), stride=up)
        (fw, fh), (kh, kw) = filter_size(resample_filter), weight.shape[2:]
        padding = [
            padding + (fw + up - 1) // 2 - (kw - 1), padding + (fw - up) // 2 - (kw - up),
            padding + (fh + up - 1) // 2 - (kh - 1), padding + (fh - up) // 2 - (kh - up),
        ]
        x = upfirdn2d(x, resample_filter, padding=padding, gain=up**2)
    if demodulate:
        return x * scale if noise is None else torch.addcmul(noise, x, scale)
    return x if noise is None else x + noise
