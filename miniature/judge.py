"""The judge: it reads domain, cues and attributes, and shares nothing with the miniature's CLIP."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from miniature.faces import CATEGORIES, CUES, DOMAINS, PROPORTIONS

NONE = len(DOMAINS)  # the judge's word for a picture of no domain, which has failed


class Residual(nn.Module):
    """x [B, width, H, W] and what one convolution makes of it."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)

    def forward(self, x):
        return x + F.leaky_relu(self.norm(self.conv(x)), 0.1)


class Judge(nn.Module):
    """Residual convolutions: images [B, 3, 128, 128] in [-1, 1] -> a dict of heads.

    ``domain`` [B, 12]: logits whose softmax is the share of the six cues that each of DOMAINS has,
    and last (NONE) the chance that the picture is none of these, nor a mixture of them; one head of
    logits [B, 11] per cue, and one per attribute; ``proportions`` [B, 15]; ``features`` [B, 256]:
    what distances are measured in.
    """

    def __init__(self, widths=(24, 40, 64, 128, 160), depths=(1, 2, 2, 1)):
        super().__init__()
        layers = [nn.Conv2d(3, widths[0], 5, stride=2, padding=2), nn.LeakyReLU(0.1)]
        for a, b, depth in zip(widths, widths[1:], depths, strict=False):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.LeakyReLU(0.1)]
            layers += [Residual(b) for _ in range(depth)]
        self.body = nn.Sequential(*layers)
        self.embed = nn.Linear(widths[-1] * 16, 256)
        heads = {
            "domain": len(DOMAINS) + 1,
            **{f"cue {c}": len(DOMAINS) for c in CUES},
            **{k: len(names) for k, (names, _) in CATEGORIES.items()},
            "proportions": len(PROPORTIONS),
        }
        self.head_sizes = heads
        self.heads = nn.Linear(256, sum(heads.values()))

    def forward(self, x):
        features = F.leaky_relu(self.embed(self.body(x).flatten(1)), 0.1)
        outputs = self.heads(features).split(list(self.head_sizes.values()), dim=1)
        return {**dict(zip(self.head_sizes, outputs, strict=True)), "features": features}

    @torch.no_grad()
    def domain_of(self, images):
        """[B] index into DOMAINS of the domain with the largest share, or NONE."""
        return self(images)["domain"].argmax(1)

    @torch.no_grad()
    def identity(self, images):
        """[B, d] unit vectors of who is in the picture: attributes' probabilities, proportions."""
        out = self(images)
        parts = [out[k].softmax(1) for k in CATEGORIES] + [0.5 * out["proportions"]]
        return F.normalize(torch.cat(parts, dim=1), dim=1)


def load_judge(path=Path(__file__).parent / "weights" / "judge.pt", device="cpu"):
    """The committed judge, frozen."""
    judge = Judge()
    state = torch.load(path, weights_only=True, map_location="cpu")
    judge.load_state_dict({k: v.float() for k, v in state.items()})
    return judge.to(device).eval().requires_grad_(False)
