"""Shapes, colours and light: what portraits are painted with.

Shapes are signed distances: a shape is d, negative inside, and one pixel of d around zero makes the
antialiased edge. Bodies are lit by their normals. Maps are [1, H, W], pictures and colours
[3, H, W] or [3, 1, 1], in [0, 1]; colours written as numbers are in percent.
"""

import functools
import math

import torch
import torch.nn.functional as F

CEL = (26, 32, 22)  # what a drawn shade takes away


def ellipse(x, y, a, b):
    """Distance to an ellipse with half axes a, b (first-order exact near the edge)."""
    q = ((x / a).square() + (y / b).square()).clamp_min(1e-6).sqrt()
    g = ((x / a**2).square() + (y / b**2).square()).clamp_min(1e-6).sqrt()
    return q * (q - 1) / g


def box(x, y, a, b, r):
    """Distance to a box with half sides a, b and corner radius r."""
    dx, dy = x.abs() - a + r, y.abs() - b + r
    outside = (dx.clamp_min(0).square() + dy.clamp_min(0).square() + 1e-12).sqrt()
    return outside + torch.maximum(dx, dy).clamp_max(0) - r


def stroke(x, y, start, end, r, r_end=None):
    """Distance to a round stroke between two points, of half width r (r_end at its end)."""
    px, py, bx, by = x - start[0], y - start[1], end[0] - start[0], end[1] - start[1]
    t = ((px * bx + py * by) / (bx * bx + by * by)).clamp(0, 1)
    width = r if r_end is None else r + (r_end - r) * t
    return ((px - t * bx).square() + (py - t * by).square() + 1e-12).sqrt() - width


def bump(x, y, a, b):
    """A hill of height 1 at 0, with half axes a, b."""
    return (-(x / a).square() - (y / b).square()).exp()


def ridge(d, width):
    """1 where d is 0, fading on both sides."""
    return (-(d / width).square()).exp()


def step(x, width):
    """0 below, 1 above, a ramp of +-width around 0."""
    return (x / (2 * width) + 0.5).clamp(0, 1)


def zigzag(x):
    """A wave of straight lines, of period 1, in [-1, 1]."""
    return 4 * (x.remainder(1) - 0.5).abs() - 1


def slope(f, pixel):
    """The gradient of a map [1, H, W], along x and along y."""
    padded = F.pad(f[None], (1, 1, 1, 1), mode="replicate")[0]
    gx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    gy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    return gx / (2 * pixel), gy / (2 * pixel)


def blurred(image, reach):
    """The mean over squares of 2 reach + 1 pixels."""
    padded = F.pad(image[None], (reach,) * 4, mode="replicate")
    return F.avg_pool2d(padded, 2 * reach + 1, 1)[0]


def union(*shapes):
    return functools.reduce(torch.minimum, shapes)


def overlap(*shapes):
    return functools.reduce(torch.maximum, shapes)


def rgb(like, percent):
    """A constant colour [3, 1, 1], on the device of a tensor."""
    return like.new_tensor(percent)[:, None, None] / 100


def toward(color, percent, share):
    """A colour, moved by a share in [0, 1] towards a constant one."""
    return torch.lerp(color, rgb(color, percent), share)


def luminance(color):
    return 0.30 * color[0:1] + 0.59 * color[1:2] + 0.11 * color[2:3]


def recolor(color, cue, negative=None):
    """A colour as the colors cue shows it, by those entries of COLORS that fit every colour.

    negative: how far it is inverted, if another cue than this one says so.
    """
    gray = luminance(color)
    color = gray + (color - gray) * cue.saturation
    color = (color - 0.5) * cue.contrast + 0.5 + cue.brightness
    color = color * rgb(color, (100 * cue.red, 100 * cue.green, 100 * cue.blue))
    color = toward(color, (98, 96, 92), cue.paper)
    ink = torch.lerp(rgb(color, (12, 16, 38)), rgb(color, (98, 90, 72)), gray)
    color = torch.lerp(color, ink, cue.ink).clamp(0, 1)
    return torch.lerp(color, 1 - color, cue.negative if negative is None else negative)


