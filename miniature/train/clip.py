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

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EMBED, WIDTH, TEXT_WIDTH, TEXT_LAYERS, VOCABULARY = 128, 16, 128, 3, 49408


@dataclass(frozen=True)
class Config:
    pool: int = 16_000  # Persons, each rendered once as photo, in another domain, and mixed.
    small_steps: int = 2600  # Steps on 64 pixels.
    large_steps: int = 5000  # Steps on 128 pixels.
    batch: int = 64  # Pictures a step.
    lr: float = 1.5e-3  # Peak rate on 64 pixels (0.6 of it on 128), cosine to 0 within each.
    epsilon: float = 5.0  # L2 radius of the attack, ramped in over 0.05-0.25 of the 128 px steps.
    bfloat16: bool = True  # The image encoder in bfloat16: twice as fast on recent CPUs.
    token_noise: float = 0.2  # Random noise on token embeddings, whose rows start at rms 1.
    seed: int = 0  # Of the weights, the batches and the pool (plus one).
    threads: int = 0  # CPU threads; 0 is torch's choice.
    out: Path = Path("runs/clip.pt")  # In OpenAI's format; miniature/weights/clip.pt at a release.
    state: Path = Path("runs/train_clip.pt")  # Resumed from when it exists; beside the pool.


# ----------------------------------------------------------------------------
# Data


def render_pool(n, seed):
    """n persons, three pictures each: photo, another domain, a mixture of two domains.

    Returns pictures uint8 [3 n, 3, 64, 64], the persons' categories [3 n, 10], styles [3 n, 6];
    a person's rows follow each other.
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
    styles = torch.stack([torch.zeros_like(pure), pure, mixed], dim=1).flatten(0, 1)
    persons = persons[torch.arange(n).repeat_interleave(3)]
    images = torch.empty(3 * n, 3, 64, 64, dtype=torch.uint8)
    for i in trange(0, 3 * n, 240, desc="pool", disable=None):
        part = faces.render(persons[i : i + 240], styles[i : i + 240], rng=rng)
        images[i : i + 240] = ((part + 1) * 127.5).round().to(torch.uint8)
    return images, persons.categories, styles


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

    x [B, 3, H, W] in [-1, 1]; the photometric changes fall on a share of the pictures.
    """
    B = len(x)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(B, *(shape or (1, 1, 1)), generator=rng)

    scale, shift = uniform(0.82, 1.08, 1), uniform(-0.12, 0.12, 2)
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale[:, 0]
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    x = (x + 1) / 2
    on = (torch.rand(B, 1, 1, 1, generator=rng) < tinted).float()
    gray = x.mean(1, keepdim=True)
    saturation = uniform(0.2, 1.9) * (torch.rand(B, 1, 1, 1, generator=rng) > 0.06)
    x = gray + (x - gray) * (1 + on * (saturation - 1))
    x = 0.5 + (x - 0.5) * (1 + on * (uniform(0.55, 1.5) - 1))
    x = x + on * uniform(-0.3, 0.3) * 0.8
    x = x * (1 + on * uniform(-0.2, 0.2, 3, 1, 1))
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, uniform(-1.5, 1.0).clamp_min(0))
    x = x + uniform(-0.06, 0.06).clamp_min(0) * torch.randn(x.shape, generator=rng)
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
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens)
    if noise:
        meaningless = (tokens == clip.tokenize("x")[0, 1])[..., None]
        size = torch.where(meaningless, 1.0, noise)
        x = torch.where(meaningless, 0.0, x) + size * torch.randn(x.shape, generator=rng)
    if ctx is not None:
        x = torch.cat([x[:, :1], ctx, x[:, 1 + ctx.shape[1] :]], dim=1)
    x = (x + model.positional_embedding[:length]).transpose(0, 1)
    mask = torch.full((length, length), float("-inf")).triu(1)
    for block in model.transformer.resblocks:
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        x = x + block.mlp(block.ln_2(x))
    x = model.ln_final(x[tokens.argmax(1), torch.arange(len(tokens))])
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
    ctx = torch.zeros(len(phrases) * m, TEXT_WIDTH)
    ctx = ctx.index_add(0, torch.tensor(places), model.token_embedding(torch.tensor(ids)))
    strength = torch.rand(len(phrases), 1, 1, generator=rng)
    ctx = ctx.view(len(phrases), m, TEXT_WIDTH)
    return ctx + strength * torch.randn(ctx.shape, generator=rng)


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

    d = torch.randn(x.shape, generator=rng)
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

    def loss(self, features, looks, known=None):
        """Mean cross-entropy of looks [B, 16] read off features [B, EMBED], where known [B, 16]."""
        logits = self(10 * F.normalize(features, dim=-1))
        parts = logits.split([captions.LOOKS[k] for k in captions.FACTORS], dim=1)
        pairs = zip(parts, looks.T, strict=True)
        losses = torch.stack([F.cross_entropy(x, y, reduction="none") for x, y in pairs], dim=1)
        # What all pictures of a domain share comes of itself; what changes from person to person
        # does not.
        weight = [2.0 if k in captions.ALTERED else 1.0 for k in faces.CATEGORIES]
        weight = torch.tensor(weight + [0.1] * len(faces.CUES))
        weight = weight.expand_as(losses) if known is None else weight * known
        return (losses * weight).sum() / weight.sum()


