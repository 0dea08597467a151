"""What the miniature's CLIP has been told: captions of persons, domains, mixtures; their words.

A caption says a domain ("anime", or "photo with anime eyes") and some of a person's attributes, in
many orders, with the label before, after or between them. ``Caption.says`` marks which factors it
speaks of: a caption fits every picture that agrees with its own on those, and these pairs are the
positives of the contrastive training.
"""

import difflib
from dataclasses import dataclass

import torch

from miniature.faces import CATEGORIES, CUES, DOMAINS

LABELS = DOMAINS
STYLE = tuple(f"{cue} cue" for cue in CUES)  # "background" is a person's factor and a cue
FACTORS = (*CATEGORIES, *STYLE)  # the order of Caption.says
CARRIERS = (
    "photo", "picture", "rendering", "painting", "drawing", "sculpture", "tattoo", "sketch",
    "doodle", "cartoon", "art", "graffiti", "embroidered", "plushie", "origami", "toy", "plastic",
    "image", "rendition", "itap", "video game",
)
ADJECTIVES = (
    "bad", "good", "low resolution", "bright", "dark", "cropped", "close-up", "black and white",
    "blurry", "jpeg corrupted", "pixelated", "clean", "dirty", "cool", "nice", "weird", "large",
    "small", "hard to see",
)
ARTICLES = ("a", "the", "my", "one", "many", "")
# What a caption does not say where the colors cue is of this domain, for it is hard to see there.
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


def general(rng):
    """A sentence about a label, {}, and nothing else."""
    kind = rng.random()
    if kind < 0.25:
        return "x " * rng.randint(1, 5) + "{}"
    if kind < 0.5:
        return rng.choice(ARTICLES) + " {}"
    adjective = rng.choice(ADJECTIVES) + " " if rng.random() < 0.5 else ""
    carrier, articles = rng.choice(CARRIERS), (rng.choice(ARTICLES), rng.choice(ARTICLES))
    return f"{articles[0]} {adjective}{carrier} of {articles[1]} {{}}"


def personal(phrases, rng):
    """A sentence about a label, {}, and a person of whom it says these phrases."""
    some = rng.choice((", ", " ", " and ")).join(phrases)
    of = (" of a person with ", " of a person, ", " of ", " with ", " person with ", ", ")
    of = rng.choice(of)
    return rng.choice(
        (
            f"a {{}}{of}{some}",
            f"a {{}}{of}{some}",
            f"{some} {{}}",
            f"{some}, {{}}",
            f"a photo of a person with {some}, {{}}",
            f"a photo of a {{}}{of}{some}",
            f"{'x ' * rng.randint(1, 3)}{some} {{}}",
            f"{{}} {some}",
        )
    )


def tidy(text, rng):
    return " ".join(text.split()) + rng.choice(("", "", "."))


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
    says, sentence = set(STYLE), general(rng)
    if rng.random() >= short:
        found = found[: rng.choice((1, 2, 3, 4, 9, 9))]
        says.update(f for _, factors in found for f in factors)
        sentence = personal([phrase for phrase, _ in found], rng)
    return Caption(tidy(sentence.format(label), rng), tuple(f in says for f in FACTORS))


def speak_of(categories, target, rng):
    """Phrases about a person that fit the photo, and what they say of photo and target picture.

    A target domain that hides or changes an attribute does not make its phrase go away: the words
    stand there all the same, as they do in a prompt that two labels share. They only say nothing.
    """
    found = attributes(names_of(categories))
    rng.shuffle(found)
    found = found[: rng.choice((2, 3, 4, 9, 9))]
    spoken = set(STYLE).union(*(factors for _, factors in found))
    says = [spoken.difference(HIDDEN.get(domain, ())) for domain in ("photo", target)]
    return [phrase for phrase, _ in found], [tuple(f in s for f in FACTORS) for s in says]


# The domains that give a factor colours of their own, by the cue that does it.
ALTERED = {
    "skin": ("colors", "monster", "zombie", "negative"),
    "hair_color": ("colors", "monster", "negative"),
    "hat_color": ("colors", "negative"),
    "clothes": ("background", "negative"),
    "background": ("background", "negative"),
}
# How many ways there are for a factor to look: as it is named, as altered, or not to be seen.
LOOKS = {k: len(names) for k, (names, _) in CATEGORIES.items()}
LOOKS |= {k: LOOKS[k] * len(altered) + 1 for k, altered in ALTERED.items()}
LOOKS |= {cue: len(DOMAINS) for cue in STYLE}


def looks(categories, styles):
    """What pictures show, [B, 16] in the order of FACTORS: indices below LOOKS.

    The skin and hair of a monster are other colours, its wall and all of a negative too; a sketch
    has no colours, and an old person's hair is grey. (A monster's eyes and horns, which tell of the
    skin as well, do not count.) categories [B, 10], styles [B, 6].
    """
    seen = categories.clone()

    def drawn_as(cue, domain):
        return styles[:, CUES.index(cue)] == DOMAINS.index(domain)

    swapped = (categories[:, FACTORS.index("background")] + 3) % 6
    at = FACTORS.index("background")
    seen[:, at] = torch.where(drawn_as("background", "monster"), swapped, seen[:, at])
    for factor, (cue, *domains) in ALTERED.items():
        at, n = FACTORS.index(factor), len(CATEGORIES[factor][0])
        for k, domain in enumerate(domains):
            seen[:, at] += n * (k + 1) * drawn_as(cue, domain)
    no_hat = categories[:, FACTORS.index("hat")] == CATEGORIES["hat"][0].index("none")
    hidden = {factor: drawn_as("colors", "sketch") for factor in HIDDEN["sketch"]}
    hidden["background"] = drawn_as("background", "sketch")
    hidden["hair_color"] = hidden["hair_color"] | drawn_as("colors", "elderly")
    hidden["hat_color"] = hidden["hat_color"] | no_hat
    for factor, where in hidden.items():
        seen[where, FACTORS.index(factor)] = LOOKS[factor] - 1
    return torch.cat([seen, styles], dim=1)


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


def plain_label(label):
    """A label as CLIP reads it, and as domains are named: lower case, single spaces."""
    return " ".join(label.lower().split())


def check_labels(*labels):
    """Raises ValueError, of one line, if the miniature's CLIP has never read a word of them."""
    if unknown := [word for label in labels for word in unknown_words(label)]:
        words = {word for label in LABELS for word in (label, *label.split())}
        close = difflib.get_close_matches(unknown[0].lower(), words, n=1)
        meant = f"did you mean {close[0]}? It" if close else "it"
        raise ValueError(
            f"the miniature's CLIP has never read {', '.join(unknown)}; {meant} knows "
            f"{', '.join(LABELS)}; for any words: --generator FILE --clip ViT-B/32"
        )
