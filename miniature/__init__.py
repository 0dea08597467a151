"""The embedded world: procedural portraits, and a CLIP, a StyleGAN2 and a judge trained on them."""

import difflib
from pathlib import Path

import torch

from miniature import faces
from miniature.captions import LABELS, unknown_words

WEIGHTS = Path(__file__).parent / "weights"
CLIP = WEIGHTS / "clip.pt"
GENERATOR = WEIGHTS / "photo.pt"
JUDGE = WEIGHTS / "judge.pt"

__all__ = [
    "CLIP",
    "GENERATOR",
    "JUDGE",
    "LABELS",
    "WEIGHTS",
    "check_labels",
    "floor_of_truth",
    "true_pairs",
]


def check_labels(*labels):
    """Raises ValueError, of one line, if the miniature's CLIP has never read a word of them."""
    if unknown := [word for label in labels for word in unknown_words(label)]:
        words = {word for label in LABELS for word in (label, *label.split())}
        close = difflib.get_close_matches(unknown[0].lower(), words, n=1)
        meant = f"did you mean {close[0]}? It" if close else "it"
        raise ValueError(
            f"the miniature's CLIP has never read {', '.join(unknown)}; {meant} knows "
            f"{', '.join(LABELS)}; for any words: --generator FILE --clip ViT-B/32"
        )


def true_pairs(source, target, n=64, seed=0):
    """Latents z [n, W_DIM], and the true pictures [n, 3, 64, 64] of their persons in two domains.

    None if a label is not the name of a domain: "photo with anime eyes" has no one truth.
    """
    source, target = source.strip(), target.strip()
    if not {source, target} <= set(LABELS):
        return None
    z = torch.randn(n, faces.W_DIM, generator=torch.Generator().manual_seed(seed))
    persons = faces.persons_from_z(z)
    return z, *(faces.render(persons, faces.styles_of(d, n)) for d in (source, target))


@torch.no_grad()
def floor_of_truth(cfg, generator, clips, loss):
    """Stage 2's loss of the true pairs, or None where there are none.

    clips: of each CLIP, its model, its transform, its directions of w. loss: of lists, with an
    entry for each CLIP: image features of the source, of the target, text directions.
    """
    pairs = None if cfg.generator else true_pairs(cfg.source, cfg.target)
    if pairs is None:
        return None
    z, *images = (x.to(generator.w_avg.device) for x in pairs)
    features = [[model.encode_image(transform(x)) for model, transform, _ in clips] for x in images]
    delta_text = [direct(generator.mapping(z)) for *_, direct in clips]
    return float(loss(*features, delta_text))
