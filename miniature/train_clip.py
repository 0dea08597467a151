"""Train the CLIP of the miniature world: ``python -m miniature.train_clip``.

OpenAI's architecture and file format (ModifiedResNet, width 16; text width 128, 3 layers, the real BPE vocabulary, 77
positions). The recipe aims at gradients that mean something: mixtures of domains, captions that speak of them, strong
photometric augmentation, and one step of adversarial training in an L2 ball, first on 64, then on 128 pixels.
"""

import functools
import os
import random
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import clip
import torch
import torch.nn.functional as F
from tqdm import trange

from miniature import captions, faces

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
EMBED, WIDTH, TEXT_WIDTH, TEXT_LAYERS, VOCABULARY = 128, 16, 128, 3, 49408


@dataclass(frozen=True)
class Config:
    pool: int = 48_000  # pictures rendered once; 40% of them mixtures
    small_steps: int = 2500  # steps on 64 pixels
    large_steps: int = 1500  # steps on 128 pixels
    batch: int = 64
    lr: float = (
        1.5e-3  # peak rate, cosine to 0 within each resolution (the second starts at 0.6 of it)
    )
    epsilon: float = 5.0  # L2 radius of the attack on [-1, 1] pixels, ramped in over the first half of the 64 px steps
    token_noise: float = 0.3  # random noise on token embeddings, whose rows start at rms 1
    seed: int = 0
    threads: int = 0  # CPU threads, 0 = torch's choice
    out: Path = Path(__file__).parent / "weights" / "clip.pt"
    state: Path = Path("runs/train_clip.pt")  # resumed from when it exists


# ----------------------------------------------------------------------------
# Data


def render_pool(n, seed):
    """n pictures (uint8 [n, 3, 64, 64]), their persons' categories [n, 10] and styles [n, 6]."""
    rng = torch.Generator().manual_seed(seed)
    persons = faces.sample_persons(n, rng)
    k = len(faces.DOMAINS)
    styles = torch.randint(k, (n, 1), generator=rng).repeat(1, len(faces.CUES))
    mixed = torch.rand(n, 1, generator=rng) < 0.4
    base = torch.where(
        torch.rand(n, 1, generator=rng) < 0.5, torch.zeros(n, 1, dtype=torch.long), styles[:, :1]
    )
    other = torch.randint(k, (n, 1), generator=rng)
    order = torch.rand(n, len(faces.CUES), generator=rng).argsort(1)
    some = order < torch.randint(1, len(faces.CUES), (n, 1), generator=rng)
    styles = torch.where(mixed, torch.where(some, other, base), styles)
    images = torch.empty(n, 3, 64, 64, dtype=torch.uint8)
    for i in trange(0, n, 250, desc="pool", disable=None):
        part = faces.render(persons[i : i + 250], styles[i : i + 250], rng=rng)
        images[i : i + 250] = ((part + 1) * 127.5).round().to(torch.uint8)
    return images, persons.categories, styles


def pick(styles, n, rng):
    """Indices of a batch: half of the batches are of one domain alone, or its attributes are never learned."""
    pure = (styles == styles[:, :1]).all(1)
    if torch.rand((), generator=rng) < 0.5:
        domain = torch.randint(len(faces.DOMAINS), (), generator=rng)
        where = (pure & (styles[:, 0] == domain)).nonzero()[:, 0]
    else:
        where = torch.arange(len(styles))
    return where[torch.randperm(len(where), generator=rng)[:n]]


def augment(x, rng):
    """Shift, scale, colour, blur and noise, so that a tint or a place is no evidence. x [B, 3, H, W] in [-1, 1]."""
    B = len(x)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(B, *(shape or (1, 1, 1)), generator=rng)

    scale, shift = uniform(0.82, 1.08, 1), uniform(-0.12, 0.12, 2)
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale[:, 0]
    theta[:, :, 2] = shift
    x = F.grid_sample(
        x,
        F.affine_grid(theta, x.shape, align_corners=False),
        padding_mode="reflection",
        align_corners=False,
    )
    x = (x + 1) / 2
    on = (
        torch.rand(B, 1, 1, 1, generator=rng) < 0.7
    ).float()  # photometric changes on most of the pictures
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * (
        1 + on * (uniform(0.2, 1.9) * (torch.rand(B, 1, 1, 1, generator=rng) > 0.06) - 1)
    )
    x = 0.5 + (x - 0.5) * (1 + on * (uniform(0.55, 1.5) - 1))
    x = x + on * uniform(-0.3, 0.3) * 0.8
    x = x * (1 + on * uniform(-0.2, 0.2, 3, 1, 1))
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, (uniform(-1.5, 1.0)).clamp_min(0))
    x = x + uniform(-0.06, 0.06).clamp_min(0) * torch.randn(x.shape, generator=rng)
    return x.clamp(0, 1) * 2 - 1


