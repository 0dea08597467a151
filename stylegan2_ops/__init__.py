"""StyleGAN2 in plain PyTorch: its three operations, its generator, and its checkpoint files."""

from .bias_act import bias_act
from .checkpoints import CheckpointError, load_generator, save_generator
from .generator import Generator
from .modulated_conv import modulated_conv2d
from .upfirdn2d import upfirdn2d

__all__ = [
    "CheckpointError",
    "Generator",
    "bias_act",
    "load_generator",
    "modulated_conv2d",
    "save_generator",
    "upfirdn2d",
]
