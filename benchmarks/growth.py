"""How the cost of our step grows: with resolution, with batch, and over processes.

    python -m benchmarks.growth [--resolutions 64 128 256 512 1024] [--batches 2 4 8 16]
                                [--processes 1 2] [--device cpu] [--repeats 3] [--limit 60]
                                [--out runs/growth]

Networks as in benchmarks.step, random ones at every size. Resolutions are measured at batch 2, in
the layer choice too; batches at the lowest resolution; processes there as well, each with one
thread, sharing a batch of 8 by gloo, on a CPU only. A series ends where one step could take more
than `limit` seconds. Writes growth.json and growth.png.
"""

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import networks
from benchmarks.measure import aligned, clock, hardware, write_json
from benchmarks.step import run_ours
from checkpoints.files import write_atomically
from cli.messages import plain_words
from cli.processes import choose_kernels, keep_memory, leave, pick_device
from cli.run_folder import make_folder

SHARED = 8  # batch of all processes
STAGES = (1, 2)


def seconds_of(world, stage, batch, repeats):
    """The median of some steps of ours at one batch for all, after a first one."""
    device, times = world.generator.w_avg.device, []
    numbers = dict.fromkeys(("steps_mapper", "steps"), repeats + 1)
    batches = dict.fromkeys(("batch_mapper", "batch", "layer_batch"), batch)
    world = world._replace(cfg=replace(world.cfg, **numbers, **batches))

    def steps(stage, total, state):
        for step in range(total):
            start = clock(device)
            yield step
            times.append(clock(device) - start)

    run_ours(world, stage, networks.new_mapper(world), steps)
    return statistics.median(times[1:])


def series(points, growth, limit, measure):
    """measure(point) -> seconds, over rising points -> {point: seconds}, and why it ended early.

    growth: the power of a point with which the time grows at most, to foresee what is too long.
    """
    found = {}
    for point in points:
        if found:
            last = max(found)
            expected = found[last] * (point / last) ** growth
            if expected > limit:
                return found, f"{point} left out: a step could take {expected:.0f} s"
        found[point] = measure(point)
    return found, None


def exponent(found):
    """The slope of a straight line through the logarithms; None for a single point."""
    if len(found) < 2:
        return None
    return float(np.polyfit(np.log(list(found)), np.log(list(found.values())), 1)[0])


def worker(rank, processes, folder, build, resolution, repeats):
    """One of several processes of one thread; the first writes {stage: seconds}."""
    torch.set_num_threads(1)
    keep_memory()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
    )
    world = build(resolution, torch.device("cpu"))
    found = {stage: seconds_of(world, stage, SHARED, repeats) for stage in STAGES}
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
    leave()


def over_processes(processes, build, resolution, repeats):
    """{stage: seconds} of a batch that some processes share."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = processes, folder, build, resolution, repeats
        torch.multiprocessing.spawn(worker, arguments, nprocs=processes)
        found = json.loads(Path(folder, "seconds.json").read_text())
    return {int(stage): seconds for stage, seconds in found.items()}


def plot(found, path):
    """A panel for each axis, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(found), 3.2), layout="constrained")
    all_axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, stages) in zip(all_axes, found.items(), strict=True):
        for stage, row in stages.items():
            slope = row["exponent"]
            label = f"stage {stage}" + ("" if slope is None else f", exponent {slope:.2f}")
            axes.loglog(list(row["seconds"]), list(row["seconds"].values()), "o-", label=label)
        points = sorted({x for row in stages.values() for x in row["seconds"]})
        axes.set_xticks(points, map(str, points))
        axes.minorticks_off()
        axes.set(xlabel=name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    all_axes[0].set_ylabel("seconds of a step")
    write_atomically(path, figure.savefig)


def measure(options, device, build):
    """{axis: {stage: {"seconds": {point: seconds}, "ended": why or None, "exponent": slope}}}"""
    repeats, lowest = options.repeats, min(options.resolutions)

    def of_resolution(resolution, stage):
        return seconds_of(build(resolution, device), stage, 2, repeats)

    def of_batch(batch, stage):
        return seconds_of(build(lowest, device), stage, batch, repeats)

    axes = {
        "resolution": (options.resolutions, 2, of_resolution),
        "batch": (options.batches, 1, of_batch),
    }
    found = {}
    for name, (points, growth, seconds) in axes.items():
        found[name] = {}
        for stage in STAGES:
            run = partial(seconds, stage=stage)
            row, ended = series(sorted(points), growth, options.limit, run)
            found[name][stage] = {"seconds": row, "ended": ended}
    if device.type == "cpu":
        each = {n: over_processes(n, build, lowest, repeats) for n in sorted(options.processes)}
        found["processes"] = {
            stage: {"seconds": {n: row[stage] for n, row in each.items()}, "ended": None}
            for stage in STAGES
        }
    for stages in found.values():
        for row in stages.values():
            row["exponent"] = exponent(row["seconds"])
    return found


def tables(found):
    """A table for each axis, a line at a time."""
    for name, stages in found.items():
        points = sorted({x for row in stages.values() for x in row["seconds"]})
        table = [[name, *map(str, points), "exponent"]]
        for stage, row in stages.items():
            seconds = row["seconds"]
            cells = [f"{seconds[x]:.3f} s" if x in seconds else "-" for x in points]
            slope = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
            table.append([f"stage {stage}", *cells, slope])
        yield ""
        yield from aligned(table)
        yield from (f"stage {s}, {name} {x['ended']}" for s, x in stages.items() if x["ended"])
    if "processes" in found:
        cores = os.cpu_count()
        yield f"Each process has one thread, on {cores} cores; they share a batch of {SHARED}."


def main(argv=None, build=networks.random_world):
    """build: resolution, device -> World; a function of a module, for other processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/growth"))
    options = parser.parse_args(argv)
    with plain_words("benchmarks.growth"):
        device = pick_device(options.device)
        choose_kernels(deterministic=False, tf32=False)
        numbers = options.resolutions + options.batches + options.processes + [options.repeats]
        if min(numbers) < 1:
            raise ValueError(f"{min(numbers)} is no size and no number; wanted: at least 1")
        make_folder(options.out)
        keep_memory()
        found = measure(options, device, build)
        report = {"hardware": hardware(device), "repeats": options.repeats, "growth": found}
        write_json(options.out / "growth.json", report)
        plot(found, options.out / "growth.png")
        print(", ".join(f"{name} {value}" for name, value in report["hardware"].items()))
        print(*tables(found), sep="\n")


if __name__ == "__main__":
    main()
