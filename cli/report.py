"""python ipl.py report: one HTML file of one or several finished runs, to be sent to anybody."""

import base64
import html
import io
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import ipl
from checkpoints.files import write_atomically
from cli import diffusion, pictures, processes
from cli.adapt import has_truth
from cli.run_folder import find_generator, made_by, make_folder, read_config
from cli.sample import generators, latents_of, seeds_of
from cli.settings import check, command_of, expand, flag, preset_of
from miniature import faces, plain_label
from miniature.judge import load_judge
from miniature.truth import Truth, as_pixels

MOST_SEEDS, MOST_BYTES, SIDE = 64, 5_000_000, 256
PLACES = {"out", "overwrite", "resume", "save_every", "samples"}  # change no number of a run
FIGURES = {  # of the judge: its words, how it is written
    "target": ("target domain ↑", ".0%"),
    "attributes": ("attributes kept ↑", ".0%"),
    "identity": ("same person ↑", ".0%"),
    "diversity": ("diversity", ".2f"),
    "structure": ("structure kept", ".2f"),
}
STYLE = """
:root { color-scheme: light dark; --text: #1b1b1f; --page: #fff; --quiet: #5c5c66; --line: #d5d5dc;
        --shade: #f4f4f7 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8ee; --page: #17171b; --quiet: #a3a3af; --line: #3a3a44; --shade: #22222a } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 78rem; color: var(--text); background: var(--page);
       font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { margin-top: 2.2rem; font-size: 1.2rem }
small, p { color: var(--quiet) } small { display: block; font-weight: normal }
.scroll { overflow-x: auto } table { border-collapse: collapse; overflow-wrap: normal }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left }
th[scope=row] { white-space: nowrap }
td { min-width: 6rem; font-variant-numeric: tabular-nums }
.grid th, .grid td { min-width: 0; padding: 1px; border: 0; text-align: center }
.grid th[scope=row] { position: sticky; left: 0; min-width: 5rem; max-width: 11rem;
  padding-right: .6rem; text-align: right; background: var(--page); overflow-wrap: anywhere;
  white-space: normal }
.grid img { display: block; width: clamp(72px, 9.5vw, 128px) }
figure { margin: 1rem 0 } figure img { max-width: 100%; height: auto; background: #fff }
pre { padding: .8rem; background: var(--shade); overflow-x: auto }
"""


def report(
    run: tyro.conf.UseAppendAction[tuple[Path, ...]], out: Path = Path("report.html"),
    seeds: str = "0-7", truncation_psi: float | None = None, device: str = "auto",
):  # fmt: skip
    """Write one HTML file of runs of the same source: pictures of the same latents, figures,
    settings, curves and commands. It needs nothing beside it, and runs nothing.

    Args:
        run: Run folder; several for a comparison.
        out: File to write, a .html file.
        seeds: Latents, as 0-7 or 1,5,9-12: each is numpy's RandomState(seed).randn(1, z_dim).
        truncation_psi: Truncation of the pictures. None: that of the first run.
        device: auto, cpu, cuda or cuda:<n>.
    """
    folders, out = [Path(expand(x)) for x in run], Path(expand(out))
    found = [seen(folder) for folder in folders]
    check_fit(folders, found)
    numbers = seeds_of(seeds, most=MOST_SEEDS)
    if out.suffix != ".html" or out.is_dir():
        raise ValueError(f"--out {out} is no name of a page; wanted: a .html file")
    psi = found[0].truncation_psi if truncation_psi is None else truncation_psi
    if not abs(psi) <= 1000:
        raise ValueError(f"--truncation-psi must be between -1000 and 1000, not {psi}")
    device = processes.pick_device(device)
    trainings = [training_of(folder) for folder in folders]
    make_folder(out.parent)
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    if len({*names}) < len(names):
        names = [*map(str, folders)]
    rows, judged = pictures_and_figures(folders, found, names, numbers, psi, device)
    kinds = [*map(made_by, folders)]
    page = page_of(found, names, seeds, psi, rows, judged, trainings, kinds).encode(
        errors="backslashreplace"
    )
    if len(page) > MOST_BYTES:
        raise ValueError(f"{out} would have {len(page):,} bytes; wanted: fewer --seeds or --run")
    write_atomically(out, lambda aside: aside.write_bytes(page))
    print(f"{out}: {len(folders)} run{'s' * (len(folders) > 1)}, {len(page) / 1e6:.1f} MB")


