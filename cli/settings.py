"""The settings of a run: the method's, and what the command line adds. Comments are help texts."""

import inspect
import math
import os
import re
import shlex
import typing
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

import ipl
from checkpoints.diffusion import is_diffusion
from checkpoints.download import split_url
from checkpoints.stylegan2 import WANTED
from miniature import LABELS, plain_label

EMBEDDED = "miniature-ddpm"  # the --generator that is the embedded diffusion model


@dataclass(frozen=True)
class Settings(ipl.Config):
    # A StyleGAN2, file or URL; a diffusion model, folder or file; miniature-ddpm. None: miniature.
    generator: str | None = None
    class_index: int | None = None  # The class that a conditional generator draws.
    clip: tuple[str, ...] = ()  # CLIPs: OpenAI's names, or files; else the miniature's or ViT-B/32.

    out: str | None = None  # Folder; of several runs, that of theirs. None: runs/photo-to-anime.
    overwrite: bool = False  # Replace the run that is in the folder.
    resume: bool = False  # Go on with it where it was stopped, to the same result.
    save_every: int = 50  # Steps after which the unfinished run is saved; also if it is stopped.
    seed: int = 0  # Of everything random; latents, crops and samples are those of any device.
    samples: int = 8  # How many are drawn at the end.
    truncation_psi: float = 0.7  # Truncation of the samples.

    images: str | None = None  # Folder of pictures, of which `bank` are inverted.
    side: int | None = None  # Pixels of a side, where the checkpoint of a DDPM is for others.
    t0: int = 500  # How noisy the latents are, 1 to 999; more: severer change, less identity.
    inversion_steps: int = 40  # Times on the way from a picture to its latent.
    synthesis_steps: int = 6  # Times on the way back, in training.
    picture_steps: int = 40  # The same, in samples.png.
    source_images: Literal["photo", "own"] = "own"  # Pictures, or what the source makes of them.
    lambda_l1: float = 0.0  # Stage 2: weight of the mean distance to the source picture.

    # Folder of pictures of the target: NADA's direction between images, instead of the words'.
    target_images: str | None = None
    image_weight: float = 1.0  # Its part, 0 to 1, beside the words' or the prompts' direction.

    device: str = "auto"  # auto, cpu, cuda or cuda:<n>.
    deterministic: bool = False  # On a GPU, only kernels that repeat their bits, where there are.
    tf32: bool = False  # On a GPU, TensorFloat-32 for what is not in half precision.
    # On a CPU, keep freed memory: faster, in a process as large as at its peak. Runs of the
    # miniature do so anyway.
    keep_memory: bool = False


# The embedded world's networks are small and learn at other rates: its runs start from these.
MINIATURE = Settings(
    residual="none", lr_mapper=0.5, batch_mapper=32, steps_mapper=200, bank=768,
    lambda_domain=0.2, lambda_source=1.0, lambda_image=3.0, lr=0.004, batch=4, steps=120, ema=0.97,
    eps=0.1, noise="fixed", crop=0.4, layers="all", freeze="noise", truncation_psi=1.0,
)  # fmt: skip

# The embedded diffusion model, of 64 pixels; its bank is 64 rendered photos.
MINIATURE_DDPM = replace(
    MINIATURE, generator=EMBEDDED, bank=64, lr=1.5e-4, betas=(0.9, 0.99), plain_adam=True,
    steps=100, ema=0.95, crop=0.15, lambda_l1=0.3, freeze="",
)  # fmt: skip

# DiffusionCLIP's example of human faces, with --method nada: five passes over 50 pictures.
DIFFUSIONCLIP = Settings(
    clip=("ViT-B/16",), clip_weights=(3.0,), bank=50, batch=1, steps=250, lr=8e-6, plain_adam=True,
    betas=(0.9, 0.999), growth=(1.3, 50), log_loss=True, lambda_l1=1.0, source_images="photo",
    ema=0.0, layers="all", truncation_psi=1.0,
)  # fmt: skip

