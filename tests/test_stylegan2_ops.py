"""The operations, three ways: the reference, the kernels as plain C++, the kernels on a GPU.

`plain_cuda.h` makes the kernels' source a program for any compiler; it then runs on CPU tensors
below the real operators, and all is tested but the launch itself.
"""

import ctypes
import math
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, normal
from torch.autograd import grad, gradcheck, gradgradcheck

from stylegan2_ops import _cuda, bias_act, modulated_conv2d, upfirdn2d
from stylegan2_ops.upfirdn2d import downsample2d, filter2d, filter_size, setup_filter, upsample2d

OPS = torch.load(GOLDEN / "ops.pt", weights_only=True)
ACTIVATIONS = "linear relu lrelu tanh sigmoid elu selu softplus swish".split()
ERROR = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
EVERY = {  # number of 16 bits: infinities, NaNs, zeros of both signs
    dtype: torch.arange(-(2**15), 2**15, dtype=torch.int16).view(1, -1).view(dtype)
    for dtype in (torch.float16, torch.bfloat16)
}
ASYMMETRIC = torch.linspace(-1, 2, 12).square().reshape(3, 4)  # no symmetry hides a flip


def close(actual, expected):
    """Up to rounding in the type of actual, relative to the largest number."""
    expected, error = expected.detach().cpu().double(), ERROR[actual.dtype]
    atol = error * max(expected[expected.isfinite()].abs().tolist(), default=0)
    actual = actual.detach().cpu().double()
    torch.testing.assert_close(actual, expected, rtol=error, atol=atol, equal_nan=True)


# ----------------------------------------------------------------------------------------------
# The three ways


