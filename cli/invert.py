"""python ipl.py invert: pictures of one's own -> the w from which the source generator draws them.

The pure part, `project`, knows no command line and imports nothing of ours.
"""

import hashlib
import io
import math
import shlex
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import trange

import miniature
from checkpoints import load_generator
from checkpoints.files import write_atomically
from cli import diffusion, pictures, processes, sample
from cli.adapt import load_source
from cli.align import Align, read_square
from cli.run_folder import make_folder, read_config
from cli.settings import expand

Pictures = Annotated[tuple[Path, ...], tyro.conf.arg(aliases=("--target",))]
Space = Literal["w+", "w"]


def invert(
    image: Pictures, run: Path | None = None, generator: str | None = None,
    class_index: int | None = None, outdir: Path = Path("out"), num_steps: int = 200,
    space: Space = "w+", lr: float = 0.05, align: Align = "none", seed: int = 303,
    device: str = "auto",
):  # fmt: skip
    """Find the w of pictures, such as photos of your own, for `python ipl.py edit`.

    Args:
        image: Pictures; several are one batch.
        run: Folder of a run, whose source generator it is.
        generator: A StyleGAN2, file or URL, instead. Neither: the embedded miniature's.
        class_index: The class that a conditional generator draws.
        outdir: Folder: proj00.png and projected_w.npz, or proj00_projected_w.npz if there are more.
        num_steps: Number of steps.
        space: w+, a w for each layer, nearer to the picture; or w, which keeps to what it draws.
        lr: Learning rate.
        align: none, a square as it is; crop, its middle; face, found and turned as in FFHQ.
        seed: Of the noise on w.
        device: auto, cpu, cuda or cuda:<n>.
    """
    check_projection(num_steps, lr, seed)
    if not image:
        raise ValueError("--image names no picture; wanted: one or more")
    device = processes.pick_device(device)
    source = of_run_or_file(run, generator, class_index, device)
    squares = torch.stack([read_square(expand(x), source.resolution, align) for x in image])
    outdir = Path(expand(outdir))
    make_folder(outdir)
    options = {"steps": num_steps, "lr": lr, "space": space, "seed": seed}
    (w, projections), files = projected(source, squares, **options), []
    for i, decibels in enumerate(psnr(projections, squares).tolist()):
        name = f"proj{i:02d}"
        files.append(outdir / ("projected_w.npz" if len(w) == 1 else f"{name}_projected_w.npz"))
        write(outdir / f"{name}.png", pictures.png(as_pixels(projections[i])))
        write(files[i], packed(w[i : i + 1], source, squares[i]))
        print(f"{outdir / name}.png, {files[i]}: {image[i]}, {decibels:.1f} dB")
    named = shlex.join(["--run", str(run or "RUN"), "--projected-w", *map(str, files)])
    print(f"next: python ipl.py edit {named}")


# ----------------------------------------------------------------------------------------------
# The projection


def distance(x, y):
    """Images [B, 3, H, W], twice -> [B]: mean squared difference of their pixels, and of those of
    their differences in x and in y, summed over the scales 1, 1/2, 1/4 and 1/8."""
    difference, total = x - y, 0
    for _ in range(4):
        for part in (difference, difference.diff(dim=2), difference.diff(dim=3)):
            total = total + part.square().mean((1, 2, 3))
        difference = F.avg_pool2d(difference, 2)
    return total


