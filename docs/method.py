"""Draws docs/method.svg, the two stages of the method: ``python docs/method.py``."""

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 830, 560
FROZEN, TRAINED, DATA, LOSS = "#e6ebf2", "#ffd8a8", "#ffffff", "#d8f0d8"
parts = []


def box(x, y, width, words, fill, height=34):
    """A box whose left upper corner is at x, y, with its words in the middle."""
    style = f'fill="{fill}" stroke="#445" rx="{4 if fill != DATA else 16}"'
    parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" {style}/>')
    lines = words.split("\n")
    for i, line in enumerate(lines):
        below = y + height / 2 + 5 + 17 * (i - (len(lines) - 1) / 2)
        text(x + width / 2, below, line)


def text(x, y, words, anchor="middle", size=14, weight="normal"):
    style = f'text-anchor="{anchor}" font-size="{size}" font-weight="{weight}"'
    parts.append(f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>')


def title(y, words):
    text(20, y, words, "start", 16, "bold")


def arrow(*points):
    """A line through points (x, y), with a head at the last."""
    path = " ".join(f"{x},{y}" for x, y in points)
    parts.append(
        f'<polyline points="{path}" fill="none" stroke="#445" stroke-width="1.4" '
        'marker-end="url(#head)"/>'
    )


def stage_1():
    title(34, "Stage 1: the mapper F learns to write a prompt for each image")
    box(20, 75, 60, "z", DATA)
    box(110, 75, 90, "mapping", FROZEN)
    box(230, 75, 60, "w", DATA)
    box(340, 50, 60, "F", TRAINED)
    box(430, 50, 170, "[P] photo, [P] anime", DATA)
    box(625, 50, 50, "E_T", FROZEN)
    box(340, 115, 90, "G source", FROZEN)
    box(460, 115, 100, "image x", DATA)
    box(625, 115, 50, "E_I", FROZEN)
    box(695, 50, 120, "each image\nits own prompt;\n[P] anime\nmeans anime", LOSS, 99)
    for start, end in ((80, 110), (200, 230)):
        arrow((start, 92), (end, 92))
    arrow((290, 92), (315, 92), (315, 67), (340, 67))
    arrow((315, 92), (315, 132), (340, 132))
    for y, stops in ((67, (400, 430, 600, 625, 675, 695)), (132, (430, 460, 560, 625, 675, 695))):
        for start, end in zip(stops[::2], stops[1::2], strict=True):
            arrow((start, y), (end, y))
    words = "(1) (2) prompts · (3) contrastive loss · (4) domain loss · (5) their sum"
    text(20, 180, words, "start", 13)


def stage_2():
    top = 225
    title(top + 9, "Stage 2: a copy of the generator follows each image's own direction")
    box(20, top + 110, 60, "w", DATA)
    rows = (
        (30, "F", FROZEN, "[P] photo", "E_T"), (75, "F", FROZEN, "[P] anime", "E_T"),
        (150, "G source", FROZEN, "photo", "E_I"), (195, "G target", TRAINED, "anime", "E_I"),
    )  # fmt: skip
    for y, network, fill, data, encoder in rows:
        y += top
        box(150, y, 95, network, fill)
        box(280, y, 110, data, DATA)
        box(425, y, 50, encoder, FROZEN)
        arrow((80, top + 127), (115, top + 127), (115, y + 17), (150, y + 17))
        arrow((245, y + 17), (280, y + 17))
        arrow((390, y + 17), (425, y + 17))
    for y, words in ((52, "step of texts ΔT"), (172, "step of images ΔI")):
        box(520, top + y, 142, words, DATA)
        for side in (-22, 23):
            arrow((475, top + y + 17 + side), (498, top + y + 17 + side),
                  (498, top + y + 17), (520, top + y + 17))  # fmt: skip
    box(695, top + 95, 120, "1 − cos(ΔI, ΔT)", LOSS, 68)
    arrow((662, top + 69), (679, top + 69), (679, top + 118), (695, top + 118))
    arrow((662, top + 189), (679, top + 189), (679, top + 140), (695, top + 140))
    words = "(6) steps · (7) directional loss · (8) layer choice · (9) moving average"
    text(20, top + 262, words, "start", 13)


def legend():
    y = 522
    for x, fill, words in (
        (20, TRAINED, "learns"), (150, FROZEN, "frozen"), (280, DATA, "data"), (380, LOSS, "loss"),
    ):  # fmt: skip
        box(x, y, 26, "", fill, 20)
        text(x + 34, y + 15, words, "start")
    text(815, y + 15, "NADA: one ΔT for all images, from the labels alone", "end")


def main():
    stage_1()
    stage_2()
    legend()
    head = '<marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
    Path(__file__).with_name("method.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif">\n'
        f'<defs>{head}<path d="M0,0 L9,4 L0,8 z" fill="#445"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#f8f9fb" rx="8"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
