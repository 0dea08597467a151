"""How a person's portrait is painted: back to front, one function per part.

Axes: H = W = side. Maps are [1, H, W], colours [3, 1, 1] or [3, H, W], in [0, 1]. Coordinates run
right and down; the picture is 2 wide and high.
"""

import functools
import math

import torch
import torch.nn.functional as F

from miniature.canvas import (
    CEL,
    Canvas,
    blurred,
    box,
    bump,
    ellipse,
    luminance,
    overlap,
    recolor,
    rgb,
    ridge,
    slope,
    step,
    stroke,
    toward,
    union,
    zigzag,
)

# Palettes (RGB in percent, in the order of the factor's names; hats are of CLOTH too)

SKIN = ((97, 83, 76), (89, 66, 51), (74, 50, 34), (54, 34, 22), (34, 21, 14))
IRIS = ((30, 50, 68), (40, 52, 38), (50, 36, 16), (36, 21, 11), (23, 13, 8))  # by the skin
HAIR = ((9, 8, 9), (32, 19, 11), (66, 26, 10), (84, 66, 34), (68, 68, 70), (17, 30, 76))
CLOTH = ((74, 13, 14), (17, 52, 27), (17, 28, 68), (88, 71, 20), (91, 91, 91), (13, 13, 16))
BACKDROP = ((45, 62, 82), (85, 58, 68), (47, 70, 50), (85, 76, 45), (62, 50, 78), (66, 67, 70))
# What a monster makes of each skin (skin, eyes and the tint of the horns, horns) and of each hair.
MONSTER_SKIN = ((42, 74, 26), (24, 58, 82), (60, 30, 76), (82, 20, 18), (94, 52, 10))
MONSTER_EYES = ((98, 85, 15), (92, 18, 12), (94, 96, 98), (45, 92, 30), (25, 85, 95))
MONSTER_HORNS = ((25, 7), (10, 2), (36, 10), (27, -12), (16, 20))  # place and slant, in percent
MONSTER_HAIR = ((86, 88, 92), (18, 66, 30), (58, 20, 74), (25, 45, 90), (90, 36, 10), (90, 80, 22))

MOUTH_Y, EYE_Y = 0.305, -0.02  # below the head's centre
WRAP = (50, 36, 32)  # how far light creeps around skin, by channel: red goes far in it


class Scene:
    """What the parts of one person's portrait share; nothing of it changes while it is painted."""

    def __init__(self, kind, index, proportion, cues, side, noise):
        self.kind, self.index, self.proportion = kind, index, proportion
        self.eyes, self.colors, self.shading, self.lines, self.background, self.texture = cues
        self.side, self.noise = side, noise
        self.smooth = min(self.shading.smooth, 1.0)
        self._frames()
        self._dyes()
        self._hair()

    def _frames(self):
        """Coordinates, and the head's shape."""
        p, self.turn = self.proportion, self.proportion["turn"]
        # The picture (x, y): coordinates of the pixels' centres. The body (bx, by), and the head
        # (hx, hy), in whose frame it is upright, its centre at 0: all in units of the body.
        axis = (torch.arange(self.side, device=self.noise.device) + 0.5) * 2 / self.side - 1
        self.x, self.y = axis[None, None], axis[None, :, None]
        scale = 1.14 + 0.13 * p["size"]
        wobble = self.lines.wobble
        sway = [wobble * self.chance(cells) if wobble else 0 for cells in (8, 16)]
        self.bx = (self.x + sway[0] - 0.16 * p["place_x"]) / scale
        self.by = (self.y + sway[1] - 0.16 * p["place_y"]) / scale
        self.pixel = 2 / self.side / scale
        self.lean, pivot = 0.174 * p["tilt"], 0.60
        cos, sin = math.cos(self.lean), math.sin(self.lean)
        self.hx = cos * self.bx + sin * (self.by - pivot) - 0.02 * self.turn
        self.hy = cos * (self.by - pivot) - sin * self.bx + pivot - 0.03
        across = (self.bx - 0.25 * self.lean).square()
        shoulders = 0.61 + 0.33 * (across + 0.01).sqrt() + 0.22 * across
        self.torso = overlap((shoulders - self.by) * 0.9, across.sqrt() - 0.95)
        light = 0.45 + 0.2 * p["light"]  # how far it comes from the left
        self.light = (-light, -0.42, math.sqrt(1 - 0.42**2 - light**2))

        # The head: half axes a and b. Features sit at fx instead of hx: they turn with it.
        self.a, self.b = 0.415 + 0.03 * p["head_width"], 0.535 + 0.03 * p["head_height"]
        angle = 0.24 * self.turn
        depth = ((1.08 * self.a) ** 2 - self.hx.square()).clamp_min(0).sqrt()
        self.fx = self.hx * math.cos(angle) - depth * math.sin(angle)
        self.ax, self.ux = self.fx.abs(), self.hx.abs()
        self.eye_x = 0.184 + 0.015 * p["eye_distance"]  # the eyes are at fx = +-eye_x
        self.tip = 0.145 + 0.025 * p["nose"]  # the nose's
        low, pointed = (self.hy / self.b).clamp(0, 1.2), self.eyes.jaw
        jaw = 1 - (0.16 + 0.14 * pointed) * low.square() + 0.05 * low * (1 - pointed)
        self.ball = (self.hx / (self.a * jaw)).square() + (self.hy / self.b).square()  # 1: edge
        self.head = ellipse(self.hx / jaw, self.hy, self.a, self.b)

    def _dyes(self):
        """Colours."""
        skin, cue = self.palette(SKIN, "skin"), self.colors
        zombie = rgb(skin, (44, 60, 32)) * (0.55 + 0.6 * luminance(skin))
        self.skin = torch.lerp(recolor(skin, cue), zombie, 0.9 * cue.zombie)
        self.skin = torch.lerp(self.skin, self.palette(MONSTER_SKIN, "skin"), 0.95 * cue.monster)
        self.lip = recolor(skin * rgb(skin, (87, 54, 53)) + rgb(skin, (4, 0, 1)), cue)
        self.lip = torch.lerp(self.lip, self.skin * 0.6, min(1, cue.zombie + cue.monster))
        self.hair = recolor(self.palette(HAIR, "hair_color"), cue)
        self.hair = torch.lerp(self.hair, self.palette(MONSTER_HAIR, "hair_color"), cue.monster)
        self.hair = toward(self.hair, (82, 82, 83), 0.9 * cue.grey)
        self.clothes = recolor(self.palette(CLOTH, "clothes"), cue, self.background.negative)
        self.hat = recolor(self.palette(CLOTH, "hat_color"), cue)
        self.dark, self.white = self.dye(7, 5, 6), rgb(skin, (97, 97, 96))
        self.gold = self.dye(88, 72, 30)
        ink = rgb(skin, [100 * v for v in (self.lines.red, self.lines.green, self.lines.blue)])
        self.ink = torch.lerp(ink, 1 - self.palette(CLOTH, "clothes"), self.lines.glow)

    def _hair(self):
        """The hair falls from a point above the head: psi counts across strands, rho along them."""
        vx, vy = self.hx - 0.05, self.hy + 0.78
        self.psi, self.rho = torch.atan2(vx, vy), (vx.square() + vy.square()).sqrt()
        self.curls = 0.030 * torch.sin(13 * torch.atan2(self.hx, -self.hy) + 2 * self.turn)
        angle, curly = self.psi, self.kind["hair"] == "curly"
        if curly:
            waves = torch.sin(15 * self.hx + 2.5 * torch.sin(11 * self.hy))
            angle = angle + 1.3 * waves
        # Strands in about [-1, 1]: a fixed pattern, and noise smeared along them.
        warp = torch.sin(4 * self.rho + 9 * self.psi)
        self.strands = 0.30 * torch.sin(30 * self.psi + 1.5 * warp)
        self.strands = self.strands + 0.24 * torch.sin(67 * self.psi - warp)
        fine, dx, dy = self.chance(self.noise.shape[-1])[None], angle.sin(), angle.cos()
        for reach in (1.6, 3.2, 6.4, 12.8):
            reach = reach / self.noise.shape[-1]
            at = torch.stack([self.x + dx * reach, self.y + dy * reach], dim=-1)
            fine = fine + F.grid_sample(fine, at, "bilinear", "reflection", align_corners=False)
        self.strands = self.strands + 0.11 * fine[0] + (0.5 * waves if curly else 0)

    def chance(self, cells, side=None):
        """Smooth noise of about unit size [1, H, W]: the white noise, averaged to cells."""
        block, side = self.noise.shape[-1] // cells, side or self.side
        coarse = F.avg_pool2d(self.noise, block) * block if block > 1 else self.noise
        if coarse.shape[-1] == side:
            return coarse
        return F.interpolate(coarse[None], size=(side, side), mode="bicubic")[0]

    def dye(self, *percent):
        """A constant colour as the colors cue shows it [3, 1, 1]."""
        return recolor(rgb(self.x, percent), self.colors)

    def palette(self, table, factor):
        """The person's colour of a factor [3, 1, 1], before the colors cue."""
        return rgb(self.x, table[self.index[factor]])

    def choose(self, factor, default=0.0, **values):
        """The number that goes with the person's value of a factor."""
        return values.get(self.kind[factor], default)


