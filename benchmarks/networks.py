"""The networks that the benchmarks run: the miniature's own, and random ones of published size."""

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import ipl
import miniature
from benchmarks.measure import SEED
from checkpoints import load_generator
from cli.settings import MINIATURE
from stylegan2_ops import Generator


class World(NamedTuple):
    cfg: ipl.Config
    generator: Any
    clip_model: Any
    transform: Any  # images in [-1, 1] -> CLIP input


def config_f(resolution, device):
    """FFHQ's network: 30.4 million weights at 1024, random ones."""
    torch.manual_seed(0)
    channels = {2**k: min(512, 2**15 // 2**k) for k in range(2, resolution.bit_length())}
    net = Generator(resolution, channels, w_dim=512)
    for layer in net.layers():
        layer.noise.weight.data.fill_(0.1)  # as if trained: without noise, images would be equal
    return net.to(device).eval()


def vit_b_32(device):
    """CLIP of ViT-B/32's size with random weights, and its transform."""
    torch.manual_seed(0)
    model = ipl.openai_clip().model.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
    model = model.eval().requires_grad_(False).to(device)
    return model, lambda images: ipl.clip_transform(images, 224)


def miniature_world(device):
    """The miniature and its preset, with adaptive layers.

    Without what the published code has not: autocast, crops, frozen noise strengths.
    """
    off = {name: getattr(ipl.Config(), name) for name in ("autocast", "crop", "freeze")}
    cfg = replace(MINIATURE, layers="adaptive", **off)
    generator = load_generator(miniature.GENERATOR, device)
    return World(cfg, generator, *ipl.load_clip(miniature.CLIP, device))


def random_world(resolution, device):
    """Config-f, ViT-B/32 and the published values, with noise that a second run repeats."""
    cfg = ipl.Config(noise="fixed", eps=0.1)
    return World(cfg, config_f(resolution, device).requires_grad_(False), *vit_b_32(device))


def build(size, device):
    """128: the miniature; larger: random networks of the published widths."""
    return miniature_world(device) if size == 128 else random_world(size, device)


def new_mapper(world):
    """An untrained mapper of the world's sizes, the same each time."""
    rng = torch.Generator().manual_seed(SEED)
    ctx_dim = world.clip_model.token_embedding.embedding_dim
    mapper = ipl.LatentMapper(world.generator.w_dim, world.cfg.n_ctx, ctx_dim, rng)
    return mapper.to(world.generator.w_avg.device)


def moved(generator):
    """A copy of a generator that has begun to differ: from equal images no gradient is typical."""
    rng = torch.Generator().manual_seed(1)
    target = copy.deepcopy(generator)
    for p in target.parameters():
        noise = torch.randn(p.shape, generator=rng).to(p)
        p.data += 0.02 * p.detach().square().mean().sqrt() * noise
    return target
