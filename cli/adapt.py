"""The main job, python ipl.py --source photo --target anime: from two words to a run folder."""

import contextlib
import os
import shlex
import sys
from pathlib import Path

import torch

import ipl
import miniature
from checkpoints import load_generator
from checkpoints.clip import read_clip
from checkpoints.download import split_url
from cli import diffusion, image_targets, pictures, processes
from cli.resume import Keeper
from cli.run_folder import FILES, config_of, find_generator, folder_of, read_config, save_run
from cli.settings import EMBEDDED, check, check_layers, check_shares, command_of
from diffusion import DiffusionGenerator
from miniature.judge import load_judge
from miniature.truth import Truth, true_pairs
from miniature.truth_diffusion import InvertedTruth


def of_miniature(settings):
    """Whether the generator is one of the embedded world."""
    return settings.generator in (None, EMBEDDED)


def asks_for_words(settings):
    """Whether the target is given in words, and not in pictures alone."""
    return settings.target_images is None or settings.image_weight < 1


def load_source(settings, device):
    """The source generator of a run; a diffusion model has no pictures yet."""
    if diffusion.asked_for(settings):
        return diffusion.load(settings, device)
    return load_generator(settings.generator or miniature.GENERATOR, device, settings.class_index)


def load_clips(settings, device):
    """The CLIPs of a run and their transforms, if they can read its texts."""
    names, released = settings.clip, ipl.openai_clip().available_models()
    if not names:
        names = [str(miniature.CLIP) if of_miniature(settings) else "ViT-B/32"]
    clips = []
    for name in names:
        if name not in released and not split_url(name) and not os.path.exists(name):
            raise ValueError(f"--clip {name!r} is neither a file nor one of {', '.join(released)}")
        clips.append(ipl.load_clip(name if name in released else read_clip(name), device))
    for model, _ in clips:
        ctx = model.ln_final.weight.expand(1, settings.n_ctx, -1)  # any vectors of that width
        for label in (settings.source, settings.target):
            ipl.construct_prompts(model, ctx, label)
            texts = [template.format(label) for template in ipl.TEMPLATES]
            ipl.tokenize(model, [f"{settings.ctx_init} {label}.", *texts])  # with any braces in it
    return clips


def prepare(settings, read=read_config):
    """What can refuse a run, before it writes: -> its Keeper, its generator, its CLIPs, its
    pictures, if it is of a diffusion model, and its target pictures, else None. read: as Keeper's.
    Says how torch and malloc shall work, too.
    """
    check(settings)
    if of_miniature(settings) and not settings.clip:
        miniature.check_labels(settings.source, *[settings.target] * asks_for_words(settings))
    processes.choose_kernels(settings.deterministic, settings.tf32)
    if settings.keep_memory or of_miniature(settings):
        processes.keep_memory()
    device = processes.pick_device(settings.device)
    check_shares(settings, ipl.ranks()[1])
    keeper = Keeper(folder_of(settings), settings, device, read=read)
    if keeper.finished:
        return keeper, None, None, None, None
    with processes.one_at_a_time():
        generator, clips = load_source(settings, device), load_clips(settings, device)
    check_layers(settings, generator)
    processes.warn_of_emulation(settings, device)
    images = diffusion.pictures_of(settings, generator)
    return keeper, generator, clips, images, image_targets.read(settings, generator)


def adapt(settings):
    """Results that are in the folder stay until the new ones are written."""
    keeper, generator, clips, images, targets = prepare(settings)
    if keeper.finished:
        if ipl.ranks()[0] == 0:
            print(f"{keeper.folder} is a finished run: nothing is left to do")
        return
    with processes.memory_advice(keeper.where_memory_ends), keeper:
        if ipl.ranks()[0] == 0:
            print(f"{keeper.folder}: {of_stages(settings)}", file=sys.stderr, flush=True)
        rng, cfg, more = torch.Generator().manual_seed(settings.seed), settings, {}
        if images is not None:
            diffusion.fill(generator, images, settings, keeper)
            more = diffusion.arguments(settings, generator, images, rng)
            cfg = diffusion.fitted(settings, images)
        if targets is not None:
            more |= image_targets.arguments(settings, generator, clips, targets, images)
        shared = {"rng": rng, "steps": keeper}
        if asks_for_words(settings):
            adapted, mappers, history = ipl.adapt(cfg, generator, clips, **shared, **more)
        else:
            directions, mappers = more.pop("redirect")([None] * len(clips)), []
            adapted, history = ipl.adapt_generator(
                cfg, generator, clips, directions, **shared, **more
            )
        if ipl.ranks()[0] > 0:
            return
        floor = floor_of_truth(settings, generator, clips, mappers)
        grid = sample(settings, generator, adapted, images)
        drawn = pictures.of_run({
            "curves.png": lambda: pictures.curves(history, floor),
            "samples.png": lambda: label(settings, generator, grid),
        })  # fmt: skip
        save_run(keeper.folder, config_of(settings), mappers, adapted, history, drawn)
        keeper.finish()
    say_finished(keeper, settings, generator, adapted)


