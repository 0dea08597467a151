"""Reading CLIPs of OpenAI's architectures, under OpenAI's key names.

OpenAI publishes TorchScript archives; others save state dicts, open_clip within a container. Only
tensors are taken out of any of them: clip.load would run an archive's code.

The tensors do not tell two things, which whoever builds a network of them takes from OpenAI's: that
heads of attention are 64 wide, and that the MLPs have QuickGELU. Warnings tell where that may be
another network than was trained.
"""

import math
import re
import warnings

import safetensors.torch
import torch

from checkpoints.files import check_finite, check_names, is_safetensors, read_file, unwrapped
from checkpoints.pickles import (
    CheckpointError,
    Opaque,
    StoredTensor,
    read_pickled,
    read_script,
    some,
    tensor_reader,
)

KIND = "a CLIP under OpenAI's key names"
# Layers, width and patch of the image side, width and layers of the text side, size of features.
RELEASED = {
    "RN50": ((3, 4, 6, 3), 64, None, 512, 12, 1024),
    "RN101": ((3, 4, 23, 3), 64, None, 512, 12, 512),
    "RN50x4": ((4, 6, 10, 6), 80, None, 640, 12, 640),
    "RN50x16": ((6, 8, 18, 8), 96, None, 768, 12, 768),
    "RN50x64": ((3, 15, 36, 10), 128, None, 1024, 12, 1024),
    "ViT-B/32": (12, 768, 32, 512, 12, 512),
    "ViT-B/16": (12, 768, 16, 512, 12, 512),
    "ViT-L/14": (24, 1024, 14, 768, 12, 768),  # and ViT-L/14@336px
}
SMALL = 256  # text sides below are of no published CLIP, but trained with OpenAI's own class
ROOM = 2**27  # bytes: a CLIP of few words is a small file, most of its token embedding being zero
NUMBERS = ("input_resolution", "context_length", "vocab_size")  # beside the weights


def read_clip(path):
    """The state dict of a CLIP: {OpenAI's key name: tensor}, for `ipl.load_clip`.

    path: a file, or a URL as for `load_generator`; of a state dict by torch.save, pickle or
    safetensors, perhaps within {"state_dict": ...} and under a wrapper's prefix such as "module.";
    or of a TorchScript archive. No code in it is run. The tensors are float16 or float32 as in the
    file (other floats become float32), and finite; integers, all of them sizes and counters, are
    left out. Warnings tell of a prefix, and of what may be meant for another network.

    Raises CheckpointError, of one line; it names the tensors that are lacking, surplus, misshapen
    or not finite.
    """
    return read_file(path, KIND, _parse)


def _parse(data, notes):
    if is_safetensors(data):
        state = safetensors.torch.load(data)
        state = {name: x for name, x in state.items() if x.is_floating_point()}
    else:
        value, unread = read_pickled(data, ROOM)
        if isinstance(value, Opaque) and value.name.startswith("__torch__"):
            state = read_script(data)
        else:
            state = _read_state(value, unread, tensor_reader(max(ROOM, 4 * len(data))), notes)
    state = unwrapped(state, notes)
    architecture = _check(state)
    check_finite(state)
    if architecture not in RELEASED.values() and architecture[3] >= SMALL:
        notes.append(
            "widths and depths that are none of OpenAI's models; it is taken for one of their "
            "kind, with QuickGELU and heads 64 wide"
        )
    kept = (torch.float16, torch.float32)
    return {name: x if x.dtype in kept else x.float() for name, x in state.items()}


def _read_state(value, unread, read, notes):
    """The tensors of a pickled state dict, or of one in a container."""
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        name = value.get("name")  # of a run of open_clip
        if not isinstance(name, str) or "quickgelu" not in name:
            notes.append(
                "a container as open_clip's, whose own models have GELU unless their names end in "
                "quickgelu; it is taken for a CLIP with QuickGELU"
            )
        value = value["state_dict"]
    if not isinstance(value, dict):
        why = str(value) if isinstance(value, Opaque) else "no state dict"
        raise CheckpointError(f"{why}; wanted: the state dict of {KIND}")
    if unread:
        notes.append(f"left unread, as nothing is run: {some(unread)}")

    def counts(name, stored):
        whole = isinstance(stored, StoredTensor) and not stored.storage.dtype.is_floating_point
        return whole or str(name).endswith(NUMBERS)

    return {name: read(name, x) for name, x in value.items() if not counts(name, x)}


def _check(state):
    """The architecture of a state dict, as in RELEASED, if its tensors are those of a CLIP."""
    with warnings.catch_warnings(action="ignore"):  # it imports pkg_resources, which is deprecated
        from clip.model import CLIP

    def shape(name, dims):
        if name not in state:
            raise CheckpointError(f"not {KIND}, it lacks {name!r}")
        if state[name].ndim != dims:
            raise CheckpointError(
                f"{name} is {tuple(state[name].shape)}; wanted: {dims} dimensions"
            )
        return state[name].shape

    def depth(pattern):
        return len({found[1] for found in map(re.compile(pattern).match, state) if found})

    features = shape("text_projection", 2)[1]
    context, width = shape("positional_embedding", 2)
    text = (context, shape("token_embedding.weight", 2)[0], width, width // 64)
    layers = depth(r"transformer\.resblocks\.(\d+)\.")
    if "visual.proj" in state:
        image_width, _, _, patch = shape("visual.conv1.weight", 4)
        image_layers = depth(r"visual\.transformer\.resblocks\.(\d+)\.")
        side, step, narrow = "visual.positional_embedding", patch, image_width
    else:
        image_width, patch = shape("visual.layer1.0.conv1.weight", 4)[0], None
        image_layers = tuple(depth(rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
        side, step, narrow = "visual.attnpool.positional_embedding", 32, 32 * image_width
    resolution = step * math.isqrt(shape(side, 2)[0] - 1)
    if width % 64 or narrow % 64 or min(width, narrow) < 64:
        raise CheckpointError(f"widths {narrow} and {width}; wanted: multiples of 64, as OpenAI's")
    if max(layers, *(image_layers if patch is None else [image_layers])) > 100:
        raise CheckpointError("more than 100 layers; wanted: at most 36, as OpenAI's")

    with torch.device("meta"):  # where tensors have no memory
        model = CLIP(features, resolution, image_layers, image_width, patch, *text, layers)
    expected = model.state_dict().items()
    check_names(state, {name: x for name, x in expected if x.is_floating_point()}, KIND)
    return image_layers, image_width, patch, width, layers, features
