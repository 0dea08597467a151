"""Time and peak memory of a StyleGAN2 of published size (config-f), forward and backward.

    python -m benchmarks.full_size [--resolution 1024] [--batch 2] [--device cpu] [--impl auto]

The weights are random, which changes no time; the gradient is that of all weights. --impl ref takes
PyTorch's own operations instead of the CUDA kernels. For whole steps: benchmarks/step.py.
"""

import argparse
import resource
import sys
from functools import partial

import torch

from benchmarks.measure import clock
from benchmarks.networks import config_f
from cli.processes import choose_kernels
from stylegan2_ops import bias_act, generator, modulated_conv


def peak_gb(device):
    """Of the process, or of PyTorch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def report(name, device, work):
    start = clock(device)
    result = work()
    seconds = clock(device) - start
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--impl", choices=("auto", "cuda", "ref"), default="auto")
    options = parser.parse_args()
    generator.bias_act = partial(bias_act, impl=options.impl)
    generator.upsample2d = partial(generator.upsample2d, impl=options.impl)
    modulated_conv.upfirdn2d = partial(modulated_conv.upfirdn2d, impl=options.impl)
    threads = torch.get_num_threads()
    print(f"{options}, torch {torch.__version__}, {threads} threads")
    choose_kernels(deterministic=False, tf32=False)
    network(options, options.device)


if __name__ == "__main__":
    main()
