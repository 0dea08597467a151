"""The portrait world: persons x style cues -> 64x64 pictures, in vectorised torch.

A *person* is a handful of categories (skin, hair, glasses ...) and proportions (head width, turn of the head ...).
A *style* is one choice for each of six cues: eyes, colors, shading, lines, background, texture. A *domain* ("photo",
"anime" ...) is the bundle of all six cues of that name, so the same person can be drawn in every domain, and mixtures
("a photo with anime eyes") exist too. Everything is painted back to front from signed distances: a shape is
``d [B, H, W]``, negative inside, and one pixel of ``d`` around zero gives the antialiased edge.

Shapes: B persons, H = W = size. Coordinates run over [-1, 1], x to the right, y down. Colours are RGB in [0, 1] while
painting; pictures come out in [-1, 1].
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

DOMAINS = (
    "photo",
    "anime",
    "sketch",
    "pixel art",
    "watercolor",
    "ukiyo-e",
    "zombie",
    "elderly",
    "monster",
)
CUES = ("eyes", "colors", "shading", "lines", "background", "texture")

CATEGORIES = {  # factor: (names, probabilities)
    "skin": (("pale", "light", "tan", "brown", "dark"), (0.2, 0.2, 0.2, 0.2, 0.2)),
    "hair_color": (
        ("black", "brown", "red", "blond", "grey", "blue"),
        (0.2, 0.16, 0.17, 0.17, 0.12, 0.18),
    ),
    "hair": (
        ("bald", "short", "long", "curly", "spiky", "ponytail"),
        (0.1, 0.2, 0.22, 0.18, 0.15, 0.15),
    ),
    "glasses": (("none", "glasses", "sunglasses"), (0.6, 0.25, 0.15)),
    "beard": (("none", "moustache", "beard"), (0.64, 0.16, 0.2)),
    "mouth": (("neutral", "smile", "open"), (0.34, 0.36, 0.3)),
    "hat": (("none", "cap", "hat"), (0.68, 0.16, 0.16)),
    "hat_color": (("red", "green", "blue", "yellow", "white"), (0.2, 0.2, 0.2, 0.2, 0.2)),
    "clothes": (
        ("red", "green", "blue", "yellow", "white", "black"),
        (0.17, 0.17, 0.17, 0.17, 0.16, 0.16),
    ),
    "background": (
        ("blue", "pink", "green", "yellow", "purple", "grey"),
        (0.17, 0.17, 0.17, 0.17, 0.16, 0.16),
    ),
}
PROPORTIONS = (
    "head_width",
    "head_height",
    "turn",
    "eye_distance",
    "eye_size",
    "nose",
    "mouth_width",
    "brow",
    "hair_length",
    "light",
)
COLOR_FACTORS = (
    "skin",
    "hair_color",
    "hat_color",
    "clothes",
    "background",
)  # what fine layers may change
W_DIM = (
    128  # 38 places for the categories, 10 proportions; the rest is room for the mapping network
)

SKIN = (
    (0.97, 0.85, 0.77),
    (0.93, 0.74, 0.60),
    (0.80, 0.58, 0.41),
    (0.60, 0.39, 0.26),
    (0.38, 0.24, 0.17),
)
HAIR = (
    (0.11, 0.10, 0.12),
    (0.38, 0.23, 0.13),
    (0.78, 0.29, 0.10),
    (0.90, 0.74, 0.34),
    (0.70, 0.70, 0.72),
    (0.20, 0.33, 0.82),
)
CLOTH = (
    (0.78, 0.15, 0.15),
    (0.16, 0.52, 0.25),
    (0.18, 0.30, 0.74),
    (0.92, 0.76, 0.22),
    (0.93, 0.93, 0.93),
    (0.15, 0.15, 0.18),
)
BACKDROP = (
    (0.45, 0.62, 0.82),
    (0.85, 0.58, 0.68),
    (0.47, 0.70, 0.50),
    (0.85, 0.76, 0.45),
    (0.62, 0.50, 0.78),
    (0.66, 0.67, 0.70),
)
MONSTER_SKIN = (
    (0.45, 0.80, 0.30),
    (0.25, 0.62, 0.85),
    (0.66, 0.35, 0.80),
    (0.85, 0.22, 0.20),
    (0.95, 0.55, 0.12),
)


@dataclass(frozen=True)
class Persons:
    """B persons: ``categories`` [B, 10] indices into CATEGORIES, ``proportions`` [B, 10] in [-1, 1]."""

    categories: torch.Tensor
    proportions: torch.Tensor

    def __len__(self):
        return len(self.categories)

    def __getitem__(self, index):
        return Persons(self.categories[index], self.proportions[index])

    def category(self, name):
        """[B] index of the named category."""
        return self.categories[:, list(CATEGORIES).index(name)]

    def proportion(self, name):
        """[B, 1, 1] value of the named proportion, ready to broadcast over pixels."""
        return self.proportions[:, PROPORTIONS.index(name), None, None]


def persons_from_z(z):
    """Read persons off latents z [B, >= 20] ~ N(0, I): one coordinate a factor, cut at the normal's quantiles."""
    u = 0.5 * (
        1 + torch.erf(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt() / math.sqrt(2))
    )  # [B, z] in (0, 1)
    cuts = [
        torch.tensor(p, device=z.device, dtype=z.dtype).cumsum(0)[:-1]
        for _, p in CATEGORIES.values()
    ]
    categories = torch.stack(
        [torch.bucketize(u[:, i].contiguous(), cut) for i, cut in enumerate(cuts)], dim=1
    )
    n = len(CATEGORIES)
    return Persons(categories, 2 * u[:, n : n + len(PROPORTIONS)] - 1)


