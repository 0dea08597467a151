"""The U-Net of DDPM (arXiv 2006.11239), which predicts the noise in a picture.

Parameters bear the names of diffusers' UNet2DModel, and `config` is what its config.json holds, so
that a folder of either program opens in the other. What it knows: residual blocks with SiLU and
GroupNorm, attention where the blocks are called Attn..., and two ways to change the size: a
convolution, or as in "Diffusion Models Beat GANs" (arXiv 2105.05233) a residual block.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {  # what a config.json may leave out, with diffusers' values
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,  # None: one head
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,  # of the middle: as norm_num_groups, if time also scales
    "norm_eps": 1e-5,
    "downsample_padding": 1,  # 0: one row and column at the right and the bottom alone
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "resnet_time_scale_shift": "default",  # scale_shift: time also scales, behind the second norm
    "downsample_type": "conv",  # of Attn... blocks; resnet: a residual block, as Resnet... ones do
    "upsample_type": "conv",
}


def config_of(sample_size, block_out_channels, attention=(), residual=False, **others):
    """The config of a UNet. attention: of each level, whether it has attention; else none has.
    residual: whether residual blocks change the size."""
    attention = attention or [False] * len(block_out_channels)
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else (
        "DownBlock2D", "UpBlock2D")  # fmt: skip
    down = ["AttnDownBlock2D" if has else plain[0] for has in attention]
    up = ["AttnUpBlock2D" if has else plain[1] for has in reversed(attention)]
    if residual:
        others |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    return {
        "_class_name": "UNet2DModel",
        "sample_size": sample_size,
        "block_out_channels": list(block_out_channels),
        "down_block_types": down,
        "up_block_types": up,
        **CONFIG,
        **others,
    }


def time_waves(t, n, flip, shift):
    """t [B] -> [B, n]: sines and cosines of t at n/2 frequencies, from 1 down to about 1e-4.

    flip: cosines before sines. shift: 1 if the lowest frequency is 1e-4 itself, as in DDPM.
    """
    k = torch.arange(n // 2, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(10_000) / (n // 2 - shift) * k)
    waves = angles.cos(), angles.sin()
    return torch.cat(waves if flip else waves[::-1], dim=1)


class TimeEmbedding(nn.Module):
    """The waves of t, through two layers."""

    def __init__(self, n, out):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(n, out), nn.Linear(out, out)

    def forward(self, waves):
        return self.linear_2(F.silu(self.linear_1(waves)))


class ResnetBlock(nn.Module):
    """x [B, c_in, H, W], and the time's embedding [B, n] -> [B, c_out, H, W], or of another size.

    shift: how the time comes in, resnet_time_scale_shift. resize: "down", to half, by the mean of
    four pixels; "up", to twice, by doubling them; or None.
    """

    def __init__(self, c_in, c_out, n, groups, eps, shift, resize=None):
        super().__init__()
        self.scales, self.resize = shift == "scale_shift", resize
        self.norm1, self.norm2 = (nn.GroupNorm(groups, c, eps) for c in (c_in, c_out))
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(n, c_out * (1 + self.scales))
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time):
        y = F.silu(self.norm1(x))
        if self.resize:
            x, y = (F.avg_pool2d(a, 2) if self.resize == "down" else doubled(a) for a in (x, y))
        y, time = self.conv1(y), self.time_emb_proj(F.silu(time))[:, :, None, None]
        if self.scales:
            scale, shift = time.chunk(2, dim=1)
            y = self.norm2(y) * (1 + scale) + shift
        else:
            y = self.norm2(y + time)
        y = self.conv2(F.silu(y))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Every place of x [B, c, H, W] looks at all others."""

    def __init__(self, c, heads, groups, eps):
        super().__init__()
        self.heads = heads
        self.group_norm = nn.GroupNorm(groups, c, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, H W, c]
        q, k, v = (
            to(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.to_out[0](y).transpose(1, 2).unflatten(2, x.shape[2:])


def doubled(x):
    """Each pixel of x [B, c, H, W] as 2 x 2."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Resample(nn.Module):
    """To half the size, or to twice: a `conv` of c channels."""

    def __init__(self, c, stride, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride, padding)

    def forward(self, x, time):
        if self.conv.stride == (1, 1):
            x = doubled(x)
        elif self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Level(nn.Module):
    """The blocks at one size: `resnets`, an `attentions` behind each if it has heads."""

    def __init__(self, channels, c, n, heads, norm):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in, c, n, *norm) for c_in in channels)
        if heads:
            self.attentions = nn.ModuleList(Attention(c, heads, *norm[:2]) for _ in channels)

    def block(self, i, x, time):
        x = self.resnets[i](x, time)
        return self.attentions[i](x) if hasattr(self, "attentions") else x


class Middle(nn.Module):
    """Two residual blocks at the smallest size, attention between them."""

    def __init__(self, c, n, heads, norm):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(c, heads, *norm[:2])])
        self.resnets = nn.ModuleList(ResnetBlock(c, c, n, *norm) for _ in range(2))

    def forward(self, x, time):
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time)), time)


class UNet(nn.Module):
    """eps(x, t): x [B, 3, R, R] and t [B], of 0 to 999 -> the noise in x [B, 3, R, R].

    config: as `config_of` gives it. A model that also predicts variances has out_channels 6, of
    which the noise is the first three.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config = {**CONFIG, **config}
        widths, layers = config["block_out_channels"], config["layers_per_block"]
        norm = config["norm_num_groups"], config["norm_eps"], config["resnet_time_scale_shift"]
        n, head = 4 * widths[0], config["attention_head_dim"]

        def heads(c, kind="Attn"):
            return (c // head if head else 1) if kind.startswith("Attn") else 0

        def residual(kind, way):
            return kind.startswith("Resnet") or "Attn" in kind and config[way] == "resnet"

        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], n)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips, before = [widths[0]], widths[0]
        for i, (c, kind) in enumerate(zip(widths, config["down_block_types"], strict=True)):
            level = Level([before] + [c] * (layers - 1), c, n, heads(c, kind), norm)
            skips += [c] * layers
            if i < len(widths) - 1:
                resize = (
                    ResnetBlock(c, c, n, *norm, "down")
                    if residual(kind, "downsample_type")
                    else Resample(c, 2, config["downsample_padding"])
                )
                level.downsamplers = nn.ModuleList([resize])
                skips.append(c)
            self.down_blocks.append(level)
            before = c
        self.mid_block = Middle(before, n, heads(before), norm)
        for i, (c, kind) in enumerate(zip(widths[::-1], config["up_block_types"], strict=True)):
            ins = [(c if j else before) + skips.pop() for j in range(layers + 1)]
            level = Level(ins, c, n, heads(c, kind), norm)
            if i < len(widths) - 1:
                by_block = residual(kind, "upsample_type")
                resize = ResnetBlock(c, c, n, *norm, "up") if by_block else Resample(c, 1)
                level.upsamplers = nn.ModuleList([resize])
            self.up_blocks.append(level)
            before = c
        self.conv_norm_out = nn.GroupNorm(norm[0], before, norm[1])
        self.conv_out = nn.Conv2d(before, config["out_channels"], 3, padding=1)

    def encode(self, x, t):
        """-> the bottleneck [B, c, H, W], the output of mid_block; and what `decode` needs."""
        flip, shift = self.config["flip_sin_to_cos"], self.config["freq_shift"]
        waves = time_waves(t, self.conv_in.out_channels, flip, shift)
        time = self.time_embedding(waves.to(x.dtype))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, x, time)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x, time)
                skips.append(x)
        return self.mid_block(x, time), skips, time

    def decode(self, x, skips, time):
        """The bottleneck, and what `encode` gives with it -> the noise."""
        skips = list(skips)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, torch.cat([x, skips.pop()], dim=1), time)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, time)
        return self.conv_out(F.silu(self.conv_norm_out(x)))[:, : self.config["in_channels"]]

    def forward(self, x, t):
        return self.decode(*self.encode(x, t))