def portrait(kind, index, proportion, cues, size, noise):
    """One picture [3, size, size] in [0, 1].

    kind, index: of each category of faces.CATEGORIES, its name and its number; proportion: {name:
    value}; cues: a namespace each for faces.CUES, with the values of faces.TABLES; noise:
    [1, size, size], what is chance. Painted larger and shrunk, which smooths what is fine.
    """
    s = Scene(kind, index, proportion, cues, max(size, min(2 * size, 192)), noise)
    canvas = Canvas(s, _wall(s).expand(-1, s.side, s.side))
    for part in (_back_hair, _neck, _shirt, _tail, _ears, _head, _beard, _mouth, _nose, _eyes,
                 _marks, _glasses, _front_hair, _horns, _pointed_ears, _hat):
        part(canvas, s)
    layers = canvas.image if canvas.pencil is None else torch.cat([canvas.image, canvas.pencil])
    layers = F.interpolate(layers[None], size=(size, size), mode="area")[0]
    return _finish(layers[:3], layers[3:], s)


# ----------------------------------------------------------------------------------------------
# The parts, back to front


def _wall(s):
    """The background [3, H, W]: the person's colour, altered by the cue."""
    x, y, cue = s.x, s.y, s.background
    u = x + 0.22 * s.proportion["backdrop"]
    swapped = s.palette(BACKDROP[3:] + BACKDROP[:3], "background")
    wall = torch.lerp(s.palette(BACKDROP, "background"), swapped, cue.swap)
    wall = toward(wall, (100, 100, 100), cue.lighten)
    wall = toward(wall, (95, 93, 89), cue.paper)
    if cue.bokeh:
        uneven = 0.10 * torch.sin(2.3 * u + 1.7 * y + 1) + 0.08 * torch.sin(3.1 * u - 2.6 * y)
        wall = wall * (1 + cue.bokeh * (uneven - 0.16 * y))
        wall = toward(wall, (100, 98, 92), (0.26 * cue.bokeh * _lights(u, y)).clamp(0, 0.5))
    if cue.rays:
        slant = step(torch.sin(5 * (x + 0.55 * y) + 1.5 * s.proportion["backdrop"]) - 0.1, 0.04)
        slant = slant * (0.75 - 0.35 * y) * 0.42 * cue.rays
        wall = toward(wall * (1.02 - 0.10 * y), (100, 100, 100), slant)
        wall = toward(wall, (100, 100, 98), cue.rays * _stars(u, y, 0.050, 7))
    if cue.dither:  # three tones, and between them blocks that alternate
        block = [((v + 1) * 16).floor() for v in (x, y)]
        level = 1.6 + 1.5 * (block[1] / 16 - 1) + 0.5 * ((block[0] + block[1]).remainder(2) - 0.5)
        wall = wall * (1 - 0.10 * cue.dither * (level.round() - 1))
    if cue.print:
        wall = torch.lerp(wall, _print(wall, x, y, u), cue.print)
    if cue.cave:
        rock = 0.10 * torch.sin(5 * u + 3 * torch.sin(3 * y)) + 0.07 * torch.sin(11 * y + 4 * u)
        fire = bump(u - 0.95, y - 0.5, 0.75, 0.9) + 0.8 * bump(u + 1.0, y - 0.3, 0.6, 0.8)
        cave = wall * rgb(x, (82, 66, 58)) * (0.80 + rock) + 0.50 * fire * rgb(x, (95, 46, 12))
        wall = torch.lerp(wall, cave, cue.cave)
    if cue.night:
        night = wall * rgb(x, (48, 46, 66)) * (1.10 + 0.30 * y) + rgb(x, (5, 5, 19))
        night = night + bump(u - 0.72, y + 0.62, 0.45, 0.45) * rgb(x, (12, 12, 20))
        moon = ((u - 0.72).square() + (y + 0.62).square()).sqrt()
        bite = ((u - 0.64).square() + (y + 0.67).square()).sqrt()
        moon = step(0.20 - moon, 0.012) * step(bite - 0.18, 0.012)
        light = torch.maximum(moon, _stars(u, y, 0.034, 14))
        wall = torch.lerp(wall, toward(night, (100, 97, 80), light), cue.night)
    if cue.forest:
        trunks = step(torch.sin(6.5 * u + 0.5 * torch.sin(2 * y)) - 0.55, 0.25)
        wood = wall * rgb(x, (74, 94, 64)) * (1.08 - 0.20 * y) + rgb(x, (6, 10, 3))
        wood = toward(wood * (1 - 0.42 * trunks), (95, 100, 60), 0.35 * bump(x, y + 0.9, 1.1, 0.7))
        wood = toward(wood, (84, 96, 52), (0.36 * _lights(u, y)).clamp(0, 0.5))
        wall = torch.lerp(wall, wood, cue.forest)
    falloff = 0.08 - 0.15 * (x.square() + (y + 0.1).square())
    wall = wall * (1 - cue.darken) * (1 + cue.vignette * falloff)
    return torch.lerp(wall, 1 - wall, cue.negative).clamp(0, 1)


