"""For the tests: pickles with the structure of NVIDIA's, of any generator of ours; and a program.

Python's own pickler writes them; the modules that they name exist meanwhile only.
"""

import functools
import io
import os
import pickle
import sys
from types import ModuleType
from unittest import mock

import numpy as np
import torch

from checkpoints.nvidia import _names

_MODULES = {}


class Payload:
    """Pickled as a program that leaves a file."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@functools.cache
def named(module, name):
    """A function that is pickled under this name, and that nothing may call."""

    def function(*args):
        raise AssertionError(f"{module}.{name} was called")

    function.__module__, function.__qualname__ = module, name
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        stub = _MODULES.setdefault(".".join(parts[:end]), ModuleType(module))
    setattr(stub, name, function)
    return function


class Call:
    """Pickled as the call module.name(*args)."""

    def __init__(self, module, name, *args):
        self.function, self.args = named(module, name), args

    def __reduce__(self):
        return self.function, self.args


def dumps(value, protocol=4):
    with mock.patch.dict(sys.modules, _MODULES):
        return pickle.dumps(value, protocol)


def torch_save(value, new=True):
    """The bytes that torch.save writes, in its present format or in that before torch 1.6."""
    buffer = io.BytesIO()
    with mock.patch.dict(sys.modules, _MODULES):
        torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def module(class_name, parameters=(), modules=(), **attributes):
    state = {"_parameters": dict(parameters), "_buffers": {}, "_modules": dict(modules)}
    meta = {"type": "class", "version": 6, "module_src": "raise SystemExit"}
    meta |= {"class_name": class_name, "state": {**state, **attributes}}
    return Call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


def nvidia_module(generator):
    """What NVIDIA's code would pickle for `generator`.

    Which of their tensors is which of ours is taken from the reader; the golden files prove that.
    """
    sizes, kind, state = list(generator.channels), generator.architecture, generator.state_dict()
    root = {"mapping": {"w_avg": generator.w_avg}}
    for ours, theirs in _names(sizes, generator.n_mlp, generator.c_dim, kind).items():
        *path, leaf = theirs.split(".")
        tensor = state[ours] / 4 if leaf == "resample_filter" else state[ours]
        if theirs.endswith("torgb.bias"):
            tensor = tensor.flatten()
        elif leaf in ("const", "noise_const", "noise_strength") or ours.endswith(".conv.weight"):
            tensor = tensor[0, 0] if leaf == "noise_const" else tensor[0]
        part = root
        for name in path:
            part = part.setdefault(name, {})
        part[leaf] = tensor
    halves = [f"b{size}" for size in sizes[len(sizes) - generator.num_fp16_res :]]
    given = {"z_dim": generator.z_dim, "c_dim": generator.c_dim, "img_channels": 3}
    given |= {"conv_clamp": generator.conv_clamp, "architecture": kind, "use_noise": True}

    def build(name, part):
        own = {"activation": "lrelu" if name.startswith(("fc", "conv")) else "linear"}
        own |= {"bias_gain": 0.01 if name.startswith("fc") else 1, "weight_gain": np.float64(0.5)}
        tensors = {key: x for key, x in part.items() if isinstance(x, torch.Tensor)}
        modules = {key: build(key, x) for key, x in part.items() if isinstance(x, dict)}
        return module("Layer", tensors, modules, use_fp16=name in halves, **given, **own)

    return build("", root)


def changed(root, path, **changes):
    """What nvidia_module returned, with other attributes or parts in the module at `path`."""
    state = root.args[0]["state"]
    for part in filter(None, path.split(".")):
        state = state["_modules"][part].args[0]["state"]
    for name, value in changes.items():
        kind = next((kind for kind in ("_parameters", "_modules") if name in state[kind]), None)
        (state[kind] if kind else state)[name] = value
    return root


def nvidia_pickle(generator, protocol=4):
    """The bytes of a snapshot with `generator` as G_ema."""
    content = {"training_set_kwargs": {"path": "data.zip"}, "G": None, "D": None}
    content |= {"G_ema": nvidia_module(generator), "augment_pipe": None}
    return dumps(content, protocol)
