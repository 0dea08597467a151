"""python -m variants.air: NADA, or IPL, whose direction is corrected on the way, as a run."""

import json
import sys
from dataclasses import dataclass, fields, replace

import torch
import tyro

import ipl
from cli import adapt, check_words, messages, pictures, processes, run_folder
from cli.settings import MINIATURE, Settings, expand, preset_of
from miniature import faces, plain_label
from variants import air

# Of the 120 steps of the miniature's preset: four anchors, the first one half the way. The prompt's
# rate fits embeddings of 0.9 (root mean square): with 0.001, delta_A hardly leaves the labels' way.
# With lambda_air 1 the pictures overshoot: docs/air.md.
SMALL = {"method": "nada", "start": 60, "interval": 15, "latents": 24, "truncation": 1.0}
SMALL |= {"prompt_lr": 0.1, "lambda_air": 0.1}


@dataclass(frozen=True)
class Run(air.Config, Settings):
    """AIR: anchors on the way, and the direction taken anew from each. Else as python ipl.py."""


def main(argv=None):
    """argv: words, else those of the process. Exits with 2 for bad input, in one line."""
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    processes.fit_threads()
    small = preset_of(argv) == MINIATURE
    default = Run(**vars(MINIATURE) | SMALL) if small else Run()
    config = (tyro.conf.FlagCreatePairsOff,)
    with messages.lenient_streams(), ipl.plain_torch(), messages.plain_words("variants.air"):
        check_words(argv)
        make(tyro.cli(Run, args=argv, default=default, prog="variants.air", config=config))


@torch.no_grad()
def true_features(run, generator, clip):
    """Of the persons of the anchors' latents, drawn in the target domain [n, e]; or None."""
    if not adapt.has_truth(run):
        return None
    z, E_I = air.anchor_latents(run, generator), ipl.image_encoder(*clip)
    styles = faces.styles_of(plain_label(run.target), run.latents)
    images = faces.render(faces.persons_from_z(z.cpu()), styles).to(z.device)
    return torch.cat([E_I(x) for x in images.split(32)])


def read(folder):
    """The Run of a finished folder. Raises ValueError if it is of another command."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
        return Run(**{k: tuple(x) if type(x) is list else x for k, x in found.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is no run of AIR; wanted: another --out") from error


def make(run):
    """What python ipl.py writes, but for the curves, and anchors.jsonl, a line for each anchor."""
    air.check_config(run)
    out = expand(run.out) or f"runs/air-{run_folder.name_of(run)}"
    clip = tuple(map(expand, run.clip))
    run = replace(run, out=out, generator=expand(run.generator), clip=clip)
    keeper, generator, clips, images, targets = adapt.prepare(run, read)
    if keeper.finished:
        return print(f"{keeper.folder} is a finished run: nothing is left to do")
    if images is not None or targets is not None or len(clips) > 1:
        raise ValueError("AIR is of words, a StyleGAN2 and one CLIP; wanted: python ipl.py")
    rng, (clip,) = torch.Generator().manual_seed(run.seed), clips
    plain = Settings(**{field.name: getattr(run, field.name) for field in fields(Settings)})
    with processes.memory_advice(keeper.where_memory_ends), keeper:
        truth = true_features(run, generator, clip)
        adapted, mappers, history, rows = air.adapt(
            run, generator, clip, rng=rng, true_features=truth, steps=keeper
        )
        grid, side = adapt.sample(run, generator, adapted), generator.resolution
        words = run.source.strip(), f"{run.target.strip()}, AIR", f"seed {run.seed}"
        page = {"samples.png": lambda: pictures.png(pictures.labelled(grid, side, *words))}
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        more = pictures.of_run(page) | {"anchors.jsonl": lines}
        config = run_folder.config_of(run)
        run_folder.save_run(keeper.folder, config, mappers, adapted, history, more)
        keeper.finish()
    for row in rows:
        print(", ".join(f"{name} {round(x, 3)}" for name, x in row.items()))
    adapt.say_finished(keeper, plain, generator, adapted)
