"""What image-specific prompts gain, against the truth: ``python -m miniature.evaluate``.

Only this world has the truth: the person of each latent can really be drawn in the target domain.
For every target and seed the generator is adapted with each way to choose the text direction:

  nada       one direction for all images, between the labels
  ipl        image-specific prompts, with the preset of the miniature
  published  the same, but stage 1's residual prompts, loss weights and number of steps are the
             published ones, without a bank (its rate and batch are those of the preset)
  mean       oracle: the mean of the true steps of 256 persons
  own        oracle: each image's own true step, of a bank of persons whose steps are known
  caption    oracle: the step between the two full captions of that very person
  air        NADA corrected on the way (variants/air.py, the preset of its command), only if asked
  air-ipl    IPL corrected so, only if asked for
  pixels     only if asked for, what the generator can do at all: stage 2 without any CLIP, by the
             L1 distance from the bank's true pictures

Targets whose truth depends on the person (PERSONAL) get a longer stage 2 (LONG) with all methods,
unless --no-long. Then the judge, which shares nothing with the CLIP, looks at n pictures without
truncation, from latents that no training uses. Its figures are explained in miniature/truth.py;
one more is

  cosine     mean cos of the text direction and the true step of that person

With --run it only reads one finished run. A row is the mean over the seeds, +- half the 95%
interval of Student's t; differences are of runs of one seed (stage 1 draws from the same
generator, so IPL's stage 2 sees other latents than NADA's). `forms` stands below the table;
each cue, `source`, `inception` and `reached` are in the JSON file only. The last is what the CLIP
makes of a result: the mean cos of the step from the generator's picture of a person to the adapted
one's (in the row `truth`: to the true picture) with that person's true step. The true pictures are
drawn before the runs, by all processors. Whatever is finished is kept in the folder of --out, so a
stopped evaluation goes on where it was; the same command with fewer targets or seeds writes the
table of those. The head of the table says how long its runs took.
"""

import copy
import functools
import hashlib
import io
import json
import math
import os
import sys
import time
from concurrent.futures import as_completed
from dataclasses import dataclass, fields, replace
from pathlib import Path

import scipy.stats
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ipl
from checkpoints import load_generator
from checkpoints.files import write_atomically
from cli.air import SMALL, Run, true_features
from cli.messages import plain_words
from cli.processes import choose_kernels, ends_cleanly, pick_device
from cli.run_folder import find_generator, read_config
from cli.settings import MINIATURE, Settings, check
from miniature import CLIP, GENERATOR, JUDGE, captions, faces
from miniature.judge import load_judge
from miniature.train import pool
from miniature.truth import Truth, as_pixels
from variants import air

USUAL = ("nada", "ipl", "published", "mean", "own", "caption")
METHODS = (*USUAL, "pixels", "air", "air-ipl")
OF_THE_PAPER = "residual lambda_domain lambda_source lambda_image steps_mapper bank".split()
PUBLISHED = {name: getattr(ipl.Config(), name) for name in OF_THE_PAPER}
FIXED = "source generator class_index clip clip_weights images target_images image_weight".split()
FIXED += "device out overwrite resume".split()  # of a preset
PERSONAL = ("monster", "fairy tale")
LONG = dict(steps=300)
SHOWN = "target none soft cues attributes identity diversity frechet constant structure cosine"
SHOWN = SHOWN.split()


@dataclass(frozen=True)
class Config:
    targets: tuple[str, ...] = faces.DOMAINS[1:]  # Target domains.
    methods: tuple[str, ...] = USUAL  # See above.
    seeds: tuple[int, ...] = (101, 102, 103, 104, 105)  # Of the training runs.
    run: Path | None = None  # A finished run of ipl.py on the miniature, to be read instead.
    out: Path = Path("runs/evaluate")  # Where results are collected.
    n: int = 256  # Pictures.
    latents: int = 50_000  # Seed of their latents.
    bank: int = 512  # Persons whose true steps the oracles know.
    long: bool = True  # The longer stage 2 of some targets, see above.
    device: str = "cpu"  # cpu, cuda or cuda:<n>, which all processes share; auto.
    processes: int = os.cpu_count() or 1  # Runs at a time, each on one CPU thread; 1: on all.
    preset: Settings = MINIATURE  # Of all runs, but for target, method, seed; see above.