def compile_plain(kernels, folder):
    """{kernel: its function in a shared library}; a kernel is a name and its macros."""
    compiler = next(filter(None, map(shutil.which, ["g++", "clang++", "c++"])), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    text = '#include "plain_cuda.h"\n'
    for i, (name, macros) in enumerate(kernels):
        macros = {**dict(macros), name: f"kernel_{i}"}
        text += "".join(f"#define {macro} {value}\n" for macro, value in macros.items())
        text += f"namespace in_{i} {{\n{(_cuda.KERNELS / name).with_suffix('.cu').read_text()}"
        text += f'extern "C" int run_{i}(PARAMETERS) {{ RUN(kernel_{i}) }}\n}}\n'
        text += "".join(f"#undef {macro}\n" for macro in macros)
    source = folder / f"{len(list(folder.iterdir()))}.cpp"
    source.write_text(text)
    options = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
    folders = [Path(__file__).parent, _cuda.KERNELS, Path(torch.__file__).parent / "include"]
    options += [*(f"-I{x}" for x in folders), "-o", source.with_suffix(".so")]
    subprocess.run([compiler, source, *options], check=True)
    library = ctypes.CDLL(source.with_suffix(".so"))
    return {kernel: library[f"run_{i}"] for i, kernel in enumerate(kernels)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Stands in for `_cuda.start`. All that the comparisons need is compiled at once."""
    for operator in (_cuda.upfirdn2d, _cuda.bias_act):
        operator.register_kernel("cpu", operator._init_fn)
    kernels, folder = {}, tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "start", lambda name, macros, *_: kernels.update({(name, macros): 0}))
        patch.setattr(_cuda, "obstacle", lambda device, dtype: None)
        for comparison in COMPARISONS.values():
            list(comparison("cuda", "cpu"))
    functions = compile_plain(kernels, folder)

    def start(name, macros, device, blocks, arguments):
        if (name, macros) not in functions:
            functions.update(compile_plain([(name, macros)], folder))
        # cuda.core makes a pointer of an int, and takes other numbers as ctypes
        arguments = [ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments]
        count = len(arguments)
        sizes = (ctypes.c_int * count)(*map(ctypes.sizeof, arguments))
        pointers = (ctypes.c_void_p * count)(*map(ctypes.addressof, arguments))
        fits = functions[name, macros](blocks, _cuda.BLOCK, count, sizes, pointers)
        assert fits, "arguments do not fit the kernel"

    return start


KERNELS = ["plain C++", pytest.param("gpu", marks=pytest.mark.gpu)]
kernels_only = pytest.mark.parametrize("way", KERNELS, indirect=True)


@pytest.fixture(params=["reference", *KERNELS])
def way(request, monkeypatch):
    """impl and device"""
    ways = {"reference": ("ref", "cpu"), "plain C++": ("cuda", "cpu"), "gpu": ("cuda", "cuda")}
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "plain C++":
        monkeypatch.setattr(_cuda, "start", request.getfixturevalue("plain"))
        monkeypatch.setattr(_cuda, "obstacle", lambda device, dtype: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return ways[request.param]


# ----------------------------------------------------------------------------------------------
# Values and derivatives: published ones, and the reference's in float64


def derivatives(function, inputs, r, along):
    """{y, grad_* of (y * r).sum(), grad2_* of the sum of those gradients * along}"""
    y = function(**inputs)
    r = r.detach().to(y).requires_grad_()
    first = grad((y * r).sum(), [*inputs.values()], create_graph=True)
    h = sum((g * v.to(g)).sum() for g, v in zip(first, along, strict=False))
    second = grad(h, [r, *inputs.values()], materialize_grads=True)
    found = {"y": y} | {f"grad_{name}": g for name, g in zip(inputs, first, strict=True)}
    return found | {f"grad2_{name}": g for name, g in zip(["r", *inputs], second, strict=True)}


def golden(function, case, impl, device):
    """Pairs (actual, published)."""
    more = {name: case[name] for name in ("f", "resample_filter") if name in case} | case["kwargs"]
    if function not in (modulated_conv2d, setup_filter):
        more["impl"] = impl
    if "out" in case:
        x = case["x"].to(device) if "x" in case else case["arg"]
        yield function(x, **more), case["out"]
        return
    names = [x for x in ("x", "b", "weight", "styles", "noise") if case.get(x) is not None]
    along = [case.get(name, torch.ones(())) for name in ("v", "vb", "", "")]
    for published in [case] if "y" in case else [case["f32"], case["f64"]]:
        like = device, published["y"].dtype
        inputs = {name: case[name].detach().to(*like).requires_grad_() for name in names}
        found = derivatives(partial(function, **more), inputs, case["r"], along)
        for name, expected in published.items():
            if name.startswith(("y", "grad")) and expected is not None:
                yield found[name], expected


LAYOUTS = [  # orders in memory
    lambda x: x,
    lambda x: x.contiguous(memory_format=torch.channels_last),
    lambda x: x.mT.contiguous().mT,
    lambda x: torch.stack([x, x + 1], -1).flatten(-2)[..., ::2],
    lambda x: x[:, :1].expand_as(x),
]


def random_upfirdn2d(seed, draw):
    sizes = [11, 9] if seed == 11 else [draw.randint(1, 5) for _ in ("yx" if seed % 3 else "x")]
    up, down = [[draw.randint(1, 4), draw.randint(1, 4)] for _ in range(2)]
    padding = [draw.randint(-1, 5) + (seed == 11) for _ in range(4)]
    more = dict(f=torch.randn(sizes), up=up, down=down, padding=padding, flip_filter=seed % 2 == 1)
    size = draw.randint(7, 9), draw.randint(7, 9)
    shape = draw.randint(1, 3) if seed else 0, draw.randint(1, 5), *size
    return partial(upfirdn2d, **more, gain=1.7), {"x": torch.randn(shape)}


def random_bias_act(seed, draw):
    shape = [draw.choice([1, 3, 4, 8]) for _ in range(draw.choice([1, 2, 3, 4, 4, 4]))]
    dim, act = draw.randrange(-len(shape), len(shape)), ACTIVATIONS[seed % 9]
    gain, alpha = draw.choice([None, 3, 0.7]), draw.choice([None, 0.1, 0])
    more = dict(dim=dim, act=act, gain=gain, alpha=alpha, clamp=draw.choice([None, None, 0.9]))
    b = {"b": torch.randn(shape[dim])} if draw.random() < 0.7 else {}
    return partial(bias_act, **more), {"x": 2 * torch.randn(shape)} | b


def against_reference(random_case, seed, impl, device):
    """Pairs (actual, the reference's in float64), of the same inputs; some counted in 64 bits."""
    torch.manual_seed(seed)
    function, inputs = random_case(seed, random.Random(seed))
    dtype = list(ERROR)[seed % len(ERROR)]
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}
    if inputs["x"].ndim == 4:
        inputs["x"] = LAYOUTS[seed % len(LAYOUTS)](inputs["x"])
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    exact = {name: x.detach().double().cpu().requires_grad_() for name, x in inputs.items()}
    shapes = [function(**exact, impl="ref").shape, *(x.shape for x in inputs.values())]
    r, *along = (torch.randn(shape).to(dtype) for shape in shapes)
    start, kernels, wide = _cuda.start, [], seed % 6 == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "start", lambda *args: (kernels.append(args[1]), start(*args)))
        patch.setattr(_cuda, "INT_LIMIT", 0 if wide else _cuda.INT_LIMIT)
        actual = derivatives(partial(function, impl=impl), inputs, r, along)
        for layout in (torch.contiguous_format, torch.channels_last):
            kept = actual["y"].is_contiguous(memory_format=layout)
            assert kept or impl == "ref" or not inputs["x"].is_contiguous(memory_format=layout)
    expected = derivatives(partial(function, impl="ref"), exact, r, along)
    assert {y.dtype for y in actual.values()} == {dtype}
    assert all((("INT", "long long") in macros) == wide for macros in kernels)
    return zip(actual.values(), expected.values(), strict=True)


def every_number(dtype, impl, device):
    for act in ACTIVATIONS:
        y = bias_act(EVERY[dtype].to(device), act=act, clamp=2, impl=impl)
        yield y, bias_act(EVERY[dtype].float(), act=act, clamp=2)


FUNCTIONS = upfirdn2d, bias_act, modulated_conv2d, setup_filter, filter2d, upsample2d, downsample2d
FUNCTIONS = {function.__name__: function for function in FUNCTIONS}
COMPARISONS = {
    f"{kind} {case['name']} {i}": partial(golden, FUNCTIONS[case.get("fn", kind)], case)
    for kind in ("upfirdn2d", "helpers", "bias_act", "modulated_conv2d")
    for i, case in enumerate(OPS[kind])
} | {
    f"{random_case.__name__} {seed}": partial(against_reference, random_case, seed)
    for random_case, count in ((random_upfirdn2d, 12), (random_bias_act, 18))
    for seed in range(count)
}
COMPARISONS |= {f"every {dtype}": partial(every_number, dtype) for dtype in EVERY}


@pytest.mark.parametrize("name", COMPARISONS)
def test_values_and_derivatives(name, way):
    for actual, expected in COMPARISONS[name](*way):
        close(actual, expected)


@pytest.mark.parametrize("up", [1, 2, 3])
@pytest.mark.parametrize("flip_weight", [False, True])
@pytest.mark.parametrize("size", [(3, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("f, demodulate", [(None, True), (ASYMMETRIC, True), (ASYMMETRIC, False)])
def test_modulated_conv2d_is_its_definition(up, flip_weight, size, f, demodulate):
    """One image at a time: enlarge and pad, then convolve with that image's own weights."""
    noise_shape = 2, 1, 5 * up + 5 - size[0], 4 * up + 5 - size[1]
    shapes = (2, 3, 5, 4), (4, 3, *size), (2, 3), noise_shape
    inputs = [normal(*shape, seed=i).double().requires_grad_() for i, shape in enumerate(shapes)]
    more = dict(up=up, padding=2, resample_filter=f, demodulate=demodulate, flip_weight=flip_weight)
    f = f if up > 1 else None
    around = [2 + (n + up - i) // 2 for n in filter_size(f) for i in (1, 2 * up)]
    x, weight, styles, noise = inputs
    y = modulated_conv2d(*inputs, **more)
    for image, style, added, actual in zip(x.split(1), styles, noise, y, strict=True):
        own = weight * style[:, None, None]
        if demodulate:
            own = own / (own.square().sum([1, 2, 3], keepdim=True) + 1e-8).sqrt()
        image = upfirdn2d(image, f, up=up, padding=around, gain=up**2)
        close(actual, F.conv2d(image, own if flip_weight else own.flip(2, 3))[0] + added)
    for check in gradcheck, gradgradcheck:
        assert check(partial(modulated_conv2d, **more), inputs, fast_mode=True)


# ----------------------------------------------------------------------------------------------
# Particular properties


def test_filter_is_a_constant_not_larger_than_the_image(way):
    impl, device = way
    x, f = torch.ones(1, 1, 3, 3, device=device), ASYMMETRIC.clone().requires_grad_()
    assert not upfirdn2d(x, f, padding=1, impl=impl).requires_grad
    with pytest.raises(RuntimeError):
        upfirdn2d(x, f, padding=-1, impl=impl)


@pytest.mark.parametrize("dtype, x", EVERY.items())
def test_products_are_rounded_to_the_nearest(dtype, x, way):
    """Ties to even; zeros keep their signs."""
    impl, device = way
    half = torch.finfo(dtype).eps / 2
    for gain in (1, 1 / 3, 3, 2**-10, 1 + half, 1 + 3 * half):
        y = bias_act(x.to(device), gain=gain, impl=impl).cpu(), (x.float() * gain).to(dtype)
        bits = (t.masked_fill(t.isnan(), 7).view(torch.int16) for t in y)
        torch.testing.assert_close(*bits, rtol=0, atol=0)


cuda_bias_act = partial(bias_act, impl="cuda")


@kernels_only
def test_what_derivatives_need(way):
    """lrelu keeps its result alone, which the next layer keeps anyway; a third there is not."""
    x, kept = torch.randn(2, 3, 4, device=way[1], requires_grad=True), []
    b = torch.randn(3, device=way[1], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = cuda_bias_act(x, b, act="lrelu")
    assert {t.data_ptr() for t in kept} == {y.data_ptr()}
    y = cuda_bias_act(x, act="tanh")
    for _ in range(2):
        (y,) = grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        y.sum().backward()
    y = cuda_bias_act(x.half(), b)  # of another type
    assert y.dtype == torch.float16
    close(grad(y.sum(), b)[0], torch.full((3,), 8))


# opcheck looks at the .grad of tensors that are no leaves
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@kernels_only
def test_operators_are_well_formed(way):
    x = torch.randn(2, 3, 4, 5, device=way[1], requires_grad=True)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    b, f = torch.randn(3, device=way[1], requires_grad=True), ASYMMETRIC.to(way[1])
    for y in x, last:
        torch.library.opcheck(_cuda.upfirdn2d, (y, f, [2, 1], [1, 2], [2, 1, -1, 3], False, 1.5))
    swish, lrelu = (1, "swish", 0.2, 1.5, 2.0), (1, "lrelu", 0.2, 1.5, math.inf)
    torch.library.opcheck(_cuda.bias_act, (x, b, None, None, *lrelu))
    torch.library.opcheck(_cuda.bias_act, (last, b, x, None, *swish))
    torch.library.opcheck(_cuda.bias_act, (last.detach(), b.detach(), x, last, *swish))


@kernels_only
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic, way):
    def function(x, b):
        return cuda_bias_act(upfirdn2d(x, ASYMMETRIC, up=2, impl="cuda"), b, act="lrelu")

    backend = "inductor" if way[1] == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    x = torch.randn(2, 3, 5, 5, device=way[1], requires_grad=True)
    b = torch.randn(3, device=way[1], requires_grad=True)
    ys = [f(x, b) for f in (compiled, function)]
    for y, expected in zip(*((y, *grad(y.square().sum(), (x, b))) for y in ys), strict=True):
        close(y, expected)