def of_stages(settings):
    """What a run does, in words."""
    second = f"{settings.steps} steps of {settings.batch} images"
    before = "stage 0, pictures inverted; " * diffusion.asked_for(settings)
    if settings.method == "nada":
        return f"{before}NADA, {second}"
    first = f"{settings.steps_mapper} steps of {settings.batch_mapper} images"
    each = " for each CLIP" if len(settings.clip) > 1 else ""
    return f"{before}stage 1, {first}{each}; stage 2, {second}"


def sample(settings, source, adapted, images=None):
    """Source over adapted, of the same latents: uint8 [H, W, 3]. images: of a diffusion model."""
    if images is not None:
        return diffusion.grid(settings, source, adapted, images)
    n, seed, psi = settings.samples, settings.seed, settings.truncation_psi
    return ipl.sample_grid(source, adapted, n=n, seed=seed, truncation_psi=psi)


def label(settings, source, grid, text=None, seeds=None):
    """What `sample` gives, with labels: the bytes of a .png file.

    text: {name: words} in the file, else the seed and the command of the run. seeds: in words, if
    not that of the settings.
    """
    seed, text = seeds or f"seed {settings.seed}", text or text_of(settings)
    steps = f"{settings.steps_mapper} + " * (settings.method == "ipl") + f"{settings.steps} steps"
    words = settings.source.strip(), settings.target.strip(), f"{seed}, {steps}"
    between = ("inverted and back",) * isinstance(source, DiffusionGenerator)
    return pictures.png(pictures.labelled(grid, source.resolution, *words, between), text)


def text_of(settings):
    """What a picture of a run says of itself in its file."""
    return {"seed": str(settings.seed), "command": command_of(settings)}


# ----------------------------------------------------------------------------------------------
# What only the miniature can tell


def has_truth(settings):
    labels = {miniature.plain_label(x) for x in (settings.source, settings.target)}
    return of_miniature(settings) and not settings.images and labels <= set(miniature.LABELS)


@torch.no_grad()
def floor_of_truth(settings, generator, clips, mappers):
    """Stage 2's loss of the true pairs, or None where there are none."""
    if not has_truth(settings) or settings.target_images is not None:
        return None
    pairs = (
        diffusion.true_pairs(settings, generator)
        if settings.generator
        else true_pairs(settings.source, settings.target, n=32)
    )
    z, *images = (x.to(generator.w_avg.device) for x in pairs)
    w, floor, weights = generator.mapping(z), 0, settings.clip_weights or [1.0] * len(clips)
    for i, (clip_model, transform) in enumerate(clips):
        source, target = (clip_model.encode_image(transform(x)) for x in images)
        if mappers:
            direction = ipl.prompt_directions(settings, clip_model, mappers[i])
        else:
            direction = ipl.label_direction(settings, clip_model)
        delta_image = ipl.feature_delta(source, target)
        floor += weights[i] * ipl.directional_loss(delta_image, direction(w), settings.eps)
    return float(floor)


def judged(settings, generator, adapted, n=64):
    """What the judge sees in n pictures of latents that no training uses, in words."""
    source, target = map(miniature.plain_label, (settings.source, settings.target))
    kind, n = (InvertedTruth, n // 2) if settings.generator else (Truth, n)
    truth = kind(n, 70_000, load_judge(), generator.cpu(), source)
    found = truth.figures(truth.pictures(adapted.cpu()), target)
    best = truth.figures(truth.draw(target), target)
    names = {"target": target, "attributes": "attributes kept", "identity": "same person"}
    shares = [f"{words} {found[x]:.0%} (truth {best[x]:.0%})" for x, words in names.items()]
    return f"the judge, of {n} other persons: {', '.join(shares)}"


def say_finished(keeper, settings, generator, adapted):
    """What there is now, how good it is where somebody knows, and what to do next: once."""
    folder, times = keeper.folder, [f"stage {s} {x:.0f} s" for s, x in keeper.seconds.items()]
    there = [name for name in FILES if (folder / name).exists()]
    lines = [f"{folder}: {', '.join(there)}" + f" ({', '.join(times)})" * bool(times)]
    if has_truth(settings):
        lines.append(judged(settings, generator, adapted))
    runs = []
    with contextlib.suppress(OSError):  # of a folder beside it that is closed to us
        runs = [path for path in Path(folder).absolute().parent.iterdir() if find_generator(path)]
    if len(runs) == 1:  # the first one here
        run = shlex.quote(str(folder))
        lines.append(f"new samples: python ipl.py sample --run {run} --n 16 --out grid.png")
    print("\n".join(lines))
