"""A run whose generator is a diffusion model: pictures from a folder, inverted, in a GAN's place.

DiffusionCLIP is `--method nada` on it, and Diff-IPL is `--method ipl`.
"""

import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import ipl
import miniature
from checkpoints.diffusion import is_diffusion, load_unet
from checkpoints.images import SUFFIXES, as_square, picture_paths, read_image
from cli.settings import EMBEDDED
from diffusion import DiffusionGenerator
from miniature import faces, plain_label
from miniature.truth_diffusion import small


def asked_for(settings):
    """Whether the generator of a run is a diffusion model."""
    name = settings.generator
    return name == EMBEDDED or name is not None and is_diffusion(name)


def load(settings, device):
    """The generator of a run, whose bank is empty."""
    path = miniature.DDPM if settings.generator == EMBEDDED else settings.generator
    unet, alphas = load_unet(path, device, settings.side)
    generator = DiffusionGenerator(unet, alphas, t0=settings.t0, steps=settings.synthesis_steps)
    return generator.eval()


def persons_of(settings, n):
    """The n persons whose photos are the bank of a run without --images."""
    return faces.sample_persons(n, torch.Generator().manual_seed(settings.seed))


def pictures_of(settings, generator):
    """The pictures of a run [N, 3, R, R] in [-1, 1]: the first `bank` in --images, by their names;
    without it, rendered photos. None if the generator is no diffusion model.

    What is not square is cropped to its middle, and all are resized. Raises ValueError, of one
    line, for a folder without pictures, for one that is damaged, and where there are none to take.
    """
    if not isinstance(generator, DiffusionGenerator):
        if settings.images is not None:
            raise ValueError("--images is for diffusion models, and --generator is none")
        return None
    n, side = settings.bank or 32, generator.resolution
    if settings.images is None:
        if settings.generator != EMBEDDED:
            raise ValueError("a diffusion model adapts pictures; wanted: --images FOLDER")
        persons = persons_of(settings, n)
        source = plain_label(settings.source)
        if source not in faces.DOMAINS:
            known = ", ".join(faces.DOMAINS)
            raise ValueError(f"--source {source!r} cannot be drawn; wanted: one of {known}")
        styles = faces.styles_of(source, n)
        return small(faces.render(persons, styles), side)
    pictures = read_pictures("--images", Path(settings.images), side, n)
    if settings.method == "ipl" and len(pictures) < 2:
        found = f"--images {settings.images}: one picture"
        raise ValueError(f"{found}; wanted: two or more, or --method nada")
    return pictures


def read_pictures(flag, folder, side, n=None):
    """The first n pictures of a folder, by their names: [N, 3, side, side] in [-1, 1]."""
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: no such folder; wanted: one with pictures")
    paths = picture_paths(folder)[:n]
    if not paths:
        wanted = f"a folder with some of {', '.join(sorted(SUFFIXES))}"
        raise ValueError(f"{flag} {folder}: there is no picture in it; wanted: {wanted}")
    pictures, notes = zip(*(read_picture(path, side) for path in paths), strict=True)
    for note in sorted({*notes} - {""}):
        warnings.warn(f"{flag} {folder}, {notes.count(note)} of its pictures: {note}", stacklevel=2)
    return torch.stack(pictures)


def read_picture(path, side):
    """A picture [3, side, side] in [-1, 1], and a note of how it was turned to RGB."""
    pixels, note = read_image(path, least=1)
    return as_square(pixels, side), note


def of_run(settings, path, device):
    """The source of a finished run, with pictures inverted, the adapted model, and the pictures.

    path: the file of the adapted model.
    """
    source = load(settings, device)
    images = pictures_of(settings, source)
    unet, _ = load_unet(path, device)
    if unet.config != source.unet.config:
        raise ValueError(f"{path} is of another network; wanted: that of the run's generator")
    adapted = DiffusionGenerator(unet, source.alphas, t0=settings.t0, steps=source.steps).eval()
    fill(source, images, settings, ipl.progress)
    return source, adapted, images


class Latents(nn.Module):
    """w [N, w_dim] of N pictures, of which the first so many are known."""

    def __init__(self, n, w_dim):
        super().__init__()
        self.register_buffer("w", torch.zeros(n, w_dim))


def fill(generator, images, settings, steps, at_once=8):
    """Inverts images [N, 3, R, R] and makes them the generator's bank. steps: as ipl.progress.

    It is a loop of its own, stage 0, whose loss is the mean distance of the pictures from what the
    generator makes of them in its few steps.
    """
    parts = images.split(at_once)
    latents, history = Latents(len(images), generator.w_dim), []
    for i in steps(0, len(parts), {"latents": latents, "history": history}):
        x = parts[i].to(generator.w_avg.device)
        w = generator.invert(x, settings.inversion_steps)
        latents.w[i * at_once : i * at_once + len(x)] = w.cpu()
        with torch.no_grad():
            loss = (generator.synthesis(w) - x).abs().mean().item()
        history.append({"stage": 0, "step": i, "loss": loss})
    return generator.fill(latents.w.to(generator.w_avg.device))


def fitted(settings, images):
    """The settings, for as many pictures as there are: fewer than --bank in a small folder."""
    n = len(images)
    return replace(settings, bank=n, batch_mapper=min(n, settings.batch_mapper))


def arguments(settings, generator, images, rng):
    """What ipl.adapt is told of it: how to draw rows, what the source pictures are, what stays."""
    of_rows = images.to(generator.w_avg.device)
    if settings.source_images == "own":
        with torch.no_grad():
            of_rows = torch.cat([generator.synthesis(w) for w in generator.bank.split(8)])

    def distance(x_source, x_target):
        return settings.lambda_l1 * (x_target - x_source).abs().mean((1, 2, 3))

    return {
        "draw_z": lambda n: generator.choose(n, rng),
        "source_images": lambda z: of_rows[z.argmax(1)],
        "more_loss": distance if settings.lambda_l1 else None,
    }


def true_pairs(settings, generator, n=32):
    """z of the first n rows of the bank, and true pictures of their persons in both domains."""
    persons = persons_of(settings, generator.z_dim)[:n]
    domains = map(plain_label, (settings.source, settings.target))
    styles = (faces.styles_of(x, len(persons)) for x in domains)
    pictures = (small(faces.render(persons, x), generator.resolution) for x in styles)
    return torch.eye(generator.z_dim)[: len(persons)], *pictures


@torch.no_grad()
def grid(settings, source, adapted, images, columns=8):
    """Rows of pictures, what the source makes of them, and what the adapted one does.

    uint8 [H, W, 3]; both take --picture-steps from the source's bank.
    """
    n, rows = min(settings.samples, len(images)), []
    columns = min(columns, n)
    for start in range(0, n, columns):
        w = source.bank[start : min(n, start + columns)]
        drawn = [x.synthesis(w, steps=settings.picture_steps).cpu() for x in (source, adapted)]
        for part in (images[start : start + len(w)], *drawn):
            row = torch.cat([*part], dim=-1)
            rows.append(F.pad(row, (0, (columns - len(w)) * row.shape[-2]), value=1))
    pixels = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().clamp(0, 255)
    return pixels.permute(1, 2, 0).to(torch.uint8)
