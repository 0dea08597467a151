"""For the tests: NVIDIA's pickles with any change; and a program.

Python's own pickler writes them; the modules that they name exist meanwhile only.
"""

import functools
import io
import os
import pickle
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

GOLDEN, _MODULES = Path(__file__).parent / "golden", {}


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
    meta = {"type": "class", "class_name": class_name, "state": {**state, **attributes}}
    return Call("torch_utils.persistence", "_reconstruct_persistent_obj", meta)


def members(data):
    """The members of a file of torch.save by name, without the folder they are in."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def zipped(files, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


class _Editable(pickle.Unpickler):
    def find_class(self, module, name):
        if module == "torch_utils.persistence":
            return functools.partial(Call, module, name)
        return dict if module == "dnnlib.util" else super().find_class(module, name)


def network(name, path="", part="G_ema", **changes):
    """A part of golden/nvidia_<name>.pkl, read by Python's own unpickler.

    With other attributes, tensors or modules in the module at `path`.
    """
    with open(GOLDEN / f"nvidia_{name}.pkl", "rb") as file:
        root = _Editable(file).load()[part]
    state = root.args[0]["state"]
    for step in filter(None, path.split(".")):
        state = state["_modules"][step].args[0]["state"]
    parts = [state[kind] for kind in ("_parameters", "_buffers", "_modules")]
    for name, value in changes.items():
        next((part for part in parts if name in part), state)[name] = value
    return root
