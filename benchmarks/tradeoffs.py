"""Speed and quality of what trades one for the other: Config's fields that change the numbers.

    python -m benchmarks.tradeoffs [--seeds 101 102 103 104 105] [--target anime] [--variants ...]
    python -m benchmarks.tradeoffs --size 256    speed alone: random networks, published batches,
                                                 and the published order of work beside ours

Stage 2 on the miniature, with the adaptive layer choice and in float32, against the same with one
field changed at a time, and with the recommended ones together. All variants of a seed share one
mapper and one seed of latents. Speed is the time of an exact step over that of the variant's, both
from this run. Quality is what the miniature's judge sees in 512 pictures: shares of the target
domain and of attributes read right, Frechet distance; means over the seeds with 95% intervals, and
those of the differences to the exact runs of the same seeds. Writes tradeoffs.json.
"""

import argparse
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import ipl
from benchmarks import networks
from benchmarks.measure import SEED, clock, write_json
from benchmarks.step import published_step
from checkpoints import load_generator
from cli.messages import plain_words
from cli.processes import choose_kernels, keep_memory, pick_device
from cli.run_folder import make_folder
from cli.settings import MINIATURE
from miniature import CLIP, GENERATOR
from miniature.evaluate import interval
from miniature.judge import load_judge
from miniature.truth import Truth

# The rates of training are those of the preset before it got shorter.
EXACT = replace(MINIATURE, layers="adaptive", steps_mapper=120, lr=0.006, ema=0.99, crop=0.15)

PUBLISHED, TF32 = "published order of work", "tf32"
RECOMMENDED = {"layer_every": 5, "autocast": "all"}
VARIANTS = {
    "exact": {},
    "layer choice every 5 steps": {"layer_every": 5},
    "layer batch 2": {"layer_batch": 2},
    "CLIP in bf16": {"autocast": "clip"},
    "all in bf16": {"autocast": "all"},
    "all in fp16": {"autocast": "all", "half": "fp16"},
    "compile": {"compile": True},
    TF32: {},
    "recommended": RECOMMENDED,
}
FIGURES = ("target", "attributes", "frechet")


def adapt(exact, name, generator, pair, mapper, seed):
    """Stage 2 of a variant -> the adapted generator, and the seconds of a step."""
    cfg, times = replace(exact, **VARIANTS[name]), []
    choose_kernels(deterministic=False, tf32=name == TF32)

    def steps(stage, total, state):
        for step in range(total):
            times.append(time.perf_counter())  # each step ends in a wait for its loss
            yield step
        times.append(time.perf_counter())

    directions = [ipl.prompt_directions(cfg, pair[0], mapper)]
    rng = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(action="ignore"):  # that so few steps teach little
        adapted, _ = ipl.adapt_generator(cfg, generator, [pair], directions, rng=rng, steps=steps)
    return adapted, (times[-1] - times[1]) / (cfg.steps - 1)  # the first step warms up


def speeds(options):
    """{variant, or the published order: [seconds of a step]}, of networks with random weights."""
    world = networks.build(options.size, pick_device(options.device))
    exact, generator, *pair = world
    exact = replace(exact, steps=1 + 2 * RECOMMENDED["layer_every"])
    mapper = networks.new_mapper(world)
    rows = {PUBLISHED: [{"seconds": published(world, mapper)}]}
    for name in tqdm(options.variants, disable=None):
        rows[name] = [{"seconds": adapt(exact, name, generator, pair, mapper, SEED)[1]}]
    return rows


def published(world, mapper):
    """Seconds of a step in the published order, whose process gives freed memory back."""
    keep_memory(False)
    choose_kernels(deterministic=False, tf32=False)
    step, *_ = published_step(world, 2, mapper)
    device, z_dim = world.generator.w_avg.device, world.generator.z_dim
    times = []
    for _ in range(4):
        start = clock(device)
        step(torch.randn(world.cfg.batch, z_dim), torch.randn(world.cfg.layer_batch, z_dim))
        times.append(clock(device) - start)
    keep_memory()
    return statistics.median(times[1:])


def measure(options):
    """{variant: [figures and seconds of a step, for each seed]}."""
    device = pick_device(options.device)
    generator, pair = load_generator(GENERATOR, device), ipl.load_clip(CLIP, device)
    truth = Truth(512, 50_000, load_judge(), load_generator(GENERATOR))
    rows = {name: [] for name in options.variants}
    bar = tqdm(total=len(options.seeds) * len(rows), disable=None)
    for seed in options.seeds:
        exact = replace(EXACT, target=options.target, steps=options.steps)
        rng = torch.Generator().manual_seed(seed)
        mapper, _ = ipl.train_mapper(exact, generator, *pair, rng=rng)
        for name in rows:
            adapted, seconds = adapt(exact, name, generator, pair, mapper, seed)
            figures = truth.figures(truth.pictures(adapted.cpu()), options.target)
            rows[name].append({"seconds": seconds, **{k: figures[k] for k in FIGURES}})
            bar.update()
    return rows


def table(rows):
    if FIGURES[0] not in rows["exact"][0]:
        seconds = {name: found["seconds"] for name, (found,) in rows.items()}
        theirs, exact = seconds[PUBLISHED], seconds["exact"]
        return "\n".join(
            f"{name}: {x:.2f} s a step, {theirs / x:.2f}x, {exact / x:.2f}x exact"
            for name, x in seconds.items()
        )
    lines = ["| variant | speed | domain | − exact | attributes | − exact | Fréchet | − exact |"]
    lines.append("| --- |" + " --- |" * 7)
    for name, found in rows.items():
        pairs = list(zip(found, rows["exact"], strict=True))
        speed = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
        cells = [f"{speed:.2f}x"]
        for figure, digits in zip(FIGURES, (2, 2, 0), strict=True):
            mean, half = interval([row[figure] for row in found])
            cells.append(f"{mean:.{digits}f} ± {half:.{digits}f}")
            mean, half = interval([a[figure] - b[figure] for a, b in pairs])
            cells.append("" if name == "exact" else f"{mean:+.{digits}f} ± {half:.{digits}f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103, 104, 105])
    parser.add_argument("--target", default="anime")
    parser.add_argument("--steps", type=int, default=EXACT.steps)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--size", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/tradeoffs"))
    options = parser.parse_args()
    with plain_words("benchmarks.tradeoffs"):
        options.variants = list(dict.fromkeys(["exact", *options.variants]))
        make_folder(options.out)
        keep_memory()
        rows = speeds(options) if options.size else measure(options)
        hardware = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
        result = {"seeds": options.seeds, "target": options.target, "rows": rows, "on": hardware}
        write_json(options.out / "tradeoffs.json", result)
        if not options.size:
            print(f"{options.target}, seeds {' '.join(map(str, options.seeds))}")
        print(hardware)
        print(table(rows))


if __name__ == "__main__":
    main()
