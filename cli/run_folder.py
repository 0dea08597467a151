"""The folder of a run: its files, each of which appears whole or not at all.

checkpoint.pt        while the run is unfinished: what it needs to go on, of both stages
config.json          the Config of ipl.py, with absolute paths
mapper.safetensors   the mapper; with several CLIPs all of them, under 0., 1., ...
generator.pt         the adapted generator, in rosinality's layout; generator.safetensors if it
                     does not fit (classes, another architecture)
history.jsonl        a line for each step
curves.png           the numbers of the history
samples.png          source above, target below, from the same latents
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shlex
import signal
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import nn

import miniature
from checkpoints.files import write_atomically
from checkpoints.stylegan2 import misfit_of, save_generator
from cli.checks import check
from cli.processes import any_rank, deferred_signals, in_words, rank

CHECKPOINT = "checkpoint.pt"
GENERATORS = ("generator.pt", "generator.safetensors")
NETWORKS = (*GENERATORS, "mapper.safetensors")
FILES = (CHECKPOINT, *NETWORKS, "config.json", "history.jsonl", "curves.png", "samples.png")
OF_A_CALL = ("out", "device", "overwrite", "resume", "save_every")  # not of the result


def name_of(cfg):
    """The name of a run's folder, where the user gives none."""
    words = f"{cfg.source.strip()}-to-{cfg.target.strip()}".lower()
    # a file system takes 255 bytes, and a letter has up to 4
    return re.sub(r"\W+", "-", words)[:60] + "-nada" * (cfg.method == "nada")


def folder_of(cfg):
    return Path(cfg.out or Path("runs") / name_of(cfg))


def spread(runs):
    """Several Configs with a folder for each, in their --out; one stays as it is.

    Raises ValueError if two have the same folder.
    """
    if len(runs) == 1:
        return runs
    folders = [str(Path(cfg.out or "runs") / name_of(cfg)) for cfg in runs]
    for cfg, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            wanted = "other words, or a command and an --out for each"
            raise ValueError(f"two --target, one {cfg.target!r}, go to {folder}; wanted: {wanted}")
    return [replace(cfg, out=folder) for cfg, folder in zip(runs, folders, strict=True)]


# ----------------------------------------------------------------------------------------------
# An unfinished run


