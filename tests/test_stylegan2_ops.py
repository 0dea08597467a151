"""The operations, three ways: the reference, the kernels as plain C++, the kernels on a GPU.

`plain_cuda.h` makes the kernels' source a program for any compiler; it then runs on CPU tensors
below the real operators, and all is tested but the launch itself.
"""

import ctypes
import importlib
import math
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradcheck, gradgradcheck

from stylegan2_ops import _cuda, bias_act, modulated_conv2d, upfirdn2d

# the package's functions of these names hide the modules
resampling = importlib.import_module("stylegan2_ops.upfirdn2d")
modulated_conv = importlib.import_module("stylegan2_ops.modulated_conv")

HERE = Path(__file__).parent
OPS = torch.load(HERE / "golden" / "ops.pt", weights_only=True)
ACTIVATIONS = "linear relu lrelu tanh sigmoid elu selu softplus swish".split()
ERROR = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
ASYMMETRIC = torch.linspace(-1, 2, 12).square().reshape(3, 4)  # no symmetry hides a flip


def close(actual, expected):
    """Up to rounding in the type of actual, relative to the largest number."""
    expected, error = expected.detach().double(), ERROR[actual.dtype]
    atol = error * max([0.0, *expected[expected.isfinite()].abs().flatten().tolist()])
    actual = actual.detach().cpu().double()
    torch.testing.assert_close(actual, expected, rtol=error, atol=atol, equal_nan=True)


def doubles(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()


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
        text += f"namespace in_{i} {{\n"
        text += "".join(f"#define {macro} {value}\n" for macro, value in macros.items())
        text += (_cuda.KERNELS / f"{name}.cu").read_text()
        text += "".join(f"#undef {macro}\n" for macro in macros)
        text += f'extern "C" bool run_{i}(PARAMETERS) {{ RUN(kernel_{i}) }}\n}}\n'
    source = folder / f"{len(list(folder.iterdir()))}.cpp"
    source.write_text(text)
    options = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
    options += [f"-I{HERE}", f"-I{_cuda.KERNELS}", "-o", source.with_suffix(".so")]
    subprocess.run([compiler, source, *options], check=True)
    library = ctypes.CDLL(source.with_suffix(".so"))
    functions = {kernel: library[f"run_{i}"] for i, kernel in enumerate(kernels)}
    for function in functions.values():
        function.restype = ctypes.c_bool
    return functions


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
    if request.param == "reference":
        return "ref", "cpu"
    if request.param == "plain C++":
        monkeypatch.setattr(_cuda, "start", request.getfixturevalue("plain"))
        monkeypatch.setattr(_cuda, "obstacle", lambda device, dtype: None)
        return "cuda", "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return "cuda", "cuda"


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


def golden(kind, case, impl, device):
    """Pairs (actual, published)."""
    more = {name: case[name] for name in ("f", "resample_filter") if name in case} | case["kwargs"]
    if kind == "helpers":
        function = getattr(resampling, case["fn"])
        yield function(case["x"].to(device), **more, impl=impl), case["out"]
        return
    function = {"upfirdn2d": upfirdn2d, "bias_act": bias_act}.get(kind)
    function = partial(function, impl=impl) if function else modulated_conv2d
    names = [x for x in ("x", "b", "weight", "styles", "noise") if case.get(x) is not None]
    along = [case.get(name, torch.ones(())) for name in ("v", "vb", "", "")]
    for published in [case] if "y" in case else [case["f32"], case["f64"]]:
        like = device, published["y"].dtype
        inputs = {name: case[name].detach().to(*like).requires_grad_() for name in names}
        with pytest.MonkeyPatch.context() as patch:  # modulated_conv2d has no impl of its own
            patch.setattr(modulated_conv, "upfirdn2d", partial(upfirdn2d, impl=impl))
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


def against_reference(function, seed, impl, device, x, b=None):
    """Pairs (actual, the reference's in float64), of inputs rounded to the type of the first."""
    dtype = list(ERROR)[seed % len(ERROR)]
    x = x.to(device, dtype)
    inputs = {"x": LAYOUTS[seed % len(LAYOUTS)](x) if x.ndim == 4 else x}
    if b is not None:
        inputs["b"] = b.to(device, dtype)
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    exact = {name: x.detach().double().cpu().requires_grad_() for name, x in inputs.items()}
    shapes = [function(**exact, impl="ref").shape, *(x.shape for x in inputs.values())]
    r, *along = (torch.randn(shape).to(dtype) for shape in shapes)
    actual = derivatives(partial(function, impl=impl), inputs, r, along)
    expected = derivatives(partial(function, impl="ref"), exact, r, along)
    assert {y.dtype for y in actual.values()} == {dtype}
    return zip(actual.values(), expected.values(), strict=True)


def random_upfirdn2d(seed, impl, device):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    up, down = [[draw.randint(1, 4), draw.randint(1, 4)] for _ in range(2)]
    padding = [draw.randint(-1, 5) for _ in range(4)]
    separable = seed % 3 == 0
    f = torch.randn([draw.randint(1, 5) for _ in ("x" if separable else "yx")])
    batch = draw.randint(1, 3) if seed else 0
    x = torch.randn(batch, draw.randint(1, 5), draw.randint(7, 9), draw.randint(7, 9))
    more = dict(f=f, up=up, down=down, padding=padding, flip_filter=seed % 2 == 1, gain=1.7)
    return against_reference(partial(upfirdn2d, **more), seed, impl, device, x)


def random_bias_act(seed, impl, device):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    shape = [draw.choice([1, 3, 4, 8]) for _ in range(draw.choice([1, 2, 3, 4, 4, 4]))]
    more = dict(
        dim=draw.randrange(-len(shape), len(shape)), act=ACTIVATIONS[seed % 9],
        alpha=draw.choice([None, 0.1, 0]), gain=draw.choice([None, 3, 0.7]),
        clamp=draw.choice([None, None, 0.9]),
    )  # fmt: skip
    x, b = 2 * torch.randn(shape), torch.randn(shape[more["dim"]]) if seed % 3 else None
    return against_reference(partial(bias_act, **more), seed, impl, device, x, b)


def large_filter(impl, device):
    more = dict(f=torch.randn(11, 9), up=2, padding=5, gain=0.3)
    return against_reference(partial(upfirdn2d, **more), 1, impl, device, torch.randn(1, 2, 9, 9))


def counted_in_64_bits(comparison, impl, device):
    start, kernels = _cuda.start, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cuda, "INT_LIMIT", 0)
        patch.setattr(_cuda, "start", lambda *args: (kernels.append(args[1]), start(*args)))
        yield from comparison(2, impl, device)
    assert all(("INT", "long long") in macros for macros in kernels)
    assert kernels or impl == "ref"


