"""The portrait world: persons x style cues -> pictures, in vectorised torch.

A *person* is ten categories (skin, hair, glasses ...) and ten proportions (head width, turn of the
head ...). A *style* is one choice for each of six cues: eyes, colors, shading, lines, background,
texture. A *domain* ("photo", "anime" ...) is the bundle of all six cues of that name, so the same
person can be drawn in every domain, and mixtures ("a photo with anime eyes") exist too.

`render` paints back to front, one function per part. Parts are signed distances: a shape is d,
negative inside, and one pixel of d around zero makes the antialiased edge.

Axes: B persons, H = W = size. Unless told otherwise, tensors are [B, channels, H, W] with 1 for an
axis along which they do not change: distances and strengths have one channel, colours three, in
[0, 1] while painting. Coordinates run right and down; the picture is 2 * ZOOM wide and high.
"""

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------
# Persons

DOMAINS = ("photo", "anime", "sketch", "pixel art", "watercolor", "ukiyo-e", "zombie", "elderly",
           "monster", "negative")
CUES = ("eyes", "colors", "shading", "lines", "background", "texture")
CATEGORIES = {  # factor: (names, probabilities)
    "skin": (("pale", "light", "tan", "brown", "dark"), (0.2, 0.2, 0.2, 0.2, 0.2)),
    "hair_color": (("black", "brown", "red", "blond", "grey", "blue"),
                   (0.2, 0.16, 0.17, 0.17, 0.12, 0.18)),
    "hair": (("bald", "short", "long", "curly", "spiky", "ponytail"),
             (0.1, 0.2, 0.22, 0.18, 0.15, 0.15)),
    "glasses": (("none", "glasses", "sunglasses"), (0.6, 0.25, 0.15)),
    "beard": (("none", "moustache", "beard"), (0.64, 0.16, 0.2)),
    "mouth": (("neutral", "smile", "open"), (0.34, 0.36, 0.3)),
    "hat": (("none", "cap", "hat"), (0.68, 0.16, 0.16)),
    "hat_color": (("red", "green", "blue", "yellow", "white"), (0.2, 0.2, 0.2, 0.2, 0.2)),
    "clothes": (("red", "green", "blue", "yellow", "white", "black"),
                (0.17, 0.17, 0.17, 0.17, 0.16, 0.16)),
    "background": (("blue", "pink", "green", "yellow", "purple", "grey"),
                   (0.17, 0.17, 0.17, 0.17, 0.16, 0.16)),
}
PROPORTIONS = ("head_width", "head_height", "turn", "eye_distance", "eye_size", "nose",
               "mouth_width", "brow", "hair_length", "light")
COLOR_FACTORS = ("skin", "hair_color", "hat_color", "clothes", "background")  # of fine layers
W_DIM = 128  # 38 for categories, 10 for proportions; the rest is room for the mapping network


@dataclass(frozen=True)
class Persons:
    """B persons: indices into CATEGORIES [B, 10], and proportions [B, 10] in [-1, 1]."""

    categories: torch.Tensor
    proportions: torch.Tensor

    def __len__(self):
        return len(self.categories)

    def __getitem__(self, index):
        return Persons(self.categories[index], self.proportions[index])

    def category(self, name):
        """Indices [B] into the names of one category."""
        return self.categories[:, list(CATEGORIES).index(name)]

    def proportion(self, name):
        """Values [B, 1, 1, 1] of one proportion."""
        return self.proportions[:, PROPORTIONS.index(name), None, None, None]


def persons_from_z(z):
    """Persons of latents z [B, 20 or more] ~ N(0, I): the quantile of one coordinate per factor."""
    # The mapping network normalises z as well: only the direction of z counts.
    z = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
    u = 0.5 * (1 + torch.erf(z / math.sqrt(2)))  # [B, as z] in (0, 1)
    categories = []
    for i, (_, probabilities) in enumerate(CATEGORIES.values()):
        cuts = torch.tensor(probabilities, device=z.device, dtype=z.dtype).cumsum(0)[:-1]
        categories.append(torch.bucketize(u[:, i].contiguous(), cuts))
    n = len(CATEGORIES)
    return Persons(torch.stack(categories, dim=1), 2 * u[:, n : n + len(PROPORTIONS)] - 1)


def sample_persons(n, generator=None):
    """n persons drawn at random from a CPU torch.Generator."""
    return persons_from_z(torch.randn(n, W_DIM, generator=generator))


def persons_to_w(persons):
    """The generator's code of persons, w [B, W_DIM]: thermometers of +-1, then the proportions.

    A category of K values takes K - 1 places; place k tells whether the index exceeds k. So each
    place is one step of one coordinate of z, which is what makes the code learnable from z.
    """
    parts = []
    for factor, (names, _) in CATEGORIES.items():
        places = torch.arange(len(names) - 1, device=persons.categories.device)
        parts.append((persons.category(factor)[:, None] > places).float() * 2 - 1)
    w = torch.cat([*parts, persons.proportions], dim=1)
    return F.pad(w, (0, W_DIM - w.shape[1]))


def styles_of(domain, n):
    """The styles [n, 6] of a pure domain, given by its name or index."""
    index = DOMAINS.index(domain) if isinstance(domain, str) else int(domain)
    return torch.full((n, len(CUES)), index)


