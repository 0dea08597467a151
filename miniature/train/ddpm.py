"""Train the photo-domain DDPM of the miniature world: ``python -m miniature.train.ddpm``.

The network learns the noise in a photo of 64 x 64 pixels, mixed at a time t. The error at t counts
1/a_t times, but at most 5 times (a_t: the share of the photo's variance that is left; 1/a_t alone
makes it the error of v, arXiv 2202.00512, and lets the noisiest times rule). What is saved is a
running average, as float16, in diffusers' layout; beside it, a sheet of samples from pure noise.
"""

import copy
import functools
import io
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import trange

from checkpoints.diffusion import save_unet
from checkpoints.files import write_atomically
from diffusion import UNet, alphas_cumprod, generate, invert, timesteps
from diffusion.unet import config_of
from miniature import faces
from miniature.train import pick_device, pool, recorded
from miniature.train.generator import psnr

SIDE = 64
# A thin level at full size: a network of the half size leaves stripes 2 pixels wide.
NETWORK = config_of(
    SIDE, (16, 48, 64, 96), (False, False, True, True),
    layers_per_block=1, attention_head_dim=32, norm_num_groups=8,
)  # fmt: skip
T0 = 500  # where the report's inversions end


@dataclass(frozen=True)
class Config:
    pool: int = 6000  # Photos, each drawn once.
    steps: int = 4000  # Training steps.
    batch: int = 16  # Photos a step.
    lr: float = 1.2e-3  # Peak rate: after 100 steps, until half of them; then down to 2% of it.
    ema: float = 0.999  # Decay of the running average; in the first steps it is shorter.
    held_out: int = 64  # Persons of the report.
    seed: int = 0  # Of the weights, the batches and the pool (plus one).
    device: str = "auto"  # cpu, cuda ...; auto: the GPU if there is one.
    threads: int = 0  # CPU threads; 0 is torch's choice.
    tf32: bool = True  # On a GPU, TensorFloat-32.
    out: Path = Path("runs/ddpm")  # The model, a folder; miniature/weights/ddpm at a release.
    state: Path = Path("runs/train_ddpm.pt")  # Resumed from when it exists; beside the pool.


