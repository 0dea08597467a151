"""python ipl.py sample: new pictures of a finished run."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import ipl
from checkpoints import load_generator
from checkpoints.files import write_atomically
from cli import diffusion, pictures, processes
from cli.adapt import label, load_source
from cli.adapt import sample as sample_grid
from cli.run_folder import find_generator, make_folder, read_config
from cli.settings import check, command_line, expand

MOST = 10_000  # seeds
Trunc = Annotated[float | None, tyro.conf.arg(aliases=["--trunc"])]


def sample(
    run: Path, out: Path = Path("grid.png"), n: int = 16, seed: int = 1, seeds: str | None = None,
    truncation_psi: Trunc = None, outdir: Path | None = None, images: str | None = None,
    device: str = "auto",
):  # fmt: skip
    """Draw new samples from a finished run: source row over target row of the same latents.

    Args:
        run: Run folder.
        out: Picture to write, a .png file.
        n: Number of samples; sample i is the same for every n.
        seed: Seed of the latents.
        seeds: In place of --n and --seed, a seed for each sample, such as 0-35 or 0,3,5-9: NVIDIA's
            draw, so that 7 is the person that generate.py of StyleGAN2-ADA and 3 has as seed 7.
        truncation_psi: Truncation. None: that of the run.
        outdir: Folder for the samples singly too: source/seed0000.png and target/seed0000.png (of
            --n and --seed: sample0000.png).
        images: Of a diffusion model, folder of pictures to adapt. None: that of the run.
        device: auto, cpu, cuda or cuda:<n>.
    """
    run, out = Path(expand(run)), Path(expand(out))
    path = find_generator(run)
    if path is None:
        raise ValueError(f"{run} is no finished run; wanted: a folder with a generator.pt")
    if out.suffix != ".png" or out.is_dir():
        raise ValueError(f"--out {out} is no name of a picture; wanted: a .png file")
    seeds_drawn = None if seeds is None else seeds_of(seeds)
    settings = read_config(run)
    psi = settings.truncation_psi if truncation_psi is None else truncation_psi
    n = n if seeds is None else len(seeds_drawn)
    settings = replace(settings, seed=seed, truncation_psi=psi, samples=n)
    check(settings, samples="--n")
    device = processes.pick_device(device)
    of_draw = {"n": n, "seed": seed} if seeds is None else {"seeds": seeds}
    flags = {"run": run, **of_draw, "truncation_psi": truncation_psi, "images": images}
    text = {"seed": seeds or str(seed), "command": command_line("sample", **flags)}
    if diffusion.asked_for(settings):
        if seeds is not None or outdir is not None:
            wanted = "neither --seeds nor --outdir, which are for StyleGAN2"
            raise ValueError(f"{run} is of a diffusion model; wanted: {wanted}")
        settings = replace(settings, bank=n, images=expand(images) or settings.images)
        source, adapted, of_run = diffusion.of_run(settings, path, device)
        make_folder(out.parent)
        grid = sample_grid(settings, source, adapted, of_run)
    else:
        source, adapted = generators(settings, path, device)
        diffusion.pictures_of(replace(settings, images=images), source)
        make_folder(out.parent)
        if seeds is None:
            z = ipl.sample_latents(n, source.z_dim, seed)
            names = [(f"sample{i:04d}.png", f"{seed}, sample {i}") for i in range(n)]
        else:
            z = latents_of(seeds_drawn, source.z_dim)
            names = [(f"seed{x:04d}.png", str(x)) for x in seeds_drawn]
        pairs = pairs_of(source, adapted, z, psi)
        if outdir is not None:
            pairs = written(pairs, names, Path(expand(outdir)), text)
        grid = grid_of(pairs)
    picture = label(settings, source, grid, text, seeds and f"seeds {seeds:.40}")
    write_atomically(out, lambda aside: aside.write_bytes(picture))
    print(f"{out}: {settings.source} above, {settings.target} below, of the same latents")
    if outdir is not None:
        print(f"{outdir}: source/ and target/, a file for each")


def seeds_of(words, most=MOST):
    """Numbers and ranges, "0,3,5-9" -> [0, 3, 5, 6, 7, 8, 9].

    Raises ValueError for other words, for a range that runs down, and for more than `most`.
    """
    parts = [re.fullmatch(r"\s*([0-9]{1,10})(?:-([0-9]{1,10}))?\s*", x) for x in words.split(",")]
    ranges = [range(int(x[1]), int(x[2] or x[1]) + 1) for x in parts if x]
    count = sum(map(len, ranges))
    good = all(parts) and all(ranges) and max(x[-1] for x in ranges) < 2**32
    if down := [x for x in parts if x and int(x[2] or x[1]) < int(x[1])]:
        raise ValueError(f"--seeds {down[0][0].strip()} runs down; wanted: such as 0-35 or 0,3,5-9")
    if not good or count > most:
        found = f"{words[:40]!r}" + f", {count:,} seeds" * good
        wanted = f"numbers and ranges, such as 0-35 or 0,3,5-9: at most {most}, below 2^32"
        raise ValueError(f"--seeds {found}; wanted: {wanted}")
    return [seed for part in ranges for seed in part]


def latents_of(seeds, z_dim):
    """z [N, z_dim], a row for each seed, as NVIDIA draws it (stylegan2-ada-pytorch generate.py)."""
    rows = [np.random.RandomState(seed).randn(z_dim) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).float()


def as_pixels(images):
    """[N, 3, R, R] in [-1, 1] -> uint8 [N, R, R, 3], on the CPU. ValueError if not finite."""
    if not images.isfinite().all():
        raise ValueError("images that are not finite; wanted: generators with sound weights")
    pixels = ((images + 1) * 127.5).round().clamp(0, 255)
    return pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8)


@torch.no_grad()
def pairs_of(source, adapted, z, psi, columns=8):
    """Pixels of both generators, of `columns` latents z [N, z_dim] at a time."""
    for part in tqdm(z.to(source.w_avg.device).split(columns), "samples", disable=None):
        w = ipl.truncate(source.mapping(part), source.w_avg, psi)
        yield as_pixels(source.synthesis(w)), as_pixels(adapted.synthesis(w))


def grid_of(pairs):
    """Source row over target row, as ipl.sample_grid: uint8 [H, W, 3]."""
    rows = [torch.cat([*pixels], dim=1) for pair in pairs for pixels in pair]
    width = rows[0].shape[1]
    return torch.cat([F.pad(row, (0, 0, 0, width - row.shape[1]), value=255) for row in rows])


def written(pairs, names, folder, text):
    """The pairs, each of whose pictures is written to folder/source and folder/target as well.

    names: (of the file, seed in words) of each latent.
    """
    folders = folder / "source", folder / "target"
    for kind in folders:
        make_folder(kind)
    left = iter(names)
    for pair in pairs:
        of_batch = [*itertools.islice(left, len(pair[0]))]
        for kind, pixels in zip(folders, pair, strict=True):
            for picture, (name, seed) in zip(pixels, of_batch, strict=True):
                data = pictures.png(picture, text | {"seed": seed})
                write_atomically(kind / name, lambda aside, data=data: aside.write_bytes(data))
        yield pair


def generators(settings, path, device):
    """The source generator of a run and the adapted one, which have to fit."""
    source = load_source(settings, device)
    adapted = load_generator(path, device, settings.class_index)
    found, wanted = ((x.z_dim, x.w_dim, x.num_ws) for x in (adapted, source))
    if found != wanted:
        sizes = "z_dim, w_dim and num_ws"
        raise ValueError(f"{path} has {sizes} {found}; wanted, for the run's generator: {wanted}")
    return source, adapted
