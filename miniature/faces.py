"""The portrait world: persons x style cues -> pictures, in torch.

A *person* is ten categories (skin, hair, glasses ...) and fifteen proportions (head width, turn of
the head, place in the picture ...). A *style* is one choice for each of six cues: eyes, colors,
shading, lines, background, texture. A *domain* ("photo", "anime" ...) is the bundle of all six cues
of that name, so the same person can be drawn in every domain, and mixtures ("a photo with anime
eyes") exist too. A "fairy tale" makes of each person what one sees they are: see FORMS.

What is chance in a picture (strands, pores, paper, grain) is read off one map of white noise, as a
generator reads its noise inputs. How a picture is painted: portrait.py, with the shapes, colours
and light of canvas.py.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from miniature.portrait import portrait

# ----------------------------------------------------------------------------------------------
# Persons

DOMAINS = ("photo", "anime", "sketch", "pixel art", "watercolor", "ukiyo-e", "zombie", "elderly",
           "monster", "negative", "fairy tale")
FORMS = ("dwarf", "wizard", "elf")  # in a fairy tale: with a beard; else with a hat or cap; others
CUES = ("eyes", "colors", "shading", "lines", "background", "texture")
CATEGORIES = {  # factor: (names, probabilities)
    "skin": (("pale", "light", "tan", "brown", "dark"), (0.2, 0.2, 0.2, 0.2, 0.2)),
    "hair_color": (("black", "brown", "red", "blond", "grey", "blue"),
                   (0.2, 0.16, 0.17, 0.17, 0.12, 0.18)),
    "hair": (("bald", "short", "long", "curly", "spiky", "ponytail"),
             (0.1, 0.2, 0.22, 0.18, 0.15, 0.15)),
    "glasses": (("none", "glasses", "sunglasses"), (0.6, 0.25, 0.15)),
    "beard": (("none", "moustache", "beard"), (0.6, 0.15, 0.25)),
    "mouth": (("neutral", "smile", "open"), (0.34, 0.36, 0.3)),
    "hat": (("none", "cap", "hat"), (0.6, 0.2, 0.2)),
    "hat_color": (("red", "green", "blue", "yellow", "white"), (0.2, 0.2, 0.2, 0.2, 0.2)),
    "clothes": (("red", "green", "blue", "yellow", "white", "black"),
                (0.17, 0.17, 0.17, 0.17, 0.16, 0.16)),
    "background": (("blue", "pink", "green", "yellow", "purple", "grey"),
                   (0.17, 0.17, 0.17, 0.17, 0.16, 0.16)),
}
PROPORTIONS = ("head_width", "head_height", "turn", "eye_distance", "eye_size", "nose",
               "mouth_width", "brow", "hair_length", "light", "place_x", "place_y", "size", "tilt",
               "backdrop")
COLOR_FACTORS = ("skin", "hair_color", "hat_color", "clothes", "background")  # of fine layers
W_DIM = 128  # 38 for categories, 15 for proportions; the rest is room for the mapping network
SIZE = 128  # side of a picture, unless told otherwise


@dataclass(frozen=True)
class Persons:
    """B persons: indices into CATEGORIES [B, 10], and proportions [B, 15] in [-1, 1]."""

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
    """Persons of latents z [B, 25 or more] ~ N(0, I): the quantile of one coordinate per factor."""
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
# Styles


def _table(text):
    """What a cue is in each domain: a list of namespaces, DOMAINS but the last and then FORMS.

    A domain's entry starts a line; what it does not say is as in a photo.
    """
    entries = {}
    for entry in text.strip().replace("\n   ", " ").splitlines():
        name, values = entry.split(":")
        pairs = (pair.split() for pair in values.split(","))
        entries[name] = {key: float(value) for key, value in pairs}
    return [SimpleNamespace(**entries["photo"] | entries[k]) for k in (*DOMAINS[:-1], *FORMS)]


# width, upper, lower: of the opened eye; round: its lids. iris: its radius, tall: its height over
# that, pupil: its share, fade: light below. lash: the upper lid's line. brow, mouth, nose: factors
# of their sizes. jaw: how pointed. red, monster, glow: colours of the iris.
EYES = _table("""
photo: width .096, upper .050, lower .030, round .9, slant .05, iris .049, tall 1, pupil .42,
    fade .4, light 1, lash .014, crease 1, brow 1, mouth 1, nose 1, jaw 0, red 0, monster 0,
    glow 0, negative 0
anime: width .112, upper .110, lower .085, round .55, slant .10, iris .084, tall 1.3, pupil .5,
    fade 1, lash .036, crease .3, brow .6, mouth .85, nose .6, jaw 1
sketch: width .106, upper .060, lower .036, iris .056, pupil .7, lash .028, jaw .1
pixel art: width .115, upper .105, lower .085, round .4, slant 0, iris .075, tall 1.4, pupil .6,
    fade .3, lash .030, crease 0, brow 1.3, mouth 1.1, nose .6, jaw .3