def draw_photos(n, seed):
    """Photos of n persons, uint8 [n, 3, SIDE, SIDE]: each drawn at twice the size."""
    persons = faces.sample_persons(n, torch.Generator().manual_seed(seed))
    drawn = pool.draw(persons, faces.styles_of("photo", n), seed, desc="photos")
    small = [F.avg_pool2d(x.float(), faces.SIZE // SIDE) for x in drawn.split(500)]
    return torch.cat([x.round().to(torch.uint8) for x in small])


def new_network():
    """A UNet whose blocks start as the identity, and whose output starts as 0."""
    unet = UNet(NETWORK)
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "to_out.0", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def training_step(cfg, unet, average, adam, photos, done):
    """-> a function without arguments: one step of training, which returns the mean error.

    done: how many steps there were, a tensor on the photos' device; the step adds one. All else
    that it changes is in the networks and in adam, whose rate is a tensor.
    """
    device = photos.device
    alphas = alphas_cumprod().to(device)
    weights = (1 / alphas).clamp(max=5)
    places = torch.arange(cfg.batch, device=device)
    parameters, averages = list(unet.parameters()), list(average.parameters())
    rate, shortest = adam.param_groups[0]["lr"], torch.tensor(1 - cfg.ema, device=device)

    def step():
        late = (2 * done / cfg.steps - 1).clamp(min=0)  # from 0 at half of the steps to 1
        rate.copy_(cfg.lr * torch.minimum((done + 1) / 100, 1 - 0.98 * late))
        x0 = pool.as_images(photos[torch.randint(len(photos), (cfg.batch,), device=device)])
        # as many times as photos, each from its own part of 0 to 999
        t = (places + torch.rand(cfg.batch, device=device)) / cfg.batch * len(alphas)
        t = t.long().clamp(max=len(alphas) - 1)
        a, noise = alphas[t][:, None, None, None], torch.randn_like(x0)
        found = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t)
        errors = (found - noise).square().mean((1, 2, 3))
        adam.zero_grad()
        (weights[t] * errors).mean().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        adam.step()
        with torch.no_grad():
            moves = torch._foreach_sub(parameters, averages)
            torch._foreach_mul_(moves, torch.maximum(9 / (done + 10), shortest))
            torch._foreach_add_(averages, moves)
            done.add_(1)
        return errors.mean().detach()

    return step


@torch.no_grad()
def report(unet, n, seed=10_000):
    """PSNR in dB of n held-out persons, medians: inverted in 39 steps to T0, and back in 40 and 6.

    And pictures [7 8, 3, SIDE, SIDE]: eight persons, their two reconstructions, samples from noise.
    """
    device, alphas = unet.conv_in.weight.device, alphas_cumprod().to(unet.conv_in.weight.device)
    photos = pool.as_images(draw_photos(n, seed)).to(device)
    x = invert(unet, photos, timesteps(40, T0), alphas)
    back = {k: generate(unet, x, timesteps(k, T0), alphas) for k in (40, 6)}
    noise = torch.randn(32, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    samples = generate(unet, noise.to(device), timesteps(100, 999), alphas, clamp=1)
    figures = {f"{k} steps": psnr(y, photos).median().item() for k, y in back.items()}
    return figures, torch.cat([photos[:8], back[40][:8], back[6][:8], samples])


def sheet(images, path, columns=8):
    """Images [n, 3, R, R] in [-1, 1], n a multiple of columns, as a PNG file."""
    pixels = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    rows = torch.cat([torch.cat([*row], dim=2) for row in pixels.split(columns)], dim=1)
    png = io.BytesIO()
    Image.fromarray(rows.permute(1, 2, 0).numpy()).save(png, "png")
    write_atomically(path, lambda aside: aside.write_bytes(png.getbuffer()))


def main(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    if cfg.tf32:
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = cfg.tf32
    torch.backends.cudnn.benchmark = True
    for path in (cfg.out, cfg.state):
        path.parent.mkdir(parents=True, exist_ok=True)
    make = functools.partial(draw_photos, cfg.pool, cfg.seed + 1)
    kept = cfg.state.with_name("train_ddpm_pool.pt")
    photos = pool.kept(kept, make, n=cfg.pool, seed=cfg.seed + 1, side=SIDE).to(device)

    torch.manual_seed(cfg.seed)
    unet = new_network().to(device)
    average = copy.deepcopy(unet).requires_grad_(False)  # what is saved
    rate, done = torch.tensor(cfg.lr, device=device), torch.zeros((), device=device)
    gpu = device.type == "cuda"
    adam = torch.optim.AdamW(
        unet.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True, capturable=gpu
    )
    parts, first = dict(unet=unet, average=average, adam=adam), 0
    if cfg.state.exists():
        saved = torch.load(cfg.state, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        adam.param_groups[0]["lr"] = rate
        first = saved["done"]
        done.fill_(first)
        torch.set_rng_state(saved["chance"])
        if gpu and saved["gpu_chance"] is not None:
            torch.cuda.set_rng_state(saved["gpu_chance"], device)

    start = written = time.time()

    def checkpoint(n):
        """After n steps."""
        nonlocal written
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"done": n, "chance": torch.get_rng_state(), "gpu_chance": None}
        if gpu:
            state["gpu_chance"] = torch.cuda.get_rng_state(device)
        write_atomically(cfg.state, lambda aside: torch.save(state, aside))
        halves = {name: x.half() for name, x in average.state_dict().items()}
        save_unet(NETWORK, halves, cfg.out)
        written = time.time()

    step = recorded(training_step(cfg, unet, average, adam, photos, done), device)
    for n in trange(first, cfg.steps, desc="training", disable=None):
        loss = step()
        if (n + 1) % 250 == 0:
            speed = (n + 1 - first) / (time.time() - start)
            print(f"{n + 1}: error {loss.item():.4f}, {speed:.1f} steps a second", flush=True)
        if time.time() - written >= 30:
            checkpoint(n + 1)
    checkpoint(cfg.steps)
    average.load_state_dict({name: x.half() for name, x in average.state_dict().items()})
    figures, images = report(average.eval(), cfg.held_out)
    sheet(images, cfg.out.with_name(f"{cfg.out.name}.png"))
    print(", ".join(f"{k} {v:.1f} dB" for k, v in figures.items()))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