class Keeper:
    """Keeps a run on the disk while it is trained, so that it can be stopped at any moment.

        keep = Keeper(folder, config, device)                      nothing is written yet
        with keep:                                                 makes the folder, and holds it
            for step in keep(stage, bar, history, rng, *modules): ...     in each training loop
            keep.finish(...)                                   writes the results, as save_run

    A checkpoint holds for each loop, in the order of their calls, the steps done, the history, the
    state of the rng and those of the modules (networks, optimizers). With it a run goes on to the
    same bits on the same machine. It does not with another device or number of processes.
    config: dict of the fields of Config. `finished` says that nothing is left to do.

    Raises ValueError, of one line: for files in the folder that would be lost, for a checkpoint
    that is damaged, for a run of other settings, and names those that differ.
    """

    def __init__(self, folder, config, device):
        self.folder, self.path, self.every = folder, folder / CHECKPOINT, config["save_every"]
        self.found, self.loops, self.finished, self.stage = [], [], False, None
        self.seconds = {}  # that this process has spent in each stage
        self.settings = _settings(config) | {"device": device.type}
        refusal = None
        if rank() == 0:
            self.stamp = self._stamp()
            try:
                self._look(config["resume"], config["overwrite"])
            except ValueError as error:
                refusal = error
        if dist.is_initialized():  # all processes go the same way
            sent = [refusal, self.found, self.finished]
            dist.broadcast_object_list(sent)
            refusal, self.found, self.finished = sent
        if refusal:
            raise refusal

    def _stamp(self):
        """What is there: it changes when another process saves a state, or results."""
        paths = [self.folder / name for name in FILES if (self.folder / name).exists()]
        return [(path, path.stat().st_mtime_ns) for path in paths]

    def _look(self, resume, overwrite):
        there = [name for name in FILES if (self.folder / name).exists()]
        if folders := [name for name in there if (self.folder / name).is_dir()]:
            raise ValueError(f"{self.folder / folders[0]} is a folder; wanted: another --out")
        if not there or overwrite:
            return
        unfinished = CHECKPOINT in there
        if not resume or not (unfinished or find_generator(self.folder)):
            kind = "is a finished run" if find_generator(self.folder) else f"has a {there[0]}"
            kind = "is an unfinished run" if unfinished else kind
            wanted = "--resume, " * unfinished + "another --out, or --overwrite"
            raise ValueError(f"{self.folder} {kind}; wanted: {wanted}")
        if unfinished:
            settings, self.found = _read_checkpoint(self.path)
        else:
            self.finished, settings = True, _settings(read_config(self.folder))
        if different := [
            f"{name} {settings[name]}, not {value}"
            for name, value in self.settings.items()
            if settings.get(name, value) != value
        ]:
            raise ValueError(
                f"{self.folder} was begun with {'; '.join(different)}; wanted: the same settings "
                "and files, another --out, or --overwrite"
            )

    def __enter__(self):
        if rank() == 0:
            self._hold()
        self.waiting = deferred_signals()
        self.received = self.waiting.__enter__()

    def _hold(self):
        """Make the folder, keep other processes out of it, and clear it of half written files."""
        make_folder(self.folder)
        self.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = self.stamp == self._stamp()
        except OSError as error:  # held by another, or a file system that has no locks
            free = not isinstance(error, BlockingIOError)
        if not free:
            os.close(self.lock)
            wanted = "one command at a time, with --resume"
            raise ValueError(f"{self.folder}: another process works there; wanted: {wanted}")
        for name in FILES:
            aside = re.compile(rf"\.{Path(name).stem}\.\d+{Path(name).suffix}")
            for path in self.folder.iterdir():
                if aside.fullmatch(path.name):
                    path.unlink()
        if not self.found:
            self.path.unlink(missing_ok=True)

    def _leave(self):
        self.waiting.__exit__(None, None, None)
        if rank() == 0:
            os.close(self.lock)

    def __exit__(self, kind, error, _):
        """Errors say how to go on. A run that diverges is kept as it was before the step that did,
        if that is finite."""
        try:
            if kind is FloatingPointError:
                with contextlib.suppress(FloatingPointError, OSError):
                    self.save()
        finally:
            self._leave()
        if kind is FloatingPointError:
            raise FloatingPointError(f"{error}, with --overwrite, or another --out") from error
        if kind is KeyboardInterrupt:
            where, number = error.args or ("the run is unfinished", signal.SIGINT)
            words = f"stopped, {where}; the same command with --resume goes on"
            raise KeyboardInterrupt(words, number) from None
        if kind and issubclass(kind, OSError) and error.filename:
            wanted = "a folder to write in, with room, and the same command with --resume"
            raise ValueError(f"{in_words(error)}; wanted: {wanted}") from error

    def __call__(self, stage, bar, history, rng, *modules):
        """The steps of a stage's loop that are left; its bar of all steps shows those done.

        The state is saved every `save_every` steps, after the last one, and when SIGINT or SIGTERM
        ends the run: KeyboardInterrupt(where, signal) is raised between two steps. A signal during
        the last step of all, or while results are written, finds nothing left to stop.
        """
        loop = {"stage": stage, "step": 0, "history": history, "rng": rng.get_state()}
        self.loops.append(loop | {"modules": modules})
        loop, self.stage = self.loops[-1], stage
        if len(self.found) >= len(self.loops):
            self._restore(loop, rng)
        bar.initial = bar.n = loop["step"]
        start = time.perf_counter()
        while loop["step"] < bar.total:
            yield loop["step"]
            loop |= {"step": loop["step"] + 1, "rng": rng.get_state()}
            bar.update()
            last = loop["step"] == bar.total
            if due := last or loop["step"] % self.every == 0:
                self.save()
            if not last and any_rank(bool(self.received)):
                if not due:
                    self.save()
                where = f"stage {stage}, {loop['step']} of {bar.total} steps are saved"
                raise KeyboardInterrupt(where, (self.received or [signal.SIGTERM])[0])
        bar.close()
        self.stage = None
        self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start

    def _restore(self, loop, rng):
        i = len(self.loops) - 1
        kept, self.found[i] = self.found[i], None  # which takes memory
        try:
            for module, state in zip(loop["modules"], kept["states"], strict=True):
                module.load_state_dict(state)
            loop["history"][:] = kept["history"]
            rng.set_state(kept["rng"])
            loop |= {"step": kept["step"], "rng": kept["rng"]}
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} does not fit this run's networks ({type(error).__name__}: {error}); "
                "wanted: --overwrite, to begin anew"
            ) from error

    def save(self):
        """Write the state as it was before the step that is under way.

        Raises FloatingPointError if there is a number in it that is not finite, and writes nothing.
        """
        if rank():
            return
        loops = [
            {
                **{name: loop[name] for name in ("stage", "step", "history", "rng")},
                "states": [module.state_dict() for module in loop["modules"]],
            }
            for loop in self.loops
        ]
        for loop in loops:
            if not all(x.isfinite().all() for x in _tensors(loop["states"])):
                where = f"stage {loop['stage']}, after {loop['step']} steps"
                raise FloatingPointError(f"{where}: weights are not finite; wanted: a smaller rate")
        buffer = io.BytesIO()
        torch.save({"settings": self.settings, "loops": loops}, buffer)
        write_atomically(self.path, lambda aside: aside.write_bytes(buffer.getbuffer()))

    def sizes(self, resolution):
        """What takes memory in the stage that is under way, in words."""
        of_stages = {1: ["--batch-mapper"], 2: ["--batch"]}
        names = of_stages.get(self.stage, ["--samples"])
        sizes = ", ".join(f"{name} {self.settings[name]}" for name in names)
        where = f"in stage {self.stage}" if self.stage else "outside the stages"
        return f"{where}, at {resolution} x {resolution} pixels; wanted: less than {sizes}"

    def say_finished(self):
        if rank() == 0:
            print(f"{self.folder} is a finished run: nothing is left to do")

    def finish(self, *results):
        """Write the results, as `save_run`: then nothing is left to go on with."""
        save_run(self.folder, *results)
        self.path.unlink()
        source, target, method = (self.settings[f"--{x}"] for x in ("source", "target", "method"))
        times = ", ".join(f"stage {stage} {x:.0f} s" for stage, x in self.seconds.items())
        picture = self.folder / "samples.png"
        print(
            f"{picture}: {source} above, {target} below, from the same latents\n"
            f"{times}; next:\n"
            f"  python ipl.py sample --run {shlex.quote(str(self.folder))} --n 16 --out grid.png\n"
            f"  the same command with --method {'ipl' if method == 'nada' else 'nada'}\n"
            "  python ipl.py --generator FILE --clip ViT-B/32 --target 'any words'"
        )


