"""The embedded world: procedural portraits, and a CLIP, a StyleGAN2 and a judge trained on them."""

from pathlib import Path

from miniature.captions import LABELS, check_labels, plain_label
from miniature.truth import true_pairs

WEIGHTS = Path(__file__).parent / "weights"
CLIP = WEIGHTS / "clip.pt"
GENERATOR = WEIGHTS / "photo.pt"
JUDGE = WEIGHTS / "judge.pt"
DDPM = WEIGHTS / "ddpm"
DISCRIMINATOR = WEIGHTS / "discriminator.pt"  # of the generator; few-shot adaptation needs it

__all__ = ["CLIP", "DDPM", "DISCRIMINATOR", "GENERATOR", "JUDGE", "LABELS", "WEIGHTS"]
__all__ += ["check_labels", "plain_label", "true_pairs"]
