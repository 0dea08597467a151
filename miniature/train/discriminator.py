"""Train a discriminator for the miniature's photos: ``python -m miniature.train.discriminator``.

The generator was made by regression, so it has no discriminator, which few-shot adaptation starts
from. Here a copy of the generator plays StyleGAN2's game against a fresh discriminator: logistic
losses, R1 at every 16th step; the copy rests at first, and then learns ten times more slowly. The
discriminator is kept and the copy is not. Real pictures are rendered photos of new persons;
generated ones have fresh noise in every layer.

Differs from StyleGAN2's own training in: 1. no length of paths, for it shapes the generator alone;
2. no mixed codes, of which this world's regression knows two layers' worth; 3. no flips, for the
light has a side; 4. no running average of the copy; 5. real and generated pictures of a batch are
of the same persons, so that what differs between persons cancels in the gradient; 6. at first the
codes of generated pictures stray, less and less: the generator's photos are so close to rendered
ones that a fresh discriminator sees no difference, and R1 alone would flatten it; 7. for the same
reason gamma is by the rule of StyleGAN2-ADA, 0.0002 R^2 / batch, of the default batch, and not 10.
"""

import copy
import functools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import trange

import miniature
from checkpoints import load_discriminator, load_generator, save_discriminator
from checkpoints.files import write_atomically
from miniature import faces
from miniature.judge import load_judge
from miniature.train import pick_device, pool, recorded
from miniature.train.generator import psnr
from stylegan2_ops import Discriminator
from stylegan2_ops.losses import discriminator_loss, generator_loss, r1_penalty

CHANNELS = {4: 112, 8: 112, 16: 96, 32: 64, 64: 48, 128: 32}  # 0.92 M parameters


@dataclass(frozen=True)
class Config:
    pool: int = 16_000  # Photos, each drawn once.
    steps: int = 6000  # Steps of the discriminator.
    rest: int = 1500  # Steps before the copy of the generator starts to learn.
    stray: float = 1.0  # Of codes w, a standard deviation that falls to 0 in these steps.
    batch: int = 32  # Real pictures a step, and as many generated ones; a multiple of 4.
    lr: float = 0.002  # The discriminator's rate.
    slower: float = 10.0  # The copy's rate is so many times smaller.
    r1: float = 0.1  # Gamma of R1.
    r1_every: int = 16  # Steps from one R1 to the next.
    held_out: int = 256  # Pictures of each kind in the report; a multiple of 4.
    seed: int = 4000  # Of the weights, the batches and the pool.
    device: str = "auto"  # cpu, cuda ...; auto: the GPU if there is one.
    graphs: bool = True  # On a GPU, record each kind of step once and replay it.
    threads: int = 0  # CPU threads, and processes that draw; 0 is torch's choice, and all.
    out: Path = Path("runs/discriminator.pt")  # miniature/weights/discriminator.pt at a release.
    # Resumed from, if it is there, on the same kind of device; beside the pool.
    state: Path = Path("runs/train_discriminator.pt")


def photos_of(z, seed, threads=0):
    """uint8 photos [n, 3, SIZE, SIZE] of the persons of z [n, W_DIM]."""
    persons, styles = faces.persons_from_z(z), faces.styles_of("photo", len(z))
    return pool.draw(persons, styles, seed, processes=threads or None)