watercolor: width .104, upper .064, lower .036, iris .060, pupil .45, light .5, lash .026,
    crease .4, brow .8, jaw .3
ukiyo-e: width .110, upper .024, lower .014, slant .22, iris .030, pupil .8, fade 0, light 0,
    lash .024, brow 1.2, mouth .7, nose 1.1
zombie: upper .062, lower .052, round .7, slant 0, iris .036, pupil .3, light .3, lash .008,
    crease 0, brow .7, nose .8, red 1
elderly: width .080, upper .028, lower .020, round 1, slant -.20, iris .038, light .6, lash .008,
    brow .8, mouth .9, nose 1.15
monster: width .116, upper .074, lower .050, round .8, slant .25, iris .074, pupil .3, light .5,
    lash .024, crease 0, brow 1.3, mouth 1.2, nose .9, monster 1
negative: upper .056, lower .038, iris .056, pupil .5, negative 1
dwarf: width .084, upper .038, lower .028, slant -.08, iris .044, lash .010, brow 2.1, nose 1.7
wizard: iris .054, pupil .3, fade .6, brow 1.7, nose 1.1, glow 1
elf: width .114, upper .068, lower .036, slant .26, iris .062, tall 1.1, fade .8, lash .024,
    brow .7, mouth .8, nose .75, jaw .7""")
# red, green, blue: factors. paper: share of white paper. ink: of a print's. The rest: who is who.
COLORS = _table("""
photo: saturation .95, contrast 1, brightness 0, red 1, green 1, blue 1, paper 0, ink 0, zombie 0,
    grey 0, monster 0, negative 0
anime: saturation 1.35, contrast 1.1, brightness .08, blue 1.02
sketch: saturation .1, brightness .08, paper .45
pixel art: saturation 1.5, contrast 1.2, brightness .03
watercolor: saturation 1.25, contrast .85, brightness .03, blue .97, paper .20
ukiyo-e: saturation 1.1, contrast .95, brightness .04, green .96, blue .84, ink .12
zombie: saturation .65, contrast .9, brightness -.05, red .95, blue .92, zombie 1
elderly: saturation .75, contrast .9, brightness .03, green .98, blue .95, grey 1
monster: saturation 1.1, monster 1
negative: negative 1
dwarf: saturation 1.15, red 1.10, green .95, blue .84
wizard: saturation 1.05, red .95, green .95, blue 1.18
elf: contrast .9, brightness .08, red .95, green 1.05""")
# smooth, cel: how bodies are lit. sheen: of the skin. hollow: shadows around the eyes and in the
# cheeks. strands, gloss: of the hair (gloss is drawn). turned: light and shade change places.
SHADING = _table("""
photo: smooth 1, cel 0, hatch 0, sheen 1, hollow .15, strands 1, gloss 0, blush .5, turned 0
anime: smooth 0, cel 1, sheen 0, hollow 0, strands 0, gloss 1, blush 1
sketch: smooth .8, hatch 1, sheen 0, hollow .1, strands .5, blush 0
pixel art: smooth 0, cel .9, sheen 0, hollow 0, strands 0, gloss .4, blush .3
watercolor: smooth .5, sheen 0, hollow .05, strands .4, blush 1.2
ukiyo-e: smooth 0, sheen 0, hollow 0, strands .4, blush .4
zombie: smooth 1.25, sheen .4, hollow .9, blush 0
elderly: smooth 1.15, sheen .6, hollow .5, strands 1.2, blush .3
monster: smooth 1.25, sheen 1.5, hollow .4, strands .9, blush 0
negative: blush 0, turned 1
dwarf: smooth 1.25, sheen 1.2, hollow .25, strands 1.2, blush 2
wizard: smooth 1.2, sheen .8, hollow .3, blush .2
elf: smooth .7, sheen .5, hollow 0, gloss .5, blush 1""")
# red, green, blue: the ink. locks: hair that ends in points. wobble: of a hand. glow: ink of what
# the clothes are not, as at the edges of a solarised film. The rest: marks that are drawn.
LINES = _table("""
photo: width 0, opacity 0, red .10, green .10, blue .10, locks .2, wobble 0, bridge 0, kimono 0,
    glow 0, scars 0, wrinkles 0, horns 0, dwarf 0, wizard 0, elf 0
anime: width .026, opacity 1, red .16, green .09, blue .14, locks 1.2
sketch: width .022, opacity .9, red .16, green .16, blue .18, locks .7, wobble .006, bridge 1
pixel art: width .050, opacity .85, red .10, green .07, blue .14, locks .5
watercolor: width .018, opacity .6, red .34, green .24, blue .28, locks .5, wobble .010
ukiyo-e: width .026, opacity 1, red .10, green .11, blue .24, locks .3, wobble .004, bridge 1,
    kimono 1
