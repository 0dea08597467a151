"""The operations: golden numbers of the published code, their definition, their derivatives."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad, gradcheck, gradgradcheck

from stylegan2_ops import bias_act, modulated_conv2d, upfirdn2d
from stylegan2_ops.upfirdn2d import downsample2d, filter2d, setup_filter, upsample2d

OPS = torch.load(Path(__file__).parent / "golden" / "ops.pt", weights_only=True)
ASYMMETRIC = torch.linspace(-1, 2, 12).square().reshape(3, 4)  # no symmetry hides a flip


def golden(kind):
    cases = OPS[kind]
    return pytest.mark.parametrize("case", cases, ids=[case["name"] for case in cases])


def assert_golden(actual, expected):
    if expected.dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    else:
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol)


def doubles(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()


# ----------------------------------------------------------------------------------------------
# upfirdn2d


@golden("upfirdn2d")
def test_upfirdn2d_equals_published(case):
    x, r = case["x"].requires_grad_(), case["r"].requires_grad_()
    y = upfirdn2d(x, case["f"], **case["kwargs"])
    assert_golden(y, case["y"])
    (grad_x,) = grad((y * r).sum(), x, create_graph=True)
    assert_golden(grad_x, case["grad_x"])
    h = (grad_x * case["v"]).sum()
    assert_golden(h, case["h"])
    assert_golden(grad(h, r)[0], case["grad2_r"])


@golden("helpers")
def test_helpers_equal_published(case):
    if case["fn"] == "setup_filter":
        assert_golden(setup_filter(case["arg"], **case["kwargs"]), case["out"])
    else:
        functions = {"filter2d": filter2d, "upsample2d": upsample2d, "downsample2d": downsample2d}
        assert_golden(functions[case["fn"]](case["x"], case["f"], **case["kwargs"]), case["out"])


@pytest.mark.parametrize("f", [None, ASYMMETRIC, ASYMMETRIC[0]], ids=["none", "2d", "1d"])
def test_upfirdn2d_derivatives(f):
    def function(x):
        return upfirdn2d(x, f, up=(2, 3), down=(3, 2), padding=(3, -1, 4, 2), gain=1.7)

    x = doubles(2, 2, 4, 3)
    assert gradcheck(function, x, fast_mode=True)
    assert gradgradcheck(function, x, fast_mode=True)


def test_separable_filter_is_its_outer_product():
    x, f = doubles(2, 3, 9, 8), ASYMMETRIC[0].double()
    kwargs = dict(up=2, down=3, padding=(3, 2, 1, 4), gain=2.5)
    torch.testing.assert_close(upfirdn2d(x, f, **kwargs), upfirdn2d(x, f.outer(f), **kwargs))


def test_upsampling_keeps_brightness():
    y = upsample2d(torch.ones(1, 1, 8, 8), setup_filter([1, 3, 3, 1]))
    torch.testing.assert_close(y[..., 2:-2, 2:-2], torch.ones(1, 1, 12, 12))


def test_upfirdn2d_inputs():
    f = setup_filter([1, 3, 3, 1])
    x = torch.randn(2, 5, 6, 7)
    transposed = x.mT.contiguous().mT
    torch.testing.assert_close(upfirdn2d(transposed, f, padding=1), upfirdn2d(x, f, padding=1))
    assert upfirdn2d(x[:0], f, up=2, padding=2).shape == (0, 5, 13, 15)
    for dtype in (torch.bfloat16, torch.float16):
        assert upfirdn2d(x.to(dtype), f, padding=1).dtype == dtype
    f.requires_grad_()
    assert not upfirdn2d(x, f, padding=1).requires_grad
    with pytest.raises(RuntimeError):
        upfirdn2d(x, f, padding=-2)


# ----------------------------------------------------------------------------------------------
# bias_act


@golden("bias_act")
def test_bias_act_equals_published(case):
    x, r = case["x"].requires_grad_(), case["r"].requires_grad_()
    b = None if case["b"] is None else case["b"].requires_grad_()
    names, inputs = ("x", "b"), (x, b)
    if b is None:
        names, inputs = ("x",), (x,)
    y = bias_act(x, b, **case["kwargs"])
    assert_golden(y, case["y"])
    first = grad((y * r).sum(), inputs, create_graph=True)
    for name, actual in zip(names, first, strict=True):
        assert_golden(actual, case[f"grad_{name}"])
    if "h" in case:
        directions = (case["v"], case["vb"])[: len(inputs)]
        h = sum((g * v).sum() for g, v in zip(first, directions, strict=True))
        assert_golden(h, case["h"])
        second = grad(h, (r, *inputs), materialize_grads=True)
        for name, actual in zip(("r", *names), second, strict=True):
            assert_golden(actual, case[f"grad2_{name}"])


@pytest.mark.parametrize(
    "act", ["linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish"]
)
def test_bias_act_derivatives(act):
    def function(x, b):
        return bias_act(x, b, act=act, gain=1.3, clamp=1.1)

    inputs = doubles(3, 4, 2), doubles(4, seed=1)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_bias_act_order_and_axis():
    x, b = torch.randn(2, 3, 4), torch.tensor([0.5, -0.5, 2.0, 0.0])
    expected = (F.leaky_relu(x + b, 0.1) * 3).clamp(-0.7, 0.7)
    y = bias_act(x, b, dim=2, act="lrelu", alpha=0.1, gain=3, clamp=0.7)
    torch.testing.assert_close(y, expected)
    negative = bias_act(x, b, dim=-1, act="lrelu", alpha=0.1, gain=3, clamp=0.7)
    torch.testing.assert_close(negative, expected)
    with pytest.raises(ValueError, match="does not fit axis 1"):
        bias_act(x, b)
    with pytest.raises(ValueError, match="act must be one of linear, relu"):
        bias_act(x, act="gelu")


@pytest.mark.parametrize("op", [bias_act, lambda x, **kwargs: upfirdn2d(x, None, **kwargs)])
def test_impl(op):
    x = torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(op(x, impl="auto"), op(x, impl="ref"))
    with pytest.raises(RuntimeError, match='impl="ref"'):
        op(x, impl="cuda")
    with pytest.raises(ValueError, match="'fast'"):
        op(x, impl="fast")


# ----------------------------------------------------------------------------------------------
# modulated_conv2d


@golden("modulated_conv2d")
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_modulated_conv2d_equals_published(case, precision):
    dtype = {"f32": torch.float32, "f64": torch.float64}[precision]
    names = [n for n in ("x", "weight", "styles", "noise") if case[n] is not None]
    inputs = {name: case[name].detach().to(dtype).requires_grad_() for name in names}
    y = modulated_conv2d(**inputs, resample_filter=case["resample_filter"], **case["kwargs"])
    assert_golden(y, case[precision]["y"])
    grads = grad((y * case["r"].to(dtype)).sum(), list(inputs.values()))
    for name, actual in zip(names, grads, strict=True):
        assert_golden(actual, case[precision][f"grad_{name}"])


@pytest.mark.parametrize("up", [1, 2, 3])
@pytest.mark.parametrize("flip_weight", [False, True])
@pytest.mark.parametrize("size", [(3, 3), (1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("resample_filter", [None, ASYMMETRIC], ids=["none", "asymmetric"])
def test_modulated_conv2d_is_its_definition(up, flip_weight, size, resample_filter):
    """One image at a time: enlarge and pad, then convolve with that image's own weights."""
    x, styles, padding = doubles(2, 3, 5, 4), doubles(2, 3, seed=1), 2
    weight = doubles(4, 3, *size, seed=2)
    fh, fw = (1, 1) if resample_filter is None else resample_filter.shape
    before, behind = lambda n: (n + up - 1) // 2 + padding, lambda n: (n - up) // 2 + padding
    around = [before(fw), behind(fw), before(fh), behind(fh)]
    expected = []
    for image, style in zip(x.split(1), styles, strict=True):
        own = weight * style[:, None, None]
        own = own / (own.square().sum([1, 2, 3], keepdim=True) + 1e-8).sqrt()
        if up == 1:
            image = F.pad(image, [padding] * 4)
        else:
            image = upfirdn2d(image, resample_filter, up=up, padding=around, gain=up**2)
        expected.append(F.conv2d(image, own if flip_weight else own.flip(2, 3)))
    y = modulated_conv2d(
        x, weight, styles, up=up, padding=padding,
        resample_filter=resample_filter, flip_weight=flip_weight,
    )
    torch.testing.assert_close(y, torch.cat(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_conv2d_derivatives(up, demodulate):
    f = setup_filter([1, 3, 3, 1])

    def function(x, weight, styles, noise):
        return modulated_conv2d(
            x, weight, styles, noise, up, 1, resample_filter=f, demodulate=demodulate
        )

    noise = doubles(2, 1, 3 * up, 4 * up, seed=3)
    inputs = doubles(2, 3, 3, 4), doubles(2, 3, 3, 3, seed=1), doubles(2, 3, seed=2), noise
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


def test_demodulation_undoes_the_scale_of_the_styles():
    x, weight, styles = doubles(2, 8, 6, 6), doubles(4, 8, 3, 3), doubles(2, 8)
    y = modulated_conv2d(x, weight, styles, padding=1)
    torch.testing.assert_close(modulated_conv2d(x, weight, 7 * styles, padding=1), y)
