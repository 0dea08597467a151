"""python ipl.py few-shot: a generator learns a domain from k pictures of it (variants/fewshot.py).

The run folder is that of the main command, without a mapper; its config.json has the names of the
pictures as well, `chosen`.
"""

import hashlib
import json
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro

import ipl
import miniature
from checkpoints import load_discriminator, load_generator
from checkpoints.images import SUFFIXES, picture_paths
from cli import pictures, processes
from cli.diffusion import read_picture
from cli.invert import projected
from cli.resume import OF_A_CALL, Keeper, sha256, sha256_of_pictures
from cli.run_folder import FILES, save_run
from cli.settings import expand, flag
from miniature import faces
from stylegan2_ops import Discriminator
from variants import fewshot

COLUMNS = 10  # of samples.png
PATHS = ("images", "generator", "discriminator")
PERSONS = 80_000  # the seed of the world's shots is so much more: they are nobody else's


@dataclass(frozen=True)
class Settings(fewshot.Config):
    images: str | None = None  # Folder of pictures of the target ...
    target: str | None = None  # ... or a domain of the miniature, which draws its own.
    shots: int = 10  # How many of them; which, the seed says.
    generator: str | None = None  # A StyleGAN2, file or URL. None: the miniature.
    # The class that a conditional generator draws; its discriminator must have no classes.
    class_index: int | None = None
    # Its discriminator. None: that in the generator's file; none: a fresh one, which knows nothing.
    discriminator: str | None = None

    published: bool = False  # The papers' numbers, for 256 px, instead of those for the miniature.
    out: str | None = None  # Folder. None: runs/anime-few-shot-cdc.
    overwrite: bool = False  # Replace the run that is in the folder.
    resume: bool = False  # Go on with it where it was stopped, to the same result.
    save_every: int = 50  # Steps after which the unfinished run is saved; also if it is stopped.
    seed: int = 0  # Of everything random: shots, latents, training.
    samples: int = 10  # How many are drawn at the end.
    truncation_psi: float = 1.0  # Truncation of the samples.
    device: str = "auto"  # auto, cpu, cuda or cuda:<n>.


def command(argv):
    """The function few_shot, whose defaults are those that a command line asks for."""
    numbers = fewshot.PUBLISHED if "--published" in argv else fewshot.Config()
    flat = tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff
    default = Settings(**asdict(numbers))

    def few_shot(settings: Annotated[Settings, *flat] = default):
        """Adapt a generator to a few pictures of a domain, with its discriminator.

        python ipl.py few-shot --target anime --shots 10 --method cdc
        """
        run(settings)

    return few_shot


def check(settings):
    """Every value in its range, or a ValueError of one line."""
    for names, holds, wanted in (
        ("steps batch shots save_every r1_every path_every image_every cross_every ewc_draws",
         lambda x: 1 <= x < 2**31, "at least 1, and below 2^31"),
        ("lr", lambda x: 0 < x <= 1e30, "above 0, and at most 1e30"),
        ("ema", lambda x: 0 <= x < 1, "0 or more, and below 1"),
        ("seed", lambda x: 0 <= x < 2**62, "0 or more, and below 2^62"),
        ("samples", lambda x: 1 <= x <= 10_000, "from 1 to 10000"),
        ("mixing flip cr_flip cr_shift", lambda x: 0 <= x <= 1, "from 0 to 1"),
        ("r1 path cr cr_fake distance anchor_spread dag self_weight cross_weight ewc",
         lambda x: 0 <= x <= 1e30, "from 0 to 1e30"),
        ("freeze_until", lambda x: x in [2**i for i in range(2, 11)], "a power of 2 from 4 on"),
        ("compression", lambda x: all(0 <= s <= 1 for s in x), "numbers from 0 to 1"),
        ("dag_policies", lambda x: 0 < len(x) == len({*x}), "one or more, none of them twice"),
        ("truncation_psi", lambda x: abs(x) <= 1000, "between -1000 and 1000"),
    ):  # fmt: skip
        for name in names.split():
            if not holds(value := getattr(settings, name)):
                raise ValueError(f"{flag(name)} must be {wanted}, not {value}")
    if (settings.images is None) == (settings.target is None):
        found = "neither --images nor" if settings.images is None else "both --images and"
        raise ValueError(f"{found} --target; wanted: --images FOLDER, or --target anime")
    if settings.target is not None:
        if settings.generator is not None:
            raise ValueError("--target is for the miniature; wanted: --images FOLDER")
        if settings.target not in faces.DOMAINS[1:]:
            known = ", ".join(faces.DOMAINS[1:])
            raise ValueError(f"--target {settings.target!r} is none of {known}")
    if settings.resume and settings.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite begins anew; wanted: one")


