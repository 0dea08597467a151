"""Train the CLIP of the miniature world: ``python -m miniature.train.clip``.

OpenAI's architecture and file format (ModifiedResNet, width 16; text width 128, 3 layers, the real
BPE vocabulary, 77 positions). The recipe has two aims.

Gradients that mean something: mixtures of domains and captions that speak of them, strong
photometric augmentation, linear heads that read off image and text features alike what a picture
shows (dropped afterwards), and, once the captions are learned, adversarial training in an L2 ball
on seven of eight batches of 128 pixels: projected gradient in two steps (against one step it
learned to hold, and ten broke it), most often against the domain. These batches are tinted less,
for a faint picture has no room for an attack. And the softmax over the labels shall be each
domain's share of the cues, so that no cue stands for all. First on 64 pixels, then on 128.

Language that composes: a third of the batches are pairs, the same persons as photo and in another
domain, under the same words but for the label. The step between the two texts learns to point along
the step between the two pictures (the pictures' side is held still). In half of the pairs the words
are boiled down to a *soup*: their embeddings, each with noise, are added up in a few places before
the label, which is as much as a learned prompt can write.

At last the image encoder rests, and the text encoder alone learns what it shows: the step between
two labels is the mean of the true steps, that between a person's full captions the person's own.
"""

import functools
import io
import math
import random
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import clip
import torch
import torch.nn.functional as F
from tqdm import trange

from checkpoints.files import write_atomically
from miniature import captions, faces
from miniature.train import pick_device, pool

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FAINT = {"eyes": 1.5, "texture": 0.6, "lines": 0.3}  # cues of few pixels: weights of their reading
EMBED, WIDTH, TEXT_WIDTH, TEXT_LAYERS, VOCABULARY = 128, 24, 128, 3, 49408


@dataclass(frozen=True)
class Config:
    persons: int = 12_000  # Each drawn once as photo, in another domain, and mixed: the pool.
    small_steps: int = 2500  # Steps on 64 pixels.
    large_steps: int = 4500  # Steps on 128 pixels.
    text_steps: int = 1500  # Steps of the text encoder alone.
    batch: int = 96  # Pictures a step.
    text_batch: int = 80  # Texts a step of the last stage.
    lr: float = 1.5e-3  # Peak rate on 64 pixels (0.6 of it on 128), cosine to 0 within each.
    text_lr: float = 5e-4  # Peak rate of the last stage.
    epsilon: float = 8.0  # L2 radius of the attack, ramped in over 0.05-0.25 of the 128 px steps.
    token_noise: float = 0.2  # Random noise on token embeddings, whose rows start at rms 1.
    seed: int = 0  # Of the weights, the batches and the pool (plus one).
    device: str = "auto"  # auto, cpu or cuda.
    threads: int = 0  # CPU threads; 0 is torch's choice.
    out: Path = Path("runs/clip.pt")  # In OpenAI's format; miniature/weights/clip.pt at a release.
    state: Path = Path("runs/train_clip.pt")  # Resumed from when it exists; beside the pool.


# ----------------------------------------------------------------------------
# Data


def draw_pool(n, seed):
    """n persons, three pictures each: photo, another domain, a mixture of two domains.

    Returns pictures uint8 [3 n, 3, 128, 128], the persons' categories [3 n, 10], styles [3 n, 6];
    a person's rows follow each other, and what is chance is the same in all three.
    """
    rng = torch.Generator().manual_seed(seed)
    persons = faces.sample_persons(n, rng)
    k, cues = len(faces.DOMAINS), len(faces.CUES)
    pure = torch.randint(1, k, (n, 1), generator=rng).repeat(1, cues)
    photo = torch.rand(n, 1, generator=rng) < 0.5
    base = torch.randint(k, (n, 1), generator=rng) * ~photo
    other = torch.randint(k, (n, 1), generator=rng)
    order = torch.rand(n, cues, generator=rng).argsort(1)
    some = order < torch.randint(1, cues, (n, 1), generator=rng)
    mixed = torch.where(some, other, base)
    styles = torch.stack([torch.zeros_like(pure), pure, mixed], dim=1)
    images = pool.draw(persons, styles, seed)
    categories = persons.categories.repeat_interleave(3, 0)
    return images.flatten(0, 1), categories, styles.flatten(0, 1)


