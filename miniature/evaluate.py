"""What image-specific prompts gain, against the truth: ``python -m miniature.evaluate``.

Only this world has the truth: the person of each latent can really be drawn in the target domain.
For every target and seed the generator is adapted with each way to choose the text direction:

  nada       one direction for all images, between the labels
  ipl        image-specific prompts, with the preset of the miniature
  published  the same, but stage 1's residual prompts, loss weights and number of steps are the
             published ones (its rate and batch are those of the preset)
  mean       oracle: the mean of the true steps of 256 persons
  own        oracle: each image's own true step
  caption    oracle: the step between the two full captions of that very person

Then the judge, which shares nothing with the CLIP, looks at n pictures without truncation, from
latents that no training uses. Its figures are explained in miniature/truth.py; one more is

  cosine     mean cos of the text direction and the true step of that person

With --run it only reads one finished run. A row is the mean over the seeds, +- half the 95%
interval of Student's t; differences are of runs of one seed (stage 1 draws from the same
generator, so IPL's stage 2 sees other latents than NADA's). Each cue, `source` and `inception` are
in the JSON file only. Whatever is finished is kept in the folder of --out, so a stopped evaluation
goes on where it was; the same command with fewer targets or seeds writes the table of those. The
head of the table says how long its runs took.
"""

import functools
import hashlib
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path

import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import ipl
from checkpoints import load_generator
from checkpoints.files import write_atomically
from cli.run_folder import find_generator, read_config
from cli.settings import MINIATURE, Settings, check
from miniature import CLIP, GENERATOR, JUDGE, captions, faces
from miniature.judge import load_judge
from miniature.truth import Truth

METHODS = ("nada", "ipl", "published", "mean", "own", "caption")
OF_THE_PAPER = "residual", "lambda_domain", "lambda_source", "steps_mapper"
PUBLISHED = {name: getattr(ipl.Config(), name) for name in OF_THE_PAPER}
SHOWN = "target soft cues attributes identity diversity frechet structure cosine".split()


@dataclass(frozen=True)
class Config:
    targets: tuple[str, ...] = faces.DOMAINS[1:]  # Target domains.
    methods: tuple[str, ...] = METHODS  # See above.
    seeds: tuple[int, ...] = (101, 102, 103, 104, 105)  # Of the training runs.
    run: Path | None = None  # A finished run of ipl.py on the miniature, to be read instead.
    out: Path = Path("runs/evaluate")  # Where results are collected.
    n: int = 512  # Pictures.
    latents: int = 50_000  # Seed of their latents.
    processes: int = os.cpu_count() or 1  # Runs at a time, each on one CPU thread; 1: on all.
    preset: Settings = MINIATURE  # Of all runs, but for target, method, seed; see above.


# ----------------------------------------------------------------------------
# Directions


class Oracle:
    """What a perfect direction could be; own, mean and caption are directions, as ipl.py has them:
    functions (w, z, x_source) -> [B, e], which read the person off z.
    """

    def __init__(self, clip_model, transform, target):
        self.clip_model, self.transform, self.target = clip_model, transform, target
        rng = torch.Generator().manual_seed(40_000)
        steps = self.own(None, torch.randn(256, faces.W_DIM, generator=rng))
        self.mean_step = F.normalize(steps, dim=-1).mean(0)

    def own(self, w, z, x_source=None):
        """The step between the true pictures of that very person."""
        persons = faces.persons_from_z(z)
        styles = [faces.styles_of(d, len(z)) for d in ("photo", self.target)]
        images = [self.transform(faces.render(persons, s)) for s in styles]
        return ipl.feature_delta(*(self.clip_model.encode_image(x) for x in images))

    def mean(self, w, z, x_source=None):
        """The mean of the true steps of 256 persons."""
        return self.mean_step.expand(len(z), -1)

    def caption(self, w, z, x_source=None):
        """The step between the two full captions of that very person."""
        people = faces.persons_from_z(z).categories
        texts = [[captions.full_caption(c, d) for c in people] for d in ("photo", self.target)]
        return ipl.feature_delta(*(ipl.encode_texts(self.clip_model, t) for t in texts))


