"""Reading and writing generator checkpoints.

A checkpoint is what rosinality's converter writes, {"g_ema": state dict, "latent_avg": [w_dim]};
the published outputs of IPL and StyleGAN-NADA are the same without "latent_avg". A .safetensors
file holds the state dict and "latent_avg" side by side. No code in a file is ever run.
"""

import argparse
import io
import json
import math
import os
import warnings
from pathlib import Path

import safetensors.torch
import torch

from .generator import Generator

# What the training runs of rosinality and NADA keep beside the generator.
_IGNORED = {"g", "d", "g_optim", "d_optim", "args", "ada_aug_p", "iter"}


class CheckpointError(ValueError):
    """A file from which no generator can be read; the message is one line."""


def load_generator(path, device="cpu"):
    """Read a frozen Generator: eval mode, no gradients, float32, its sizes those of the tensors.

    path: a .safetensors file by suffix, else one of torch.save. Where the file has no
    "latent_avg", w_avg is the mean w of 4096 z drawn with seed 0; the global random state is left
    alone. Unknown entries beside "g_ema" are ignored with a warning.

    Raises CheckpointError if the file is missing, damaged or made of more than plain tensors, or
    if they are not those of a rosinality generator; it then names the tensor at fault.
    """
    if Path(path).suffix == ".safetensors":
        state = _read(path, lambda path: safetensors.torch.load(Path(path).read_bytes()))
        w_avg = state.pop("latent_avg", None)
    else:
        checkpoint = _read(path, _torch_load)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("g_ema"), dict):
            raise CheckpointError(f'{path}: not a generator checkpoint, it has no "g_ema"')
        state, w_avg = checkpoint["g_ema"], checkpoint.get("latent_avg")
        unknown = [k for k in checkpoint if k not in {"g_ema", "latent_avg", *_IGNORED}]
        if unknown:
            warnings.warn(f"{path}: ignored {_some(unknown)}", stacklevel=2)

    generator = _build(path, state).to_empty(device=device)
    generator.load_state_dict(state)
    generator.requires_grad_(False).eval()
    if w_avg is None:
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(4096, generator.z_dim, generator=rng)
        w_avg = generator.mapping(z.to(device)).mean(0)
    elif not _is_plain(w_avg) or w_avg.numel() != generator.w_dim:
        raise CheckpointError(f'{path}: "latent_avg" is not a vector of {generator.w_dim}')
    generator.w_avg.copy_(w_avg.reshape(-1))
    return generator


def save_generator(generator, path):
    """Write `generator`, in safetensors format if that is the suffix of `path`, else in torch's.

    Every tensor keeps its type and its bits. The file appears whole or not at all: it is written
    aside, flushed to the disk and renamed. Raises OSError if it cannot be written.
    """
    path = Path(path)
    state = {name: t.detach().cpu().contiguous() for name, t in generator.state_dict().items()}
    w_avg = generator.w_avg.detach().cpu()
    if path.suffix == ".safetensors":
        sizes = ("resolution", "channels", "w_dim", "n_mlp")
        config = json.dumps({name: getattr(generator, name) for name in sizes})
        data = safetensors.torch.save({**state, "latent_avg": w_avg}, {"config": config})
    else:
        buffer = io.BytesIO()
        torch.save({"g_ema": state, "latent_avg": w_avg}, buffer)
        data = buffer.getbuffer()

    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _read(path, reader):
    try:
        return reader(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except Exception as error:  # bytes that are no checkpoint can fail in any way
        kind = type(error).__name__
        raise CheckpointError(f"{path}: damaged, or more than plain tensors ({kind})") from error


def _torch_load(path):
    # rosinality's training saves its argparse.Namespace, a class without behaviour, as "args".
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about foreign pickles, which are refused anyway
        return torch.load(path, map_location="cpu", weights_only=True)


def _build(path, state):
    """An empty Generator (on the meta device) that `state` fits name by name, shape by shape."""
    for name, tensor in state.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            raise CheckpointError(f"{path}: {name!r} is not a plain tensor of floats")

    def size(name):
        return state[name].numel() if name in state else 1  # if missing, it is named below

    noises = [size(name) for name in state if name.startswith("noises.")]
    log2 = max(3, math.isqrt(max(noises, default=0)).bit_length() - 1)
    with torch.device("meta"):
        generator = Generator(
            resolution=2**log2,
            channels={
                4: size("conv1.activate.bias"),
                **{2**k: size(f"convs.{2 * k - 6}.activate.bias") for k in range(3, log2 + 1)},
            },
            w_dim=size("style.1.bias"),
            n_mlp=sum(name.startswith("style.") and name.endswith(".bias") for name in state),
        )

    expected = generator.state_dict()
    if missing := [name for name in expected if name not in state]:
        raise CheckpointError(f"{path}: not a rosinality generator, it lacks {_some(missing)}")
    if extra := [name for name in state if name not in expected]:
        raise CheckpointError(f"{path}: not a rosinality generator, it has {_some(extra)}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            found, wanted = tuple(state[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{path}: {name} is {found}, not {wanted}")
    return generator


def _is_plain(tensor):
    """Dense floats in memory, as many as the shape says (a stride of 0 could claim any number)."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.untyped_storage().nbytes() >= tensor.nbytes
    )


def _some(names):
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more
