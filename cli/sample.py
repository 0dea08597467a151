"""python ipl.py sample: new pictures of a finished run."""

from dataclasses import replace
from pathlib import Path

from checkpoints import load_generator
from checkpoints.files import write_atomically
from cli import diffusion, processes
from cli.adapt import label, load_source
from cli.adapt import sample as sample_grid
from cli.run_folder import find_generator, make_folder, read_config
from cli.settings import check, expand


def sample(
    run: Path, out: Path = Path("grid.png"), n: int = 16, seed: int = 1,
    truncation_psi: float | None = None, images: str | None = None, device: str = "auto",
):  # fmt: skip
    """Draw new samples from a finished run: source row over target row of the same latents.

    Args:
        run: Run folder.
        out: Picture to write, a .png file.
        n: Number of samples; sample i is the same for every n.
        seed: Seed of the latents.
        truncation_psi: Truncation. None: that of the run.
        images: Of a diffusion model, folder of pictures to adapt. None: that of the run.
        device: auto, cpu, cuda or cuda:<n>.
    """
    run, out = Path(expand(run)), Path(expand(out))
    path = find_generator(run)
    if path is None:
        raise ValueError(f"{run} is no finished run; wanted: a folder with a generator.pt")
    if out.suffix != ".png" or out.is_dir():
        raise ValueError(f"--out {out} is no name of a picture; wanted: a .png file")
    settings = read_config(run)
    psi = settings.truncation_psi if truncation_psi is None else truncation_psi
    settings = replace(settings, seed=seed, truncation_psi=psi, samples=n)
    check(settings, samples="--n")
    device = processes.pick_device(device)
    if diffusion.asked_for(settings):
        settings = replace(settings, bank=n, images=expand(images) or settings.images)
        source, adapted, pictures = diffusion.of_run(settings, path, device)
    else:
        source, adapted = generators(settings, path, device)
        pictures = diffusion.pictures_of(replace(settings, images=images), source)
    make_folder(out.parent)
    picture = label(settings, source, sample_grid(settings, source, adapted, pictures))
    write_atomically(out, lambda aside: aside.write_bytes(picture))
    print(f"{out}: {settings.source} above, {settings.target} below, of the same latents")


def generators(settings, path, device):
    """The source generator of a run and the adapted one, which have to fit."""
    source = load_source(settings, device)
    adapted = load_generator(path, device, settings.class_index)
    found, wanted = ((x.z_dim, x.w_dim, x.num_ws) for x in (adapted, source))
    if found != wanted:
        sizes = "z_dim, w_dim and num_ws"
        raise ValueError(f"{path} has {sizes} {found}; wanted, for the run's generator: {wanted}")
    return source, adapted
