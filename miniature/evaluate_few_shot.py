"""Few shots against words, by the judge: ``python -m miniature.evaluate_few_shot``.

For every target, method of variants/fewshot.py, number of shots and seed, which chooses the shots,
the generator is adapted to them with the same discriminator; beside them stand the zero-shot
methods of miniature/evaluate.py. The judge then looks at n pictures of latents that no training
uses, and that are of no shot's person. Its figures are explained in miniature/truth.py; more are,
with the shots at hand,

  clusters   pictures go to the shot whose features are nearest: mean distance of two in a cluster,
             of at most 50, mean over all clusters, 0 if there is no pair; over that of true targets
  nearest    mean distance of a picture's features to the nearest shot's, over that of true targets:
             below 1 it looks like shots more than the domain does
  D shots, D true, D generated   share that the adapted discriminator has right of the shots, of
             true targets that were no shots, and of generated pictures

D has right what it gives a logit above (shots, truth) or below 0 (generated), which depends on
where its zero lies. rssa's pictures are of codes near the shots', as in its training. `target`,
`nearest` and D's shares are taken on the way, too, of the first 64 latents. All few-shot runs have
the same number of steps, the zero-shot ones those of miniature/evaluate.py. A figure is the mean
over the seeds; those of each seed are in the JSON file, with the device and the seconds of one
processor: of few shots those of the training, of words those of all work. Whatever is finished is
kept in the folder of --out, and the same command goes on where it was; with fewer targets, shots or
seeds it writes the tables of those.
"""

import copy
import functools
import io
import itertools
import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import miniature
from checkpoints import load_discriminator
from checkpoints.files import write_atomically
from cli import few_shot
from cli.resume import sha256
from miniature import evaluate, faces
from miniature.evaluate import file_of, read
from miniature.truth import as_pixels
from variants import fewshot

FEW = ("tgan", "freezed", "cr", "cdc", "dag", "rssa", "ewc")
WORDS = {"nada": "NADA", "ipl": "IPL", "air": "AIR", "air-ipl": "AIR on IPL"}
SHOWN = "target attributes identity diversity clusters nearest structure frechet".split()
SHOWN += ["D shots", "D true", "D generated"]
ON_THE_WAY = "target", "nearest", "D shots", "D true", "D generated"


@dataclass(frozen=True)
class Config:
    targets: tuple[str, ...] = ("anime", "zombie", "monster")  # Target domains.
    methods: tuple[str, ...] = FEW  # Few-shot methods.
    words: tuple[str, ...] = tuple(WORDS)  # Zero-shot methods.
    shots: tuple[int, ...] = (1, 5, 10, 100)  # Numbers of shots.
    seeds: tuple[int, ...] = (101, 102, 103)  # Of the shots and of the training.
    out: Path = Path("runs/evaluate-few-shot")  # Where results are collected.
    n: int = 256  # Pictures.
    latents: int = 50_000  # Seed of their latents.
    moments: tuple[float, ...] = (0.25, 0.5, 0.75)  # Parts of a run after which it is looked at.
    held_out: int = 64  # True targets that the discriminator is asked about.
    device: str = "cpu"  # cpu, cuda or cuda:<n>, which all processes share; auto.
    processes: int = os.cpu_count() or 1  # Runs at a time, each on one CPU thread; 1: on all.
    # Of all few-shot runs, but for the method.
    preset: fewshot.Config = fewshot.Config()


def zero_shot(cfg):
    """What evaluate.py is asked for the zero-shot runs, whose files are in the same folder."""
    same = "targets seeds out n latents device processes".split()
    return evaluate.Config(methods=cfg.words, **{name: getattr(cfg, name) for name in same})


@functools.cache
def held_out(target, n):
    """True targets [n, 3, SIZE, SIZE] of persons who are neither shots nor in the test."""
    persons = faces.sample_persons(n, rng := torch.Generator().manual_seed(85_000))
    return faces.render(persons, faces.styles_of(target, n), rng=rng)


@functools.cache
def source_discriminator(device):
    return load_discriminator(miniature.DISCRIMINATOR, device)


# ----------------------------------------------------------------------------
# Figures


