"""A sheet of the portrait world, ``python -m miniature.sheet``: a domain a row."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from checkpoints.files import write_atomically
from miniature import faces


def sheet(n=6, size=128, seed=0):
    """n persons in every domain: a picture, uint8 [11 size, n size, 3]."""
    rng = torch.Generator().manual_seed(seed)
    persons = faces.sample_persons(n, rng)
    rows = [
        torch.cat(list(faces.render(persons, faces.styles_of(domain, n), size)), dim=-1)
        for domain in faces.DOMAINS
    ]
    grid = ((torch.cat(rows, dim=-2) + 1) * 127.5).round().clamp(0, 255)
    return grid.permute(1, 2, 0).to(torch.uint8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("portraits.png"), help="a .png file")
    parser.add_argument("--persons", type=int, default=6)
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args()
    if found.out.suffix != ".png" or min(found.persons, found.size) < 1 or found.seed < 0:
        parser.error("wanted: --out of a .png file, --persons and --size above 0, --seed from 0 on")
    picture = Image.fromarray(sheet(found.persons, found.size, found.seed).numpy())
    write_atomically(found.out, picture.save)
    print(found.out)