def _lights(u, y):
    """Discs of light far behind, out of focus."""
    discs = ((-0.95, -0.70, 0.22, 0.9), (-0.62, -0.93, 0.15, 0.6), (-0.75, -0.18, 0.17, 0.5),
             (-1.08, 0.25, 0.24, 0.7), (0.70, -0.85, 0.20, 0.8), (0.98, -0.40, 0.26, 0.6),
             (0.76, -0.05, 0.14, 0.8), (1.10, 0.25, 0.18, 0.6), (0.25, -1.02, 0.18, 0.5),
             (-0.25, -1.05, 0.24, 0.4), (1.30, -0.85, 0.18, 0.8), (-1.30, -0.40, 0.20, 0.8))
    glow = 0
    for cx, cy, r, strength in discs:
        distance = ((u - cx).square() + (y - cy).square()).sqrt()
        glow = glow + strength * step(r - distance, 0.22 * r)
    return glow


def _stars(u, y, size, n):
    """n stars of four points, in [0, 1]."""
    light = 0
    for k in range(n):
        cx, cy = 1.25 * math.sin(2.4 * k + 0.6), 0.95 * math.sin(4.1 * k + 0.3) - 0.25
        r = math.sqrt(size * (0.6 + 0.8 * (k * 0.618 % 1)))
        star = ((u - cx).abs() + 1e-4).sqrt() + ((y - cy).abs() + 1e-4).sqrt()
        light = light + step(1.25 * r - star, 0.25 * r)
    return light.clamp(0, 1)


def _print(wall, x, y, u):
    """A woodblock print's background: a sky that fades from above, and waves."""
    sky = torch.lerp(rgb(x, (10, 24, 56)), rgb(x, (97, 89, 70)), ((y + 1.08) / 0.6).clamp(0, 1))
    sky = torch.lerp(sky, wall * rgb(x, (108, 100, 82)), 0.10 + 0.65 * step(y + 0.55, 0.35))
    row = (y - 0.40) / 0.18
    cell = (u / 0.36 + 0.5 * row.floor().remainder(2)).remainder(1) - 0.5
    ring = (4 * cell.square() + (1 - row.remainder(1)).square()).sqrt()
    foam = 0.85 * step(torch.sin(16 * ring - 0.6), 0.35)
    sea = torch.lerp(wall * rgb(x, (28, 44, 72)), rgb(x, (95, 89, 76)), foam)
    return torch.lerp(sky, sea, step(y - 0.40 + 0.03 * torch.cos(17.5 * u), 0.01))


def _back_hair(canvas, s):
    hx, hy, a, b, long = s.hx, s.hy, s.a, s.b, 0.08 * s.proportion["hair_length"]
    kind = s.kind["hair"]
    if kind == "long":
        wave = 0.02 * torch.sin(9 * hy + 2)
        back = box(s.ux + wave, hy - 0.22 - long, a + 0.12, 0.80 + long, 0.42)
    elif kind == "curly":
        back = ellipse(hx, hy + 0.08, a + 0.20, b + 0.14) + s.curls
    elif kind in ("ponytail", "short"):
        back = overlap(ellipse(hx, hy + 0.06, a + 0.045, b + 0.045), hy - 0.06)
    else:
        return
    canvas.hairy(s.hair * (1 - 0.4 * s.smooth), back, 0.3)


def _neck(canvas, s):
    x, y = s.bx - 0.25 * s.lean, s.by
    neck = box(x, y - 0.70, 0.20 + 0.16 * (y - 0.62).clamp_min(0), 0.45, 0.05)
    neck = union(neck, overlap(s.torso, y - 0.90))
    shadow = ellipse(s.hx + 0.08 * s.light[0], s.hy - 0.20, s.a * 0.86, s.b * 0.9)
    shadow = canvas.cover(shadow, 0.07)  # the head's
    round_ = 0.9 * (x / 0.24).clamp(-0.9, 0.9)
    lit = canvas.shade(s.skin, round_, 0.25 + 0 * y, WRAP, light=1 - 0.62 * shadow)
    lit = lit * (1 - s.shading.cel * step(shadow - 0.5, 0.1) * rgb(x, CEL))
    canvas.blend(lit, canvas.cover(neck))
    canvas.outline(neck)


def _shirt(canvas, s):
    x, y = s.bx - 0.25 * s.lean, s.by
    folds = 0.030 * torch.sin(7 * x + 9 * y) + 0.024 * torch.sin(15 * x - 6 * y + 1)
    gx, gy = slope(folds + 0.22 * (1 - (x / 0.95).square()).clamp_min(0).sqrt(), s.pixel)
    ny = (-0.35 - 0.5 * gy).clamp(-0.8, 0.8)
    shadow = 0.3 * s.smooth * canvas.cover(ellipse(s.hx, s.hy - 0.30, s.a, s.b * 0.9), 0.10)
    cloth = canvas.shade(s.clothes, -gx, ny, drawn=(x * 0.8, 0 * y)) * (1 - shadow)
    if s.lines.kimono:
        edge = x.abs() - 0.22 + 0.55 * (y - 0.62)
        shirt = overlap(s.torso, -edge)
        hem = overlap((edge - 0.055).abs() - 0.055, s.torso)
        trim = torch.lerp(cloth, s.dye(96, 90, 74), 0.8)
        pattern = step(torch.cos(16 * x + 8 * y) * torch.cos(16 * y - 8 * x) - 0.72, 0.1)
        cloth = torch.lerp(cloth, s.dye(96, 90, 74), 0.6 * pattern)
    else:
        shirt = overlap(s.torso, -ellipse(x, y - 0.62, 0.28, 0.17))
        hem = overlap(ellipse(x, y - 0.62, 0.30, 0.19).abs() - 0.022, s.torso - 0.02)
        trim = cloth * 0.86
    canvas.blend(cloth, canvas.cover(shirt))
    canvas.blend(trim, canvas.cover(hem))
    canvas.outline(hem, 0.7, 0.6)
    canvas.outline(shirt)
    if s.background.bokeh:  # out of focus, as all that is painted so far
        canvas.image = torch.lerp(canvas.image, blurred(canvas.image, 1), 0.8 * s.background.bokeh)