def _tensors(state):
    """The floating point tensors of a nested state dict."""
    if isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)
    elif torch.is_tensor(state) and state.is_floating_point():
        yield state


def _read_checkpoint(path):
    """-> settings, a dict for each training loop. Raises ValueError if it is damaged."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of strange files
            kept = torch.load(path, map_location="cpu", weights_only=True)
        return dict(kept["settings"]), [dict(loop) for loop in kept["loops"]]
    except Exception as error:  # whatever a foreign file can raise
        raise ValueError(
            f"{path}: damaged, or no checkpoint of a run ({type(error).__name__}); wanted: "
            "--overwrite, to begin anew"
        ) from error


def _settings(config):
    """What a run's result depends on: fields of Config by their flags, and its files' content."""
    config = json.loads(json.dumps(config | _full_paths(config)))  # with lists for tuples
    files = [x for x in (config["generator"], *config["clip"]) if x and Path(x).is_file()]
    if config["generator"] is None:
        files += [miniature.GENERATOR, miniature.CLIP]
    return {
        **{f"--{name.replace('_', '-')}": x for name, x in config.items() if name not in OF_A_CALL},
        **{f"SHA-256 of {name}": _sha256(name) for name in files},
    }


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# ----------------------------------------------------------------------------------------------
# A finished run


def make_folder(folder):
    """Raises ValueError, of one line, if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}") from error


