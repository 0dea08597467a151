"""Writing denoising diffusion models in diffusers' layout: a folder of three files."""

import json

import safetensors.torch

from checkpoints.files import write_atomically

SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": True,
}


def save_unet(config, state, folder):
    """Write a folder: config.json, diffusion_pytorch_model.safetensors, scheduler_config.json.

    config: that of a UNet; state: its tensors, of any type of floats.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    for name, data in (
        ("diffusion_pytorch_model.safetensors", safetensors.torch.save(tensors)),
        ("scheduler_config.json", json.dumps(SCHEDULE, indent=2).encode()),
        ("config.json", json.dumps(config, indent=2).encode()),
    ):
        write_atomically(folder / name, lambda aside, data=data: aside.write_bytes(data))