def _tail(canvas, s):
    """The ponytail, from behind the neck over the shoulder."""
    if s.kind["hair"] != "ponytail":
        return
    hy, end = s.hy, 0.86 + 0.16 * s.proportion["hair_length"]
    across = s.hx + 0.40 + 0.10 * torch.sin(3.4 * hy - 0.4)
    wide = 0.115 * ((end - hy) / 0.5).clamp(0, 1).sqrt() * ((hy + 0.15) / 0.4).clamp(0, 1).sqrt()
    tail = overlap(across.abs() - wide, -0.1 - hy, hy - end)
    canvas.hairy(s.hair * 0.92, tail, 0.12)
    canvas.fill(s.clothes * 0.7, overlap(tail - 0.008, (hy - 0.30 - 0.3 * across).abs() - 0.025))


def _ears(canvas, s):
    out = s.ux - s.a + 0.05 * s.turn * s.hx.sign()
    ear = ellipse(out - 0.005, s.hy - 0.03, 0.052, 0.105)
    canvas.body(s.skin * rgb(out, (98, 90, 88)), ear, 0.05, wrap=WRAP)
    hollow = ellipse(out - 0.012, s.hy - 0.03, 0.024, 0.06)
    canvas.fill(s.skin * rgb(out, (72, 58, 55)), hollow, 0.6 * s.smooth, 0.02)


def _relief(s):
    """The height of the face over the head's ball [1, H, W]."""
    fx, hy, ax, big, hollow = s.fx, s.hy, s.ax, s.eyes.nose, s.shading.hollow
    smile, ex, mouth = s.choose("mouth", smile=1.0), s.ax - s.eye_x, s.hy - MOUTH_Y
    nx, down = fx + 0.035 * s.turn, ((hy + 0.14) / (s.tip + 0.16)).clamp(0, 1)
    nose = ridge(nx, 0.036 + 0.022 * big * down) * (0.018 + 0.075 * big * down * down.sqrt())
    f = nose * step(s.tip + 0.035 - hy, 0.035) * step(hy + 0.10, 0.09)
    f = f + 0.040 * big * bump(nx, hy - s.tip, 0.052 * big, 0.044 * big)
    f = f + 0.026 * big * bump(nx.abs() - 0.060 * big, hy - s.tip - 0.012, 0.026, 0.028)
    f = f - (0.042 + 0.03 * hollow) * bump(ex + 0.02, hy - EYE_Y + 0.01, 0.115, 0.075)
    f = f + 0.020 * bump(ex, hy - EYE_Y - 0.003, 0.085, 0.050)  # the eyeballs
    f = f + 0.026 * bump(ax - 0.16, hy + 0.155, 0.16, 0.055)  # the brows
    f = f + (0.032 + 0.014 * smile) * bump(ax - 0.245, hy - 0.13 + 0.03 * smile, 0.12, 0.11)
    f = f - (0.014 + 0.05 * hollow) * bump(ax - 0.27, hy - 0.30, 0.09, 0.13)
    f = f + 0.030 * bump(fx, mouth, 0.17, 0.12)
    f = f - 0.008 * bump(fx, mouth + 0.085, 0.016, 0.035)  # the groove above the lips
    f = f + 0.034 * bump(fx, hy - 0.495, 0.11, 0.060)  # the chin, and the dent over it
    f = f - 0.014 * bump(fx, mouth - 0.105, 0.10, 0.03)
    fold = stroke(ax, hy, (0.095 + 0.02 * smile, s.tip - 0.01), (0.175 + 0.03 * smile, 0.30), 0.0)
    f = f - (0.008 + 0.006 * smile) * ridge(fold, 0.020)
    return f - 0.03 * s.lines.wrinkles * _wrinkles(s) if s.lines.wrinkles else f


def _wrinkles(s):
    """Where an old face is furrowed [1, H, W], in [0, 1]."""
    fx, hy, ax = s.fx, s.hy, s.ax
    ex, ey = ax - s.eye_x, hy - EYE_Y
    lines = [overlap((ey - 0.072 + 4 * ex.square()).abs(), ex.abs() - 0.085)]  # below the eyes
    for k, y in enumerate((-0.345, -0.285, -0.225)):  # on the forehead
        wave = hy - y - 0.012 * torch.cos(9 * fx + k) - 0.03 * fx.square()
        lines.append(overlap(wave.abs(), ax - 0.21 + 0.02 * k))
    for k in (-1, 0, 1):  # crow's feet
        lines.append(stroke(ex, ey, (0.10, 0.012 * k), (0.165, 0.045 * k), 0.0))
    lines.append(stroke(ax, hy, (0.095, 0.14), (0.185, 0.31), 0.0))  # beside the mouth
    lines.append(stroke(ax, hy, (0.150, 0.34), (0.165, 0.44), 0.0))
    lines.append(stroke(ax, hy, (0.022, -0.15), (0.028, -0.09), 0.0))  # between the brows
    return ridge(union(*lines).clamp_min(0), 0.013)


def _head(canvas, s):
    hx, hy, a, b, cue = s.hx, s.hy, s.a, s.b, s.shading
    # blood lies under the cheeks and the nose; the eyes' surroundings are darker
    warm = 0.55 * bump(s.ax - 0.235, hy - 0.16, 0.12, 0.09)
    warm = warm + 0.4 * bump(s.fx, hy - s.tip, 0.06, 0.05)
    warm = (warm * (0.5 + cue.blush)).clamp(0, 1)
    skin = torch.lerp(s.skin, s.skin * rgb(hx, (103, 80, 78)), warm)
    if cue.smooth:
        tired = bump(s.ax - s.eye_x, hy - EYE_Y - 0.02, 0.12, 0.08)
        tired = (tired * (0.35 * cue.smooth + 0.9 * cue.hollow)).clamp(0, 0.9)
        skin = torch.lerp(skin, s.skin * rgb(hx, (86, 76, 80)), tired)
    skin = _skin_texture(skin, s)
    # the ball's normals; the face's relief upon it
    depth = (1 - s.ball).clamp_min(0).sqrt()
    nx, ny, nz = hx / a**2, 0.8 * hy / b**2, depth / (0.9 * a)
    norm = (nx.square() + ny.square() + nz.square()).clamp_min(1e-6).rsqrt()
    nx, ny = nx * norm, ny * norm
    drawn, light = (nx, ny), 1.0
    if cue.smooth:
        gx, gy = slope(_relief(s), s.pixel)
        nx, ny = nx - 0.85 * gx, ny - 0.85 * gy
        norm = (nx.square() + ny.square() + (nz * norm).square()).clamp_min(1e-6).rsqrt()
        nx, ny = nx * norm, ny * norm
        light = 1 - 0.30 * bump(s.fx - 0.055, hy - s.tip - 0.055, 0.075, 0.05)  # the nose's shadow
        brim = -0.24 + 0.06 * (s.kind["hat"] != "none")
        if s.kind["hair"] != "bald" or s.kind["hat"] != "none":
            light = light - 0.25 * step(brim - hy, 0.12)
    lit = canvas.shade(skin, nx, ny, WRAP, drawn, light, sheen=0.30 * cue.sheen)
    canvas.blend(lit, canvas.cover(s.head))
    canvas.outline(s.head)


