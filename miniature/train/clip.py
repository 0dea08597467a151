"""Train the CLIP of the miniature world: ``python -m miniature.train.clip``.

OpenAI's architecture and file format (ModifiedResNet, width 24; text width 128, 3 layers, the real
BPE vocabulary, 77 positions). A batch shows persons three times: as photo, in another domain, and
between two domains. The recipe has two aims.

Gradients that mean something: strong photometric augmentation; linear heads that read off image and
text features alike what a picture shows (dropped afterwards); the softmax over the labels, and the
way from photo to domain, shall be as far as the cues that changed, so that no cue stands for all.
And, once the captions are learned, adversarial training in an L2 ball, by projected gradient in two
steps (against one step it learned to hold, and ten broke it), whose radius is drawn for each
person: eyes differ by some 10 in L2, walls by 40, and what is nearer than twice the radius no
encoder can both see and keep. First on 64 pixels, then on 128.

Language that composes: the photo and the other domain are told in the same words but for the label,
and the step between the two texts learns to point along the step between the two pictures (the
pictures' side is held still). Half of the persons' words are boiled down to a *soup*: their
embeddings, with noise, are added up in a few places before the label, which is as much as a learned
prompt can write.

At last the image encoder rests, and the text encoder alone learns what it shows: the step between
two labels is the mean of the true steps, that between a person's full captions the person's own.
"""

import functools
import io
import math
import os
import random
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import clip
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import trange

from checkpoints.files import write_atomically
from miniature import captions, faces
from miniature.train import pick_device, pool, recorded

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHARES = (0.2, 0.2, 0.15, 0.2, 0.15, 0.1)  # of the way from photo to domain, for each of CUES
FAINT = {"eyes": 1.5, "texture": 0.6, "lines": 0.3}  # cues of few pixels: weights of their reading
EMBED, WIDTH, TEXT_WIDTH, TEXT_LAYERS, VOCABULARY = 128, 24, 128, 3, 49408
LENGTH, EXTRA = 60, 32  # most tokens of a caption, and of a soup


@dataclass(frozen=True)
class Config:
    persons: int = 12_000  # Each drawn once as photo, in another domain, and between: the pool.
    small_steps: int = 2000  # Steps on 64 pixels.
    large_steps: int = 6000  # Steps on 128 pixels.
    text_steps: int = 4000  # Steps of the text encoder alone.
    batch: int = 64  # Persons a step, three pictures each.
    lr: float = 1.5e-3  # Peak rate on 64 pixels (0.6 of it on 128), cosine to 0 within each.
    text_lr: float = 5e-4  # Peak rate of the last stage.
    epsilon: float = 5.0  # Largest L2 radius of an attack, ramped in over 0.05-0.25 of 128 px.
    token_noise: float = 0.2  # Random noise on token embeddings, whose rows start at rms 1.
    seed: int = 0  # Of the weights, the batches and the pool (plus one).
    device: str = "auto"  # auto, cpu or cuda.
    threads: int = 0  # CPU threads; 0 is torch's choice.
    workers: int = 0  # Processes that write captions; 0: as many as processors, 10 at most.
    out: Path = Path("runs/clip.pt")  # In OpenAI's format; miniature/weights/clip.pt at a release.
    state: Path = Path("runs/train_clip.pt")  # Resumed from when it exists; beside the pool.


# ----------------------------------------------------------------------------
# Data


def draw_pool(n, seed):
    """n persons, three pictures each: photo, another domain, and one between domains.

    Half of the last are on the way from the photo to that other domain, half mix any two. Returns
    pictures uint8 [n, 3, 3, 128, 128], the persons' categories [n, 10], styles [n, 3, 6]; what is
    chance is the same in all three.
    """
    rng = torch.Generator().manual_seed(seed)
    persons = faces.sample_persons(n, rng)
    k, cues = len(faces.DOMAINS), len(faces.CUES)
    pure = torch.randint(1, k, (n, 1), generator=rng)
    way = torch.rand(n, 1, generator=rng) < 0.5
    base = torch.randint(k, (n, 1), generator=rng) * ~way
    other = torch.where(way, pure, torch.randint(k, (n, 1), generator=rng))
    order = torch.rand(n, cues, generator=rng).argsort(1)
    some = order < torch.randint(1, cues, (n, 1), generator=rng)
    pure, mixed = pure.repeat(1, cues), torch.where(some, other, base)
    styles = torch.stack([torch.zeros_like(pure), pure, mixed], dim=1)
    return pool.draw(persons, styles, seed), persons.categories, styles