def project(generator, images, *, steps=200, lr=0.05, space="w+", seed=303, distance=distance):
    """Images [B, 3, R, R] in [-1, 1] -> w [B, num_ws, w_dim] that the generator draws them from.

    Adam under NVIDIA's schedule (projector.py of stylegan2-ada-pytorch): it starts from the mean of
    10000 w, with noise on w that ends after 3/4 of the steps; lr rises over the first 1/20 and
    falls over the last 1/4; the last step counts. Unlike there, the distance is of plain pixels and
    the generator keeps its noise, which an adapted one has too. Each image is on its own: the
    others of its batch do not matter. space: w, one for all layers; w+, after 2/5 of the steps with
    one a change of it for each layer, which from the start would lose the person.

    distance(x, y): [B] of two batches. Raises ValueError at the first that is not finite.
    """
    z = np.random.RandomState(123).randn(10_000, generator.z_dim)
    with torch.no_grad():
        w_all = generator.mapping(torch.from_numpy(z).to(generator.w_avg))
    w_avg = w_all.mean(0)
    w_std = (w_all - w_avg).square().sum(1).mean().sqrt()  # a norm, over all dimensions
    num_ws, rng = generator.num_ws, torch.Generator().manual_seed(seed)
    one = w_avg.repeat(len(images), 1, 1).requires_grad_()
    changes = torch.zeros_like(one).repeat(1, num_ws, 1).requires_grad_()
    adam = torch.optim.Adam([one, changes], betas=(0.9, 0.999))
    for step in trange(steps, desc=f"invert {len(images)}", disable=None):
        t = step / steps
        ramp = 0.5 - 0.5 * math.cos(math.pi * min(1, 4 * (1 - t)))
        adam.param_groups[0]["lr"] = lr * ramp * min(1, 20 * t)
        w = one + changes if space == "w+" and t >= 0.4 else one.expand(-1, num_ws, -1)
        noise = torch.randn(1, 1, w.shape[2], generator=rng).to(w)  # the same for each image
        noise = noise * w_std * 0.05 * max(0, 1 - t / 0.75) ** 2
        loss = distance(generator.synthesis(w + noise), images)
        if not loss.isfinite().all():
            raise ValueError(f"not finite at step {step} of the inversion; wanted: a smaller lr")
        adam.zero_grad()
        loss.sum().backward()
        adam.step()
    return (one + changes).detach()


def psnr(x, y):
    """Peak signal-to-noise ratio [B] in dB of images in [-1, 1]."""
    return -10 * ((x.clamp(-1, 1) - y.clamp(-1, 1)) / 2).square().mean((1, 2, 3)).log10()


def projected(generator, images, **options):
    """`project` of as many images at once as fit into memory -> w, and what is drawn from them."""
    at_once = max(1, 8 * 128**2 // generator.resolution**2)
    w, drawn = [], []
    for part in images.to(generator.w_avg.device).split(at_once):
        with processes.memory_advice(lambda: "; wanted: a GPU with more memory"):
            w.append(project(generator, part, **options))
        with torch.no_grad():
            drawn.append(generator.synthesis(w[-1]).clamp(-1, 1))
    return torch.cat(w).cpu(), torch.cat(drawn).cpu()


# ----------------------------------------------------------------------------------------------
# What the command is given, and its files


def check_projection(num_steps, lr=0.05, seed=0):
    for name, value, fits, wanted in (
        ("--num-steps", num_steps, 1 <= num_steps <= 100_000, "from 1 to 100000"),
        ("--lr", lr, 0 < lr <= 100, "above 0, and at most 100"),
        ("--seed", seed, 0 <= seed < 2**63, "0 or more, and below 2^63"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {wanted}, not {value}")


def of_run_or_file(run, generator, class_index, device):
    """The generator that pictures are inverted with: never an adapted one, which has other w."""
    if run and generator:
        raise ValueError("--run names a generator, and so does --generator; wanted: one of them")
    if run and class_index is not None:
        raise ValueError("--class-index is of --generator; a --run has its own")
    if not run:
        path = expand(generator) or miniature.GENERATOR
        if generator and diffusion.is_diffusion(path):
            raise ValueError(f"--generator {path} is a diffusion model; {WANTED}")
        return load_generator(path, device, class_index)
    settings = read_config(Path(expand(run)))
    refuse_diffusion(run, settings)
    return load_source(settings, device)


WANTED = "wanted: a StyleGAN2; of a diffusion model, training itself inverts the --images"


def refuse_diffusion(run, settings):
    if diffusion.asked_for(settings):
        raise ValueError(f"--run {run} is of a diffusion model; {WANTED}")


def digest(generator):
    """SHA-256 of what a generator draws by, in whatever file it was."""
    found = hashlib.sha256()
    for name, tensor in sorted(generator.state_dict().items()):
        found.update(name.encode() + tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def packed(w, generator, square):
    """w [1, num_ws, w_dim] as the bytes of a projected_w.npz, under NVIDIA's name; beside it, for
    `edit`, the generator's digest, and the square [3, R, R] as pixels [R, R, 3]."""
    file = io.BytesIO()
    np.savez(file, w=w.numpy(), generator=digest(generator), image=as_pixels(square).numpy())
    return file.getvalue()


def as_pixels(image):
    """[3, H, W] in [-1, 1] -> uint8 [H, W, 3], on the CPU. ValueError if not finite."""
    return sample.as_pixels(image[None])[0]


def write(path, data):
    write_atomically(path, lambda aside: aside.write_bytes(data))
