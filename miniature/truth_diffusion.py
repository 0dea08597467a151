"""The truth of pictures that a diffusion model makes of inverted photos: see miniature/truth.py."""

import torch
import torch.nn.functional as F

from miniature import faces
from miniature.truth import Truth


def small(pictures, side):
    """Pictures [n, 3, SIZE, SIZE] at side x side pixels, by the mean of each square."""
    return F.avg_pool2d(pictures, faces.SIZE // side)


def large(pictures):
    """Pictures [n, 3, R, R] at SIZE x SIZE pixels, as the judge wants them, within [-1, 1]."""
    size = (faces.SIZE, faces.SIZE)
    return F.interpolate(pictures, size, mode="bicubic", align_corners=False).clamp(-1, 1)


class InvertedTruth(Truth):
    """n persons whose photos a DiffusionGenerator has inverted, and their true pictures.

    Its `generated` are the photos' reconstructions, by `picture_steps` steps; all pictures that the
    judge sees have gone through the generator's number of pixels. z [n, W_DIM], from the seed,
    stands for the persons alone; generator: with a filled bank, whose mean and deviation of codes
    count here too.
    """

    @torch.no_grad()
    def __init__(self, n, seed, judge, generator, source="photo", inversion_steps=40,
                 picture_steps=40):  # fmt: skip
        rng = torch.Generator().manual_seed(seed)
        z = torch.randn(n, faces.W_DIM, generator=rng)
        self.judge, self.persons, self.source = judge, faces.persons_from_z(z), source
        self.others, self.seed = faces.sample_persons(n, rng), seed
        self.z, self.known, self.drawn = z.to(generator.w_avg.device), {}, {}
        self.side, self.steps = generator.resolution, picture_steps
        photos = small(super().draw(source, self.persons), self.side).to(self.z.device)
        self.w = torch.cat([generator.invert(x, inversion_steps) for x in photos.split(8)])
        self.w = generator.standard(self.w)
        self.generated = self.pictures(generator)

    def draw(self, domain, persons=None):
        """True pictures at the generator's number of pixels, enlarged again."""
        if persons is None and domain in self.drawn:
            return self.drawn[domain]
        pictures = large(small(super().draw(domain, persons or self.persons), self.side))
        return pictures if persons else self.drawn.setdefault(domain, pictures)

    @torch.no_grad()
    def pictures(self, generator):
        """What a generator makes of the latents."""
        parts = [generator.synthesis(w, steps=self.steps) for w in self.w.split(8)]
        return large(torch.cat(parts))