def sample_persons(n, generator=None):
    """n persons drawn at random from a CPU ``torch.Generator``."""
    return persons_from_z(torch.randn(n, W_DIM, generator=generator))


def persons_to_w(persons):
    """The generator's code of a person, w [B, W_DIM]: +-1 thermometers of the categories, then the proportions.

    A category with K values takes K - 1 places, place k telling whether the index exceeds k: one step of one latent
    coordinate each, which is what makes the code learnable from z.
    """
    steps = [
        (
            persons.category(k)[:, None]
            > torch.arange(len(names) - 1, device=persons.categories.device)
        ).float()
        * 2
        - 1
        for k, (names, _) in CATEGORIES.items()
    ]
    w = torch.cat([*steps, persons.proportions], dim=1)
    return F.pad(w, (0, W_DIM - w.shape[1]))


def styles_of(domain, n):
    """The cue table [n, 6] of a pure domain, given by name or index."""
    index = DOMAINS.index(domain) if isinstance(domain, str) else int(domain)
    return torch.full((n, len(CUES)), index)


# ----------------------------------------------------------------------------
# Style tables: one row a domain, in the order of DOMAINS

EYES = torch.tensor(
    [  # half width, half height, iris radius, pupil share, highlight, iris red, iris yellow, lash
        [0.085, 0.052, 0.045, 0.55, 0.35, 0, 0, 0.3],
        [0.135, 0.150, 0.105, 0.50, 1.0, 0, 0, 1.0],
        [0.085, 0.055, 0.042, 0.95, 0.30, 0, 0, 0.8],
        [0.095, 0.095, 0.080, 0.99, 0.00, 0, 0, 0.5],
        [0.088, 0.060, 0.055, 0.60, 0.20, 0, 0, 0.2],
        [0.105, 0.026, 0.026, 0.95, 0.00, 0, 0, 1.0],
        [0.100, 0.080, 0.042, 0.35, 0.00, 1, 0, 0.0],
        [0.078, 0.036, 0.038, 0.60, 0.25, 0, 0, 0.2],
        [0.100, 0.078, 0.068, 0.30, 0.00, 0, 1, 0.6],
    ]
)
COLORS = torch.tensor(
    [  # saturation, contrast, brightness, towards paper, towards print ink, zombie, grey hair, monster
        [0.95, 1.0, 0.00, 0.00, 0.0, 0, 0, 0],
        [1.40, 1.1, 0.06, 0.00, 0.0, 0, 0, 0],
        [0.12, 1.0, 0.08, 0.25, 0.0, 0, 0, 0],
        [1.25, 1.2, 0.00, 0.00, 0.0, 0, 0, 0],
        [0.85, 0.8, 0.05, 0.40, 0.0, 0, 0, 0],
        [0.60, 0.8, 0.00, 0.00, 0.5, 0, 0, 0],
        [0.65, 0.9, -0.06, 0.00, 0.0, 1, 0, 0],
        [0.80, 1.0, 0.02, 0.00, 0.0, 0, 1, 0],
        [1.10, 1.0, 0.00, 0.00, 0.0, 0, 0, 1],
    ]
)
SHADING = torch.tensor(
    [  # smooth, cel, hatch, eye sockets, hair strands, hair shine, blush
        [1.0, 0.0, 0.0, 0.10, 1.0, 0.0, 0.3],
        [0.0, 1.0, 0.0, 0.00, 0.0, 1.0, 1.0],
        [0.1, 0.0, 1.0, 0.00, 0.0, 0.0, 0.0],
        [0.0, 0.8, 0.0, 0.00, 0.0, 0.4, 0.0],
        [0.4, 0.0, 0.0, 0.05, 0.3, 0.0, 1.2],
        [0.0, 0.0, 0.0, 0.00, 0.5, 0.0, 0.0],
        [1.4, 0.0, 0.0, 0.75, 1.0, 0.0, 0.0],
        [1.1, 0.0, 0.0, 0.45, 1.3, 0.0, 0.2],
        [1.2, 0.0, 0.0, 0.30, 0.8, 0.0, 0.0],
    ]
)
LINES = torch.tensor(
    [  # width, opacity, red, green, blue, scars, wrinkles, horns and fangs
        [0.000, 0.0, 0.1, 0.1, 0.1, 0, 0, 0],
        [0.046, 1.0, 0.10, 0.07, 0.12, 0, 0, 0],
        [0.044, 1.0, 0.16, 0.16, 0.18, 0, 0, 0],
        [0.056, 0.9, 0.08, 0.06, 0.10, 0, 0, 0],
        [0.030, 0.25, 0.35, 0.25, 0.30, 0, 0, 0],
        [0.034, 1.0, 0.14, 0.16, 0.36, 0, 0, 0],
        [0.000, 0.0, 0.1, 0.1, 0.1, 1, 0, 0],
        [0.000, 0.0, 0.1, 0.1, 0.1, 0, 1, 0],
        [0.000, 0.0, 0.1, 0.1, 0.1, 0, 0, 1],
    ]
)
BACKGROUND = torch.tensor(
    [  # vignette, lighten, paper, print bands, speed lines, darken, torn edge
        [1.0, 0.00, 0.0, 0.0, 0.0, 0.00, 0.0],
        [0.0, 0.32, 0.0, 0.0, 1.0, 0.00, 0.0],
        [0.0, 0.00, 0.8, 0.0, 0.0, 0.00, 0.0],
        [0.0, 0.15, 0.0, 0.0, 0.0, 0.00, 0.0],
        [0.0, 0.20, 0.2, 0.0, 0.0, 0.00, 1.0],
        [0.0, 0.00, 0.0, 1.0, 0.0, 0.00, 0.0],
        [1.4, 0.00, 0.0, 0.0, 0.0, 0.28, 0.0],
        [0.6, 0.08, 0.1, 0.0, 0.0, 0.00, 0.0],
        [1.6, 0.00, 0.0, 0.0, 0.0, 0.12, 0.0],
    ]
)
TEXTURE = torch.tensor(
    [  # grain, pixels, blotches, wood, blur
        [0.00, 0.0, 0.0, 0.0, 0.5],
        [0.00, 0.0, 0.0, 0.0, 0.0],
        [0.012, 0.0, 0.0, 0.0, 0.0],
        [0.00, 1.0, 0.0, 0.0, 0.0],
        [0.008, 0.0, 0.6, 0.0, 0.3],
        [0.006, 0.0, 0.0, 0.6, 0.0],
        [0.025, 0.0, 0.2, 0.0, 0.2],
        [0.006, 0.0, 0.0, 0.0, 0.6],
        [0.010, 0.0, 0.2, 0.0, 0.2],
    ]
)


