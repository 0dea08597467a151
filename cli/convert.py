"""python ipl.py convert: a checkpoint's generator in another format. No network runs."""

import os
from pathlib import Path

from checkpoints import diffusion
from checkpoints.stylegan2 import read_checkpoint, write_checkpoint
from cli.settings import expand


def convert(source: str, target: Path, /):
    """Write the generator of a checkpoint to another file, bit for bit, and nothing else of it.

    Args:
        source: Checkpoint, a file or a URL; of a diffusion model, a folder or a file.
        target: File to write, .pt for rosinality's layout or .safetensors; replaced if it is there.
            Of a diffusion model: .safetensors, or a new folder, in diffusers' layout.
    """
    source, target = expand(source), Path(expand(target))
    if diffusion.is_diffusion(source):
        return convert_diffusion(source, target)
    named = target.suffix in (".pt", ".safetensors")
    if not named or not target.parent.is_dir() or target.is_dir():
        raise ValueError(
            f"cannot convert to {target}; wanted: a name in .pt (rosinality's layout) or "
            ".safetensors, in a folder that is there"
        )
    if target.exists() and os.path.exists(source) and target.samefile(source):
        raise ValueError(f"cannot convert {source} to itself; wanted: another name")
    write_checkpoint(read_checkpoint(source), target)
    print(f"{target}: the generator of {source}")


def convert_diffusion(source, target):
    new = not target.suffix and not target.exists() or target.suffix == ".safetensors"
    if not new or not target.parent.is_dir() or target.is_dir():
        raise ValueError(
            f"cannot convert to {target}; wanted: the name of a new folder (diffusers' layout) or "
            "one in .safetensors, in a folder that is there"
        )
    found = diffusion.read_checkpoint(source)
    diffusion.save_unet(found.config, found.state, target, found.schedule)
    print(f"{target}: the diffusion model of {source}")