# ----------------------------------------------------------------------------------------------
# Palettes (RGB in percent, in the order of the factor's names; hats are of CLOTH too) and tables

SKIN = ((97, 85, 77), (93, 74, 60), (80, 58, 41), (60, 39, 26), (38, 24, 17))
# What a monster makes of each skin (skin, eyes and the tint of the horns, horns) and of each hair.
MONSTER_SKIN = ((45, 80, 30), (25, 62, 85), (66, 35, 80), (85, 22, 20), (95, 55, 12))
MONSTER_EYES = ((98, 85, 15), (92, 18, 12), (94, 96, 98), (45, 92, 30), (25, 85, 95))
MONSTER_HORNS = ((25, 7), (10, 2), (36, 10), (27, -12), (16, 20))  # place and slant, in percent
MONSTER_HAIR = ((86, 88, 92), (18, 66, 30), (58, 20, 74), (25, 45, 90), (90, 36, 10), (90, 80, 22))
HAIR = ((11, 10, 12), (38, 23, 13), (78, 29, 10), (90, 74, 34), (70, 70, 72), (20, 33, 82))
CLOTH = ((78, 15, 15), (16, 52, 25), (18, 30, 74), (92, 76, 22), (93, 93, 93), (15, 15, 18))
BACKDROP = ((45, 62, 82), (85, 58, 68), (47, 70, 50), (85, 76, 45), (62, 50, 78), (66, 67, 70))


def _table(text):
    """The columns' names of a cue, and its values [10, columns], one row per domain."""
    header, *rows = text.strip().splitlines()
    values = [  # float() fails on a row that is out of the order of DOMAINS
        [float(v) for v in row.removeprefix(domain).split()]
        for domain, row in zip(DOMAINS, rows, strict=True)
    ]
    return header.split(), torch.tensor(values)


# iris: its radius. pupil: its share of the iris. red, monster: the iris.
EYES = _table("""
            half_width  half_height  iris   pupil  highlight  red  monster lashes  negative
photo       0.085       0.052        0.045  0.55   0.35       0    0       0.3     0
anime       0.135       0.150        0.105  0.50   1.00       0    0       1.0     0
sketch      0.085       0.055        0.042  0.95   0.30       0    0       0.8     0
pixel art   0.100       0.112        0.092  0.99   0.00       0    0       0.5     0
watercolor  0.088       0.060        0.055  0.60   0.20       0    0       0.2     0
ukiyo-e     0.105       0.026        0.026  0.95   0.00       0    0       1.0     0
zombie      0.100       0.080        0.042  0.35   0.00       1    0       0.0     0
elderly     0.072       0.030        0.034  0.60   0.10       0    0       0.0     0
monster     0.108       0.090        0.080  0.30   0.00       0    1       0.6     0
negative    0.098       0.072        0.060  0.70   0.35       0    0       0.3     1""")
# paper: share of white paper. print: share of two-tone printing ink. The rest: who is who.
COLORS = _table("""
            saturation  contrast  brightness  paper  print  zombie  grey_hair  monster  negative
photo       0.95        1.0        0.00       0.00   0.0    0       0          0        0
anime       1.40        1.1        0.06       0.00   0.0    0       0          0        0
sketch      0.12        1.0        0.08       0.50   0.0    0       0          0        0
pixel art   1.50        1.3        0.00       0.00   0.0    0       0          0        0
watercolor  0.90        0.8        0.04       0.40   0.0    0       0          0        0
ukiyo-e     0.60        0.8        0.00       0.00   0.5    0       0          0        0
zombie      0.65        0.9       -0.06       0.00   0.0    1       0          0        0
elderly     0.75        0.9        0.04       0.00   0.0    0       1          0        0
monster     1.10        1.0        0.00       0.00   0.0    0       0          1        0
negative    0.95        1.0        0.00       0.00   0.0    0       0          0        1""")
# smooth, cel: how bodies are lit. sockets: shadows around the eyes. strands, gloss: of the hair.
SHADING = _table("""
            smooth  cel  hatch  sockets  strands  gloss  blush
photo       1.0     0.0  0.0    0.10     1.0      0.0    0.3
anime       0.0     1.0  0.0    0.00     0.0      1.0    1.0
sketch      0.1     0.0  1.0    0.00     0.0      0.0    0.0
pixel art   0.0     0.8  0.0    0.00     0.0      0.4    0.0
watercolor  0.4     0.0  0.0    0.05     0.3      0.0    1.2
ukiyo-e     0.0     0.0  0.0    0.00     0.5      0.0    0.0
zombie      1.4     0.0  0.0    0.75     1.0      0.0    0.0
elderly     1.5     0.0  0.0    0.75     1.3      0.0    0.0
monster     1.2     0.0  0.0    0.30     0.8      0.0    0.0
negative    -1.0    0.0  0.0    0.00     -1.0     0.0    0.0""")
# red, green, blue: the ink. glow: how far it is, instead, what the clothes are not, as at the edges
# of a solarised film. The rest: marks that are drawn. horns: and fangs.
LINES = _table("""
            width  opacity  red   green  blue  scars  wrinkles  horns  glow
photo       0.000  0.00     0.10  0.10   0.10  0      0         0      0
anime       0.046  1.00     0.10  0.07   0.12  0      0         0      0
sketch      0.044  1.00     0.16  0.16   0.18  0      0         0      0
pixel art   0.050  0.80     0.08  0.06   0.10  0      0         0      0
watercolor  0.044  0.75     0.35  0.25   0.30  0      0         0      0
ukiyo-e     0.034  1.00     0.14  0.16   0.36  0      0         0      0
zombie      0.000  0.00     0.10  0.10   0.10  1      0         0      0
elderly     0.000  0.00     0.10  0.10   0.10  0      1         0      0
monster     0.000  0.00     0.10  0.10   0.10  0      0         1      0
negative    0.050  1.00     0.90  0.93   0.95  0      0         0      1""")
# bands: of a woodblock print. rays: speed lines. torn: a ragged margin of bare paper.
# swap: share of another colour of the palette. negative: of the wall, and of the clothes.
BACKGROUND = _table("""
            vignette  lighten  paper  bands  rays  darken  torn  negative  swap
photo       1.0       0.00     0.0    0.0    0.0   0.00    0.0   0         0
anime       0.0       0.32     0.0    0.0    1.0   0.00    0.0   0         0
sketch      0.0       0.00     0.8    0.0    0.0   0.00    0.0   0         0
pixel art   0.0       0.15     0.0    0.0    0.0   0.00    0.0   0         0
watercolor  0.0       0.20     0.2    0.0    0.0   0.00    1.0   0         0
ukiyo-e     0.0       0.00     0.0    1.0    0.0   0.00    0.0   0         0
zombie      1.4       0.00     0.0    0.0    0.0   0.28    0.0   0         0
elderly     0.3       0.28     0.4    0.0    0.0   0.00    0.0   0         0
monster     1.2       0.00     0.0    0.0    0.0   0.08    0.0   0         0.85
negative    1.0       0.00     0.0    0.0    0.0   0.00    0.0   1         0""")
# pixels: coarse ones of few colours. wood: the grain of a print's block.
TEXTURE = _table("""
            grain  pixels  blotches  wood  blur
photo       0.000  0.0     0.0       0.0   0.5
anime       0.000  0.0     0.0       0.0   0.0
sketch      0.012  0.0     0.0       0.0   0.0
pixel art   0.000  1.0     0.0       0.0   0.0
watercolor  0.008  0.0     0.9       0.0   0.3
ukiyo-e     0.006  0.0     0.0       0.6   0.0
zombie      0.025  0.0     0.2       0.0   0.2
elderly     0.006  0.0     0.0       0.0   0.6
monster     0.010  0.0     0.2       0.0   0.2
negative    0.012  0.0     0.0       0.0   0.5""")
TABLES = (EYES, COLORS, SHADING, LINES, BACKGROUND, TEXTURE)  # in the order of CUES