@functools.cache
def token_ids(word):
    tokens = clip.tokenize(word)[0]
    return tokens[1 : tokens.argmax()].tolist()


def tokenize(texts):
    """CLIP's tokens [n, LENGTH] of texts, word by word. ValueError for a text of more tokens."""
    rows = []
    for text in texts:
        ids = [49406, *(i for word in text.split() for i in token_ids(word)), 49407]
        if len(ids) > LENGTH:
            raise ValueError(f"{len(ids)} tokens, more than {LENGTH}: {text!r}")
        rows.append(ids + [0] * (LENGTH - len(ids)))
    return torch.tensor(rows)


class Batches(Dataset):
    """Step i's persons of the pool and what is said of them; the same whenever it is asked for.

    {index [n]; tokens [3 n, LENGTH] of photos, others and those between; full [2 n, LENGTH] of the
    first two, all told; labels [4 x domains, LENGTH]; says [3 n, 16]; extra, places [3 n, EXTRA]:
    soups, tokens to be added up in places of the text; blank [n]: how strong an "x" is as noise}.
    In half of the steps all others are of one domain, or its attributes are never learned.
    """

    def __init__(self, categories, styles, n, seed):
        self.categories, self.styles, self.n, self.seed = categories, styles, n, seed
        others = torch.tensor(styles)[:, 1, 0]
        self.alike = [(others == k).nonzero()[:, 0].tolist() for k in range(1, len(faces.DOMAINS))]

    def __len__(self):
        return 2**31

    def __getitem__(self, step):
        words, n = random.Random(f"{self.seed} {step}"), self.n
        some = words.choice(self.alike) if words.random() < 0.5 else range(len(self.styles))
        index = words.choices(some, k=n)
        texts, says, full = [[], [], []], [[], [], []], [[], []]
        extra = torch.zeros(3 * n, EXTRA, dtype=torch.long)
        places, blank = torch.zeros_like(extra), torch.ones(n)
        for row, i in enumerate(index):
            person, styles = self.categories[i], self.styles[i]
            domain = faces.DOMAINS[styles[1][0]]
            phrases, spoken = captions.speak_of(person, domain, words)
            if words.random() < 0.5:  # a soup
                m, blank[row] = words.randint(2, 6), words.random()
                sentence = "x " * m + "{}"
                put = [(token_ids(p), words.randint(1, m)) for p in phrases]
                put = torch.tensor([(token, place) for ids, place in put for token in ids])
                for part in (row, n + row):
                    extra[part, : len(put)], places[part, : len(put)] = put.T
            else:
                sentence = captions.tidy(captions.personal(phrases, words), words)
            between = captions.write(person, styles[2], words)
            written = sentence.format("photo"), sentence.format(domain), between.text
            for part, text, say in zip(range(3), written, (*spoken, between.says), strict=True):
                texts[part].append(text)
                says[part].append(say)
            for part, label in enumerate(("photo", domain)):
                full[part].append(captions.full_caption(person, label))
        labels = [captions.tidy(captions.general(words), words) for _ in range(4)]
        return {
            "index": torch.tensor(index),
            "tokens": tokenize(sum(texts, [])),
            "full": tokenize(sum(full, [])),
            "labels": tokenize([sentence.format(d) for sentence in labels for d in faces.DOMAINS]),
            "says": torch.tensor(sum(says, [])),
            "extra": extra,
            "places": places,
            "blank": blank,
        }