def find_generator(folder):
    """The file of the adapted generator, or None if the run is not finished."""
    return next((folder / name for name in GENERATORS if (folder / name).is_file()), None)


def check_sample(folder, picture):
    """The file of the run's generator. Raises ValueError, of one line, if there is none or the
    picture cannot be one."""
    path = find_generator(folder)
    if path is None:
        raise ValueError(f"{folder} is no finished run; wanted: a folder with a generator.pt")
    if picture.suffix != ".png" or picture.is_dir():
        raise ValueError(f"--out {picture} is no name of a picture; wanted: a .png file")
    return path


def read_config(folder, kind=dict):
    """As a dict, or the Config of ipl.py if that is `kind`. Raises ValueError, of one line, if
    there is none, or a value out of its range."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        found = kind(**config | _full_paths(config))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        wanted = "the config.json of a finished run"
        why = type(error).__name__
        raise ValueError(f"{path}: no config of a run ({why}); wanted: {wanted}") from error
    if kind is not dict:
        try:
            check(found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return found


def save_run(folder, config, mappers, generator, history, floor, samples):
    """Write the files. config: dict. mappers: none, one, or one for each CLIP. floor: of
    `save_curves`. samples: a picture, uint8 [H, W, 3].
    """
    config = config | _full_paths(config) | {"resume": False, "overwrite": False}
    lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in history)
    for name in NETWORKS:  # of the run that was here before
        (folder / name).unlink(missing_ok=True)
    if mappers:
        state = (mappers[0] if len(mappers) == 1 else nn.ModuleList(mappers)).state_dict()
        write_atomically(folder / "mapper.safetensors", lambda file: file.write_bytes(save(state)))
    described = json.dumps(config, indent=2) + "\n"
    write_atomically(folder / "config.json", lambda file: file.write_text(described))
    write_atomically(folder / "history.jsonl", lambda file: file.write_text(lines))
    fits, other = GENERATORS
    save_generator(generator, folder / (other if misfit_of(generator.config) else fits))
    save_curves(history, folder / "curves.png", floor)
    save_picture(samples, folder / "samples.png")


def _full_paths(config):
    """The config's paths of files that are there; other names, and URLs, as they are."""

    def full(name):
        return str(Path(name).resolve()) if name and Path(name).is_file() else name

    return {"generator": full(config["generator"]), "clip": [full(x) for x in config["clip"]]}


def save_picture(picture, path):
    """picture: uint8 [H, W, 3]."""
    from PIL import Image

    write_atomically(path, Image.fromarray(picture.numpy()).save)


def save_curves(history, path, floor=None):
    """A panel for every number of the history: losses, gradient norms, |delta_image|.

    floor: the loss of true pairs in stage 2; training below it follows CLIP, not the domain.
    """
    from matplotlib.figure import Figure

    curves = {}  # {(stage, name): {CLIP: values}}
    for row in history:
        for name, value in row.items():
            if type(value) is float:
                lines = curves.setdefault((row["stage"], name), {})
                lines.setdefault(row.get("clip"), []).append(value)
    figure = Figure(figsize=(2.8 * len(curves), 2.8), layout="constrained")
    all_axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, ((stage, name), lines) in zip(all_axes, curves.items(), strict=True):
        for label, values in lines.items():
            axes.plot(values, label=label and label[-16:])  # of a path, the name
        axes.set(title=f"stage {stage}: {name}", xlabel="step")
        if floor is not None and (stage, name) == (2, "loss"):
            axes.axhline(floor, color="black", linestyle="--", label="true pairs")
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    write_atomically(path, figure.savefig)