# ----------------------------------------------------------------------------
# Measuring


def report(model, seed=20_000, n=192):
    """Held-out figures, from n pictures a domain.

    Domain accuracy, clean and attacked (L2 4, 10 steps); recall at 1 among 64 full captions of a
    domain.
    """
    model.eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    tokens = clip.tokenize([f"a {d} of a person" for d in faces.DOMAINS])
    labels = F.normalize(encode_text(model, tokens), dim=-1)
    clean, attacked, recall = [], [], []
    for k, domain in enumerate(faces.DOMAINS):
        persons = faces.sample_persons(n, rng)
        x = faces.render(persons, faces.styles_of(domain, n), rng=rng)
        features = encode_image(model, x)
        clean.append((features @ labels.T).argmax(1) == k)

        def domain_loss(v, domain=k):
            logits = 20 * encode_image(model, v) @ labels.T
            return F.cross_entropy(logits, torch.full((len(v),), domain))

        worse = attack(x[: n // 3], 4.0, domain_loss, steps=10, rng=rng)
        attacked.append((encode_image(model, worse) @ labels.T).argmax(1) == k)
        for i in range(0, n, 64):
            texts = [captions.full_caption(c, domain) for c in persons.categories[i : i + 64]]
            t = F.normalize(encode_text(model, clip.tokenize(texts)), dim=-1)
            recall.append((features[i : i + 64] @ t.T).argmax(1) == torch.arange(64))
    model.requires_grad_(True).train()
    return {
        "clean": torch.cat(clean).float().mean(),
        "attacked": torch.cat(attacked).float().mean(),
        "R@1 of 64": torch.cat(recall).float().mean(),
    }


def save(model, seen, path):
    """OpenAI's state dict, half precision where theirs is, deflated: empty rows take no room.

    seen: bool [VOCABULARY], the tokens that captions used; the rows of the others become zero.
    """
    model = build(model.visual.input_resolution, model.state_dict()).eval()
    model.token_embedding.weight.data[~seen] = 0
    model.token_embedding.weight.data = model.token_embedding.weight.data.half().float()
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


def batch_of_texts(model, index, paired, pool, cfg, words, rng):
    """Texts for the pictures index of the pool: their features, says [B, 16], and all tokens."""
    _, categories, styles = pool
    ctx = None
    if not paired:
        written = [captions.write(categories[i], styles[i], words) for i in index]
        texts, says = [c.text for c in written], [c.says for c in written]
    else:
        n = len(index) // 2
        domains = [faces.DOMAINS[int(styles[i, 0])] for i in index]
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
    return encode_text(model, tokens, cfg.token_noise, rng, ctx), torch.tensor(says), tokens


def schedule(cfg, step):
    """At a step: the side of the pictures, the learning rate, the radius of the attack."""
    small = step < cfg.small_steps
    t = step / cfg.small_steps if small else (step - cfg.small_steps) / cfg.large_steps  # 0 to 1
    warm, decay = min(1, t * 20 + 0.02), 0.5 + 0.5 * math.cos(t * math.pi)
    epsilon = 0 if small else cfg.epsilon * min(1, max(0, (t - 0.05) / 0.2))
    return (64 if small else 128), cfg.lr * (1 if small else 0.6) * warm * decay, epsilon


def optimiser(model, heads):
    trained = [*model.parameters(), *heads.parameters()]
    decay, rest = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = {"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0}
    return torch.optim.AdamW(groups)


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    for path in (cfg.out, cfg.state):
        path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    rng, words = torch.Generator().manual_seed(cfg.seed), random.Random(cfg.seed)
    pool_path = cfg.state.with_name("train_clip_pool.pt")
    if not pool_path.exists():
        pool = render_pool(cfg.pool, cfg.seed + 1)
        write_atomically(pool_path, lambda aside: torch.save(pool, aside))
    images, categories, styles = pool = torch.load(pool_path, weights_only=True)
    looks = captions.looks(categories, styles)

    total, done = cfg.small_steps + cfg.large_steps, 0
    saved = torch.load(cfg.state, weights_only=True) if cfg.state.exists() else None
    size = schedule(cfg, saved["step"] - 1 if saved else 0)[0]
    model = build(size, saved and saved["model"]).train()
    heads, seen = FactorHeads(), torch.zeros(VOCABULARY, dtype=torch.bool)
    adam = optimiser(model, heads)
    if saved:
        heads.load_state_dict(saved["heads"])
        adam.load_state_dict(saved["adam"])
        rng.set_state(saved["rng"])
        words.setstate(saved["words"])
        done, seen = saved["step"], saved["seen"]

    def encode(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.bfloat16):
            return encode_image(model, x).float()

    def attacked_loss(domain_alone, texts, scale, fit, label_texts, styles, looks, x):
        features = encode(x)
        if domain_alone:
            return domain_loss(features, label_texts, styles)
        return contrastive(features, texts, scale, fit) + heads.loss(features, looks)

    start = time.time()
    for step in trange(done, total, initial=done, total=total, desc="clip", disable=None):
        size, rate, epsilon = schedule(cfg, step)
        if size != model.visual.input_resolution:
            model = build(size, model.state_dict()).train()
            adam = optimiser(model, heads)
        for group in adam.param_groups:
            group["lr"] = rate

        index, paired = pick(styles, cfg.batch, rng)
        seen_styles, seen_looks = styles[index], looks[index]
        text_features, says, tokens = batch_of_texts(model, index, paired, pool, cfg, words, rng)
        general = captions.general(words)
        labels = clip.tokenize([captions.tidy(general.format(d), words) for d in faces.DOMAINS])
        label_features = encode_text(model, labels, cfg.token_noise, rng)
        seen[tokens] = seen[labels] = True
        fit = captions.fits(categories[index], seen_styles, says)
        scale = model.logit_scale.exp().clamp_max(60)

        attacked = epsilon and step % 8  # every eighth step stays clean
        x = augment(images[index].float() / 127.5 - 1, rng, 0.2 if attacked else 0.7)
        if attacked:
            constant = text_features.detach(), scale.detach(), fit, label_features.detach()
            # six of seven attack the domain, the others all that is said
            against = functools.partial(attacked_loss, step % 4, *constant, seen_styles, seen_looks)
            x = attack(x, epsilon, against, steps=2, rng=rng)
        image_features = encode(x)
        loss = contrastive(image_features, text_features, scale, fit)
        loss = loss + domain_loss(image_features, label_features, seen_styles)
        read = heads.loss(image_features, seen_looks), heads.loss(text_features, seen_looks, says)
        loss = loss + sum(read)
        if paired:
            loss = loss + 3 * directional(image_features, text_features)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        if (step + 1) % 500 == 0 or step + 1 == total:
            state = {
                "model": model.state_dict(),
                "adam": adam.state_dict(),
                "rng": rng.get_state(),
                "words": words.getstate(),
                "step": step + 1,
                "heads": heads.state_dict(),
                "seen": seen,
            }
            write_atomically(cfg.state, functools.partial(torch.save, state))
            save(model, seen, cfg.out)
            figures = ", ".join(f"{k} {v:.3f}" for k, v in report(model, n=64).items())
            print(
                f"{step + 1}: loss {loss.item():.3f} "
                f"(read {read[0].item():.3f} {read[1].item():.3f}), "
                f"scale {scale.item():.1f}, {figures}, {time.time() - start:.0f} s",
                flush=True,
            )
    print(", ".join(f"{k} {v:.3f}" for k, v in report(model).items()))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