def pick(styles, n, rng):
    """Indices [n] of a batch from the pool, and whether they are pairs.

    A third of the batches are pairs, n / 2 photos and then the same persons in other domains (in
    one other domain, half of the time); a third are of one domain alone, or its attributes are
    never learned; the rest are anything.
    """
    kind = torch.rand((), generator=rng)
    domain = torch.randint(1, len(faces.DOMAINS), (), generator=rng)

    def some(n, where):
        return where[torch.randperm(len(where), generator=rng)[:n]]

    if kind < 1 / 3:
        persons = torch.arange(1, len(styles), 3)
        if kind < 1 / 6:
            persons = persons[styles[persons, 0] == domain]
        index = some(n // 2, persons)
        return torch.cat([index - 1, index]), True
    if kind < 2 / 3:
        domain = domain * (torch.rand((), generator=rng) > 0.2)  # a fifth of them photos
        return some(n, (styles == domain).all(1).nonzero()[:, 0]), False
    return some(n, torch.arange(len(styles))), False


def augment(x, rng, tinted=0.7):
    """Shift, scale, colour, blur and noise, so that a tint or a place is no evidence.

    x [B, 3, H, W] in [-1, 1]; the photometric changes fall on a share of the pictures. rng: of the
    device of x.
    """
    B, device = len(x), x.device

    def uniform(low, high, *shape):
        shape = B, *(shape or (1, 1, 1))
        return low + (high - low) * torch.rand(shape, generator=rng, device=device)

    scale, shift = uniform(0.6, 1.08, 1), uniform(-0.12, 0.12, 2)
    theta = torch.zeros(B, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale[:, 0]
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    x = (x + 1) / 2
    on = (uniform(0, 1) < tinted).float()
    gray = x.mean(1, keepdim=True)
    saturation = uniform(0.2, 1.9) * (uniform(0, 1) > 0.06)
    x = gray + (x - gray) * (1 + on * (saturation - 1))
    x = 0.5 + (x - 0.5) * (1 + on * (uniform(0.55, 1.5) - 1))
    x = x + on * uniform(-0.3, 0.3) * 0.8
    x = x * (1 + on * uniform(-0.2, 0.2, 3, 1, 1))
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, uniform(-1.5, 1.0).clamp_min(0))
    noise = torch.randn(x.shape, generator=rng, device=device)
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


def encode_text(model, tokens, noise=0.0, rng=None, ctx=None):
    """CLIP's text features [B, EMBED] at the batch's own length, noise on the token embeddings.

    The meaningless word "x" becomes pure noise: labels must compose with contexts that are no
    words at all. ctx [B, m, TEXT_WIDTH], if given, stands in place of the first m tokens.
    """
    length = int(tokens.argmax(1).max()) + 1
    tokens = tokens[:, :length].to(model.positional_embedding.device)
    x = model.token_embedding(tokens)
    if noise:
        meaningless = (tokens == clip.tokenize("x")[0, 1])[..., None]
        size = torch.where(meaningless, 1.0, noise)
        chance = torch.randn(x.shape, generator=rng, device=x.device)
        x = torch.where(meaningless, 0.0, x) + size * chance
    if ctx is not None:
        x = torch.cat([x[:, :1], ctx, x[:, 1 + ctx.shape[1] :]], dim=1)
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
def token_ids(phrase):
    tokens = clip.tokenize(phrase)[0]
    return tuple(tokens[1 : tokens.argmax()].tolist())


def soup(model, phrases, m, words, rng):
    """Contexts [B, m, TEXT_WIDTH]: each phrase's embeddings added up in a random one of m places.

    phrases: B lists of them. Noise of a random strength, up to that of a token, comes on top.
    """
    places, ids = [], []
    for i, person in enumerate(phrases):
        for phrase in person:
            tokens, place = token_ids(phrase), i * m + words.randrange(m)
            places += [place] * len(tokens)
            ids += tokens
    device = model.positional_embedding.device
    embeddings = model.token_embedding(torch.tensor(ids, device=device))
    ctx = torch.zeros(len(phrases) * m, TEXT_WIDTH, device=device)
    ctx = ctx.index_add(0, torch.tensor(places, device=device), embeddings)
    strength = torch.rand(len(phrases), 1, 1, generator=rng, device=device)
    ctx = ctx.view(len(phrases), m, TEXT_WIDTH)
    return ctx + strength * torch.randn(ctx.shape, generator=rng, device=device)


def encode_image(model, x):
    """Unit features [B, EMBED] of pictures in [-1, 1], resized as CLIP's own transform does."""
    size = model.visual.input_resolution
    x = (x + 1) / 2
    if x.shape[-1] != size:
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    x = (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]
    return F.normalize(model.visual(x.contiguous(memory_format=torch.channels_last)), dim=-1)


def contrastive(image_features, text_features, logit_scale, fit):
    """CLIP's loss with every fitting pair a positive: fit [B images, B texts] bool."""
    logits = logit_scale * image_features @ F.normalize(text_features, dim=-1).T
    fit = fit.float()
    rows = -(fit / fit.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    columns = -(fit / fit.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return (rows + columns) / 2


def domain_loss(image_features, label_features, styles):
    """Cross-entropy of the softmax over the labels with each domain's share of the cues [B, 6]."""
    share = F.one_hot(styles, len(label_features)).float().mean(1)
    logits = 20 * image_features @ F.normalize(label_features, dim=-1).T
    return F.cross_entropy(logits, share)


def attack(x, epsilon, loss_of, *, steps, rng):
    """Pictures near x, each at an L2 distance of at most epsilon, with a higher loss.

    Projected gradient from a random start; pixels may leave [-1, 1].
    """

    def project(d):
        shrink = (epsilon / d.flatten(1).norm(dim=1).clamp_min(1e-9)).clamp_max(1)
        return d * shrink[:, None, None, None]

    d = torch.randn(x.shape, generator=rng, device=x.device)
    d = d / d.flatten(1).norm(dim=1)[:, None, None, None] * epsilon * 0.5
    for _ in range(steps):
        d.requires_grad_(True)
        (grad,) = torch.autograd.grad(loss_of(x + d), d)
        unit = grad / grad.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
        d = project(d.detach() + unit * epsilon * 2.5 / steps)
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
        weight = self.weight_of.expand_as(losses)
        weight = weight if known is None else weight * known
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
    model.eval().requires_grad_(False)
    device = model.positional_embedding.device
    rng = torch.Generator(device).manual_seed(0)

    def read(texts):
        return F.normalize(encode_text(model, clip.tokenize(texts)), dim=-1)

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
            worse = attack(x[: len(x) // 3], 4.0, domain_loss, steps=10, rng=rng)
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
    model.requires_grad_(True).train()
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


def batch_of_texts(model, index, paired, categories, styles, cfg, words, rng):
    """Texts for the pictures index of the pool: their features, says [B, 16], and all tokens.

    categories, styles: the pool's, as lists. words: a random.Random; rng: of the model's device.
    """
    ctx, device = None, model.positional_embedding.device
    index = index.tolist()
    if not paired:
        written = [captions.write(categories[i], styles[i], words) for i in index]
        texts, says = [c.text for c in written], [c.says for c in written]
    else:
        n = len(index) // 2
        domains = [faces.DOMAINS[styles[i][0]] for i in index]
        spoken = [
            captions.speak_of(categories[i], domains[n + j], words) for j, i in enumerate(index[:n])
        ]
        phrases = [p for p, _ in spoken]
        says = [both[0] for _, both in spoken] + [both[1] for _, both in spoken]
        if words.random() < 0.5:
            m = words.randint(2, 6)
            ctx = soup(model, phrases, m, words, rng).repeat(2, 1, 1)
            texts = [f"{'x ' * m}{d}" for d in domains]
        else:
            sentences = [captions.tidy(captions.personal(p, words), words) for p in phrases]
            texts = [s.format(d) for s, d in zip(2 * sentences, domains, strict=True)]
    tokens = clip.tokenize(texts)
    says = torch.tensor(says, device=device)
    return encode_text(model, tokens, cfg.token_noise, rng, ctx), says, tokens


def label_tokens(words):
    """Tokens of one random sentence about each domain, the same but for its label."""
    general = captions.general(words)
    return clip.tokenize([captions.tidy(general.format(d), words) for d in faces.DOMAINS])


def schedule(cfg, step):
    """At a step: the side of the pictures, the learning rate, the radius of the attack."""
    small = step < cfg.small_steps
    t = step / cfg.small_steps if small else (step - cfg.small_steps) / cfg.large_steps  # 0 to 1
    warm, decay = min(1, t * 20 + 0.02), 0.5 + 0.5 * math.cos(t * math.pi)
    epsilon = 0 if small else cfg.epsilon * min(1, max(0, (t - 0.05) / 0.2))
    return (64 if small else 128), cfg.lr * (1 if small else 0.6) * warm * decay, epsilon


def optimiser(*modules):
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    decay, rest = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = {"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0}
    return torch.optim.AdamW(groups)


def clip_loss(model, heads, drawn, cfg, step, words, rng, noise, seen):
    """The loss of one step of the first two stages, on a batch of the pool."""
    images, categories, styles, looks, lists = drawn
    size, _, epsilon = schedule(cfg, step)
    index, paired = pick(lists[2], cfg.batch, rng)
    text_features, says, tokens = batch_of_texts(
        model, index, paired, *lists[:2], cfg, words, noise
    )
    labels = label_tokens(words)
    label_features = encode_text(model, labels, cfg.token_noise, noise)
    seen[tokens] = seen[labels] = True
    index = index.to(images.device)
    x, categories, styles, looks = (y[index] for y in (images, categories, styles, looks))
    fit = captions.fits(categories, styles, says)
    scale = model.logit_scale.exp().clamp_max(60)

    attacked = epsilon and step % 8  # every eighth step stays clean
    x = pool.as_images(x)
    if size < x.shape[-1]:
        x = F.avg_pool2d(x, x.shape[-1] // size)
    x = augment(x, noise, 0.2 if attacked else 0.7)
    if attacked:
        texts, labels, constant = text_features.detach(), label_features.detach(), scale.detach()

        def against(x):  # six of seven attack the domain, the others all that is said
            features = encode_image(model, x)
            if step % 4:
                return domain_loss(features, labels, styles)
            return contrastive(features, texts, constant, fit) + heads.loss(features, looks)

        x = attack(x, epsilon, against, steps=2, rng=noise)
    image_features = encode_image(model, x)
    loss = contrastive(image_features, text_features, scale, fit)
    loss = loss + domain_loss(image_features, label_features, styles)
    loss = loss + heads.loss(image_features, looks) + heads.loss(text_features, looks, says)
    if paired:
        loss = loss + 3 * directional(image_features, text_features)
    return loss


@torch.no_grad()
def true_features(model, images):
    """Features of the pool's photos and of the same persons in their domains, [n, 2, EMBED]."""
    rows = torch.arange(len(images)).view(-1, 3)[:, :2].flatten().to(images.device)
    found = [encode_image(model, pool.as_images(images[i])) for i in rows.split(250)]
    return torch.cat(found).view(-1, 2, EMBED)


def mean_steps(features, domains):
    """The mean true step to every domain but the photo [domains - 1, EMBED].

    features [n, 2, EMBED], as of `true_features`; domains [n]: of the second ones.
    """
    steps = F.normalize(features[:, 1] - features[:, 0], dim=-1)
    return torch.stack([steps[domains == k].mean(0) for k in range(1, len(faces.DOMAINS))])


def text_loss(model, features, means, drawn, cfg, words, rng, noise, seen):
    """The loss of one step of the last stage: texts of persons whose true features are known."""
    _, categories, styles, _, lists = drawn
    device, n = features.device, cfg.text_batch // 2
    some = torch.randperm(len(features), generator=rng)[: 2 * n]
    told, said = some[:n], some[n:]  # whose attributes are told in part, and in full

    index = torch.cat([3 * told, 3 * told + 1])
    text_features, says, tokens = batch_of_texts(model, index, True, *lists[:2], cfg, words, noise)
    image_features = features[told.to(device)].transpose(0, 1).flatten(0, 1)
    index = index.to(device)
    fit = captions.fits(categories[index], styles[index], says)
    scale = model.logit_scale.exp().clamp_max(60).detach()
    loss = 0.3 * contrastive(image_features, text_features, scale, fit)
    loss = loss + 3 * directional(image_features, text_features)

    rows = said.tolist()
    shown = styles[torch.cat([3 * said, 3 * said + 1]).to(device)]
    people = [(lists[0][3 * i], faces.DOMAINS[lists[1][3 * i + 1][0]]) for i in rows]
    full = [captions.full_caption(c, "photo") for c, _ in people]
    full = clip.tokenize(full + [captions.full_caption(c, d) for c, d in people])
    image_features = features[said.to(device)].transpose(0, 1).flatten(0, 1)
    text_features = encode_text(model, full, cfg.token_noise * words.randint(0, 1), noise)
    loss = loss + 2 * directional(image_features, text_features)

    labels = torch.cat([label_tokens(words) for _ in range(4)])
    spoken = F.normalize(encode_text(model, labels, cfg.token_noise, noise), dim=-1)
    spoken = spoken.view(4, -1, EMBED)
    seen[tokens] = seen[full] = seen[labels] = True
    steps = spoken[:, 1:] - spoken[:, :1]
    loss = loss + 3 * (1 - F.cosine_similarity(steps, means, dim=-1)).mean()
    return loss + domain_loss(image_features, spoken[0], shown)


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    for path in (cfg.out, cfg.state):
        path.parent.mkdir(parents=True, exist_ok=True)
    device = pick_device(cfg.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(cfg.seed)
    rng, words = torch.Generator().manual_seed(cfg.seed), random.Random(cfg.seed)
    noise = torch.Generator(device).manual_seed(cfg.seed)  # rng picks, this one disturbs
    pool_path = cfg.state.with_name("train_clip_pool.pt")
    n, seed = cfg.persons, cfg.seed + 1
    make = functools.partial(draw_pool, n, seed)
    images, categories, styles = pool.kept(pool_path, make, n=n, seed=seed)
    lists = categories.tolist(), styles.tolist(), styles
    looks = captions.looks(categories, styles)
    drawn = (*(x.to(device) for x in (images, categories, styles, looks)), lists)
    tested = held_out()

    stages = cfg.small_steps, cfg.small_steps + cfg.large_steps
    total, done = stages[1] + cfg.text_steps, 0
    saved = torch.load(cfg.state, weights_only=True) if cfg.state.exists() else None
    size = schedule(cfg, saved["step"] - 1 if saved else 0)[0]
    model = build(size, saved and saved["model"]).to(device).train()
    heads = FactorHeads().to(device)
    seen = torch.zeros(VOCABULARY, dtype=torch.bool)
    if saved and saved["step"] > stages[1]:
        model.visual.requires_grad_(False)
    adam = optimiser(model, heads)
    if saved:
        heads.load_state_dict(saved["heads"])
        adam.load_state_dict(saved["adam"])
        rng.set_state(saved["rng"])
        noise.set_state(saved["noise"])
        words.setstate(saved["words"])
        done, seen = saved["step"], saved["seen"]

    def keep(step):
        state = {"model": model.state_dict(), "heads": heads.state_dict(), "step": step}
        state |= {"adam": adam.state_dict(), "rng": rng.get_state(), "noise": noise.get_state()}
        state |= {"words": words.getstate(), "seen": seen}
        write_atomically(cfg.state, functools.partial(torch.save, state))
        save(model, seen, cfg.out)

    start, features = time.time(), None
    for step in trange(done, total, initial=done, total=total, desc="clip", disable=None):
        if step < stages[1]:
            size, rate, _ = schedule(cfg, step)
            if size != model.visual.input_resolution:
                model = build(size, model.state_dict()).to(device).train()
                adam = optimiser(model, heads)
            loss = clip_loss(model, heads, drawn, cfg, step, words, rng, noise, seen)
        else:
            if features is None:
                model.visual.eval().requires_grad_(False)
                features = true_features(model, drawn[0])
                means = mean_steps(features, drawn[2].view(-1, 3, 6)[:, 1, 0])
            if step == stages[1]:
                adam = optimiser(model)
            rate = cfg.text_lr * (
                0.5 + 0.5 * math.cos((step - stages[1]) / cfg.text_steps * math.pi)
            )
            loss = text_loss(model, features, means, drawn, cfg, words, rng, noise, seen)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        if (step + 1) % 1000 == 0 or step + 1 in (*stages, total):
            keep(step + 1)
            figures = ", ".join(f"{k} {v:.3f}" for k, v in report(model, *tested).items())
            seconds = time.time() - start
            print(f"{step + 1}: loss {loss.item():.3f}, {figures}, {seconds:.0f} s", flush=True)
            if step >= stages[1]:
                model.visual.requires_grad_(False)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
