"""Train the photo-domain StyleGAN2 of the miniature world: ``python -m miniature.train.generator``.

Two regressions, no discriminator. *Mapping*: z ~ N(0, I) must give the code w of the person that
``faces.persons_from_z`` reads off z. *Synthesis*: the code of a random person, and the noise of
which the picture is made, must give that person's photo (L1 of pixels and of their differences).
An eighth of the photos mixes two codes, so that coarse layers carry the shape and fine layers the
colours; another eighth is truncated towards the mean code, so that truncation means milder
proportions.
"""

import copy
import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import trange

from checkpoints import load_generator, save_generator
from checkpoints.files import write_atomically
from miniature import faces
from miniature.train import pick_device, pool, recorded
from stylegan2_ops import Generator

CHANNELS = {4: 160, 8: 160, 16: 128, 32: 96, 64: 64, 128: 32}
# Style inputs below this one carry shape (4 to 16 pixels), the others colour (32 pixels and up).
CROSSOVER = 5


@dataclass(frozen=True)
class Config:
    pool: int = 24_000  # Photos, each drawn once.
    steps: int = 11_000  # Steps of the synthesis regression.
    mapping_steps: int = 12_000  # Steps of the mapping regression.
    batch: int = 48  # Photos a step.
    mapping_batch: int = 2048  # Latents a step.
    lr: float = 0.015  # Peak rate of the synthesis network, cosine to 0.
    mapping_lr: float = 8.0  # Peak rate of the mapping network (its layers run at 0.01 of it).
    seed: int = 0  # Of the weights, the batches and the pool (plus one).
    device: str = "auto"  # cpu, cuda ...; auto: the GPU if there is one.
    threads: int = 0  # CPU threads; 0 is torch's choice.
    out: Path = Path("runs/photo.pt")  # The generator; miniature/weights/photo.pt at a release.
    state: Path = Path("runs/train_generator.pt")  # Resumed from when it exists; beside the pool.


def assignments(n, w_avg, rng):
    """n codes ws [n, 12, W_DIM], and the n persons whose photos they must give."""
    persons, others = faces.sample_persons(n, rng), faces.sample_persons(n, rng)
    w, w_other = faces.persons_to_w(persons), faces.persons_to_w(others)
    part = n // 8

    categories = persons.categories.clone()
    colors = [list(faces.CATEGORIES).index(k) for k in faces.COLOR_FACTORS]
    categories[:part, colors] = others.categories[:part, colors]
    psi = torch.ones(n, 1)
    psi[part : 2 * part] = 0.5 + 0.5 * torch.rand(part, 1, generator=rng)

    ws = (w_avg + psi * (w - w_avg))[:, None].repeat(1, 12, 1)
    ws[:part, CROSSOVER:] = w_other[:part, None]
    return ws, faces.Persons(categories, persons.proportions * psi)


def load_pool(path, n, w_avg, seed):
    """The pool of n: codes [n, 12, W_DIM], photos (uint8) and their noise (float16).

    The photos are drawn, and kept in the file.
    """
    ws, persons = assignments(n, w_avg, torch.Generator().manual_seed(seed))
    make = functools.partial(pool.draw, persons, faces.styles_of("photo", n), seed)
    return ws, pool.kept(path, make, n=n, seed=seed), pool.chance(n, seed).half()


def set_noise(G, noise):
    """Let all layers of G carry the same noise [B or 1, 1, SIZE, SIZE], each at its own size."""
    for name, buffer in G.noises.named_buffers():
        k = faces.SIZE // buffer.shape[-1]
        setattr(G.noises, name, F.avg_pool2d(noise, k) * k)  # of variance 1 again


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
    parameters = list(parameters)
    cuda = parameters[0].is_cuda
    lr = torch.tensor(lr, device=parameters[0].device)
    adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), fused=True, capturable=cuda)
    return adam, torch.optim.lr_scheduler.OneCycleLR(
        adam, lr.item(), total_steps=steps, pct_start=max(0.05, 2 / steps), cycle_momentum=False
    )