def silent(stage, total, state):
    """The steps of a loop, without a bar."""
    return range(total)


def train(preset, target, method, seed, generator, clip_model, transform, oracle):
    """One adaptation -> the generator, and its direction."""
    cfg = replace(preset, target=target, seed=seed)
    if method == "published":
        cfg = replace(cfg, **PUBLISHED)
    rng = torch.Generator().manual_seed(seed)
    if method == "nada":
        direction = ipl.label_direction(cfg, clip_model)
    elif method in ("ipl", "published"):
        pair = clip_model, transform
        mapper, _ = ipl.train_mapper(cfg, generator, *pair, rng=rng, steps=silent)
        direction = ipl.prompt_directions(cfg, clip_model, mapper)
    else:
        direction = getattr(oracle, method)
    clips = [(clip_model, transform)]
    adapted, _ = ipl.adapt_generator(cfg, generator, clips, [direction], rng=rng, steps=silent)
    return adapted, direction


# ----------------------------------------------------------------------------
# Reporting


def interval(values):
    """Mean and half the 95% interval of Student's t (nan for a single value)."""
    if len(values) == 1:
        return values[0], math.nan
    x = torch.tensor(values, dtype=torch.float64)
    t = scipy.stats.t.ppf(0.975, len(x) - 1)
    return x.mean().item(), t * x.std().item() / len(x) ** 0.5


def cells(rows):
    """Of a table: the mean of every figure over some rows, +- its interval; empty if not known."""
    for name in SHOWN:
        if name not in rows[0]:
            yield ""
            continue
        mean, half = interval([row[name] for row in rows])
        digits = 0 if name == "frechet" else 3
        yield f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(rows) > 1 else "")


def table(rows, cfg):
    """Markdown of all results: rows[target, method, seed] and rows[target, "truth", None]."""
    hours = sum(row.get("seconds", 0) for row in rows.values()) / 3600
    seeds = ", ".join(map(str, cfg.seeds))
    lines = [
        f"{cfg.n} pictures from latents of seed {cfg.latents}; seeds {seeds}; "
        f"the runs took {hours:.1f} hours of one CPU core.",
        "",
    ]
    for target in cfg.targets:
        kinds = {m: [rows[target, m, s] for s in cfg.seeds] for m in cfg.methods}
        kinds |= {name: [rows[target, name, None]] for name in ("source", "truth")}
        if {"ipl", "nada"} <= set(cfg.methods):
            pairs = zip(kinds["ipl"], kinds["nada"], strict=True)
            kinds["ipl − nada"] = [{k: a[k] - b[k] for k in SHOWN} for a, b in pairs]
        lines += [f"### {target}", "", f"| direction | {' | '.join(SHOWN)} |"]
        lines += ["| --- |" + " --- |" * len(SHOWN)]
        lines += [f"| {name} | {' | '.join(cells(found))} |" for name, found in kinds.items()]
        lines.append("")
    return "\n".join(lines)