# ----------------------------------------------------------------------------
# Model


def build(resolution, state=None):
    """OpenAI's CLIP at our sizes; with a state of another resolution, its attention pool's positions are resized."""
    model = clip.model.CLIP(
        EMBED,
        resolution,
        (1, 1, 1, 1),
        WIDTH,
        None,
        77,
        VOCABULARY,
        TEXT_WIDTH,
        TEXT_WIDTH // 64,
        TEXT_LAYERS,
    )
    model.visual.to(memory_format=torch.channels_last)  # about a third faster on a CPU
    if state is None:
        torch.nn.init.normal_(model.token_embedding.weight, std=1.0)
        torch.nn.init.normal_(model.positional_embedding, std=0.3)
        return model
    key = "visual.attnpool.positional_embedding"
    state = dict(state)
    grid = round((len(state[key]) - 1) ** 0.5)
    if grid != resolution // 32:
        cells = state[key][1:].T.reshape(1, -1, grid, grid)
        cells = F.interpolate(
            cells, size=(resolution // 32,) * 2, mode="bilinear", align_corners=False
        )
        state[key] = torch.cat([state[key][:1], cells.flatten(2)[0].T])
    model.load_state_dict(state)
    return model


def encode_text(model, tokens, noise=0.0, rng=None):
    """CLIP's text features [B, EMBED] at the batch's own length, with noise on the token embeddings.

    The meaningless word "x" becomes pure noise: labels must compose with contexts that are no words at all.
    """
    length = int(tokens.argmax(1).max()) + 1
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens)
    if noise:
        meaningless = (tokens == clip.tokenize("x")[0, 1])[..., None]
        x = torch.where(meaningless, 0.0, x) + torch.where(meaningless, 1.0, noise) * torch.randn(
            x.shape, generator=rng
        )
    x = (x + model.positional_embedding[:length]).transpose(0, 1)
    mask = torch.full((length, length), float("-inf")).triu(1)
    for block in model.transformer.resblocks:
        y = block.ln_1(x)
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        x = x + block.mlp(block.ln_2(x))
    x = model.ln_final(x[tokens.argmax(1), torch.arange(len(tokens))])
    return x @ model.text_projection


def encode_image(model, x):
    """Normalised image features [B, EMBED] of pictures in [-1, 1], resized as CLIP's own transform does."""
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


def attack(x, epsilon, loss_of, steps=1, rng=None):
    """Pictures near x (L2 distance at most epsilon each) with a higher loss; projected gradient, random start."""

    def project(d):
        return (
            d
            * (epsilon / d.flatten(1).norm(dim=1).clamp_min(1e-9)).clamp_max(1)[:, None, None, None]
        )

    d = torch.randn(x.shape, generator=rng)
    d = d / d.flatten(1).norm(dim=1)[:, None, None, None] * epsilon * 0.5
    for _ in range(steps):
        d.requires_grad_(True)
        (grad,) = torch.autograd.grad(loss_of(x + d), d)
        unit = grad / grad.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]
        d = project(d.detach() + unit * epsilon * (1.0 if steps == 1 else 2.5 / steps))
    return x + d


# ----------------------------------------------------------------------------
# Measuring


def report(model, seed=20_000, n=192):
    """Held-out figures: domain accuracy clean and attacked (L2 4, 10 steps), R@1 of 64 full captions in a domain."""
    model.eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    labels = F.normalize(
        encode_text(model, clip.tokenize([f"a {d} of a person" for d in faces.DOMAINS])), dim=-1
    )
    clean, attacked, recall = [], [], []
    for k, domain in enumerate(faces.DOMAINS):
        persons = faces.sample_persons(n, rng)
        x = faces.render(persons, faces.styles_of(domain, n), rng=rng)
        features = encode_image(model, x)
        clean.append((features @ labels.T).argmax(1) == k)
        y = torch.full((64,), k)
        worse = attack(
            x[:64],
            4.0,
            lambda v, y=y: F.cross_entropy(20 * encode_image(model, v) @ labels.T, y),
            10,
            rng,
        )
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


