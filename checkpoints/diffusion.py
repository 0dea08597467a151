"""Reading and writing denoising diffusion models of pixels, unconditional, that predict the noise.

  diffusers    a folder: config.json, diffusion_pytorch_model.safetensors, scheduler_config.json, or
               these in the folders unet/ and scheduler/ of a pipeline
  DDPM's       .ckpt, .pt, .pth: the state dict of ermongroup/ddim, SDEdit and DiffusionCLIP
  guided       .pt: that of guided-diffusion and improved-diffusion
  safetensors  ours: the state dict, with both configs as metadata

The content says which it is. No code in it is ever run, and nothing that it only claims takes time
or memory. All become the tensors of a UNet, under diffusers' names.
"""

import json
import re
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
from checkpoints.pickles import CheckpointError, read_pickled, some, tensor_reader
from diffusion import UNet, alphas_cumprod
from diffusion.unet import CONFIG, config_of

WANTED = "a folder of diffusers' UNet2DModel, or a DDPM's .ckpt, .pt or .safetensors"
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
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Checkpoint(NamedTuple):
    """A diffusion model as it is in a file or folder."""

    layout: str  # whose it is, in words
    config: dict  # of the UNet
    schedule: dict  # as SCHEDULE
    state: dict  # the UNet's state dict; the tensors have the types of the file
    beside: list  # the names of what else is there


def load_unet(path, device="cpu", side=None):
    """-> a frozen UNet, float32, in eval mode, and its schedule alphas [1000].

    path: a folder or a file. side: pixels of a side, if it shall draw others than
    the file says, or than the 256 pixels of a DDPM whose attention is at 16.
    Raises CheckpointError, of one line, for what is missing, damaged or of another kind.
    """
    checkpoint = read_checkpoint(path)
    config, schedule = checkpoint.config, checkpoint.schedule
    if side is not None:
        levels = 2 ** (len(config["block_out_channels"]) - 1)
        if side % levels or not 8 <= side <= 1024:
            raise CheckpointError(f"{path}: {side} pixels; wanted: 8 to 1024, by {levels}")
        config = config | {"sample_size": side}
    unet = empty_unet(config)
    unet.to_empty(device=device).load_state_dict(checkpoint.state)
    betas = schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"]
    return unet.requires_grad_(False).eval(), alphas_cumprod(*betas).to(device)


def save_unet(config, state, path, schedule=SCHEDULE):
    """Write a folder in diffusers' layout, or one file if path is .safetensors, bit for bit.

    config: that of a UNet; state: its tensors, of any type of floats. The file appears whole or not
    at all, as does each file of the folder.
    """
    path = Path(path)
    tensors = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    if path.suffix == ".safetensors":
        about = {"unet": json.dumps(config), "scheduler": json.dumps(schedule)}
        files = {path: safetensors.torch.save(tensors, about)}
    else:
        path.mkdir(parents=True, exist_ok=True)
        files = {
            path / WEIGHTS: safetensors.torch.save(tensors),
            path / "scheduler_config.json": json.dumps(schedule, indent=2).encode(),
            path / "config.json": json.dumps(config, indent=2).encode(),
        }
    for file, data in files.items():
        write_atomically(file, lambda aside, data=data: aside.write_bytes(data))


def is_diffusion(path):
    """Whether a path is that of a diffusion model rather than of a GAN: a folder, or by its keys.

    What cannot be read is none, nor is a URL: whoever reads it as a GAN says why.
    """
    if Path(path).is_dir():  # but not that of a run, in place of the file in it
        return not any(Path(path).glob("generator.*"))
    try:
        data = Path(path).read_bytes()
        if is_safetensors(data):
            head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return "unet" in head.get("__metadata__", {}) or "conv_in.weight" in head
        return bool(_kind(_flat(read_pickled(data)[0], [])))
    except Exception:  # whatever a stranger's bytes can raise
        return False


