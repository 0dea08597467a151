"""The CUDA kernels: compiled for GPUs, kept, and done without. What they compute is tested in
test_stylegan2_ops.py.
"""

import functools
import importlib.util
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from stylegan2_ops import Generator, _cuda, bias_act, upfirdn2d

nvrtc = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cuda", "cuda.core", "cuda.bindings")),
    reason="cuda-core or cuda-bindings is not installed",
)
OPERATIONS = bias_act, partial(upfirdn2d, f=None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_generator_by_kernels_and_by_reference(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    generator = Generator(16, {4: 8, 8: 8, 16: 4}, w_dim=8).cuda()
    w = torch.randn(2, 8, device="cuda", requires_grad=True)

    def results():
        with ThreadPoolExecutor(1) as pool:  # PyTorch gives a thread its CUDA context late:
            y = pool.submit(bias_act, w.detach()).result()  # its issue 124565
        image = generator.synthesis(w)
        return y, image, *torch.autograd.grad(image.sum(), w)

    by_kernels = results()
    monkeypatch.setattr(_cuda, "usable", lambda impl, device, dtype: False)
    torch.testing.assert_close(by_kernels, results(), rtol=1e-3, atol=1e-4)


@nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("scalar", _cuda.TYPES.values())
def test_compiles_for(arch, scalar):
    wide = scalar in ("double", "half")  # count in 64 bits
    pack = {"float": 4, "bfloat16": 8}.get(scalar, 1)
    common = {"T": scalar, "INT": "long long" if wide else "int"}
    resampling = dict(CHANNELS_LAST=int(wide), ROWS=4, UP_X=2, UP_Y=1, DOWN_X=1, DOWN_Y=2)
    kernels = [("upfirdn2d", resampling | dict(PHASE_X=1, PHASE_Y=0, TAPS_X=4, TAPS_Y=9))]
    for order, act in enumerate(("LRELU", "SELU", "SWISH")):
        kernels.append(("bias_act", dict(PACK=pack, ACT=act, ORDER=order)))
    for name, macros in kernels:
        try:
            code = _cuda.compile_cubin(_cuda.source(name, (common | macros).items()), arch)
        except Exception as error:
            if "--gpu-architecture" in str(error):
                pytest.skip(f"this NVRTC is older than {arch}")
            raise
        assert code.startswith(b"\x7fELF") and name.encode() in code


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is known of the kernels yet, the cache is empty, and the GPU is of a good kind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name in ("architecture", "obstacle", "load", "_warn"):
        monkeypatch.setattr(_cuda, name, functools.cache(getattr(_cuda, name).__wrapped__))
    return tmp_path / "stylegan2_ops"


def test_cache(fresh, monkeypatch):
    compiler = Mock(return_value=b"code " * 99)
    monkeypatch.setattr(_cuda, "compile_cubin", compiler)

    def times_compiled(text="a", arch="sm_90"):
        assert _cuda.cubin(text, arch) == compiler.return_value
        return compiler.call_count

    assert [times_compiled(), times_compiled()] == [1, 1]
    (file,) = fresh.iterdir()
    whole = file.read_bytes()
    for n, damaged in enumerate((b"", whole[:-1], whole[:40] + b"!" + whole[41:]), 2):
        file.write_bytes(damaged)
        assert [times_compiled(), times_compiled()] == [n, n] and file.read_bytes() == whole
    assert times_compiled("b") == 5 and times_compiled(arch="sm_80") == 6
    assert len(list(fresh.iterdir())) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # where nothing can be written
    assert [times_compiled(), times_compiled()] == [7, 8]


class OnGpu(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


no_core = sys.modules, "cuda.core", None
no_nvrtc = vars(_cuda), "compile_cubin", Mock(side_effect=OSError("libnvrtc.so:\ncannot open it"))
old_gpu = vars(torch.cuda), "get_device_capability", lambda device: (3, 0)


@pytest.mark.parametrize(
    "obstacle, reason",
    [
        (no_core, "cuda.core.*; wanted: pip install cuda-core 'cuda-bindings=="),
        pytest.param(no_nvrtc, "OSError: libnvrtc.so: cannot open", marks=nvrtc),
        pytest.param(old_gpu, "NVRTC.* invalid value for --gpu-architecture", marks=nvrtc),
    ],
)
def test_the_reference_is_used_with_one_warning(obstacle, reason, fresh, monkeypatch):
    monkeypatch.setitem(*obstacle)
    x = torch.randn(1, 2, 3, 4).as_subclass(OnGpu)
    with pytest.warns(UserWarning, match=f"no CUDA kernel, .*: .*{reason}") as caught:
        y = bias_act(x, act="lrelu")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert str(caught[0].message).isprintable()  # a line
    with warnings.catch_warnings(action="error"):
        upfirdn2d(x, None)
        torch.testing.assert_close(y, bias_act(x, act="lrelu", impl="ref"))
    for operation in OPERATIONS:
        with pytest.raises(RuntimeError, match=reason):
            operation(x, impl="cuda")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_refused(operation, fresh):
    x = torch.ones(1, 2, 3, 3)
    integers = x.long().as_subclass(OnGpu)
    no_kernel, on_cpu = "there is none for torch.int64", 'is on the cpu .impl="ref" needs none'
    for error, words, refused in (
        (RuntimeError, on_cpu, partial(operation, x, impl="cuda")),
        (RuntimeError, no_kernel, partial(operation, integers, impl="cuda")),
        (ValueError, "'fast'", partial(operation, x, impl="fast")),
        (ValueError, "does not fit axis 1", partial(bias_act, x, torch.ones(3))),
        (ValueError, "act must be one of linear, relu", partial(bias_act, x, act="gelu")),
    ):
        with pytest.raises(error, match=words):
            refused()


def test_import_does_nothing(tmp_path):
    program = """
import sys, stylegan2_ops, torch
stylegan2_ops.bias_act(stylegan2_ops.upfirdn2d(torch.ones(1, 1, 2, 2), None))
assert not {"cuda.core", "stylegan2_ops._cuda", "torch._dynamo"} & set(sys.modules)
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, check=True)
    assert not list(tmp_path.iterdir())