def picture(strips, path):
    """A panel for each target, two side by side, of five persons; strips: {target: {row: images}}.

    In 96 colours, a third of the bytes.
    """
    width, height = 400, 64 * len(next(iter(strips.values()))) + 24
    size = width * min(2, len(strips)), height * math.ceil(len(strips) / 2)
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for i, (target, rows) in enumerate(strips.items()):
        left, top = width * (i % 2) + 64, height * (i // 2) + 20
        pen.text((left, top - 14), target, "black")
        for j, (name, images) in enumerate(rows.items()):
            pen.text((left - 6, top + 32 + 64 * j), name, "black", anchor="rm")
            row = torch.cat(list(images[:5]), dim=-1).permute(1, 2, 0)
            pixels = ((row + 1) * 127.5).round().to(torch.uint8).numpy()
            image.paste(Image.fromarray(pixels), (left, top + 64 * j))
    few = image.quantize(96, kmeans=2)
    write_atomically(path, lambda aside: few.save(aside, optimize=True))


def write_json(path, value):
    write_atomically(path, lambda aside: aside.write_text(json.dumps(value, indent=1) + "\n"))


@torch.no_grad()
def read_run(cfg):
    """The table of one finished run of ipl.py. Raises ValueError if there is no truth for it."""
    adapted = find_generator(cfg.run)
    if adapted is None:
        raise ValueError(f"{cfg.run} is no finished run; wanted: a folder with a generator.pt")
    settings = read_config(cfg.run)
    domains = settings.source.strip(), settings.target.strip()
    if settings.generator or not set(domains) <= set(faces.DOMAINS):
        wanted = f"a run of the miniature, with two of {', '.join(faces.DOMAINS)}"
        raise ValueError(f"{cfg.run}: {' to '.join(domains)} has no truth; wanted: {wanted}")
    source, target = domains
    truth = Truth(cfg.n, cfg.latents, load_judge(), load_generator(GENERATOR), source)
    pictures = {
        "source": truth.generated,
        "adapted": truth.pictures(load_generator(adapted)),
        "truth": truth.draw(target),
    }
    print(f"{cfg.n} pictures, latents of seed {cfg.latents}, {cfg.run}")
    for i, (name, images) in enumerate(pictures.items()):
        figures = truth.figures(images, target)
        columns = ["target", "source", *(k for k in SHOWN[1:] if k in figures)]
        if i == 0:
            print(" " * 8, *(f"{k:>10}" for k in columns))
        print(f"{name:8}", *(f"{figures[k]:10.3f}" for k in columns))


@functools.cache
def world(n, latents):
    """What all runs share, loaded once in each process: generator, CLIP, transform, truth."""
    generator = load_generator(GENERATOR).requires_grad_(False)
    return generator, *ipl.load_clip(CLIP), Truth(n, latents, load_judge(), generator)


@functools.cache
def oracle_of(n, latents, target):
    """The oracle of a target, and the true steps [n, e] of the report's persons."""
    _, clip_model, transform, truth = world(n, latents)
    with torch.no_grad():
        oracle = Oracle(clip_model, transform, target)
        return oracle, oracle.own(truth.w, truth.z)


def file_of(cfg, target, method, seed):
    return cfg.out / f"{target}-{method}-{seed}.json".replace(" ", "-")


def run(cfg, target, method, seed):
    """One adaptation, measured: writes a row of figures and a strip of five pictures."""
    start = time.process_time()
    generator, clip_model, transform, truth = world(cfg.n, cfg.latents)
    oracle, step = oracle_of(cfg.n, cfg.latents, target)
    adapted, direction = train(
        cfg.preset, target, method, seed, generator, clip_model, transform, oracle
    )
    images = truth.pictures(adapted)
    row = truth.figures(images, target)
    with torch.no_grad():
        row["cosine"] = F.cosine_similarity(direction(truth.w, truth.z), step).mean().item()
    row["seconds"] = time.process_time() - start
    path = file_of(cfg, target, method, seed)
    torch.save(images[:5].clone(), path.with_suffix(".pt"))
    write_json(path, row)


def check_asked(cfg):
    """Raises ValueError, of one line, about what was asked for."""
    for name, known in (("targets", faces.DOMAINS[1:]), ("methods", METHODS), ("seeds", None)):
        given = getattr(cfg, name)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"--{name} is empty, or names one twice")
        if known and (unknown := [x for x in given if x not in known]):
            raise ValueError(f"--{name} {', '.join(unknown)}; wanted: {', '.join(known)}")
    if cfg.processes < 1 or cfg.n < 16:
        raise ValueError("--processes must be at least 1, and --n at least 16")
    for name in ("source", "generator", "class_index", "clip", "clip_weights", "device"):
        if getattr(cfg.preset, name) != getattr(MINIATURE, name):
            flag = f"--preset.{name.replace('_', '-')}"
            raise ValueError(f"{flag} is fixed: all runs are of the miniature's photos, on a CPU")
    check(cfg.preset)


