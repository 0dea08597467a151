"""Train the photo-domain StyleGAN2 of the miniature world: ``python -m miniature.train.generator``.

Two regressions, no discriminator. *Synthesis*: the code w of a random person must give that
person's photo (L1 of pixels and of their differences). An eighth of each batch mixes two codes, so
that coarse layers carry the shape and fine layers the colours; another eighth is truncated towards
the mean code, so that truncation means milder proportions. *Mapping*: z ~ N(0, I) must give the
code of the person that ``faces.persons_from_z`` reads off z.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import trange

from checkpoints import save_generator
from checkpoints.files import write_atomically
from miniature import faces
from stylegan2_ops import Generator

CHANNELS = {4: 128, 8: 128, 16: 96, 32: 64, 64: 32}
# Style inputs below this one carry shape (4 to 16 pixels), the others colour (32 and 64 pixels).
CROSSOVER = 5


@dataclass(frozen=True)
class Config:
    steps: int = 12_000  # Steps of the synthesis regression.
    mapping_steps: int = 8000  # Steps of the mapping regression.
    batch: int = 12  # Photos a step.
    mapping_batch: int = 2048  # Latents a step.
    lr: float = 0.02  # Peak rate of the synthesis network, cosine to 0.
    mapping_lr: float = 8.0  # Peak rate of the mapping network (its layers run at 0.01 of it).
    seed: int = 0  # Of the weights and the batches.
    threads: int = 0  # CPU threads; 0 is torch's choice.
    out: Path = Path("runs/photo.pt")  # The generator; miniature/weights/photo.pt at a release.
    state: Path = Path("runs/train_generator.pt")  # Resumed from when it exists.


def training_batch(n, w_avg, rng):
    """n codes ws [n, 10, W_DIM] and the photos they must give [n, 3, 64, 64]."""
    persons, others = faces.sample_persons(n, rng), faces.sample_persons(n, rng)
    w, w_other = faces.persons_to_w(persons), faces.persons_to_w(others)
    part = n // 8

    categories, proportions = persons.categories.clone(), persons.proportions.clone()
    colors = [list(faces.CATEGORIES).index(k) for k in faces.COLOR_FACTORS]
    categories[:part, colors] = others.categories[:part, colors]
    psi = torch.ones(n, 1)
    psi[part : 2 * part] = 0.5 + 0.5 * torch.rand(part, 1, generator=rng)
    photos = faces.render(faces.Persons(categories, proportions * psi), faces.styles_of("photo", n))

    ws = (w_avg + psi * (w - w_avg))[:, None].repeat(1, 10, 1)
    ws[:part, CROSSOVER:] = w_other[:part, None]
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
    adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999))
    return adam, torch.optim.lr_scheduler.OneCycleLR(
        adam, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )


@torch.no_grad()
def report(G, seed=10_000):
    """Held-out quality: median PSNR for exact codes, and through the mapping network."""
    z = torch.randn(256, G.z_dim, generator=torch.Generator().manual_seed(seed))
    persons = faces.persons_from_z(z)
    photos = faces.render(persons, faces.styles_of("photo", len(z)))
    exact = psnr(G.synthesis(faces.persons_to_w(persons)), photos)
    mapped = psnr(G.synthesis(G.mapping(z)), photos)
    return {
        "exact mean": exact.mean(),
        "exact median": exact.median(),
        "mapped mean": mapped.mean(),
        "mapped median": mapped.median(),
    }


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    for path in (cfg.out, cfg.state):
        path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    rng = torch.Generator().manual_seed(cfg.seed)
    G = Generator(64, CHANNELS, faces.W_DIM, n_mlp=8)
    G.w_avg.copy_(faces.persons_to_w(faces.sample_persons(100_000, rng)).mean(0))
    synthesis = [
        p
        for k, p in G.named_parameters()
        if not k.startswith("style.") and not k.endswith("noise.weight")
    ]
    for name, p in G.named_parameters():  # at full size the skips drown what the layers learn
        if "rgb" in name and name.endswith("conv.weight"):
            p.data.mul_(0.03)
    adam, schedule = optimiser(synthesis, cfg.lr, cfg.steps)
    adam_map, schedule_map = optimiser(G.style.parameters(), cfg.mapping_lr, cfg.mapping_steps)
    parts = dict(G=G, adam=adam, schedule=schedule, adam_map=adam_map, schedule_map=schedule_map)
    done = {"synthesis": 0, "mapping": 0}
    if cfg.state.exists():
        saved = torch.load(cfg.state, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done = saved["done"]
        rng.set_state(saved["rng"])

    def checkpoint():
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"done": done, "rng": rng.get_state()}
        write_atomically(cfg.state, lambda aside: torch.save(state, aside))
        save_generator(G, cfg.out)

    start = time.time()
    for step in trange(done["mapping"], cfg.mapping_steps, desc="mapping", disable=None):
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
                f"mapping {step + 1}: error {loss.item() * G.w_dim:.3f} of {w.var(0).sum():.1f}, "
                f"{time.time() - start:.0f} s",
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
            seconds = time.time() - start
            print(f"synthesis {step + 1}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    checkpoint()
    print(", ".join(f"{k} {v:.1f} dB" for k, v in report(G).items()))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
