"""A stranger's bytes -> tensors, and tensors -> files: nothing in a file is ever executed."""

from checkpoints.clip import read_clip
from checkpoints.discriminator import load_discriminator, save_discriminator
from checkpoints.pickles import CheckpointError
from checkpoints.stylegan2 import load_generator, save_generator

__all__ = [
    "CheckpointError",
    "load_discriminator",
    "load_generator",
    "read_clip",
    "save_discriminator",
    "save_generator",
]