GROUPS = {  # of --help
    "what": "source target method generator class_index clip clip_weights",
    "where": "out overwrite resume save_every seed samples truncation_psi",
    "image_targets": "target_images image_weight",
    "stage_1": "n_ctx ctx_init residual lr_mapper batch_mapper steps_mapper bank lambda_domain "
    "lambda_source lambda_image",
    "stage_2": "lr batch steps ema eps noise crop freeze betas plain_adam growth log_loss",
    "layer_choice": "layers num_layers layer_batch layer_lr layer_every",
    "diffusion_models": "images side t0 inversion_steps synthesis_steps picture_steps "
    "source_images lambda_l1",
    "speed": "device autocast half compile tf32 deterministic keep_memory",
}

ABOUT = f"""Adapt a generator to a new domain, from words alone: image-specific prompt learning.

  python ipl.py --source photo --target anime
  python ipl.py --generator ffhq.pkl --clip ViT-B/32 --source photo --target Disney
  python ipl.py --generator ddpm-folder --images my-pictures --source photo --target anime

Other commands, each with --help:
  sample    new pictures of a run            video     a loop through persons, or to the target
  invert    the w of a picture of your own   report    runs side by side, one HTML file
  edit      that w, drawn by runs            metrics   Fréchet, KID, structure ... of runs
  few-shot  from pictures, without words     list      targets of the miniature, finished runs
  inspect   what a checkpoint is             convert   a checkpoint as another kind

Without --generator it is the embedded miniature world, which knows
{", ".join(LABELS)}."""


def flag(name):
    return f"--{name.replace('_', '-')}"


def expand(path):
    """A path with its `~`, which a shell leaves alone behind `=`."""
    return path and os.path.expanduser(path)


# ----------------------------------------------------------------------------------------------
# The command line


def preset_of(argv):
    """What a run with the --generator of a command line starts from."""
    name = None
    for word, after in zip(argv, [*argv[1:], ""], strict=False):
        if word.startswith("--generator"):
            name = word.partition("=")[2] or after
    if name in (None, EMBEDDED):
        return MINIATURE_DDPM if name else MINIATURE
    return DIFFUSIONCLIP if is_diffusion(expand(name)) else Settings()


def help_texts():
    """{name of a field: its comment, behind it or in the line above}."""
    source = inspect.getsource(ipl.Config) + inspect.getsource(Settings)
    fields = re.findall(r"^(?: +# (.*)\n)? +(\w+): [^#\n]*(?:# (.*))?$", source, re.MULTILINE)
    return {name: behind or above for above, name, behind in fields}


def parse(argv, describe=True):
    """A command line -> a Settings for each --target. tyro prints what is wrong with it, or the
    help, and exits; describe: whether it is this process that prints.

    What is not given is as in the preset of the generator.
    """
    default = preset_of(argv)
    kinds, texts = typing.get_type_hints(Settings), help_texts()
    kinds["target"], texts["target"] = (
        tyro.conf.UseAppendAction[tuple[str, ...]],
        f"What it shall draw, in words; several make several runs. (default: {default.target})",
    )
    values = asdict(default) | {"target": ()}
    groups = {}
    for group, names in GROUPS.items():
        members = [
            (name, Annotated[kinds[name], tyro.conf.arg(help=texts[name])], values[name])
            for name in names.split()
        ]
        kind = make_dataclass(group, members)
        groups[group] = kind, field(default_factory=kind)
    found = tyro.cli(
        make_dataclass("Groups", [(name, *of) for name, of in groups.items()]),
        prog="ipl.py", description=ABOUT, args=argv, console_outputs=describe,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )  # fmt: skip
    values = {name: x for group in vars(found).values() for name, x in vars(group).items()}
    paths = {
        name: expand(values[name]) for name in ("generator", "images", "target_images", "out")
    }
    named = default.target
    if (folder := paths["target_images"]) is not None and values["image_weight"] == 1:
        named = Path(folder).resolve().name or named  # no word is asked for: this is but a name
    targets = values.pop("target") or (named,)
    paths["clip"] = clips = tuple(map(expand, values["clip"]))
    if not any(word.startswith(("--clip-weights", "--clip_weights")) for word in argv):
        # the preset's weight is of each CLIP
        paths["clip_weights"] = default.clip_weights[:1] * max(1, len(clips))
    if paths["generator"] in (None, EMBEDDED):  # its domains are named so
        paths["source"], *targets = map(plain_label, (values["source"], *targets))
    return [Settings(**values | paths, target=target) for target in targets]


