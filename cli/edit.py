"""python ipl.py edit: pictures of one's own, drawn by adapted generators from their w."""

import copy
import io
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import trange

from checkpoints import CheckpointError
from checkpoints.files import read_file
from cli import pictures, processes
from cli.align import Align, read_square
from cli.invert import (
    Pictures,
    Space,
    as_pixels,
    check_projection,
    digest,
    distance,
    projected,
    refuse_diffusion,
    write,
)
from cli.run_folder import find_generator, make_folder, read_config
from cli.sample import generators
from cli.settings import expand

Runs = Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]


def edit(
    run: Runs, projected_w: tuple[Path, ...] = (), image: Pictures = (), strength: float = 1.0,
    pti: int = 0, num_steps: int = 200, space: Space = "w+", align: Align = "none",
    outdir: Path = Path("out"), device: str = "auto",
):  # fmt: skip
    """Draw pictures of your own in the domains of one or more runs: edit.png shows all.

    Args:
        run: Folder of a finished run; --run A --run B for more, of the same source.
        projected_w: Files of `python ipl.py invert`, or others' with a w.
        image: Pictures, which are inverted first, instead.
        strength: How much of the way to the target, 0 to 2, in the generator's weights.
        pti: Steps that tune the source generator to the pictures; their change is added.
        num_steps: Of --image: steps of the inversion.
        space: Of --image: w+ or w, as in `invert`.
        align: Of --image: none, a square as it is; crop, its middle; face, as in FFHQ.
        outdir: Folder for edit.png, and every picture of it in a file of its own.
        device: auto, cpu, cuda or cuda:<n>.
    """
    if not 0 <= strength <= 2:
        raise ValueError(f"--strength must be from 0 to 2, not {strength}")
    if not 0 <= pti <= 10_000:
        raise ValueError(f"--pti must be from 0 to 10000, not {pti}")
    check_projection(num_steps)
    if not run:
        raise ValueError("--run names no run; wanted: --run FOLDER of a finished one")
    if bool(projected_w) == bool(image):
        raise ValueError("wanted: either --projected-w FILE.npz or --image FILE")
    device = processes.pick_device(device)
    source, adapted, words = of_runs([Path(expand(x)) for x in run], device)
    if image:
        squares = torch.stack([read_square(expand(x), source.resolution, align) for x in image])
    else:
        w, squares = read_all([expand(x) for x in projected_w], source)
        if pti and squares is None:
            raise ValueError("--pti needs the pictures themselves; wanted: --image FILE")
    outdir = Path(expand(outdir))
    make_folder(outdir)
    if image:
        w, _ = projected(source, squares, steps=num_steps, space=space)
    tuned = tune(source, w.to(device), squares.to(device), pti) if pti else source
    rows = {} if squares is None else {"picture": squares}
    rows["inversion"] = draw(tuned, w)
    names = [*rows, *names_of(run)]
    drawn = [draw(blended(source, x, strength, tuned), w) for x in adapted]
    rows, words = [*rows.values(), *drawn], [*rows, *words]
    for name, row in zip(names, rows, strict=True):
        for i, picture in enumerate(row):
            write(outdir / f"{name}{i:02d}.png", pictures.png(as_pixels(picture)))
    note = f"strength {strength:g}" + f", {pti} steps of PTI" * bool(pti)
    between = words[1:-1]
    page = pictures.labelled(grid(rows), source.resolution, words[0], words[-1], note, between)
    write(outdir / "edit.png", pictures.png(page))
    print(f"{outdir / 'edit.png'}: {', '.join(words)}; each in a file of its own beside it")


# ----------------------------------------------------------------------------------------------
# Weights


def blended(source, target, strength, tuned=None):
    """source + strength (target - source) + (tuned - source), of parameters: a generator. Buffers,
    such as the fixed noise, are the target's."""
    mixed = copy.deepcopy(target)
    each = zip(*(x.parameters() for x in (mixed, source, target, tuned or source)), strict=True)
    with torch.no_grad():
        for p, of_source, of_target, of_tuned in each:
            p.copy_(of_source.lerp(of_target, strength) + (of_tuned - of_source))
    return mixed


def tune(source, w, images, steps, lr=3e-4):
    """A copy of the source generator, all of whose weights learn to draw images [B, 3, R, R] from
    w [B, num_ws, w_dim]: pivotal tuning (PTI, arXiv 2106.05744), with `distance` for its LPIPS."""
    tuned = copy.deepcopy(source).requires_grad_()
    adam = torch.optim.Adam(tuned.parameters(), lr)
    for step in trange(steps, desc="PTI", disable=None):
        drawn = tuned.synthesis(w)
        loss = (drawn - images).square().mean() + distance(drawn, images).mean()
        if not loss.isfinite():
            raise ValueError(f"not finite at step {step} of PTI; wanted: fewer --pti")
        adam.zero_grad()
        loss.backward()
        adam.step()
    return tuned.requires_grad_(False)


