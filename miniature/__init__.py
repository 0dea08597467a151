"""The embedded world: procedural portraits, and a CLIP, a StyleGAN2 and a judge trained on them."""

from pathlib import Path

from miniature.captions import LABELS, unknown_words

WEIGHTS = Path(__file__).parent / "weights"
CLIP = WEIGHTS / "clip.pt"
GENERATOR = WEIGHTS / "photo.pt"
JUDGE = WEIGHTS / "judge.pt"

__all__ = ["CLIP", "GENERATOR", "JUDGE", "LABELS", "WEIGHTS", "unknown_words"]