def chance_of(device):
    """torch's own generator of random numbers on a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def generate(G, z, stray=0.0):
    """Pictures [B, 3, R, R] of z [B, z_dim], each with its own noise; codes stray by so much."""
    w = G.mapping(z)
    return G.synthesis(w + stray * torch.randn_like(w), rng=chance_of(w.device))


def optimiser(parameters, lr, lazy, device):
    """Adam as StyleGAN2 has it; lazy: the share of steps that a regulariser of its own adds."""
    c = 1 / (1 + lazy)
    return torch.optim.Adam(
        parameters, lr=lr * c, betas=(0.0, 0.99**c), capturable=device.type == "cuda"
    )


def game(D, G, adam_d, adam_g, photos, z, stray, cfg):
    """The three steps, which take no arguments, wait for nothing and return figures of themselves.

    photos: uint8 [n, 3, R, R] and z [n, z_dim] of the same persons; stray: a number; all on the
    device of D and G. Of the discriminator: its loss and the mean logits of real and generated
    pictures [3]; R1: the mean square of the gradient; of the generator: its loss.
    """

    def some():
        return torch.randint(len(photos), (cfg.batch,), device=photos.device)

    def follow(adam, loss):
        adam.zero_grad()
        loss.backward()
        adam.step()

    def step_d():
        D.requires_grad_(True)
        who = some()
        with torch.no_grad():
            generated = generate(G, z[who], stray)
        real, fake = D(pool.as_images(photos[who])), D(generated)
        loss = discriminator_loss(real, fake)
        follow(adam_d, loss)
        return torch.stack([loss, real.mean(), fake.mean()]).detach()

    def step_r1():
        D.requires_grad_(True)
        penalty = r1_penalty(D, pool.as_images(photos[some()]))
        follow(adam_d, cfg.r1 / 2 * cfg.r1_every * penalty)
        return penalty.detach()

    def step_g():
        D.requires_grad_(False)
        loss = generator_loss(D(generate(G, z[some()])))
        follow(adam_g, loss)
        return loss.detach()

    return step_d, step_r1, step_g


def ordered(renders, source):
    """How often a render's logit is above that of the source's picture of the same person, and of
    anyone: logits [n] each, of the same persons."""
    above = (renders[:, None] > source).float()
    return {
        "render above its source": above.diagonal().mean().item(),
        "render above any (AUC)": above.mean().item(),
    }


@torch.no_grad()
def report(D, G, source, seed=50_000, n=512, threads=0):
    """Held-out figures, {name: number}: of n renders, the copy's pictures G and the source's.

    D's share of right answers and its median logit for each; how often a render's logit is above
    that of the source's picture of the same person, and of any; the judge's share of photos and of
    attributes read rightly; the PSNR of the copy's pictures to the source's, in dB, of the same z
    and the same noise.
    """
    device, judge = G.w_avg.device, load_judge(device=G.w_avg.device)
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(n, G.z_dim, generator=rng)
    persons, drawn = faces.persons_from_z(z), photos_of(z, seed, threads)
    pictures = {"renders": [], "copy": [], "source": []}
    figures, distance, of = {}, [], {}
    for part, codes in zip(drawn.split(16), z.to(device).split(16), strict=True):
        pictures["renders"].append(pool.as_images(part.to(device)))
        for name, network in {"copy": G, "source": source}.items():
            pictures[name].append(generate(network, codes))
        of_copy, of_source = (x.synthesis(x.mapping(codes)) for x in (G, source))
        distance.append(psnr(of_copy, of_source.clamp(-1, 1)))
    for name, parts in pictures.items():
        logits = of[name] = torch.cat([D(x) for x in parts])[:, 0]
        right = logits > 0 if name == "renders" else logits < 0
        figures[f"D right on {name}"] = right.float().mean().item()
        figures[f"median logit of {name}"] = logits.median().item()
        read = [judge(x.clamp(-1, 1)) for x in parts]
        domain = torch.cat([out["domain"].argmax(1) for out in read])
        figures[f"{name} judged photos"] = (domain == 0).float().mean().item()
        same = [
            torch.cat([out[a].argmax(1) for out in read]).cpu() == persons.category(a)
            for a in faces.CATEGORIES
        ]
        figures[f"attributes of {name}"] = torch.stack(same).float().mean().item()
    figures |= ordered(of["renders"], of["source"])
    figures["PSNR of copy to source"] = torch.cat(distance).median().item()
    return figures


def main(cfg):
    for flag, value in {"--batch": cfg.batch, "--held-out": cfg.held_out}.items():
        if value < 4 or value % 4:
            raise SystemExit(
                f"{flag} is {value}; wanted: a multiple of 4, the discriminator's groups"
            )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = pick_device(cfg.device)
    for path in (cfg.out, cfg.state):
        path.parent.mkdir(parents=True, exist_ok=True)
    z = torch.randn(cfg.pool, faces.W_DIM, generator=torch.Generator().manual_seed(cfg.seed))
    make = functools.partial(photos_of, z, cfg.seed, cfg.threads)
    pool_path = cfg.state.with_name("train_discriminator_pool.pt")
    photos = pool.kept(pool_path, make, n=cfg.pool, seed=cfg.seed).to(device)
    torch.manual_seed(cfg.seed)
    D = Discriminator(faces.SIZE, CHANNELS).to(device)
    G = load_generator(miniature.GENERATOR, device).requires_grad_(True)
    adam_d = optimiser(D.parameters(), cfg.lr, 1 / cfg.r1_every, device)
    adam_g = optimiser(G.parameters(), cfg.lr / cfg.slower, 0, device)
    parts, done = {"D": D, "G": G, "adam_d": adam_d, "adam_g": adam_g}, 0
    if cfg.state.exists():
        saved = torch.load(cfg.state, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done = saved["done"]
        chance_of(device).set_state(saved["rng"])
    start = written = time.time()

    def checkpoint(age=30):
        """Unless the last one is younger, in seconds."""
        nonlocal written
        if time.time() - written < age:
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"done": done, "rng": chance_of(device).get_state()}
        write_atomically(cfg.state, functools.partial(torch.save, state))
        save_discriminator(copy.deepcopy(D).half(), cfg.out)
        written = time.time()

    stray = torch.zeros((), device=device)
    steps = game(D, G, adam_d, adam_g, photos, z.to(device), stray, cfg)
    step_d, step_r1, step_g = (recorded(step, device) if cfg.graphs else step for step in steps)
    penalty = loss_g = torch.zeros(())
    for step in trange(done, cfg.steps, desc="discriminator", disable=None):
        stray.fill_(cfg.stray * max(0, 1 - step / max(1, cfg.rest)))
        figures = step_d()
        if step % cfg.r1_every == 0:
            penalty = step_r1()
        if step >= cfg.rest:
            loss_g = step_g()
        done = step + 1
        checkpoint()
        if done % 100 == 0 or done == cfg.steps:
            loss, of_real, of_fake = figures.tolist()
            print(
                f"{done}: loss {loss:.3f}, mean logits {of_real:.2f} and {of_fake:.2f}, "
                f"R1 {penalty.item():.4f}, generator {loss_g.item():.3f}, "
                f"{time.time() - start:.0f} s",
                flush=True,
            )
    checkpoint(0)
    source = load_generator(miniature.GENERATOR, device)
    kept = load_discriminator(cfg.out, device)
    figures = report(kept, G, source, n=cfg.held_out, threads=cfg.threads)
    for name, value in figures.items():
        print(f"{name:28} {value:.3f}")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
