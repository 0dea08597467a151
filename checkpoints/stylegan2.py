"""Reading and writing generator checkpoints.

  rosinality's   .pt: {"g_ema": state dict, "latent_avg": [w_dim]}; the published outputs of IPL and
                 StyleGAN-NADA are the same without "latent_avg", others have the state dict alone
  NVIDIA's       .pkl, of stylegan2-ada-pytorch and of StyleGAN2 in the stylegan3 repository
  safetensors    ours: the state dict and "latent_avg", with the generator's config as metadata

The content of a file says which it is, whatever its name. No code in it is ever run, and nothing
that it only claims takes time or memory.
"""

import inspect
import io
import json
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from checkpoints.files import (
    check_finite,
    check_names,
    is_safetensors,
    read_file,
    unwrapped,
    write_atomically,
)
from checkpoints.nvidia import read_nvidia
from checkpoints.pickles import CheckpointError, Module, Opaque, read_pickled, some, tensor_reader
from stylegan2_ops.generator import Fir, Generator

# What training runs keep beside the generator: those of rosinality and NADA, those of NVIDIA.
TRAINING = {"g", "d", "g_optim", "d_optim", "args", "ada_aug_p", "iter"}
TRAINING |= {"G", "D", "augment_pipe", "training_set_kwargs"}

WANTED = "a StyleGAN2 checkpoint (.pt, .pkl, .safetensors) or the URL of one"


class Checkpoint(NamedTuple):
    """A generator as it is in a file."""

    layout: str  # whose the file is, in words
    config: dict  # the arguments of Generator
    state: dict  # its state dict; the tensors have the types of the file
    w_avg: torch.Tensor | None  # [w_dim], if the file has it
    beside: list  # the names of what else is in the file


def load_generator(path, device="cpu", class_index=None):
    """Read a frozen Generator: eval mode, no gradients, float32, its sizes those of the tensors.

    path: a file, or a URL (http:// or https://), which is downloaded once: see `download`.
    class_index: which class a conditional generator shall draw. Where the file has no average of w,
    w_avg is the mean w of 4096 z drawn with seed 0, and where it has no noise, that is drawn with
    seed 0 too; the global random state is left alone. Warnings tell of noise that was drawn, of
    unknown entries beside the generator, and of values left unread, whose code would have to run.

    Raises CheckpointError if the file is missing, damaged or made of more than plain tensors; if
    they are not those of a StyleGAN2 generator, or not finite, and then names the tensor at fault;
    and if class_index is wrong, or missing for a conditional generator.
    """
    _, config, state, w_avg, beside = read_checkpoint(path)
    if unknown := [name for name in beside if name not in TRAINING]:
        warnings.warn(f"{path}: ignored {some(unknown)}", stacklevel=2)
    classes = config["c_dim"]
    if class_index is None:
        class_index = config["class_index"]
    if classes and class_index not in range(classes):
        wanted = f"a class index (--class-index) from 0 to {classes - 1}"
        raise CheckpointError(f"{path}: class {class_index} of {classes} classes; wanted: {wanted}")
    if class_index is not None and not classes:
        raise CheckpointError(f"{path}: class {class_index} of no classes; wanted: no class index")

    generator = empty_generator({**config, "class_index": class_index})
    generator.to_empty(device=device).load_state_dict(state)
    generator.requires_grad_(False).eval()
    if w_avg is None:
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(4096, generator.z_dim, generator=rng)
        w_avg = generator.mapping(z.to(device)).mean(0)
    generator.w_avg.copy_(w_avg.reshape(-1))
    if not generator.w_avg.isfinite().all():
        raise CheckpointError(f"{path}: its w are not finite; wanted: another checkpoint")
    return generator


def save_generator(generator, path):
    """Write `generator`, in safetensors format if that is the suffix of `path`, else in torch's.

    Every tensor keeps its type and its bits. The file appears whole or not at all: it is written
    aside, flushed to the disk and renamed. Raises CheckpointError if the generator does not fit
    rosinality's layout and `path` is not .safetensors, OSError if the file cannot be written.
    """
    config, state = generator.config, generator.state_dict()
    write_checkpoint(Checkpoint("", config, state, generator.w_avg, []), path)


def read_checkpoint(path):
    """Read a Checkpoint, from a file or a URL. Nothing is computed; errors as `load_generator`."""
    return read_file(path, WANTED, _parse)


