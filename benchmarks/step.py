"""Time and memory of a step: ours, and the same mathematics in the published order of work.

    python -m benchmarks.step [--sizes 128 256 1024] [--stages 1 2] [--device cpu] [--repeats 7]
                              [--out runs/step] [--batch-mapper 4] [--batch 2] [--layer-batch 8]
                              [--same-malloc]

In one process the two take turns step by step, on the same latents; the times are medians. Ours is
ipl.train_mapper and ipl.adapt_generator as they are, the other benchmarks/published_order.py. First
both must give the same loss, gradient norm and layers. The memory is the largest sum of tensors
beyond the networks that are there from the start.

Ours keeps freed memory in the process, as ipl.py --keep-memory; the published order gives it back,
as any Python program under glibc, unless --same-malloc lets it keep it, too.
What is then left is the gain of the order of work alone. Without it, taking turns favours the
published order: gaps that ours leaves in the heap may serve it, and what it gives back, ours has to
get again, which grows with the batch.

In the table, "of peak" is the share of the machine's peak that ours reaches with the FLOPs that no
order of work can save, "with choice" counts the layer choice among them, and "once" are the seconds
before the first step. Parts are timed in steps of their own.

128 is the miniature; larger sizes are random, of published widths (benchmarks/networks.py).
The batches are the preset's, and the published ones. On a CPU those of 1024 are smaller unless
given: the tables say so. Writes step.json and step.png.
"""

import argparse
import contextlib
import copy
import math
import statistics
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import trange

import ipl
from benchmarks import measure, networks, published_order
from benchmarks.measure import PARTS, SEED, Memory, Parts, clock
from checkpoints.files import write_atomically
from cli.messages import plain_words
from cli.processes import choose_kernels, keep_memory, memory_advice, pick_device
from cli.run_folder import make_folder

WAYS = ("ours", "published")
SMALL = {"batch_mapper": 4, "batch": 1, "layer_batch": 4}  # at 1024 on a CPU

# ----------------------------------------------------------------------------------------------
# The two ways


def side(images, *_):
    """Whose image CLIP reads: only that of the trainable generator has a gradient."""
    return "CLIP of target" if images.requires_grad else "CLIP of source"


def patches_of(way, source, target, clip_model):
    texts = {
        "ours": [(ipl, "encode_embeddings"), (ipl, "select_layers")],
        "published": [
            (published_order, "encode_texts"),
            (published_order, "encode_prompts"),
            (published_order, "choose_layers"),
        ],
    }
    functions = [
        (thing, name, "layer choice" if "layers" in name else "texts") for thing, name in texts[way]
    ]
    functions += [(ipl, "clip_transform", side), (clip_model.visual, "forward", side)]
    functions += [(source, "synthesis", "frozen generator"), (torch.Tensor, "backward", "backward")]
    return functions + [(target, "synthesis", "trainable generator")] * (target is not None)


def draws(z_dim):
    """draw_z, and the list of what it has drawn."""
    rng, drawn = torch.Generator().manual_seed(SEED), []

    def draw_z(n):
        drawn.append(torch.randn(n, z_dim, generator=rng))
        return drawn[-1]

    return draw_z, drawn


def run_ours(world, stage, mapper, steps, target=None, draw_z=None):
    """A stage of ipl.py whose `steps` see every step begin and end."""
    cfg, generator, *clip_pair = world
    more = {"rng": torch.Generator().manual_seed(SEED), "steps": steps, "draw_z": draw_z}
    with warnings.catch_warnings(action="ignore"):  # that so few steps teach little
        if stage == 1:
            return ipl.train_mapper(*world, mapper=mapper, **more)
        directions = [ipl.prompt_directions(cfg, world.clip_model, mapper)]
        return ipl.adapt_generator(cfg, generator, [clip_pair], directions, target=target, **more)


def published_step(world, stage, mapper):
    """The other way: z's -> loss and layers of a step; what it trains, its CLIP, its optimizer."""
    cfg, generator, clip_model, transform = world
    clip_model = copy.deepcopy(clip_model).requires_grad_()
    frozen = cfg, generator, clip_model, transform
    target, average = None, None
    if stage == 2:
        target, average = networks.moved(generator), copy.deepcopy(generator)
    optimizer = published_order.adam(cfg, stage, target or mapper)

    def step(*z):
        z = [x.to(generator.w_avg.device) for x in z]
        if stage == 1:
            return {"loss": published_order.mapper_step(*frozen, mapper, optimizer, *z)}
        parts = mapper, target, average, optimizer
        loss, layers = published_order.generator_step(*frozen, *parts, *z)
        return {"loss": loss, "layers": layers}

    return step, target or mapper, clip_model, optimizer


