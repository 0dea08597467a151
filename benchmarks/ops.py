"""Time of the CUDA kernels, of the reference, and of the reference under torch.compile.

    python -m benchmarks.ops [--batch 4] [--rounds 5]

The shapes are those of FFHQ at 1024 pixels. Needs a CUDA device. Prints a Markdown table: medians
over the rounds, in which the three take turns, so that a change of the clock meets all of them.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from functools import partial

import torch

from stylegan2_ops import bias_act, upfirdn2d
from stylegan2_ops.upfirdn2d import setup_filter, upsample2d


def cases(batch):
    """(name, operation, shape of x, shape of b or None)"""
    f = setup_filter([1, 3, 3, 1]).cuda()
    blur = partial(upfirdn2d, f=f, padding=1, gain=4)
    lrelu = partial(bias_act, act="lrelu")
    for size, channels in [(64, 512), (256, 128), (1024, 32)]:
        half = size // 2
        yield f"blur {size}", blur, (batch, channels, size + 1, size + 1), None
        yield f"upsample RGB to {size}", partial(upsample2d, f=f), (batch, 3, half, half), None
        yield f"bias, lrelu {size}", lrelu, (batch, channels, size, size), channels


def milliseconds(work):
    """Of one run; the timer waits for the GPU."""
    from torch.utils.benchmark import Timer  # torch warns if it is imported without a GPU

    return Timer("work()", globals={"work": work}).blocked_autorange(min_run_time=0.1).median * 1e3


def medians(operation, x, b, backward, rounds):
    """Milliseconds of kernel, reference and compiled reference, and seconds of the first run."""
    inputs = [x] if b is None else [x, b]

    def work(function):
        y = function(*inputs)
        if backward:
            torch.autograd.grad(y, inputs, y.detach())

    def reference(*inputs):
        return operation(*inputs, impl="ref")

    torch.compiler.reset()  # else it gives up after some shapes
    kernel = partial(operation, impl="cuda")
    works = [partial(work, f) for f in (kernel, reference, torch.compile(reference))]
    began = time.perf_counter()
    works[0]()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    for each in works[1:]:
        each()  # so that no timer sees it compile
    rows = [[milliseconds(each) for each in works] for _ in range(rounds)]
    return [statistics.median(times) for times in zip(*rows, strict=True)], first


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.ops needs a CUDA device")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {options.batch}\n")
    print("| operation | type | pass | kernel ms | reference | compiled | first run s |")
    print("|---|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # first runs compile
        for name, operation, shape, channels in cases(options.batch):
            for dtype in torch.float32, torch.float16:
                x = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
                b = None
                if channels is not None:
                    b = torch.randn(channels, device="cuda", dtype=dtype, requires_grad=True)
                for backward in False, True:
                    times, first = medians(operation, x, b, backward, options.rounds)
                    kernel, *others = times
                    ratios = " | ".join(f"{t:.3f} ({t / kernel:.1f}x)" for t in others)
                    passes = "forward, backward" if backward else "forward"
                    kind = str(dtype).removeprefix("torch.")
                    row = f"| {name} | {kind} | {passes} | {kernel:.3f} | {ratios} | {first:.2f} |"
                    print(row, flush=True)


if __name__ == "__main__":
    main()
