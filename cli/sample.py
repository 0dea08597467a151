"""python ipl.py sample: new pictures of a finished run."""

from dataclasses import replace
from pathlib import Path

import ipl
from cli import checks, processes, run_folder


def sample(
    run: Path, out: Path = Path("grid.png"), n: int = 16, seed: int = 1,
    truncation_psi: float | None = None, device: str = "auto",
):  # fmt: skip
    """Draw new samples from a finished run: source row over target row of the same latents.

    Args:
        run: Run folder.
        out: Picture to write, a .png file.
        n: Number of samples; sample i is the same for every n.
        seed: Seed of the latents.
        truncation_psi: Truncation. None: that of the run.
        device: auto, cpu, cuda or cuda:<n>.
    """
    adapted = run_folder.check_sample(run, out)
    cfg = run_folder.read_config(run, ipl.Config)
    psi = cfg.truncation_psi if truncation_psi is None else truncation_psi
    checks.check(replace(cfg, seed=seed, truncation_psi=psi, samples=n), samples="--n")
    device = processes.pick_device(device)
    source, target = ipl.load_frozen(cfg, device), ipl.load_frozen(cfg, device, adapted)
    checks.check_pair(source, target, adapted)
    run_folder.make_folder(out.parent)
    grid = ipl.sample_grid(source, target, n=n, seed=seed, truncation_psi=psi)
    run_folder.save_picture(grid, out)
    print(f"{out}: {cfg.source} above, {cfg.target} below, from the same latents")
