"""Diffusion models in plain PyTorch: the network, DDIM's steps, and a generator made of the two."""

from .steps import alphas_cumprod, generate, invert, step, timesteps
from .unet import UNet

__all__ = ["UNet", "alphas_cumprod", "generate", "invert", "step", "timesteps"]
