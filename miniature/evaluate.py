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
latents that no training uses. It reads

  target, source  share of the pictures in which that domain has the largest share
  soft            mean share of the target domain
  cues            share of the six cues that are the target's; each of them in the JSON file
  attributes      share of the person's ten attributes that are read right
  identity        the nearest of the n true photos is that of the same person
  diversity       mean distance of two pictures' features, over that of true targets
  frechet         Frechet distance of features to n true targets of other persons
  inception       exp of the mutual information of picture and attribute, mean over attributes
                  (the inception score with the judge's attribute heads)
  structure       2 <a, b> / (<a, a> + <b, b>) of the gradient magnitudes of source and adapted
                  picture (the structural consistency score with gradients for edges)
  cosine          mean cos of the text direction and the true step of that person

With --run it only reads one finished run. A row is the mean over the seeds, +- half the 95%
interval of Student's t; differences are of runs of one seed (stage 1 draws from the same
generator, so IPL's stage 2 sees other latents than NADA's). `source` and `inception` are in the
JSON file only. Whatever is finished is kept in the folder of --out, so a stopped evaluation goes on
where it was; the same command with fewer targets or seeds writes the table of those. All 270 runs
take some 4 hours of one CPU core; the head of the table says how long its own took.
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
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import ipl
from checkpoints import load_generator
from checkpoints.files import write_atomically
from cli import checks
from cli.run_folder import find_generator, read_config, save_picture
from miniature import CLIP, GENERATOR, JUDGE, captions, faces
from miniature.judge import load_judge

METHODS = ("nada", "ipl", "published", "mean", "own", "caption")
PUBLISHED = {
    k: getattr(ipl.Config(), k)
    for k in ("residual", "lambda_domain", "lambda_source", "steps_mapper")
}
SHOWN = ("target", "soft", "cues", "attributes", "identity", "diversity", "frechet", "structure",
         "cosine")
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 0.975, for 1 to 9 degrees


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
    preset: ipl.Config = ipl.MINIATURE  # Of all runs, but for target, method and seed, see above.


# ----------------------------------------------------------------------------
# Measuring


def frechet(x, y):
    """Frechet distance of two sets of features [n, d], each taken for a normal distribution."""
    x, y = x.double(), y.double()
    a, b = x.T.cov(), y.T.cov()
    cross = torch.linalg.eigvals(a @ b).real.clamp_min(0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross).item()


def inception(logits):
    """exp(mean KL(p(y|x) || p(y))) of logits [n, classes]."""
    log_p = logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_p.exp().mean(0).log())).sum(1).mean().exp().item()


def gradients(images):
    """Gradient magnitude of the grey picture [n, (H - 1) (W - 1)]."""
    gray = images.mean(1)
    dx, dy = gray[:, :-1].diff(dim=2), gray[:, :, :-1].diff(dim=1)
    return (dx.square() + dy.square()).sqrt().flatten(1)


class Truth:
    """The n latents of a report, the persons they stand for, and their true pictures."""

    def __init__(self, n, seed, judge, generator, source="photo"):
        rng = torch.Generator().manual_seed(seed)
        self.z = torch.randn(n, generator.z_dim, generator=rng)
        self.judge, self.persons, self.source = judge, faces.persons_from_z(self.z), source
        self.others = faces.sample_persons(n, rng)
        self.w = generator.mapping(self.z)
        self.photos = self.draw(source)
        self.identities = judge.identity(self.photos)
        self.generated = self.pictures(generator)

    def draw(self, domain, persons=None):
        """True pictures of the persons (or of others) in a domain."""
        persons = persons or self.persons
        return faces.render(persons, faces.styles_of(domain, len(persons)))

    def pictures(self, generator):
        """What a generator draws from the latents."""
        return torch.cat([generator.synthesis(w) for w in self.w.split(64)]).clamp(-1, 1)

    def figures(self, images, target):
        """What the judge sees in pictures that should show these persons in a target domain."""
        out, (true, others) = self.judge(images), true_features(self, target)
        source, goal = (faces.DOMAINS.index(d) for d in (self.source, target))
        domain = out["domain"].argmax(1)
        read = [out[k].argmax(1) == self.persons.category(k) for k in faces.CATEGORIES]
        nearest = (self.judge.identity(images) @ self.identities.T).argmax(1)
        a, b = gradients(self.generated), gradients(images)
        dice = 2 * (a * b).sum(1) / (a.square().sum(1) + b.square().sum(1))
        cues = {c: (out[f"cue {c}"].argmax(1) == goal).float().mean().item() for c in faces.CUES}
        return {
            "target": (domain == goal).float().mean().item(),
            "source": (domain == source).float().mean().item(),
            "soft": out["domain"].softmax(1)[:, goal].mean().item(),
            "cues": sum(cues.values()) / len(cues),
            "attributes": torch.stack(read).float().mean().item(),
            "identity": (nearest == torch.arange(len(images))).float().mean().item(),
            "diversity": (F.pdist(out["features"]).mean() / F.pdist(true).mean()).item(),
            "frechet": frechet(out["features"], others),
            "inception": sum(inception(out[k]) for k in faces.CATEGORIES) / len(faces.CATEGORIES),
            "structure": dice.mean().item(),
            **{f"cue {c}": share for c, share in cues.items()},
        }


