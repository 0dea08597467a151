"""Train the judge of the miniature world: ``python -m miniature.train.judge``.

Supervised by the renderer's own labels, on pure domains and mixtures, with blur, noise and
photometric changes so that none of these passes for a domain. Its data draw (seed) is not the
CLIP's.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import trange

from checkpoints.files import write_atomically
from miniature import faces
from miniature.judge import Judge


@dataclass(frozen=True)
class Config:
    pool: int = 24_000  # Pictures rendered once, half of them mixtures.
    steps: int = 3000  # Optimisation steps.
    batch: int = 64  # Pictures a step.
    lr: float = 1.5e-3  # Peak rate, cosine to 0.
    seed: int = 777  # Of the weights and the pictures; not the CLIP's.
    threads: int = 0  # CPU threads; 0 is torch's choice.
    out: Path = Path("runs/judge.pt")  # Float16; miniature/weights/judge.pt at a release.


def labelled_pictures(n, rng):
    """uint8 pictures [n, 3, 64, 64], their persons and their styles [n, 6].

    Half of them are pure; in the others, each cue is of one of two domains.
    """
    persons = faces.sample_persons(n, rng)
    k = len(faces.DOMAINS)
    pair = torch.randint(k, (n, 2), generator=rng)
    pair[:, 0] *= (torch.rand(n, generator=rng) < 0.6).long()  # photo is one of the two more often
    second = torch.rand(n, len(faces.CUES), generator=rng) < torch.rand(n, 1, generator=rng)
    mixed = torch.where(second, pair[:, 1:], pair[:, :1])
    pure = torch.randint(k, (n, 1), generator=rng).expand(n, len(faces.CUES))
    styles = torch.where(torch.rand(n, 1, generator=rng) < 0.5, pure, mixed)
    images = torch.empty(n, 3, 64, 64, dtype=torch.uint8)
    for i in trange(0, n, 250, desc="pictures", disable=None):
        part = faces.render(persons[i : i + 250], styles[i : i + 250], rng=rng)
        images[i : i + 250] = ((part + 1) * 127.5).round()
    return images, persons, styles


def disturb(x, rng):
    """Small shifts, blur and noise, and on half of the pictures brightness, contrast and tint.

    x [B, 3, 64, 64] in [-1, 1].
    """
    B = len(x)
    on = (torch.rand(B, 1, 1, 1, generator=rng) < 0.5).float()

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(B, *(shape or (1, 1, 1)), generator=rng)

    dx, dy = (int(v) for v in torch.randint(-3, 4, (2,), generator=rng))
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")[:, :, 3 + dy : 67 + dy, 3 + dx : 67 + dx]
    x = x * (1 + on * uniform(-0.2, 0.2)) + on * uniform(-0.15, 0.15)
    x = x + on * uniform(-0.08, 0.08, 3, 1, 1)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, uniform(-1.5, 1.0).clamp_min(0))
    x = x + uniform(-0.06, 0.08).clamp_min(0) * torch.randn(x.shape, generator=rng)
    return x.clamp(-1, 1)


def judge_loss(out, persons, styles):
    """Cross-entropy of every head of logits, squared error of the proportions.

    The domain's target is each domain's share of the cues.
    """
    share = F.one_hot(styles, len(faces.DOMAINS)).float().mean(1)
    loss = F.cross_entropy(out["domain"], share)
    cues = sum(F.cross_entropy(out[f"cue {c}"], styles[:, i]) for i, c in enumerate(faces.CUES))
    loss = loss + cues / 2
    loss = loss + sum(F.cross_entropy(out[k], persons.category(k)) for k in faces.CATEGORIES) / 2
    return loss + F.mse_loss(out["proportions"], persons.proportions)


@torch.no_grad()
def report(judge, seed=30_000, n=200):
    """Held-out accuracy on true pictures.

    Of the domain and of the attributes in pure ones, of the cues in a draw with mixtures.
    """
    rng, judge = torch.Generator().manual_seed(seed), judge.eval()
    figures, right = {}, []
    for k, domain in enumerate(faces.DOMAINS):
        persons = faces.sample_persons(n, rng)
        out = judge(faces.render(persons, faces.styles_of(domain, n), rng=rng))
        right.append((out["domain"].argmax(1) == k).float())
        read = [(out[a].argmax(1) == persons.category(a)).float() for a in faces.CATEGORIES]
        figures[f"attributes of {domain}"] = torch.stack(read).mean()
    images, _, styles = labelled_pictures(400, rng)
    out = judge(images.float() / 127.5 - 1)
    cues = [(out[f"cue {c}"].argmax(1) == styles[:, i]).float() for i, c in enumerate(faces.CUES)]
    return {"domain": torch.cat(right).mean(), "cues": torch.stack(cues).mean(), **figures}


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    rng = torch.Generator().manual_seed(cfg.seed)
    judge = Judge().to(memory_format=torch.channels_last)
    images, persons, styles = labelled_pictures(cfg.pool, rng)
    adam = torch.optim.AdamW(judge.parameters(), lr=cfg.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, cfg.lr, cfg.steps, pct_start=0.05)
    start = time.time()
    for step in trange(cfg.steps, desc="judge", disable=None):
        index = torch.randint(len(images), (cfg.batch,), generator=rng)
        x = disturb(images[index].float() / 127.5 - 1, rng)
        out = judge(x.contiguous(memory_format=torch.channels_last))
        loss = judge_loss(out, persons[index], styles[index])
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            print(f"{step + 1}: loss {loss.item():.3f}, {time.time() - start:.0f} s", flush=True)
    state = {k: v.half().contiguous() for k, v in judge.state_dict().items()}
    write_atomically(cfg.out, lambda aside: torch.save(state, aside))
    print(", ".join(f"{k} {v:.3f}" for k, v in report(judge).items()))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
