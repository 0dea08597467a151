"""Train the photo-domain StyleGAN2 of the miniature world: ``python -m miniature.train_generator``.

Two regressions, no discriminator. *Synthesis*: the code w of a random person must give that person's photo (L1 of
pixels and of their differences); a quarter of each batch mixes two codes, so that coarse layers carry the shape and
fine layers the colours, and a quarter is truncated towards the mean code, so that truncation means milder proportions.
*Mapping*: z ~ N(0, I) must give the code of the person that ``faces.persons_from_z`` reads off z.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import trange

from miniature import faces
from stylegan2_ops import Generator, save_generator

CHANNELS = {4: 128, 8: 128, 16: 96, 32: 64, 64: 32}
CROSSOVER = (
    5  # style inputs below carry shape (4 to 16 pixels), the others colour (32 and 64 pixels)
)


@dataclass(frozen=True)
class Config:
    steps: int = 3500  # steps of the synthesis regression
    mapping_steps: int = 6000  # steps of the mapping regression
    batch: int = 16  # photos a step
    mapping_batch: int = 2048  # latents a step
    lr: float = 0.004  # peak rate of the synthesis network, cosine to 0
    mapping_lr: float = 12.0  # peak rate of the mapping network (its layers run at 0.01 of it)
    seed: int = 0
    threads: int = 0  # CPU threads, 0 = torch's choice
    out: Path = Path(__file__).parent / "weights" / "photo.pt"
    state: Path = Path("runs/train_generator.pt")  # resumed from when it exists


def training_batch(n, w_avg, rng):
    """n codes ws [n, 10, W_DIM] and the photos they must give [n, 3, 64, 64]."""
    persons, others = faces.sample_persons(n, rng), faces.sample_persons(n, rng)
    w, w_other = faces.persons_to_w(persons), faces.persons_to_w(others)
    quarter = n // 4

    categories, proportions = persons.categories.clone(), persons.proportions.clone()
    colors = [list(faces.CATEGORIES).index(k) for k in faces.COLOR_FACTORS]
    categories[:quarter, colors] = others.categories[:quarter, colors]
    psi = torch.ones(n, 1)
    psi[quarter : 2 * quarter] = 0.5 + 0.5 * torch.rand(quarter, 1, generator=rng)
    photos = faces.render(faces.Persons(categories, proportions * psi), faces.styles_of("photo", n))

    ws = (w_avg + psi * (w - w_avg))[:, None].repeat(1, 10, 1)
    ws[:quarter, CROSSOVER:] = w_other[:quarter, None]
    return ws, photos


def photo_loss(x, y):
    """L1 of pixels plus L1 of horizontal and vertical differences."""
    return (
        (x - y).abs().mean()
        + (x.diff(dim=2) - y.diff(dim=2)).abs().mean()
        + (x.diff(dim=3) - y.diff(dim=3)).abs().mean()
    )


def psnr(x, y):
    """Peak signal-to-noise ratio of each picture [B], in dB, for the range [-1, 1]."""
    return 10 * torch.log10(4 / (x.clamp(-1, 1) - y).square().mean((1, 2, 3)))


def optimiser(parameters, lr, steps):
    adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99))
    return adam, torch.optim.lr_scheduler.OneCycleLR(
        adam, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )


@torch.no_grad()
def report(G, seed=10_000):
    """Held-out quality: median PSNR for exact codes, and through the mapping network."""
    z = torch.randn(256, G.z_dim, generator=torch.Generator().manual_seed(seed))
    persons = faces.persons_from_z(z)
    photos = faces.render(persons, faces.styles_of("photo", len(z)))
    exact, mapped = (
        psnr(G.synthesis(faces.persons_to_w(persons)), photos),
        psnr(G.synthesis(G.mapping(z)), photos),
    )
    return {
        "exact mean": exact.mean(),
        "exact median": exact.median(),
        "mapped mean": mapped.mean(),
        "mapped median": mapped.median(),
    }


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    rng = torch.Generator().manual_seed(cfg.seed)
    G = Generator(64, CHANNELS, faces.W_DIM, n_mlp=4)
    G.w_avg.copy_(faces.persons_to_w(faces.sample_persons(100_000, rng)).mean(0))
    synthesis = [
        p
        for k, p in G.named_parameters()
        if not k.startswith("style.") and not k.endswith("noise.weight")
    ]
    adam, schedule = optimiser(synthesis, cfg.lr, cfg.steps)
    adam_map, schedule_map = optimiser(G.style.parameters(), cfg.mapping_lr, cfg.mapping_steps)
    parts = {
        "G": G,
        "adam": adam,
        "schedule": schedule,
        "adam_map": adam_map,
        "schedule_map": schedule_map,
    }
    done = {"synthesis": 0, "mapping": 0}
    if cfg.state.exists():
        saved = torch.load(cfg.state, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done = saved["done"]
        rng.set_state(saved["rng"])

    def checkpoint():
        cfg.state.parent.mkdir(parents=True, exist_ok=True)
        aside = cfg.state.with_suffix(".tmp")
        torch.save(
            {**{k: v.state_dict() for k, v in parts.items()}, "done": done, "rng": rng.get_state()},
            aside,
        )
        os.replace(aside, cfg.state)
        save_generator(G, cfg.out)

    start = time.time()
    bar = trange(done["mapping"], cfg.mapping_steps, desc="mapping", disable=None)
    for step in bar:
        z = torch.randn(cfg.mapping_batch, G.z_dim, generator=rng)
        w = faces.persons_to_w(faces.persons_from_z(z))
        loss = F.mse_loss(G.mapping(z), w)
        adam_map.zero_grad()
        loss.backward()
        adam_map.step()
        schedule_map.step()
        done["mapping"] = step + 1
        if (step + 1) % 500 == 0:
            checkpoint()
            print(
                f"mapping {step + 1}: error {loss.item() * G.w_dim:.3f} of {w.var(0).sum():.1f}, {time.time() - start:.0f} s",
                flush=True,
            )
    for step in trange(done["synthesis"], cfg.steps, desc="synthesis", disable=None):
        ws, photos = training_batch(cfg.batch, G.w_avg, rng)
        loss = photo_loss(G.synthesis(ws), photos)
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        done["synthesis"] = step + 1
        if (step + 1) % 250 == 0:
            checkpoint()
            print(
                f"synthesis {step + 1}: loss {loss.item():.4f}, {time.time() - start:.0f} s",
                flush=True,
            )
    checkpoint()
    print(", ".join(f"{k} {v:.1f} dB" for k, v in report(G).items()))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