@functools.cache
def true_features(truth, target):
    """The judge's features of the truth, and those of other persons in the target domain."""
    return [truth.judge(truth.draw(target, who))["features"] for who in (None, truth.others)]


# ----------------------------------------------------------------------------
# Directions


class Oracle:
    """True directions and captions of the persons of given latents z; each is z -> [B, e]."""

    def __init__(self, clip_model, transform, target):
        self.clip_model, self.transform, self.target = clip_model, transform, target
        rng = torch.Generator().manual_seed(40_000)
        own = F.normalize(self.own(torch.randn(256, faces.W_DIM, generator=rng)), dim=-1)
        self.mean_step = own.mean(0)

    def own(self, z):
        persons = faces.persons_from_z(z)
        styles = [faces.styles_of(d, len(z)) for d in ("photo", self.target)]
        images = [self.transform(faces.render(persons, s)) for s in styles]
        return ipl.feature_delta(*(self.clip_model.encode_image(x) for x in images))

    def mean(self, z):
        return self.mean_step.expand(len(z), -1)

    def caption(self, z):
        people = faces.persons_from_z(z).categories
        texts = [[captions.full_caption(c, d) for c in people] for d in ("photo", self.target)]
        return ipl.feature_delta(*(ipl.encode_texts(self.clip_model, t) for t in texts))


def train(preset, target, method, seed, generator, clip_model, transform, oracle):
    """One adaptation -> the generator, and its directions as a function of z."""
    cfg = replace(preset, target=target, seed=seed)
    if method == "published":
        cfg = replace(cfg, **PUBLISHED)
    rng, latest = torch.Generator().manual_seed(seed), None

    def draw_z(n):
        nonlocal latest
        latest = torch.randn(n, generator.z_dim, generator=rng)
        return latest

    if method in ("ipl", "published"):
        mapper, _ = ipl.train_mapper(cfg, generator, clip_model, transform, rng=rng)
        of_w = ipl.prompt_directions(cfg, clip_model, mapper)
    elif method == "nada":
        of_w = ipl.label_direction(cfg, clip_model)
    else:
        of_z = getattr(oracle, method)
        adapted, _ = ipl.adapt_generator(
            cfg, generator, clip_model, transform, lambda w: of_z(latest), rng=rng, draw_z=draw_z
        )
        return adapted, of_z
    adapted, _ = ipl.adapt_generator(cfg, generator, clip_model, transform, of_w, rng=rng)
    return adapted, lambda z: of_w(generator.mapping(z))


# ----------------------------------------------------------------------------
# Reporting


def interval(values):
    """Mean and half the 95% interval of Student's t (nan for a single value)."""
    x = torch.tensor(values, dtype=torch.float64)
    if len(x) == 1:
        return x.item(), math.nan
    t = STUDENT[min(len(x) - 1, len(STUDENT)) - 1]
    return x.mean().item(), (t * x.std() / len(x) ** 0.5).item()


