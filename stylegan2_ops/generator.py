"""The StyleGAN2 generator (arXiv 1912.04958), skip architecture.

Parameters and buffers bear the names of rosinality's checkpoints, which most public tools write,
so that reading one is a plain keyed copy. Some modules exist for such a name alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .bias_act import bias_act
from .modulated_conv import modulated_conv2d
from .upfirdn2d import setup_filter, upsample2d


class PixelNorm(nn.Module):
    """x / sqrt(mean x^2 + 1e-8) over axis 1."""

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


class EqualLinear(nn.Module):
    """Linear layer with an equalised learning rate: stored weights of order 1, scaled in use."""

    def __init__(self, in_features, out_features, bias=0.0, lr_mul=1.0, act="linear"):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_features,), bias))
        self.scale = lr_mul / math.sqrt(in_features)
        self.lr_mul = lr_mul
        self.act = act

    def forward(self, x):
        x = F.linear(x, self.weight * self.scale)
        return bias_act(x, self.bias * self.lr_mul, act=self.act)


class Fir(nn.Module):
    """The resampling filter [1, 3, 3, 1], stored with the gain of 4 that rosinality gives it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("kernel", setup_filter([1, 3, 3, 1], gain=4))


class ModulatedConv(nn.Module):
    """Convolution modulated by an affine map of w; doubles the resolution if `up` is 2."""

    def __init__(self, in_channels, out_channels, size, w_dim, up=1, demodulate=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, size, size))
        self.modulation = EqualLinear(w_dim, in_channels, bias=1.0)
        if up > 1:
            self.blur = Fir()
        self.scale = 1 / math.sqrt(in_channels * size**2)
        self.padding = size // 2
        self.up = up
        self.demodulate = demodulate

    def forward(self, x, w, noise=None):
        return modulated_conv2d(
            x, self.weight[0] * self.scale, self.modulation(w), noise,
            up=self.up,
            padding=self.padding,
            resample_filter=self.blur.kernel / 4 if self.up > 1 else None,
            demodulate=self.demodulate,
            flip_weight=self.up == 1,
        )


class Noise(nn.Module):
    """The learned strength of a layer's noise."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, noise):
        return self.weight * noise


class Activation(nn.Module):
    """Bias, then leaky ReLU of slope 0.2 and gain sqrt(2)."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return bias_act(x, self.bias, act="lrelu")


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise, activation."""

    def __init__(self, in_channels, out_channels, w_dim, up=1):
        super().__init__()
        self.conv = ModulatedConv(in_channels, out_channels, 3, w_dim, up=up)
        self.noise = Noise()
        self.activate = Activation(out_channels)

    def forward(self, x, w, noise):
        return self.activate(self.conv(x, w, self.noise(noise)))


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to RGB, added to the enlarged image of the block before."""

    def __init__(self, in_channels, w_dim, first=False):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if not first:
            self.upsample = Fir()
        self.conv = ModulatedConv(in_channels, 3, 1, w_dim, demodulate=False)

    def forward(self, x, w, image=None):
        rgb = self.conv(x, w) + self.bias
        return rgb if image is None else rgb + upsample2d(image, self.upsample.kernel / 4)


class Generator(nn.Module):
    """z -> mapping -> w -> synthesis -> image.

    resolution: R, a power of two from 8 on. channels: {4: c, 8: c, ..., R: c}. w_dim: width of
    both z and w. n_mlp: number of layers of the mapping network. There are num_ws = 2 log2(R) - 2
    places that take a w. Weights are drawn from the global random state.

    w_avg [w_dim] is the centre for truncation, zero until set. It is a buffer but not in the state
    dict: the published files keep it beside, as "latent_avg".
    """

    def __init__(self, resolution, channels, w_dim, n_mlp=8):
        super().__init__()
        if resolution < 8 or resolution.bit_count() != 1:
            raise ValueError(f"resolution must be a power of two from 8 on, not {resolution}")
        sizes = [2**k for k in range(2, resolution.bit_length())]  # 4, 8, ..., R
        self.resolution = resolution
        self.channels = {size: channels[size] for size in sizes}
        self.z_dim = self.w_dim = w_dim
        self.n_mlp = n_mlp
        self.num_ws = 2 * len(sizes)

        layers = [EqualLinear(w_dim, w_dim, lr_mul=0.01, act="lrelu") for _ in range(n_mlp)]
        self.style = nn.Sequential(PixelNorm(), *layers)
        self.register_buffer("w_avg", torch.zeros(w_dim), persistent=False)

        self.input = nn.Module()
        self.input.input = nn.Parameter(torch.randn(1, channels[4], 4, 4))
        self.conv1 = StyledConv(channels[4], channels[4], w_dim)
        self.to_rgb1 = ToRGB(channels[4], w_dim, first=True)
        self.convs = nn.ModuleList()
        self.to_rgbs = nn.ModuleList()
        for size in sizes[1:]:
            self.convs.append(StyledConv(channels[size // 2], channels[size], w_dim, up=2))
            self.convs.append(StyledConv(channels[size], channels[size], w_dim))
            self.to_rgbs.append(ToRGB(channels[size], w_dim))

        self.noises = nn.Module()
        for i in range(self.num_ws - 1):
            size = sizes[(i + 1) // 2]
            self.noises.register_buffer(f"noise_{i}", torch.randn(1, 1, size, size))

    def layers(self):
        """The num_ws modules that adaptation may train: layers()[j] is the one w index j feeds.

        Index 0 feeds conv1, index j >= 1 feeds convs[j - 1]. Every odd index feeds a ToRGB too,
        but those are never trained. The last index feeds nothing else: the last convolution,
        which makes that ToRGB's input, stands for it, as in the published layer choice.
        """
        return [self.conv1, *self.convs, self.convs[-1]]

    def mapping(self, z):
        """z [B, z_dim] -> w [B, w_dim]."""
        return self.style(z)

    def synthesis(self, w, *, rng=None):
        """w [B, w_dim] or [B, num_ws, w_dim] -> images [B, 3, R, R], near [-1, 1], unclamped.

        rng: None for the fixed noise buffers, or a torch.Generator to draw fresh noise from.
        """
        if w.ndim == 2:
            w = w[:, None].expand(-1, self.num_ws, -1)
        assert w.shape[1:] == (self.num_ws, self.w_dim), tuple(w.shape)
        ws = w.unbind(1)
        noises = list(self.noises.buffers())
        if rng is not None:
            shapes = [(len(w), *noise.shape[1:]) for noise in noises]
            noises = [torch.randn(s, generator=rng, device=rng.device).to(w) for s in shapes]

        x = self.input.input.expand(len(w), -1, -1, -1)
        x = self.conv1(x, ws[0], noises[0])
        image = self.to_rgb1(x, ws[1])
        for block, to_rgb in enumerate(self.to_rgbs):
            i = 2 * block + 1
            x = self.convs[i - 1](x, ws[i], noises[i])
            x = self.convs[i](x, ws[i + 1], noises[i + 1])
            image = to_rgb(x, ws[i + 2], image)
        return image
