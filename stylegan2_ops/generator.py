"""The StyleGAN2 generator (arXiv 1912.04958, Fig. 2d and 7b) under rosinality's parameter names.

Axes: B images, R resolution, `num_ws` = 2 log2(R) - 2 style inputs. The names of the parameters
and buffers are those of the public checkpoints, so that reading one is a plain keyed copy.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .bias_act import bias_act
from .modulated_conv import modulated_conv2d
from .upfirdn2d import setup_filter, upfirdn2d


class PixelNorm(nn.Module):
    """x / rms(x) over the second axis."""

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class EqualLinear(nn.Module):
    """Linear layer whose weights are scaled to their He constant at run time (arXiv 1710.10196)."""

    def __init__(self, in_features, out_features, bias=0.0, lr_mul=1.0, act="linear"):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.full([out_features], float(bias)))
        self.scale = lr_mul / math.sqrt(in_features)
        self.lr_mul = lr_mul
        self.act = act

    def forward(self, x):
        return bias_act(F.linear(x, self.weight * self.scale), self.bias * self.lr_mul, act=self.act)


class Fir(nn.Module):
    """Holds the [1, 3, 3, 1] filter, with the gain of 4 that zero insertion asks for."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", setup_filter([1, 3, 3, 1], gain=4))


class ModulatedConv(nn.Module):
    """Modulated convolution whose styles are an affine map of w; optionally enlarges twofold."""

    def __init__(self, in_channels, out_channels, kernel, w_dim, up=1, demodulate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, kernel, kernel))
        self.modulation = EqualLinear(w_dim, in_channels, bias=1.0)
        if up > 1:
            self.blur = Fir()
        self.scale = 1 / math.sqrt(in_channels * kernel**2)
        self.up = up
        self.demodulate = demodulate

    def forward(self, x, w, noise=None):
        return modulated_conv2d(
            x,
            self.weight[0] * self.scale,
            self.modulation(w),
            noise,
            up=self.up,
            padding=self.weight.shape[-1] // 2,
            resample_filter=self.blur.kernel / 4 if self.up > 1 else None,
            demodulate=self.demodulate,
            flip_weight=self.up == 1,
        )


class Noise(nn.Module):
    """The strength of a layer's noise."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class Activation(nn.Module):
    """Bias, then leaky ReLU (slope 0.2, gain sqrt(2))."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return bias_act(x, self.bias, act="lrelu")


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise, activation: what one w feeds."""

    def __init__(self, in_channels, out_channels, w_dim, up=1):
        super().__init__()
        self.conv = ModulatedConv(in_channels, out_channels, 3, w_dim, up=up)
        self.noise = Noise()
        self.activate = Activation(out_channels)

    def forward(self, x, w, noise):
        return self.activate(self.conv(x, w, self.noise.weight * noise))


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to colours, added to the enlarged image of the block before."""

    def __init__(self, in_channels, w_dim, up=True):
        super().__init__()
        self.conv = ModulatedConv(in_channels, 3, 1, w_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if up:
            self.upsample = Fir()

    def forward(self, x, w, image=None):
        rgb = self.conv(x, w) + self.bias
        if image is None:
            return rgb
        return rgb + upfirdn2d(image, self.upsample.kernel, up=2, padding=[2, 1, 2, 1])


class Generator(nn.Module):
    """z -> mapping -> w -> synthesis -> image.

    resolution: R, a power of two, at least 8. channels: {4: c, 8: c, ..., R: c}. w_dim: width of
    z and of w. n_mlp: layers of the mapping network. Weights are initialised from the global RNG.

    w_avg [w_dim] is the centre of truncation; it is zero until set, and no part of the state
    dict, because the published files keep it beside theirs.
    """

    def __init__(self, resolution, channels, w_dim, n_mlp=8):
        super().__init__()
        log2 = resolution.bit_length() - 1
        if resolution != 2**log2 or resolution < 8:
            raise ValueError(f"resolution must be a power of two from 8 on, not {resolution}")
        self.resolution = resolution
        self.z_dim = self.w_dim = w_dim
        self.n_mlp = n_mlp
        self.num_ws = 2 * log2 - 2
        self.channels = {2**k: channels[2**k] for k in range(2, log2 + 1)}

        self.style = nn.Sequential(
            PixelNorm(),
            *[EqualLinear(w_dim, w_dim, lr_mul=0.01, act="lrelu") for _ in range(n_mlp)],
        )
        self.input = nn.Module()
        self.input.input = nn.Parameter(torch.randn(1, channels[4], 4, 4))
        self.conv1 = StyledConv(channels[4], channels[4], w_dim)
        self.to_rgb1 = ToRGB(channels[4], w_dim, up=False)
        self.convs = nn.ModuleList()
        self.to_rgbs = nn.ModuleList()
        self.noises = nn.Module()
        self.noises.register_buffer("noise_0", torch.randn(1, 1, 4, 4))
        for k in range(3, log2 + 1):
            size, before, after = 2**k, channels[2 ** (k - 1)], channels[2**k]
            self.convs.append(StyledConv(before, after, w_dim, up=2))
            self.convs.append(StyledConv(after, after, w_dim))
            self.to_rgbs.append(ToRGB(after, w_dim))
            self.noises.register_buffer(f"noise_{2 * k - 5}", torch.randn(1, 1, size, size))
            self.noises.register_buffer(f"noise_{2 * k - 4}", torch.randn(1, 1, size, size))
        self.register_buffer("w_avg", torch.zeros(w_dim), persistent=False)

    def layers(self):
        """The `num_ws` modules that adaptation may train: layers()[j] is what w index j feeds.

        Index 0 feeds conv1 and index j >= 1 convs[j - 1]. Odd indices feed a ToRGB layer as well,
        which is never trained; the last index feeds nothing else, so the last convolution, whose
        output that ToRGB reads, stands for it (as in the published layer choice).
        """
        return [self.conv1, *self.convs, self.convs[-1]]

    def mapping(self, z):
        """z [B, z_dim] -> w [B, w_dim]."""
        return self.style(z)

    def synthesis(self, w, *, rng=None):
        """w [B, w_dim] or [B, num_ws, w_dim] -> images [B, 3, R, R], about [-1, 1], unclamped.

        rng: None for the fixed noise buffers; a torch.Generator for fresh noise drawn from it.
        """
        if w.ndim == 2:
            w = w[:, None].expand(-1, self.num_ws, -1)
        ws = w.unbind(1)
        noises = list(self.noises.buffers())
        if rng is not None:
            noises = [
                torch.randn(len(w), *noise.shape[1:], generator=rng, device=rng.device).to(noise)
                for noise in noises
            ]
        x = self.conv1(self.input.input.expand(len(w), -1, -1, -1), ws[0], noises[0])
        image = self.to_rgb1(x, ws[1])
        for k, to_rgb in enumerate(self.to_rgbs):
            i = 2 * k + 1
            x = self.convs[i - 1](x, ws[i], noises[i])
            x = self.convs[i](x, ws[i + 1], noises[i + 1])
            image = to_rgb(x, ws[i + 2], image)
        return image
