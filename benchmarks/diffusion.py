"""What checkpointing the DDIM chain saves and costs: ``python -m benchmarks.diffusion``.

One forward and backward of the embedded diffusion model's synthesis, in both ways of keeping
activations: each step's input alone (`DiffusionGenerator.synthesis`, the rest computed again on the
way back), and all. Both give the same gradient, which is checked first; then they take turns.
"""

import argparse
import statistics
from unittest.mock import patch

import torch

import diffusion.generator
import miniature
from benchmarks.measure import Memory, aligned, clock
from checkpoints.diffusion import load_unet
from diffusion import DiffusionGenerator


def keep_all(function, *args, **_):
    """In the place of torch.utils.checkpoint.checkpoint."""
    return function(*args)


def gradient(generator, w, way):
    """Of all weights, flat, for one batch of pictures."""
    with patch.object(diffusion.generator, "checkpoint", way):
        loss = generator.synthesis(w).square().mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*generator.parameters()])])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args(argv)
    unet, alphas = load_unet(miniature.DDPM, options.device)
    ways, rows = {"kept": keep_all, "checkpointed": diffusion.generator.checkpoint}, []
    for steps in options.steps:
        generator = DiffusionGenerator(unet, alphas, steps=steps).requires_grad_()
        w = torch.randn(options.batch, generator.w_dim).to(options.device)
        memory, seconds, found = {}, {way: [] for way in ways}, []
        for name, way in ways.items():
            memory[name] = Memory(options.device)
            with memory[name]:
                found.append(gradient(generator, w, way))
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * found[0].abs().max().item())
        for _ in range(options.repeats):
            for name, way in ways.items():
                start = clock(options.device)
                gradient(generator, w, way)
                seconds[name].append(clock(options.device) - start)
        for name in ways:
            peak, middle = memory[name].peak / 1e6, statistics.median(seconds[name])
            rows.append([f"{steps} steps, {name}", f"{peak:.0f}", f"{middle:.2f}"])
    print(*aligned([[f"batch {options.batch}", "MB at peak", "seconds"], *rows]), sep="\n")


if __name__ == "__main__":
    main()
