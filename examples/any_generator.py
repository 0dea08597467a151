"""Any generator: the DCGAN of a PyPI package, made to fit ipl.Generator and adapted by NADA.

    pip install --no-deps gan-face-generate
    python -m examples.any_generator --target anime

A network of yours takes its place: one that draws [B, 3, R, R] in [-1, 1] of [B, z_dim, 1, 1].
"""

from pathlib import Path

import torch
import tyro
from torch import nn

import ipl
import miniature
from checkpoints import read_clip
from checkpoints.files import write_atomically
from cli import messages, pictures


class Wrapped(nn.Module):
    """A network without mapping, noise and layers of its own: w is z, and there is one input."""

    num_ws = 1

    def __init__(self, network, z_dim, resolution):
        super().__init__()
        self.network, self.resolution = network, resolution
        self.z_dim = self.w_dim = z_dim
        self.register_buffer("w_avg", torch.zeros(z_dim))  # truncation shrinks z
        self.eval()  # batch norm with its own averages, or each image would depend on the others

    def mapping(self, z):
        return z

    def synthesis(self, w, *, rng=None):
        """w [B, w_dim] or [B, 1, w_dim] -> images [B, 3, R, R]."""
        return self.network(w.flatten(1)[:, :, None, None])

    def layers(self):
        return [self.network]


def dcgan_of_faces():
    """The generator of gan-face-generate: faces of 64 pixels, as rendered for DigiFace1M."""
    try:
        from gan_face_generate import models
    except ImportError as error:
        wanted = "wanted: pip install --no-deps gan-face-generate"
        raise ImportError(f"there is no {error.name}; {wanted}") from error
    file = Path(models.__file__).with_name("weights.tar")
    network = models.Generator(ngpu=0, nc=3, nz=100, ngf=64)
    state = torch.load(file, map_location="cpu", weights_only=True)
    network.load_state_dict(state["netG_state_dict"])
    return Wrapped(network, z_dim=100, resolution=64)


def adapt(generator, clip_model, transform, source, target, *, steps, lr, seed=0):
    """By NADA, with all of the network trained -> the adapted generator and the history."""
    cfg = ipl.Config(
        source=source, target=target, method="nada", steps=steps, lr=lr, batch=4, ema=0.95,
        layers="all", noise="fixed", eps=0.1, crop=0.4,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    adapted, _, history = ipl.adapt(cfg, generator, [(clip_model, transform)], rng=rng)
    return adapted, history


def main(
    source: str = "photo", target: str = "anime", clip: str = "", steps: int = 60,
    lr: float = 0.0004, out: Path = Path("any-generator.png"),
):  # fmt: skip
    """Adapt the DCGAN, and draw source row over target row of the same latents.

    Args:
        source: What the generator draws, in words.
        target: What it shall draw, in words.
        clip: A CLIP's file, or OpenAI's name, which is downloaded once. None: the miniature's.
        steps: Steps of 4 images.
        lr: Learning rate.
        out: Picture to write, a .png file.
    """
    with messages.plain_words("any_generator"):
        if not clip:
            miniature.check_labels(source, target)
        generator = dcgan_of_faces()
        ipl.check_generator(generator)
        name = clip if clip in ipl.openai_clip().available_models() else None
        pair = ipl.load_clip(name or read_clip(clip or miniature.CLIP))
        adapted, history = adapt(generator, *pair, source, target, steps=steps, lr=lr)
        grid = ipl.sample_grid(generator, adapted, n=8, seed=1)
        note = f"NADA, {steps} steps: loss {history[0]['loss']:.2f} to {history[-1]['loss']:.2f}"
        page = pictures.png(pictures.labelled(grid, generator.resolution, source, target, note))
        write_atomically(out, lambda aside: aside.write_bytes(page))
        print(f"{out}: {source} above, {target} below, of the same latents")


if __name__ == "__main__":
    tyro.cli(main)