def command_line(command=None, /, **flags):
    """The command that repeats something, in words; the home folder is `~` there.

    flags: {name: value}; None and False: left out; a list: the flag once for each; a tuple: several
    words behind one flag.
    """
    words, home = [command] if command else [], os.path.expanduser("~")
    for name, value in flags.items():
        for x in value if isinstance(value, list) else [value]:
            if x is None or x is False:
                continue
            first, *rest = (flag(name), *(x if isinstance(x, tuple) else () if x is True else (x,)))
            if rest and str(rest[0]).startswith("-"):  # or it would be taken for a flag
                first, *rest = f"{first}={rest[0]}", *rest[1:]
            words += [first, *rest]
    words = [str(word) for word in words]
    words = [f"~{x[len(home) :]}" if x.startswith(f"{home}/") else x for x in words]
    return f"python ipl.py {shlex.join(words)}"


def command_of(settings):
    """The command that repeats a run: what its preset has otherwise. Not where it is written, how
    often it is saved and on what device, so that a run that was stopped has the same."""
    values = asdict(settings)
    preset = asdict(preset_of(["--generator", settings.generator] if settings.generator else []))
    preset["clip_weights"] = preset["clip_weights"][:1] * max(1, len(settings.clip))
    stays = {"source", "target", "generator"}
    skipped = set("out overwrite resume save_every device keep_memory".split())
    flags = {k: x for k, x in values.items() if k in stays or x != preset[k] and k not in skipped}
    for name in [name for name, x in flags.items() if x is False]:  # which the preset has
        flags[f"no_{name}"] = not flags.pop(name)
    return command_line(**flags)


# ----------------------------------------------------------------------------------------------
# What can be wrong


