"""What a StyleGAN2 is trained with: the logistic losses and their two regularisers.

With softplus(x) = log(1 + e^x) and logits d [B, 1], positive for real pictures. Logistic losses
and R1: arXiv 1801.04406; the length of paths: arXiv 1912.04958, Sec. 3.2.
"""

import math

import torch.nn.functional as F
from torch.autograd import grad


def discriminator_loss(real, fake):
    """mean softplus(-real) + mean softplus(fake), of logits of any number."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake):
    """mean softplus(-fake): the non-saturating loss."""
    return F.softplus(-fake).mean()


def r1_penalty(D, images):
    """E |grad D(x)|^2, the squares summed over pixels, averaged over images [B, 3, R, R].

    Differentiable in D's parameters. D's loss has it times gamma / 2.
    """
    images = images.detach().requires_grad_()
    (gradient,) = grad(D(images).sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def path_lengths(images, ws, noise):
    """How far pictures move with their codes: sqrt(mean over layers of |J^T y|^2) [B].

    images [B, 3, R, R], made from ws [B, num_ws, w_dim] which ask for a gradient; noise: y of
    images' shape, ~ N(0, 1), which is divided by R. Differentiable in G's parameters.
    G's loss has the mean of (length - a)^2, a their running average.
    """
    seen = (images * noise).sum() / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = grad(seen, ws, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()
