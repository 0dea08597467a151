"""python ipl.py convert: a checkpoint's generator in another format. No network runs."""

import os
from pathlib import Path

from checkpoints.stylegan2 import read_checkpoint, write_checkpoint
from cli.settings import expand


def convert(source: str, target: Path, /):
    """Write the generator of a checkpoint to another file, bit for bit, and nothing else of it.

    Args:
        source: Checkpoint, a file or a URL.
        target: File to write, .pt for rosinality's layout or .safetensors; replaced if it is there.
    """
    source, target = expand(source), Path(expand(target))
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