class Canvas:
    """A picture being painted: `image` [3, H, W], over which every call paints.

    `pencil` [1, H, W]: where lines show, or None where nothing is hatched.
    """

    def __init__(self, scene, image):
        self.scene, self.image = scene, image
        self.pencil = image[:1] * 0 if scene.shading.hatch else None

    def cover(self, d, soft=0.0):
        """The share of each pixel that lies inside the shape d, its edge softened by +-soft."""
        return (0.5 - d / (self.scene.pixel + 2 * soft)).clamp(0, 1)

    def blend(self, color, alpha):
        """Lay a colour over the picture with a strength in [0, 1]."""
        self.image = torch.lerp(self.image, color.expand_as(self.image), alpha)
        if self.pencil is not None:
            self.pencil = self.pencil * (1 - alpha)

    def fill(self, color, d, alpha=1.0, soft=0.0):
        """Fill the shape d, flat."""
        if alpha:
            self.blend(color, self.cover(d, soft) * alpha)

    def line(self, color, d, alpha=1.0, soft=0.0):
        """Fill the shape d as a line: a pencil presses on there."""
        if alpha:
            strength = self.cover(d, soft) * alpha
            self.blend(color, strength)
            if self.pencil is not None:
                self.pencil = torch.maximum(self.pencil, strength)

    def outline(self, d, opacity=1.0, width=1.0):
        """Draw the edge of the shape d as the lines cue does, given factors of its values."""
        lines = self.scene.lines
        self.line(self.scene.ink, d.abs() - lines.width * width / 2, lines.opacity * opacity)

    def shade(self, color, nx, ny, wrap=(35,), drawn=None, light=1.0, sheen=0.0):
        """A colour under the light, for normals (nx, ny), as the shading cue does it.

        wrap: how far light creeps around, by channel, in percent. drawn: normals for drawn shades,
        if others. light: its strength. sheen: strength of highlights.
        """
        cue, (lx, ly, lz) = self.scene.shading, self.scene.light
        lit = 1.0
        if cue.smooth:
            nz = (1 - nx.square() - ny.square()).clamp_min(0.01).sqrt()
            wrap = rgb(nx, wrap)
            key = ((nx * lx + ny * ly + nz * lz + wrap) / (1 + wrap)).clamp_min(0)
            lit = key * rgb(nx, (93, 90, 85)) + (0.28 - 0.10 * ny) * rgb(nx, (96, 98, 106))
            lit = (1 + cue.smooth * (lit * light - 1)).clamp_min(0.05)
        if cue.cel:
            dx, dy = drawn or (nx, ny)
            dz = (1 - dx.square() - dy.square()).clamp_min(0.01).sqrt()
            away = step(0.42 - dx * lx - dy * ly - dz * lz, 0.03)
            lit = lit * (1 - cue.cel * away * rgb(dx, CEL))
        lit = (color - cue.turned).abs() * lit
        if sheen and cue.smooth:
            half = (nx * lx + ny * ly + nz * (lz + 1)) / math.hypot(lx, ly, lz + 1)
            broad = half.clamp(0, 1).square().square().square().square()
            shine = broad + 0.4 * broad.square().square()
            lit = lit + 0.5 * sheen * cue.smooth * shine * (0.35 + 0.65 * color)
        return (lit.clamp(0, 1) - cue.turned).abs()

    def pillow(self, d, depth):
        """Normals of a body whose edge is round, as deep as that."""
        gx, gy = slope(d, self.scene.pixel)
        rise = (1 + d / depth).clamp(0, 1)
        rise = 0.9 * rise * rise.sqrt() / (gx.square() + gy.square()).clamp_min(1).sqrt()
        return gx * rise, gy * rise

    def body(self, color, d, depth=0.2, outline=1.0, **light):
        """Fill the shape d as a round body under the light, and outline it."""
        self.blend(self.shade(color, *self.pillow(d, depth), **light), self.cover(d))
        self.outline(d, outline)

    def hairy(self, color, d, depth=0.25, outline=1.0, soft=0.012, gloss=0.0):
        """Fill the shape d with hair, and outline it."""
        s, cue = self.scene, self.scene.shading
        if s.kind["hat"] != "none" or s.lines.dwarf:
            under = -0.27 - s.hy + 1.2 * (s.ux - s.a - 0.02).clamp_min(0)
            d = overlap(d, under)  # the rest is in the hat or helmet
        nx, ny = self.pillow(d, depth)
        lit = self.shade(color * (1 + 0.24 * cue.strands * s.strands), nx, ny)
        if cue.strands and cue.smooth:
            ring = ridge(s.rho - 0.46 - 0.02 * s.strands, 0.07) * (1 - nx.square())
            ring = ring * (0.5 + 0.5 * s.strands).clamp(0, 1) * 0.30 * cue.strands * cue.smooth
            lit = torch.lerp(lit, (lit * 1.3 + 0.25).clamp(0, 1), ring.clamp(0, 1))
        if cue.gloss and gloss:
            zig = zigzag(5 * s.psi + 0.5)
            thick = 0.030 * (1.3 - 0.7 * zig) * (1 - (s.psi / 0.75).square())
            band = (s.rho - 0.38 - 0.015 * zig - 0.05 * s.psi.square()).abs() - thick
            band = self.cover(band) * step(-d - 0.03, 0.01)
            lit = torch.lerp(lit, (lit * 1.2 + 0.30).clamp(0, 1), 0.8 * cue.gloss * gloss * band)
        edge = d + 0.010 * cue.strands * s.strands
        self.blend(lit, self.cover(edge, soft * min(1, cue.strands)))
        self.outline(d, outline)