def grad_norm(network):
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def check(row, expected, name):
    """Raises ValueError unless ours and the published order have taken the same step."""
    wrong = [
        f"{key} is {row[key]:.6g} in ours and {expected[key]:.6g} in the published order"
        for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3))
        if not math.isclose(row[key], expected[key], rel_tol=tolerance)
    ]
    if set(row.get("layers", ())) != set(expected.get("layers", ())):
        wrong += [f"layers {row['layers']} in ours and {expected['layers']} in the published order"]
    if wrong:
        raise ValueError(f"{name}: {'; '.join(wrong)}; wanted: the same, so nothing was timed")


def compare(world, stage, repeats, name, same_malloc=False):
    """Both ways in turn -> a dict of what was measured.

    The first two steps of each are a check and warm it up; what they hold is its memory. The next
    `repeats` are timed as a whole, and up to three more by part.
    """
    device = world.generator.w_avg.device
    mapper = networks.new_mapper(world)
    theirs, trained, their_clip, their_optimizer = published_step(
        world, stage, copy.deepcopy(mapper)
    )
    draw_z, drawn = draws(world.generator.z_dim)
    memory = {way: Memory(device) for way in WAYS}
    parts = {way: Parts(device) for way in WAYS}
    times = {way: [] for way in WAYS}
    for_parts = min(3, repeats)
    total = 2 + repeats + for_parts
    result = {}

    def steps(stage, total, state):
        result["once"] = clock(device) - start
        patches = {
            "ours": patches_of("ours", world.generator, target, world.clip_model),
            "published": patches_of("published", world.generator, target and trained, their_clip),
        }
        optimizers = {"ours": state["optimizer"], "published": their_optimizer}

        @contextlib.contextmanager
        def measured(way, i):
            keep_memory(way == "ours" or same_malloc)
            if i < 2:
                with memory[way]:
                    yield
            elif i < 2 + repeats:
                begin = clock(device)
                yield
                times[way].append(clock(device) - begin)
            else:
                with parts[way].step(patches[way], optimizers[way]):
                    yield

        for i in trange(total, desc=name, disable=None):
            drawn.clear()
            with measured("ours", i):
                yield i
            with measured("published", i):
                row = theirs(*drawn)
            if i == 0:
                (ours,) = state["history"]
                check(ours, row | {"grad_norm": grad_norm(trained)}, name)
                result["loss"] = {"ours": ours["loss"], "published": row["loss"]}
                result["layers"] = row.get("layers")

    target = networks.moved(world.generator) if stage == 2 else None
    long = world._replace(cfg=replace(world.cfg, steps_mapper=total, steps=total))
    start = clock(device)
    run_ours(long, stage, mapper, steps, target, draw_z)
    medians = {way: statistics.median(times[way]) for way in WAYS}
    peaks = {way: memory[way].peak for way in WAYS}
    return result | {
        "seconds": medians, "times": times, "speedup": medians["published"] / medians["ours"],
        "bytes": peaks, "memory_ratio": peaks["ours"] / peaks["published"],
        "parts": {way: {k: x / for_parts for k, x in parts[way].seconds.items()} for way in WAYS},
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------
# Roofline


def flops_of(world, stage, chosen):
    """{part: FLOPs} of a step: what no order of work can save, and the layer choice.

    Stage 1: images and their features, prompts of true length and the gradient to the mapper.
    Stage 2: both images and their features, prompts, the gradient to the chosen layers.
    """
    cfg, generator, clip_model, transform = world
    device = generator.w_avg.device
    z = torch.randn(cfg.batch_mapper if stage == 1 else cfg.batch, generator.z_dim, device=device)
    w = generator.mapping(z).detach()
    E_I = ipl.image_encoder(clip_model, transform)
    width = clip_model.token_embedding.embedding_dim
    ctx = torch.randn(len(w), cfg.n_ctx, width, device=device, requires_grad=stage == 1)
    counts = {}

    def count(what, work):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            work()
        counts[what] = counter.get_total_flops()

    def prompts():
        features = [ipl.encode_prompts(clip_model, ctx, x) for x in (cfg.source, cfg.target)]
        if stage == 1:
            sum(x.sum() for x in features).backward()

    count("texts", prompts)
    count("frozen generator and CLIP", lambda: E_I(generator.synthesis(w)))
    if stage == 2:
        target = networks.moved(generator).requires_grad_(False)
        for j in chosen:
            target.layers()[j].requires_grad_(True)
        count("trainable generator and CLIP", lambda: E_I(target.synthesis(w)).sum().backward())
    if stage == 2:
        target.requires_grad_(False)
        w = generator.mapping(torch.randn(cfg.layer_batch, generator.z_dim, device=device))
        text = ipl.encode_texts(clip_model, cfg.target)[0]
        text_loss = lambda images: ipl.domain_loss(E_I(images), text)  # noqa: E731
        count("layer choice", lambda: ipl.select_layers(target, text_loss, w, 1))
    return counts


def shares_of_peak(row, peak):
    """The part of the peak that our step reaches, by the work that no order of work can save; and
    if the layer choice counts as such, too."""
    flops, choice = sum(row["flops"].values()), row["flops"].get("layer choice", 0)
    seconds = row["seconds"]["ours"]
    return {"unavoidable": (flops - choice) / seconds / peak, "with choice": flops / seconds / peak}


# ----------------------------------------------------------------------------------------------
# Report


def label(row):
    return f"{row['size']} px, stage {row['stage']}"


def report(rows):
    """The tables of all that was measured, a line at a time."""
    head = ["", "batch", "ours s", "published s", "speedup", "ours MB", "published MB", "ratio"]
    head += ["GFLOP", "of peak", "with choice", "once s"]
    table = [head]
    for row in rows:
        seconds, mega = row["seconds"], {way: x / 1e6 for way, x in row["bytes"].items()}
        table.append([
            label(row), row["batches"], f"{seconds['ours']:.3f}", f"{seconds['published']:.3f}",
            f"{row['speedup']:.2f}x", f"{mega['ours']:.0f}", f"{mega['published']:.0f}",
            f"{row['memory_ratio']:.2f}", f"{sum(row['flops'].values()) / 1e9:.1f}",
            *(f"{x:.0%}" for x in row["of_peak"].values()), f"{row['once']:.2f}",
        ])  # fmt: skip
    yield from measure.aligned(table)
    yield ""
    table = [["seconds of", *PARTS]]
    for row in rows:
        for way in WAYS:
            cells = [f"{row['parts'][way][part]:.3f}" for part in PARTS]
            table.append([f"{label(row)}, {way}", *cells])
    yield from measure.aligned([list(x) for x in zip(*table, strict=True)])


def plot(rows, path):
    """A bar for each way: the parts of a step, in units of the published order's time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, max(2.6, 1 + 0.8 * len(rows))), layout="constrained")
    axes = figure.subplots()
    names = [f"{label(row)}, {way}: {row['seconds'][way]:.2f} s" for row in rows for way in WAYS]
    left = [0.0] * len(names)
    for i, part in enumerate(PARTS):
        shares = [
            row["parts"][way][part] / sum(row["parts"]["published"].values())
            for row in rows
            for way in WAYS
        ]
        axes.barh(names, shares, left=left, label=part, color=f"C{i}")
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("time of a step, by part; published order = 1")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    write_atomically(path, figure.savefig)


def batches_of(cfg, stage, published):
    """The batches of a stage in words; a star where they are not the published ones."""
    names = ("batch_mapper",) if stage == 1 else ("batch", "layer_batch")
    values = [(getattr(cfg, name), getattr(published, name)) for name in names]
    return "+".join(f"{x}" + "*" * (x != y) for x, y in values)


def main(argv=None, build=networks.build):
    """build: size, device -> World."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 1024])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], choices=(1, 2))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/step"))
    parser.add_argument("--same-malloc", action="store_true")
    for name in SMALL:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    options = parser.parse_args(argv)
    with plain_words("benchmarks.step"):
        device = pick_device(options.device)
        choose_kernels(deterministic=False, tf32=False)
        make_folder(options.out)
        given = {
            name: getattr(options, name) for name in SMALL if getattr(options, name) is not None
        }
        for name, value in {"repeats": options.repeats, **given}.items():
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; wanted: at least 1")
        rows, peaks = [], measure.peaks(device)
        found = {
            "hardware": measure.hardware(device), "same malloc": options.same_malloc,
            "peaks": peaks, "steps": rows,
        }  # fmt: skip
        for size in options.sizes:
            world = build(size, device)
            small = SMALL if size >= 1024 and device.type == "cpu" else {}
            published = world.cfg
            ours_alone = {"bank": 0, "lambda_image": 0.0, "lambda_source": 0.0}  # not in that code
            world = world._replace(cfg=replace(published, **ours_alone | small | given))
            for stage in options.stages:
                row = {"size": size, "stage": stage}
                row["batches"] = batches_of(world.cfg, stage, published)
                with memory_advice(partial(str, f"in {label(row)}; wanted: smaller batches")):
                    row |= compare(world, stage, options.repeats, label(row), options.same_malloc)
                row["flops"] = flops_of(world, stage, row["layers"])
                row["of_peak"] = shares_of_peak(row, max(peaks.values()))
                rows.append(row)
                measure.write_json(options.out / "step.json", found)  # what there is, so far
                plot(rows, options.out / "step.png")
        print(", ".join(f"{name} {value}" for name, value in found["hardware"].items()))
        rates = (f"{name} {x / 1e9:.0f} GFLOP/s" for name, x in found["peaks"].items())
        print(f"{', '.join(rates)}; medians of {options.repeats} steps\n")
        print(*report(rows), sep="\n")
        if any("*" in row["batches"] for row in rows):
            print("\n* not the published batch, or not the preset's")


if __name__ == "__main__":
    main()
