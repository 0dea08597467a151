"""What can be wrong with the settings of a run. cfg is a Config of ipl.py."""

import math
import typing
import warnings


def check(cfg):
    """Every value in its range, or a ValueError of one line."""
    for name, kind in typing.get_type_hints(type(cfg)).items():
        options, value = typing.get_args(kind), getattr(cfg, name)
        if typing.get_origin(kind) is typing.Literal and value not in options:
            raise ValueError(f"--{name.replace('_', '-')} must be one of {options}, not {value!r}")
    counts = "n_ctx steps_mapper batch steps num_layers layer_batch layer_every samples save_every"
    for names, holds, wanted in (
        (counts, lambda x: x >= 1, "at least 1"),
        ("batch_mapper", lambda x: x >= 2, "at least 2: prompts are told apart within a batch"),
        ("lr_mapper lr layer_lr", lambda x: 0 < x <= 1e30, "above 0, and at most 1e30"),
        ("lambda_domain lambda_source eps", lambda x: 0 <= x < math.inf, "0 or more"),
        ("seed", lambda x: 0 <= x < 2**63, "0 or more, and below 2^63"),
        ("ema crop", lambda x: 0 <= x < 1, "0 or more, and below 1"),
        ("truncation_psi", math.isfinite, "finite"),
        ("samples", lambda x: x <= 10_000, "at most 10000"),
    ):
        for name in names.split():
            value = getattr(cfg, name)
            if value is not None and not holds(value):
                raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
    if len(set(cfg.clip)) < len(cfg.clip):
        raise ValueError("--clip names the same CLIP twice; wanted: --clip-weights")
    if weights := cfg.clip_weights:
        if len(weights) != max(1, len(cfg.clip)) or not all(0 < x < math.inf for x in weights):
            raise ValueError("--clip-weights must be a number above 0 for each CLIP of --clip")
    if not cfg.source.strip() or not cfg.target.strip():
        raise ValueError("--source or --target is empty; wanted: a domain in words, such as anime")
    if cfg.source.lower().split() == cfg.target.lower().split():  # CLIP reads lower case
        raise ValueError(f"--source and --target are both {cfg.target!r}; wanted: two domains")
    if cfg.resume and cfg.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite begins anew; wanted: one")
    if cfg.noise == "fixed" and cfg.eps == 0:
        raise ValueError("--eps 0 with --noise fixed divides 0 by 0 at the first step; wanted: 0.1")


def check_shares(cfg, processes):
    """That the processes of a run can divide its batches among them, or a ValueError."""
    for name in ("batch_mapper", "batch", "layer_batch"):
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
