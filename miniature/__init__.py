"""The embedded world: procedural portraits, and a CLIP, a StyleGAN2 and a judge trained on them."""

import difflib
from pathlib import Path

from miniature.captions import LABELS, unknown_words
from miniature.truth import true_pairs

WEIGHTS = Path(__file__).parent / "weights"
CLIP = WEIGHTS / "clip.pt"
GENERATOR = WEIGHTS / "photo.pt"
JUDGE = WEIGHTS / "judge.pt"
DDPM = WEIGHTS / "ddpm"
DISCRIMINATOR = WEIGHTS / "discriminator.pt"  # of the generator; few-shot adaptation needs it

__all__ = ["CLIP", "DDPM", "GENERATOR", "JUDGE", "LABELS", "WEIGHTS", "check_labels", "true_pairs"]


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