def _rows(table, domains):
    """The rows of domains [B] in a table: a namespace {column: [B, 1, 1, 1]}."""
    names, values = table
    columns = values.to(domains.device)[domains][:, :, None, None, None].unbind(1)
    return SimpleNamespace(**dict(zip(names, columns, strict=True)))


# ----------------------------------------------------------------------------------------------
# Shapes and colours

FAR = 9.0  # the distance to a shape that a person does not have


def _ellipse(x, y, a, b):
    """Distance to an ellipse with half axes a, b (first-order exact near the edge)."""
    q = ((x / a).square() + (y / b).square()).clamp_min(1e-6).sqrt()
    g = ((x / a**2).square() + (y / b**2).square()).clamp_min(1e-6).sqrt()
    return q * (q - 1) / g


def _box(x, y, a, b, r):
    """Distance to a box with half sides a, b and corner radius r."""
    dx, dy = x.abs() - a + r, y.abs() - b + r
    outside = (dx.clamp_min(0).square() + dy.clamp_min(0).square() + 1e-12).sqrt()
    return outside + torch.maximum(dx, dy).clamp_max(0) - r


def _stroke(x, y, x0, y0, x1, y1, r):
    """Distance to a round-capped stroke of half width r from (x0, y0) to (x1, y1)."""
    px, py, bx, by = x - x0, y - y0, x1 - x0, y1 - y0
    t = ((px * bx + py * by) / (bx * bx + by * by + 1e-9)).clamp(0, 1)
    return ((px - t * bx).square() + (py - t * by).square() + 1e-12).sqrt() - r


def _union(*shapes):
    return functools.reduce(torch.minimum, shapes)


def _overlap(*shapes):
    return functools.reduce(torch.maximum, shapes)


def _soft(d, width):
    """The strength of a shape with a soft edge: 1 inside, 0 outside, a ramp of +-width between."""
    return (1 - d.clamp(-width, width) / width) / 2


def _rgb(like, percent):
    """A constant colour [3, 1, 1], on the device of a tensor."""
    return like.new_tensor([v / 100 for v in percent])[:, None, None]


def _toward(color, percent, share):
    """A colour, moved by a share in [0, 1] towards a constant one."""
    return torch.lerp(color, _rgb(color, percent), share)


