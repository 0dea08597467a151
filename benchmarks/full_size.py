"""Time and peak memory at the published sizes: StyleGAN2 config-f and CLIP's ViT-B/32.

    python -m benchmarks.full_size network [--resolution 1024] [--batch 2] [--impl auto]
    python -m benchmarks.full_size stages  [--resolution 256] [--steps 1] [--layer-batch 8]

network: forward, and backward to all weights. stages: steps of both training loops, one adaptive
layer choice included in each step of the second. The weights are random, which changes no time.
--impl ref takes PyTorch's own operations instead of the CUDA kernels.
"""

import argparse
import resource
import sys
import time
from functools import partial

import torch

import ipl
from stylegan2_ops import Generator, bias_act, generator, modulated_conv


def config_f(resolution, device):
    """FFHQ's network: 30.4 million weights at 1024."""
    torch.manual_seed(0)
    channels = {2**k: min(512, 2**15 // 2**k) for k in range(2, resolution.bit_length())}
    net = Generator(resolution, channels, w_dim=512)
    for layer in net.layers():
        layer.noise.weight.data.fill_(0.1)  # as if trained: without noise, images would be equal
    return net.to(device).eval()


def vit_b_32(device):
    model = ipl.clip.model.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
    model = model.eval().requires_grad_(False).to(device)
    return model, lambda images: ipl.clip_transform(images, 224)


def peak_gb(device):
    """Of the process, or of PyTorch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def report(name, device, work):
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(f"{name:24}{seconds:9.2f} s{peak_gb(device):9.2f} GB at most so far", flush=True)
    return result


def network(options, device):
    net = config_f(options.resolution, device)
    print(f"{sum(p.numel() for p in net.parameters()):,} weights")
    z = torch.randn(options.batch, 512, device=device)
    for turn in "first", "second":  # the first one compiles kernels and reserves memory
        image = report(f"{turn} forward", device, lambda: net.synthesis(net.mapping(z)))
        report(f"{turn} backward", device, image.square().mean().backward)
        net.zero_grad()
        del image


def stages(options, device):
    net = config_f(options.resolution, device).requires_grad_(False)
    clip_model, transform = vit_b_32(device)
    cfg = ipl.Config(
        steps_mapper=options.steps, batch_mapper=options.batch, steps=options.steps,
        batch=options.batch, layer_batch=options.layer_batch,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    train = partial(ipl.train_mapper, cfg, net, clip_model, transform, rng=rng)
    mapper, history = report(f"stage 1, {options.steps} steps", device, train)
    directions = ipl.prompt_directions(cfg, clip_model, mapper)
    adapt = partial(ipl.adapt_generator, cfg, net, clip_model, transform, directions, rng=rng)
    _, rows = report(f"stage 2, {options.steps} steps", device, adapt)
    print("losses", *(f"{row['loss']:.3f}" for row in history + rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("network", "stages"))
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--layer-batch", type=int, default=8)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--impl", choices=("auto", "cuda", "ref"), default="auto")
    options = parser.parse_args()
    generator.bias_act = partial(bias_act, impl=options.impl)
    generator.upsample2d = partial(generator.upsample2d, impl=options.impl)
    modulated_conv.upfirdn2d = partial(modulated_conv.upfirdn2d, impl=options.impl)
    options.resolution = options.resolution or {"network": 1024, "stages": 256}[options.what]
    threads = torch.get_num_threads()
    print(f"{options}, torch {torch.__version__}, {threads} threads")
    {"network": network, "stages": stages}[options.what](options, options.device)


if __name__ == "__main__":
    main()
