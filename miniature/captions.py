"""What the miniature's CLIP has been told: captions of persons, domains, mixtures; their words.

A caption says a domain ("anime", or "photo with anime eyes") and some of a person's attributes, in
many orders, with the label before, after or between them. ``Caption.says`` marks which factors it
speaks of: a caption fits every picture that agrees with its own on those, and these pairs are the
positives of the contrastive training.
"""

from dataclasses import dataclass

import torch

from miniature.faces import CATEGORIES, CUES, DOMAINS

LABELS = DOMAINS
FACTORS = (*CATEGORIES, *CUES)  # the order of Caption.says
CARRIERS = (
    "photo", "picture", "rendering", "painting", "drawing", "sculpture", "tattoo", "sketch",
    "doodle", "cartoon", "art", "graffiti", "embroidered", "plushie", "origami", "toy", "plastic",
    "image",
)
ADJECTIVES = (
    "bad", "good", "low resolution", "bright", "dark", "cropped", "close-up", "black and white",
    "blurry", "jpeg corrupted", "pixelated", "clean", "dirty", "cool", "nice", "weird", "large",
    "small", "hard to see",
)
ARTICLES = ("a", "the", "my", "one", "many", "")
# What the colors cue of a domain does not show.
HIDDEN = {
    "sketch": ("skin", "hair_color", "hat_color", "clothes", "background"),
    "elderly": ("hair_color",),
    "zombie": ("skin",),
}


@dataclass(frozen=True)
class Caption:
    """A text, and which of FACTORS it speaks of."""

    text: str
    says: tuple


def attributes(categories, colors="photo"):
    """[(phrase, factors)] of one person.

    categories: {factor: name}; colors: the domain of the colors cue.
    """
    hidden = HIDDEN.get(colors, ())

    def tint(factor):
        return "" if factor in hidden else categories[factor] + " "

    c, found = categories, []
    if "skin" not in hidden:
        found.append((f"{c['skin']} skin", ("skin",)))
    if c["hair"] == "bald":
        found.append(("bald", ("hair",)))
    else:
        tinted = tint("hair_color")
        kind = f"{tinted}ponytail" if c["hair"] == "ponytail" else f"{c['hair']} {tinted}hair"
        found.append((kind, ("hair",) if "hair_color" in hidden else ("hair", "hair_color")))
    if c["glasses"] != "none":
        found.append((c["glasses"], ("glasses",)))
    if c["beard"] != "none":
        found.append((c["beard"], ("beard",)))
    mouth = {"neutral": "serious", "smile": "smiling", "open": "open mouth"}[c["mouth"]]
    found.append((mouth, ("mouth",)))
    if c["hat"] != "none":
        hat = f"{tint('hat_color')}{c['hat']}"
        found.append((hat, ("hat",) if "hat_color" in hidden else ("hat", "hat_color")))
    if "clothes" not in hidden:
        found.append((f"{c['clothes']} shirt", ("clothes",)))
        found.append((f"{c['background']} background", ("background",)))
    return found


def names_of(categories):
    """{factor: name} of one row of category indices."""
    return {
        k: names[int(i)] for (k, (names, _)), i in zip(CATEGORIES.items(), categories, strict=True)
    }


def full_caption(categories, domain):
    """All there is to say of a person in a pure domain: "a photo of a person with ..."."""
    phrases = [phrase for phrase, _ in attributes(names_of(categories), domain)]
    return f"a {domain} of a person with {', '.join(phrases)}"


def write(categories, styles, rng, short=0.25):
    """One random Caption of one picture.

    categories [10]; styles [6], at most two domains; rng: a random.Random; short: the chance that
    the caption names the domain alone.
    """
    domains = [DOMAINS[int(i)] for i in styles]
    base = max(sorted(set(domains)), key=domains.count)
    extras = [f"{d} {cue}" for cue, d in zip(CUES, domains, strict=True) if d != base]
    rng.shuffle(extras)
    label = base + (" with " + " and ".join(extras) if extras else "")
    found = attributes(names_of(categories), domains[CUES.index("colors")])
    rng.shuffle(found)
    says = set(CUES)
    if rng.random() < short:
        kind = rng.random()
        if kind < 0.25:
            text = f"{'x ' * rng.randint(1, 5)}{label}"
        elif kind < 0.5:
            text = f"{rng.choice(ARTICLES)} {label}"
        else:
            adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.5 else ""
            text = (
                f"{rng.choice(ARTICLES)} {adjective}{rng.choice(CARRIERS)} of "
                f"{rng.choice(ARTICLES)} {label}"
            )
    else:
        found = found[: rng.choice((1, 2, 3, 4, 9, 9))]
        says.update(f for _, factors in found for f in factors)
        comma = rng.choice((", ", " ", " and "))
        some = comma.join(phrase for phrase, _ in found)
        person = rng.choice(
            (" of a person with ", " of a person, ", " of ", " with ", " person with ", ", ")
        )
        text = rng.choice(
            (
                f"a {label}{person}{some}",
                f"a {label}{person}{some}",
                f"{some} {label}",
                f"{some}, {label}",
                f"a photo of a person with {some}, {label}",
                f"a photo of a {label}{person}{some}",
                f"{'x ' * rng.randint(1, 3)}{some} {label}",
                f"{label} {some}",
            )
        )
    text = " ".join(text.split()) + rng.choice(("", "", "."))
    return Caption(text, tuple(f in says for f in FACTORS))


def fits(categories, styles, says):
    """[B, B] True where picture i agrees with everything that caption j says of its own picture j.

    categories [B, 10], styles [B, 6], says [B, 16] bool.
    """
    facts = torch.cat([categories, styles], dim=1)
    return ((facts[:, None] == facts[None]) | ~says[None]).all(-1)


def known_words():
    """The words that mean something to the miniature's CLIP (carriers such as "photo of" apart)."""
    words = set(" ".join(LABELS).split()) | set(CUES) | {"person", "with", "and", "a", "of", "the"}
    words |= {"skin", "hair", "shirt", "background"}
    words |= {"mouth", "serious", "smiling", "beard", "moustache"}
    for key, (names, _) in CATEGORIES.items():
        if key != "mouth":
            words |= set(names) - {"none"}
    return words


def unknown_words(text):
    """The words of a label that the miniature's CLIP has never seen used, in their order."""
    known = known_words()
    words = text.lower().replace(",", " ").replace(".", " ").split()
    return [word for word in words if word not in known]
