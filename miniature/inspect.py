"""What the miniature's CLIP makes of the world: ``python -m miniature.inspect``.

For every domain, from true pictures of the same n persons in photo and in that domain. dI is the
step from the one picture's feature to the other's, dT one between texts; cosines are means over
the persons.

  room      1 - cos(dI, their mean): what directions of one's own can win over a single one
  |dI|      the length of the step, between features of unit length
  floor     the loss of the true pairs against NADA's direction: below it, training follows the gap
            between CLIP's pictures and texts, not the domain
  NADA      cos(dT, dI) of the one direction between the labels
  caption   cos(dT, dI) of each person's own full captions: what a perfect prompt could do
  the cues  how far the feature moves when that cue alone changes, over |dI|
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import ipl
from miniature import CLIP, captions, faces


@dataclass(frozen=True)
class Config:
    clip: Path = CLIP  # CLIP in OpenAI's format.
    n: int = 128  # Persons.
    seed: int = 60_000  # Of the persons.


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=-1).mean().item()


@torch.no_grad()
def row(clip_model, transform, persons, domain):
    """The figures of one domain, {name: value}."""
    n, photo, styles = len(persons), faces.styles_of("photo", len(persons)), []
    for i in range(len(faces.CUES)):  # photos with one cue changed
        styles.append(photo.clone())
        styles[-1][:, i] = faces.DOMAINS.index(domain)
    styles = [photo, faces.styles_of(domain, n), *styles]
    pictures = [faces.render(persons, s) for s in styles]
    source, target, *mixed = (clip_model.encode_image(transform(x)) for x in pictures)
    step = ipl.feature_delta(source, target)
    labels = [ipl.label_features(clip_model, y) for y in ("photo", domain)]
    direction = (labels[1] - labels[0]).expand_as(step)
    said = [[captions.full_caption(c, d) for c in persons.categories] for d in ("photo", domain)]
    spoken = [ipl.encode_texts(clip_model, texts) for texts in said]
    length = step.norm(dim=-1).mean()
    cues = [ipl.feature_delta(source, x).norm(dim=-1).mean() / length for x in mixed]
    return {
        "room": 1 - cosine(step, F.normalize(step, dim=-1).mean(0)),
        "|dI|": length.item(),
        "floor": ipl.directional_loss(step, direction).item(),
        "NADA": cosine(direction, step),
        "caption": cosine(ipl.feature_delta(*spoken), step),
        **{cue: share.item() for cue, share in zip(faces.CUES, cues, strict=True)},
    }


def main(cfg):
    clip_model, transform = ipl.load_clip(cfg.clip)
    persons = faces.sample_persons(cfg.n, torch.Generator().manual_seed(cfg.seed))
    for domain in faces.DOMAINS[1:]:
        values = row(clip_model, transform, persons, domain)
        if domain == faces.DOMAINS[1]:
            print(" " * 10, *(f"{name:>10}" for name in values))
        print(f"{domain:10}", *(f"{x:10.2f}" for x in values.values()))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