def augment(x, tinted):
    """Shift, scale, colour, blur and noise, so that a tint or a place is no evidence.

    x [3 n, 3, H, W] in [-1, 1], the three pictures of a person in one place; the photometric
    changes, each picture's own, fall on a share of them, tinted [3 n, 1, 1, 1].
    """
    B, device = len(x), x.device

    def uniform(low, high, *shape, n=B):
        shape = n, *(shape or (1, 1, 1))
        return low + (high - low) * torch.rand(shape, device=device)

    scale, shift = uniform(0.6, 1.08, 1, n=B // 3), uniform(-0.12, 0.12, 2, n=B // 3)
    scale, shift = scale.repeat(3, 1), shift.repeat(3, 1)
    theta = torch.zeros(B, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale[:, 0]
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    x = (x + 1) / 2
    on = tinted.float()
    gray = x.mean(1, keepdim=True)
    saturation = uniform(0.2, 1.9) * (uniform(0, 1) > 0.06)
    x = gray + (x - gray) * (1 + on * (saturation - 1))
    x = 0.5 + (x - 0.5) * (1 + on * (uniform(0.55, 1.5) - 1))
    x = x + on * uniform(-0.3, 0.3) * 0.8
    x = x * (1 + on * uniform(-0.2, 0.2, 3, 1, 1))
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, uniform(-1.5, 1.0).clamp_min(0))
    noise = torch.randn(x.shape, device=device)
    x = x + uniform(-0.06, 0.06).clamp_min(0) * noise
    return x.clamp(0, 1) * 2 - 1


# ----------------------------------------------------------------------------
# Model


def build(resolution, state=None):
    """OpenAI's CLIP at our sizes, from a state if given.

    A state of another resolution has the positions of its attention pool resized.
    """
    image = EMBED, resolution, (1, 1, 1, 1), WIDTH, None
    text = 77, VOCABULARY, TEXT_WIDTH, TEXT_WIDTH // 64, TEXT_LAYERS
    model = clip.model.CLIP(*image, *text)
    model.visual.to(memory_format=torch.channels_last)  # about a third faster on a CPU
    if state is None:
        torch.nn.init.normal_(model.token_embedding.weight, std=1.0)
        torch.nn.init.normal_(model.positional_embedding, std=0.3)
        return model
    key = "visual.attnpool.positional_embedding"
    state = dict(state)
    grid, size = round((len(state[key]) - 1) ** 0.5), resolution // 32
    if grid != size:
        cells = state[key][1:].T.reshape(1, -1, grid, grid)
        cells = F.interpolate(cells, size=(size, size), mode="bilinear", align_corners=False)
        state[key] = torch.cat([state[key][:1], cells.flatten(2)[0].T])
    model.load_state_dict(state)
    return model


def encode_text(model, tokens, noise=0.0, blank=None, extra=None, places=None, parts=1):
    """CLIP's text features [B, EMBED] at the tokens' own length [B, L], noise on their embeddings.

    With noise, the meaningless word "x" becomes pure noise, of strength blank [B] (1 without it):
    labels must compose with contexts that are no words at all. extra, places [B, E]: tokens whose
    embeddings are added up in those places (0: none). parts of the batch share their noise.
    """
    length = tokens.shape[1]
    x = model.token_embedding(tokens)
    if noise:
        meaningless = (tokens == token_ids("x")[0])[..., None]
        blank = x.new_ones(len(x)) if blank is None else blank
        chance = torch.randn(len(x) // parts, *x.shape[1:], device=x.device).repeat(parts, 1, 1)
        x = torch.where(meaningless, blank[:, None, None] * chance, x + noise * chance)
    if extra is not None:
        added = model.token_embedding(extra) * (places > 0)[..., None]
        x = x.scatter_add(1, places[..., None].expand_as(added), added)
    x = (x + model.positional_embedding[:length]).transpose(0, 1)
    mask = torch.full((length, length), float("-inf"), device=x.device).triu(1)
    for block in model.transformer.resblocks:
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        x = x + block.mlp(block.ln_2(x))
    ends = tokens.argmax(1)[None, :, None].expand(1, -1, x.shape[-1])
    x = model.ln_final(x.gather(0, ends)[0])
    return x @ model.text_projection


@functools.cache
def statistics(device):
    """CLIP's mean and deviation of colours, [3, 1, 1] each."""
    return tuple(torch.tensor(x, device=device)[:, None, None] for x in (MEAN, STD))


def encode_image(model, x):
    """Unit features [B, EMBED] of pictures in [-1, 1], resized as CLIP's own transform does."""
    size = model.visual.input_resolution
    x = (x + 1) / 2
    if x.shape[-1] != size:
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    mean, std = statistics(x.device)
    x = (x - mean) / std
    return F.normalize(model.visual(x.contiguous(memory_format=torch.channels_last)), dim=-1)


def contrastive(image_features, text_features, logit_scale, fit):
    """CLIP's loss with every fitting pair a positive: fit [B images, B texts] bool."""
    logits = logit_scale * image_features @ F.normalize(text_features, dim=-1).T
    fit = fit.float()
    rows = -(fit / fit.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    columns = -(fit / fit.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


def domain_loss(image_features, label_features, styles):
    """Cross-entropy of the softmax over the labels with each domain's share of the way [B, 6]."""
    shares = image_features.new_zeros(len(styles), len(label_features))
    shares = shares.scatter_add(1, styles, cue_shares(styles.device).expand(len(styles), -1))
    logits = 20 * image_features @ F.normalize(label_features, dim=-1).T
    return F.cross_entropy(logits, shares)


@functools.cache
def cue_shares(device):
    return torch.tensor(SHARES, device=device)


def share_loss(image_features, styles):
    """(How far a picture between is on the way from photo to domain - how far its cues are)^2.

    image_features [3 n, EMBED], of unit length, and styles [3 n, 6] of n persons as photo, in
    another domain, and between; a mean over those whose cues are all of one or the other.
    """
    photo, other, between = image_features.chunk(3)
    way = other - photo
    found = ((between - photo) * way).sum(-1) / way.square().sum(-1).clamp_min(1e-3)
    _, there, mixed = styles.chunk(3)
    asked = ((mixed == there) * cue_shares(styles.device)).sum(-1)
    counts = ((mixed == there) | (mixed == 0)).all(-1).float()
    return (counts * (found - asked).square()).sum() / counts.sum().clamp_min(1)


def attack(x, epsilon, loss_of, *, steps):
    """Pictures near x, each at an L2 distance of at most epsilon (a number or [B]), of higher loss.

    Projected gradient from a random start; pixels may leave [-1, 1].
    """
    epsilon = torch.as_tensor(epsilon, device=x.device).expand(len(x))[:, None, None, None]

    def unit(d):
        return d / d.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]

    d = unit(torch.randn(x.shape, device=x.device)) * epsilon * 0.5
    for _ in range(steps):
        d.requires_grad_(True)
        (grad,) = torch.autograd.grad(loss_of(x + d), d)
        d = d.detach() + unit(grad) * epsilon * 2.5 / steps
        length = d.flatten(1).norm(dim=1).clamp_min(1e-9)[:, None, None, None]
        d = d * (epsilon / length).clamp_max(1)
    return x + d


def directional(image_features, text_features):
    """1 - cos of the texts' and the images' step from one half of the batch to the other.

    The images' side is a constant: else they would give up what is theirs alone.
    """
    steps = []
    for features in (image_features.detach(), text_features):
        source, target = F.normalize(features, dim=-1).chunk(2)
        steps.append(target - source)
    return (1 - F.cosine_similarity(*steps, dim=-1)).mean()


class FactorHeads(torch.nn.Linear):
    """A linear reading of what a picture shows off image and text features; dropped afterwards."""

    def __init__(self):
        super().__init__(EMBED, sum(captions.LOOKS.values()))
        # What all pictures of a domain share comes of itself; what changes from person to person
        # does not, nor does a cue of few pixels.
        weight = [2.0 if k in captions.ALTERED else 1.0 for k in faces.CATEGORIES]
        weight = torch.tensor(weight + [FAINT.get(cue, 0.1) for cue in faces.CUES])
        self.register_buffer("weight_of", weight, persistent=False)
        # Where in the logits those of each factor are, [16, most ways]; past its own: one of -inf.
        sizes, first = list(captions.LOOKS.values()), 0
        places = torch.full((len(sizes), max(sizes)), sum(sizes))
        for i, size in enumerate(sizes):
            places[i, :size] = torch.arange(first, first + size)
            first += size
        self.register_buffer("places", places, persistent=False)

    def loss(self, features, looks, known=None):
        """Mean cross-entropy of looks [B, 16] read off features [B, EMBED], where known [B, 16]."""
        logits = F.pad(self(10 * F.normalize(features, dim=-1)), (0, 1), value=float("-inf"))
        logits = logits[:, self.places].log_softmax(-1)  # [B, 16, most ways]
        losses = -logits.gather(2, looks[..., None])[..., 0]
        weight = self.weight_of.expand_as(losses) * (1 if known is None else known)
        return (losses * weight).sum() / weight.sum()


# ----------------------------------------------------------------------------
# Measuring


def held_out(seed=20_000, n=64):
    """Pictures {domain: uint8 [n, 3, 128, 128]} of the same n persons, and their categories."""
    persons = faces.sample_persons(n, torch.Generator().manual_seed(seed))
    styles = torch.stack([faces.styles_of(d, n) for d in faces.DOMAINS], dim=1)
    drawn = pool.draw(persons, styles, seed, desc="held out")
    return dict(zip(faces.DOMAINS, drawn.unbind(1), strict=True)), persons.categories


@torch.no_grad()
def report(model, drawn, categories):
    """Figures of held-out pictures, in [0, 1].

    Domain accuracy, clean and attacked (L2 4, 10 steps, a third of the pictures); recall at 1 among
    64 full captions of a domain; and, the least and the mean over the targets, the cosine of the
    step between the labels with the mean true step, the mean cosine of the step between a person's
    two full captions with the person's own true step, and that of the labels' step with it.
    """
    learning = model.visual.training
    model.eval()
    device = model.positional_embedding.device

    def read(texts):
        return F.normalize(encode_text(model, tokenize(texts).to(device)), dim=-1)

    labels = read([f"a {d} of a person" for d in faces.DOMAINS])
    clean, attacked, recall, means, owns, ones = [], [], [], [], [], []
    for k, domain in enumerate(faces.DOMAINS):
        x = pool.as_images(drawn[domain].to(device))
        features = encode_image(model, x)
        clean.append((features @ labels.T).argmax(1) == k)

        def domain_loss(v, domain=k):
            logits = 20 * encode_image(model, v) @ labels.T
            return F.cross_entropy(logits, torch.full((len(v),), domain, device=device))

        with torch.enable_grad():
            worse = attack(x[: len(x) // 3], 4.0, domain_loss, steps=10)
        attacked.append((encode_image(model, worse) @ labels.T).argmax(1) == k)
        spoken = read([captions.full_caption(c, domain) for c in categories])
        for i in range(0, len(x), 64):
            found = (features[i : i + 64] @ spoken[i : i + 64].T).argmax(1)
            recall.append(found == torch.arange(len(found), device=device))
        if k == 0:
            photo, spoken_photo = features, spoken
            continue
        step, one = features - photo, labels[k] - labels[0]
        means.append(F.cosine_similarity(one, F.normalize(step, dim=-1).mean(0), dim=0))
        owns.append(F.cosine_similarity(spoken - spoken_photo, step, dim=-1).mean())
        ones.append(F.cosine_similarity(one[None], step, dim=-1).mean())
    model.train().visual.train(learning)
    figures = {"clean": clean, "attacked": attacked, "R@1 of 64": recall}
    figures = {name: torch.cat(right).float().mean().item() for name, right in figures.items()}
    for name, found in {
        "label on mean": means,
        "caption on own": owns,
        "label on own": ones,
    }.items():
        figures |= {name: torch.stack(found).mean().item()}
        figures |= {f"least {name}": torch.stack(found).min().item()}
    return figures


def rounded(x, bits=6):
    """x with so many significant bits: within 0.8 %, and a third smaller when deflated."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def save(model, seen, path):
    """OpenAI's state dict, half precision where theirs is, matrices rounded, deflated.

    seen: bool [VOCABULARY], the tokens that captions used; the rows of the others become zero, and
    take no room.
    """
    state = {name: x.cpu() for name, x in model.state_dict().items()}
    model = build(model.visual.input_resolution, state).eval()
    model.token_embedding.weight.data[~seen] = 0
    model.token_embedding.weight.data = model.token_embedding.weight.data.half().float()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = rounded(parameter.data)
    clip.model.convert_weights(model)
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    write_atomically(path, lambda aside: deflate(stored, aside))


def deflate(stored, path):
    """Write a zip archive, an open file, anew: compressed."""
    with zipfile.ZipFile(stored) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in plain.namelist():
            file.writestr(name, plain.read(name))


# ----------------------------------------------------------------------------
# Training


def schedule(cfg, step):
    """At a step: the side of the pictures, the learning rate, the largest radius of an attack."""
    small, last = step < cfg.small_steps, step - cfg.small_steps - cfg.large_steps
    if last >= 0:
        return 128, cfg.text_lr * (0.5 + 0.5 * math.cos(last / cfg.text_steps * math.pi)), 0
    t = step / cfg.small_steps if small else (step - cfg.small_steps) / cfg.large_steps  # 0 to 1
    warm, decay = min(1, t * 20 + 0.02), 0.5 + 0.5 * math.cos(t * math.pi)
    epsilon = 0 if small else cfg.epsilon * min(1, max(0, (t - 0.05) / 0.2))
    return (64 if small else 128), cfg.lr * (1 if small else 0.6) * warm * decay, epsilon


def optimiser(*modules, rate):
    """AdamW of what is trained; rate: a tensor."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    decay, rest = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = {"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0}
    return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=rate.is_cuda)


def speak(model, batch, cfg):
    """Features of texts [3 n, EMBED], of full captions [2 n, EMBED], of labels [4, 11, EMBED]."""
    noise = cfg.token_noise
    told = [batch[k] for k in ("extra", "places")]
    told = encode_text(model, batch["tokens"], noise, batch["blank"].repeat(3), *told, parts=3)
    full = encode_text(model, batch["full"], noise / 2, parts=2)
    return told, full, encode_text(model, batch["labels"], noise).view(4, -1, EMBED)


def text_loss(told, full, image_features):
    """How far the steps between texts lie off those between the pictures they speak of."""
    shown = image_features.chunk(3)[:2]
    shown = torch.cat(shown)
    return 2 * directional(shown, torch.cat(told.chunk(3)[:2])) + 2 * directional(shown, full)


def clip_loss(model, heads, batch, cfg):
    """The loss of one step of the first two stages.

    batch: as of `Batches`, with x [3 n, 3, 128, 128] uint8, categories [3 n, 10], styles [3 n, 6],
    looks [3 n, 16] and the attack's largest radius epsilon [].
    """
    categories, styles, looks, says = (batch[k] for k in ("categories", "styles", "looks", "says"))
    told, full, labels = speak(model, batch, cfg)
    fit = captions.fits(categories, styles, says)
    scale = model.logit_scale.exp().clamp_max(60)

    x, n, side = pool.as_images(batch["x"]), len(batch["index"]), model.visual.input_resolution
    if side < 128:
        x = F.avg_pool2d(x, 128 // side)
    # Each person's own radius; a quarter stays clean. A faint picture has no room for an attack.
    radius = batch["epsilon"] * (torch.rand(n, device=x.device) * 4 / 3 - 1 / 3).clamp_min(0)
    radius = radius.repeat(3)
    tinted = torch.rand(3 * n, device=x.device) < torch.where(radius > 0, 0.2, 0.7)
    x = augment(x, tinted[:, None, None, None])
    texts, label_features, constant = told.detach(), labels[0].detach(), scale.detach()
    aim = torch.rand((), device=x.device)

    def against(x):  # at the domain, at how far it is, or at all that is said
        features = encode_image(model, x)
        everything = contrastive(features, texts, constant, fit) + heads.loss(features, looks)
        shares = domain_loss(features, label_features, styles), 10 * share_loss(features, styles)
        return torch.where(aim < 0.5, shares[0], torch.where(aim < 0.75, shares[1], everything))

    if side == 128:
        x = attack(x, radius, against, steps=2)
    image_features = encode_image(model, x)
    loss = contrastive(image_features, told, scale, fit)
    loss = loss + domain_loss(image_features, labels[0], styles)
    loss = loss + heads.loss(image_features, looks) + heads.loss(told, looks, says)
    loss = loss + 5 * share_loss(image_features, styles)
    return loss + text_loss(told, full, image_features)


def last_loss(model, batch, cfg):
    """The loss of one step of the last stage.

    batch: as of `Batches`, with the pictures' features [3 n, EMBED], categories, styles, and means
    [10, EMBED] of the true steps.
    """
    told, full, labels = speak(model, batch, cfg)
    shown, scale = batch["features"], model.logit_scale.exp().clamp_max(60).detach()
    fit = captions.fits(batch["categories"], batch["styles"], batch["says"])
    loss = 0.3 * contrastive(shown, told, scale, fit) + 1.5 * text_loss(told, full, shown)
    labels = F.normalize(labels, dim=-1)
    steps = labels[:, 1:] - labels[:, :1]
    loss = loss + 6 * (1 - F.cosine_similarity(steps, batch["means"], dim=-1)).mean()
    return loss + domain_loss(shown, labels[0], batch["styles"])


@torch.no_grad()
def true_features(model, images):
    """Features [n, 3, EMBED] of the pool's pictures [n, 3, 3, 128, 128]."""
    found = [encode_image(model, pool.as_images(x)) for x in images.flatten(0, 1).split(250)]
    return torch.cat(found).view(-1, 3, EMBED)


def mean_steps(features, domains):
    """The mean true step to every domain but the photo [domains - 1, EMBED].

    features [n, 3, EMBED], as of `true_features`; domains [n]: of the second ones.
    """
    steps = F.normalize(features[:, 1] - features[:, 0], dim=-1)
    return torch.stack([steps[domains == k].mean(0) for k in range(1, len(faces.DOMAINS))])


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    for path in (cfg.out, cfg.state):
        path.parent.mkdir(parents=True, exist_ok=True)
    device = pick_device(cfg.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = device.type == "cuda"
    torch.manual_seed(cfg.seed)
    make = functools.partial(draw_pool, cfg.persons, cfg.seed + 1)
    pool_path = cfg.state.with_name("train_clip_pool.pt")
    images, categories, styles = pool.kept(pool_path, make, n=cfg.persons, seed=cfg.seed + 1)
    batches = Batches(categories.tolist(), styles.tolist(), cfg.batch, cfg.seed)
    categories = categories[:, None].repeat(1, 3, 1)
    looks = captions.looks(categories.flatten(0, 1), styles.flatten(0, 1)).view(-1, 3, 16)
    tables = {"x": images, "categories": categories, "styles": styles, "looks": looks}
    tables = {name: x.to(device) for name, x in tables.items()}
    tested = held_out()

    begins = 0, cfg.small_steps, cfg.small_steps + cfg.large_steps
    total, done, saved = begins[2] + cfg.text_steps, 0, {}
    if cfg.state.exists():
        saved = torch.load(cfg.state, weights_only=True, map_location=device)
        done = saved["step"]
    seen = saved.get("seen", torch.zeros(VOCABULARY, dtype=torch.bool)).cpu()
    heads = FactorHeads().to(device)
    if saved:
        heads.load_state_dict(saved["heads"])
    model = build(64, saved.get("model")) if done <= begins[1] else build(128, saved["model"])
    workers = min(cfg.workers or os.cpu_count(), 10)
    loader = DataLoader(
        batches, batch_size=None, sampler=range(done, total), num_workers=workers, prefetch_factor=8
    )
    batch, rate = None, torch.zeros((), device=device)

    def one():
        """One step of the optimiser on what batch holds; returns the loss."""
        shown = {name: x[batch["index"]] for name, x in tables.items()}
        given = batch | {name: x.transpose(0, 1).flatten(0, 1) for name, x in shown.items()}
        loss = (
            last_loss(model, given, cfg)
            if "means" in batch
            else clip_loss(model, heads, given, cfg)
        )
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return loss.detach()

    def keep(step):
        state = {"model": model.state_dict(), "heads": heads.state_dict(), "step": step}
        state |= {"adam": adam.state_dict(), "seen": seen, "rng": torch.get_rng_state()}
        if device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state()
        write_atomically(cfg.state, functools.partial(torch.save, state))
        save(model, seen, cfg.out)

    start = written = time.time()
    for step, told in zip(
        trange(done, total, initial=done, total=total, desc="clip", disable=None),
        loader,
        strict=True,
    ):
        side, lr, epsilon = schedule(cfg, step)
        if batch is None:
            batch = {name: x.to(device) for name, x in told.items()}
            batch["epsilon"] = torch.zeros((), device=device)
        if step in (done, *begins):  # a stage begins, or goes on
            if saved:
                torch.set_rng_state(saved["rng"].cpu())
                if device.type == "cuda":
                    torch.cuda.set_rng_state(saved["cuda"].cpu())
            model = build(side, model.state_dict()).to(device).train()
            if step >= begins[2]:
                model.visual.eval().requires_grad_(False)
                tables["features"] = true_features(model, tables.pop("x"))
                batch["means"] = mean_steps(tables["features"], tables["styles"][:, 1, 0])
            adam = optimiser(model, heads, rate=rate)
            if saved and step not in begins:
                adam.load_state_dict(saved["adam"])
                for group in adam.param_groups:
                    group["lr"] = rate
            run = recorded(one, device)
            saved = {}
        for name, x in told.items():
            batch[name].copy_(x, non_blocking=True)
        seen[torch.cat([told[k].flatten() for k in ("tokens", "full", "labels", "extra")])] = True
        rate.fill_(lr)
        batch["epsilon"].fill_(epsilon)
        loss = run()
        if (step + 1) % 250 == 0:
            seconds = time.time() - start
            print(f"{step + 1}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
        last = step + 1 in (*begins, total)
        if last or time.time() - written > 60:
            keep(step + 1)
            written = time.time()
        if last or (step + 1) % 3000 == 0:
            figures = report(model, *tested)
            print(
                f"{step + 1}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True
            )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
