"""What the benchmarks measure with: clock, memory, parts of a step, the machine and its peak."""

import contextlib
import json
import os
import platform
import time
from pathlib import Path
from unittest.mock import patch

import torch

from checkpoints.files import write_atomically

PARTS = (
    "texts", "frozen generator", "CLIP of source", "layer choice", "trainable generator",
    "CLIP of target", "backward", "optimizer, average", "other",
)  # fmt: skip
SEED = 0


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Memory:
    """The bytes of tensors that one way of working holds: `peak` over all its `with` blocks."""

    def __init__(self, device):
        self.device, self.held, self.peak = device, 0, 0

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler chats on stderr
            activities = [torch.profiler.ProfilerActivity.CPU]
            self.profiler = torch.profiler.profile(activities=activities, profile_memory=True)
            self.profiler.start()

    def __exit__(self, *_):
        if self.device.type == "cuda":
            top = torch.cuda.max_memory_allocated(self.device) - self.start
            self.peak = max(self.peak, self.held + top)
            self.held += torch.cuda.memory_allocated(self.device) - self.start
            return
        self.profiler.stop()
        events = self.profiler.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        for _, change in sorted(changes):
            self.held += change
            self.peak = max(self.peak, self.held)


class Parts:
    """Seconds of each part of a step. A part inside another one counts as the outer one."""

    def __init__(self, device):
        self.device, self.inside, self.seconds = device, False, dict.fromkeys(PARTS, 0.0)

    def timed(self, function, part):
        """The function with a clock. part: a name, or the arguments -> a name."""

        def run(*args, **kwargs):
            if self.inside:
                return function(*args, **kwargs)
            start, self.inside = clock(self.device), True
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                name = part if isinstance(part, str) else part(*args)
                self.seconds[name] += clock(self.device) - start

        return run

    @contextlib.contextmanager
    def step(self, patches, optimizer):
        """One step under the clock. patches: (object, name of its function, part)."""

        def start_of_update(*_):
            nonlocal update
            update = clock(self.device)

        with contextlib.ExitStack() as stack:
            for thing, name, part in patches:
                stack.enter_context(
                    patch.object(thing, name, self.timed(getattr(thing, name), part))
                )
            hook = optimizer.register_step_pre_hook(start_of_update)
            stack.callback(hook.remove)
            start = update = clock(self.device)
            before = sum(self.seconds.values())
            yield
            end = clock(self.device)
        self.seconds["optimizer, average"] += end - update
        self.seconds["other"] += end - start - (sum(self.seconds.values()) - before)


def peaks(device):
    """FLOPs per second of a large matrix product and of a large 3x3 convolution, float32."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device)
    x = torch.randn(8 if device.type == "cuda" else 2, 512, 64, 64, device=device)
    weight = torch.randn(512, 512, 3, 3, device=device)
    works = {
        "matmul": (lambda: a @ b, 2 * n**3),
        "conv": (
            lambda: torch.nn.functional.conv2d(x, weight, padding=1),
            2 * x.numel() * weight[:, 0].numel(),
        ),
    }
    found = {}
    for name, (work, flops) in works.items():
        times = []
        for _ in range(4):
            start = clock(device)
            work()
            times.append(clock(device) - start)
        found[name] = flops / min(times[1:])
    return found


def hardware(device):
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(": ")[1] for x in lines if x.startswith("model name")), name)
    found = {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        backends = torch.backends.cuda.matmul, torch.backends.cudnn
        found["tf32"] = any(x.allow_tf32 for x in backends)
    return found | {"torch": torch.__version__, "seed": SEED}


def aligned(rows):
    """A table in plain text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [x.rjust(n) for x, n in zip(row, widths, strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip()


def write_json(path, found):
    """The file appears whole or not at all."""
    write_atomically(path, lambda aside: aside.write_text(json.dumps(found, indent=1) + "\n"))