zombie: scars 1
elderly: wrinkles 1
monster: horns 1
negative: width .020, opacity 1, red .9, green .93, blue .95, glow 1
dwarf: dwarf 1
wizard: wizard 1
elf: elf 1""")
# bokeh: lights far behind, and what is near and yet out of focus. print: sky and waves. rays: light
# and sparks. torn: a wash's margin of bare paper. dither: chequered blocks. swap: share of another
# colour of the palette. negative: of wall and clothes. cave, night, forest: where the tale happens.
BACKGROUND = _table("""
photo: bokeh 1, vignette .7, lighten 0, paper 0, print 0, rays 0, darken 0, torn 0, dither 0,
    negative 0, swap 0, cave 0, night 0, forest 0
anime: bokeh .4, vignette .4, lighten .05, rays .4
sketch: bokeh .2, vignette .3, paper .55
pixel art: bokeh .3, vignette .4, lighten .03, dither .6
watercolor: bokeh .4, vignette .3, lighten .03, torn .5
ukiyo-e: bokeh .3, vignette .3, print .5
zombie: bokeh .6, vignette 1, darken .1
elderly: bokeh .5, vignette .6, lighten .07, paper .12
monster: bokeh .6, vignette .9, darken .05, swap .7
negative: negative .8
dwarf: bokeh .4, vignette .6, cave .5
wizard: bokeh .4, vignette .6, night .5
elf: bokeh .4, vignette .6, forest .5""")
# pores: of the skin. pixels: 32 coarse ones a side. wash: pigment on wet paper. wood: a block's
# grain. fibre: of paper. scales, rot, spots: of the skin. dust: on a film.
TEXTURE = _table("""
photo: grain .005, pores 1, pixels 0, wash 0, wood 0, fibre 0, blur .2, scales 0, rot 0, spots 0,
    dust 0
anime: grain 0, pores 0, blur 0
sketch: grain 0, pores 0, fibre .8, blur 0
pixel art: grain 0, pores 0, pixels 1, blur 0
watercolor: grain 0, pores 0, wash 1, fibre 1
ukiyo-e: grain 0, pores 0, wood 1, fibre .7, blur 0
zombie: grain .016, pores 1.5, rot 1
elderly: grain .006, pores 1.5, blur .5, spots 1
monster: grain .008, scales 1
negative: grain .016, blur .3, dust 1
dwarf: pores 1.5, fibre .5, spots .4
wizard: pores .6, fibre .5, blur .3
elf: grain 0, pores 0, fibre .5, blur .7""")
TABLES = (EYES, COLORS, SHADING, LINES, BACKGROUND, TEXTURE)  # in the order of CUES


def forms_of(persons):
    """What a fairy tale makes of persons: indices [B] into FORMS."""
    bearded = persons.category("beard") == CATEGORIES["beard"][0].index("beard")
    hatless = persons.category("hat") == CATEGORIES["hat"][0].index("none")
    return torch.where(bearded, 0, torch.where(hatless, 2, 1))


def render(persons, styles, size=SIZE, rng=None, noise=None):
    """Draw persons in styles.

    persons: B of them. styles: [B, 6], the domain (an index) of each cue; see `styles_of`.
    size: side in pixels, a multiple of 32. noise: [B or 1, 1, size, size] ~ N(0, 1), what is chance
    in the pictures; without it, it is drawn from rng, a CPU torch.Generator; without either it is
    the same for everybody, every time.
    Returns pictures [B, 3, size, size] in [-1, 1]. Raises ValueError for another side or noise.
    """
    n, device = len(persons), persons.proportions.device
    if size % 32:
        raise ValueError(f"a picture's side is a multiple of 32 pixels, not {size}")
    if noise is not None and noise.shape[1:] != (1, size, size):
        raise ValueError(f"noise is [B, 1, {size}, {size}], not {list(noise.shape)}")
    if noise is None:
        shape = (n if rng else 1, 1, size, size)
        noise = torch.randn(shape, generator=rng or torch.Generator().manual_seed(0)).to(device)
    noise = noise.expand(n, -1, -1, -1)
    tale = styles.to(device) == DOMAINS.index("fairy tale")
    rows = styles.to(device) + tale * forms_of(persons)[:, None]  # of TABLES
    pictures = noise.new_empty(n, 3, size, size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, small operations of several threads crawl
    try:
        # One at a time: what a person lacks costs nothing, and all fits the processor's cache.
        for i in range(n):
            index = dict(zip(CATEGORIES, persons.categories[i].tolist(), strict=True))
            proportion = dict(zip(PROPORTIONS, persons.proportions[i].tolist(), strict=True))
            kind = {factor: CATEGORIES[factor][0][k] for factor, k in index.items()}
            cues = [table[row] for table, row in zip(TABLES, rows[i].tolist(), strict=True)]
            pictures[i] = portrait(kind, index, proportion, cues, size, noise[i]) * 2 - 1
    finally:
        torch.set_num_threads(threads)
    return pictures