# ----------------------------------------------------------------------------
# Signed distances, all [B, H, W] in units of the picture's half width


def _ellipse(x, y, a, b):
    """Distance to an ellipse with half axes a, b (first-order exact near the edge)."""
    q = ((x / a).square() + (y / b).square()).clamp_min(1e-6).sqrt()
    g = ((x / a**2).square() + (y / b**2).square()).clamp_min(1e-6).sqrt()
    return q * (q - 1) / g


def _box(x, y, a, b, r=0.0):
    """Distance to a box with half sides a, b and corner radius r."""
    dx, dy = x.abs() - a + r, y.abs() - b + r
    return (
        (dx.clamp_min(0).square() + dy.clamp_min(0).square() + 1e-12).sqrt()
        + torch.maximum(dx, dy).clamp_max(0)
        - r
    )


def _stroke(x, y, x0, y0, x1, y1, r):
    """Distance to a round-capped stroke of half width r from (x0, y0) to (x1, y1)."""
    px, py, bx, by = x - x0, y - y0, x1 - x0, y1 - y0
    t = ((px * bx + py * by) / (bx * bx + by * by + 1e-9)).clamp(0, 1)
    return ((px - t * bx).square() + (py - t * by).square() + 1e-12).sqrt() - r


def _choose(index, *options):
    """Per person, the option of its index: index [B], options [B, H, W] -> [B, H, W]."""
    out = options[-1]
    for k, option in enumerate(options[:-1]):
        out = torch.where((index == k)[:, None, None], option, out)
    return out


# ----------------------------------------------------------------------------
# Painting


class _Canvas:
    """A picture being painted back to front, with the light and line style of every person in the batch."""

    def __init__(self, image, x, y, shading, lines, light, pixel):
        self.image, self.x, self.y, self.pixel = image, x, y, pixel
        self.shading, self.lines, self.light = shading, lines, light

    def cover(self, d):
        return (0.5 - d / self.pixel).clamp(0, 1)

    def blend(self, color, alpha):
        """Lay color [B, 3, 1, 1] or [B, 3, H, W] over the picture with alpha [B, H, W]."""
        self.image = torch.lerp(self.image, color.expand_as(self.image), alpha[:, None])

    def outline(self, d, strength=1.0, width=1.0):
        """Draw the lines cue along the edge d = 0."""
        half = self.lines[:, 0] * width / 2
        self.blend(self.lines[:, 2:5], self.cover(d.abs() - half) * self.lines[:, 1] * strength)

    def paint(self, color, d, cx=0.0, cy=0.0, size=0.4, line=1.0, shade=1.0, inner=None):
        """Fill d < 0 with color [B, 3, 1, 1], lit by the shading cue around (cx, cy), and draw its outline."""
        smooth, cel = self.shading[:, 0], self.shading[:, 1]
        toward = (
            (self.x - cx) * self.light + (self.y - cy) * 0.35
        ) / size  # [B, H, W], > 0 away from the light
        rim = (1 + d / (0.5 * size)).clamp(0, 1).square()
        tone = 1 - shade * smooth * (0.16 * toward.clamp(-1, 1.2) + 0.20 * rim)
        tone = tone - shade * cel * 0.26 * (toward - 0.42).div(self.pixel * 2 / size).add(
            0.5
        ).clamp(0, 1)
        if inner is not None:
            tone = tone * inner
        self.blend((color * tone[:, None]).clamp(0, 1), self.cover(d))
        if line:
            self.outline(d, line)