def _skin_texture(skin, s):
    hx, hy, cue = s.hx, s.hy, s.texture
    if cue.pores:
        mottle = 0.010 * s.chance(32) + 0.007 * s.chance(s.noise.shape[-1])
        skin = skin * (1 + cue.pores * mottle * rgb(hx, (80, 110, 110)))
    if cue.rot:
        rot = step(s.chance(8) + 0.5 * s.chance(32) - 0.4, 0.3) * cue.rot
        skin = torch.lerp(skin, s.skin * rgb(hx, (62, 58, 70)), 0.65 * rot)
    if cue.scales:
        row = 22 * hy
        u, v = (22 * s.fx + 0.5 * row.floor().remainder(2)).remainder(1) - 0.5, row.remainder(1)
        scale = step(0.55 - (u.square() + (v - 0.1).square()).sqrt(), 0.12) * (0.6 + 0.4 * v)
        skin = skin * (1 + cue.scales * (0.34 * scale - 0.2) * step(s.ax - 0.06, 0.2))
    if cue.spots:
        spots = step(s.chance(32) - 1.25, 0.25) * cue.spots
        skin = torch.lerp(skin, skin * rgb(hx, (80, 68, 60)), 0.7 * spots)
    return skin


def _beard(canvas, s):
    if s.kind["beard"] == "none":
        return
    fx, hy, ax, color = s.fx, s.hy, s.ax, s.hair * 0.9
    if s.kind["beard"] == "beard":
        around_mouth = -ellipse(fx, hy - MOUTH_Y - 0.012, 0.150, 0.078)
        cheek = 0.17 - 1.2 * (ax - 0.20).clamp_min(0) ** 1.3 + 0.10 * (0.20 - ax).clamp_min(0)
        full = overlap(s.head - 0.025 * step(hy - 0.3, 0.2), cheek - hy + 0.02, around_mouth)
        locks = 0.015 * s.lines.locks * zigzag(9 * fx)
        canvas.hairy(color, full + locks, 0.14, outline=0.0, soft=0.028)
        if s.lines.dwarf:
            low, out = hy - 0.40, ax - 0.12
            wide = (0.40 + 0.05 * torch.sin(9 * low) - 0.30 * low.clamp_min(0)).clamp_min(0.1)
            great = overlap(ellipse(fx, low, wide, 0.66), cheek - hy, around_mouth)
            canvas.hairy(color, great, 0.22, soft=0.02)
            braid = overlap(out.abs() - 0.055 - 0.012 * torch.cos(38 * low), 0.30 - low, low - 0.62)
            canvas.body(color * (1 + 0.25 * torch.sin(38 * low + 18 * out.abs())), braid, 0.05)
            ring = overlap(out.abs() - 0.062, (low - 0.33).abs() - 0.025)
            canvas.body(s.gold, ring, 0.03, sheen=0.8)
    stache = stroke(ax, hy, (0.022, MOUTH_Y - 0.064), (0.165, MOUTH_Y - 0.018), 0.043, 0.018)
    canvas.hairy(color, stache, 0.06, outline=0.35, soft=0.006)


def _mouth(canvas, s):
    factor, closed, smooth = s.eyes.mouth, s.kind["mouth"] == "neutral", s.smooth
    wide = (0.135 + 0.018 * s.proportion["mouth_width"]) * factor
    wide = wide * s.choose("mouth", neutral=0.95, smile=1.22, open=0.78)
    x, y = s.fx + 0.012 * s.turn, s.hy - MOUTH_Y
    q = (x / wide).square()
    arch = 1 - q
    bow = arch.clamp_min(0).sqrt()
    mid = y + s.choose("mouth", smile=0.042, neutral=0.004) * q - s.choose("mouth", smile=0.012)
    gape = s.choose("mouth", smile=0.040, open=0.095) * factor * bow
    above = s.choose("mouth", open=0.022) * factor * arch.clamp_min(0)
    beyond = x.abs() - wide
    upper = -above - 0.036 * factor * (1 - 0.30 * ridge(x, 0.20 * wide)) * arch
    lower = gape + 0.046 * factor * bow * arch
    lips = overlap(upper - mid, mid - lower, beyond)
    hole = overlap(-above - mid, mid - gape, beyond + 0.015)
    seen = 0.35 + 0.65 * smooth
    light = 1 + smooth * (0.32 * step(mid - 0.5 * gape, 0.03) - 0.20)
    canvas.fill(s.lip * light, lips, 0.9 * seen, 0.006)
    if smooth and s.shading.sheen:
        gloss = 0.30 * s.shading.sheen * smooth * bump(x + 0.01, mid - gape - 0.018, 0.07, 0.009)
        canvas.blend(rgb(x, (98, 90, 88)), gloss.clamp(0, 1))
    if closed:
        crease = overlap(mid.abs() - 0.006 - 0.3 * s.lines.width, beyond)
        canvas.fill(s.lip * 0.42, crease, 0.85 * seen, 0.004)
        canvas.line(s.ink, crease, s.lines.opacity)
        return
    inside = torch.lerp(s.dye(28, 6, 7), s.dye(60, 22, 22), 0.7 * step(mid - gape + 0.04, 0.03))
    canvas.fill(inside, hole)
    bite = s.choose("mouth", smile=0.040, open=0.024) * factor
    teeth = toward(s.white, (90, 86, 78), 0.5) * (1 - 0.35 * q.clamp(0, 1))
    canvas.fill(teeth, overlap(hole + 0.004, mid + above - bite))
    canvas.outline(hole, 0.8, 0.7)


def _nose(canvas, s):
    x, y, big = s.fx + 0.035 * s.turn, s.hy - s.tip, s.eyes.nose
    hole = ellipse(x.abs() - 0.036 * big, y - 0.036 * big, 0.020, 0.011)
    canvas.fill(s.skin * 0.30, hole, 0.75 * s.smooth, 0.008)
    if s.lines.opacity:
        tip = ellipse(x, y, 0.06 * big, 0.045 * big).abs() - s.lines.width * 0.4
        canvas.line(s.ink, overlap(tip, 0.012 - y), 0.8 * s.lines.opacity)
    if s.lines.bridge:
        side = stroke(x, y, (0.035, -0.20), (0.055 * big, 0.0), 0.006, 0.009)
        canvas.line(s.ink, side, 0.8 * s.lines.opacity)


