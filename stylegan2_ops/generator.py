"""The StyleGAN2 generator (arXiv 1912.04958), with the variants of NVIDIA's later training code.

Parameters and buffers bear the names of rosinality's checkpoints, which most public tools write,
so that reading one is a plain keyed copy. Some modules exist for such a name alone. What that
layout does not know are `embed`, the classes of a conditional model, and `skips`, the shortcuts
of the resnet architecture.
"""

import inspect
import math
from itertools import pairwise

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
    """Bias, leaky ReLU of slope 0.2 and gain sqrt(2), clamp."""

    def __init__(self, channels, clamp=None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.clamp = clamp

    def forward(self, x, gain=1.0):
        clamp = None if self.clamp is None else self.clamp * gain
        gain = gain * math.sqrt(2)
        return bias_act(x, self.bias.to(x.dtype), act="lrelu", gain=gain, clamp=clamp)


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise, activation; the result is scaled by `gain`."""

    def __init__(self, in_channels, out_channels, w_dim, up=1, clamp=None):
        super().__init__()
        self.conv = ModulatedConv(in_channels, out_channels, 3, w_dim, up=up)
        self.noise = Noise()
        self.activate = Activation(out_channels, clamp)

    def forward(self, x, w, noise, gain=1.0):
        return self.activate(self.conv(x, w, self.noise(noise)), gain)


class Shortcut(nn.Module):
    """The linear path past the two convolutions of a resnet block: 1x1, at twice the resolution."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.blur = Fir()
        self.scale = 1 / math.sqrt(in_channels)

    def forward(self, x):
        x = F.conv2d(x, (self.weight * self.scale).to(x.dtype))
        return upsample2d(x, self.blur.kernel / 4)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to RGB, added to the enlarged image of the block before."""

    def __init__(self, in_channels, w_dim, first=False, clamp=None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if not first:
            self.upsample = Fir()
        self.conv = ModulatedConv(in_channels, 3, 1, w_dim, demodulate=False)
        self.clamp = clamp

    def forward(self, x, w, image=None):
        rgb = self.conv(x, w) + self.bias  # of the bias' type: images are summed in float32
        if self.clamp is not None:
            rgb = rgb.clamp(-self.clamp, self.clamp)
        return rgb if image is None else rgb + upsample2d(image, self.upsample.kernel / 4)


class Generator(nn.Module):
    """z -> mapping -> w -> synthesis -> image.

    resolution: R, a power of two from 8 on. channels: {4: c, 8: c, ..., R: c}. w_dim: width of w.
    n_mlp: number of layers of the mapping network. z_dim: width of z, that of w unless given.
    c_dim: number of classes, 0 for none. class_index: the class that is drawn; it may be set later.
    There are num_ws = 2 log2(R) - 2 places that take a w. Weights are drawn from the global random
    state.

    architecture, that of the blocks: "skip" sums an RGB image over all resolutions (Fig. 7b),
    "resnet" adds to each block a linear shortcut (Fig. 7c), "orig" has neither (Fig. 7a); these two
    have one ToRGB, at the end. conv_clamp: bound of |activation| after each convolution, or None.
    num_fp16_res: the blocks of this many highest resolutions run in float16 on a CUDA device;
    parameters stay float32, and elsewhere all runs in their type.

    w_avg [w_dim] is the centre for truncation, zero until set. It is a buffer but not in the state
    dict: the published files keep it beside, as "latent_avg".

    Raises ValueError if resolution, architecture or class_index is none of these.
    Semantics: the published `training/networks.py` and `training/networks_stylegan2.py`.
    """

    fp16_device = "cuda"  # the type of device on which blocks may run in float16

    def __init__(
        self, resolution, channels, w_dim, n_mlp=8, z_dim=None, c_dim=0, class_index=None,
        architecture="skip", conv_clamp=None, num_fp16_res=0,
    ):
        super().__init__()
        if resolution < 8 or resolution.bit_count() != 1:
            raise ValueError(f"resolution must be a power of two from 8 on, not {resolution}")
        if architecture not in ("skip", "resnet", "orig"):
            raise ValueError(f"architecture must be skip, resnet or orig, not {architecture!r}")
        if class_index is not None and class_index not in range(c_dim):
            raise ValueError(f"class_index must be below {c_dim}, not {class_index}")
        sizes = [2**k for k in range(2, resolution.bit_length())]  # 4, 8, ..., R
        self.resolution = resolution
        self.channels = {size: channels[size] for size in sizes}
        self.w_dim = w_dim
        self.n_mlp = n_mlp
        self.z_dim = z_dim or w_dim
        self.c_dim = c_dim
        self.class_index = class_index
        self.architecture = architecture
        self.conv_clamp = conv_clamp
        self.num_fp16_res = num_fp16_res
        self.num_ws = 2 * len(sizes)

        widths = [self.z_dim + (w_dim if c_dim else 0)] + [w_dim] * n_mlp
        layers = [EqualLinear(n, m, lr_mul=0.01, act="lrelu") for n, m in pairwise(widths)]
        self.style = nn.Sequential(PixelNorm(), *layers)
        if c_dim:
            self.embed = EqualLinear(c_dim, w_dim)
        self.register_buffer("w_avg", torch.zeros(w_dim), persistent=False)

        self.input = nn.Module()
        self.input.input = nn.Parameter(torch.randn(1, channels[4], 4, 4))
        self.conv1 = StyledConv(channels[4], channels[4], w_dim, clamp=conv_clamp)
        self.convs = nn.ModuleList()
        self.to_rgbs = nn.ModuleList()
        self.skips = nn.ModuleList()
        if architecture == "skip":
            self.to_rgb1 = ToRGB(channels[4], w_dim, first=True, clamp=conv_clamp)
        for size in sizes[1:]:
            before, here = channels[size // 2], channels[size]
            self.convs.append(StyledConv(before, here, w_dim, up=2, clamp=conv_clamp))
            self.convs.append(StyledConv(here, here, w_dim, clamp=conv_clamp))
            if architecture == "skip":
                self.to_rgbs.append(ToRGB(here, w_dim, clamp=conv_clamp))
            if architecture == "resnet":
                self.skips.append(Shortcut(before, here))
        if architecture != "skip":
            self.to_rgbs.append(ToRGB(here, w_dim, first=True, clamp=conv_clamp))

        self.noises = nn.Module()
        for i in range(self.num_ws - 1):
            size = sizes[(i + 1) // 2]
            self.noises.register_buffer(f"noise_{i}", torch.randn(1, 1, size, size))

    @property
    def config(self):
        """The arguments that make a generator of this shape, plain enough for JSON."""
        names = inspect.signature(Generator).parameters
        return {name: getattr(self, name) for name in names}

    def layers(self):
        """The num_ws modules that adaptation may train: layers()[j] is the one w index j feeds.

        Index 0 feeds conv1, index j >= 1 feeds convs[j - 1]. Every odd index (the last one alone,
        unless architecture is "skip") feeds a ToRGB too, but those are never trained. The last
        index feeds nothing else: the last convolution, which makes that ToRGB's input, stands for
        it, as in the published layer choice.
        """
        return [self.conv1, *self.convs, self.convs[-1]]

    def mapping(self, z):
        """z [B, z_dim] -> w [B, w_dim], of class `class_index` if there are classes."""
        if not self.c_dim:
            return self.style(z)
        if self.class_index is None:
            raise ValueError(f"class_index must be below {self.c_dim}, not None")
        norm, layers = self.style[0], self.style[1:]
        one_hot = F.one_hot(torch.full((len(z),), self.class_index), self.c_dim).to(z)
        return layers(torch.cat([norm(z), norm(self.embed(one_hot))], dim=1))

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
        if x.device.type == "cpu":  # the order in which its convolutions are fastest
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv1(x, ws[0], noises[0])
        image = self.to_rgb1(x, ws[1]) if self.architecture == "skip" else None
        blocks = len(self.convs) // 2
        for block in range(blocks):
            i = 2 * block + 1
            if w.device.type == self.fp16_device and block >= blocks - self.num_fp16_res:
                x = x.half()
            entering, gain = x, math.sqrt(0.5) if self.architecture == "resnet" else 1.0
            x = self.convs[i - 1](x, ws[i], noises[i])
            x = self.convs[i](x, ws[i + 1], noises[i + 1], gain)
            if self.architecture == "resnet":  # both paths scaled: the sum keeps the variance
                x = x + self.skips[block](entering) * gain
            if self.architecture == "skip":
                image = self.to_rgbs[block](x, ws[i + 2], image)
        return image if self.architecture == "skip" else self.to_rgbs[0](x, ws[-1])
