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
    """What NVIDIA's code would pickle for `generator`; attributes: more of its outermost ones."""
    state, sizes = generator.state_dict(), list(generator.channels)
    common = {"conv_clamp": generator.conv_clamp, "w_dim": generator.w_dim}

    def linear(name, activation="linear", gain=1):
        parameters = {key: state[f"{name}.{key}"] for key in ("weight", "bias")}
        gains = {"bias_gain": gain, "weight_gain": np.float64(0.5)}
        return module("FullyConnectedLayer", parameters, activation=activation, **gains)

    def kernel(name=None):
        filter_ = state["convs.0.conv.blur.kernel"] if name is None else state[name]
        return {"resample_filter": filter_ / 4}

    def conv(name, index):
        parameters = {
            "weight": state[f"{name}.conv.weight"][0],
            "noise_strength": state[f"{name}.noise.weight"][0],
            "bias": state[f"{name}.activate.bias"],
        }
        buffers = kernel() | {"noise_const": state[f"noises.noise_{index}"][0, 0]}
        affine = {"affine": linear(f"{name}.conv.modulation")}
        given = {"activation": "lrelu", "use_noise": True, "act_gain": np.float64(2**0.5)}
        return module("SynthesisLayer", parameters, buffers, affine, **given, **common)

    def to_rgb(name):
        weight, bias = state[f"{name}.conv.weight"][0], state[f"{name}.bias"].flatten()
        affine = {"affine": linear(f"{name}.conv.modulation")}
        return module("ToRGBLayer", {"weight": weight, "bias": bias}, {}, affine, **common)

    def block(k, size):
        if k == 0:
            parameters, modules = {"const": state["input.input"][0]}, {"conv1": conv("conv1", 0)}
        else:
            parameters, i = {}, 2 * k - 2
            modules = {"conv0": conv(f"convs.{i}", i + 1), "conv1": conv(f"convs.{i + 1}", i + 2)}
        if generator.architecture == "skip":
            modules["torgb"] = to_rgb(f"to_rgbs.{k - 1}" if k else "to_rgb1")
        elif size == sizes[-1]:
            modules["torgb"] = to_rgb("to_rgbs.0")
        if generator.architecture == "resnet" and k:
            skip = {"weight": state[f"skips.{k - 1}.weight"], "bias": None}
            modules["skip"] = module("Conv2dLayer", skip, kernel(f"skips.{k - 1}.blur.kernel"))
        use_fp16 = k > 0 and k >= len(sizes) - generator.num_fp16_res
        attributes = {"architecture": generator.architecture, "use_fp16": use_fp16}
        return module("SynthesisBlock", parameters, kernel(), modules, **attributes)

    blocks = {f"b{size}": block(k, size) for k, size in enumerate(sizes)}
    layers = {f"fc{i}": linear(f"style.{i + 1}", "lrelu", 0.01) for i in range(generator.n_mlp)}
    if generator.c_dim:
        layers["embed"] = linear("embed")
    parts = {
        "synthesis": module("SynthesisNetwork", {}, {}, blocks),
        "mapping": module("MappingNetwork", {}, {"w_avg": generator.w_avg}, layers),
    }
    given = {"z_dim": generator.z_dim, "c_dim": generator.c_dim, "w_dim": generator.w_dim}
    given |= {"img_resolution": generator.resolution, "img_channels": 3, **attributes}
    return module("Generator", {}, {}, parts, **given)


def nvidia_pickle(generator, protocol=4, **attributes):
    """The bytes of a snapshot with `generator` as G_ema."""
    ema = nvidia_module(generator, **attributes)
    kwargs = {"path": "data.zip"}
    content = {"training_set_kwargs": kwargs, "G": None, "D": None, "G_ema": ema}
    return dumps({**content, "augment_pipe": None}, protocol)