# ----------------------------------------------------------------------------
# Directions


class Oracle:
    """What a perfect direction could be; own, mean and caption are directions, as ipl.py has them:
    functions (w, z, x_source) -> [B, e], which know persons by their z.

    z [N, z_dim], steps [N, e]: latents, and the true steps of their persons, of which the first
    `bank` are there for training. pixels: their true targets, uint8 [bank, 3, SIZE, SIZE].
    """

    def __init__(self, clip_model, target, z, steps, bank, pixels=None):
        self.clip_model, self.target, self.z, self.steps = clip_model, target, z, steps
        self.bank, self.pixels = z[:bank].cpu(), pixels
        self.mean_step = F.normalize(steps[:bank][:256], dim=-1).mean(0)

    def latents(self, rng):
        """The draw_z of training: n -> z [n, z_dim] of the bank."""
        return lambda n: self.bank[torch.randint(len(self.bank), (n,), generator=rng)]

    def rows(self, z):
        """Where latents [B, z_dim] are among the known ones [B]."""
        return torch.cdist(z, self.z).argmin(1)

    def own(self, w, z, x_source=None):
        """The step between the true pictures of that very person."""
        return self.steps[self.rows(z)]

    def mean(self, w, z, x_source=None):
        """The mean of the true steps of 256 persons."""
        return self.mean_step.expand(len(z), -1)

    def caption(self, w, z, x_source=None):
        """The step between the two full captions of that very person."""
        people = faces.persons_from_z(z.cpu()).categories
        texts = [[captions.full_caption(c, d) for c in people] for d in ("photo", self.target)]
        return ipl.feature_delta(*(ipl.encode_texts(self.clip_model, t) for t in texts))


def silent(stage, total, state):
    """The steps of a loop, without a bar."""
    return range(total)


