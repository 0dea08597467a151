"""Diffusion models in plain PyTorch: the network, DDIM's steps, and a generator made of the two."""

from .generator import DiffusionGenerator
from .steps import alphas_cumprod, generate, invert, step, timesteps
from .unet import UNet

__all__ = [
    "DiffusionGenerator",
    "UNet",
    "alphas_cumprod",
    "generate",
    "invert",
    "step",
    "timesteps",
]