def _eyes(canvas, s):
    cue, size, smooth = s.eyes, 1 + 0.10 * s.proportion["eye_size"], s.smooth
    w, up, down, r = (size * v for v in (cue.width, cue.upper, cue.lower, cue.iris))
    tall, side, e = r * cue.tall, s.fx.sign(), s.ax - s.eye_x  # e: outwards from the eye's middle
    big = min(max((up - 0.05) / 0.06, 0), 1)
    y = s.hy - EYE_Y - 0.035 * big + cue.slant * e
    arch = (1 - (e / w).square()).clamp_min(1e-6) ** cue.round
    steep = 1 + 2 * (e / w).abs().clamp_max(1) ** 3
    over, under = (-up * arch - y) / steep, (y - down * arch) / steep  # negative inside
    eye = overlap(over, under, e.abs() - w)
    gaze, iy = s.fx - side * s.eye_x - 0.012 * s.turn, y + 0.004
    crease = overlap((over * steep - 0.022 - 0.1 * up).abs() - 0.004, e.abs() - w * 0.95)
    seen = 0.55 * cue.crease * min(1, smooth + 0.5 * s.lines.opacity)
    canvas.line(s.skin * 0.5, crease, seen, 0.007)

    iris = toward(s.palette(IRIS, "skin"), (70, 12, 8), 0.9 * cue.red)
    iris = torch.lerp(iris, s.palette(MONSTER_EYES, "skin"), cue.monster)
    iris = toward(iris, (35, 85, 100), 0.9 * cue.glow)
    ball = toward(torch.lerp(s.white, iris, 0.75 * cue.monster), (84, 80, 80), 0.8 * smooth)
    ball = toward(ball, (8, 9, 10), cue.negative)
    if smooth:  # round, and in the lid's shadow
        rounded = 0.45 * (e / w).square().clamp(0, 1) + 0.35 * step(over + 0.035, 0.03)
        ball = ball * (1 - smooth * rounded)
    canvas.blend(ball, canvas.cover(eye, 0.003 * smooth))
    far = ((gaze / r).square() + (iy / tall).square()).clamp_min(1e-6).sqrt()
    low = (iy / tall).clamp(-1, 1)
    tone = 1.12 + 0.75 * cue.fade * low - 0.75 * step(far - 0.86, 0.16)
    if smooth:
        fibres = 0.12 * torch.sin(24 * torch.atan2(gaze, iy))
        tone = (tone + smooth * fibres) * (1 - 0.45 * smooth * step(over + 0.03, 0.02))
    iris = (iris * tone).clamp(0, 1) + 0.18 * cue.fade * low.clamp_min(0)
    canvas.blend(iris.clamp(0, 1), canvas.cover(overlap((far - 1) * r, eye)))
    slit = 0.6 * cue.monster
    pupil = ellipse(gaze, iy, r * cue.pupil * (1 - slit), tall * cue.pupil * (1 + slit))
    canvas.line(toward(s.dark, (92, 93, 95), cue.negative), overlap(pupil, eye), 1.0, 0.003)
    glint = ellipse(gaze + 0.32 * r, iy + 0.38 * tall, r * 0.30, tall * 0.30)
    canvas.fill(s.white, overlap(glint, eye), cue.light)
    glint = ellipse(gaze - 0.38 * r, iy - 0.45 * tall, r * 0.17, r * 0.20)
    canvas.fill(s.white, overlap(glint, eye), cue.light * (0.25 + 0.75 * cue.fade))

    lash = cue.lash * (0.55 + 0.45 * step(e, w))
    lash = overlap(over - lash, -over - 0.006, e.abs() - w * 1.04)
    canvas.line(s.dark, lash, 0.9, 0.002)
    if cue.lash > 0.02:
        ends = (w * 0.85, -0.02), (w * 1.12, -0.045 - 0.2 * up)
        canvas.line(s.dark, stroke(e, y, *ends, cue.lash * 0.45, 0.004))
    canvas.line(s.skin * 0.45, overlap(under.abs() - 0.005, e.abs() - w * 0.9), 0.45)

    brow_y = -0.155 - 0.025 * s.proportion["brow"] - 0.075 * big
    bend = s.hy - brow_y + 0.030 * (1 - (e / 0.13 + 0.1).square()) + cue.slant * 0.3 * e
    taper = 0.024 * cue.brow * (1 - 0.55 * step(e - 0.02, 0.12))
    brow = overlap(bend.abs() - taper, e.abs() - 0.115) + 0.008 * smooth * s.strands
    color = torch.lerp(s.hair * 0.7, s.skin * 0.45, 0.4 * smooth)
    canvas.line(color, brow, 0.92 - 0.10 * smooth, 0.010 * smooth)


def _marks(canvas, s):
    """Furrows of the old, seams of the undead, fangs."""
    fx, hy = s.fx, s.hy
    if s.lines.wrinkles:
        furrows = 0.28 * s.lines.wrinkles * _wrinkles(s) * canvas.cover(s.head)
        canvas.blend(s.skin * rgb(fx, (45, 34, 32)), furrows)
    if s.lines.scars:
        for (x0, y0), (x1, y1) in (((0.13, 0.10), (0.30, 0.27)), ((-0.25, -0.33), (-0.07, -0.25))):
            seam = stroke(fx, hy, (x0, y0), (x1, y1), 0.008)
            canvas.fill(rgb(fx, (42, 10, 10)), seam - 0.008, 0.5, 0.012)
            canvas.fill(rgb(fx, (22, 3, 4)), seam)
            nx, ny = 0.2 * (y0 - y1), 0.2 * (x1 - x0)
            for t in (0.125, 0.375, 0.625, 0.875):
                cx, cy = x0 + t * (x1 - x0), y0 + t * (y1 - y0)
                stitch = stroke(fx, hy, (cx - nx, cy - ny), (cx + nx, cy + ny), 0.007)
                canvas.fill(rgb(fx, (15, 4, 5)), stitch)
        blood = stroke(fx, hy, (0.07, MOUTH_Y + 0.03), (0.075, MOUTH_Y + 0.13), 0.011, 0.018)
        canvas.fill(rgb(fx, (40, 3, 4)), blood, 0.9)
    if s.lines.horns:
        ends = (0.072, MOUTH_Y - 0.005), (0.066, MOUTH_Y + 0.085)
        canvas.body(rgb(fx, (95, 92, 82)), stroke(s.ax, hy, *ends, 0.024, 0.004), 0.02)


def _glasses(canvas, s):
    if s.kind["glasses"] == "none":
        return
    fx, ax, y, black = s.fx, s.ax, s.hy - EYE_Y - 0.012, s.dye(9, 8, 9)
    lens = box(ax - s.eye_x, y, 0.140, 0.105, 0.085)
    inner, outer = s.eye_x - 0.13, s.eye_x + 0.135
    bridge = stroke(fx, y + 0.012 * torch.cos(12 * fx), (-inner, -0.03), (inner, -0.03), 0.011)
    temples = stroke(ax, y, (outer, -0.03), (s.a + 0.03, -0.035), 0.010)
    shadow = box(ax - s.eye_x, y - 0.022, 0.140, 0.105, 0.085).abs() - 0.012
    canvas.fill(s.skin * 0.45, shadow, 0.35 * s.smooth, 0.02)
    dark = s.kind["glasses"] == "sunglasses"
    if dark:
        canvas.fill(torch.lerp(s.dye(6, 6, 8), s.dye(30, 24, 22), step(y - 0.02, 0.12)), lens, 0.95)
    across = (fx - fx.sign() * s.eye_x) * 0.8 + y + 0.03
    glint = overlap(lens + 0.02, across.abs() - 0.030)
    canvas.fill(s.white, glint, 0.30 if dark else 0.16, 0.012)
    canvas.line(black, union(lens.abs() - 0.012, bridge, temples))