def _luminance(color):
    return (color * _rgb(color, (30, 59, 11))).sum(-3, keepdim=True)


def _recolor(color, cue, negative=None):
    """A colour as the colors cue shows it, by those columns of COLORS that fit every colour.

    negative: how far it is inverted, if another cue than this one says so.
    """
    gray = _luminance(color)
    color = gray + (color - gray) * cue.saturation
    color = (color - 0.5) * cue.contrast + 0.5 + cue.brightness
    color = _toward(color, (98, 96, 92), cue.paper)
    ink = torch.lerp(_rgb(color, (20, 22, 38)), _rgb(color, (93, 82, 62)), gray)
    color = torch.lerp(color, ink, cue.print).clamp(0, 1)
    return torch.lerp(color, 1 - color, cue.negative if negative is None else negative)


# ----------------------------------------------------------------------------------------------
# Scene and canvas

ZOOM = 0.86  # less shows the face larger
MOUTH_Y = 0.30  # below the head's centre


class _Scene:
    """What the parts of the portraits share; nothing of it changes while they are painted."""

    def __init__(self, persons, styles, size):
        device = persons.proportions.device
        self.persons, self.proportion = persons, persons.proportion
        self.eyes, self.colors, self.shading, self.lines, self.background, self.texture = (
            _rows(*row) for row in zip(TABLES, styles.to(device).T, strict=True)
        )

        # The picture: coordinates of the pixels' centres, and the side of a pixel.
        axis = (torch.arange(size, device=device) + 0.5) * 2 / size - 1
        self.x, self.y = ZOOM * axis[None, None, None], ZOOM * axis[None, None, :, None] + 0.06
        self.pixel = ZOOM * 2 / size

        # The head: half axes a and b, coordinates hx and hy from its centre (cx, cy). Features sit
        # at fx instead of hx, for they move further than the head when it turns.
        self.turn = self.proportion("turn")
        self.light = 0.75 + 0.3 * self.proportion("light")  # how far it comes from the left
        self.a = 0.40 + 0.035 * self.proportion("head_width")
        self.b = 0.50 + 0.035 * self.proportion("head_height")
        self.cx, self.cy = 0.04 * self.turn, torch.full_like(self.turn, 0.10)
        self.hx, self.hy = self.x - self.cx, self.y - self.cy
        self.fx = self.hx - 0.07 * self.turn
        self.eye_x = 0.185 + 0.018 * self.proportion("eye_distance")  # the eyes are at fx = +-eye_x
        jaw = 0.16 + 0.16 * (self.eyes.half_height > 0.12)  # the anime chin is pointed
        jaw = 1 - jaw * (self.hy / self.b).clamp(0, 1.2).square()
        self.head = _ellipse(self.hx / jaw, self.hy, self.a, self.b)

        skin, cue = self.palette(SKIN, "skin"), self.colors
        zombie = _rgb(skin, (40, 62, 28)) * (0.55 + 0.55 * _luminance(skin))
        monster = self.palette(MONSTER_SKIN, "skin")
        self.skin = torch.lerp(_recolor(skin, cue), zombie, 0.9 * cue.zombie)
        self.skin = torch.lerp(self.skin, monster, 0.95 * cue.monster)
        self.lip = _recolor(_toward(skin, (75, 25, 25), 0.55), cue)
        self.lip = torch.lerp(self.lip, self.skin * 0.55, cue.zombie + cue.monster)
        self.hair = _recolor(self.palette(HAIR, "hair_color"), cue)
        self.hair = torch.lerp(self.hair, self.palette(MONSTER_HAIR, "hair_color"), cue.monster)
        self.hair = _toward(self.hair, (84, 84, 86), 0.88 * cue.grey_hair)
        self.clothes = _recolor(self.palette(CLOTH, "clothes"), cue, self.background.negative)
        self.dark, self.white = self.dye(10, 8, 9), _rgb(skin, (97, 97, 96))

        # The hair's structure: strands are factors of its colour, curls displace its edge.
        strands = torch.sin(38 * torch.atan2(self.hx, self.hy + 1.2) + 2 * torch.sin(5 * self.hy))
        strength = 0.13 * self.shading.strands
        self.strands = 1 + strength * strands * (self.hy + 0.6).clamp(0.3, 1)
        self.curls = 0.035 * torch.sin(11 * torch.atan2(self.hx, -self.hy - 0.1))

    def dye(self, *percent):
        """A constant colour as the colors cue shows it [B, 3, 1, 1]."""
        return _recolor(_rgb(self.x, percent), self.colors)

    def palette(self, table, factor):
        """Each person's colour of a factor [B, 3, 1, 1], before the colors cue."""
        colors = torch.tensor(table, device=self.x.device) / 100
        return colors[self.persons.category(factor)][:, :, None, None]

    def pick(self, factor, **shapes):
        """The shape that belongs to each person's value of a factor, FAR away if none does."""
        index, d = self.persons.category(factor)[:, None, None, None], FAR
        for name, shape in shapes.items():
            d = torch.where(index == CATEGORIES[factor][0].index(name), shape, d)
        return d


