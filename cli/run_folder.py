"""The folder of a run: its files, each of which appears whole or not at all.

checkpoint.pt        while the run is unfinished: what it needs to go on, of both stages
config.json          the Settings, with absolute paths
mapper.safetensors   the mapper; with several CLIPs all of them, under 0., 1., ...
generator.pt         the adapted generator, in rosinality's layout; generator.safetensors if it
                     does not fit (classes, another architecture, a diffusion model)
history.jsonl        a line for each step
curves.png           the numbers of the history
samples.png          source above, target below, from the same latents
"""

import json
import re
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import safetensors.torch
from torch import nn

from checkpoints.diffusion import save_unet
from checkpoints.files import write_atomically
from checkpoints.stylegan2 import misfit_of, save_generator
from cli.settings import EMBEDDED, Settings, check
from diffusion import DiffusionGenerator

CHECKPOINT = "checkpoint.pt"
FEW_SHOT, AIR = "python ipl.py few-shot", "python -m variants.air"  # whose runs are alike
GENERATORS = ("generator.pt", "generator.safetensors")
FILES = (
    CHECKPOINT, *GENERATORS, "mapper.safetensors", "config.json", "history.jsonl", "curves.png",
    "samples.png", "anchors.jsonl",
)  # fmt: skip


def name_of(settings):
    """The name of a run's folder, where the user gives none."""
    words = f"{settings.source.strip()}-to-{settings.target.strip()}".lower()
    # a file system takes 255 bytes, and a letter has up to 4
    return re.sub(r"\W+", "-", words)[:60] + "-nada" * (settings.method == "nada")


def folder_of(settings):
    return Path(settings.out or Path("runs") / name_of(settings))


def spread(runs):
    """Several Settings with a folder for each, in their --out; one stays as it is.

    Raises ValueError if two have the same folder.
    """
    if len(runs) == 1:
        return runs
    folders = [str(Path(run.out or "runs") / name_of(run)) for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            wanted = "other words, or a command and an --out for each"
            raise ValueError(f"two --target, one {run.target!r}, go to {folder}; wanted: {wanted}")
    return [replace(run, out=folder) for run, folder in zip(runs, folders, strict=True)]


def make_folder(folder):
    """Raises ValueError, of one line, if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}") from error


# ----------------------------------------------------------------------------------------------
# A finished run


def find_generator(folder):
    """The file of the adapted generator, or None if the run is not finished."""
    return next((folder / name for name in GENERATORS if (folder / name).is_file()), None)


def full_paths(settings):
    """The paths of files that are there in full; other names, and URLs, as they are."""

    def full(name, there=Path.is_file):
        return str(Path(name).resolve()) if name and there(Path(name)) else name

    images, generator = full(settings.images, Path.is_dir), settings.generator
    targets = full(settings.target_images, Path.is_dir)
    if generator != EMBEDDED:
        generator = full(generator, Path.exists)
    clips = tuple(full(name) for name in settings.clip)
    return replace(
        settings, generator=generator, images=images, target_images=targets, clip=clips
    )


def kind_of(config):
    """Of a config.json: the command that wrote it, if that is not the main one."""
    return FEW_SHOT if "shots" in config else AIR if "lambda_air" in config else ""


def made_by(folder):
    """The command that made a finished run, if that is not the main one."""
    return kind_of(json.loads((folder / "config.json").read_bytes()))


def read_config(folder):
    """The Settings of a run. Raises ValueError, of one line, if there are none, or of one that is
    out of its range."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_bytes())  # in any UTF, with a BOM or without
        if kind_of(found) == FEW_SHOT:  # which has no words: what the two have in common
            found["target"] = found["target"] or f"{Path(found['images']).name} shots"
            names = "target generator seed samples truncation_psi steps batch lr ema device".split()
            one = {"method": "nada", "class_index": found.get("class_index")}
            found = {name: found[name] for name in names} | one
        if kind_of(found) == AIR:
            found = {k: x for k, x in found.items() if k in Settings.__dataclass_fields__}
        settings = Settings(**{k: tuple(x) if type(x) is list else x for k, x in found.items()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        wanted = "the config.json of a finished run"
        why = type(error).__name__
        raise ValueError(f"{path}: no config of a run ({why}); wanted: {wanted}") from error
    try:
        check(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return settings


def config_of(settings):
    """What a run's config.json says."""
    return asdict(replace(full_paths(settings), resume=False, overwrite=False))


def save_run(folder, config, mappers, generator, history, pictures):
    """Write the files. config: for JSON; mappers: none, one, or one for each CLIP; pictures:
    {name: bytes}."""
    texts = {
        "config.json": json.dumps(config, indent=2) + "\n",
        "history.jsonl": "".join(json.dumps(row, allow_nan=False) + "\n" for row in history),
    }
    contents = {name: text.encode() for name, text in texts.items()} | pictures
    if mappers:
        state = (mappers[0] if len(mappers) == 1 else nn.ModuleList(mappers)).state_dict()
        contents = {"mapper.safetensors": safetensors.torch.save(state)} | contents
    fits, other = GENERATORS
    if isinstance(generator, DiffusionGenerator):
        named = other
        save_unet(generator.unet.config, generator.unet.state_dict(), folder / named)
    else:
        named = other if misfit_of(generator.config) else fits
        save_generator(generator, folder / named)
    for name, data in contents.items():
        write_atomically(folder / name, lambda aside, data=data: aside.write_bytes(data))
    for name in {*FILES} - {*contents, named, CHECKPOINT}:  # of the run that was here before
        (folder / name).unlink(missing_ok=True)