def read_checkpoint(path):
    """Read a Checkpoint, from a folder or a file. Nothing is computed; errors as `load_unet`."""
    if not Path(path).is_dir():
        return read_file(path, WANTED, _parse)
    try:
        return _read_folder(Path(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


# ----------------------------------------------------------------------------------------------
# diffusers


def _read_json(folder, name):
    try:
        found = json.loads((folder / name).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no readable {name} in it; wanted: {WANTED}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"its {name} is no JSON object; wanted: {WANTED}")
    return found


def _read_folder(folder):
    beside = sorted(path.name for path in folder.iterdir())
    if not beside:
        raise CheckpointError(f"an empty folder; wanted: {WANTED}")
    if latent := [name for name in ("vae", "vqvae", "text_encoder") if name in beside]:
        raise CheckpointError(
            f"a model of latents or texts, as it has {some(latent)}; wanted: one of pixels"
        )
    inner = folder / "unet" if "unet" in beside else folder
    config = _read_json(inner, "config.json")
    places = [folder / "scheduler", folder]
    place = next((x for x in places if (x / "scheduler_config.json").is_file()), None)
    if place is None:
        raise CheckpointError("no scheduler_config.json in it; wanted: that of its training")
    schedule = _read_json(place, "scheduler_config.json")
    if not (inner / WEIGHTS).is_file():
        others = [path.name for path in inner.glob("diffusion_pytorch_model*")]
        found = f", but {some(others)}" if others else ""
        raise CheckpointError(f"no {WEIGHTS} in it{found}; wanted: safetensors")
    try:
        state = safetensors.torch.load_file(inner / WEIGHTS)
    except Exception as error:  # bytes that are no safetensors can fail in any way
        raise CheckpointError(f"{WEIGHTS} is damaged ({type(error).__name__})") from error
    return _checked("diffusers'", config, schedule, state, [])


def _checked(layout, config, schedule, state, beside):
    """A Checkpoint, if the tensors are those of a UNet with `config`, of a known schedule."""
    _check_schedule(schedule)
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    state = {  # attention, as diffusers named it until 2023
        re.sub(r"(attentions\.\d+\.)(query|key|value|proj_attn)\.",
               lambda x: f"{x[1]}{old[x[2]]}.", name): tensor
        for name, tensor in state.items()
    }  # fmt: skip
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name!r:.80} is not a plain tensor of floats")
    unet = empty_unet(config)
    check_names(state, unet.state_dict(), "such a UNet2DModel")
    check_finite(state)
    schedule = {name: schedule.get(name, value) for name, value in SCHEDULE.items()}
    return Checkpoint(layout, unet.config, schedule, state, beside)


def _check_schedule(schedule):
    kind = schedule.get("prediction_type", "epsilon")
    shape = schedule.get("beta_schedule", "linear")
    if kind != "epsilon":
        raise CheckpointError(f"its prediction_type is {kind!r:.40}; wanted: epsilon, the noise")
    if shape != "linear" or schedule.get("trained_betas") is not None:
        found = "trained_betas" if shape == "linear" else f"beta_schedule {shape!r:.40}"
        raise CheckpointError(f"its schedule has {found}; wanted: beta_schedule linear")
    for name, low, high in (("beta_start", 0, 0.1), ("beta_end", 0, 0.999)):
        value = schedule.get(name, SCHEDULE[name])
        if type(value) not in (int, float) or not low < value <= high:
            raise CheckpointError(f"its schedule's {name} is {value!r:.40}")
    n = schedule.get("num_train_timesteps", 1000)
    if type(n) is not int or not 10 <= n <= 10_000:
        raise CheckpointError(f"its schedule's num_train_timesteps is {n!r:.40}")


_FIXED = {  # what a UNet cannot do otherwise; a config may leave it out
    "act_fn": "silu",
    "time_embedding_type": "positional",
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "add_attention": True,
}


def empty_unet(config):
    """UNet(config) on the meta device, where tensors have no memory.

    Raises CheckpointError, of one line, if the config is not one of a UNet.
    """

    def refuse(found, wanted):
        raise CheckpointError(f"{found}; wanted: {wanted}")

    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        refuse(f"its network is a {kind!r:.40}", "a UNet2DModel, of pixels and without a text")
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        refuse("its network is class-conditional", "one without classes")
    channels = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels not in ((3, 3), (3, 6)):
        what = "latents, as of Stable Diffusion" if channels[0] == 4 else "other than RGB pictures"
        refuse(f"its network maps {channels[0]} channels to {channels[1]}: {what}", "3 channels")
    for name, value in _FIXED.items():
        if (found := config.get(name, value)) not in (value, None if value is None else value):
            refuse(f"its network's {name} is {found!r:.40}", repr(value))
    widths = config.get("block_out_channels")
    if not isinstance(widths, list | tuple) or not 1 <= len(widths) <= 8:
        refuse("its config.json has no list of block_out_channels", "that of a UNet2DModel")
    known = {**CONFIG, **{k: x for k, x in config.items() if k in CONFIG}}
    whole = {"sample_size": (8, 1024), "layers_per_block": (1, 8), "norm_num_groups": (1, 64)}
    whole |= {"downsample_padding": (0, 1), "freq_shift": (0, 1)}
    numbers = {**known, "sample_size": config.get("sample_size")}
    for name, (low, high) in whole.items():
        if type(numbers[name]) is not int or not low <= numbers[name] <= high:
            refuse(f"its network's {name} is {numbers[name]!r:.40}", f"{low} to {high}")
    groups, head, eps = (known[k] for k in ("norm_num_groups", "attention_head_dim", "norm_eps"))
    if not all(type(c) is int and 0 < c <= 4096 and c % groups == 0 for c in widths):
        refuse(f"its block_out_channels are {widths!r:.80}", f"multiples of {groups} up to 4096")
    if head is not None and (type(head) is not int or not 0 < head <= 4096):
        refuse(f"its attention_head_dim is {head!r:.40}", "a number of channels, or null")
    if type(eps) is not float or not 0 < eps < 1:
        refuse(f"its norm_eps is {eps!r:.40}", "a small number")
    for name, allowed in (
        ("attn_norm_num_groups", (None, groups)),
        ("resnet_time_scale_shift", ("default", "scale_shift")),
        ("downsample_type", ("conv", "resnet")),
        ("upsample_type", ("conv", "resnet")),
    ):
        if known[name] not in allowed:
            refuse(f"its network's {name} is {known[name]!r:.40}", " or ".join(map(str, allowed)))
    attention = []
    for way, resnet in (("down", "ResnetDownsampleBlock2D"), ("up", "ResnetUpsampleBlock2D")):
        kinds = config.get(f"{way}_block_types")
        plain = [f"{way.title()}Block2D", f"Attn{way.title()}Block2D", resnet]
        if not isinstance(kinds, list | tuple) or len(kinds) != len(widths):
            refuse(f"its config.json has no {way}_block_types for each width", " or ".join(plain))
        if unknown := [kind for kind in kinds if kind not in plain]:
            refuse(f"its network has blocks of type {some(unknown)}", " or ".join(plain))
        attention.append([kind.startswith("Attn") for kind in kinds])
    if attention[0] != attention[1][::-1]:
        refuse("its network attends at other sizes on the way up than down", "the same")
    if numbers["sample_size"] % 2 ** (len(widths) - 1):
        refuse(f"its sample_size is {numbers['sample_size']}", f"one to halve {len(widths)} times")
    names = ("sample_size", "block_out_channels", "down_block_types", "up_block_types")
    with torch.device("meta"):
        return UNet({"_class_name": kind, **{name: config[name] for name in names}, **known})


# ----------------------------------------------------------------------------------------------
# Files


def _parse(data, notes):
    if is_safetensors(data):
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = head.get("__metadata__", {})
        if "unet" not in about:
            raise CheckpointError("tensors without a config; wanted: the folder they come from")
        config, schedule = json.loads(about["unet"]), json.loads(about["scheduler"])
        return _checked("safetensors", config, schedule, safetensors.torch.load(data), [])
    value, _ = read_pickled(data)
    stored = _flat(value, notes)
    kind = _kind(stored)
    if kind is None:
        what = f"it has {some([*stored])}" if stored else "no dict of tensors"
        raise CheckpointError(f"not a diffusion model, {what}; wanted: {WANTED}")
    if kind == "latent diffusion's":
        raise CheckpointError("a model of latents, as of Stable Diffusion; wanted: one of pixels")
    read = tensor_reader(4 * len(data))
    state = {name: read(name, tensor) for name, tensor in stored.items()}
    config, state = from_ddpm(state) if kind == "DDPM's" else from_guided(state)
    return _checked(kind, config, SCHEDULE, state, [])


def _flat(value, notes):
    """The state dict in what a file holds; of ermongroup/ddim's training files, the average."""
    if isinstance(value, list | tuple) and len(value) > 1:
        value = value[-1] if isinstance(value[-1], dict) else value[0]
        notes.append("a training file: its last state dict was read, the average if it has one")
    return unwrapped(value, notes) if isinstance(value, dict) else {}


def _kind(state):
    """Whose layout a state dict has, or None."""
    if "temb.dense.0.weight" in state:
        return "DDPM's"
    if "time_embed.0.weight" in state:
        return "guided-diffusion's"
    if any("diffusion_model." in str(name) for name in state):
        return "latent diffusion's"
    return None


_DDPM = (  # a pattern, and what diffusers calls it
    (r"^temb\.dense\.(\d)\.", lambda x, _: f"time_embedding.linear_{int(x[1]) + 1}."),
    (r"^mid\.block_(\d)\.", lambda x, _: f"mid_block.resnets.{int(x[1]) - 1}."),
    (r"^mid\.attn_1\.", "mid_block.attentions.0."),
    (r"^down\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
    (r"^down\.(\d+)\.attn\.", r"down_blocks.\1.attentions."),
    (r"^down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"^up\.(\d+)\.block\.", lambda x, n: f"up_blocks.{n - 1 - int(x[1])}.resnets."),
    (r"^up\.(\d+)\.attn\.", lambda x, n: f"up_blocks.{n - 1 - int(x[1])}.attentions."),
    (r"^up\.(\d+)\.upsample\.", lambda x, n: f"up_blocks.{n - 1 - int(x[1])}.upsamplers.0."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^norm_out\.", "conv_norm_out."),
)


def from_ddpm(state):
    """A DDPM's state dict -> the config of a UNet, and its state dict.

    The size of its pictures is not in the file: it is taken to be the one at which its first level
    with attention has 16 pixels, as in the published models.
    """
    levels = [re.match(r"down\.(\d)\.block\.(\d)\.conv1\.weight", name) for name in state]
    places = {(int(x[1]), int(x[2])) for x in levels if x}
    n = 1 + max((level for level, _ in places), default=-1)
    firsts = [f"down.{i}.block.0.conv1.weight" for i in range(n)]
    if not n or not all(name in state for name in ("conv_in.weight", "conv_out.weight", *firsts)):
        raise CheckpointError("not a DDPM's state dict, it lacks levels; wanted: all its tensors")
    attention = [f"down.{i}.attn.0.norm.weight" in state for i in range(n)]
    if "mid.attn_1.q.weight" not in state:
        raise CheckpointError("a DDPM without attention in the middle; wanted: one that has it")
    config = config_of(
        16 * 2 ** attention.index(True) if any(attention) else 256,
        [len(state[name]) for name in firsts],
        attention,
        layers_per_block=sum(level == 0 for level, _ in places),
        in_channels=state["conv_in.weight"].shape[1],
        out_channels=len(state["conv_out.weight"]),
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    renamed = {}
    for name, tensor in state.items():
        for pattern, other in _DDPM:
            other = (lambda x, f=other: f(x, n)) if callable(other) else other
            name = re.sub(pattern, other, name)
        if re.search(r"attentions\.\d+\.to_.*weight$", name) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]  # 1 x 1 convolutions there, linear layers here
        renamed[name] = tensor
    return config, renamed


def from_guided(state, head=64):
    """guided-diffusion's state dict -> the config of a UNet, and its state dict.

    Neither the size of its pictures nor that of a head of its attention is in the file: the first
    is taken to be the one of which the smallest level has 8 pixels, the second is 64, as in the
    published models; and rows of qkv are in their order, head by head.
    """
    if "label_emb.weight" in state:
        raise CheckpointError("a class-conditional model; wanted: one without classes")
    wanted = ("input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight")
    if missing := [name for name in wanted if name not in state]:
        raise CheckpointError(f"not a guided-diffusion model, it lacks {some(missing)}")
    _, n_in = _blocks(state, "input_blocks")
    outs, n_out = _blocks(state, "output_blocks")

    # input blocks: conv_in, then for each level its residual blocks and, but for the last, one that
    # halves the size; output blocks: for each level as many and one more, the last one doubles it
    doubling = [i for i in range(n_out) if _resizes(outs, i)]
    layers = (doubling[0] + 1 if doubling else n_out) - 1
    levels = len(doubling) + 1
    if n_out != levels * (layers + 1) or n_in != levels * (layers + 1):
        raise CheckpointError("not a guided-diffusion model, its levels differ in their blocks")
    residual = (
        bool(doubling) and "conv.weight" not in outs[doubling[0], _resizes(outs, doubling[0])]
    )
    names = {"input_blocks.0.0.": "conv_in.", "out.0.": "conv_norm_out.", "out.2.": "conv_out."}
    names |= {
        "time_embed.0.": "time_embedding.linear_1.",
        "time_embed.2.": "time_embedding.linear_2.",
    }
    names |= {"middle_block.0.": "mid_block.resnets.0.", "middle_block.2.": "mid_block.resnets.1."}
    names["middle_block.1."] = "mid_block.attentions.0."
    for level in range(levels):
        for j in range(layers + 1):
            i, o = 1 + level * (layers + 1) + j, level * (layers + 1) + j
            down, up = f"down_blocks.{level}.", f"up_blocks.{level}."
            if j < layers:
                names[f"input_blocks.{i}.0."] = f"{down}resnets.{j}."
                names[f"input_blocks.{i}.1."] = f"{down}attentions.{j}."
            else:
                names[f"input_blocks.{i}.0."] = f"{down}downsamplers.0."
            names[f"output_blocks.{o}.0."] = f"{up}resnets.{j}."
            names[f"output_blocks.{o}.1."] = f"{up}attentions.{j}."
            if resize := _resizes(outs, o):
                names[f"output_blocks.{o}.{resize}."] = f"{up}upsamplers.0."
    renamed = {}
    for name, tensor in state.items():
        start = next((x for x in names if name.startswith(x)), None)
        if start is None:
            raise CheckpointError(f"not a guided-diffusion model, it has {name!r:.80}")
        renamed |= _guided_names(names[start], name.removeprefix(start), tensor, head)
    firsts = [f"down_blocks.{i}.resnets.0.conv1.weight" for i in range(levels)]
    if missing := [name for name in firsts if name not in renamed]:
        raise CheckpointError(f"not a guided-diffusion model, it lacks {some(missing)}")
    first = state["input_blocks.1.0.emb_layers.1.weight"]
    scales = len(first) == 2 * len(renamed[firsts[0]])
    config = config_of(
        8 * 2 ** (levels - 1),
        [len(renamed[name]) for name in firsts],
        [f"down_blocks.{i}.attentions.0.to_q.weight" in renamed for i in range(levels)],
        residual,
        layers_per_block=layers,
        in_channels=state["input_blocks.0.0.weight"].shape[1],
        out_channels=len(state["out.2.weight"]),
        attention_head_dim=head,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if scales else "default",
    )
    return config, renamed


def _blocks(state, kind):
    """{(block, part): names of its tensors}, and how many blocks there are."""
    found = {}
    for name in state:
        if match := re.match(rf"{kind}\.(\d{{1,3}})\.(\d)\.(.*)", name):
            found.setdefault((int(match[1]), int(match[2])), set()).add(match[3])
    return found, 1 + max((i for i, _ in found), default=-1)


def _resizes(outs, i):
    """Which part of an output block doubles the size; 0 if none."""
    kinds = ("conv.weight", "in_layers.2.weight")
    return next((j for j in (1, 2) if any(x in outs.get((i, j), ()) for x in kinds)), 0)


_GUIDED = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
    "norm.": "group_norm.",
    "op.": "conv.",
}


def _guided_names(start, rest, tensor, head):
    """A tensor of guided-diffusion, under diffusers' names; of qkv, three of them."""
    if rest.startswith(("qkv.", "proj_out.")) and tensor.ndim == 3:
        tensor = tensor[:, :, 0]
    if rest.startswith("proj_out."):
        return {f"{start}to_out.0.{rest.removeprefix('proj_out.')}": tensor}
    if rest.startswith("qkv."):
        if len(tensor) % (3 * head):
            raise CheckpointError(f"{len(tensor) // 3} channels of attention in heads of {head}")
        parts = tensor.unflatten(0, (-1, 3, head)).unbind(1)
        kind = rest.removeprefix("qkv.")
        pairs = zip("qkv", parts, strict=True)
        return {f"{start}to_{x}.{kind}": part.flatten(0, 1).clone() for x, part in pairs}
    for old, new in _GUIDED.items():
        if rest.startswith(old):
            return {f"{start}{new}{rest.removeprefix(old)}": tensor}
    return {f"{start}{rest}": tensor}