class _Canvas:
    """A picture being painted: `image` [B, 3, H, W], over which every call paints."""

    def __init__(self, scene, image):
        self.scene, self.image, lines = scene, image, scene.lines
        ink = torch.cat([lines.red, lines.green, lines.blue], dim=1)
        self.ink = torch.lerp(ink, 1 - scene.palette(CLOTH, "clothes"), lines.glow)

    def cover(self, d):
        """The share of each pixel that lies inside the shape d."""
        return (0.5 - d / self.scene.pixel).clamp(0, 1)

    def blend(self, color, alpha):
        """Lay a colour over the picture with a strength in [0, 1]."""
        self.image = torch.lerp(self.image, color.expand_as(self.image), alpha)

    def fill(self, color, d, alpha=1.0):
        """Fill the shape d, flat."""
        self.blend(color, self.cover(d) * alpha)

    def outline(self, d, opacity=1.0, width=1.0):
        """Draw the edge of the shape d as the lines cue does, given factors of its values."""
        line = d.abs() - self.scene.lines.width * width / 2
        self.blend(self.ink, self.cover(line) * self.scene.lines.opacity * opacity)

    def paint(self, color, d, cx, cy, size, outline=1.0, tone=None):
        """Fill the shape d as a body of some size at (cx, cy), lit by the shading cue; outline it.

        outline: its opacity. tone: factors of the colour [B, 1, H, W].
        """
        s, cue = self.scene, self.scene.shading
        away = ((s.x - cx) * s.light + (s.y - cy) * 0.35) / size  # from the light, about [-1, 1]
        rim = (1 + d / (0.5 * size)).clamp(0, 1).square()
        shadow = ((away - 0.42) / (s.pixel * 2 / size) + 0.5).clamp(0, 1)
        lit = 1 - cue.smooth * (0.16 * away.clamp(-1, 1.2) + 0.20 * rim) - cue.cel * 0.26 * shadow
        self.fill((color * (lit if tone is None else lit * tone)).clamp(0, 1), d)
        self.outline(d, outline)


# ----------------------------------------------------------------------------------------------
# The parts, back to front


def render(persons, styles, size=64, rng=None):
    """Draw persons in styles.

    persons: B of them. styles: [B, 6], the domain (an index) of each cue; see `styles_of`.
    size: side in pixels, even. rng: a CPU torch.Generator for what is random in watercolor, wood
    and grain (photos have nothing of it); None is the same one every time.
    Returns pictures [B, 3, size, size] in [-1, 1].
    """
    s = _Scene(persons, styles, size)
    canvas = _Canvas(s, _wall(s))
    parts = (_back_hair, _neck_and_clothes, _head, _beard, _mouth, _nose, _eyes,
             _wrinkles_and_scars, _glasses, _front_hair, _horns, _hat)
    for part in parts:
        part(canvas, s)
    return _finish(canvas.image, s, rng or torch.Generator().manual_seed(0))


def _wall(s):
    """The background [B, 3, H, W]: the person's colour, altered by the cue."""
    x, y, cue = s.x, s.y, s.background
    swapped = s.palette(BACKDROP[3:] + BACKDROP[:3], "background")
    wall = torch.lerp(s.palette(BACKDROP, "background"), swapped, cue.swap)
    wall = _toward(wall, (100, 100, 100), cue.lighten)
    wall = _toward(wall, (95, 93, 89), cue.paper)
    wall = _toward(wall, (90, 80, 62), 0.55 * cue.bands) * (1 - cue.darken)
    wall = wall * (1 + cue.vignette * (0.06 - 0.16 * (x.square() + (y + 0.1).square())))
    # hair_length only makes the bands differ between persons.
    bands = torch.sin(9 * y + 1.5 * torch.sin(3 * x) + 4 * s.proportion("hair_length"))
    wall = wall * (1 + cue.bands * 0.07 * (bands * 6).clamp(-1, 1))
    rays = torch.sin(torch.atan2(y - 0.1, x) * 12)
    wall = (wall + cue.rays * 0.035 * (rays * 5).clamp(-1, 1)).clamp(0, 1)
    return torch.lerp(wall, 1 - wall, cue.negative)


def _back_hair(canvas, s):
    hx, hy, a, b, half = s.hx, s.hy, s.a, s.b, 0.14 * s.proportion("hair_length") / 2
    long = _box(hx, hy - 0.10 - half, a + 0.13, 0.62 + half, 0.34)
    curly = _ellipse(hx, hy + 0.10, a + 0.19, b + 0.10) + s.curls
    skull = _ellipse(hx, hy + 0.06, a + 0.05, b + 0.03)
    tail_x, tail_y = hx - (a + 0.12) + 0.06, hy - 0.02 - half
    tail = _union(_ellipse(tail_x, tail_y, 0.13, 0.40 + half), skull)
    below = _overlap(tail, _ellipse(tail_x, tail_y, 0.13, 0.42))  # the skull's hair ends there
    tail = torch.where(hy > 0.25, below, tail)
    back = s.pick("hair", long=long, curly=curly, ponytail=tail)
    canvas.paint(s.hair * 0.82, back, s.cx, s.cy, 0.6, tone=s.strands)


