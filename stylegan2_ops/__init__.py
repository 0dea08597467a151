"""StyleGAN2 in plain PyTorch: its three operations, its generator and its discriminator."""

from .bias_act import bias_act
from .discriminator import Discriminator
from .generator import Generator
from .modulated_conv import modulated_conv2d
from .upfirdn2d import upfirdn2d

__all__ = [
    "CheckpointError",
    "Discriminator",
    "Generator",
    "bias_act",
    "load_generator",
    "modulated_conv2d",
    "save_generator",
    "upfirdn2d",
]


def __getattr__(name):
    """`from stylegan2_ops import load_generator`, where it was before checkpoints/ was."""
    if name not in ("CheckpointError", "load_generator", "save_generator"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import checkpoints

    return getattr(checkpoints, name)