def shown(values):
    mean, half = interval(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"


def table(rows, cfg):
    """Markdown of all results: rows[target, method, seed] and rows[target, "truth", None]."""
    hours = sum(row.get("seconds", 0) for row in rows.values()) / 3600
    lines = [f"{cfg.n} pictures from latents of seed {cfg.latents}; seeds "
             f"{', '.join(map(str, cfg.seeds))}; the runs took {hours:.1f} hours, one by one.", ""]
    for target in cfg.targets:
        lines += [f"### {target}", "", "| direction | " + " | ".join(SHOWN) + " |"]
        lines += ["| --- |" + " --- |" * len(SHOWN)]
        kinds = {m: [rows[target, m, s] for s in cfg.seeds] for m in cfg.methods}
        kinds |= {name: [rows[target, name, None]] for name in ("source", "truth")}
        for name, found in kinds.items():
            cells = [shown([r[k] for r in found]) if k in found[0] else "" for k in SHOWN]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        if {"ipl", "nada"} <= set(cfg.methods):
            pairs = list(zip(kinds["ipl"], kinds["nada"], strict=True))
            cells = [shown([a[k] - b[k] for a, b in pairs]) for k in SHOWN]
            lines.append("| ipl − nada | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def picture(strips, cfg, path):
    """Rows for each target: source, the methods of the first seed, truth."""
    rows = [torch.cat(list(x), dim=-1) for target in cfg.targets for x in strips[target]]
    grid = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    save_picture(grid, path)


def write_json(path, value):
    write_atomically(path, lambda aside: aside.write_text(json.dumps(value, indent=1) + "\n"))


@torch.no_grad()
def read_run(cfg):
    """The table of one finished run of ipl.py. Raises ValueError if there is no truth for it."""
    adapted = find_generator(cfg.run)
    if adapted is None:
        raise ValueError(f"{cfg.run} is no finished run; wanted: a folder with a generator.pt")
    settings = read_config(cfg.run)
    domains = settings["source"].strip(), settings["target"].strip()
    if settings["generator"] or not set(domains) <= set(faces.DOMAINS):
        raise ValueError(f"{cfg.run}: {' to '.join(domains)} has no truth; wanted: a run of the "
                         f"miniature, with two of {', '.join(faces.DOMAINS)}")
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
    with torch.no_grad():
        return generator, *ipl.load_clip(CLIP), Truth(n, latents, load_judge(), generator)


@functools.cache
def oracle_of(n, latents, target):
    """The oracle of a target, and the true steps [n, e] of the report's persons."""
    _, clip_model, transform, truth = world(n, latents)
    with torch.no_grad():
        oracle = Oracle(clip_model, transform, target)
        return oracle, oracle.own(truth.z)


def file_of(cfg, target, method, seed):
    return cfg.out / f"{target}-{method}-{seed}.json".replace(" ", "-")


def run(cfg, target, method, seed):
    """One adaptation, measured: writes a row of figures and a strip of ten pictures."""
    start = time.perf_counter()
    generator, clip_model, transform, truth = world(cfg.n, cfg.latents)
    oracle, step = oracle_of(cfg.n, cfg.latents, target)
    adapted, of_z = train(
        cfg.preset, target, method, seed, generator, clip_model, transform, oracle
    )
    with torch.no_grad():
        images = truth.pictures(adapted)
        row = truth.figures(images, target)
        row["cosine"] = F.cosine_similarity(of_z(truth.z), step).mean().item()
    row["seconds"] = time.perf_counter() - start
    path = file_of(cfg, target, method, seed)
    torch.save(images[:10].clone(), path.with_suffix(".pt"))
    write_json(path, row)


def check(cfg):
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
        if getattr(cfg.preset, name) != getattr(ipl.MINIATURE, name):
            flag = f"--preset.{name.replace('_', '-')}"
            raise ValueError(f"{flag} is fixed: all runs are of the miniature's photos, on a CPU")
    checks.check(cfg.preset)


def check_settings(cfg):
    """Keeps what the rows in a folder depend on; raises ValueError if they came of other things."""
    files = CLIP, GENERATOR, JUDGE, Path(faces.__file__)
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    found = {"n": cfg.n, "latents": cfg.latents, **asdict(cfg.preset), **digests}
    found |= {f"published {name}": value for name, value in PUBLISHED.items()}
    found, path = json.loads(json.dumps(found)), cfg.out / "settings.json"
    if path.exists() or any(cfg.out.glob("*-*-*.json")):
        known = json.loads(path.read_text()) if path.exists() else {}
        if changed := [k for k in {**known, **found} if known.get(k, ...) != found.get(k, ...)]:
            other = ", ".join(changed)
            raise ValueError(f"{cfg.out} has rows of another {other}; wanted: a new --out")
    write_json(path, found)


def share_the_machine():
    """In a process of its own: one thread, no progress bar within that of the evaluation, and
    Ctrl-C ends it at once.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stderr = open(os.devnull, "w")


def train_all(cfg):
    """Every run that is not finished yet, cfg.processes at a time."""
    every = [(t, m, s) for t in cfg.targets for s in cfg.seeds for m in cfg.methods]
    jobs = [job for job in every if not file_of(cfg, *job).exists()]
    kept = dict(initial=len(every) - len(jobs), total=len(every))
    bar = functools.partial(tqdm, desc="evaluate", disable=None, **kept)
    if cfg.processes == 1:
        for job in bar(jobs):
            run(cfg, *job)
        return
    with ProcessPoolExecutor(cfg.processes, get_context("spawn"), share_the_machine) as pool:
        runs = [pool.submit(run, cfg, *job) for job in jobs]
        try:
            for done in bar(as_completed(runs)):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(cfg):
    check(cfg)
    if cfg.run:
        return read_run(cfg)
    cfg.out.mkdir(parents=True, exist_ok=True)
    check_settings(cfg)
    train_all(cfg)
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
        first = [files[m, cfg.seeds[0]].with_suffix(".pt") for m in cfg.methods]
        first = [torch.load(file, weights_only=True) for file in first]
        strips[target] = [truth.generated[:10], *first, true[:10]]
    text = table(rows, cfg)
    write_atomically(cfg.out / "table.md", lambda aside: aside.write_text(text))
    flat = [{"domain": t, "method": m, "seed": s, **row} for (t, m, s), row in rows.items()]
    write_json(cfg.out / "table.json", flat)
    picture(strips, cfg, cfg.out / "pictures.png")
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