def _neck_and_clothes(canvas, s):
    x, y = s.x - s.cx * 0.6, s.y
    neck = _box(x, y - 0.68, 0.15, 0.30, 0.05)
    canvas.paint(s.skin * 0.86, neck, 0, 0.6, 0.3)
    body = _ellipse(s.x - s.cx * 0.3, y - 1.22, 0.80, 0.48)
    canvas.paint(s.clothes, body, 0, 1.0, 0.7)
    collar = _ellipse(x, y - 0.74, 0.20, 0.13)
    canvas.paint(s.skin * 0.86, _overlap(collar, body - 0.02), 0, 0.7, 0.3, outline=0.8)
    chin_shadow = canvas.cover(_overlap(_union(neck, collar), -(s.hy - s.b - 0.07))) * 0.55
    canvas.blend(s.skin * 0.62, chin_shadow * (s.shading.smooth + s.shading.cel).clamp_max(1))


def _head(canvas, s):
    for side in (-1, 1):
        ear = _ellipse(s.hx - side * (s.a + 0.01) + 0.04 * s.turn, s.hy - 0.05, 0.065, 0.11)
        canvas.paint(s.skin * 0.94, ear, s.cx, s.cy, 0.4)
    canvas.paint(s.skin, s.head, s.cx, s.cy, 0.45)
    cheeks = _soft(_ellipse(s.fx.abs() - 0.22, s.hy - 0.20, 0.1, 0.07), 0.07)
    canvas.blend(_toward(s.skin, (95, 40, 38), 0.5), cheeks * 0.45 * s.shading.blush)


def _beard(canvas, s):
    fx, hy, color = s.fx, s.hy, s.hair * 0.9
    sideburns = 0.55 * (fx.abs() - 0.24).clamp_min(0)
    around_mouth = -_ellipse(fx, hy - 0.20, 0.23, 0.13)
    full = _overlap(s.head - 0.015, 0.16 - hy - 1.2 * sideburns, around_mouth)
    full = s.pick("beard", beard=full)
    canvas.paint(color, full, s.cx, s.cy, 0.5, outline=0.8, tone=s.strands)
    stache = _stroke(fx.abs(), hy, 0.01, MOUTH_Y - 0.065, 0.13, MOUTH_Y - 0.035, 0.036)
    stache = s.pick("beard", moustache=stache, beard=stache)
    canvas.paint(color, stache, s.cx, s.cy, 0.5, outline=0.6)


def _mouth(canvas, s):
    fx, y, width = s.fx, s.hy - MOUTH_Y, 0.12 + 0.025 * s.proportion("mouth_width")
    neutral = s.pick("mouth", neutral=_box(fx, y - 0.01, width, 0.020, 0.018))
    canvas.fill(s.lip, neutral)
    canvas.outline(neutral, 0.5)
    hole = s.pick("mouth", open=_ellipse(fx, y - 0.025, width * 0.62, 0.085))
    canvas.fill(s.dye(42, 7, 8), hole)
    canvas.outline(hole)
    teeth = s.pick("mouth", smile=_overlap(_ellipse(fx, y + 0.04, width * 1.15, 0.115), -y))
    canvas.fill(s.white, teeth)
    canvas.outline(teeth)
    lips = s.pick("mouth", smile=teeth.abs() - 0.016, open=hole.abs() - 0.018)
    canvas.fill(s.lip * 0.85, lips, 0.8)
    fangs = _stroke(fx.abs(), s.hy, 0.075, MOUTH_Y + 0.01, 0.068, MOUTH_Y + 0.10, 0.020)
    canvas.fill(s.white, fangs, s.lines.horns)


def _nose(canvas, s):
    fx, hy, tip = s.fx, s.hy, 0.15 + 0.03 * s.proportion("nose")
    ball = _ellipse(fx - 0.03 * s.turn, hy - tip, 0.045, 0.038)
    bridge = _stroke(fx - 0.02 * s.turn, hy, 0.035, 0.03, 0.035, tip, 0.012)
    shadow = canvas.cover(bridge) * 0.35 + canvas.cover(ball) * 0.6
    canvas.blend(s.skin * 0.72, shadow * (s.shading.smooth * 0.5).clamp_max(0.6))
    line = _overlap(ball, -(hy - tip - 0.005)).abs() - s.lines.width * 0.35
    line = canvas.cover(line) * canvas.cover(-(hy - tip))  # the lower half alone
    canvas.blend(canvas.ink, line * s.lines.opacity * 0.8)