# ----------------------------------------------------------------------------------------------
# Networks and shots


def discriminator_path(settings):
    if settings.discriminator or settings.generator:
        return settings.discriminator or settings.generator
    return miniature.DISCRIMINATOR


def load_networks(settings, device):
    """The source generator and its discriminator."""
    G = load_generator(settings.generator or miniature.GENERATOR, device, settings.class_index)
    if settings.discriminator == "none":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            return G, Discriminator(G.resolution, G.channels).to(device)
    try:
        return G, load_discriminator(discriminator_path(settings), device)
    except ValueError as error:
        ways = "or --discriminator FILE, or none for a fresh one"
        raise ValueError(f"{error}; {ways}") from error


def choose(settings):
    """The files of a folder that the seed chooses, by their names."""
    folder = Path(settings.images)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise ValueError(f"--images {folder}: {found}; wanted: a folder with pictures")
    there = picture_paths(folder)
    if len(there) < settings.shots:
        kinds, n = ", ".join(sorted(SUFFIXES)), len(there)
        wanted = f"--shots {n} or less" if n else f"a folder with some of {kinds}"
        raise ValueError(f"--images {folder}: {n} pictures, not {settings.shots}; wanted: {wanted}")
    rng = torch.Generator().manual_seed(settings.seed)
    return [there[i] for i in sorted(torch.randperm(len(there), generator=rng)[: settings.shots])]


def read_shots(settings, G):
    """Shots [k, 3, R, R], their names, and their codes [k, W, w_dim] or a function that finds them.

    What is not square is cropped to its middle, and all get the generator's size.
    """
    if settings.images is not None:
        paths = choose(settings)
        shots, names = torch.stack([read_picture(x, G.resolution)[0] for x in paths]), {}
        for path, shot in zip(paths, shots, strict=True):
            same = names.setdefault(hashlib.sha256(shot.numpy().tobytes()).digest(), path.name)
            if same != path.name:
                found = f"--images: {same} and {path.name} are the same picture"
                warnings.warn(f"{found}; wanted: {settings.shots} that differ", stacklevel=2)
        return shots, [x.name for x in paths], lambda: projected(G, shots)[0]
    rng = torch.Generator().manual_seed(settings.seed + PERSONS)
    z, k = torch.randn(settings.shots, faces.W_DIM, generator=rng), settings.shots
    styles = faces.styles_of(settings.target, k)
    shots = faces.render(faces.persons_from_z(z), styles, size=G.resolution, rng=rng)
    names = [f"{settings.target}, person {i} of seed {settings.seed + PERSONS}" for i in range(k)]
    with torch.no_grad():
        w = G.mapping(z.to(G.w_avg.device))
    return shots, names, lambda: w[:, None].repeat(1, G.num_ws, 1)


# ----------------------------------------------------------------------------------------------
# The run


def folder_of(settings):
    word = word_of(settings).replace(" ", "-")
    return Path(settings.out or Path("runs") / f"{word}-few-shot-{settings.method}")


def word_of(settings):
    """What the run calls its target."""
    return settings.target or Path(settings.images).resolve().name or "shots"


def full_paths(settings):
    """The settings with full paths of what is there."""
    paths = {name: getattr(settings, name) for name in PATHS}
    there = {name: str(Path(x).resolve()) for name, x in paths.items() if x and Path(x).exists()}
    return replace(settings, **there)


def of_the_result(settings):
    """What a run's result depends on: settings by their names, and its files' content."""
    settings = full_paths(settings)
    files = [settings.generator or miniature.GENERATOR, discriminator_path(settings)]
    found = {name: x for name, x in asdict(settings).items() if name not in OF_A_CALL}
    found |= {f"SHA-256 of {x}": sha256(x) for x in map(str, files) if Path(x).exists()}
    if settings.images is not None:
        try:
            with warnings.catch_warnings(action="ignore"):  # they are given where it is read
                digest = sha256_of_pictures(choose(settings))
        except ValueError:
            digest = "too few pictures"
        found[f"SHA-256 of {settings.images}"] = digest
    return found