def pickled_dict(data, notes, key, kind, wanted):
    """The dict in the bytes of a pickle; a network alone stands under the key.

    Adds to notes what is left unread. Raises CheckpointError if it is not what `kind` calls it.
    """
    value, unread = read_pickled(data)
    if isinstance(value, Module):
        value = {key: value}
    if isinstance(value, Opaque):
        raise CheckpointError(f"{value}; wanted: {wanted}")
    if not isinstance(value, dict):
        raise CheckpointError(f"not {kind}; wanted: {wanted}")
    if unread:
        notes.append(f"left unread, as nothing is run: {some(unread)}")
    return value


def _parse(data, notes):
    """The bytes of a file -> Checkpoint, and notes for its reader."""
    if is_safetensors(data):
        return _read_safetensors(data, notes)
    value = pickled_dict(data, notes, "G_ema", "a generator checkpoint", WANTED)
    if unwrapped(value, []).keys() >= {"input.input", "style.1.weight"}:
        value = {"g_ema": value}
    read = tensor_reader(4 * len(data))
    if isinstance(value.get("G_ema"), Module):
        return _read_nvidia(value, read, notes)
    if isinstance(value.get("g_ema"), dict):
        return _read_rosinality(value, read, notes)
    _refuse_others(value)
    nvidias, theirs = (keys & value.keys() for keys in ({"G", "D", "G_ema"}, {"g", "d", "g_ema"}))
    key = '"G_ema"' if nvidias else '"g_ema"' if theirs else '"g_ema" or "G_ema"'
    found = next((f", but {x}" for x in map(value.get, nvidias | theirs) if type(x) is Opaque), "")
    raise CheckpointError(f"not a generator checkpoint, it has no {key}{found}; wanted: {WANTED}")


def _refuse_others(state):
    """Raise CheckpointError for a state dict that is known, but none of a generator of ours."""
    if "text_projection" in state:
        raise CheckpointError(f"a CLIP, not a generator; wanted: {WANTED}")
    if "synthesis.b4.const" in state:
        raise CheckpointError(
            "NVIDIA's tensors without their network; wanted: the .pkl from which they were taken"
        )


def write_checkpoint(checkpoint, path):
    """Write a Checkpoint, as `save_generator` does."""
    path = Path(path)
    _, config, state, w_avg, _ = checkpoint
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    w_avg = {} if w_avg is None else {"latent_avg": w_avg.detach().cpu()}
    if path.suffix == ".safetensors":
        data = safetensors.torch.save({**state, **w_avg}, {"config": json.dumps(config)})
    else:
        content = {"g_ema": state, **w_avg}
        if misfit := misfit_of(config):
            raise CheckpointError(
                f"{path}: no place for {misfit} in rosinality's layout; wanted: a .safetensors file"
            )
        if config["conv_clamp"] is not None or config["num_fp16_res"]:
            content["generator_config"] = config  # other programs leave it, and do not clamp
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = buffer.getbuffer()
    write_atomically(path, lambda aside: aside.write_bytes(data))


def misfit_of(config):
    """What keeps a generator out of rosinality's layout, in words, or None."""
    if config["c_dim"]:
        return f"{config['c_dim']} classes"
    if config["architecture"] != "skip":
        return f"the {config['architecture']} architecture"
    if config["z_dim"] != config["w_dim"]:
        return f"z of {config['z_dim']} and w of {config['w_dim']} numbers"
    return None


# ----------------------------------------------------------------------------------------------
# The three formats: bytes or values of a file -> Checkpoint


def _read_rosinality(value, read, notes):
    stored = unwrapped(value["g_ema"], notes)
    _refuse_others(stored)
    state = {name: read(name, tensor) for name, tensor in stored.items()}
    w_avg = value.get("latent_avg")
    if w_avg is not None:
        try:
            w_avg = read("latent_avg", w_avg)
        except CheckpointError:
            w_avg = torch.empty(0)  # refused below, with the size that it should have
    config = value.get("generator_config", _config_of(state))
    beside = [k for k in value if k not in ("g_ema", "latent_avg", "generator_config")]
    config = _checked(config, state, w_avg, "rosinality", notes)
    return Checkpoint("rosinality's", config, state, w_avg, beside)


def _read_nvidia(value, read, notes):
    config, state, w_avg = read_nvidia(value["G_ema"], read)
    config = _checked(config, state, w_avg, "StyleGAN2", notes)
    return Checkpoint("NVIDIA's", config, state, w_avg, [k for k in value if k != "G_ema"])