def _eyes(canvas, s):
    cue, size = s.eyes, 1 + 0.12 * s.proportion("eye_size")
    width, height, r = cue.half_width * size, cue.half_height * size, cue.iris * size
    big = cue.half_height / 0.15  # in (0, 1], 1 for anime; larger eyes sit lower, brows higher
    y = s.hy + 0.03 - 0.03 * big
    brow_y = -0.17 - 0.03 * s.proportion("brow") - 0.05 * big
    iris = _toward(s.dye(22, 36, 55), (85, 12, 8), cue.red)
    iris = torch.lerp(iris, s.palette(MONSTER_EYES, "skin"), cue.monster)
    eyeball = torch.lerp(s.white, iris, cue.monster * 0.75)
    eyeball = _toward(eyeball, (8, 9, 10), cue.negative)
    iris = iris * (0.75 + 0.7 * (y / height.clamp_min(0.03)).clamp(-0.5, 0.8) * big)
    lid = torch.lerp(s.skin * 0.45, s.dark, cue.lashes)
    hair = torch.lerp(s.hair * 0.75, s.skin * 0.6, 0.25)
    pupil = r * cue.pupil
    slit = pupil * (1 - 0.6 * cue.monster), pupil * (1 + 0.5 * cue.monster)
    black = _toward(s.dark, (92, 93, 95), cue.negative)
    for side in (-1, 1):
        x = s.fx - side * s.eye_x
        gaze = x - 0.018 * s.turn
        eye = _ellipse(x, y, width, height)
        socket = _soft(_ellipse(x, y - 0.01, width * 1.5, height * 1.1 + 0.06), 0.06)
        canvas.blend(s.skin * 0.35, socket * s.shading.sockets)
        canvas.fill(eyeball, eye)
        disc = _ellipse(gaze, y, r * (0.9 - 0.05 * big), r * (1 + 0.12 * big))
        canvas.fill(iris, _overlap(disc, eye))
        canvas.fill(black, _overlap(_ellipse(gaze, y, *slit), eye))
        large = _ellipse(gaze + 0.35 * r, y + 0.4 * r, r * 0.34, r * 0.40)
        small = _ellipse(gaze - 0.35 * r, y - 0.45 * r, r * 0.18, r * 0.18)
        canvas.fill(s.white, _union(large, small), cue.highlight)
        upper = _overlap(eye.abs() - 0.012 - 0.014 * cue.lashes, y - height * 0.05)
        canvas.fill(lid, upper, 0.55 + 0.45 * cue.lashes)
        canvas.outline(eye, 0.7, 0.6)
        brow = _stroke(x, s.hy, -side * 0.075, brow_y + 0.012, side * 0.085, brow_y, 0.020)
        canvas.fill(hair, brow, 0.9)


def _wrinkles_and_scars(canvas, s):
    fx, hy, old, scars = s.fx, s.hy, s.lines.wrinkles, s.lines.scars
    for y in (-0.31, -0.25, -0.19):  # on the forehead
        wave = hy + 0.02 * torch.cos(9 * fx)
        canvas.fill(s.skin * 0.2, _stroke(fx, wave, -0.16, y, 0.18, y, 0.021), old)
    folds = _stroke(fx.abs(), hy, 0.085, 0.155, 0.20, 0.33, 0.024)  # from the nose to the mouth
    canvas.fill(s.skin * 0.2, folds, old)
    for side in (-1, 1):  # bags under the eyes
        bag = _stroke(fx - side * s.eye_x, hy, -0.07, 0.080, 0.08, 0.070, 0.024)
        canvas.fill(s.skin * 0.2, bag, old)
    crows_feet = _stroke(fx.abs() - s.eye_x, hy, 0.10, 0.0, 0.18, 0.045, 0.020)
    canvas.fill(s.skin * 0.2, crows_feet, old)

    blood = _rgb(fx, (35, 6, 6))
    canvas.fill(blood, _stroke(fx, hy, 0.16, 0.10, 0.25, 0.27, 0.014), scars)  # a cheek, sewn up
    for k in range(3):
        x, y = 0.18 + 0.03 * k, 0.13 + 0.055 * k
        stitch = _stroke(fx, hy, x - 0.045, y + 0.02, x + 0.045, y - 0.02, 0.009)
        canvas.fill(blood * 0.6, stitch, scars)
    canvas.fill(blood, _stroke(fx, hy, -0.20, -0.30, -0.06, -0.24, 0.013), scars)  # the forehead


def _glasses(canvas, s):
    fx, hy, eye_x, black = s.fx, s.hy, s.eye_x, s.dye(13, 11, 12)
    lenses = _ellipse(fx.abs() - eye_x, hy + 0.025, 0.135, 0.115)
    bridge = _stroke(fx, hy, -eye_x + 0.12, -0.045, eye_x - 0.12, -0.045, 0.014)
    temples = _stroke(fx.abs(), hy, eye_x + 0.13, -0.045, s.a + 0.02, -0.06, 0.014)
    frame = _union(lenses.abs() - 0.018, bridge, temples)
    glint = _overlap(lenses + 0.035, (fx * 0.6 + hy + 0.07).abs() - 0.018)
    canvas.fill(black, s.pick("glasses", sunglasses=lenses), 0.95)
    canvas.fill(s.white, s.pick("glasses", sunglasses=glint), 0.35)
    canvas.fill(black, s.pick("glasses", glasses=frame, sunglasses=frame))


