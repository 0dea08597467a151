"""How well `invert` finds the pictures of unseen persons, and what is left of them in its w.

    python -m benchmarks.inversion [--n 64] [--seed 91000] [--num-steps 200] [--space w+]
                                   [--lr 0.05] [--run RUN ...]

The miniature's renderer draws n photos of persons that no training saw; `project` finds their w.
Prints, after each 8 of them: PSNR, median and least, CPU seconds for each, and what the judge reads
of photos and of inversions: the share of ten attributes that are right, and of pictures whose
nearest photo, of those so far, is that of the same person. For each --run the same of its edits,
and the share of them that are of its target.
"""

import argparse
import time
from pathlib import Path

import torch

from cli import edit, invert
from cli.messages import plain_words
from cli.processes import pick_device
from miniature import faces
from miniature.judge import load_judge
from miniature.train import pool


def figures(judge, images, persons, photos, domain):
    """What the judge reads, in words."""
    out = judge(images)
    right = [out[k].argmax(1) == persons.category(k) for k in faces.CATEGORIES]
    nearest = (judge.identity(images) @ judge.identity(photos).T).argmax(1)
    shares = {
        "attributes": torch.stack(right).float().mean(),
        "same person": (nearest == torch.arange(len(images))).float().mean(),
        domain: (out["domain"].argmax(1) == faces.DOMAINS.index(domain)).float().mean(),
    }
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def main(argv=None):
    parser = argparse.ArgumentParser(prog="inversion", description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--seed", type=int, default=91_000)
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--space", choices=("w+", "w"), default="w+")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--run", type=Path, nargs="*", default=[])
    args = parser.parse_args(argv)
    with plain_words():
        measure(args)


def measure(args):
    device, judge = pick_device("cpu"), load_judge()
    source = invert.of_run_or_file(args.run[0] if args.run else None, None, None, device)
    _, adapted, words = edit.of_runs(args.run, device) if args.run else (source, [], [])
    persons = faces.sample_persons(args.n, torch.Generator().manual_seed(args.seed))
    styles, noise = faces.styles_of("photo", args.n), pool.chance(args.n, args.seed)
    photos = faces.render(persons, styles, noise=noise)
    options = {"steps": args.num_steps, "space": args.space, "lr": args.lr}
    w, found, start = [], [], time.process_time()
    for part in photos.split(8):
        for all_, new in zip((w, found), invert.projected(source, part, **options), strict=True):
            all_.append(new)
        n = sum(map(len, w))
        seconds, images = (time.process_time() - start) / n, torch.cat(found)
        decibels, (who, real) = invert.psnr(images, photos[:n]), (persons[:n], photos[:n])
        print(f"{n} persons: PSNR {decibels.median():.1f} dB, least {decibels.min():.1f}; "
              f"{seconds:.1f} CPU seconds each")  # fmt: skip
        print("  photos:    ", figures(judge, real, who, real, "photo"))
        print("  inversions:", figures(judge, images, who, real, "photo"), flush=True)
    for run, generator, word in zip(args.run, adapted, words, strict=True):
        images = edit.draw(generator, torch.cat(w))
        print(f"  {run}:", figures(judge, images, persons, photos, word), flush=True)


if __name__ == "__main__":
    main()
