"""The folder of a run: its files, each of which appears whole or not at all.

  config.json          the Config of ipl.py, with absolute paths
  mapper.safetensors   the mapper; with several CLIPs all of them, under 0., 1., ...
  generator.pt         the adapted generator, in rosinality's layout; generator.safetensors if it
                       does not fit (classes, another architecture)
  history.jsonl        a line for each step
  curves.png           the numbers of the history
  samples.png          source above, target below, from the same latents
"""

import json
import tempfile
from pathlib import Path

from safetensors.torch import save
from torch import nn

from stylegan2_ops.checkpoints import misfit_of, save_generator, write_whole

GENERATORS = ("generator.pt", "generator.safetensors")
NETWORKS = (*GENERATORS, "mapper.safetensors")
FILES = (*NETWORKS, "config.json", "history.jsonl", "curves.png", "samples.png")


def check_free(folder, overwrite):
    """Raises ValueError, of one line, if a file would be replaced that should not."""
    there = [name for name in FILES if (folder / name).exists()]
    if folders := [name for name in there if (folder / name).is_dir()]:
        raise ValueError(f"{folder / folders[0]} is a folder; wanted: another --out")
    if there and not overwrite:
        kind = "is a finished run" if find_generator(folder) else f"has a {there[0]}"
        raise ValueError(f"{folder} {kind}; wanted: another --out, or --overwrite")


def make_folder(folder):
    """Raises ValueError, of one line, if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}") from error


def find_generator(folder):
    """The file of the adapted generator, or None if the run is not finished."""
    return next((folder / name for name in GENERATORS if (folder / name).is_file()), None)


def read_config(folder):
    """The Config as a dict. Raises ValueError or TypeError if it is none, OSError if it is gone."""
    return {**json.loads((folder / "config.json").read_text())}


def save_run(folder, config, mappers, generator, history, floor, samples):
    """Write the files. config: dict. mappers: none, one, or one for each CLIP. floor: of
    `save_curves`. samples: a picture, uint8 [H, W, 3].
    """
    paths = {
        "generator": config["generator"] and _absolute(config["generator"]),
        "clip": [_absolute(name) for name in config["clip"]],
    }
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in history)
    for name in NETWORKS:  # of the run that was here before
        (folder / name).unlink(missing_ok=True)
    if mappers:
        state = (mappers[0] if len(mappers) == 1 else nn.ModuleList(mappers)).state_dict()
        write_whole(folder / "mapper.safetensors", lambda file: file.write_bytes(save(state)))
    described = json.dumps(config | paths, indent=2) + "\n"
    write_whole(folder / "config.json", lambda file: file.write_text(described))
    write_whole(folder / "history.jsonl", lambda file: file.write_text(lines))
    fits, other = GENERATORS
    save_generator(generator, folder / (other if misfit_of(generator.config) else fits))
    save_curves(history, folder / "curves.png", floor)
    save_picture(samples, folder / "samples.png")


def _absolute(name):
    """The full path of a file that is there; another name, or a URL, as it is."""
    return str(Path(name).resolve()) if Path(name).is_file() else name


def save_picture(picture, path):
    """picture: uint8 [H, W, 3]."""
    from PIL import Image

    write_whole(path, Image.fromarray(picture.numpy()).save)


def save_curves(history, path, floor=None):
    """A panel for every number of the history: losses, gradient norms, |delta_image|.

    floor: the loss of true pairs in stage 2; training below it follows CLIP, not the domain.
    """
    from matplotlib.figure import Figure

    curves = {}  # {(stage, name): {CLIP: values}}
    for row in history:
        for name, value in row.items():
            if type(value) is float:
                lines = curves.setdefault((row["stage"], name), {})
                lines.setdefault(row.get("clip"), []).append(value)
    figure = Figure(figsize=(2.8 * len(curves), 2.8), layout="constrained")
    all_axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, ((stage, name), lines) in zip(all_axes, curves.items(), strict=True):
        for label, values in lines.items():
            axes.plot(values, label=label)
        axes.set(title=f"stage {stage}: {name}", xlabel="step")
        if floor is not None and (stage, name) == (2, "loss"):
            axes.axhline(floor, color="black", linestyle="--", label="true pairs")
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    write_whole(path, figure.savefig)
