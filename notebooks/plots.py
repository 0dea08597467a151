"""The figures of the notebooks: `pictures`, `show` for panels side by side, and `sliders`.

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


def put(figure, photos=False):
    """Into the page: photos as JPEG, else as PNG of 256 colours, a third as large as of all."""
    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", bbox_inches="tight")
    plt.close(figure)
    image = Image.open(whole).convert("RGB")
    if photos:
        image.save(small, "jpeg", quality=85, subsampling=0)
    else:
        image.quantize(256, kmeans=1).save(small, "png", optimize=True)
    display(Shown(small.getvalue()))


@STYLE
def show(*panels, size=(8, 3), **grid):
    """One figure of all panels. grid, for plt.subplots: sharey=True, width_ratios=(2, 1) ..."""
    grid = {"nrows": 1, "ncols": len(panels) // grid.get("nrows", 1), **grid}
    figure, axes = plt.subplots(figsize=size, squeeze=False, **grid)
    for ax, panel in zip(axes.flat, panels, strict=True):
        panel(ax)
    put(figure)


def enlarged(images, R):
    """Images [n, 3, r, r] in [-1, 1] -> [n, 3, R, R] in [0, 1]."""
    images = F.interpolate(images.detach(), (R, R), mode="bicubic", antialias=True)
    return (images.clamp(-1, 1) + 1) / 2


@STYLE
def pictures(rows, columns=(), notes=None, across=False):
    """Images as one picture, as wide as a page has room for. rows: {name: images [n, 3, R, R] in
    [-1, 1]}; columns: titles; notes: {name of a row: a text to stand below each of its images};
    across: the names stand above columns instead, and each row is a person."""
    notes = notes or {}
    if across:
        columns, persons = list(rows), zip(*rows.values(), strict=True)
        rows = {" " * i: torch.stack(person) for i, person in enumerate(persons)}
    n, tops = max(map(len, rows.values())), [0]
    R = min(190, (800 - 9 * max(map(len, rows))) // n - 5)
    width = R + 5
    for name in rows:
        tops.append(tops[-1] + width + 20 * (name in notes))
    canvas = torch.ones(tops[-1], n * width, 3)
    for top, images in zip(tops, rows.values(), strict=False):
        for c, image in enumerate(enlarged(images, R)):
            canvas[top:, c * width :][:R, :R] = image.permute(1, 2, 0)

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
    put(figure, photos=True)


def sliders(images, **choices):
    """A slider for each of the choices {name: values}; below them, images[chosen values], which are
    [n, 3, R, R]. Where there is no ipywidgets, nothing; on a page that nobody runs, neither."""
    try:
        import ipywidgets
    except ImportError:
        return
    shown = ipywidgets.Image()

    def turn(change=None):
        row = torch.cat([*enlarged(images[tuple(x.value for x in knobs)], 256)], dim=2)
        file = io.BytesIO()
        Image.fromarray((255 * row).byte().permute(1, 2, 0).numpy()).save(file, "png")
        shown.value = file.getvalue()

    knobs = [
        ipywidgets.SelectionSlider(options=values, value=values[-1], description=name)
        for name, values in choices.items()
    ]
    for knob in knobs:
        knob.observe(turn, "value")
    turn()
    display(ipywidgets.VBox([*knobs, shown]))


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
