"""DDIM's deterministic steps (arXiv 2010.02502), as DiffusionCLIP (CVPR 2022) takes them.

A picture x_0 and noise are mixed at time t, of 0 to 999, to x_t = sqrt(a_t) x_0 + sqrt(1 - a_t)
noise; a_t, here alphas[t], falls from 1 to 0. The time before 0, written -1, has a = 1.
"""

from itertools import pairwise

import torch


def alphas_cumprod(beta_start=1e-4, beta_end=0.02, n=1000):
    """a [n] = prod(1 - beta) of a linear schedule, computed in float64, then float32."""
    beta = torch.linspace(beta_start, beta_end, n, dtype=torch.float64)
    return (1 - beta).cumprod(0).float()


def timesteps(n, t0):
    """n times from 0 to t0, both among them: [0, .., t0]; n = 1 is t0 alone."""
    shares = torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.ones(1)
    return [int(s) for s in (shares * t0).tolist()]


def step(x, noise, t, t_next, alphas, clamp=None):
    """x_t [B, 3, R, R], and the noise in it -> x at t_next, and the estimate of x_0.

    t, t_next: numbers; t_next may be earlier or later; -1 is the picture. clamp: bounds of the
    estimate, +-clamp; None, as anywhere but in sampling from pure noise: none.
    """
    a, a_next = alphas[t], alphas[t_next] if t_next >= 0 else alphas.new_ones(())
    x0 = (x - (1 - a).sqrt() * noise) / a.sqrt()
    if clamp is not None:
        x0 = x0.clamp(-clamp, clamp)
        noise = (x - a.sqrt() * x0) / (1 - a).sqrt()
    return a_next.sqrt() * x0 + (1 - a_next).sqrt() * noise, x0


def everywhere(x, t):
    """A time for each of x [B, ...]: t [B]."""
    return torch.full((len(x),), t, device=x.device)


def downwards(times):
    """Pairs (t, t_next) from times[-1] to times[0], and to -1, the picture."""
    return [*zip(times, [-1, *times], strict=False)][::-1]


def generate(eps, x, times, alphas, clamp=None):
    """x at times[-1] -> the picture. eps: a function (x, t [B]) -> the noise in x."""
    for t, t_next in downwards(times):
        x, _ = step(x, eps(x, everywhere(x, t)), t, t_next, alphas, clamp)
    return x


@torch.no_grad()
def invert(eps, x, times, alphas):
    """The picture -> x at times[-1], by a step from each time to the one above it.

    Each asks for the noise at the lower of the two times; from -1 to 0 there is none, so that the
    picture is taken for x at 0.
    """
    for t, t_next in pairwise(times):
        x, _ = step(x, eps(x, everywhere(x, t)), t, t_next, alphas)
    return x
