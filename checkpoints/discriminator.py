"""Reading and writing discriminators, which few-shot adaptation starts from.

  rosinality's   .pt: {"d": state dict} and what else a training run keeps, or the state dict alone
  NVIDIA's       .pkl with "D", of stylegan2-ada-pytorch and of StyleGAN2 in stylegan3's repository

As for generators, the content says which it is and no code in it is ever run.
"""

import functools
import inspect
import re
from pathlib import Path

import torch

from checkpoints.files import (
    check_finite,
    check_names,
    is_safetensors,
    read_file,
    unwrapped,
    write_atomically,
)
from checkpoints.nvidia import read_nvidia_discriminator
from checkpoints.pickles import CheckpointError, Module, tensor_reader
from checkpoints.stylegan2 import pickled_dict
from stylegan2_ops.discriminator import Blur, Discriminator

WANTED = 'a training checkpoint with its discriminator (.pt with "d", .pkl with "D")'


def load_discriminator(path, device="cpu"):
    """Read a frozen Discriminator: eval mode, no gradients, float32, sizes off the tensors.

    path: a file, or a URL (http:// or https://), which is downloaded once. A warning tells of
    values left unread, whose code would have to run.

    Raises CheckpointError, of one line, if the file is missing, damaged or made of more than plain
    tensors; if it has a generator alone; and if the tensors are not those of StyleGAN2's residual
    discriminator, or not finite, and then names the tensor at fault.
    """
    config, state = read_file(path, WANTED, _parse)
    discriminator = empty_discriminator(config)
    discriminator.to_empty(device=device).load_state_dict(state)
    return discriminator.requires_grad_(False).eval()


def save_discriminator(discriminator, path):
    """Write `discriminator` in rosinality's layout; every tensor keeps its type and its bits.

    What that has no place for, the size of groups and the clamp, lies beside "d" if they are not
    the usual ones. The file appears whole or not at all. Raises OSError if it cannot be written.
    """
    state = {name: x.detach().cpu().contiguous() for name, x in discriminator.state_dict().items()}
    content, config = {"d": state}, discriminator.config
    if config["stddev_group"] != 4 or config["conv_clamp"] is not None:
        content["discriminator_config"] = config
    write_atomically(Path(path), functools.partial(torch.save, content))


def _parse(data, notes):
    """The bytes of a file -> the arguments of Discriminator and its state dict."""
    if is_safetensors(data):
        raise CheckpointError(f"a safetensors file; wanted: {WANTED}")
    value = pickled_dict(data, notes, "D", "a discriminator's checkpoint", WANTED)
    if unwrapped(value, []).keys() >= {"convs.0.0.weight", "final_linear.0.weight"}:
        value = {"d": value}
    read = tensor_reader(4 * len(data))
    if isinstance(value.get("D"), Module):
        config, state = read_nvidia_discriminator(value["D"], read)
        return _checked(config, state, "StyleGAN2")
    if isinstance(value.get("d"), dict):
        stored = unwrapped(value["d"], notes)
        state = {name: read(name, tensor) for name, tensor in stored.items()}
        config = value.get("discriminator_config", _config_of(state))
        return _checked(config, state, "rosinality")
    nvidias = value.keys() & {"G", "D", "G_ema"}
    key = '"D"' if nvidias else '"d"' if "g_ema" in value or "g" in value else '"d" or "D"'
    raise CheckpointError(f"it has no discriminator, {key}; wanted: {WANTED}")


def _config_of(state):
    """The arguments of Discriminator for a state dict in rosinality's layout."""

    def size(name):
        return state[name].numel() if name in state else 1  # if missing, it is named later

    blocks = [re.match(r"convs\.(\d{1,2})\.", str(name)) for name in state]
    n = max(1, max((int(block[1]) for block in blocks if block), default=0))
    widths = {2 ** (n + 3 - k): size(f"convs.{k}.conv1.1.bias") for k in range(1, n + 1)}
    return {"resolution": 2 ** (n + 2), "channels": widths | {4: size("final_conv.1.bias")}}


def empty_discriminator(config):
    """Discriminator(**config) on the meta device, where tensors have no memory.

    Raises CheckpointError if the config is not one; that takes neither time nor memory.
    """
    known, required = inspect.signature(Discriminator).parameters, {"resolution", "channels"}
    if type(config) is not dict or not required <= config.keys() <= known.keys():
        raise CheckpointError(f"the config does not consist of {', '.join(known)}")
    number, width, clamp = range(1, 2**16), config["channels"], config.get("conv_clamp")

    def whole(value, allowed):
        return type(value) is int and value in allowed

    holds = {
        "resolution": whole(config["resolution"], range(8, 2**14 + 1)),
        "channels": type(width) is dict and all(whole(c, number) for c in width.values()),
        "stddev_group": whole(config.get("stddev_group", 4), number),
        "conv_clamp": clamp is None or type(clamp) in (int, float) and 0 < clamp < 1e38,
    }
    if wrong := [name for name, right in holds.items() if not right]:
        found = config[wrong[0]]
        found = f"{found!r:.40}" if type(found) in (int, float, str) else type(found).__name__
        raise CheckpointError(f"the config's {wrong[0]} cannot be {found}")
    try:
        with torch.device("meta"):
            return Discriminator(**config)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _checked(config, state, layout):
    """The config and the state dict, if its tensors are those of a discriminator with `config`.

    The filters, which no training changes, may be missing: they are added to `state`.
    """
    expected = empty_discriminator(config).state_dict()
    missing = [x for x in expected if x.endswith(".kernel") and x not in state]
    wanted = {name: x for name, x in expected.items() if name not in missing}
    check_names(state, wanted, f"a {layout} discriminator")
    check_finite(state)
    return config, state | {name: Blur(0).kernel for name in missing}
