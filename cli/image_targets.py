"""Targets shown as pictures, --target-images: NADA's direction between images, alone or mixed in.

    d_image = norm(mean_j norm E_I(t_j) - mean_i norm E_I(G(z_i)))     of targets t, and of samples
    delta_text = (1 - b) norm(d) + b d_image                           b = --image-weight

d is the direction of the words: of each image with --method ipl, of all with nada. Without words,
b = 1, it is StyleGAN-NADA's --style_img_dir.

Differs from its code (clip_loss.py:124-146; ZSSGAN.py:305-321,340) in: 1. 256 samples, there 16,
which are noisy; 2. with fixed noise; 3. target pictures get the generator's resolution before
CLIP's, so that they are as sharp as samples; 4. the layer choice looks for the mean feature of the
pictures, there for the default of --target_class, "cat".
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import ipl
from cli.diffusion import read_pictures

SAMPLES = 256
LATENTS = 60_000  # their seed: the run's own latents stay those of a run without pictures


def read(settings, generator):
    """The target pictures of a run [N, 3, R, R] in [-1, 1], or None."""
    if settings.target_images is None:
        return None
    folder = Path(settings.target_images)
    return read_pictures("--target-images", folder, generator.resolution)


@torch.no_grad()
def mean_features(clips, batches):
    """mean_i norm E_I(x_i) of each CLIP, [e], of batches of images [., 3, R, R] in [-1, 1], of
    which no more than one is held."""
    found = [[] for _ in clips]
    for images in batches:
        for features, (clip_model, transform) in zip(found, clips, strict=True):
            images = images.to(clip_model.logit_scale.device)
            features.append(clip_model.encode_image(transform(images)))
    return [F.normalize(torch.cat(features), dim=-1).mean(0) for features in found]


def image_direction(source_feature, target_feature):
    """d_image [e], of unit length, between two mean features [e].

    Raises ValueError if CLIP sees no difference.
    """
    step = target_feature - source_feature
    if step.norm() < 1e-6:
        raise ValueError("CLIP sees no difference between target pictures and the source's")
    return F.normalize(step, dim=-1)


def mixed(direction, d_image, b):
    """The direction (w, z, x_source) -> [B, e] with so much of d_image [e] in it."""

    def mix(w, z=None, x_source=None):
        if b == 1:
            return d_image.expand(len(w), -1)
        return (1 - b) * F.normalize(direction(w, z, x_source), dim=-1) + b * d_image

    return mix


def arguments(settings, generator, clips, targets, sources=None):
    """What ipl.adapt is told of target pictures: redirect, and texts for the layer choice.

    targets, sources [N, 3, R, R] in [-1, 1]; sources: else samples of the generator. With b = 1,
    directions are asked nothing, and may be None.
    """
    b, d_images, texts = settings.image_weight, [], []
    if sources is None:
        z = ipl.sample_latents(SAMPLES, generator.z_dim, LATENTS).to(generator.w_avg.device)
        batches = (generator.synthesis(generator.mapping(x)) for x in z.split(16))
    else:
        batches = sources.split(16)
    means = zip(mean_features(clips, batches), mean_features(clips, targets.split(16)), strict=True)
    for (clip_model, _), (source, target) in zip(clips, means, strict=True):
        d_images.append(image_direction(source, target))
        label = 0
        if b < 1:
            with torch.no_grad():
                label = F.normalize(ipl.encode_texts(clip_model, settings.target)[0], dim=-1)
        texts.append((1 - b) * label + b * F.normalize(target, dim=-1))

    def redirect(directions):
        pairs = zip(directions, d_images, strict=True)
        return [mixed(direction, d_image, b) for direction, d_image in pairs]

    return {"redirect": redirect, "texts": texts}
