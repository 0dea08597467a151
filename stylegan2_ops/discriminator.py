"""The StyleGAN2 discriminator: residual, with the spread of its batch as one more channel.

Architecture: arXiv 1912.04958, Sec. 4.1 and Fig. 7; minibatch standard deviation: arXiv 1710.10196,
Sec. 3. Parameters and buffers bear the names of rosinality's checkpoints ("d"), so that reading
one is a plain keyed copy; several modules are sequences for the numbers in these names alone.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn

from .generator import Activation, EqualLinear
from .upfirdn2d import setup_filter, upfirdn2d


def minibatch_stddev(x, group=4):
    """How much the pictures of a group differ: x [B, C, H, W] -> [B, 1, H, W], constant over H, W.

    A group has g = min(B, group) pictures: i and j are of one if i = j modulo B / g. The standard
    deviation over a group (of the biased variance plus 1e-8), averaged over channels and pixels.
    Raises ValueError unless B is a multiple of g.
    """
    B, C, H, W = x.shape
    g = min(B, group)
    if B % g:
        raise ValueError(f"a batch of {B} pictures does not part into groups of {g}")
    spread = (x.reshape(g, B // g, C, H, W).var(0, correction=0) + 1e-8).sqrt()
    return spread.mean((1, 2, 3)).repeat(g)[:, None, None, None].expand(-1, -1, H, W)


class Blur(nn.Module):
    """The filter [1, 3, 3, 1] of sum 1, over an image with a margin of `padding` zeros."""

    def __init__(self, padding, down=1):
        super().__init__()
        self.register_buffer("kernel", setup_filter([1, 3, 3, 1]))
        self.padding = padding
        self.down = down

    def forward(self, x):
        return upfirdn2d(x, self.kernel, down=self.down, padding=self.padding)


class EqualConv(nn.Module):
    """Convolution without bias, of an equalised learning rate: N(0, 1), scaled in use."""

    def __init__(self, in_channels, out_channels, size, stride=1, padding=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, size, size))
        self.scale = 1 / math.sqrt(in_channels * size**2)
        self.stride = stride
        self.padding = padding

    def forward(self, x):
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class Block(nn.Module):
    """[B, c, S, S] -> [B, c', S / 2, S / 2]: two 3x3 convolutions, and a linear path past them.

    Their sum is divided by sqrt(2), which keeps the variance.
    """

    def __init__(self, in_channels, out_channels, clamp=None):
        super().__init__()
        self.conv1 = nn.Sequential(
            EqualConv(in_channels, in_channels, 3, padding=1), Activation(in_channels, clamp)
        )
        self.conv2 = nn.Sequential(
            Blur(padding=2),
            EqualConv(in_channels, out_channels, 3, stride=2),
            Activation(out_channels, clamp),
        )
        # Every other pixel alone enters a 1x1 convolution of stride 2, so the filter leaves the
        # others out.
        self.skip = nn.Sequential(Blur(padding=1, down=2), EqualConv(in_channels, out_channels, 1))

    def forward(self, x):
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class Discriminator(nn.Module):
    """images [B, 3, R, R], near [-1, 1] -> logits [B, 1], positive for real ones.

    resolution: R, a power of two from 8 on. channels: {size: width} for 4, 8, ..., R, as a
    generator's. stddev_group: see `minibatch_stddev`. conv_clamp: what bounds every convolution's
    result, in some of NVIDIA's networks; they run in float32 here, whatever their float16 blocks.

    `convs` is a sequence: the 1x1 convolution of colours, then the blocks from R down to 4 pixels.
    Differentiable in images and parameters, twice and with the references of the operations to any
    order. Pictures of a batch see each other: real and generated ones are to be passed apart.
    Raises ValueError for another resolution, and for a batch that does not part into groups.
    """

    def __init__(self, resolution, channels, stddev_group=4, conv_clamp=None):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ValueError(f"resolution must be a power of two from 8 on, not {resolution}")
        sizes = [2**k for k in range(resolution.bit_length() - 1, 1, -1)]  # R, ..., 8, 4
        if missing := [size for size in sizes if size not in channels]:
            raise ValueError(f"channels has no width for {', '.join(map(str, missing))} pixels")
        self.resolution = resolution
        self.channels = {size: channels[size] for size in sizes}
        self.stddev_group = stddev_group
        self.conv_clamp = conv_clamp

        first, last = channels[resolution], channels[4]
        from_rgb = nn.Sequential(EqualConv(3, first, 1), Activation(first, conv_clamp))
        blocks = [Block(channels[s], channels[s // 2], conv_clamp) for s in sizes[:-1]]
        self.convs = nn.Sequential(from_rgb, *blocks)
        self.final_conv = nn.Sequential(
            EqualConv(last + 1, last, 3, padding=1), Activation(last, conv_clamp)
        )
        self.final_linear = nn.Sequential(
            EqualLinear(16 * last, last, act="lrelu"), EqualLinear(last, 1)
        )

    @property
    def config(self):
        """The arguments that make a discriminator of this shape, plain enough for JSON."""
        return {name: getattr(self, name) for name in inspect.signature(Discriminator).parameters}

    def features(self, images):
        """images [B, 3, R, R] -> [B, channels[4]], of which the last layer makes the logit."""
        if images.shape[1:] != (3, self.resolution, self.resolution):
            R = self.resolution
            raise ValueError(f"images are [B, 3, {R}, {R}], not {list(images.shape)}")
        if images.device.type == "cpu":  # the order in which its convolutions are fastest
            images = images.contiguous(memory_format=torch.channels_last)
        x = self.convs(images)
        x = torch.cat([x, minibatch_stddev(x, self.stddev_group)], dim=1)
        return self.final_linear[0](self.final_conv(x).flatten(1))

    def forward(self, images):
        return self.final_linear[1](self.features(images))
