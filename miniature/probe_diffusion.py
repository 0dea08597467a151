"""What the mapper should read of an inverted picture: ``python -m miniature.probe_diffusion``.

A linear probe (ridge regression onto one-hot categories) guesses each person's attributes from one
code of the inverted photo. The code that tells most is what prompts can be written from.

  x_t0        the latent itself, 3 R R numbers
  at t0       the bottleneck's mean over the places at the first step down
  near        the same, at the last two steps down: what DiffusionGenerator.code is
  of x_0      the same, of the photo itself at time 0, without any inversion
  guess       the commonest category of each attribute, for comparison

Printed is the share of attributes guessed right of persons that the probe has not seen; the ridge
is chosen on a third group.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import trange

import miniature
from checkpoints.diffusion import load_unet
from diffusion import DiffusionGenerator
from diffusion.steps import downwards, everywhere, step, timesteps
from miniature import faces
from miniature.train import pool
from miniature.truth_diffusion import small


@dataclass(frozen=True)
class Config:
    n: int = 384  # Persons to learn from; a quarter as many to choose the ridge, and to test.
    seed: int = 80_000  # Of the persons.
    inversion_steps: int = 40  # Times on the way up.
    steps: int = 6  # Of synthesis.


@torch.no_grad()
def codes_of(generator, photos, cfg):
    """{name: [B, .]} of photos [B, 3, R, R]."""
    bottlenecks, unet = [], generator.unet
    w = generator.invert(photos, cfg.inversion_steps)
    x_t0 = x = w[:, : -generator.code_dim].unflatten(1, photos.shape[1:])
    for t, t_next in downwards(timesteps(cfg.steps, generator.t0)):
        bottleneck, *rest = unet.encode(x, everywhere(x, t))
        bottlenecks.append(bottleneck.mean((2, 3)))
        x, _ = step(x, unet.decode(bottleneck, *rest), t, t_next, generator.alphas)
    of_photo, *_ = unet.encode(photos, everywhere(photos, 0))
    return {
        "x_t0": x_t0.flatten(1), "at t0": bottlenecks[0],
        "near": torch.stack(bottlenecks[-2:]).mean(0), "of x_0": of_photo.mean((2, 3)),
    }  # fmt: skip


def accuracy(codes, labels, parts, ridge):
    """The shares of attributes guessed right in the parts, of a probe of the first of them.

    codes [N, d]; labels: of each attribute [N]; parts: three slices.
    """
    learn = parts[0]
    x = (codes - codes[learn].mean(0)) / codes[learn].std(0).clamp(min=1e-6)
    x = F.pad(x / x.shape[1] ** 0.5, (0, 1), value=1).double()  # and a constant
    gram = x @ x[learn].T  # the dual form: d may be far above N
    inverse = torch.linalg.inv(gram[learn] + ridge * torch.eye(len(gram[learn])))
    right = []
    for label in labels:
        onehot = F.one_hot(label[learn], int(label.max()) + 1).double()
        guess = (gram @ (inverse @ (onehot - onehot.mean(0))) + onehot.mean(0)).argmax(1)
        right.append(guess == label)
    right = torch.stack(right).double().mean(0)
    return [right[part].mean().item() for part in parts[1:]]


def main(cfg):
    generator = DiffusionGenerator(*load_unet(miniature.DDPM), steps=cfg.steps).eval()
    third = cfg.n // 4
    persons = faces.sample_persons(cfg.n + 2 * third, torch.Generator().manual_seed(cfg.seed))
    photos = pool.draw(persons, faces.styles_of("photo", len(persons)), cfg.seed, desc="photos")
    photos = small(pool.as_images(photos), generator.resolution)
    parts = slice(cfg.n), slice(cfg.n, cfg.n + third), slice(cfg.n + third, None)
    found = [
        codes_of(generator, photos[i : i + 8], cfg)
        for i in trange(0, len(photos), 8, desc="inverted", disable=None)
    ]
    labels = [persons.category(name) for name in faces.CATEGORIES]
    commonest = [(x[parts[2]] == x[parts[0]].mode().values).double().mean() for x in labels]
    print(f"{'guess':8} {torch.stack(commonest).mean():.2f}")
    for name in found[0]:
        codes = torch.cat([x[name] for x in found])
        tried = [accuracy(codes, labels, parts, 10.0**k) for k in range(-5, 2)]
        print(f"{name:8} {max(tried)[1]:.2f}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