def _front_hair(canvas, s):
    hx, hy, a, b = s.hx, s.hy, s.a, s.b
    bow = (hx / a).square()  # the hairline is lower at the temples
    arch, wave = 0.10 * bow, 0.02 * torch.sin(26 * hx)
    short = _ellipse(hx, hy + 0.03, a + 0.045, b + 0.045)
    short = _overlap(short, hy + 0.24 + wave - 1.5 * arch)
    long = _ellipse(hx, hy + 0.02, a + 0.085, b + 0.085)
    long = _overlap(long, hy - 0.42, -_ellipse(hx - 0.05, hy - 0.22, 0.34, 0.49))
    curly = _ellipse(hx, hy + 0.16, a + 0.13, b - 0.03) + s.curls
    curly = _overlap(curly, hy + 0.24 + 0.6 * s.curls - arch)
    zigzag = (torch.remainder(hx * 7, 1) - 0.5).abs()
    tips = 0.17 * (0.5 - zigzag) * (1 - (hy + 0.3).clamp(0, 1))
    spiky = _ellipse(hx, hy + 0.12, a + 0.06, b + 0.02) - tips
    spiky = _overlap(spiky, hy + 0.15 + 0.20 * zigzag - 0.12 * bow)
    combed = _ellipse(hx, hy + 0.03, a + 0.04, b + 0.04)
    combed = _overlap(combed, hy - 0.04, -_ellipse(hx + 0.03, hy - 0.20, 0.37, 0.48))
    front = s.pick("hair", short=short, long=long, curly=curly, spiky=spiky, ponytail=combed)
    canvas.paint(s.hair, front, s.cx, s.cy - 0.2, 0.5, tone=s.strands)
    ring = _ellipse(hx + 0.05, hy + 0.05, a * 0.8, b * 0.72 + 0.03 * torch.sin(24 * hx))
    gloss = canvas.cover(_overlap(ring.abs() - 0.022, front + 0.05, hx.abs() - 0.24))
    gloss = gloss * s.shading.gloss * canvas.cover(hy + 0.2)
    canvas.blend(_toward(s.hair, (100, 100, 100), 0.55), gloss)


def _horns(canvas, s):
    y, (place, slant) = s.hy + 0.62, s.palette(MONSTER_HORNS, "skin").split(1, dim=1)
    horns = _stroke(s.hx.abs() - place, y, 0.0, 0.18, slant, -0.13, 0.070)
    horns = horns + 0.20 * (0.05 - y).clamp(-0.2, 0.28)  # pointed
    color = torch.lerp(_rgb(y, (93, 88, 74)), s.palette(MONSTER_EYES, "skin"), 0.6)
    color = color * (0.8 + 0.125 * torch.sin(30 * y))
    canvas.fill(color, horns, s.lines.horns)


def _hat(canvas, s):
    hx, hy, a, color = s.hx, s.hy, s.a, _recolor(s.palette(CLOTH, "hat_color"), s.colors)
    dome = _overlap(_ellipse(hx, hy + 0.18, a + 0.07, 0.46), hy + 0.27)
    crown = _overlap(_box(hx, hy + 0.45, a * 0.86, 0.20, 0.10), -(hy + 0.80))
    canvas.paint(color, s.pick("hat", cap=dome, hat=crown), s.cx, s.cy - 0.4, 0.5)
    ribbon = _overlap(crown, (hy + 0.35).abs() - 0.045)
    canvas.fill(color * 0.6, s.pick("hat", hat=ribbon))
    peak = _ellipse(hx - 0.22 - 0.25 * s.turn, hy + 0.28, 0.42, 0.075)
    brim = _ellipse(hx, hy + 0.28, a + 0.27, 0.075)
    canvas.paint(color * 0.9, s.pick("hat", cap=peak, hat=brim), s.cx, s.cy - 0.3, 0.5)


def _finish(image, s, rng):
    """What covers the whole picture: hatching, paper, wood, pixels, grain. Returns [-1, 1]."""
    x, y, cue, size = s.x, s.y, s.texture, image.shape[-1]

    def noise(cells):
        """Smooth noise of about unit size [B, 1, H, W], drawn on a coarse grid."""
        coarse = torch.randn(len(image), 1, cells, cells, generator=rng).to(image.device)
        return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)

    gray, paper = _luminance(image), (97, 96, 94)
    stripes, crossed = ((torch.sin(d * 62) - 0.1) * 2 for d in (x + y, x - y))
    pencil = ((0.80 - gray) * 3).clamp(0, 1) * stripes.clamp(0, 1)
    pencil = torch.maximum(pencil, ((0.55 - gray) * 4).clamp(0, 1) * crossed.clamp(0, 1))
    drawn = _toward(_toward(image, paper, 0.35), (22, 22, 24), 0.70 * pencil)
    drawn = torch.where(gray < 0.36, torch.lerp(drawn, image, 0.6), drawn)
    image = torch.lerp(image, drawn, s.shading.hatch)

    blots = noise(10)
    image = torch.lerp(image, image + 0.085 * blots + 0.045 * noise(22), cue.blotches)
    beyond = (torch.maximum(x.abs(), y.abs()) + 0.07 * blots - 0.85) * 9
    image = _toward(image, paper, beyond.clamp(0, 1) * 0.85 * s.background.torn)
    wood = torch.sin(60 * y + 5 * noise(4) + 9 * torch.sin(1.5 * x))
    image = image * (1 + 0.05 * cue.wood * wood)

    blurred = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
    image = torch.lerp(image, blurred, 0.7 * cue.blur)
    blocks = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode="nearest")
    image = torch.lerp(image, (blocks * 6).round() / 6, cue.pixels)
    return (image + cue.grain * noise(size)).clamp(0, 1) * 2 - 1