def in_clusters(features, centers, at_most=50):
    """Mean distance of the pairs nearest to the same center, mean over all centers: features
    [n, d], centers [k, d]. A center with less than a pair counts 0, where intra-LPIPS leaves it
    out (cli/metric_formulas.py), which flatters collapse."""
    nearest, total = torch.cdist(features, centers).argmin(1), 0.0
    for k in range(len(centers)):
        members = features[nearest == k][:at_most]
        total += F.pdist(members).mean().item() if len(members) > 1 else 0.0
    return total / len(centers)


def of_shots(features, true, shots):
    """`clusters` and `nearest` of features [n, d], beside true ones, with the shots' [k, d]."""
    apart = [torch.cdist(x, shots).amin(1).mean().item() for x in (features, true)]
    inside = [in_clusters(x, shots) for x in (features, true)]
    return {"clusters": inside[0] / inside[1] if inside[1] else math.nan,
            "nearest": apart[0] / apart[1]}  # fmt: skip


@torch.no_grad()
def share_right(D, images, real):
    """Share of images [n, 3, R, R] that D has right; some stand twice, to fill D's groups."""
    group = D.stddev_group
    filled = images[torch.arange(-(-len(images) // group) * group) % len(images)]
    logits = torch.cat([D(x) for x in filled.split(32)])[: len(images)]
    return ((logits > 0) == real).float().mean().item()


# ----------------------------------------------------------------------------
# Runs


@functools.cache
def first_of(truth, target, n):
    """The truth of the first n latents alone."""
    few, (true, others) = copy.copy(truth), truth.known[target]
    for name in ("w", "generated", "identities", "persons"):
        setattr(few, name, getattr(truth, name)[:n])
    few.known = {target: [true[:n], others]}
    return few


def run(cfg, target, method, k, seed):
    """One adaptation, measured: writes a row of figures and a strip of five pictures."""
    generator, _, _, truth = evaluate.world(cfg.n, cfg.latents, cfg.device)
    evaluate.oracle_of(zero_shot(cfg), target)  # now the truth knows the target
    device = generator.w_avg.device
    settings = few_shot.Settings(target=target, shots=k, seed=seed, **asdict(cfg.preset))
    settings = replace(settings, method=method)
    shots, _, find_codes = few_shot.read_shots(settings, generator)
    codes = find_codes() if method == "rssa" else None
    w, moments = truth.w[:, None].expand(-1, generator.num_ws, -1), []
    if codes is not None:
        w = fewshot.compressor(codes, generator.resolution, settings.compression)(w)
    seconds = -time.process_time()

    def look(state, truth):
        images = truth.pictures(state["average"].module, w[: len(truth.w)])
        features = [truth.read(images)["features"], truth.features(target)[0]]
        row = truth.figures(images, target) | of_shots(*features, truth.read(shots)["features"])
        asked = {"shots": shots, "true": held_out(target, cfg.held_out), "generated": images}
        for name, x in asked.items():
            row[f"D {name}"] = share_right(state["D"], x.to(device), name != "generated")
        return row, images

    def watch(stage, total, state):
        nonlocal seconds
        for step in range(total):
            if step in [round(part * total) for part in cfg.moments]:
                before = time.process_time()
                row, _ = look(state, first_of(truth, target, 64))
                moments.append({"step": step} | {name: row[name] for name in ON_THE_WAY})
                seconds -= time.process_time() - before
            yield step

    rng, D = torch.Generator().manual_seed(seed), source_discriminator(device)
    _, _, state = fewshot.adapt(settings, generator, D, shots, rng=rng, codes=codes, steps=watch)
    seconds += time.process_time()
    row, images = look(state, truth)
    moments.append({"step": cfg.preset.steps} | {name: row[name] for name in ON_THE_WAY})
    row |= {"moments": moments, "seconds": seconds, "device": device.type}
    torch.save(as_pixels(images[:5]), file_of(cfg, target, method, k, seed, suffix=".pt"))
    evaluate.write_json(file_of(cfg, target, method, k, seed), row)


# ----------------------------------------------------------------------------
# Reporting


def finished(cfg):
    """{(target, method, shots or 0, seed): row}; the seed of source and truth is None."""
    rows = {}
    for target in cfg.targets:
        known = read(file_of(cfg, target, "truth", suffix=".pt"))["rows"]
        rows |= {(target, name, 0, None): row for name, row in known.items()}
        for seed in cfg.seeds:
            for job in jobs_of(cfg, target, seed):
                row = json.loads(file_of(cfg, *job).read_text())
                rows[target, job[1], job[2] if len(job) == 4 else 0, seed] = row
    return rows


def mean_of(rows, target, method, k, name):
    """A figure's mean over the seeds; None if the rows have none."""
    found = [row.get(name) for key, row in rows.items() if key[:3] == (target, method, k)]
    return None if None in found else sum(found) / len(found)


def rows_of(cfg):
    """The rows of a table, (words, method, shots): the truth, words, then few shots."""
    yield from ((name, name, 0) for name in ("source", "truth"))
    yield from ((WORDS[m], m, 0) for m in cfg.words)
    few = ((m, k) for m in cfg.methods for k in cfg.shots)
    yield from ((f"{m}, {k}", m, k) for m, k in few if (m, k) != ("rssa", 1))


def better_from(cfg, mean, target, method, word, name="frechet"):
    """The least number of shots from which on the figure is better (lower) than a zero-shot's."""
    shots, bar = [k for _, m, k in rows_of(cfg) if m == method], mean(target, word, 0, name)
    ahead = [mean(target, method, k, name) < bar for k in shots]
    since = len(ahead) - ahead[::-1].index(False) if False in ahead else 0
    return str(shots[since]) if since < len(shots) else "none" if shots else ""


def table(cfg, rows):
    """Markdown of all results."""
    mean = functools.partial(mean_of, rows)
    few = [row for key, row in rows.items() if key[2]]
    on_gpu = sum(row["device"] == "cuda" for row in few)
    hours = f"took {sum(row['seconds'] for row in few) / 3600:.1f} hours of one processor"
    spent = f"was on a GPU in {on_gpu} of {len(few)} runs" if on_gpu else hours
    seeds = "means over seeds" if len(cfg.seeds) > 1 else "seed"
    lines = [
        f"{cfg.n} pictures of seed {cfg.latents}, {seeds} {', '.join(map(str, cfg.seeds))}; few "
        f"shots have {cfg.preset.steps} steps{', words those of evaluation.md' * bool(cfg.words)}; "
        f"the few-shot training {spent}."
    ]
    if cfg.words:
        head = ["target", "method", *(WORDS[word] for word in cfg.words)]
        lines += ["\nFrom how many shots on the Fréchet distance is less than with words alone:\n"]
        lines += [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
        for target, m in itertools.product(cfg.targets, cfg.methods):
            found = [better_from(cfg, mean, target, m, word) for word in cfg.words]
            lines += [f"| {' | '.join([target, m, *found])} |"]
    for target in cfg.targets:
        panel = file_of(cfg, target, suffix=".jpg").name
        lines += ["", f"### {target}", "", f"![{target}, of a few shots]({panel})", ""]
        lines += [f"| method, shots | {' | '.join(SHOWN)} |", "| --- |" + " --- |" * len(SHOWN)]
        for words, m, k in rows_of(cfg):
            found = [(name, mean(target, m, k, name)) for name in SHOWN]
            cells = [
                "" if x is None else f"{x:.{0 if name == 'frechet' else 2}f}" for name, x in found
            ]
            lines += [f"| {words} | {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"


def curves(cfg, rows):
    """Figures by the number of shots, a column for each target: the bytes of a .png file."""
    from matplotlib.figure import Figure

    mean = functools.partial(mean_of, rows)
    names = {"frechet": "Fréchet distance", "target": "judged the target"}
    names |= {"identity": "same person", "diversity": "diversity"}
    size = 2.9 * len(cfg.targets), 2.0 * len(names) + 0.6
    figure = Figure(figsize=size, dpi=88, layout="constrained")
    grid = figure.subplots(len(names), len(cfg.targets), squeeze=False, sharex=True)
    for line, (name, words) in zip(grid, names.items(), strict=True):
        for axes, target in zip(line, cfg.targets, strict=True):
            for i, m in enumerate(cfg.methods):
                x = [k for _, method, k in rows_of(cfg) if method == m]
                y = [mean(target, m, k, name) for k in x]
                axes.plot(x, y, "o-", color=f"C{i}", markersize=3, linewidth=1.2, label=m)
            for style, word in zip(("--", ":", "-.", (0, (1, 3))), cfg.words, strict=False):
                y = mean(target, word, 0, name)
                axes.axhline(y, color="black", linestyle=style, linewidth=1, label=WORDS[word])
            axes.set_xscale("log")
            axes.set_xticks(cfg.shots, cfg.shots)
            axes.minorticks_off()
        line[0].set_ylabel(words)
    for axes, target in zip(grid[0], cfg.targets, strict=True):
        axes.set_title(target)
    for axes in grid[-1]:
        axes.set_xlabel("shots")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    columns = 2 * len(cfg.targets)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def jobs_of(cfg, target, seed):
    """(target, method, seed) of words, (target, method, shots, seed) of few shots."""
    yield from ((target, word, seed) for word in cfg.words)
    yield from ((target, m, k, seed) for _, m, k in rows_of(cfg) if k)


def run_any(cfg, *job):
    run(cfg, *job) if len(job) == 4 else evaluate.run(zero_shot(cfg), *job)


def check_asked(cfg):
    """Raises ValueError, of one line, about what was asked for."""
    for name, known in (("methods", FEW), ("words", WORDS)):
        if unknown := [m for m in getattr(cfg, name) if m not in known]:
            raise ValueError(f"--{name} {', '.join(unknown)}; wanted: {', '.join(known)}")
    if not cfg.methods:
        raise ValueError(f"--methods is empty; wanted: {', '.join(FEW)}")
    if cfg.methods == ("rssa",) and cfg.shots == (1,):
        raise ValueError("rssa draws codes to the shots', and there is one; wanted: --shots from 2")
    if not cfg.shots or min(cfg.shots) < 1 or len({*cfg.shots}) < len(cfg.shots):
        found = ", ".join(map(str, cfg.shots))
        raise ValueError(f"--shots {found}; wanted: numbers from 1 on, none of them twice")
    if cfg.held_out < 1 or not all(0 < part < 1 for part in cfg.moments):
        raise ValueError("--held-out must be at least 1, and --moments between 0 and 1")
    if cfg.preset.method != fewshot.Config.method:
        raise ValueError("--preset.method is none of the preset's; wanted: --methods")
    few_shot.check(few_shot.Settings(target="anime", **asdict(cfg.preset)))
    evaluate.check_asked(replace(zero_shot(cfg), methods=cfg.words or ("nada",)))


def main(cfg):
    check_asked(cfg)
    cfg.out.mkdir(parents=True, exist_ok=True)
    preset = {f"few shots: {k}": v for k, v in asdict(cfg.preset).items() if k != "method"}
    preset |= {"held_out": cfg.held_out, "moments": cfg.moments}
    digest = {"discriminator": sha256(miniature.DISCRIMINATOR)}
    evaluate.hold_to(cfg, evaluate.settings_of(zero_shot(cfg)) | preset | digest)
    evaluate.draw_truth(zero_shot(cfg))
    every = [job for s in cfg.seeds for t in cfg.targets for job in jobs_of(cfg, t, s)]
    evaluate.run_all(cfg, every, run_any)
    report(cfg)


def report(cfg):
    """The table, the curves, and a panel for each target: NADA, IPL and the third number of shots,
    or the last, of the first seed."""
    rows, k = finished(cfg), cfg.shots[min(2, len(cfg.shots) - 1)]
    for target in cfg.targets:
        kept = read(file_of(cfg, target, "truth", suffix=".pt"))
        strips = {"photo": kept["photo"]}
        for job in jobs_of(cfg, target, cfg.seeds[0]):
            if job[1] in ("nada", "ipl") or job[2:3] == (k,):
                words = WORDS.get(job[1], f"{job[1]}, {k}")
                strips[words] = read(file_of(cfg, *job, suffix=".pt"))
        evaluate.picture(strips | {"truth": kept["truth"]}, file_of(cfg, target, suffix=".jpg"))
    image = curves(cfg, rows)
    write_atomically(cfg.out / "curves.png", lambda aside: aside.write_bytes(image))
    text = table(cfg, rows)
    write_atomically(cfg.out / "table.md", lambda aside: aside.write_text(text))
    key = "domain", "method", "shots", "seed"
    names = {*SHOWN, "moments", "anchors", "seconds", "device"}
    flat = [dict(zip(key, k, strict=True)) | {name: x for name, x in row.items() if name in names}
            for k, row in rows.items()]  # fmt: skip
    evaluate.write_json(cfg.out / "table.json", flat)
    print(text)


if __name__ == "__main__":
    evaluate.call(main, Config, __doc__, "evaluate_few_shot")
