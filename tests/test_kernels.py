"""The CUDA kernels: their source compiled for GPUs, run as plain C++, and run on a GPU if any.

The same tests run twice. As "plain C++", `plain_cuda.h` makes an ordinary compiler understand the
kernels, and they run on CPU tensors below the real operators: everything but the launch itself.
As "gpu" they run on a CUDA device.
"""

import ctypes
import importlib
import importlib.util
import math
import os
import random
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from stylegan2_ops import Generator, _cuda, bias_act, modulated_conv2d, upfirdn2d

# the packages' functions of these names hide the modules
resampling = importlib.import_module("stylegan2_ops.upfirdn2d")
modulated_conv = importlib.import_module("stylegan2_ops.modulated_conv")

HERE = Path(__file__).parent
OPS = torch.load(HERE / "golden" / "ops.pt", weights_only=True)
ACTIVATIONS = ["linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"]
ERROR = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
nvrtc = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None,
    reason="cuda-core is not installed",
)


# ----------------------------------------------------------------------------------------------
# Two ways to run the kernels


def combined(kernels):
    """One text with many kernels {(name, macros): symbol}."""
    text = ""
    for (name, macros), symbol in kernels.items():
        macros = {**dict(macros), name: symbol}
        text += f"namespace in_{symbol} {{\n"
        text += "".join(f"#define {macro} {value}\n" for macro, value in macros.items())
        text += (_cuda.KERNELS / f"{name}.cu").read_text()
        text += "".join(f"#undef {macro}\n" for macro in macros) + "}\n"
    return text


class PlainKernels:
    """Stands in for `_cuda.start`: the kernels as plain C++, in shared libraries in `folder`.

    While `recording`, kernels are not run but noted, to be compiled together.
    """

    def __init__(self, compiler, folder):
        self.compiler, self.folder = compiler, folder
        self.recording, self.noted, self.functions = True, [], {}

    def compile(self):
        first = len(self.functions)
        kernels = {key: f"kernel_{i}" for i, key in enumerate(dict.fromkeys(self.noted), first)}
        text = '#include "plain_cuda.h"\n' + combined(kernels)
        for symbol in kernels.values():
            text += f'extern "C" bool run_{symbol}(PARAMETERS) {{ RUN(in_{symbol}::{symbol}) }}\n'
        path = self.folder / f"{first}.cpp"
        path.write_text(text)
        options = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
        options += [f"-I{HERE}", f"-I{_cuda.KERNELS}", "-o", path.with_suffix(".so")]
        subprocess.run([self.compiler, path, *options], check=True)
        library = ctypes.CDLL(path.with_suffix(".so"))
        for key, symbol in kernels.items():
            self.functions[key] = library[f"run_{symbol}"]
            self.functions[key].restype = ctypes.c_bool
        self.recording, self.noted = False, []

    def __call__(self, name, macros, device, blocks, arguments):
        if (name, macros) not in self.functions:
            self.noted.append((name, macros))
            if self.recording:
                return
            self.compile()
        # cuda.core makes a pointer of an int, and takes other numbers as ctypes
        arguments = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments]
        count = len(arguments)
        sizes = (ctypes.c_int * count)(*map(ctypes.sizeof, arguments))
        pointers = (ctypes.c_void_p * count)(*map(ctypes.addressof, arguments))
        run = self.functions[name, macros]
        assert run(blocks, _cuda.BLOCK, count, sizes, pointers), "arguments do not fit the kernel"


