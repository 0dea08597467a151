"""Train the judge of the miniature world: ``python -m miniature.train.judge``.

Supervised by the renderer's own labels, on pure domains and mixtures, with blur, noise and
photometric changes so that none of these passes for a domain. A part of each batch is made to fail
in the ways of FAILURES and belongs to none of the domains; another goes a small part of that way
and stays what it is. The data draw (seed) is not the CLIP's.
"""

import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import trange

from checkpoints.files import write_atomically
from miniature import faces
from miniature.judge import NONE, Judge
from miniature.train import pick_device
from miniature.train.pool import as_images, draw, kept

FAILED, NEARLY = 0.3, 0.2  # shares of a batch


@dataclass(frozen=True)
class Config:
    pool: int = 22_000  # Pictures, drawn once, half of them mixtures.
    steps: int = 6300  # Optimisation steps.
    batch: int = 64  # Pictures a step.
    lr: float = 1.5e-3  # Peak rate, cosine to 0.
    seed: int = 777  # Of the weights and the pictures; not the CLIP's.
    device: str = "auto"  # auto: cuda if there is one, else cpu.
    bfloat16: bool = False  # Autocast: 1.4 times as fast, with AVX-512 that knows it.
    threads: int = 0  # CPU threads, and processes that draw; 0 is torch's choice, and all.
    out: Path = Path("runs/judge.pt")  # Float16; miniature/weights/judge.pt at a release.
    state: Path = Path("runs/train_judge.pt")  # Resumed from when it exists; beside the pool.


def labelled_pictures(n, seed, threads=0):
    """uint8 pictures [n, 3, 128, 128], their persons and their styles [n, 6].

    First n // 6 photos, then the same persons in another domain, as many others, and mixtures: in
    these, each cue is of one of two domains, of which photo is one more often.
    """
    rng = torch.Generator().manual_seed(seed)
    persons, pairs, k = faces.sample_persons(n, rng), n // 6, len(faces.DOMAINS)
    persons.categories[pairs : 2 * pairs] = persons.categories[:pairs]
    persons.proportions[pairs : 2 * pairs] = persons.proportions[:pairs]
    two = torch.randint(k, (n, 2), generator=rng)
    two[:, 0] *= (torch.rand(n, generator=rng) < 0.6).long()
    second = torch.rand(n, len(faces.CUES), generator=rng) < torch.rand(n, 1, generator=rng)
    styles = torch.where(second, two[:, 1:], two[:, :1])
    styles[:pairs] = 0
    styles[pairs : 3 * pairs] = torch.randint(1, k, (2 * pairs, 1), generator=rng)
    return draw(persons, styles, seed, processes=threads or None), persons, styles


