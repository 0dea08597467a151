"""A diffusion model as a generator of pictures: a bank of latents, and the way down from each.

Its latents are real pictures, inverted (DiffusionCLIP, CVPR 2022): DDIM's steps lead from a picture
up to x_t0, which has half of the picture's content in it, and fewer steps lead down again. What is
trained is the way down; the latents stay as they are.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .steps import downwards, everywhere, generate, invert, step, timesteps


class DiffusionGenerator(nn.Module):
    """The protocol of a GAN's generator, with pictures in the place of random latents.

    z [B, N]      chooses: the largest of its N numbers is the row of the bank
    w [B, w_dim]  is that row: x_t0, flat, 3 R R numbers; then `code_dim` that say what is in the
                  picture, as x_t0 hardly does: the network's bottleneck near the picture, its mean
                  over the places, standardised over the bank
    num_ws        is 1, layers() is the whole network, and w_avg is 0, which means nothing here

    unet: a UNet of three channels. alphas [1000]: its schedule. t0: where latents are, 1 to 999.
    steps: of synthesis, from t0 down to 0 and the picture. `fill` comes first.
    """

    num_ws = 1

    def __init__(self, unet, alphas, *, t0=500, steps=6):
        super().__init__()
        self.unet, self.t0, self.steps = unet, t0, steps
        self.resolution = unet.config["sample_size"]
        self.code_dim = unet.config["block_out_channels"][-1]
        self.w_dim = 3 * self.resolution**2 + self.code_dim
        self.register_buffer("alphas", alphas.clone(), persistent=False)
        self.register_buffer("w_avg", torch.zeros(self.w_dim), persistent=False)
        self.register_buffer("bank", torch.zeros(0, self.w_dim), persistent=False)
        self.register_buffer("scale", torch.ones(2, self.code_dim), persistent=False)

    @property
    def z_dim(self):
        return len(self.bank)

    @torch.no_grad()
    def invert(self, images, steps=40):
        """Pictures [B, 3, R, R] in [-1, 1] -> w [B, w_dim], whose code is not yet standardised.

        steps: of the way up, one more than the times that the network is asked.
        """
        x = invert(self.unet, images, timesteps(steps, self.t0), self.alphas)
        return torch.cat([x.flatten(1), self.code(x)], dim=1)

    @torch.no_grad()
    def code(self, x):
        """x_t0 [B, 3, R, R] -> [B, code_dim]: the bottleneck at the last two steps down."""
        codes = []
        for t, t_next in downwards(timesteps(self.steps, self.t0)):
            bottleneck, *rest = self.unet.encode(x, everywhere(x, t))
            codes.append(bottleneck.mean((2, 3)))
            x, _ = step(x, self.unet.decode(bottleneck, *rest), t, t_next, self.alphas)
        return torch.stack(codes[-2:]).mean(0)

    def fill(self, w):
        """Makes w [N, w_dim], of `invert`, the bank; its codes are standardised -> self."""
        codes = w[:, -self.code_dim :]
        deviation = codes.std(0, correction=0).clamp(min=1e-6)
        self.scale = torch.stack([codes.mean(0), deviation])
        self.bank = self.standard(w)
        return self

    def standard(self, w):
        """w [B, w_dim], of `invert`, with codes of which the bank's have mean 0 and deviation 1."""
        codes = (w[:, -self.code_dim :] - self.scale[0]) / self.scale[1]
        return torch.cat([w[:, : -self.code_dim], codes], dim=1)

    def choose(self, n, rng):
        """z [n, N] of n rows, no row twice before all have had their turn. rng: torch.Generator."""
        N = len(self.bank)
        rows = [torch.randperm(N, generator=rng) for _ in range(-(-n // N))]
        return torch.eye(N)[torch.cat(rows)[:n]]

    def mapping(self, z):
        return self.bank[z.argmax(1)]

    def synthesis(self, w, *, rng=None, steps=None):
        """w [B, w_dim] or [B, 1, w_dim] -> images [B, 3, R, R], not clamped; nothing is random.

        With gradients, only x is kept of each step; the rest is computed again on the way back.
        steps: others than its own.
        """
        x = w.reshape(len(w), self.w_dim)[:, : -self.code_dim]
        x = x.unflatten(1, (3, self.resolution, self.resolution))
        eps = self.unet
        if torch.is_grad_enabled():
            eps = partial(checkpoint, eps, use_reentrant=False, preserve_rng_state=False)
        return generate(eps, x, timesteps(steps or self.steps, self.t0), self.alphas)

    def layers(self):
        return [self.unet]
