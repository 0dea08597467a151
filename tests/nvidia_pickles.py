"""For the tests: pickles with the structure of NVIDIA's, of any generator of ours.

Python's own pickler writes them; the modules that they name exist meanwhile only.
"""

import io
import pickle
import sys
from types import ModuleType
from unittest import mock

import numpy as np
import torch

from checkpoints.nvidia import _names

_MODULES = {}


def named(module, name):
    """A function that is pickled under this name, and that nothing may call."""

    def function(*args):
        raise AssertionError(f"{module}.{name} was called")

    function.__module__, function.__qualname__ = module, name
    for end in [i for i, c in enumerate(module) if c == "."]:
        _MODULES.setdefault(module[:end], ModuleType(module[:end]))
    stub = _MODULES.setdefault(module, ModuleType(module))
    if not hasattr(stub, name):
        setattr(stub, name, function)
    return getattr(stub, name)


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


def module(class_name, parameters=(), buffers=(), modules=(), **attributes):
    state = {"training": False, "_parameters": dict(parameters), "_buffers": dict(buffers)}
    state |= {"_modules": dict(modules), "_forward_hooks": {}, **attributes}
    meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "state": state}
    meta["class_name"] = class_name
    return Call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


def nvidia_module(generator, **attributes):
    """What NVIDIA's code would pickle for `generator`; attributes: more of its outermost ones.

    Which of their tensors is which of ours is taken from the reader; the golden files prove that.
    """
    sizes, kind, state = list(generator.channels), generator.architecture, generator.state_dict()
    parts = {"": {}, "synthesis": {}, "mapping": {"w_avg": generator.w_avg}}
    parts |= {f"synthesis.b{size}": {} for size in sizes}
    for ours, theirs in _names(sizes, generator.n_mlp, generator.c_dim, kind).items():
        path, _, leaf = theirs.rpartition(".")
        tensor = state[ours] / 4 if leaf == "resample_filter" else state[ours]
        if theirs.endswith("torgb.bias"):
            tensor = tensor.flatten()
        elif leaf in ("const", "noise_const", "noise_strength") or ours.endswith(".conv.weight"):
            tensor = tensor[0, 0] if leaf == "noise_const" else tensor[0]
        parts.setdefault(path, {})[leaf] = tensor
    halves = [f"b{size}" for size in sizes[1:][len(sizes) - 1 - generator.num_fp16_res :]]

    def build(path, **attributes):
        name, buffers = path.rpartition(".")[2], ("resample_filter", "noise_const", "w_avg")
        given = {"activation": "lrelu" if name.startswith(("fc", "conv")) else "linear"}
        given |= {"bias_gain": 0.01 if name.startswith("fc") else 1, "weight_gain": np.float64(0.5)}
        given |= {"conv_clamp": generator.conv_clamp, "architecture": kind, "use_noise": True}
        tensors = [{k: x for k, x in parts[path].items() if (k in buffers) == b} for b in (0, 1)]
        children = [x for x in parts if x and x.rpartition(".")[0] == path]
        modules = {x.rpartition(".")[2]: build(x) for x in children}
        return module("Layer", *tensors, modules, **given, use_fp16=name in halves, **attributes)

    given = {"z_dim": generator.z_dim, "c_dim": generator.c_dim, "img_channels": 3, **attributes}
    return build("", **given)


def nvidia_pickle(generator, protocol=4, **attributes):
    """The bytes of a snapshot with `generator` as G_ema."""
    ema = nvidia_module(generator, **attributes)
    kwargs = {"path": "data.zip"}
    content = {"training_set_kwargs": kwargs, "G": None, "D": None, "G_ema": ema}
    return dumps({**content, "augment_pipe": None}, protocol)