def seen(folder):
    """The Settings of a finished run."""
    if find_generator(folder) is None:
        raise ValueError(f"{folder} is no finished run; wanted: a folder with a generator.pt")
    settings = read_config(folder)
    check(settings)
    if diffusion.asked_for(settings):
        why = "is the run of a diffusion model, which has no seeds"
        raise ValueError(f"{folder} {why}; wanted: that of a GAN, or python ipl.py sample for it")
    return settings


def check_fit(folders, found):
    """That the runs can stand under one row of source pictures, or a ValueError."""
    if not folders:
        raise ValueError("there is no --run; wanted: the folder of a finished run")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("--run names the same folder twice; wanted: each once")
    for folder, settings in zip(folders, found, strict=True):
        a, b = ((x.generator or "the miniature", x.class_index) for x in (found[0], settings))
        if a != b:
            a, b = (f"{x}" + f", class {k}" * (k is not None) for x, k in (a, b))
            wanted = "runs of one source, or a report for each"
            raise ValueError(f"{folders[0]} is of {a}, but {folder} of {b}; wanted: {wanted}")


def training_of(folder, last=10):
    """The curves of a run's history, the bytes of a .png file, and its losses at the end, in
    words: means of the last steps."""
    path = folder / "history.jsonl"
    try:
        history = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines()]
        losses = {}
        for row in history:
            clip = f", CLIP {row['clip'] + 1}" if "clip" in row else ""
            losses.setdefault(f"stage {row['stage']}{clip}", []).append(row["loss"])
        ends = [f"{stage} {np.mean(x[-last:]):.3f}" for stage, x in losses.items()]
        return pictures.curves(history), f"loss of the last {last} steps: {'; '.join(ends)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"no history of a run ({type(error).__name__})"
        raise ValueError(f"{path}: {why}; wanted: that of a finished run") from error


# ----------------------------------------------------------------------------------------------
# Pictures and figures


@torch.no_grad()
def pictures_and_figures(folders, found, names, numbers, psi, device, n=64):
    """-> rows (word, small words, pixels [N, 3, R, R]) and rows of the judge's table, or none."""
    z, rows, judged, truths, judge = None, [], [], {}, None
    bar = tqdm([*zip(folders, found, strict=True)], "runs", disable=None)
    for i, (folder, settings) in enumerate(bar):
        source, adapted = generators(settings, find_generator(folder), device)
        if z is None:
            z = latents_of(numbers, source.z_dim)
            w = ipl.truncate(source.mapping(z.to(device)), source.w_avg, psi)
            words = ", ".join(dict.fromkeys(x.source.strip() for x in found))
            rows.append((words, "source", draw(source, w)))
        word = plain_label(settings.target)
        rows.append((settings.target.strip(), names[i], draw(adapted, w)))
        if not has_truth(settings):
            continue
        last = word not in [plain_label(x.target) for x in found[i + 1 :] if has_truth(x)]
        if last and psi == 1:  # else these are other persons
            truth = faces.render(faces.persons_from_z(z), faces.styles_of(word, len(z)))
            rows.append((word, "the truth", as_pixels(truth)))
        kind = plain_label(settings.source)
        judge = judge or load_judge()
        if kind not in truths:
            truths[kind] = Truth(n, 70_000, judge, source.cpu(), kind)
        truth = truths[kind]
        if word not in [row[0] for row in judged]:
            judged.append((word, "source", truth.figures(truth.generated, word)))
        judged.append((word, names[i], truth.figures(truth.pictures(adapted.cpu()), word)))
        if last:
            best = truth.figures(truth.draw(word), word, truth.photos)
            judged.append((word, "the truth", best))
    return rows, judged


def draw(generator, w):
    """uint8 [N, 3, R, R], with R at most SIDE."""
    parts = []
    for some in w.split(8):
        x = generator.synthesis(some).clamp(-1, 1)
        if x.shape[-1] > SIDE:
            x = F.interpolate(x, (SIDE, SIDE), mode="area")
        if not x.isfinite().all():
            raise ValueError("images that are not finite; wanted: generators with sound weights")
        parts.append(as_pixels(x))
    return torch.cat(parts)