def _luminance(c):
    return (c * c.new_tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1, keepdim=True)


def _recolor(c, t):
    """The colors cue on a palette colour c [B, 3, 1, 1]: t is the COLORS row [B, 8, 1, 1]."""
    gray = _luminance(c)
    c = gray + (c - gray) * t[:, 0:1]
    c = (c - 0.5) * t[:, 1:2] + 0.5 + t[:, 2:3]
    c = torch.lerp(c, c.new_tensor([0.98, 0.96, 0.92])[:, None, None], t[:, 3:4])
    ink = torch.lerp(
        c.new_tensor([0.20, 0.22, 0.38])[:, None, None],
        c.new_tensor([0.93, 0.82, 0.62])[:, None, None],
        gray,
    )
    return torch.lerp(c, ink, t[:, 4:5]).clamp(0, 1)


def render(persons, styles, size=64, rng=None):
    """Draw persons in styles.

    persons: B of them; styles: [B, 6] domain index of each cue (see ``styles_of``); size: side in pixels;
    rng: a CPU torch.Generator for paper, grain and blotches (fixed when None; the photo domain has none of them).
    Returns [B, 3, size, size] in [-1, 1].
    """
    B, S, device = len(persons), size, persons.proportions.device
    rng = rng if rng is not None else torch.Generator().manual_seed(0)
    styles = styles.to(device)
    rows = [
        table.to(device)[styles[:, i]][:, :, None, None]
        for i, table in enumerate((EYES, COLORS, SHADING, LINES, BACKGROUND, TEXTURE))
    ]
    eyes, colors, shading, lines, backdrop, texture = rows
    axis = (torch.arange(S, device=device) + 0.5) * 2 / S - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x, y = 0.86 * x[None], 0.86 * y[None] + 0.06  # the face fills the frame
    pixel = 0.86 * 2 / size  # every edge is antialiased over one pixel

    def palette(table, name):
        return torch.tensor(table, device=device)[persons.category(name)][:, :, None, None]

    hair_style, hat_style = persons.category("hair"), persons.category("hat")
    turn, light = persons.proportion("turn"), persons.proportion("light") * 0.3 + 0.75
    monster, grey_hair, undead = colors[:, 7:8], colors[:, 6:7], colors[:, 5:6]

    raw_skin = palette(SKIN, "skin")
    skin = _recolor(raw_skin, colors)
    tone = _luminance(raw_skin)
    skin = torch.lerp(
        skin,
        skin.new_tensor([0.40, 0.62, 0.28])[:, None, None] * (0.55 + 0.55 * tone),
        0.9 * undead,
    )
    skin = torch.lerp(skin, palette(MONSTER_SKIN, "skin"), 0.95 * monster)
    raw_hair = palette(HAIR, "hair_color")
    hair = _recolor(raw_hair, colors)
    hair = torch.lerp(hair, hair.new_tensor([0.84, 0.84, 0.86])[:, None, None], 0.88 * grey_hair)
    cloth, hat_color = (
        _recolor(palette(CLOTH, "clothes"), colors),
        _recolor(palette(CLOTH[:5], "hat_color"), colors),
    )
    lip = _recolor(
        torch.lerp(raw_skin, raw_skin.new_tensor([0.75, 0.25, 0.25])[:, None, None], 0.55), colors
    )
    lip = torch.lerp(lip, skin * 0.55, (undead + monster).clamp(0, 1))
    dark = _recolor(
        skin.new_tensor([0.10, 0.08, 0.09])[None, :, None, None].expand(B, 3, 1, 1), colors
    )
    white = skin.new_tensor([0.97, 0.97, 0.96])[None, :, None, None].expand(B, 3, 1, 1)

    # background: the person's colour, altered by the cue
    wall = palette(BACKDROP, "background")
    wall = torch.lerp(wall, torch.ones_like(wall), backdrop[:, 1:2])
    wall = torch.lerp(wall, wall.new_tensor([0.95, 0.93, 0.89])[:, None, None], backdrop[:, 2:3])
    wall = torch.lerp(
        wall, wall.new_tensor([0.90, 0.80, 0.62])[:, None, None], 0.55 * backdrop[:, 3:4]
    )
    wall = wall * (1 - backdrop[:, 5:6])
    radius = x.square() + (y + 0.1).square()
    wall = wall * (1 + backdrop[:, 0:1] * (0.06 - 0.16 * radius))
    band = torch.sin(9 * y + 1.5 * torch.sin(3 * x) + 4 * persons.proportion("hair_length"))[
        :, None
    ]
    wall = wall * (1 + backdrop[:, 3:4] * 0.07 * (band * 6).clamp(-1, 1))
    ray = torch.sin(torch.atan2(y - 0.1, x) * 12)[:, None]
    wall = wall + backdrop[:, 4:5] * 0.035 * (ray * 5).clamp(-1, 1)
    canvas = _Canvas(wall.expand(B, 3, S, S).clamp(0, 1), x, y, shading, lines, light, pixel)

    # head frame
    a = 0.40 + 0.035 * persons.proportion("head_width")
    b = 0.50 + 0.035 * persons.proportion("head_height")
    cx, cy = 0.04 * turn, 0.10 + 0.0 * turn
    hx, hy = x - cx, y - cy
    fx = hx - 0.07 * turn  # face features move further than the head when it turns
    big_eyes = (eyes[:, 1] / 0.15).clamp(0, 1)
    jaw = 0.16 + 0.16 * (eyes[:, 1] > 0.12)  # the anime chin is pointed
    head = _ellipse(hx / (1 - jaw * (hy / b).clamp(0, 1.2).square()), hy, a, b)

    strands = torch.sin(38 * torch.atan2(hx, hy + 1.2) + 2 * torch.sin(5 * hy))
    hair_inner = 1 + 0.13 * shading[:, 4] * strands * (hy + 0.6).clamp(0.3, 1)

    # hair behind the head
    length = 0.14 * persons.proportion("hair_length")
    far = torch.full_like(head, 9.0)
    bump = 0.035 * torch.sin(11 * torch.atan2(hx, -hy - 0.1))
    long_back = _box(hx, hy - 0.10 - length / 2, a + 0.13, 0.62 + length / 2, 0.34)
    curly_back = _ellipse(hx, hy + 0.10, a + 0.19, b + 0.10) + bump
    tail_x = hx - (a + 0.12)
    tail = torch.minimum(
        _ellipse(tail_x + 0.06, hy - 0.02 - length / 2, 0.13, 0.40 + length / 2),
        _ellipse(hx, hy + 0.06, a + 0.05, b + 0.03),
    )
    tail = torch.where(
        hy > 0.25,
        torch.maximum(tail, _ellipse(tail_x + 0.06, hy - 0.02 - length / 2, 0.13, 0.42)),
        tail,
    )
    back = _choose(hair_style, far, far, long_back, curly_back, far, tail)
    canvas.paint(hair * 0.82, back, cx, cy, 0.6, inner=hair_inner)

    # neck and clothes
    neck = _box(x - cx * 0.6, y - 0.68, 0.15, 0.30, 0.05)
    canvas.paint(skin * 0.86, neck, 0, 0.6, 0.3)
    body = _ellipse(x - cx * 0.3, y - 1.22, 0.80, 0.48)
    canvas.paint(cloth, body, 0, 1.0, 0.7)
    collar = _ellipse(x - cx * 0.6, y - 0.74, 0.20, 0.13)
    canvas.paint(skin * 0.86, torch.maximum(collar, body - 0.02), 0, 0.7, 0.3, line=0.8)
    canvas.blend(
        (skin * 0.62).clamp(0, 1),  # the chin's shadow
        canvas.cover(torch.maximum(torch.minimum(neck, collar), -(hy - b - 0.07)))
        * 0.55
        * (shading[:, 0] + shading[:, 1]).clamp(0, 1),
    )

    # ears, head
    for side in (-1, 1):
        canvas.paint(
            skin * 0.94,
            _ellipse(hx - side * (a + 0.01) + 0.04 * turn, hy - 0.05, 0.065, 0.11),
            cx,
            cy,
            0.4,
        )
    canvas.paint(skin, head, cx, cy, 0.45)
    for side in (-1, 1):  # cheeks
        blush = (1 - _ellipse(fx - side * 0.22, hy - 0.20, 0.1, 0.07).clamp(-0.07, 0.07) / 0.07) / 2
        canvas.blend(
            torch.lerp(skin, skin.new_tensor([0.95, 0.40, 0.38])[:, None, None], 0.5),
            blush.clamp(0, 1) * 0.45 * shading[:, 6],
        )

    # beard and moustache
    beard_kind = persons.category("beard")
    facial_hair = torch.lerp(hair, hair * 0.9, 1.0)
    jaw_hair = torch.maximum(
        head - 0.015,
        torch.maximum(
            -(hy - 0.16 - 0.55 * (fx.abs() - 0.24).clamp_min(0) * -1.2),
            -_ellipse(fx, hy - 0.20, 0.23, 0.13),
        ),
    )
    full = torch.where((beard_kind == 2)[:, None, None], jaw_hair, far)
    canvas.paint(facial_hair, full, cx, cy, 0.5, line=0.8, inner=hair_inner)
    mouth_y = 0.30
    stache = torch.minimum(
        _stroke(fx, hy, 0.01, mouth_y - 0.065, 0.13, mouth_y - 0.035, 0.036),
        _stroke(fx, hy, -0.01, mouth_y - 0.065, -0.13, mouth_y - 0.035, 0.036),
    )
    canvas.paint(
        facial_hair,
        torch.where((beard_kind > 0)[:, None, None], stache, far),
        cx,
        cy,
        0.5,
        line=0.6,
    )

    # mouth
    width = 0.12 + 0.025 * persons.proportion("mouth_width")
    mouth = persons.category("mouth")
    my = hy - mouth_y
    neutral = _box(fx, my - 0.01, width, 0.020, 0.018)
    smile = torch.maximum(_ellipse(fx, my + 0.04, width * 1.15, 0.115), -(my + 0.0) + 0.0)
    openm = _ellipse(fx, my - 0.025, width * 0.62, 0.085)
    canvas.paint(lip, _choose(mouth, neutral, far, far), cx, cy, 0.5, line=0.5, shade=0)
    inside = _recolor(
        dark.new_tensor([0.42, 0.07, 0.08])[None, :, None, None].expand(B, 3, 1, 1), colors
    )
    canvas.paint(inside, _choose(mouth, far, far, openm), cx, cy, 0.5, shade=0)
    canvas.outline(_choose(mouth, far, far, openm), 1.0, 0.8)
    canvas.paint(white, _choose(mouth, far, smile, far), cx, cy, 0.5, shade=0)
    lips = _choose(mouth, far, smile.abs() - 0.016, openm.abs() - 0.018)
    canvas.blend(lip * 0.85, canvas.cover(lips) * 0.8)
    fang = torch.minimum(
        *[
            _stroke(fx, hy, s * 0.075, mouth_y + 0.01, s * 0.068, mouth_y + 0.10, 0.020)
            for s in (-1, 1)
        ]
    )
    canvas.blend(white, canvas.cover(fang) * lines[:, 7])

    # nose
    tip = 0.15 + 0.03 * persons.proportion("nose")
    nose = _ellipse(fx - 0.03 * turn, hy - tip, 0.045, 0.038)
    bridge = _stroke(fx - 0.02 * turn, hy, 0.035, 0.03, 0.035, tip, 0.012)
    soft = (shading[:, 0] * 0.5).clamp(0, 0.6)
    canvas.blend(
        skin * 0.72, (canvas.cover(bridge) * 0.35 + canvas.cover(nose) * 0.6).clamp(0, 1) * soft
    )
    nose_line = torch.maximum(nose, -(hy - tip - 0.005)).abs() - lines[:, 0] * 0.35
    canvas.blend(
        lines[:, 2:5], canvas.cover(nose_line) * canvas.cover(-(hy - tip)) * lines[:, 1] * 0.8
    )

    # eyes
    ew = eyes[:, 0] * (1 + 0.12 * persons.proportion("eye_size"))
    eh = eyes[:, 1] * (1 + 0.12 * persons.proportion("eye_size"))
    gap = 0.185 + 0.018 * persons.proportion("eye_distance")
    ey = hy + 0.03 - 0.03 * big_eyes
    blue = skin.new_tensor([0.22, 0.36, 0.55])[:, None, None]
    iris = _recolor(blue[None].expand(B, 3, 1, 1), colors)
    iris = torch.lerp(iris, skin.new_tensor([0.85, 0.12, 0.08])[:, None, None], eyes[:, 5:6])
    iris = torch.lerp(iris, skin.new_tensor([0.98, 0.85, 0.15])[:, None, None], eyes[:, 6:7])
    for side in (-1, 1):
        ex = fx - side * gap
        socket = (
            1 - _ellipse(ex, ey - 0.01, ew * 1.5, eh * 1.1 + 0.06).clamp(-0.06, 0.06) / 0.06
        ) / 2
        canvas.blend(skin * 0.35, socket.clamp(0, 1) * shading[:, 3])
        eye = _ellipse(ex, ey, ew, eh)
        canvas.blend(torch.lerp(white, iris, eyes[:, 6:7] * 0.75), canvas.cover(eye))
        r = eyes[:, 2] * (1 + 0.12 * persons.proportion("eye_size"))
        gx = ex - 0.018 * turn
        ball = torch.maximum(
            _ellipse(gx, ey, r * (0.9 - 0.05 * big_eyes), r * (1 + 0.12 * big_eyes)), eye
        )
        canvas.blend(
            iris
            * (0.75 + 0.7 * (ey / eh.clamp_min(0.03)).clamp(-0.5, 0.8) * big_eyes)[:, None].clamp(
                0, 2
            ),
            canvas.cover(ball),
        )
        slit = 1 - 0.6 * eyes[:, 6]
        canvas.blend(
            dark,
            canvas.cover(
                torch.maximum(
                    _ellipse(
                        gx, ey, r * eyes[:, 3] * slit, r * eyes[:, 3] * (1 + 0.5 * eyes[:, 6])
                    ),
                    eye,
                )
            ),
        )
        shine = torch.minimum(
            _ellipse(gx + 0.35 * r, ey + 0.4 * r, r * 0.34, r * 0.40),
            _ellipse(gx - 0.35 * r, ey - 0.45 * r, r * 0.18, r * 0.18),
        )
        canvas.blend(white, canvas.cover(shine) * eyes[:, 4])
        lid = torch.maximum(
            eye.abs() - 0.012 - 0.014 * eyes[:, 7], ey - eh * 0.05
        )  # upper lid and lashes
        canvas.blend(
            torch.lerp(skin * 0.45, dark, eyes[:, 7:8]),
            canvas.cover(lid) * (0.55 + 0.45 * eyes[:, 7]),
        )
        canvas.outline(eye, 0.7, 0.6)
        brow_y = -0.17 - 0.03 * persons.proportion("brow") - 0.05 * big_eyes
        brow = _stroke(ex, hy, -side * 0.075, brow_y + 0.012, side * 0.085, brow_y, 0.020)
        canvas.blend(torch.lerp(hair * 0.75, skin * 0.6, 0.25), canvas.cover(brow) * 0.9)

    # wrinkles and scars: drawn marks that belong to the lines cue
    def mark(d, color, strength):
        canvas.blend(color, canvas.cover(d) * strength)

    for k, wy in enumerate((-0.30, -0.25)):
        mark(
            _stroke(fx, hy + 0.02 * torch.cos(9 * fx), -0.15, wy, 0.17, wy, 0.012),
            skin * 0.5,
            0.9 * lines[:, 6],
        )
    for side in (-1, 1):
        mark(
            _stroke(fx, hy, side * 0.085, 0.155, side * 0.19, 0.30, 0.011),
            skin * 0.45,
            1.0 * lines[:, 6],
        )
        mark(
            _stroke(fx - side * gap, hy, -0.06, 0.075, 0.07, 0.065, 0.014),
            skin * 0.45,
            0.9 * lines[:, 6],
        )
        mark(
            _stroke(fx - side * gap, hy, side * 0.10, 0.0, side * 0.17, 0.035, 0.012),
            skin * 0.5,
            0.9 * lines[:, 6],
        )
    blood = skin.new_tensor([0.35, 0.06, 0.06])[None, :, None, None].expand(B, 3, 1, 1)
    mark(_stroke(fx, hy, 0.16, 0.10, 0.25, 0.27, 0.014), blood, lines[:, 5])
    for k in range(3):
        sx, sy = 0.18 + 0.03 * k, 0.13 + 0.055 * k
        mark(
            _stroke(fx, hy, sx - 0.045, sy + 0.02, sx + 0.045, sy - 0.02, 0.009),
            blood * 0.6,
            lines[:, 5],
        )
    mark(_stroke(fx, hy, -0.20, -0.30, -0.06, -0.24, 0.013), blood, lines[:, 5])

    # glasses
    kind = persons.category("glasses")
    rim = torch.minimum(*[_ellipse(fx - s * gap, hy + 0.025, 0.135, 0.115) for s in (-1, 1)])
    bar = torch.minimum(
        _stroke(fx, hy, -gap + 0.12, -0.045, gap - 0.12, -0.045, 0.014),
        torch.minimum(
            *[
                _stroke(fx, hy, s * (gap + 0.13), -0.045, s * (a + 0.02), -0.06, 0.014)
                for s in (-1, 1)
            ]
        ),
    )
    frame = torch.minimum(rim.abs() - 0.018, bar)
    black = _recolor(
        dark.new_tensor([0.13, 0.11, 0.12])[None, :, None, None].expand(B, 3, 1, 1), colors
    )
    canvas.blend(black, canvas.cover(torch.where((kind == 2)[:, None, None], rim, far)) * 0.95)
    glint = torch.maximum(rim + 0.035, (fx * 0.6 + hy + 0.07).abs() - 0.018)
    canvas.blend(white, canvas.cover(torch.where((kind == 2)[:, None, None], glint, far)) * 0.35)
    canvas.blend(black, canvas.cover(torch.where((kind > 0)[:, None, None], frame, far)))

    # hair in front
    wave = 0.02 * torch.sin(26 * hx)
    zig = (torch.remainder(hx * 7.0, 1.0) - 0.5).abs()
    scalp = _ellipse(hx, hy + 0.03, a + 0.045, b + 0.045)
    short = torch.maximum(scalp, hy + 0.24 + wave + 0.10 * (hx / a).square() * -1.5)
    fringe = torch.maximum(
        _ellipse(hx, hy + 0.02, a + 0.085, b + 0.085),
        torch.maximum(hy - 0.42, -_ellipse(hx - 0.05, hy - 0.22, 0.34, 0.49)),
    )
    curly = torch.maximum(
        _ellipse(hx, hy + 0.16, a + 0.13, b - 0.03) + bump,
        hy + 0.24 + 0.6 * bump - 0.10 * (hx / a).square(),
    )
    spiky = torch.maximum(
        _ellipse(hx, hy + 0.12, a + 0.06, b + 0.02 - 0.0)
        - 0.17 * (0.5 - zig) * (1 - (hy + 0.3).clamp(0, 1)),
        hy + 0.15 + 0.20 * zig - 0.12 * (hx / a).square(),
    )
    sleek = torch.maximum(
        _ellipse(hx, hy + 0.03, a + 0.04, b + 0.04), -_ellipse(hx + 0.03, hy - 0.20, 0.37, 0.48)
    )
    sleek = torch.maximum(sleek, hy - 0.04)
    front = _choose(hair_style, far, short, fringe, curly, spiky, sleek)
    canvas.paint(hair, front, cx, cy - 0.2, 0.5, inner=hair_inner)
    gloss = (
        _ellipse(hx + 0.05, hy + 0.05, a * 0.8, b * 0.72 + 0.03 * torch.sin(24 * hx)).abs() - 0.022
    )
    gloss = torch.maximum(torch.maximum(gloss, front + 0.05), hx.abs() - 0.24)
    canvas.blend(
        torch.lerp(hair, torch.ones_like(hair), 0.55),
        canvas.cover(gloss) * shading[:, 5] * canvas.cover(hy + 0.2),
    )

    # horns, then the hat over everything
    for side in (-1, 1):
        hornx, horny = hx - side * 0.25, hy + 0.62
        horn = _stroke(hornx, horny, 0.0 * side, 0.18, side * 0.07, -0.13, 0.070) + 0.20 * (
            -horny + 0.05
        ).clamp(-0.2, 0.28)
        canvas.blend(
            skin.new_tensor([0.93, 0.88, 0.74])[:, None, None]
            * (0.8 + 0.25 * torch.sin(30 * horny)[:, None] * 0.5),
            canvas.cover(horn) * lines[:, 7],
        )
    dome = torch.maximum(_ellipse(hx, hy + 0.18, a + 0.07, 0.46), hy + 0.27)
    peak = _ellipse(hx - 0.22 - 0.25 * turn, hy + 0.28, 0.42, 0.075)
    crown = torch.maximum(_box(hx, hy + 0.45, a * 0.86, 0.20, 0.10), -(hy + 0.80))
    brim = _ellipse(hx, hy + 0.28, a + 0.27, 0.075)
    top = _choose(hat_style, far, dome, crown)
    edge = _choose(hat_style, far, peak, brim)
    canvas.paint(hat_color, top, cx, cy - 0.4, 0.5)
    ribbon = torch.maximum(top, (hy + 0.35).abs() - 0.045)
    canvas.blend(hat_color * 0.6, canvas.cover(_choose(hat_style, far, far, ribbon)))
    canvas.paint(hat_color * 0.9, edge, cx, cy - 0.3, 0.5)

    return _finish(canvas.image, x, y, shading, colors, lines, backdrop, texture, size, rng)