def adapt_to_pixels(cfg, generator, oracle, rng):
    """Stage 2 towards true pictures, else as ipl.adapt_generator -> the adapted generator."""
    target = copy.deepcopy(generator)
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    average.n_averaged.fill_(1)
    named = [pair for layer in target.layers() for pair in layer.named_parameters()]
    free = [p for name, p in named if not (cfg.freeze and cfg.freeze in name)]
    parameters = [p.requires_grad_() for p in dict.fromkeys(free)]
    betas = 0.0, 0.99 ** (4 / 5)
    optimizer = torch.optim.Adam(parameters, lr=cfg.lr * 4 / 5, betas=betas, fused=True)
    draw, noise_of = ipl.random_inputs(cfg, generator, rng, oracle.latents(rng))
    for step in range(cfg.steps):
        z = draw(cfg.batch)
        images = target.synthesis(generator.mapping(z), rng=noise_of(step))
        loss = F.l1_loss(images, pool.as_images(oracle.pixels[oracle.rows(z)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(target)
    return average.module.requires_grad_(False)


def train_air(cfg, method, generator, clip):
    """AIR, its anchors at 4, 5, 6 and 7 eighths of the way -> the generator, and their rows."""
    eighth = max(1, round(cfg.steps / 8))
    first = {"air": "nada", "air-ipl": "ipl"}[method]
    small = SMALL | {"method": first, "start": 4 * eighth, "interval": eighth}
    cfg, rng = Run(**vars(cfg) | small), torch.Generator().manual_seed(cfg.seed)
    truth = true_features(cfg, generator, clip)
    adapted, _, _, anchors = air.adapt(
        cfg, generator, clip, rng=rng, true_features=truth, steps=silent
    )
    return adapted, anchors


def train(cfg, method, generator, clip_model, transform, oracle):
    """One adaptation -> the generator, and its direction (of pixels, None)."""
    if method == "published":
        cfg = replace(cfg, **PUBLISHED)
    rng, draw_z = torch.Generator().manual_seed(cfg.seed), None
    if method == "pixels":
        return adapt_to_pixels(cfg, generator, oracle, rng), None
    if method == "nada":
        direction = ipl.label_direction(cfg, clip_model)
    elif method in ("ipl", "published"):
        pair = clip_model, transform
        mapper, _ = ipl.train_mapper(cfg, generator, *pair, rng=rng, steps=silent)
        direction = ipl.prompt_directions(cfg, clip_model, mapper)
    else:
        direction = getattr(oracle, method)
        draw_z = oracle.latents(rng) if method == "own" else None
    clips, directions = [(clip_model, transform)], [direction]
    adapted, _ = ipl.adapt_generator(
        cfg, generator, clips, directions, rng=rng, draw_z=draw_z, steps=silent
    )
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


def of_anchors(rows):
    """What AIR's anchors know of the truth, of some seeds: for each anchor a mean."""
    every = [row["anchors"] for row in rows]
    means = {
        words: [sum(a[i][name] for a in every) / len(every) for i in range(len(every[0]))]
        for words, name in (("corrected", "cos_air"), ("the first direction's", "cos"))
    }
    return ", ".join(f"{w} {' '.join(f'{x:.2f}' for x in found)}" for w, found in means.items())


def table(rows, cfg):
    """Markdown of all results: rows[target, method, seed] and rows[target, "truth", None]."""
    hours = sum(row.get("seconds", 0) for row in rows.values()) / 3600
    gpu = " and part of a GPU" * any(row.get("device") == "cuda" for row in rows.values())
    seeds = ", ".join(map(str, cfg.seeds))
    head = f"{cfg.n} pictures from latents of seed {cfg.latents}; seeds {seeds}; "
    if long := " and ".join(t for t in cfg.targets if of_target(cfg, t)):
        settings = ", ".join(f"{name} {value}" for name, value in LONG.items())
        head += f"stage 2 of {long} with {settings}, all methods; "
    lines = [f"{head}the runs took {hours:.1f} hours of one CPU core{gpu}.", ""]
    for target in cfg.targets:
        kinds = {m: [rows[target, m, s] for s in cfg.seeds] for m in cfg.methods}
        kinds |= {name: [rows[target, name, None]] for name in ("source", "truth")}
        if {"ipl", "nada"} <= set(cfg.methods):
            pairs = zip(kinds["ipl"], kinds["nada"], strict=True)
            kinds["ipl − nada"] = [{k: a[k] - b[k] for k in SHOWN} for a, b in pairs]
        panel = file_of(cfg, target, suffix=".png").name
        lines += [f"### {target}", "", f"![{target}: photo, adapted, truth]({panel})", ""]
        lines += [f"| direction | {' | '.join(SHOWN)} |"]
        lines += ["| --- |" + " --- |" * len(SHOWN)]
        lines += [f"| {name} | {' | '.join(cells(found))} |" for name, found in kinds.items()]
        if "forms" in kinds["truth"][0]:
            known = {
                m: [row["forms"] for row in found]
                for m, found in kinds.items()
                if "forms" in found[0]
            }
            shares = ", ".join(f"{m} {sum(x) / len(x):.2f}" for m, x in known.items())
            lines += ["", f"Drawn in their own form: {shares}."]
        for m in (m for m in cfg.methods if m.startswith("air")):
            words = of_anchors(kinds[m])
            lines += ["", f"Anchors of {m}, mean cosine with the step that is left: {words}."]
        lines.append("")
    return "\n".join(lines)


def picture(rows, path):
    """A labelled panel, .png or .jpg: rows {name: uint8 [5, 3, SIZE, SIZE]} of five persons."""
    side, font = faces.SIZE, ImageFont.load_default(14)
    margin = max(64, 16 + math.ceil(max(map(font.getlength, rows))))
    image = Image.new("RGB", (margin + 5 * side, side * len(rows)), "white")
    pen = ImageDraw.Draw(image)
    for j, (name, images) in enumerate(rows.items()):
        pen.text((margin - 8, side * j + side // 2), name, "black", font, anchor="rm")
        strip = torch.cat(list(images), dim=-1).permute(1, 2, 0)
        image.paste(Image.fromarray(strip.numpy()), (margin, side * j))
    file = io.BytesIO()
    if path.suffix == ".jpg":
        image.save(file, "JPEG", quality=85, subsampling=0)
    else:
        for colors in (256, 128, 96, 64, 32):  # as many as 200 KB hold
            file = io.BytesIO()
            image.quantize(colors, kmeans=2).save(file, "PNG", optimize=True)
            if file.tell() <= 200 << 10:
                break
    write_atomically(path, lambda aside: aside.write_bytes(file.getvalue()))


def write_json(path, value):
    write_atomically(path, lambda aside: aside.write_text(json.dumps(value, indent=1) + "\n"))


@torch.no_grad()
def read_run(cfg):
    """The table of one finished run of ipl.py. Raises ValueError if there is no truth for it."""
    adapted = find_generator(cfg.run)
    if adapted is None:
        raise ValueError(f"{cfg.run} is no finished run; wanted: a folder with a generator.pt")
    settings = read_config(cfg.run)
    domains = captions.plain_label(settings.source), captions.plain_label(settings.target)
    if settings.generator or not set(domains) <= set(faces.DOMAINS):
        wanted = f"a run of the miniature, with two of {', '.join(faces.DOMAINS)}"
        raise ValueError(f"{cfg.run}: {' to '.join(domains)} has no truth; wanted: {wanted}")
    (source, target), device = domains, pick_device(cfg.device)
    generator = load_generator(GENERATOR, device)
    truth = Truth(cfg.n, cfg.latents, load_judge(device=device), generator, source)
    rows = truth.summary(target)["rows"]
    images = truth.pictures(load_generator(adapted, device))
    rows = {"source": rows["source"], "adapted": truth.figures(images, target), **rows}
    columns = ["target", "source", *SHOWN[1:-1]]
    print(f"{cfg.n} pictures, latents of seed {cfg.latents}, {cfg.run}")
    print(" " * 8, *(f"{k:>10}" for k in columns))
    for name, row in rows.items():
        print(f"{name:8}", *(f"{row[k]:10.3f}" for k in columns))


@functools.cache
def world(n, latents, device):
    """What all runs share, loaded once in each process: generator, CLIP, transform, truth."""
    choose_kernels(deterministic=False, tf32=False)
    device = pick_device(device)
    generator = load_generator(GENERATOR, device).requires_grad_(False)
    truth = Truth(n, latents, load_judge(device=device), generator)
    return generator, *ipl.load_clip(CLIP, device), truth


def file_of(cfg, *names, suffix=".json"):
    return cfg.out / ("-".join(map(str, names)).replace(" ", "-") + suffix)


@torch.no_grad()
def encoded(clip_model, transform, images):
    """CLIP's features [n, e] of pictures [n, 3, R, R], 64 at a time."""
    return torch.cat([clip_model.encode_image(transform(x)) for x in images.split(64)])


@functools.cache
def source_features(n, latents, device):
    """Of the pictures of this process' world that every run begins with."""
    _, clip_model, transform, truth = world(n, latents, device)
    return encoded(clip_model, transform, truth.generated)


def reached(before, after, true_steps):
    """Mean cosine of the step between CLIP's features [n, e] of pictures and the true step."""
    return F.cosine_similarity(ipl.feature_delta(before, after), true_steps).mean().item()


def of_target(cfg, target):
    """What the stage 2 of a target has of its own."""
    return LONG if cfg.long and target in PERSONAL else {}


def truth_of(cfg, target):
    """The file of what is asked of the truth of a target; with pixels, that of the bank's too."""
    kinds = ["truth"] + ["pixels"] * ("pixels" in cfg.methods)
    return [file_of(cfg, target, kind, suffix=".pt") for kind in kinds]


@torch.no_grad()
def draw_truth(cfg):
    """Writes truth_of all targets, so that no run has to draw."""
    missing = [t for t in cfg.targets if not all(file.exists() for file in truth_of(cfg, t))]
    if not missing:
        return
    _, clip_model, transform, truth = world(cfg.n, cfg.latents, cfg.device)
    rng, features = torch.Generator().manual_seed(40_000), {}
    z = torch.randn(cfg.bank, truth.z.shape[1], generator=rng)
    for domain in ("photo", *missing):
        pixels = truth.draw_all(domain, faces.persons_from_z(z))
        parts = [pool.as_images(x.to(truth.z.device)) for x in pixels.split(64)]
        features[domain] = torch.cat([clip_model.encode_image(transform(x)) for x in parts])
        if domain == "photo":
            continue
        steps = ipl.feature_delta(features["photo"], features[domain])
        kept = {"z": torch.cat([z, truth.z.cpu()]), "steps": steps.cpu(), **truth.summary(domain)}
        true, before = features[domain][cfg.bank :], source_features(cfg.n, cfg.latents, cfg.device)
        kept["rows"]["truth"]["reached"] = reached(before, true, steps[cfg.bank :])
        for file, x in zip(truth_of(cfg, domain), (kept, pixels[: cfg.bank].clone()), strict=False):
            write_atomically(file, functools.partial(torch.save, x))
        del truth.drawn[domain]


read = functools.partial(torch.load, weights_only=True)


@functools.cache
def oracle_of(cfg, target):
    """The oracle of a target; the truth of this process' world then knows the target."""
    _, clip_model, _, truth = world(cfg.n, cfg.latents, cfg.device)
    kept, *pixels = map(read, truth_of(cfg, target))
    truth.identities, truth.known[target] = kept["identities"], kept["features"]
    z, steps, *pixels = (x.to(truth.z.device) for x in (kept["z"], kept["steps"], *pixels))
    return Oracle(clip_model, target, z, steps, cfg.bank, *pixels)


def run(cfg, target, method, seed):
    """One adaptation, measured: writes a row of figures and a strip of five pictures."""
    start = time.process_time()
    generator, clip_model, transform, truth = world(cfg.n, cfg.latents, cfg.device)
    oracle = oracle_of(cfg, target)
    preset = replace(cfg.preset, target=target, seed=seed, **of_target(cfg, target))
    direction, more = None, {}
    if method.startswith("air"):
        adapted, more["anchors"] = train_air(preset, method, generator, (clip_model, transform))
    else:
        adapted, direction = train(preset, method, generator, clip_model, transform, oracle)
    images, true_steps = truth.pictures(adapted), oracle.steps[-cfg.n :]
    row = truth.figures(images, target) | more
    with torch.no_grad():
        if direction:
            cosines = F.cosine_similarity(direction(truth.w, truth.z), true_steps)
            row["cosine"] = cosines.mean().item()
    before = source_features(cfg.n, cfg.latents, cfg.device)
    row["reached"] = reached(before, encoded(clip_model, transform, images), true_steps)
    row |= {"seconds": time.process_time() - start, "device": images.device.type}
    torch.save(as_pixels(images[:5]), file_of(cfg, target, method, seed, suffix=".pt"))
    write_json(file_of(cfg, target, method, seed), row)


def check_common(cfg, default, **known):
    """Raises ValueError, of one line, for what no evaluation can do.

    known: {name of a list of cfg: what may be in it, or None for anything}. default: the preset
    before anything was asked of it.
    """
    for name, values in known.items():
        given = getattr(cfg, name)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"--{name} is empty, or names one twice")
        if values and (unknown := [x for x in given if x not in values]):
            raise ValueError(f"--{name} {', '.join(unknown)}; wanted: {', '.join(values)}")
    for name in ("target", "method", "seed"):
        if getattr(cfg.preset, name) != getattr(default, name):
            raise ValueError(f"--preset.{name} is each run's own; wanted: --{name}s")
    if not all(0 <= seed < 2**63 for seed in cfg.seeds):
        raise ValueError("--seeds must be 0 or more, and below 2^63")
    for name in FIXED:
        if getattr(cfg.preset, name) != getattr(default, name):
            flag = f"--preset.{name.replace('_', '-')}"
            of = "the miniature's photos, on --device, kept in --out"
            raise ValueError(f"{flag} is fixed: all runs are of {of}")
    check(cfg.preset)
    pick_device(cfg.device)


def check_asked(cfg):
    """Raises ValueError, of one line, about what was asked for."""
    check_common(cfg, MINIATURE, targets=faces.DOMAINS[1:], methods=METHODS, seeds=None)
    if min(cfg.processes, cfg.bank) < 1 or cfg.n < 16:
        raise ValueError("--processes and --bank must be at least 1, and --n at least 16")


def settings_of(cfg):
    """What the rows in a folder depend on, {name: value}."""
    painters = (Path(faces.__file__).with_name(f"{x}.py") for x in ("faces", "portrait", "canvas"))
    files = CLIP, GENERATOR, JUDGE, *painters
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    names = {field.name for field in fields(ipl.Config)} - {"target", "method"}
    preset = {name: getattr(cfg.preset, name) for name in sorted(names)}
    found = {"n": cfg.n, "latents": cfg.latents, **preset, **digests, "oracles' bank": cfg.bank}
    found |= {"long": LONG if cfg.long else None}
    found |= {f"published {name}": value for name, value in PUBLISHED.items()}
    return found | {f"air {name}": value for name, value in SMALL.items()}


def hold_to(cfg, found):
    """Keeps found {name: value} beside the rows; ValueError if they came of other values."""
    found, path = json.loads(json.dumps(found)), cfg.out / "settings.json"
    if path.exists() or any(cfg.out.glob("*-*.*")):
        known = json.loads(path.read_text()) if path.exists() else {}
        if changed := [k for k in {**known, **found} if known.get(k, ...) != found.get(k, ...)]:
            other = ", ".join(changed)
            raise ValueError(f"{cfg.out} has rows of another {other}; wanted: a new --out")
    write_json(path, found)


def share_the_machine():
    """In a process of its own: one thread, no words, and Ctrl-C ends it at once."""
    torch.set_num_threads(1)
    pool.ends_at_once()
    sys.stderr = open(os.devnull, "w")


def run_all(cfg, every, run=run):
    """run(cfg, *job) of every job whose file is not there yet, cfg.processes at a time."""
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
    with pool.workers(cfg.processes, share_the_machine) as workers:
        runs = [workers.submit(run, cfg, *job) for job in jobs]
        for i, done in enumerate(as_completed(runs)):
            done.result()
            say(i + 1)


def main(cfg):
    check_asked(cfg)
    if cfg.run:
        return read_run(cfg)
    cfg.out.mkdir(parents=True, exist_ok=True)
    hold_to(cfg, settings_of(cfg))
    draw_truth(cfg)
    run_all(cfg, [(t, m, s) for s in cfg.seeds for t in cfg.targets for m in cfg.methods])
    report(cfg)


def report(cfg):
    """The table and the pictures of finished runs, a panel for each target."""
    rows, first = {}, cfg.seeds[0]
    names = {"nada": "NADA", "ipl": "IPL"}
    shown = [m for m in names if m in cfg.methods] or cfg.methods
    for target in cfg.targets:
        kept = read(truth_of(cfg, target)[0])
        rows |= {(target, name, None): row for name, row in kept["rows"].items()}
        runs = [(target, m, s) for m in cfg.methods for s in cfg.seeds]
        rows |= {key: json.loads(file_of(cfg, *key).read_text()) for key in runs}
        files = [file_of(cfg, target, m, first, suffix=".pt") for m in shown]
        made = {names.get(m, m): read(file) for m, file in zip(shown, files, strict=True)}
        panel = {"photo": kept["photo"], **made, "truth": kept["truth"]}
        picture(panel, file_of(cfg, target, suffix=".png"))
    text = table(rows, cfg)
    write_atomically(cfg.out / "table.md", lambda aside: aside.write_text(text))
    flat = [{"domain": t, "method": m, "seed": s, **row} for (t, m, s), row in rows.items()]
    write_json(cfg.out / "table.json", flat)
    print(text)


def call(main, config, about, name):
    """main of what the command line says; its mistakes are told in one line."""
    import tyro

    with plain_words(name), ends_cleanly():
        main(tyro.cli(config, description=about))


if __name__ == "__main__":
    call(main, Config, __doc__, "evaluate")