# ----------------------------------------------------------------------------------------------
# The page


class Html(str):
    """Text that is HTML; any other is escaped."""


def escaped(x):
    return x if isinstance(x, Html) else Html(html.escape(str(x)))


def picture(data, alt):
    """The bytes of a .png or .jpg file -> an <img>."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Html(f'<img src="{source}" alt="{escaped(alt)}">')


def encoded(pixels):
    """uint8 [3, R, R] -> a file: .png, or .jpg where that would be large."""
    if pixels.shape[-1] <= 128:
        return pictures.png(pixels.permute(1, 2, 0))
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def table(head, rows, kind=""):
    """Each row begins with its own head."""
    lines = ["".join(f'<th scope="col">{escaped(x)}</th>' for x in head)]
    for first, *cells in rows:
        start = f'<th scope="row">{escaped(first)}</th>'
        lines.append(start + "".join(f"<td>{escaped(x)}</td>" for x in cells))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    # of a region that scrolls, so that a keyboard can reach it
    return f'<div class="scroll" tabindex="0"><table class="{kind}">\n{body}\n</table></div>'


def page_of(found, names, seeds, psi, rows, judged, trainings, kinds):
    """The whole file."""
    sources, targets = ({x: None for x in words} for words in (
        [x.source.strip() for x in found], [x.target.strip() for x in found]
    ))  # fmt: skip
    title = escaped(f"{', '.join(sources)} to {', '.join(targets)}")
    numbers = seeds_of(seeds, most=MOST_SEEDS)
    grid = [
        (
            Html(f"{escaped(word)}<small>{escaped(small)}</small>"),
            *(picture(encoded(x), f"{word}, {small}, seed {seed}")
              for seed, x in zip(numbers, pixels, strict=True)),
        )
        for word, small, pixels in rows
    ]  # fmt: skip
    parts = [
        f"<h1>{title}</h1>",
        f"<p>The same latents in every row: seeds {escaped(seeds)}, truncation {psi:g}.</p>",
        table(["", *(f"seed {x}" for x in numbers)], grid, "grid"),
    ]
    if judged:
        head = ["target", "pictures of", *(words for words, _ in FIGURES.values())]
        figures = [
            (word, who, *(format(values[x], form) for x, (_, form) in FIGURES.items()))
            for word, who, values in judged
        ]
        note = "What the embedded judge sees in 64 other persons, whose latents no training uses."
        parts += ["<h2>Figures</h2>", f"<p>{note}</p>", table(head, figures)]
    settings = ["<p>Runs of other commands: in the config.json of each.</p>"]
    settings = settings if any(kinds) else settings_of(found, names)
    parts += ["<h2>Settings</h2>", *settings, "<h2>Training</h2>"]
    for name, (data, losses) in zip(names, trainings, strict=True):
        caption = f"<figcaption>{escaped(name)}<small>{escaped(losses)}</small></figcaption>"
        image = picture(data, f"losses of each step of {name}")
        parts.append(f"<figure>{caption}{image}</figure>")
    parts.append("<h2>Commands</h2>")
    for kind, settings in zip(kinds, found, strict=True):
        words = f"{kind}, with its config.json" if kind else command_of(settings)
        parts.append(f"<pre>{escaped(words)}</pre>")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def defaults_of(settings):
    """The Settings that a run with this generator starts from."""
    return preset_of(["--generator", settings.generator] if settings.generator else [])


def settings_of(found, names):
    """Tables of the settings that differ between the runs, and of those that differ from the
    defaults in all of them."""
    default, values = asdict(defaults_of(found[0])), [asdict(x) for x in found]
    between, all_alike = [], []
    for name in default.keys() - PLACES:
        column = [x[name] for x in values]
        if any(x != column[0] for x in column):
            between.append((flag(name), show(default[name]), *map(show, column)))
        elif column[0] != default[name]:
            all_alike.append((flag(name), show(default[name]), show(column[0])))
    if between:
        yield "<p>Different between the runs:</p>"
        yield table(["", "default", *names], sorted(between))
    if all_alike:
        yield f"<p>{'In all runs other' if len(found) > 1 else 'Other'} than the default:</p>"
        yield table(["", "default", "here"], sorted(all_alike))
    if not between and not all_alike:
        yield "<p>All are the defaults.</p>"


def show(value):
    return (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "(none)"
