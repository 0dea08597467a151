"""What pictures are measured by: pure functions, each from its formula, on tensors of a batch.

Pictures are uint8 [B, 3, H, W], as files hold them; x are those measured, y what they are compared
with, of the same persons. Features are [n, d]. "Pairs" give [B], "sets" one number.
"""

import math

import torch
import torch.nn.functional as F

LUMA = (0.299, 0.587, 0.114)  # of Rec. 601


def pixels(images):
    """Pictures in [-1, 1], clamped, as uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def unit(x):
    """Pictures in [0, 1]."""
    return x.float() / 255


# ----------------------------------------------------------------------------------------------
# Pairs


def psnr(x, y):
    """Peak signal-to-noise ratio in dB, of all three channels; infinite for equal pictures."""
    return -10 * (unit(x) - unit(y)).square().mean((1, 2, 3)).log10()


def ssim(x, y, k1=0.01, k2=0.03):
    """Structural similarity (Wang et al., 2004): 11 x 11 Gaussian window of deviation 1.5, no
    padding, mean over channels. Pictures of 384 pixels or more are first pooled to about 256, as in
    the authors' code and in piq. Raises ValueError below 11 pixels."""
    if min(x.shape[-2:]) < 11:
        raise ValueError(f"ssim of pictures of {min(x.shape[-2:])} pixels; wanted: 11 or more")
    f = max(1, round(min(x.shape[-2:]) / 256))
    x, y = (F.avg_pool2d(unit(z), f) for z in (x, y))
    window = torch.exp(-torch.arange(-5.0, 6, device=x.device).square() / (2 * 1.5**2))
    window = torch.outer(window, window)
    window = (window / window.sum()).expand(3, 1, -1, -1)

    def mean(z):
        return F.conv2d(z, window, groups=3)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = k1**2, k2**2
    values = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return values.mean((1, 2, 3))


def sobel(x):
    """Edges [B, 1, H - 2, W - 2] in [0, 1]: length of Sobel's gradient of the grey picture, cut off
    at 1, which is a quarter of a step from black to white."""
    grey = (unit(x) * torch.tensor(LUMA, device=x.device)[:, None, None]).sum(1, keepdim=True)
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=x.device)
    slopes = F.conv2d(grey, torch.stack([kernel, kernel.T])[:, None])
    return slopes.square().sum(1, keepdim=True).sqrt().clamp(max=1)


def dice(s, t):
    """2 <s, t> / (<s, s> + <t, t>) of edges [B, ...]: 1 if equal, also where there are none.

    The structural consistency score (Xiao et al., 2022) is its mean, of HED's edges.
    """
    s, t = s.flatten(1), t.flatten(1)
    top, bottom = 2 * (s * t).sum(1), (s * s).sum(1) + (t * t).sum(1)
    return torch.where(bottom == 0, 1, top / bottom)


# ----------------------------------------------------------------------------------------------
# Sets of features


def normal(features):
    """Mean [..., d] and covariance [..., d, d], in float64, of features [..., n, d]."""
    x = features.double()
    mean = x.mean(-2)
    x = x - mean.unsqueeze(-2)
    return mean, x.mT @ x / (x.shape[-2] - 1)


def frechet(a, b):
    """Fréchet distance of two normal distributions [...]: |m - n|^2 + tr(A + B - 2 (A B)^1/2).

    a: (mean [d], covariance [d, d]). b: the same, perhaps of a batch [..., d]. tr (A B)^1/2 is the
    sum of the roots of the eigenvalues of A^1/2 B A^1/2, which is symmetric.
    """
    (m, A), (n, B) = a, b
    values, vectors = torch.linalg.eigh(A)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum(-1)
    traces = sum(x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (A, B))
    return (m - n).square().sum(-1) + traces - 2 * cross


def kid(x, y):
    """Squared maximum mean discrepancy, without bias, of the kernel (<a, b> / d + 1)^3 (Bińkowski
    et al., 2018), of all features at once; it can be a little below 0."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    x, y = x.double(), y.double()
    return (within(x) + within(y) - 2 * kernel(x, y).mean()).item()


def inception_score(logits, splits=10):
    """exp(mean KL(p(class | picture) || p(class))) of logits [n, classes], the mean over splits of
    n // splits pictures in their order; what is left over is left out (sbarratt's code)."""
    each = len(logits) // splits
    log_p = logits[: each * splits].double().log_softmax(1).view(splits, each, -1)
    p = log_p.exp()
    divergence = (p * (log_p - p.mean(1, keepdim=True).log())).sum(2).mean(1)
    return divergence.exp().mean().item()


def clip_score(images, text):
    """100 max(0, cos) of image features [n, d] and one text feature [d], the mean."""
    return 100 * F.cosine_similarity(images, text[None], dim=1).clamp_min(0).mean().item()


def similarity(x, y):
    """Mean cosine of all pairs of a feature of x and one of y."""
    return (F.normalize(x, dim=1).mean(0) @ F.normalize(y, dim=1).mean(0)).item()


def diversity(x):
    """1 - the mean cosine of two different features [n, d]."""
    n, total = len(x), F.normalize(x.double(), dim=1).sum(0).square().sum()
    return (1 - (total - n) / (n * (n - 1))).item()


def distances(x, y):
    """Squared Euclidean distances [n, m] of embeddings [n, d] and [m, d]."""
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return (squares - 2 * x @ y.T).clamp_min(0)


def in_clusters(to_centers, between, at_most=50):
    """Intra-LPIPS (Ojha et al., 2021): pictures go to the nearest center; mean distance of the
    pairs in a cluster, of its first `at_most` pictures, and the mean over the clusters that have a
    pair. NaN if none has.

    to_centers: distances [n, k]. between: a function of indices [m] -> distances [m, m].
    """
    nearest, means = to_centers.argmin(1), []
    for k in nearest.unique():
        members = (nearest == k).nonzero().squeeze(1)[:at_most]
        if (m := len(members)) > 1:
            apart = between(members)
            means.append((apart.sum() - apart.trace()).item() / (m * (m - 1)))
    return sum(means) / len(means) if means else math.nan
