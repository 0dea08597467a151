"""The figures of the notebooks: `pictures`, and `show` for panels side by side.

A panel is a function that draws into the axes it is given: one of those that `lines`, `bars`,
`histogram` and `heat` return, or a notebook's own. Their other keywords go to `ax.set`.
"""

import io
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Image as Shown
from IPython.display import display
from PIL import Image

STYLE = plt.style.context(Path(__file__).with_name("ipl.mplstyle"))


def put(figure):
    """Into the page, in 256 colours, which no eye misses and make a file a third as large."""
    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", bbox_inches="tight")
    plt.close(figure)
    Image.open(whole).convert("RGB").quantize(256, kmeans=1).save(small, "png")
    display(Shown(small.getvalue()))


@STYLE
def show(*panels, size=(8, 3), **grid):
    """One figure of all panels. grid, for plt.subplots: sharey=True, width_ratios=(2, 1) ..."""
    grid = {"nrows": 1, "ncols": len(panels) // grid.get("nrows", 1), **grid}
    figure, axes = plt.subplots(figsize=size, squeeze=False, **grid)
    for ax, panel in zip(axes.flat, panels, strict=True):
        panel(ax)
    put(figure)


@STYLE
def pictures(rows, columns=(), notes=None):
    """Images as one picture, each 128 pixels wide. rows: {name: images [n, 3, R, R] in [-1, 1]};
    columns: titles; notes: {name of a row: a text to stand below each of its images}."""
    R, n = 128, max(map(len, rows.values()))
    width, notes = R + 5, notes or {}
    tops = [0]
    for name in rows:
        tops.append(tops[-1] + width + 20 * (name in notes))
    canvas = torch.ones(tops[-1], n * width, 3)
    for top, images in zip(tops, rows.values(), strict=False):
        for c, image in enumerate(F.interpolate(images.detach().clamp(-1, 1), R)):
            canvas[top:, c * width :][:R, :R] = (image.permute(1, 2, 0) + 1) / 2

    inches = [side / plt.rcParams["figure.dpi"] for side in (n * width, tops[-1])]
    figure = plt.figure(figsize=inches, layout="none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.imshow(canvas)
    ax.set_yticks([top + R / 2 for top in tops[:-1]], list(rows))
    ax.set_xticks([c * width + R / 2 for c in range(len(columns))], columns)
    ax.tick_params(length=0, labelbottom=False, labeltop=True)
    ax.spines[:].set_visible(False)
    for top, name in zip(tops, rows, strict=False):
        for c, text in enumerate(notes.get(name, ())):
            place = c * width + R / 2, top + R + 2
            ax.text(*place, text, ha="center", va="top", fontsize=9)
    put(figure)


def lines(series, levels=None, style="-", **axis):
    """series: {label: values, or (x, y)}; levels: {label: y} of dotted lines across the panel."""

    def draw(ax):
        for label, values in series.items():
            ax.plot(*(values if isinstance(values, tuple) else (values,)), style, label=label)
        for label, y in (levels or {}).items():
            ax.axhline(y, color="0.4", linestyle=":", label=label)
        ax.set(**axis)
        ax.legend()

    return draw


def bars(groups, **axis):
    """groups: {label: {place: height}}; side by side at each place."""

    def draw(ax):
        width = 0.8 / len(groups)
        for i, (label, values) in enumerate(groups.items()):
            middle = (i - (len(groups) - 1) / 2) * width
            ax.bar([x + middle for x in range(len(values))], values.values(), width, label=label)
        ax.set_xticks(range(len(values)), values)
        ax.set(**axis)
        if len(groups) > 1:
            ax.legend(ncols=2)

    return draw


def histogram(series, bins, **axis):
    """series: {label: values}; bins: their edges."""

    def draw(ax):
        for label, values in series.items():
            ax.hist(values.flatten(), bins=bins, alpha=0.6, label=label)
        ax.set(**axis)
        ax.legend()

    return draw


def heat(values, label=None, rows=None, columns=None, image=None, **axis):
    """A matrix in colours, a colour bar with its label, names of rows and columns; image: keywords
    of ax.imshow."""

    def draw(ax):
        drawn = ax.imshow(values, **{"aspect": "auto", **(image or {})})
        for names, set_ticks in ((rows, ax.set_yticks), (columns, ax.set_xticks)):
            if names is not None:
                set_ticks(range(len(names)), names)
        ax.tick_params(length=0)
        ax.set(**axis)
        if label:
            ax.figure.colorbar(drawn, ax=ax, label=label)

    return draw
