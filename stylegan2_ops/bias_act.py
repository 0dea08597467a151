"""Add a bias, apply an activation, scale and clamp, in one operation."""

import torch
import torch.nn.functional as F

from .upfirdn2d import check_impl

_ROOT2 = 2**0.5
# name -> function of (x, alpha), default alpha, default gain (keeps the variance of N(0, 1))
_ACTIVATIONS = {
    "linear": (lambda x, alpha: x, 0, 1),
    "relu": (lambda x, alpha: F.relu(x), 0, _ROOT2),
    "lrelu": (F.leaky_relu, 0.2, _ROOT2),
    "tanh": (lambda x, alpha: torch.tanh(x), 0, 1),
    "sigmoid": (lambda x, alpha: torch.sigmoid(x), 0, 1),
    "elu": (lambda x, alpha: F.elu(x), 0, 1),
    "selu": (lambda x, alpha: F.selu(x), 0, 1),
    "softplus": (lambda x, alpha: F.softplus(x), 0, 1),
    "swish": (lambda x, alpha: F.silu(x), 0, _ROOT2),
}


def bias_act(x, b=None, dim=1, act="linear", alpha=None, gain=None, clamp=None, impl="auto"):
    """clamp(gain * act(x + b), -clamp, clamp), the operations in that order from the inside.

    x: any shape, any floating type. b: [x.shape[dim]] or None, of x's type.
    act: "linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus" or "swish".
    alpha: the slope of lrelu for negative x, 0.2 unless given. gain: sqrt(2) for relu, lrelu and
    swish, else 1, unless given. clamp: None for none. impl: "auto" or "ref" for this reference,
    "cuda" for the kernel. Returns x's shape and type.

    Differentiable in x and b to any order. Raises ValueError for an unknown `act` or `impl`, or a
    bias of the wrong shape, RuntimeError for impl="cuda". The semantics are those of the
    published `torch_utils/ops/bias_act.py`.
    """
    check_impl(impl)
    if act not in _ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(_ACTIVATIONS)}, not {act!r}")
    function, default_alpha, default_gain = _ACTIVATIONS[act]
    alpha = default_alpha if alpha is None else alpha
    gain = default_gain if gain is None else gain
    if b is not None:
        if b.shape != x.shape[dim : dim + 1]:
            raise ValueError(f"bias {tuple(b.shape)} does not fit axis {dim} of {tuple(x.shape)}")
        x = x + b.reshape([-1 if axis == dim else 1 for axis in range(x.ndim)])
    x = function(x, alpha)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x
