"""What can be wrong with the settings of a run. cfg is a Config of ipl.py."""

import math
import os
import typing
import warnings

from checkpoints.stylegan2 import WANTED


def check(cfg, **flags):
    """Every value in its range, or a ValueError of one line. flags: names of fields' own flags."""
    kinds = typing.get_type_hints(type(cfg))
    flags = {name: f"--{name.replace('_', '-')}" for name in kinds} | flags
    for name, kind in kinds.items():
        flag, value = flags[name], getattr(cfg, name)
        if typing.get_origin(kind) is typing.Literal:
            if value not in (options := typing.get_args(kind)):
                raise ValueError(f"{flag} must be one of {options}, not {value!r}")
        elif not _is_a(kind, value):  # in a config.json; tyro knows the types
            raise ValueError(f"{flag} must be {getattr(kind, '__name__', kind)}, not {value!r}")
    counts = "n_ctx steps_mapper batch steps num_layers layer_batch layer_every samples save_every"
    for names, holds, wanted in (
        (counts, lambda x: 1 <= x < 2**31, "at least 1, and below 2^31"),
        ("batch_mapper", lambda x: 2 <= x < 2**31, "at least 2 (to tell prompts apart)"),
        ("lr_mapper lr layer_lr", lambda x: 0 < x <= 1e30, "above 0, and at most 1e30"),
        ("lambda_domain lambda_source eps", lambda x: 0 <= x <= 1e30, "from 0 to 1e30"),
        ("class_index", lambda x: x >= 0, "0 or more"),
        ("seed", lambda x: 0 <= x < 2**63, "0 or more, and below 2^63"),
        ("ema crop", lambda x: 0 <= x < 1, "0 or more, and below 1"),
        ("truncation_psi", lambda x: abs(x) <= 1000, "between -1000 and 1000"),
        ("samples", lambda x: x <= 10_000, "at most 10000"),
    ):
        for name in names.split():
            value = getattr(cfg, name)
            if value is not None and not holds(value):
                raise ValueError(f"{flags[name]} must be {wanted}, not {value}")
    if len(set(cfg.clip)) < len(cfg.clip):
        raise ValueError("--clip names the same CLIP twice; wanted: --clip-weights")
    if weights := cfg.clip_weights:
        if len(weights) != max(1, len(cfg.clip)) or not all(0 < x < math.inf for x in weights):
            raise ValueError("--clip-weights must be a number above 0 for each CLIP of --clip")
    for flag, label in (("--source", cfg.source), ("--target", cfg.target)):
        if not label.strip():
            raise ValueError(f"{flag} is empty; wanted: a domain in words, such as anime")
    if cfg.source.lower().split() == cfg.target.lower().split():  # CLIP reads lower case
        raise ValueError(f"--source and --target are both {cfg.target!r}; wanted: two domains")
    if cfg.out is not None and not cfg.out.strip():
        raise ValueError("--out is empty; wanted: a folder, or no --out")
    if cfg.generator is not None and "://" not in cfg.generator:
        if not os.path.exists(cfg.generator):
            raise ValueError(f"--generator {cfg.generator!r}: no such file; wanted: {WANTED}")
    if cfg.resume and cfg.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite begins anew; wanted: one")
    if cfg.noise == "fixed" and cfg.eps == 0:
        raise ValueError("--eps 0 with --noise fixed divides 0 by 0 at the first step; wanted: 0.1")


def _is_a(kind, value):
    """Whether the value has the type of an annotation; a whole number passes for a float."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:  # tuple[X, ...], a list in a config.json
        return isinstance(value, tuple | list) and all(_is_a(args[0], x) for x in value)
    if args:  # X | None
        return any(_is_a(x, value) for x in args)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def check_shares(cfg, processes):
    """That the processes of a run can divide its batches among them, or a ValueError."""
    used = ["batch"] + ["batch_mapper"] * (cfg.method == "ipl")
    for name in used + ["layer_batch"] * (cfg.layers == "adaptive"):
        if getattr(cfg, name) % processes:
            wanted = f"a multiple of {processes}, the number of processes"
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}; wanted: {wanted}")


def check_layers(cfg, generator):
    """That --num-layers and --freeze fit the generator, or a ValueError."""
    names = sorted({name for layer in generator.layers() for name, _ in layer.named_parameters()})
    if cfg.num_layers and cfg.num_layers > generator.num_ws:
        raise ValueError(f"--num-layers {cfg.num_layers}; wanted: at most {generator.num_ws}")
    if cfg.freeze and not 0 < sum(cfg.freeze in name for name in names) < len(names):
        raise ValueError(f"--freeze {cfg.freeze} must fit some of {', '.join(names)}, not all")


def check_pair(source, adapted, path):
    """That the generator of the file `path` takes the source's latents, or a ValueError."""
    sizes = [(x.z_dim, x.w_dim, x.num_ws) for x in (source, adapted)]
    if sizes[0] != sizes[1]:
        found, wanted = (f"z_dim {z}, w_dim {w} and num_ws {n}" for z, w, n in reversed(sizes))
        raise ValueError(f"{path} has {found}; wanted, for the run's source generator: {wanted}")


def warn_of_chance(cfg, history):
    """Of a mapper that does not tell images apart."""
    last = history[-10:]
    accuracy = sum(row["accuracy"] for row in last) / len(last)
    if accuracy < 2 / cfg.batch_mapper:
        warnings.warn(
            f"stage 1 learned little: {accuracy:.0%} of {cfg.batch_mapper} images find their own "
            "prompt; wanted: more --steps-mapper, or another --lr-mapper",
            stacklevel=2,
        )
