"""The CUDA kernels: compiled for GPUs, kept, and done without. What they compute is tested in
test_stylegan2_ops.py.
"""

import importlib.util
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from stylegan2_ops import Generator, _cuda, bias_act, upfirdn2d

nvrtc = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("cuda", "cuda.core", "cuda.bindings")),
    reason="cuda-core or cuda-bindings is not installed",
)

# ----------------------------------------------------------------------------------------------
# On a GPU


@pytest.fixture
def gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.gpu
def test_generator_by_kernels_and_by_reference(gpu, monkeypatch):
    torch.manual_seed(0)
    generator = Generator(16, {4: 8, 8: 8, 16: 4}, w_dim=8).cuda()
    w = torch.randn(2, 8, device="cuda", requires_grad=True)
    images = [generator.synthesis(w)]
    monkeypatch.setattr(_cuda, "usable", lambda impl, device, dtype: False)
    images.append(generator.synthesis(w))
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)
    grads = (torch.autograd.grad(image.sum(), w)[0] for image in images)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_the_first_kernel_of_a_thread(gpu):
    """PyTorch gives a thread its CUDA context late: https://github.com/pytorch/pytorch/issues/124565"""
    x, f = torch.randn(1, 2, 5, 5, device="cuda"), torch.ones(3, 3, device="cuda")
    with ThreadPoolExecutor(1) as pool:
        y = pool.submit(upfirdn2d, x, f, impl="cuda").result()
    torch.testing.assert_close(y, upfirdn2d(x, f, impl="cuda"))


# ----------------------------------------------------------------------------------------------
# Compiling, without a GPU


@nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("scalar", _cuda.TYPES.values())
def test_compiles_for(arch, scalar):
    wide = scalar in ("double", "half")  # count in 64 bits
    common = {"T": scalar, "INT": "long long" if wide else "int"}
    pack = 1 if wide else 16 // {"float": 4, "bfloat16": 2}[scalar]
    upfirdn = dict(CHANNELS_LAST=int(wide), ROWS=4, UP_X=2, UP_Y=1, DOWN_X=1, DOWN_Y=2, PHASE_X=1,
                   PHASE_Y=0, TAPS_X=4, TAPS_Y=9)  # fmt: skip
    for name, macros in [("upfirdn2d", upfirdn)] + [
        ("bias_act", dict(PACK=pack, ACT=act, ORDER=order))
        for act, order in (("LRELU", 0), ("SELU", 1), ("SWISH", 2))
    ]:
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
    functions = _cuda.architecture, _cuda.obstacle, _cuda.load, _cuda._warn
    for function in functions:
        function.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield tmp_path
    for function in functions:
        function.cache_clear()


def test_cache(fresh, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        _cuda, "compile_cubin", lambda text, arch: compiled.append(text + arch) or b"code " * 99
    )

    def times_compiled(text="a", arch="sm_90"):
        assert _cuda.cubin(text, arch) == b"code " * 99
        return len(compiled)

    assert [times_compiled(), times_compiled()] == [1, 1]
    (file,) = (fresh / "stylegan2_ops").iterdir()
    whole = file.read_bytes()
    for n, damaged in enumerate((b"", whole[:-1], whole[:40] + b"!" + whole[41:]), 2):
        file.write_bytes(damaged)
        assert [times_compiled(), times_compiled()] == [n, n] and file.read_bytes() == whole
    assert times_compiled("b") == 5 and times_compiled(arch="sm_80") == 6
    assert len(list((fresh / "stylegan2_ops").iterdir())) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # where nothing can be written
    assert [times_compiled(), times_compiled()] == [7, 8]


# ----------------------------------------------------------------------------------------------
# Doing without


class OnGpu(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


def no_cuda_core(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)


def no_nvrtc(monkeypatch):
    def compile_cubin(text, arch):
        raise OSError("libnvrtc.so:\ncannot open shared object file")

    monkeypatch.setattr(_cuda, "compile_cubin", compile_cubin)


def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (3, 0))


@pytest.mark.parametrize(
    "obstacle, reason",
    [
        (no_cuda_core, "cuda.core.*; wanted: pip install cuda-core 'cuda-bindings=="),
        pytest.param(no_nvrtc, "OSError: libnvrtc.so: cannot open", marks=nvrtc),
        pytest.param(old_gpu, "NVRTC.* invalid value for --gpu-architecture", marks=nvrtc),
    ],
)
def test_the_reference_is_used_with_one_warning(obstacle, reason, fresh, monkeypatch):
    obstacle(monkeypatch)
    x = torch.randn(1, 2, 3, 4).as_subclass(OnGpu)
    with pytest.warns(UserWarning, match=f"no CUDA kernel, .*: .*{reason}") as caught:
        y = bias_act(x, act="lrelu")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert str(caught[0].message).isprintable()  # a line
    with warnings.catch_warnings(action="error"):
        upfirdn2d(x, None)
        torch.testing.assert_close(y, bias_act(x, act="lrelu", impl="ref"))
    for operation in (bias_act, partial(upfirdn2d, f=None)):
        with pytest.raises(RuntimeError, match=reason):
            operation(x, impl="cuda")


def test_what_is_refused(fresh):
    x = torch.ones(1, 2, 3, 3)
    for operation in (bias_act, partial(upfirdn2d, f=None)):
        with pytest.raises(RuntimeError, match='the tensor is on the cpu .impl="ref" needs none'):
            operation(x, impl="cuda")
        with pytest.raises(RuntimeError, match="there is none for torch.int64"):
            operation(x.long().as_subclass(OnGpu), impl="cuda")
        with pytest.raises(ValueError, match="'fast'"):
            operation(x, impl="fast")
    with pytest.raises(ValueError, match="does not fit axis 1"):
        bias_act(x, torch.ones(3))
    with pytest.raises(ValueError, match="act must be one of linear, relu"):
        bias_act(x, act="gelu")


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
