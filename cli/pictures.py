"""The pictures of a run: samples.png, with labels, and curves.png."""

import contextlib
import io
import os
import textwrap
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

SIDE = 128  # least pixels of a sample: 64 are small on a screen
PANELS = {  # of each stage: {a panel: {a number of the history: the label of its line}}
    1: {
        "losses": {
            "loss": "weighted sum",
            "contrastive": "contrastive",
            "domain": "domain",
            "domain_source": "source's domain",
        },
        "images that find their own prompt": {"accuracy": ""},
        "length of the gradient": {"grad_norm": ""},
    },
    2: {
        "directional loss": {"loss": ""},
        "how far CLIP sees images move": {"delta_image_norm": ""},
        "length of the gradient": {"grad_norm": ""},
    },
    "few-shot": {
        "losses": {"loss": "generator", "loss_d": "discriminator"},
        "mean logits": {"real": "shots", "fake": "generated"},
        "length of the gradient": {"grad_norm": ""},
    },
}
DASHES = ("-", "--", ":", "-.")  # of several CLIPs


def png(picture, text=None):
    """uint8 [H, W, 3] -> the bytes of a file. text: {name: words}, for its text chunks."""
    from PIL import Image, PngImagePlugin

    buffer, chunks = io.BytesIO(), PngImagePlugin.PngInfo()
    for name, words in (text or {}).items():
        chunks.add_text(name, words)  # tEXt, or iTXt for what is not Latin
    Image.fromarray(picture.numpy()).save(buffer, "png", pnginfo=chunks)
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------
# Samples


def labelled(grid, resolution, source, target, note, between=()):
    """A grid of ipl.sample_grid with words: uint8 [H, W, 3] -> uint8, on white.

    Left of each row its word: source, target, or those of rows between; a gap after each target;
    below, the note.
    """
    zoom = max(1, SIDE // resolution)
    grid = grid.repeat_interleave(zoom, dim=0).repeat_interleave(zoom, dim=1)
    side, font = zoom * resolution, max(16, zoom * resolution // 8)
    words = [write(textwrap.fill(x, 14, max_lines=5), font) for x in (source, *between, target)]
    note, gap, margin = write(note, font), font // 2, max(x.shape[1] for x in words) + font
    pairs = grid.split(len(words) * side)
    height = len(pairs) * (len(words) * side + gap) + note.shape[0] + gap
    width = max(margin + grid.shape[1], note.shape[1] + 2 * gap)
    page = torch.full((height, width, 3), 255, dtype=torch.uint8)
    for i, pair in enumerate(pairs):
        top = i * (len(words) * side + gap)
        paste(page, pair, top, margin)
        for row, word in enumerate(words):
            middle = top + row * side + (side - word.shape[0]) // 2
            paste(page, word, max(0, middle), margin - word.shape[1] - gap)
    paste(page, note, height - note.shape[0] - gap // 2, width - note.shape[1] - gap)
    return page


def paste(page, picture, top, left):
    height, width, _ = picture.shape
    page[top : top + height, left : left + width] = picture[: len(page) - top]


def write(words, size):
    """Lines of words, flush right, black on white: uint8 [H, W, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(find_spec("matplotlib").origin).parent  # whose font knows more letters than PIL's
    font = ImageFont.truetype(folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), words, font)
    picture = Image.new("RGB", tuple(map(int, box[2:])), "white")
    ImageDraw.Draw(picture).multiline_text((0, 0), words, "black", font, align="right")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(
        picture.height, picture.width, 3
    )


# ----------------------------------------------------------------------------------------------
# Curves


@contextlib.contextmanager
def own_matplotlib():
    """matplotlib as it is by default, whatever environment, files and program around us set."""
    before = {name: os.environ.get(name) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    try:
        with contextlib.chdir("/"):  # a matplotlibrc here would count, and may be broken
            import matplotlib.style
        with matplotlib.style.context("default"):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def curves(history, floor=None):
    """A row for each stage, a panel for each kind of number: the bytes of a .png file.

    floor: the loss of true pairs in stage 2; training below it follows CLIP, not the domain.
    """
    stages = sorted({row["stage"] for row in history})
    with own_matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.3, 0.3 + 2.2 * len(stages)), dpi=100, layout="constrained")
        parts = figure.subfigures(len(stages), squeeze=False)[:, 0]
        for stage, part in zip(stages, parts, strict=True):
            part.suptitle(f"stage {stage}", x=0.01, ha="left", size=11, weight="bold")
            rows = [row for row in history if row["stage"] == stage]
            all_axes = part.subplots(1, len(PANELS[stage]))
            for axes, (panel, numbers) in zip(all_axes, PANELS[stage].items(), strict=True):
                draw_panel(axes, rows, numbers)
                axes.set_title(panel, size=9)
                if floor is not None and panel == "directional loss":
                    axes.axhline(floor, color="black", linestyle="--", label="true pairs")
                if "accuracy" in numbers:
                    axes.set_ylim(0, 1.03)
                    axes.yaxis.set_major_formatter("{x:.0%}")
                if axes.get_legend_handles_labels()[1]:
                    axes.legend(fontsize=7)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


def draw_panel(axes, rows, numbers):
    """A color for each of the numbers, {name: label}; other dashes for a further CLIP."""
    clips = sorted({row.get("clip", 0) for row in rows})
    for i, (name, label) in enumerate(numbers.items()):
        for clip in clips:
            values = [row[name] for row in rows if row.get("clip", 0) == clip]
            words = label * (clip == 0) or f"CLIP {clip + 1}" * (len(clips) > len(numbers))
            axes.plot(values, DASHES[clip % 4], color=f"C{i}", label=words or None, linewidth=1)
    axes.set_xlabel("step", size=8)
    axes.tick_params(labelsize=8)


def of_run(make):
    """{name: bytes} of the pictures that can be made. make: {name: a function of nothing}.

    One that cannot, for whatever reason of the surroundings, costs a warning and not the run.
    """
    found = {}
    for name, function in make.items():
        try:
            found[name] = function()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            warnings.warn(f"{name} could not be drawn ({why}); all else is there", stacklevel=2)
    return found