def use(start, patch):
    """Let impl="cuda" run the operators on CPU tensors."""
    patch.setattr(_cuda, "start", start)
    patch.setattr(_cuda, "obstacle", lambda device, dtype: None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    compiler = next(filter(None, map(shutil.which, ["g++", "clang++", "c++"])), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    for operator in (_cuda.upfirdn2d, _cuda.bias_act):
        operator.register_kernel("cpu", operator._init_fn)
    start = PlainKernels(compiler, tmp_path_factory.mktemp("plain"))
    with pytest.MonkeyPatch.context() as patch:
        use(start, patch)
        for comparison in COMPARISONS.values():
            list(comparison("cpu"))
    start.compile()
    return start


@pytest.fixture(params=["plain C++", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "plain C++":
        use(request.getfixturevalue("plain"), monkeypatch)
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return "cuda"


# ----------------------------------------------------------------------------------------------
# Kernel against published numbers, and against the reference in float64


def orders(function, inputs, noise):
    """The result, its gradients along noise, and the gradients of those along noise."""
    y = function(*inputs)
    r = noise(y.shape).requires_grad_()
    first = grad((y * r).sum(), inputs, create_graph=True)
    h = sum((g * noise(g.shape)).sum() for g in first)
    return y, *first, *grad(h, (r, *inputs), materialize_grads=True)


def against_reference(function, inputs, seed):
    """Pairs (actual, expected). The inputs are rounded to their type before both."""
    device, dtype = inputs[0].device, inputs[0].dtype

    def noise(seed, *like):
        rng = torch.Generator().manual_seed(seed)
        return lambda shape: torch.randn(shape, generator=rng).to(dtype).to(*like)

    doubles = [x.detach().double().cpu().requires_grad_() for x in inputs]
    actual = orders(lambda *args: function(*args, impl="cuda"), inputs, noise(seed, device))
    expected = orders(lambda *args: function(*args, impl="ref"), doubles, noise(seed, torch.double))
    assert all(a.dtype == dtype for a in actual)
    return zip(actual, expected, strict=True)


def golden_upfirdn2d(case, device):
    x, r, v = (case[name].detach().to(device).requires_grad_() for name in "xrv")
    y = upfirdn2d(x, case["f"], **case["kwargs"], impl="cuda")
    (grad_x,) = grad((y * r).sum(), x, create_graph=True)
    (grad2_r,) = grad((grad_x * v).sum(), r)
    yield from [(y, case["y"]), (grad_x, case["grad_x"]), (grad2_r, case["grad2_r"])]


def golden_bias_act(case, device):
    names = ["x", "b"] if case["b"] is not None else ["x"]
    *inputs, r = (case[name].detach().to(device).requires_grad_() for name in [*names, "r"])
    y = bias_act(*inputs, **case["kwargs"], impl="cuda")
    yield y, case["y"]
    first = grad((y * r).sum(), inputs, create_graph=True)
    yield from ((g, case[f"grad_{name}"]) for g, name in zip(first, names, strict=True))
    if "h" in case:
        directions = [case["v"], case["vb"]][: len(inputs)]
        h = sum((g * v.to(device)).sum() for g, v in zip(first, directions, strict=True))
        second = grad(h, (r, *inputs), materialize_grads=True)
        names = ["r", *names]
        yield from ((g, case[f"grad2_{name}"]) for g, name in zip(second, names, strict=True))


def golden_helper(case, device):
    x, function = case["x"].to(device), getattr(resampling, case["fn"])
    yield function(x, case["f"], **case["kwargs"], impl="cuda"), case["out"]


def golden_modulated_conv2d(case, device):
    names = [n for n in ("x", "weight", "styles", "noise") if case[n] is not None]
    f = case["resample_filter"]
    for precision, dtype in ("f32", torch.float32), ("f64", torch.float64):
        inputs = {n: case[n].detach().to(device, dtype).requires_grad_() for n in names}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modulated_conv, "upfirdn2d", partial(upfirdn2d, impl="cuda"))
            y = modulated_conv2d(**inputs, resample_filter=f, **case["kwargs"])
        yield y, case[precision]["y"]
        grads = grad((y * case["r"].to(device, dtype)).sum(), list(inputs.values()))
        for name, actual in zip(names, grads, strict=True):
            yield actual, case[precision][f"grad_{name}"]


def arrange(x, layout):
    """x [B, C, H, W] in another order in memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "every other":
        return torch.stack([x, x + 1], 4).flatten(3)[..., ::2]
    if layout == "expanded":
        return x[:, :1].expand_as(x)
    return x


LAYOUTS = ["contiguous", "channels_last", "transposed", "every other", "expanded"]


def random_upfirdn2d(seed, device):
    draw = random.Random(seed)
    separable, fits = seed % 3 == 0, False
    while not fits:
        up, down, padding = ([draw.randint(*of) for _ in range(n)]
                             for of, n in [((1, 4), 2), ((1, 4), 2), ((-3, 5), 4)])
        size = [draw.randint(1, 9), draw.randint(1, 9)]
        taps = [draw.randint(1, 6), draw.randint(1, 6)]
        if separable:
            taps[1] = taps[0]
        enlarged = [size[0] * up[1], size[1] * up[0]]
        around = [padding[2:], padding[:2]]
        fits = all(
            n + sum(pad) >= t and n + sum(min(p, 0) for p in pad) >= 1
            for n, pad, t in zip(enlarged, around, taps, strict=True)
        )
    rng = torch.Generator().manual_seed(seed)
    f = torch.randn(taps[:1] if separable else taps, generator=rng)
    x = torch.randn(draw.randint(0, 3), draw.randint(1, 5), *size, generator=rng)
    x = arrange(x.to(device, list(ERROR)[seed % 4]), LAYOUTS[seed % 5]).detach().requires_grad_()
    kwargs = dict(up=up, down=down, padding=padding, flip_filter=seed % 2 == 1, gain=1.7)
    return against_reference(lambda x, impl: upfirdn2d(x, f, **kwargs, impl=impl), [x], seed)


def random_bias_act(seed, act, device):
    draw = random.Random(seed)
    dtype = list(ERROR)[seed % 4]
    shape = [draw.choice([1, 3, 4, 8]) for _ in range(draw.choice([1, 2, 3, 4, 4, 4]))]
    dim = draw.randrange(-len(shape), len(shape))
    rng = torch.Generator().manual_seed(seed)
    x, b = torch.randn(shape, generator=rng), torch.randn(shape[dim], generator=rng)
    x, b = (2 * x).to(device, dtype), b.to(device, dtype).requires_grad_()
    if x.ndim == 4:
        x = arrange(x, LAYOUTS[seed % 5])
    inputs = [x.detach().requires_grad_(), b][: draw.choice([1, 2, 2])]
    kwargs = dict(
        dim=dim, act=act, alpha=draw.choice([None, 0.1, 0]), gain=draw.choice([None, 3, 0.7]),
        clamp=draw.choice([None, None, 0.9]),
    )

    def function(x, b=None, impl="auto"):
        return bias_act(x, b, **kwargs, impl=impl)

    return against_reference(function, inputs, seed)


HELPERS = [case for case in OPS["helpers"] if case["fn"] != "setup_filter"]
COMPARISONS = {
    **{f"upfirdn2d {c['name']}": partial(golden_upfirdn2d, c) for c in OPS["upfirdn2d"]},
    **{f"bias_act {c['name']}": partial(golden_bias_act, c) for c in OPS["bias_act"]},
    **{f"helper {c['name']}": partial(golden_helper, c) for c in HELPERS},
    **{
        f"modulated_conv2d {c['name']}": partial(golden_modulated_conv2d, c)
        for c in OPS["modulated_conv2d"]
    },
    **{f"random upfirdn2d {seed}": partial(random_upfirdn2d, seed) for seed in range(60)},
    **{
        f"random bias_act {seed}": partial(random_bias_act, seed, act)
        for seed, act in enumerate(9 * ACTIVATIONS)
    },
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_kernel_is_the_operation(name, device):
    for actual, expected in COMPARISONS[name](device):
        tolerance = ERROR[actual.dtype]
        actual, expected = actual.detach().cpu().double(), expected.detach().double()
        largest = expected.abs().max().item() if expected.numel() else 0
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * largest)


# ----------------------------------------------------------------------------------------------
# Particular properties


def cuda_bias_act(x, b=None, **kwargs):
    return bias_act(x, b, **kwargs, impl="cuda")


def cuda_upfirdn2d(x, **kwargs):
    return upfirdn2d(x, FILTER, up=2, down=3, padding=(2, -1, 1, 3), **kwargs, impl="cuda")


FILTER = torch.linspace(-1, 2, 12).square().reshape(3, 4)


@pytest.mark.parametrize("name", ["random upfirdn2d 1", "random bias_act 9"])
def test_counting_in_64_bits(name, device, monkeypatch):
    monkeypatch.setattr(_cuda, "INT_LIMIT", 0)
    test_kernel_is_the_operation(name, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits(dtype, device):
    """They pass unchanged, and products are rounded to the nearest number, ties to even."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(dtype)
    finite = ~x.isnan()
    y = cuda_bias_act(x[None])[0]
    assert torch.equal(y[finite].view(torch.int16), x[finite].view(torch.int16))
    assert y[~finite].isnan().all()
    info = torch.finfo(dtype)
    largest = info.max / (2 - info.eps) * (2 - info.eps / 2)  # from here on it is infinity
    for gain in (1 / 3, 3, 2**-10):
        exact = x.double() * gain
        exact[exact.abs() >= largest] *= math.inf
        y = cuda_bias_act(x[None], gain=gain)[0].double()
        half = 0.5001  # of the distance between neighbours
        close = dict(rtol=half * info.eps, atol=half * info.eps * info.tiny, equal_nan=True)
        torch.testing.assert_close(y, exact, **close)
    one = torch.ones(1, 1, dtype=dtype, device=device)
    ties = [cuda_bias_act(one, gain=1 + n * info.eps / 2).item() for n in (1, 3)]
    assert ties == [1, 1 + 2 * info.eps]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_extreme_numbers(act, device):
    x = torch.tensor([[0.0, -0.0, 100, -100, 3e38, -3e38, math.inf, -math.inf, math.nan]])
    y = cuda_bias_act(x.to(device), act=act, clamp=200).cpu()
    torch.testing.assert_close(y, bias_act(x, act=act, clamp=200, impl="ref"), equal_nan=True)


def test_memory_format(device):
    x = torch.randn(2, 3, 4, 5, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    for function in (cuda_upfirdn2d, cuda_bias_act):
        assert function(x).is_contiguous()
        assert function(last).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(function(x), function(last))


def test_large_filter(device):
    x, f = torch.randn(1, 2, 9, 9, device=device), torch.randn(11, 9)
    kwargs = dict(up=2, padding=5, gain=0.3)
    y = upfirdn2d(x, f, **kwargs, impl="cuda").cpu()
    expected = upfirdn2d(x.cpu(), f, **kwargs, impl="ref")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


def test_filter_larger_than_the_image(device):
    with pytest.raises(RuntimeError, match="larger than the padded image"):
        upfirdn2d(torch.ones(1, 1, 3, 3, device=device), FILTER, padding=-1, impl="cuda")


def test_bias_of_another_type(device):
    x = torch.randn(2, 3, 4, device=device, dtype=torch.float16)
    b = torch.randn(3, device=device, requires_grad=True)
    y = cuda_bias_act(x, b)
    assert y.dtype == torch.float16
    (grad_b,) = grad(y.sum(), b)
    torch.testing.assert_close(grad_b, torch.full_like(b, 8))


def test_lrelu_keeps_its_result_alone(device):
    """It is the input of the next layer, and kept for that anyway; x is not."""
    x = torch.randn(2, 3, 4, device=device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = cuda_bias_act(x, torch.randn(3, device=device), act="lrelu")
    assert {t.data_ptr() for t in kept} == {y.data_ptr()}


def test_third_derivative_is_refused(device):
    x = torch.randn(2, 3, device=device, requires_grad=True)
    y = cuda_bias_act(x, act="tanh")
    for _ in range(2):
        (y,) = grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        y.sum().backward()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_derivatives(act, device):
    rng = torch.Generator().manual_seed(0)
    x, b = torch.randn(2, 3, 4, generator=rng), torch.randn(3, generator=rng)
    inputs = [t.to(device, torch.float64).requires_grad_() for t in (x, b)]
    function = partial(cuda_bias_act, act=act, gain=1.3, clamp=1.1)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_upfirdn2d_derivatives(device):
    x = torch.randn(2, 2, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(cuda_upfirdn2d, x, fast_mode=True)
    assert gradgradcheck(cuda_upfirdn2d, x, fast_mode=True)


# opcheck looks at the .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_are_well_formed(device):
    x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    b = torch.randn(3, device=device, requires_grad=True)
    f, options = FILTER.to(device), ([2, 1], [1, 2], [2, 1, -1, 3], False, 1.5)
    torch.library.opcheck(_cuda.upfirdn2d, (x, f, *options))
    torch.library.opcheck(_cuda.upfirdn2d, (last, f, *options))
    swish, lrelu = (1, "swish", 0.2, 1.5, 2.0), (1, "lrelu", 0.2, 1.5, math.inf)
    torch.library.opcheck(_cuda.bias_act, (x, b, None, None, *lrelu))
    torch.library.opcheck(_cuda.bias_act, (last, b, None, None, *swish))
    torch.library.opcheck(_cuda.bias_act, (last, b, x, None, *swish))
    torch.library.opcheck(_cuda.bias_act, (last.detach(), b.detach(), x, last, *swish))


def test_compiles_without_a_graph_break(device):
    def function(x, b):
        return bias_act(cuda_upfirdn2d(x), b, act="lrelu", impl="cuda")

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for size in (5, 7):  # the second with symbolic sizes
        x = torch.randn(2, 3, size, size, device=device, requires_grad=True)
        b = torch.randn(3, device=device, requires_grad=True)
        expected, y = function(x, b), compiled(x, b)
        torch.testing.assert_close(y, expected)
        expected_grads, grads = (grad(out.square().sum(), (x, b)) for out in (expected, y))
        torch.testing.assert_close(grads, expected_grads)


@pytest.mark.gpu
def test_generator_by_kernels_and_by_reference(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    generator = Generator(16, {4: 8, 8: 8, 16: 4}, w_dim=8).cuda()
    w = torch.randn(2, 8, device="cuda", requires_grad=True)
    images = [generator.synthesis(w)]
    monkeypatch.setattr(_cuda, "usable", lambda impl, device, dtype: False)
    images.append(generator.synthesis(w))
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*(grad(i.sum(), w)[0] for i in images), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_the_first_kernel_of_a_thread():
    """PyTorch gives a thread its CUDA context late: https://github.com/pytorch/pytorch/issues/124565"""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x, f = torch.randn(1, 2, 5, 5, device="cuda"), torch.ones(3, 3, device="cuda")
    expected = upfirdn2d(x, f, impl="cuda")
    with ThreadPoolExecutor(1) as pool:
        y = pool.submit(upfirdn2d, x, f, impl="cuda").result()
    assert torch.equal(y, expected)


# ----------------------------------------------------------------------------------------------
# Compiling for GPUs, without one


@nvrtc
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("name", ["upfirdn2d", "bias_act"])
def test_compiles_for(arch, name):
    variants = []
    for dtype, scalar in _cuda.TYPES.items():
        if name == "bias_act":
            variants += [
                dict(T=scalar, INT=integer, PACK=pack, ACT=act.upper(), ORDER=order)
                for integer, pack, acts in [
                    ("int", 16 // dtype.itemsize, ACTIVATIONS), ("long long", 1, ["lrelu"])
                ]
                for act in acts
                for order in range(3)
            ]
        else:
            variants += [
                dict(
                    T=scalar, INT=integer, CHANNELS_LAST=last, ROWS=4, UP_X=up, UP_Y=up,
                    DOWN_X=down, DOWN_Y=down, PHASE_X=up - 1, PHASE_Y=0, TAPS_X=taps_x,
                    TAPS_Y=taps_y,
                )
                for integer, last, up, down, taps_x, taps_y in [
                    ("int", 0, 1, 1, 4, 4), ("int", 1, 2, 1, 4, 4), ("long long", 0, 1, 2, 4, 4),
                    ("int", 0, 2, 1, 12, 1), ("int", 0, 1, 2, 1, 12), ("int", 0, 1, 1, 9, 9),
                ]
            ]
    kernels = {(name, tuple(v.items())): f"kernel_{i}" for i, v in enumerate(variants)}
    text = (_cuda.KERNELS / "scalar.cuh").read_text() + combined(kernels)
    code = _cuda.compile_cubin(text, arch)
    assert code.startswith(b"\x7fELF")
    assert all(symbol.encode() in code for symbol in kernels.values())


# ----------------------------------------------------------------------------------------------
# The cache, and doing without


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

    def cubin(text="a", arch="sm_90"):
        assert _cuda.cubin(text, arch) == b"code " * 99
        return len(compiled)

    assert [cubin(), cubin()] == [1, 1]
    (file,) = (fresh / "stylegan2_ops").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40] + b"!" + whole[41:]):
        file.write_bytes(damaged)
        before = len(compiled)
        assert [cubin(), cubin()] == [before + 1, before + 1]
        assert file.read_bytes() == whole
    assert cubin("b") == len(compiled) and cubin(arch="sm_80") == len(compiled)
    assert len(set(compiled)) == 3
    assert len(list((fresh / "stylegan2_ops").iterdir())) == 3


def test_cache_that_cannot_be_written(fresh, monkeypatch):
    monkeypatch.setattr(_cuda, "compile_cubin", lambda text, arch: b"code")
    (fresh / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    assert _cuda.cubin("a", "sm_90") == b"code"


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
        (no_cuda_core, "ModuleNotFoundError: .*cuda.core"),
        (no_nvrtc, "OSError: libnvrtc.so: cannot open"),
        pytest.param(old_gpu, "NVRTC.* invalid value for --gpu-architecture", marks=nvrtc),
    ],
)
def test_without_kernels_the_reference_is_used_with_one_warning(
    obstacle, reason, fresh, monkeypatch
):
    obstacle(monkeypatch)
    x = torch.randn(1, 2, 3, 4).as_subclass(OnGpu)
    with pytest.warns(UserWarning, match=f"no CUDA kernel, .*: {reason}") as caught:
        y = bias_act(x, act="lrelu")
    assert len(caught) == 1 and caught[0].filename == __file__
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upfirdn2d(x, None)
        torch.testing.assert_close(y, bias_act(x, act="lrelu", impl="ref"))
    for operation in (bias_act, partial(upfirdn2d, f=None)):
        with pytest.raises(RuntimeError, match=reason):
            operation(x, impl="cuda")


def test_kernels_refuse_other_tensors(fresh):
    with pytest.raises(RuntimeError, match="the tensor is on the cpu"):
        bias_act(torch.ones(1, 2), impl="cuda")
    with pytest.raises(RuntimeError, match="there is none for torch.int64"):
        bias_act(torch.ones(1, 2, dtype=torch.int64).as_subclass(OnGpu), impl="cuda")


def test_import_does_nothing(tmp_path):
    program = """
import sys, stylegan2_ops, torch
stylegan2_ops.bias_act(stylegan2_ops.upfirdn2d(torch.ones(1, 1, 2, 2), None))
assert not {"cuda.core", "stylegan2_ops._cuda", "torch._dynamo"} & set(sys.modules)
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], cwd=HERE.parent, env=environment, check=True)
    assert not list(tmp_path.iterdir())


def test_benchmark_says_that_it_needs_a_gpu(monkeypatch):
    from benchmarks.ops import main

    monkeypatch.setattr(sys, "argv", ["ops"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^benchmarks.ops needs a CUDA device$"):
        main()