@torch.no_grad()
def report(G, seed=10_000, n=256):
    """Held-out quality: PSNR of n persons for exact codes, and through the mapping network.

    The generator is given the noise of which the photos are made; it keeps the last of it.
    """
    device = G.w_avg.device
    z = torch.randn(n, G.z_dim, generator=torch.Generator().manual_seed(seed))
    persons = faces.persons_from_z(z)
    photos = pool.as_images(pool.draw(persons, faces.styles_of("photo", n), seed))
    exact, mapped = [], []
    parts = (
        x.to(device).split(32)
        for x in (z, faces.persons_to_w(persons), photos, pool.chance(n, seed))
    )
    for z, w, photo, noise in zip(*parts, strict=True):
        set_noise(G, noise)
        exact.append(psnr(G.synthesis(w), photo))
        mapped.append(psnr(G.synthesis(G.mapping(z)), photo))
    exact, mapped = torch.cat(exact), torch.cat(mapped)
    return {
        "exact mean": exact.mean(),
        "exact median": exact.median(),
        "mapped mean": mapped.mean(),
        "mapped median": mapped.median(),
    }


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    for path in (cfg.out, cfg.state):
        path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    rng = torch.Generator().manual_seed(cfg.seed)
    G = Generator(faces.SIZE, CHANNELS, faces.W_DIM, n_mlp=8)
    G.w_avg.copy_(faces.persons_to_w(faces.sample_persons(100_000, rng)).mean(0))
    pool_path = cfg.state.with_name("train_generator_pool.pt")
    tensors = load_pool(pool_path, cfg.pool, G.w_avg, cfg.seed + 1)
    all_ws, all_photos, all_noise = (x.to(device) for x in tensors)
    for name, p in G.named_parameters():  # at full size the skips drown what the layers learn
        if "rgb" in name and name.endswith("conv.weight"):
            p.data.mul_(0.03)
    G.to(device)
    fixed = pool.chance(1, cfg.seed).to(device)
    average = copy.deepcopy(G)  # a running average of the synthesis network: what is saved
    average.style = G.style
    synthesis, averages = (
        [p for name, p in model.named_parameters() if not name.startswith("style.")]
        for model in (G, average)
    )
    adam, schedule = optimiser(synthesis, cfg.lr, cfg.steps)
    adam_map, schedule_map = optimiser(G.style.parameters(), cfg.mapping_lr, cfg.mapping_steps)
    parts = dict(G=G, average=average, adam=adam, schedule=schedule)
    parts |= dict(adam_map=adam_map, schedule_map=schedule_map)
    done = {"synthesis": 0, "mapping": 0}
    if cfg.state.exists():
        saved = torch.load(cfg.state, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done = saved["done"]
        rng.set_state(saved["rng"].cpu())

    start = written = time.time()

    def checkpoint(age=30):
        """Unless the last one is younger, in seconds."""
        nonlocal written
        if time.time() - written < age:
            return
        for model in (G, average):
            set_noise(model, fixed)
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"done": done, "rng": rng.get_state()}
        write_atomically(cfg.state, lambda aside: torch.save(state, aside))
        save_generator(copy.deepcopy(average).half(), cfg.out)
        written = time.time()

    z = torch.empty(cfg.mapping_batch, G.z_dim, device=device)
    w = torch.empty_like(z)
    index = torch.empty(cfg.batch, dtype=torch.long, device=device)

    def learn_mapping():
        loss = F.mse_loss(G.mapping(z), w)
        adam_map.zero_grad()
        loss.backward()
        adam_map.step()
        return loss.detach()

    def learn_synthesis():
        set_noise(G, all_noise[index].float())
        loss = photo_loss(G.synthesis(all_ws[index]), pool.as_images(all_photos[index]))
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    run = recorded(learn_mapping, device)
    for step in trange(done["mapping"], cfg.mapping_steps, desc="mapping", disable=None):
        z.copy_(torch.randn(z.shape, generator=rng))
        w.copy_(faces.persons_to_w(faces.persons_from_z(z)))
        loss = run()
        schedule_map.step()
        done["mapping"] = step + 1
        checkpoint()
        if (step + 1) % 2500 == 0:
            error, seconds = loss.item() * G.w_dim, time.time() - start
            print(f"mapping {step + 1}: error {error:.3f}, {seconds:.0f} s", flush=True)
    run = recorded(learn_synthesis, device)
    for step in trange(done["synthesis"], cfg.steps, desc="synthesis", disable=None):
        index.copy_(torch.randint(cfg.pool, (cfg.batch,), generator=rng))
        loss = run()
        schedule.step()
        get_ema_multi_avg_fn(min(0.999, (step + 1) / (step + 10)))(averages, synthesis, None)
        done["synthesis"] = step + 1
        checkpoint()
        if (step + 1) % 500 == 0:
            seconds = time.time() - start
            print(f"synthesis {step + 1}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    checkpoint(0)
    figures = report(load_generator(cfg.out, device))
    print(", ".join(f"{k} {v:.1f} dB" for k, v in figures.items()))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
