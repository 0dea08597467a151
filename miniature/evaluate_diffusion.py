"""DiffusionCLIP against Diff-IPL, by the judge: ``python -m miniature.evaluate_diffusion``.

The embedded diffusion model is adapted to each target, by either method and with each seed; all
runs share one bank of inverted photos. Then the judge looks at n persons that no training uses:
their photos are inverted, and the adapted model makes pictures of them. The figures are explained
in miniature/truth.py; one more is

  cosine     mean cos of the text direction and the true step of that person

The row `source` is the reconstructions, by the model before it is adapted; `truth` the true
pictures, shrunk to the model's number of pixels and enlarged again, as all pictures are that the
judge sees. A row is the mean over the seeds, +- half the 95% interval of Student's t. What is
finished is kept in the folder of --out, and a stopped evaluation goes on where it was; so the work
can be shared by processes, each with some of the seeds.
"""

import json
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import ipl
import miniature
from checkpoints.files import write_atomically
from cli import diffusion
from cli.adapt import load_clips
from cli.processes import pick_device
from cli.resume import sha256
from cli.settings import MINIATURE_DDPM, Settings
from miniature import faces
from miniature.evaluate import SHOWN as COLUMNS
from miniature.evaluate import call, cells, check_common, hold_to, picture, silent, write_json
from miniature.judge import load_judge
from miniature.truth import as_pixels
from miniature.truth_diffusion import InvertedTruth

NAMES = {"nada": "DiffusionCLIP", "ipl": "Diff-IPL"}


@dataclass(frozen=True)
class Config:
    targets: tuple[str, ...] = ("anime", "sketch", "monster", "fairy tale")  # Target domains.
    methods: tuple[str, ...] = ("nada", "ipl")  # DiffusionCLIP; Diff-IPL.
    seeds: tuple[int, ...] = (101, 102, 103)  # Of the training runs.
    out: Path = Path("runs/evaluate-diffusion")  # Where results are collected.
    n: int = 64  # Persons that the judge looks at.
    latents: int = 53_000  # Seed of the persons; the preset was chosen on those of 50000 and 42000.
    device: str = "cpu"  # cpu, cuda or cuda:<n>; auto.
    preset: Settings = MINIATURE_DDPM  # Of all runs, but for target, method and seed.


class World:
    """What all runs share: the generator with its bank, the CLIP, the persons of the judge."""

    def __init__(self, cfg):
        device = pick_device(cfg.device)
        self.generator = diffusion.load(cfg.preset, device)
        self.images = diffusion.pictures_of(cfg.preset, self.generator)
        diffusion.fill(self.generator, self.images, cfg.preset, silent)
        ((self.clip_model, self.transform),) = load_clips(cfg.preset, device)
        judge = load_judge(device=device)
        steps = cfg.preset.inversion_steps, cfg.preset.picture_steps
        self.truth = InvertedTruth(cfg.n, cfg.latents, judge, self.generator, "photo", *steps)

    @torch.no_grad()
    def features(self, domain):
        """CLIP's features [n, e] of the true pictures of a domain."""
        pictures = self.truth.draw(domain).to(self.truth.z.device)
        return self.clip_model.encode_image(self.transform(pictures))

    def run(self, cfg, target, method, seed):
        """One adaptation -> the row of its figures, and five pictures."""
        start = time.process_time()
        settings = replace(cfg.preset, target=target, method=method, seed=seed)
        rng, clips = torch.Generator().manual_seed(seed), [(self.clip_model, self.transform)]
        more = diffusion.arguments(settings, self.generator, self.images, rng)
        adapted, mappers, _ = ipl.adapt(
            settings, self.generator, clips, rng=rng, steps=silent, **more
        )
        images = self.truth.pictures(adapted)
        row = self.truth.figures(images, target)
        if mappers:
            direction = ipl.prompt_directions(settings, self.clip_model, mappers[0])
        else:
            direction = ipl.label_direction(settings, self.clip_model)
        steps = ipl.feature_delta(self.features("photo"), self.features(target))
        row["cosine"] = F.cosine_similarity(direction(self.truth.w), steps).mean().item()
        return row | {"seconds": time.process_time() - start}, as_pixels(images[:5])


