"""Add a bias, apply an activation, scale and clamp, in one operation."""

import math

import torch
import torch.nn.functional as F

from .upfirdn2d import use_kernel

_ACTIVATIONS = {  # name: (function of x and alpha, default gain)
    "linear": (lambda x, alpha: x, 1),
    "relu": (lambda x, alpha: F.relu(x), 2**0.5),
    "lrelu": (lambda x, alpha: F.leaky_relu(x, alpha), 2**0.5),
    "tanh": (lambda x, alpha: torch.tanh(x), 1),
    "sigmoid": (lambda x, alpha: torch.sigmoid(x), 1),
    "elu": (lambda x, alpha: F.elu(x), 1),
    "selu": (lambda x, alpha: F.selu(x), 1),
    "softplus": (lambda x, alpha: F.softplus(x), 1),
    "swish": (lambda x, alpha: F.silu(x), 2**0.5),
}


def bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, impl="auto"):
    """Add a bias, apply an activation, multiply by a gain and clamp, in this order.

    x: any shape, any floating type. b: [x.shape[dim]], cast to the type of x, or None for no bias.
    act: "linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus" or "swish".
    alpha: slope of lrelu below zero, 0.2 unless given. gain: sqrt(2) for relu, lrelu and swish and
    1 for the others, unless given. clamp: the largest absolute value of the result, or None.
    impl: "ref" for the reference here, "cuda" for the CUDA kernel, or "auto" for the kernel on a
    CUDA tensor if it can be had, and else the reference. Returns the shape and type of x.

    Differentiable in x and b, the kernel twice and the reference to any order. Raises ValueError
    if act or impl is unknown or b does not fit, RuntimeError if the kernel is asked for and cannot
    be had.
    Semantics: the published `torch_utils/ops/bias_act.py`.
    """
    if act not in _ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(_ACTIVATIONS)}, not {act!r}")
    if b is not None:
        if b.shape != (x.shape[dim],):
            raise ValueError(f"bias {tuple(b.shape)} does not fit axis {dim} of {tuple(x.shape)}")
        b = b.to(x.dtype)
    function, default_gain = _ACTIVATIONS[act]
    alpha = 0.2 if alpha is None else alpha
    gain = default_gain if gain is None else gain
    if use_kernel(impl, x):
        from ._cuda import bias_act as kernel

        clamp = math.inf if clamp is None else clamp
        return kernel(x, b, None, None, dim, act, float(alpha), float(gain), float(clamp))

    if b is not None:
        shape = [1] * x.ndim
        shape[dim] = -1
        x = x + b.reshape(shape)
    x = function(x, alpha)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x