def read_config(folder):
    """The Settings of a finished few-shot run. Raises ValueError if it is none."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
        found.pop("chosen")
        found = {"freeze": ""} | found  # there are runs older than this setting
        return Settings(**{k: tuple(x) if type(x) is list else x for k, x in found.items()})
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{folder} is no few-shot run; wanted: another --out") from error


def run(settings):
    """Results that are in the folder stay until the new ones are written."""
    paths = {name: expand(getattr(settings, name)) for name in (*PATHS, "out")}
    target = settings.target and miniature.plain_label(settings.target)
    settings = replace(settings, **paths, target=target)
    check(settings)
    processes.choose_kernels(deterministic=False, tf32=False)
    device = processes.pick_device(settings.device)
    keeper = Keeper(folder_of(settings), settings, device, of_the_result, read_config)
    if keeper.finished:
        print(f"{keeper.folder} is a finished run: nothing is left to do")
        return
    G, D = load_networks(settings, device)
    if settings.freeze_until > G.resolution:
        found = f"--freeze-until {settings.freeze_until}"
        raise ValueError(f"{found} freezes nothing; wanted: at most {G.resolution}")
    shots, names, find_codes = read_shots(settings, G)
    of_codes = torch.empty(len(shots), G.num_ws, G.w_dim)  # what rssa's are like; they take minutes
    with warnings.catch_warnings(action="ignore"):  # they are given below
        fewshot.check(settings, G, D, shots, of_codes)
    codes = find_codes() if settings.method == "rssa" else None
    with processes.memory_advice(keeper.where_memory_ends), keeper:
        rng = torch.Generator().manual_seed(settings.seed)
        adapted, history, _ = fewshot.adapt(
            settings, G, D, shots, rng=rng, codes=codes, steps=keeper
        )
        drawn = pictures.of_run({
            "curves.png": lambda: pictures.curves(history),
            "samples.png": lambda: samples(settings, G, adapted, shots, codes),
        })  # fmt: skip
        config = replace(full_paths(settings), resume=False, overwrite=False)
        config = asdict(config) | {"chosen": names}
        save_run(keeper.folder, config, [], adapted, history, drawn)
        keeper.finish()
    there = [name for name in FILES if (keeper.folder / name).exists()]
    seconds = f" ({sum(keeper.seconds.values()):.0f} s)" * bool(keeper.seconds)
    print(f"{keeper.folder}: {', '.join(there)}{seconds}")


@torch.no_grad()
def samples(settings, source, adapted, shots, codes=None):
    """The shots; source and adapted pictures of the same z; the shot that is nearest to each
    adapted one, by the pixels of 16 x 16: the bytes of a .png file."""
    n, k, rows = settings.samples, len(shots), []
    z = ipl.sample_latents(n, source.z_dim, settings.seed).to(source.w_avg.device)
    psi, R = settings.truncation_psi, source.resolution
    drawn = []
    for network in (source, adapted):
        w = ipl.truncate(network.mapping(z), network.w_avg, psi)[:, None]
        w = w.expand(-1, network.num_ws, -1)
        if codes is not None and network is adapted:
            w = fewshot.compressor(codes, R, settings.compression)(w)
        drawn.append(torch.cat([network.synthesis(x) for x in w.split(8)]).clamp(-1, 1).cpu())
    small = [F.adaptive_avg_pool2d(x, 16).flatten(1) for x in (drawn[1], shots)]
    nearest = shots[torch.cdist(*small).argmin(1)]
    columns = min(COLUMNS, max(n, k))
    for start in range(0, n, columns):
        for part in (shots, *drawn, nearest):
            part = part[start : start + columns]
            row = torch.cat([*part, torch.ones(3, R, 0)], dim=-1)
            rows.append(F.pad(row, (0, (columns - len(part)) * R), value=1))
    grid = ((torch.cat(rows, dim=1) + 1) * 127.5).round().clamp(0, 255)
    grid = grid.permute(1, 2, 0).to(torch.uint8)
    name = word_of(settings)
    note = f"{settings.method}, seed {settings.seed}, {settings.steps} steps"
    words = f"{k} shots", "nearest shot", note, ("source", name)
    return pictures.png(pictures.labelled(grid, R, *words))