def table(rows, cfg):
    """Markdown of all results: rows[target, name, seed], the seed None for source and truth."""
    hours = sum(row.get("seconds", 0) for row in rows.values()) / 3600
    seeds = ", ".join(map(str, cfg.seeds))
    lines = [f"{cfg.n} persons of seed {cfg.latents}; seeds {seeds}; the runs took {hours:.1f} "
             "hours of one CPU core.", ""]  # fmt: skip
    for target in cfg.targets:
        lines += [f"### {target}", "", f"| method | {' | '.join(COLUMNS)} |"]
        lines += ["| --- |" + " --- |" * len(COLUMNS)]
        kinds = {NAMES[m]: [rows[target, m, s] for s in cfg.seeds] for m in cfg.methods}
        kinds |= {name: [rows[target, name, None]] for name in ("source", "truth")}
        if {"nada", "ipl"} <= set(cfg.methods):
            pairs = zip(kinds["Diff-IPL"], kinds["DiffusionCLIP"], strict=True)
            kinds["difference"] = [{k: a[k] - b[k] for k in COLUMNS} for a, b in pairs]
        lines += [f"| {name} | {' | '.join(cells(found))} |" for name, found in kinds.items()]
        lines.append("")
    return "\n".join(lines)


def main(cfg):
    check_common(cfg, MINIATURE_DDPM, targets=faces.DOMAINS[1:], methods=NAMES, seeds=None)
    if cfg.n < 16:
        raise ValueError(f"--n must be at least 16, not {cfg.n}")
    cfg.out.mkdir(parents=True, exist_ok=True)
    names = {field.name for field in fields(Settings)} - {"target", "method", "seed"}
    digests = {Path(x).name: sha256(x) for x in (miniature.DDPM, miniature.CLIP, miniature.JUDGE)}
    preset = {name: getattr(cfg.preset, name) for name in sorted(names)}
    hold_to(cfg, {"n": cfg.n, "latents": cfg.latents, **preset, **digests})
    world, rows, strips = None, {}, {}
    jobs = [(t, m, s) for s in cfg.seeds for t in cfg.targets for m in cfg.methods]
    jobs += [(t, "known", None) for t in cfg.targets]
    for target, method, seed in jobs:
        name = f"{target.replace(' ', '-')}-{method}-{seed}"
        path, strip = cfg.out / f"{name}.json", cfg.out / f"{name}.pt"
        if not path.exists():
            world = world or World(cfg)
            if method == "known":
                found = world.truth.summary(target)
                row, images = found["rows"], torch.cat([found["photo"], found["truth"]])
            else:
                row, images = world.run(cfg, target, method, seed)
            write_atomically(strip, lambda aside, images=images: torch.save(images, aside))
            write_json(path, row)
            print(name, flush=True)
        row, images = json.loads(path.read_text()), torch.load(strip, weights_only=True)
        if method == "known":
            rows |= {(target, name, None): row[name] for name in ("source", "truth")}
            shown = {"source": images[:5], "truth": images[5:]}
        else:
            rows[target, method, seed] = row
            shown = {method: images} if seed == cfg.seeds[0] else {}
        strips.setdefault(target, {}).update(shown)
    words = table(rows, cfg)
    write_atomically(cfg.out / "table.md", lambda aside: aside.write_text(words))
    order = ["source", *cfg.methods, "truth"]
    for target, found in strips.items():
        path = cfg.out / f"{target.replace(' ', '-')}.png"
        picture({name: found[name] for name in order}, path)
    print(words)


if __name__ == "__main__":
    call(main, Config, __doc__, "evaluate_diffusion")