def twins(index, n):
    """Of pictures of `labelled_pictures` of n: the same person's other one, or itself."""
    both = n // 6 * 2
    return torch.where(index < both, (index + both // 2) % max(both, 1), index)


# ----------------------------------------------------------------------------------------------
# What happens to pictures


def disturb(x, rng):
    """Small moves, blur and noise, and on half of the pictures brightness, contrast and tint.

    x [B, 3, 128, 128] in [-1, 1]; rng: a CPU torch.Generator.
    """
    B = len(x)

    def uniform(low, high, *shape):
        chance = torch.rand(B, *(shape or (1, 1, 1)), generator=rng)
        return (low + (high - low) * chance).to(x.device)

    on = (uniform(0, 1) < 0.5).float()
    small = torch.tensor([0.05, 0.05, 0.1], device=x.device) * (uniform(0, 1, 1, 1) < 0.7)
    place = torch.eye(2, 3, device=x.device) + small * uniform(-1, 1, 2, 3)
    grid = F.affine_grid(place, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    x = x * (1 + on * uniform(-0.2, 0.2)) + on * uniform(-0.15, 0.15)
    x = x + on * uniform(-0.08, 0.08, 3, 1, 1)
    x = torch.lerp(x, blur(blur(x, 3), 3), uniform(-1.5, 1.0).clamp_min(0))
    noise = torch.randn(x.shape, generator=rng).to(x.device)
    return (x + uniform(-0.06, 0.08).clamp_min(0) * noise).clamp(-1, 1)


def blur(x, width):
    """The mean of width x width pixels, width odd."""
    x = F.pad(x, (width // 2,) * 4, mode="replicate")
    for dim in (2, 3):  # many times faster than avg_pool2d on a CPU
        size = x.shape[dim] - width + 1
        x = sum(x.narrow(dim, k, size) for k in range(width)) / width
    return x


def number(rng, low, high):
    return low + (high - low) * torch.rand((), generator=rng).item()


def field(x, channels, cells, rng):
    """A smooth random map [B, channels, H, W] ~ N(0, 1) for pictures x, of cells^2 values."""
    values = torch.randn(len(x), channels, cells, cells, generator=rng).to(x.device)
    return F.interpolate(values, size=x.shape[-2:], mode="bicubic", align_corners=True)


def moved(x, offset):
    """x [B, 3, H, W], each pixel taken from offset [B or 1, 2, H, W] away; 2 is the whole side."""
    still = torch.eye(2, 3, device=x.device)[None].expand(len(x), -1, -1)
    grid = F.affine_grid(still, x.shape, align_corners=False) + offset.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def away(x, rng, low, high):
    """One step [1, 2, 1, 1] in a random direction, for `moved`; low and high: its length."""
    angle, length = number(rng, 0, 2 * math.pi), number(rng, low, high)
    step = torch.tensor([length * math.cos(angle), length * math.sin(angle)], device=x.device)
    return step[None, :, None, None].expand(1, 2, *x.shape[-2:])


def between(x, twin, other, rng):
    return torch.lerp(x, twin, number(rng, 0.3, 0.7))


def halved(x, twin, other, rng):
    cut = round(x.shape[-1] * number(rng, 0.35, 0.65))
    return torch.cat([x[..., :cut], twin[..., cut:]], dim=-1)


def botched(x, twin, other, rng):
    """As by a generator led astray: blurry changes, further at some places; stains and halos."""
    way = 0.2 + 0.6 * torch.sigmoid(2 * field(x, 1, 5, rng))
    x = x + way * blur(twin - x, 2 * int(number(rng, 0, 6)) + 1)
    x = x + number(rng, 0.06, 0.3) * field(x, 1, int(number(rng, 3, 14)), rng)
    return x - number(rng, 1, 4) * blur((x - blur(x, 5)).abs().mean(1, keepdim=True), 5)


def crossed(x, twin, other, rng):
    return torch.lerp(x, other, number(rng, 0.3, 0.7))


def patched(x, twin, other, rng):
    side = round(x.shape[-1] * number(rng, 0.25, 0.5))
    top, left = (round((x.shape[-1] - side) * number(rng, 0.25, 0.75)) for _ in "yx")
    box = ..., slice(top, top + side), slice(left, left + side)
    x = x.clone()
    x[box] = other[box]
    return x


def doubled(x, twin, other, rng):
    return torch.lerp(x, moved(x, away(x, rng, 0.12, 0.4)), number(rng, 0.3, 0.5))


def smeared(x, twin, other, rng):
    step = away(x, rng, 0.16, 0.5)
    return torch.stack([moved(x, step * (k / 8 - 0.5)) for k in range(9)]).mean(0)


def blurred(x, twin, other, rng):
    width = 2 * round(number(rng, 3, 8)) + 1
    return blur(blur(x, width), width)


def tinted(x, twin, other, rng):
    color = torch.randn(len(x), 3, 1, 1, generator=rng).to(x.device)
    color = F.normalize(color - color.mean(1, keepdim=True), dim=1)
    return x + number(rng, 0.35, 1.0) * color


def recolored(x, twin, other, rng):
    mix = torch.randn(len(x), 3, 3, generator=rng).to(x.device)
    mix = torch.eye(3, device=x.device) + number(rng, 0.6, 1.2) * F.normalize(mix, dim=-1)
    return torch.einsum("bij,bjhw->bihw", mix, x)


def faded(x, twin, other, rng):
    return x * number(rng, 0.2, 0.45) + number(rng, -0.5, 0.5)


def noisy(x, twin, other, rng):
    cells = x.shape[-1] // (1, 2, 4)[int(number(rng, 0, 3))]
    return x + number(rng, 0.22, 0.7) * field(x, 3, cells, rng)


def stained(x, twin, other, rng):
    cells, channels = int(number(rng, 3, 14)), (1, 3)[int(number(rng, 0, 2))]
    light = number(rng, 0.2, 0.7) * field(x, channels, cells, rng)
    return (x + 1) * light.exp() - 1 if number(rng, 0, 1) < 0.5 else x + light


def blotted(x, twin, other, rng):
    height = field(x, 1, int(number(rng, 4, 10)), rng)
    inside = torch.sigmoid(number(rng, 4, 30) * (height / height.amax((2, 3), True) - 0.5))
    color = torch.randn(len(x), 3, 1, 1, generator=rng).to(x.device).sign()
    color = color if number(rng, 0, 1) < 0.5 else color.new_tensor(-1)
    return torch.lerp(x, color, number(rng, 0.4, 0.9) * inside)


def warped(x, twin, other, rng):
    return moved(x, number(rng, 0.05, 0.12) * field(x, 2, int(number(rng, 4, 10)), rng))


def chequered(x, twin, other, rng):
    place = torch.arange(x.shape[-1], device=x.device) * 2 * math.pi / number(rng, 2, 9)
    board = place.cos()[:, None] * place.cos()
    return x + number(rng, 0.3, 0.7) * board


def haloed(x, twin, other, rng):
    edges = blur((x - blur(x, 5)).abs().mean(1, keepdim=True), 2 * int(number(rng, 2, 6)) + 1)
    return x - number(rng, 0.6, 1.6) * edges / edges.amax((2, 3), True).clamp_min(1e-3) - 0.1


def overdrawn(x, twin, other, rng):
    width = 2 * int(number(rng, 2, 8)) + 1
    return x + number(rng, 2, 5) * (x - blur(x, width))


def broken(x, twin, other, rng):
    """A random network of three convolutions, at a random scale, painted over the picture."""
    y = torch.cat([x, field(x, 3, 8, rng)], dim=1)
    y = F.avg_pool2d(y, (1, 2, 4, 8)[int(number(rng, 0, 4))])
    for a, b in ((6, 16), (16, 16), (16, 3)):
        weight = torch.randn(b, a, 3, 3, generator=rng).to(x.device) / math.sqrt(9 * a)
        y = F.conv2d(F.pad(y, (1, 1, 1, 1), mode="replicate"), weight)
        y = (y - y.mean((2, 3), True)) / (y.std((2, 3), keepdim=True) + 1e-3)
        y = F.leaky_relu(y, 0.1) if b > 3 else y
    y = F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
    y = torch.lerp(y, y.mean(1, keepdim=True), number(rng, 0, 1))
    return x + number(rng, 0.2, 0.7) * y


# x [B, 3, H, W], the same persons' other pictures, other pictures, rng -> failed pictures. Numbers
# are drawn once a call. The hard ones first: these are drawn more often.
FAILURES = (between, halved, botched, warped, patched, doubled, blotted, crossed, haloed,
            chequered, recolored, overdrawn, smeared, tinted, stained, broken, noisy, faded,
            blurred)  # fmt: skip
PAIRED = 3  # so many of them need another picture of the same person


def fail(x, twin, other, kinds, rng):
    """Pictures x [B, 3, H, W], each made to fail in its way, some only at places.

    twin: the same persons' other pictures (for kinds below PAIRED). other: other pictures.
    kinds [B]: indices into FAILURES, on the CPU.
    """
    failed = torch.empty_like(x)
    for k, failure in enumerate(FAILURES):
        at = (kinds == k).nonzero()[:, 0]
        if len(at):
            failed[at] = failure(x[at], twin[at], other[at], rng).clamp(-1, 1)
    places = torch.sigmoid(8 * field(x, 1, 4, rng) + 2)
    somewhere = torch.lerp(x, failed, places)
    visible = (somewhere - x).abs().mean((1, 2, 3)) > 0.06
    local = visible & (torch.rand(len(x), generator=rng) < 0.3).to(x.device)
    return torch.where(local[:, None, None, None], somewhere, failed)


# ----------------------------------------------------------------------------------------------
# Training


def judge_loss(out, persons, styles):
    """Cross-entropy of every head of logits, squared error of the proportions.

    The domain's target is each domain's share of the cues, styles [B, 6]; pictures of style NONE
    have failed, and teach the domain alone.
    """
    share = F.one_hot(styles, NONE + 1).float().mean(1)
    true = styles[:, 0] != NONE
    persons, styles = persons[true], styles[true]
    loss = F.mse_loss(out["proportions"][true], persons.proportions)
    for i, cue in enumerate(faces.CUES):
        loss = loss + F.cross_entropy(out[f"cue {cue}"][true], styles[:, i]) / 2
    for factor in faces.CATEGORIES:
        loss = loss + F.cross_entropy(out[factor][true], persons.category(factor)) / 2
    return loss + 3 * F.cross_entropy(out["domain"], share)


def training_batch(images, styles, batch, rng, device):
    """Pictures [B, 3, 128, 128], their places in the pool [B] and their styles [B, 6] or NONE."""
    n, half, failed = len(images), round(batch * (FAILED + NEARLY)), round(batch * FAILED)
    index = torch.randint(n, (batch,), generator=rng)
    kinds = (len(FAILURES) * torch.rand(half, generator=rng) ** 1.5).long()
    index[:half] = torch.where(kinds < PAIRED, index[:half] % (n // 6 * 2), index[:half])
    others = torch.randint(n, (half,), generator=rng)
    x, twin, other = (
        as_images(images[i].to(device)) for i in (index, twins(index[:half], n), others)
    )
    amount = 0.15 * torch.rand(half, 1, 1, 1, generator=rng)
    amount[:failed] = 1
    x[:half] = torch.lerp(x[:half], fail(x[:half], twin, other, kinds, rng), amount.to(device))
    said = styles[index]
    said[:failed] = NONE
    return disturb(x, rng), index, said


def share_of_none(judge, x):
    return (judge.domain_of(x) == NONE).float().mean().item()


@torch.no_grad()
def report(judge, seed=30_000, n=200, threads=0):
    """Held-out figures, {name: share}.

    Of n true pictures a domain: the domain and the attributes read rightly, and (false none) those
    taken for failures, as they are, as mixtures and disturbed; cues read rightly in mixtures;
    failed pictures taken for failures, by kind.
    """
    rng, judge = torch.Generator().manual_seed(seed), judge.eval()
    device, figures, right, pure = next(judge.parameters()).device, {}, [], []
    for k, domain in enumerate(faces.DOMAINS):
        persons = faces.sample_persons(n, rng)
        styles = faces.styles_of(domain, n)
        x = as_images(draw(persons, styles, seed + k, processes=threads or None)).to(device)
        out = judge(x)
        pure.append(x)
        right.append((out["domain"].argmax(1) == k).float().mean())
        read = [out[a].argmax(1).cpu() == persons.category(a) for a in faces.CATEGORIES]
        figures[f"attributes of {domain}"] = torch.stack(read).float().mean().item()
    figures["domain"] = torch.stack(right).mean().item()
    images, _, styles = labelled_pictures(600, seed, threads)
    images, mixed = as_images(images.to(device)), slice(300, None)
    out = judge(images[mixed])
    read = [out[f"cue {c}"].argmax(1).cpu() == styles[mixed, i] for i, c in enumerate(faces.CUES)]
    figures["cues"] = torch.stack(read).float().mean().item()
    pure = torch.cat(pure)
    figures["false none"] = share_of_none(judge, pure)
    figures["false none, mixtures"] = share_of_none(judge, images[mixed])
    figures["false none, disturbed"] = share_of_none(judge, disturb(pure, rng))
    for k, failure in enumerate(FAILURES):
        index = torch.randint(200 if k < PAIRED else 600, (96,), generator=rng)
        parts = (index, twins(index, 600), torch.randint(600, (96,), generator=rng))
        parts = zip(*(images[i].split(4) for i in parts), strict=True)
        kinds = torch.full((4,), k)
        failed = torch.cat([fail(*part, kinds, rng) for part in parts])
        figures[f"none, {failure.__name__}"] = share_of_none(judge, failed)
    return figures


def training_pictures(cfg):
    """`labelled_pictures` to train with, kept beside the state."""

    def make():
        images, persons, styles = labelled_pictures(cfg.pool, cfg.seed, cfg.threads)
        return images, persons.categories, persons.proportions, styles

    path = cfg.state.with_name("train_judge_pool.pt")
    images, *persons, styles = kept(path, make, n=cfg.pool, seed=cfg.seed)
    return images, faces.Persons(*persons), styles


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    for path in (cfg.out, cfg.state):
        path.parent.mkdir(parents=True, exist_ok=True)
    images, persons, styles = training_pictures(cfg)
    torch.manual_seed(cfg.seed)
    rng = torch.Generator().manual_seed(cfg.seed)
    judge = Judge().to(device, memory_format=torch.channels_last)
    adam = torch.optim.AdamW(judge.parameters(), lr=cfg.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, cfg.lr, cfg.steps, pct_start=0.05)
    parts, done = {"judge": judge, "adam": adam, "schedule": schedule}, 0
    if cfg.state.exists():
        saved = torch.load(cfg.state, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done = saved["done"]
        rng.set_state(saved["rng"])
    start = time.time()
    for step in trange(done, cfg.steps, desc="judge", disable=None):
        x, index, said = training_batch(images, styles, cfg.batch, rng, device)
        who = persons.categories[index].to(device), persons.proportions[index].to(device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=cfg.bfloat16):
            out = judge(x.contiguous(memory_format=torch.channels_last))
        out = {name: values.float() for name, values in out.items()}
        loss = judge_loss(out, faces.Persons(*who), said.to(device))
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if (step + 1) % 250 == 0 or step + 1 == cfg.steps:
            print(f"{step + 1}: loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"done": step + 1, "rng": rng.get_state()}
            write_atomically(cfg.state, functools.partial(torch.save, state))
    weights = {k: v.half().cpu().contiguous() for k, v in judge.state_dict().items()}
    write_atomically(cfg.out, functools.partial(torch.save, weights))
    for name, value in report(judge, threads=cfg.threads).items():
        print(f"{name:32} {value:.3f}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