@functools.cache
def seen_tokens(seed=0, n=40_000):
    """Ids of the tokens that captions use; every other row of the embedding is stored as zero."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    persons = faces.sample_persons(n, gen).categories
    domains = torch.randint(len(faces.DOMAINS), (n, 2), generator=gen)
    texts = set()
    for c, (a, b) in zip(persons, domains, strict=True):
        styles = torch.tensor([a, b, a, b, a, a])
        texts.update(captions.write(c, styles, rng).text.split())
    texts |= (
        captions.known_words()
        | set(captions.LABELS)
        | {"in the style of", "photo.", "in a video game", "itap of my"}
    )
    words = sorted(texts | {w + "." for w in texts} | {w + "," for w in texts})
    return torch.cat(
        [clip.tokenize(words[i : i + 512]).flatten() for i in range(0, len(words), 512)]
    ).unique()


def save(model, path):
    """OpenAI's state dict, half precision where theirs is, deflated so that the empty rows take no room."""
    model = build(model.visual.input_resolution, model.state_dict()).eval()
    unseen = torch.ones(VOCABULARY, dtype=torch.bool)
    unseen[seen_tokens()] = False
    model.token_embedding.weight.data[unseen] = 0
    model.token_embedding.weight.data = model.token_embedding.weight.data.half().float()
    clip.model.convert_weights(model)
    aside, deflated = path.with_suffix(".tmp"), path.with_suffix(".zip.tmp")
    torch.save(model.state_dict(), aside)
    with (
        zipfile.ZipFile(aside) as stored,
        zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    aside.unlink()
    os.replace(deflated, path)


# ----------------------------------------------------------------------------


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    rng, words = torch.Generator().manual_seed(cfg.seed), random.Random(cfg.seed)
    pool_path = cfg.state.with_name("train_clip_pool.pt")
    cfg.state.parent.mkdir(parents=True, exist_ok=True)
    if not pool_path.exists():
        torch.save(render_pool(cfg.pool, cfg.seed + 1), pool_path)
    images, categories, styles = torch.load(pool_path, weights_only=True)

    total = cfg.small_steps + cfg.large_steps
    saved = torch.load(cfg.state, weights_only=True) if cfg.state.exists() else None
    step = saved["step"] if saved else 0
    model = build(64 if step < cfg.small_steps else 128, saved and saved["model"]).train()

    def optimiser():
        decay = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        return torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0}],
            lr=cfg.lr,
        )

    adam = optimiser()
    if saved:
        adam.load_state_dict(saved["adam"])
        rng.set_state(saved["rng"])
        words.seed(step)
    start = time.time()
    for step in trange(step, total, initial=step, total=total, desc="clip", disable=None):
        if step == cfg.small_steps:
            model = build(128, model.state_dict()).train()
            adam = optimiser()
        small = step < cfg.small_steps
        t = step / cfg.small_steps if small else (step - cfg.small_steps) / cfg.large_steps
        rate = (
            (1.0 if small else 0.6)
            * min(1, t * 20 + 0.02)
            * (0.5 + 0.5 * torch.cos(torch.tensor(t * 3.1416)))
        )
        for group in adam.param_groups:
            group["lr"] = cfg.lr * rate.item()

        index = pick(styles, cfg.batch, rng)
        written = [captions.write(categories[i], styles[i], words) for i in index]
        fit = captions.fits(
            categories[index], styles[index], torch.tensor([c.says for c in written])
        )
        x = augment(images[index].float() / 127.5 - 1, rng)
        tokens = clip.tokenize([c.text for c in written])
        text_features = encode_text(model, tokens, cfg.token_noise, rng)
        scale = model.logit_scale.exp().clamp_max(60)
        epsilon = cfg.epsilon * min(1, max(0, 2.5 * t - 0.75)) if small else cfg.epsilon
        if epsilon and step % 2:  # every other step stays clean
            fixed, fixed_scale = text_features.detach(), scale.detach()
            x = attack(
                x,
                epsilon,
                lambda v, f=fixed, s=fixed_scale, m=fit: contrastive(
                    encode_image(model, v), f, s, m
                ),
                rng=rng,
            )
        loss = contrastive(encode_image(model, x), text_features, scale, fit)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        if (step + 1) % 250 == 0 or step + 1 == total:
            state = {
                "model": model.state_dict(),
                "adam": adam.state_dict(),
                "rng": rng.get_state(),
                "step": step + 1,
            }
            torch.save(state, cfg.state.with_suffix(".tmp"))
            os.replace(cfg.state.with_suffix(".tmp"), cfg.state)
            save(model, cfg.out)
            figures = ", ".join(f"{k} {v:.3f}" for k, v in report(model, n=64).items())
            print(
                f"{step + 1}: loss {loss.item():.3f}, scale {scale.item():.1f}, {figures}, {time.time() - start:.0f} s",
                flush=True,
            )
    print(", ".join(f"{k} {v:.3f}" for k, v in report(model).items()))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