def _front_hair(canvas, s):
    hx, hy, a, b, kind = s.hx, s.hy, s.a, s.b, s.kind["hair"]
    if kind == "bald":
        return
    side, long = s.ux / a, 0.08 * s.proportion["hair_length"]
    locks = 0.055 * s.lines.locks * zigzag(3.3 * hx - 1.2 * hx * hy + 0.2)
    # the hairline: higher at the parting, falling to the temples
    line = -0.345 + 0.24 * ((hx - 0.10) / a).square() - 0.02 * torch.sin(9 * hx)
    line = line + (side - 0.86).clamp_min(0)
    if kind == "short":
        front = overlap(ellipse(hx, hy + 0.055, a + 0.050, b + 0.050), hy - line - locks, hy - 0.10)
    elif kind == "long":
        fall = ((hy + 0.40) / 0.46).clamp(0, 1)
        face = (a - 0.055) * fall.sqrt() - 0.10 * (hy - 0.25).clamp_min(0)
        face = face - (hx - 0.05 * (1 - fall)).abs() - (-0.40 - hy).clamp_min(0)
        face = 0.8 * face - 0.7 * locks * fall
        outer = box(hx, hy - 0.22 - long, a + 0.12 + 0.02 * torch.sin(9 * hy), 0.85 + long, 0.48)
        front = overlap(outer, face, hy - 0.86 - 2 * long + 0.04 * torch.cos(20 * hx))
    elif kind == "curly":
        front = ellipse(hx, hy + 0.08, a + 0.20, b + 0.14) + s.curls
        front = overlap(front, -ellipse(hx, hy - 0.20, a - 0.05, 0.56) - 0.8 * s.curls, hy - 0.2)
    elif kind == "spiky":
        spikes = 0.07 * (1 - zigzag(3.2 * torch.atan2(hx, 0.1 - hy) + 0.3))
        spikes = spikes * (0.35 - hy).clamp(0, 1)
        front = 0.75 * (ellipse(hx, hy + 0.055, a + 0.045, b + 0.02) - spikes)
        front = overlap(front, hy - line - 0.02 + 0.05 * zigzag(3.6 * hx + 0.2), hy - 0.10)
    else:  # combed back to a ponytail
        hairline = hy + 0.39 - 0.33 * side**3 - 0.3 * locks
        front = overlap(ellipse(hx, hy + 0.05, a + 0.030, b + 0.045), hairline, hy - 0.02)
    canvas.hairy(s.hair, front, gloss=1.0 if s.kind["hat"] == "none" else 0.0)


def _horns(canvas, s):
    if s.lines.horns:
        y, (place, slant) = s.hy + 0.60, (v / 100 for v in MONSTER_HORNS[s.index["skin"]])
        bend = 0.5 * (y - 0.1).square() * math.copysign(1, slant)
        horns = stroke(s.ux - place + bend, y, (0.0, 0.20), (slant, -0.16), 0.085, 0.012)
        color = torch.lerp(rgb(y, (90, 84, 68)), s.palette(MONSTER_EYES, "skin"), 0.5)
        canvas.body(color * (0.82 + 0.10 * torch.sin(46 * y)), horns, 0.08)


def _pointed_ears(canvas, s):
    """Of elves, and their golden circlets."""
    if not s.lines.elf:
        return
    out, y, ax = s.ux - s.a + 0.02 + 0.05 * s.turn * s.hx.sign(), s.hy - 0.02, s.ax
    canvas.body(s.skin, stroke(out, y, (0.0, 0.03), (0.235, -0.235), 0.085, 0.004), 0.07, wrap=WRAP)
    hollow = stroke(out, y, (0.02, 0.02), (0.17, -0.165), 0.035, 0.002)
    canvas.fill(s.skin * rgb(y, (72, 52, 48)), hollow, 0.6, 0.015)
    if s.kind["hat"] != "none":
        return
    band = overlap((s.hy + 0.315 - 0.10 * s.hx.square()).abs() - 0.018, s.head - 0.045)
    canvas.body(s.gold, band, 0.02, sheen=0.8)
    leaf = ellipse(ax - 0.10, s.hy + 0.335 + 0.3 * (ax - 0.10), 0.055, 0.020)
    canvas.body(s.dye(40, 66, 20), leaf, 0.02)
    canvas.body(s.dye(10, 72, 46), ellipse(s.fx, s.hy + 0.305, 0.036, 0.050), 0.04, sheen=1.2)


def _hat(canvas, s):
    hx, hy, a, color = s.hx, s.hy, s.a, s.hat
    if s.kind["hat"] == "none":
        if s.lines.dwarf:
            _helmet(canvas, s)
    elif s.lines.wizard:
        _pointed_hat(canvas, s)
    elif s.kind["hat"] == "cap":
        dome = overlap(ellipse(hx, hy + 0.17, a + 0.070, 0.47), hy + 0.215 + 0.12 * hx.square())
        canvas.body(color, dome, 0.40)
        curve = 0.42 * (0.40 - (hy + 0.2).square()).clamp_min(0).sqrt()
        seams = union((hx - 0.10 * s.turn).abs(), (s.ux - curve).abs()) - 0.006
        canvas.fill(color * 0.6, overlap(seams, dome + 0.01), 0.5, 0.006)
        x = hx - 0.16 * s.turn
        y = hy + 0.235 - 0.32 * x.square()
        canvas.fill(color * 0.35, ellipse(x, y - 0.010, 0.40, 0.085))
        canvas.body(color * 0.96, ellipse(x, y, 0.40, 0.085), 0.10)
    else:
        crown = box(hx, hy + 0.42, a * 0.92 + 0.10 * (hy + 0.3), 0.29, 0.13)
        crown = overlap(crown, hy + 0.22) + 0.07 * bump(hx, hy + 0.74, 0.14, 0.06)
        nx = 0.92 * (hx / (a + 0.02)).clamp(-0.95, 0.95)
        felt = canvas.shade(color, nx, -0.15 - 0.8 * bump(hx, hy + 0.72, 0.40, 0.05))
        canvas.blend(felt, canvas.cover(crown))
        canvas.outline(crown)
        ribbon = overlap(crown, (hy + 0.335 - 0.1 * hx.square()).abs() - 0.05)
        canvas.blend(canvas.shade(color * 0.35, nx, 0 * hy - 0.1), canvas.cover(ribbon))
        y = hy + 0.26 - 0.16 * hx.square()
        canvas.fill(color * 0.30, ellipse(hx, y - 0.035, a + 0.28, 0.07))
        canvas.body(color * 0.95, ellipse(hx, y, a + 0.30, 0.075), 0.09)