@torch.no_grad()
def draw(generator, w):
    """w [n, num_ws, w_dim] -> images [n, 3, R, R], by fixed noise, untruncated."""
    w = w.to(generator.w_avg.device)
    return torch.cat([generator.synthesis(x).clamp(-1, 1).cpu() for x in w.split(8)])


def grid(rows, columns=8):
    """Rows of images [n, 3, R, R] -> uint8 [H, W, 3]: `columns` of all rows, then the next ones."""
    columns, lines = min(columns, len(rows[0])), []
    for parts in zip(*(row.split(columns) for row in rows), strict=True):
        for part in parts:
            line = torch.cat([*part], dim=-1)
            lines.append(F.pad(line, (0, (columns - len(part)) * line.shape[-2]), value=1))
    return as_pixels(torch.cat(lines, dim=-2))


# ----------------------------------------------------------------------------------------------
# What the command is given


def of_runs(runs, device):
    """The source generator of runs, their adapted ones, and the words of their targets.

    Raises ValueError, which names two runs, if they have different sources.
    """
    first, adapted, words = None, [], []
    for run in runs:
        path = find_generator(run)
        if path is None:
            raise ValueError(f"{run} is no finished run; wanted: a folder with a generator.pt")
        settings = read_config(run)
        refuse_diffusion(run, settings)
        source, target = generators(settings, path, device)
        if shapes(source) != shapes(target):
            raise ValueError(f"{path} is of another network; wanted: that of the run's generator")
        adapted.append(target)
        words.append(settings.target.strip())
        of_class = f", class {settings.class_index}" * bool(source.c_dim)
        name = (settings.generator or "the miniature's") + of_class
        what = digest(source), settings.class_index
        first = first or (source, what, name)
        if what != first[1]:
            found = f"{runs[0]} adapts {first[2]}, and {run} adapts {name}"
            raise ValueError(f"{found}; wanted: runs of one source generator")
    return first[0], adapted, words


def shapes(generator):
    return [x.shape for x in generator.parameters()]


def names_of(runs):
    """Of files: those of the folders, with a number where another has it."""
    names = ["picture", "inversion"]
    for run in runs:
        name, i = os.path.basename(os.path.abspath(run)), 0  # of A/.., too
        while (new := f"{name}-{i}" if i else name) in names:
            i += 1
        names.append(new)
    return names[2:]


def read_all(paths, source):
    """w [n, num_ws, w_dim] of files, and their pictures [n, 3, R, R], None if one has none."""
    found = [read_w(path, source) for path in paths]
    w, squares = zip(*found, strict=True)
    return torch.cat(w), None if any(x is None for x in squares) else torch.stack(squares)


def read_w(path, source):
    """A projected_w.npz -> w [1, num_ws, w_dim], and its picture [3, R, R], or None if it has none.
    [num_ws, w_dim] passes, too.

    Raises CheckpointError, of one line, if it has no such w, or one of another generator. Nothing
    in the file is executed.
    """
    shape = (1, source.num_ws, source.w_dim)
    wanted = f"a .npz with w {list(shape)} of this generator, as `invert` writes"

    def parse(data, notes):
        if not data.startswith(b"PK"):
            raise CheckpointError(f"no .npz; wanted: {wanted}")
        file = np.load(io.BytesIO(data), allow_pickle=False)
        if "w" not in file:
            raise CheckpointError(f"there is no w in it; wanted: {wanted}")
        w = file["w"]
        if w.shape not in (shape, shape[1:]) or w.dtype.kind != "f":
            raise CheckpointError(f"its w is {list(w.shape)}, {w.dtype}; wanted: {wanted}")
        if not np.isfinite(w).all():
            raise CheckpointError(f"its w is not finite; wanted: {wanted}")
        if "generator" in file and (of := str(file["generator"])) != (own := digest(source)):
            found = f"its w is of the generator {of[:12]}, the run's source is {own[:12]}"
            raise CheckpointError(f"{found} (SHA-256); wanted: {wanted}")
        square = None
        size = (source.resolution, source.resolution, 3)
        image = file["image"] if "image" in file else None
        if image is not None and image.shape == size and image.dtype == np.uint8:
            square = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
        return torch.from_numpy(w.astype(np.float32)).view(shape), square

    return read_file(path, wanted, parse)