def check(settings, **names):
    """Every value in its range, or a ValueError of one line. names: fields under other names."""
    for name, kind in typing.get_type_hints(type(settings)).items():  # in a config.json
        if not _is_a(kind, value := getattr(settings, name)):
            wanted = getattr(kind, "__name__", str(kind).removeprefix("typing."))
            raise ValueError(f"{flag(name)} must be {wanted}, not {value!r}")
    counts = "n_ctx steps_mapper batch steps num_layers layer_batch layer_every samples save_every"
    for of, holds, wanted in (
        (counts, lambda x: 1 <= x < 2**31, "at least 1, and below 2^31"),
        ("batch_mapper", lambda x: 2 <= x < 2**31, "at least 2 (to tell prompts apart)"),
        ("lr_mapper lr layer_lr", lambda x: 0 < x <= 1e30, "above 0, and at most 1e30"),
        ("lambda_domain lambda_source lambda_image lambda_l1 eps", lambda x: 0 <= x <= 1e30,
         "from 0 to 1e30"),
        ("class_index", lambda x: x >= 0, "0 or more"),
        ("bank", lambda x: x == 0 or settings.batch_mapper <= x < 2**31,
         f"0, or at least {flag('batch_mapper')} {settings.batch_mapper}"),
        ("image_weight", lambda x: 0 <= x <= 1, "from 0 to 1"),
        ("seed", lambda x: 0 <= x < 2**63, "0 or more, and below 2^63"),
        ("ema crop", lambda x: 0 <= x < 1, "0 or more, and below 1"),
        ("truncation_psi", lambda x: abs(x) <= 1000, "between -1000 and 1000"),
        ("samples", lambda x: x <= 10_000, "at most 10000"),
        ("t0", lambda x: 1 <= x <= 999, "from 1 to 999"),
        ("inversion_steps synthesis_steps picture_steps",
         lambda x: 2 <= x <= settings.t0 + 1, "from 2 to t0 + 1"),
        ("side", lambda x: 8 <= x <= 1024, "from 8 to 1024"),
        ("betas", lambda x: len(x) == 2 and all(0 <= beta < 1 for beta in x),
         "two numbers, 0 or more, and below 1"),
        ("growth", lambda x: len(x) == 2 and 0 < x[0] <= 10 and type(x[1]) is int and x[1] > 0,
         "a factor above 0, at most 10, and a number of steps"),
    ):
        for name in of.split():
            value = getattr(settings, name)
            if value is not None and not holds(value):
                raise ValueError(f"{names.get(name, flag(name))} must be {wanted}, not {value}")
    generator, clips, weights = settings.generator, settings.clip, settings.clip_weights
    source, target = settings.source, settings.target
    for wrong, words in (
        (len(set(clips)) < len(clips), "--clip names the same CLIP twice; wanted: --clip-weights"),
        (weights and len(weights) != max(1, len(clips))
         or not all(0 < x < math.inf for x in weights),
         "--clip-weights must be a number above 0 for each CLIP of --clip"),
        (not source.strip(), "--source is empty; wanted: a domain in words, such as photo"),
        (not target.strip(), "--target is empty; wanted: a domain in words, such as anime"),
        (plain_label(source) == plain_label(target),
         f"--source and --target are both {target!r}; wanted: two domains"),
        (settings.out is not None and not settings.out.strip(),
         "--out is empty; wanted: a folder, or no --out"),
        (generator not in (None, EMBEDDED)
         and not split_url(generator) and not os.path.exists(generator),
         f"--generator {generator!r}: no such file; wanted: {WANTED}"),
        (settings.target_images is not None and settings.image_weight == 1
         and settings.method == "ipl",
         "--image-weight 1 leaves the prompts no part; wanted: --method nada, or less, as 0.5"),
        (settings.target_images is None and settings.image_weight != 1,
         "--image-weight is of target pictures; wanted: --target-images FOLDER"),
        (settings.resume and settings.overwrite,
         "--resume goes on with a run and --overwrite begins anew; wanted: one"),
        (settings.noise == "fixed" and settings.eps == 0,
         "--eps 0 with --noise fixed divides 0 by 0 at the first step; wanted: --eps 0.1"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(words)


def _is_a(kind, value):
    """Whether the value has the type of an annotation; a whole number passes for a float."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return value in args
    if typing.get_origin(kind) is tuple:  # tuple[X, ...], a list in a config.json
        return isinstance(value, tuple | list) and all(_is_a(args[0], x) for x in value)
    if args:  # X | None
        return any(_is_a(x, value) for x in args)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def check_shares(settings, processes):
    """That the processes of a run can divide its batches among them, or a ValueError."""
    used = ["batch"] + ["batch_mapper", "bank"] * (settings.method == "ipl")
    for name in used + ["layer_batch"] * (settings.layers == "adaptive"):
        if getattr(settings, name) % processes:
            wanted = f"a multiple of {processes}, the number of processes"
            raise ValueError(f"{flag(name)} {getattr(settings, name)}; wanted: {wanted}")


def check_layers(settings, generator):
    """That --num-layers and --freeze fit the generator, or a ValueError."""
    names = sorted({name for layer in generator.layers() for name, _ in layer.named_parameters()})
    if settings.num_layers and settings.num_layers > generator.num_ws:
        raise ValueError(f"--num-layers {settings.num_layers}; wanted: at most {generator.num_ws}")
    if settings.freeze and not 0 < sum(settings.freeze in name for name in names) < len(names):
        fit = f"must fit some of {', '.join(names)}, not all"
        raise ValueError(f"--freeze {settings.freeze} {fit}")