def check_settings(cfg):
    """Keeps what the rows in a folder depend on; raises ValueError if they came of other things."""
    files = CLIP, GENERATOR, JUDGE, Path(faces.__file__)
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    names = {field.name for field in fields(ipl.Config)} - {"target", "method"}
    preset = {name: getattr(cfg.preset, name) for name in sorted(names)}
    found = {"n": cfg.n, "latents": cfg.latents, **preset, **digests}
    found |= {f"published {name}": value for name, value in PUBLISHED.items()}
    found, path = json.loads(json.dumps(found)), cfg.out / "settings.json"
    if path.exists() or any(cfg.out.glob("*-*-*.json")):
        known = json.loads(path.read_text()) if path.exists() else {}
        if changed := [k for k in {**known, **found} if known.get(k, ...) != found.get(k, ...)]:
            other = ", ".join(changed)
            raise ValueError(f"{cfg.out} has rows of another {other}; wanted: a new --out")
    write_json(path, found)


def share_the_machine():
    """In a process of its own: one thread, no words, and Ctrl-C ends it at once."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stderr = open(os.devnull, "w")


def run_all(cfg):
    """Every run that is not finished yet, cfg.processes at a time."""
    every = [(t, m, s) for t in cfg.targets for s in cfg.seeds for m in cfg.methods]
    jobs = [job for job in every if not file_of(cfg, *job).exists()]
    start = time.perf_counter()

    def say(i):
        left = (time.perf_counter() - start) / i * (len(jobs) - i)
        known = len(every) - len(jobs) + i
        print(f"{known} of {len(every)} runs, {left / 60:.0f} minutes left", flush=True)

    if cfg.processes == 1:
        for i, job in enumerate(jobs):
            run(cfg, *job)
            say(i + 1)
        return
    with ProcessPoolExecutor(cfg.processes, get_context("spawn"), share_the_machine) as pool:
        runs = [pool.submit(run, cfg, *job) for job in jobs]
        try:
            for i, done in enumerate(as_completed(runs)):
                done.result()
                say(i + 1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(cfg):
    check_asked(cfg)
    if cfg.run:
        return read_run(cfg)
    cfg.out.mkdir(parents=True, exist_ok=True)
    check_settings(cfg)
    run_all(cfg)
    report(cfg)


@torch.no_grad()
def report(cfg):
    """The table and the picture of finished runs."""
    *_, truth = world(cfg.n, cfg.latents)
    rows, strips = {}, {}
    for target in cfg.targets:
        true = truth.draw(target)
        rows[target, "source", None] = truth.figures(truth.generated, target)
        rows[target, "truth", None] = truth.figures(true, target)
        files = {(m, s): file_of(cfg, target, m, s) for m in cfg.methods for s in cfg.seeds}
        rows |= {(target, *key): json.loads(file.read_text()) for key, file in files.items()}
        first = {m: files[m, cfg.seeds[0]].with_suffix(".pt") for m in cfg.methods}
        first = {m: torch.load(file, weights_only=True) for m, file in first.items()}
        strips[target] = {"photo": truth.generated, **first, "truth": true}
    text = table(rows, cfg)
    write_atomically(cfg.out / "table.md", lambda aside: aside.write_text(text))
    flat = [{"domain": t, "method": m, "seed": s, **row} for (t, m, s), row in rows.items()]
    write_json(cfg.out / "table.json", flat)
    picture(strips, cfg.out / "pictures.png")
    print(text)


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print("evaluate: error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit("\nevaluate: stopped; finished runs are kept") from None