def _finish(image, x, y, shading, colors, lines, backdrop, texture, size, rng):
    """Hatching, paper, pixels and grain: the parts of a style that cover the whole picture."""
    B, S = len(image), image.shape[-1]

    def field(cells):  # smooth noise [B, 1, S, S] of roughly unit size
        noise = torch.randn(B, 1, cells, cells, generator=rng).to(image.device)
        return F.interpolate(noise, size=(S, S), mode="bicubic", align_corners=False)

    gray = _luminance(image)
    stripe = torch.sin((x + y) * 62)[:, None]
    cross = torch.sin((x - y) * 62)[:, None]
    ink = ((0.80 - gray) * 3).clamp(0, 1) * ((stripe - 0.1) * 2).clamp(0, 1)
    ink = torch.maximum(ink, ((0.55 - gray) * 4).clamp(0, 1) * ((cross - 0.1) * 2).clamp(0, 1))
    paper = image.new_tensor([0.97, 0.96, 0.94])[:, None, None]
    drawn = torch.lerp(
        torch.lerp(image, paper, 0.62),
        image.new_tensor([0.22, 0.22, 0.24])[:, None, None],
        0.85 * ink,
    )
    drawn = torch.where(gray < 0.36, torch.lerp(drawn, image, 0.6), drawn)
    image = torch.lerp(image, drawn, shading[:, 2:3])

    blot = field(10)
    image = torch.lerp(image, image + 0.085 * blot + 0.045 * field(22), texture[:, 2:3])
    reach = (torch.maximum(x.abs(), y.abs())[:, None] + 0.07 * blot - 0.90) * 9
    image = torch.lerp(image, paper, reach.clamp(0, 1) * 0.85 * backdrop[:, 6:7])
    wood = torch.sin(60 * y[:, None] + 5 * field(4) + 9 * torch.sin(1.5 * x[:, None]))
    image = image * (1 + 0.05 * texture[:, 3:4] * wood)

    blur = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    image = torch.lerp(image, blur, 0.7 * texture[:, 4:5])
    blocks = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode="nearest")
    blocks = (blocks * 6).round() / 6
    image = torch.lerp(image, blocks, texture[:, 1:2])
    grain = torch.randn(B, 1, size, size, generator=rng).to(image.device)
    return (image + texture[:, 0:1] * grain).clamp(0, 1) * 2 - 1