def _helmet(canvas, s):
    """A dwarf's, of iron and gold."""
    hx, hy, iron = s.hx, s.hy, s.dye(46, 48, 52)
    y = hy + 0.27 - 0.10 * hx.square()
    dome = overlap(ellipse(hx, hy + 0.14, s.a + 0.085, 0.54), y)
    canvas.body(iron, dome, 0.40, sheen=0.9)
    ridge_ = overlap((hx - 0.12 * s.turn).abs() - 0.035, dome - 0.02)
    canvas.body(s.gold, ridge_, 0.04, sheen=0.8)
    rim = overlap(y.abs() - 0.045, s.ux - s.a - 0.10)
    canvas.body(s.gold, rim, 0.05, sheen=0.8)
    rivets = (s.ux - 0.12).abs() - 0.12  # at 0.12 -+ 0.12 on both sides
    canvas.fill(iron * 0.5, ellipse(rivets, y, 0.018, 0.018))


def _pointed_hat(canvas, s):
    """A wizard's: of a hat wide and straight, of a cap narrow and bent."""
    hx, hy, a, color = s.hx, s.hy, s.a, s.hat
    up = (-0.24 - hy).clamp_min(0)
    side = hx - s.choose("hat", cap=0.9, hat=0.1) * up.square()
    narrow = 1 - up / 0.92
    cone = overlap(0.92 * (side.abs() - (a + 0.03) * narrow), hy + 0.20, -hy - 1.14)
    nx = 0.92 * (side / ((a + 0.05) * narrow).clamp_min(0.02)).clamp(-0.95, 0.95)
    crease = 0.25 * ridge(hy + 0.62 + 0.2 * side, 0.05)
    canvas.blend(canvas.shade(color * (1 - crease), nx, 0 * hy - 0.1), canvas.cover(cone))
    canvas.outline(cone)
    for cx, cy, r in ((-0.16, -0.42, 0.075), (0.13, -0.56, 0.060), (-0.03, -0.76, 0.045)):
        x, y = side - cx, hy - cy
        points = 0.7 + 0.3 * torch.cos(5 * torch.atan2(x, -y))
        star = (x.square() + y.square()).sqrt() - r * points
        canvas.fill(rgb(hx, (98, 84, 30)), overlap(star, cone + 0.01))
    band = overlap(cone, (hy + 0.285 - 0.1 * hx.square()).abs() - 0.040)
    canvas.body(s.gold, band, 0.04, sheen=0.6)
    wide, y = a + s.choose("hat", cap=0.14, hat=0.34), hy + 0.23 - 0.18 * hx.square()
    canvas.fill(color * 0.3, ellipse(hx, y - 0.035, wide - 0.02, 0.075))
    canvas.body(color * 0.95, ellipse(hx, y, wide, 0.080), 0.10)


# ----------------------------------------------------------------------------------------------
# What covers the whole picture


def _finish(image, pencil, s):
    """Hatching, paper, wood, blocks, grain upon a picture [3, size, size] in [0, 1]."""
    cue, size = s.texture, image.shape[-1]
    axis = (torch.arange(size, device=image.device) + 0.5) * 2 / size - 1
    x, y, chance = axis[None, None], axis[None, :, None], functools.partial(s.chance, side=size)
    if s.shading.hatch:
        image = torch.lerp(image, _hatched(image, pencil, x, y, chance), s.shading.hatch)
    if cue.wash:
        image = torch.lerp(image, _washed(image, chance), cue.wash)
    if s.background.torn:
        blots = 0.055 * chance(8) + 0.012 * chance(32)
        beyond = torch.maximum(x.abs(), y.abs()) + blots - 0.91
        image = image * (1 - 0.20 * s.background.torn * ridge(beyond, 0.045))
        image = toward(image, (98, 97, 93), 0.96 * s.background.torn * step(beyond - 0.03, 0.02))
    if cue.wood:
        wood = torch.sin(46 * y + 1.6 * chance(8) + 7 * torch.sin(1.3 * x + 0.5))
        image = image * (1 + 0.03 * cue.wood * wood)
    if cue.fibre:
        image = image * (1 + cue.fibre * (0.014 * chance(size // 2) + 0.014 * s.noise))
    if cue.blur:
        image = torch.lerp(image, blurred(image, 1), 0.5 * cue.blur)
    if cue.pixels:
        image = torch.lerp(image, _blocks(image), cue.pixels)
    if cue.dust:
        place = 0.5 * float(s.noise.mean()) * size  # anywhere
        scratch = 0.6 * step(0.004 - (x - place - 0.01 * chance(4)).abs(), 0.004)
        dust = step(chance(size // 2) - 3.0, 0.2) + scratch
        image = toward(image, (100, 100, 100), (0.8 * cue.dust * dust).clamp(0, 1))
    return (image + cue.grain * s.noise).clamp(0, 1)


def _hatched(image, pencil, x, y, chance):
    """A pencil's strokes, closer and crossed where it is dark; and the lines."""
    gray, hand, bare = luminance(image), 0.9 * chance(8), 1.0
    strokes = ((0.75, 0.66, 96, 0.74), (0.66, -0.75, 88, 0.46), (0.15, 1.0, 92, 0.24))
    for dx, dy, pitch, dark in strokes:
        wave = torch.sin(pitch * (dx * x + dy * y) + hand)
        depth = ((dark - gray) / 0.26).clamp(0, 1)
        bare = bare * (1 - 0.8 * depth.sqrt() * step(wave - 0.75 + 1.1 * depth, 0.5))
    grain = 0.18 * chance(image.shape[-1])
    strength = torch.maximum(0.8 * (1 - bare) * (1 + grain), pencil * (0.95 + 0.3 * grain))
    return toward(toward(image, (98, 97, 94), 0.72), (15, 15, 18), strength.clamp(0, 1))


def _washed(image, chance):
    """Pigment that ran on wet paper: soft middles, dark rims, blots."""
    blots, fine, wide = chance(8), chance(32), blurred(image, 4)
    rim = (wide - image).abs().sum(0, keepdim=True).clamp(0, 0.5)
    wet = torch.lerp(image, wide, 0.25 + 0.20 * step(blots - 0.3, 0.5))
    wet = torch.lerp(wet, image, step(0.45 - luminance(image), 0.12)) * (1 - 0.32 * rim)
    gray = luminance(wet)
    wet = gray + (wet - gray) * (1.15 + 0.15 * blots)
    uneven = blots + 0.35 * fine
    wet = toward(wet, (98, 97, 93), (0.05 + 0.14 * gray) * step(uneven, 1.0))
    return wet * (1 - 0.08 * ridge(uneven - 0.32, 0.16) + 0.018 * fine)


def _blocks(image):
    """32 blocks a side, of few colours."""
    side = image.shape[-1] // 32
    inner = side // 4
    cells = image.unfold(1, side, side).unfold(2, side, side)
    cells = cells[..., inner : side - inner, inner : side - inner].mean((-1, -2))
    few = ((cells * 9).round() / 9).clamp(0, 1)
    return few.repeat_interleave(side, 1).repeat_interleave(side, 2)