def extreme_numbers(act, impl, device):
    x = torch.tensor([[0.0, -0.0, 100, -100, 3e38, -3e38, math.inf, -math.inf, math.nan]])
    yield (bias_act(y, act=act, clamp=2, impl=i) for y, i in ((x.to(device), impl), (x, "ref")))


COMPARISONS = {
    f"{kind} {case['name']} {i}": partial(golden, kind, case)
    for kind in ("upfirdn2d", "helpers", "bias_act", "modulated_conv2d")
    for i, case in enumerate(OPS[kind])
    if case.get("fn") != "setup_filter"
}
COMPARISONS |= {f"random upfirdn2d {i}": partial(random_upfirdn2d, i) for i in range(12)}
COMPARISONS |= {f"random bias_act {i}": partial(random_bias_act, i) for i in range(18)}
COMPARISONS |= {f"extreme {act}": partial(extreme_numbers, act) for act in ACTIVATIONS}
COMPARISONS |= {
    "large filter": large_filter,
    "upfirdn2d in 64 bits": partial(counted_in_64_bits, random_upfirdn2d),
    "bias_act in 64 bits": partial(counted_in_64_bits, random_bias_act),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_values_and_derivatives(name, way):
    for actual, expected in COMPARISONS[name](*way):
        close(actual, expected)


def test_setup_filter_equals_published():
    for case in OPS["helpers"]:
        if case["fn"] == "setup_filter":
            close(resampling.setup_filter(case["arg"], **case["kwargs"]), case["out"])


# ----------------------------------------------------------------------------------------------
# modulated_conv2d


@pytest.mark.parametrize("up", [1, 2, 3])
@pytest.mark.parametrize("flip_weight", [False, True])
@pytest.mark.parametrize("size", [(3, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("f", [None, ASYMMETRIC], ids=["none", "asymmetric"])
def test_modulated_conv2d_is_its_definition(up, flip_weight, size, f):
    """One image at a time: enlarge and pad, then convolve with that image's own weights."""
    x, styles, weight = doubles(2, 3, 5, 4), doubles(2, 3, seed=1), doubles(4, 3, *size, seed=2)
    y = modulated_conv2d(
        x, weight, styles, up=up, padding=2, resample_filter=f, flip_weight=flip_weight
    )
    f = f if up > 1 else None
    around = [2 + (n + up - i) // 2 for n in resampling.filter_size(f) for i in (1, 2 * up)]
    for image, style, actual in zip(x.split(1), styles, y, strict=True):
        own = weight * style[:, None, None]
        own = own / (own.square().sum([1, 2, 3], keepdim=True) + 1e-8).sqrt()
        image = upfirdn2d(image, f, up=up, padding=around, gain=up**2)
        close(actual, F.conv2d(image, own if flip_weight else own.flip(2, 3))[0])


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_conv2d_derivatives(up, demodulate):
    more = dict(up=up, padding=1, resample_filter=ASYMMETRIC, demodulate=demodulate)
    shapes = (2, 3, 3, 4), (2, 3, 3, 3), (2, 3), (2, 1, 3 * up, 4 * up)
    inputs = [doubles(*shape, seed=i) for i, shape in enumerate(shapes)]
    for check in gradcheck, gradgradcheck:
        assert check(lambda *inputs: modulated_conv2d(*inputs, **more), inputs, fast_mode=True)


# ----------------------------------------------------------------------------------------------
# Particular properties


def test_filter_is_a_constant_not_larger_than_the_image(way):
    impl, device = way
    x, f = torch.ones(1, 1, 3, 3, device=device), ASYMMETRIC.clone().requires_grad_()
    assert not upfirdn2d(x, f, padding=1, impl=impl).requires_grad
    with pytest.raises(RuntimeError):
        upfirdn2d(x, f, padding=-1, impl=impl)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits(dtype, way):
    """They pass unchanged, and products are rounded to the nearest number, ties to even."""
    impl, device = way
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(dtype)
    y, nan = bias_act(x[None], impl=impl)[0], x.isnan()
    assert torch.equal(y[~nan].view(torch.int16), x[~nan].view(torch.int16))
    assert y[nan].isnan().all()
    info = torch.finfo(dtype)
    largest = info.max / (2 - info.eps) * (2 - info.eps / 2)  # from here on it is infinity
    half = 0.5001 * info.eps  # of the distance between neighbours
    for gain in (1 / 3, 3, 2**-10):
        exact = x.double() * gain
        exact[exact.abs() >= largest] *= math.inf
        y = bias_act(x[None], gain=gain, impl=impl)[0].double()
        torch.testing.assert_close(y, exact, rtol=half, atol=half * info.tiny, equal_nan=True)
    one = torch.ones(1, 1, dtype=dtype, device=device)
    ties = [bias_act(one, gain=1 + n * info.eps / 2, impl=impl).item() for n in (1, 3)]
    assert ties == [1, 1 + 2 * info.eps]


def cuda_upfirdn2d(x):
    return upfirdn2d(x, ASYMMETRIC, up=2, down=3, padding=(2, -1, 1, 3), impl="cuda")


cuda_bias_act = partial(bias_act, impl="cuda")


@kernels_only
def test_memory_format(way):
    x = torch.randn(2, 3, 4, 5, device=way[1])
    last = x.contiguous(memory_format=torch.channels_last)
    for function in (cuda_upfirdn2d, cuda_bias_act):
        assert function(x).is_contiguous()
        assert function(last).is_contiguous(memory_format=torch.channels_last)


@kernels_only
def test_bias_of_another_type(way):
    x = torch.randn(2, 3, 4, device=way[1], dtype=torch.float16)
    b = torch.randn(3, device=way[1], requires_grad=True)
    y = cuda_bias_act(x, b)
    assert y.dtype == torch.float16
    close(grad(y.sum(), b)[0], torch.full((3,), 8))


@kernels_only
def test_lrelu_keeps_its_result_alone(way):
    """It is the input of the next layer, and kept for that anyway; x is not."""
    x, kept = torch.randn(2, 3, 4, device=way[1], requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = cuda_bias_act(x, torch.randn(3, device=way[1]), act="lrelu")
    assert {t.data_ptr() for t in kept} == {y.data_ptr()}


@kernels_only
def test_third_derivative_is_refused(way):
    x = torch.randn(2, 3, device=way[1], requires_grad=True)
    y = cuda_bias_act(x, act="tanh")
    for _ in range(2):
        (y,) = grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        y.sum().backward()


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
def test_compiles_without_a_graph_break(way):
    def function(x, b):
        return cuda_bias_act(cuda_upfirdn2d(x), b, act="lrelu")

    backend = "inductor" if way[1] == "cuda" else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for size in (5, 7):  # the second with symbolic sizes
        x = torch.randn(2, 3, size, size, device=way[1], requires_grad=True)
        b = torch.randn(3, device=way[1], requires_grad=True)
        y, expected = compiled(x, b), function(x, b)
        close(y, expected)
        grads = (grad(out.square().sum(), (x, b)) for out in (y, expected))
        for actual, wanted in zip(*grads, strict=True):
            close(actual, wanted)