def _read_safetensors(data, notes):
    state = safetensors.torch.load(data)
    w_avg = state.pop("latent_avg", None)
    state = unwrapped(state, notes)
    _refuse_others(state)
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name!r:.80} is not a plain tensor of floats")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    config = header.get("__metadata__", {}).get("config")
    config = _config_of(state) if config is None else json.loads(config)
    if isinstance(config, dict) and isinstance(config.get("channels"), dict):
        config["channels"] = {int(size): c for size, c in config["channels"].items()}
    config = _checked(config, state, w_avg, "StyleGAN2", notes)
    return Checkpoint("safetensors", config, state, w_avg, [])


# ----------------------------------------------------------------------------------------------
# Config and state dict


def _config_of(state):
    """The arguments of Generator for a state dict in rosinality's layout."""

    def size(name):
        return state[name].numel() if name in state else 1  # if missing, it is named later

    convs = [re.match(r"convs\.(\d{1,2})\.", str(name)) for name in state]
    log2 = 2 + max(1, (max((int(conv[1]) for conv in convs if conv), default=0) + 1) // 2)
    styles = [name for name in state if str(name).startswith("style.")]
    return {
        "resolution": 2**log2,
        "channels": {
            4: size("conv1.activate.bias"),
            **{2**k: size(f"convs.{2 * k - 6}.activate.bias") for k in range(3, log2 + 1)},
        },
        "w_dim": size("style.1.bias"),
        "n_mlp": sum(name.endswith(".bias") for name in styles),
    }


_RANGES = {  # of the whole numbers in a config
    "resolution": range(8, 2**14 + 1),
    "w_dim": range(1, 2**16),
    "n_mlp": range(65),
    "z_dim": range(1, 2**16),
    "c_dim": range(2**20),
    "num_fp16_res": range(65),
}


def empty_generator(config):
    """Generator(**config) on the meta device, where tensors have no memory.

    Raises CheckpointError if the config is not one; that takes neither time nor memory.
    """
    known, required = inspect.signature(Generator).parameters, {"resolution", "channels", "w_dim"}
    if type(config) is not dict or not required <= config.keys() <= known.keys():
        raise CheckpointError(f"the config does not consist of {', '.join(known)}")

    def check(name, holds, wanted):
        value = config.get(name)
        if name in config and not holds(value):
            found = f"{value!r:.40}" if type(value) in (int, float, str) else type(value).__name__
            raise CheckpointError(f"the config's {name} is {found}; wanted: {wanted}")

    for name, allowed in _RANGES.items():
        wanted = f"{allowed[0]} to {allowed[-1]}"
        check(name, lambda x, allowed=allowed: type(x) is int and x in allowed, wanted)
    sizes = [2**k for k in range(2, config["resolution"].bit_length())]
    width = range(1, 2**16)
    check(
        "channels",
        lambda x: type(x) is dict and all(type(x.get(n)) is int and x[n] in width for n in sizes),
        "{4: c, 8: c, ...}, up to the resolution",
    )
    check("architecture", lambda x: x in ("skip", "resnet", "orig"), "skip, resnet or orig")
    check(
        "conv_clamp",
        lambda x: x is None or type(x) in (int, float) and 0 < x < 1e38,
        "above 0, or none",
    )
    classes = range(config.get("c_dim", 0))
    check("class_index", lambda x: x is None or type(x) is int and x in classes, "one of c_dim")
    try:
        with torch.device("meta"):
            return Generator(**config)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _checked(config, state, w_avg, layout, notes):
    """The full config, if the tensors are those of a generator with `config`.

    What no training changes may be missing, as in published files: it is added to `state`.
    """
    generator = empty_generator(config)
    expected = generator.state_dict()
    missing = [name for name in expected if name not in state]
    kernels = [name for name in missing if name.endswith(".kernel")]
    noises = [name for name in missing if name.startswith("noises.")]
    if generator.resolution > 2048:  # a small file shall not make large noise
        noises = []
    wanted = {name: x for name, x in expected.items() if name not in {*kernels, *noises}}
    check_names(state, wanted, f"a {layout} generator")
    if w_avg is not None and not (w_avg.is_floating_point() and w_avg.numel() == generator.w_dim):
        raise CheckpointError(f'"latent_avg" is not a vector of {generator.w_dim}')
    check_finite(state if w_avg is None else {**state, "latent_avg": w_avg})

    state.update({name: Fir().kernel for name in kernels})
    rng = torch.Generator().manual_seed(0)
    state.update({name: torch.randn(expected[name].shape, generator=rng) for name in noises})
    if noises:
        notes.append(f"it lacks {some(noises)}, which are drawn with seed 0")
    return generator.config
