"""An unfinished run: kept on the disk while it is trained, so that it can be stopped any moment."""

import contextlib
import fcntl
import hashlib
import io
import os
import re
import signal
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

import ipl
import miniature
from checkpoints.files import write_atomically
from checkpoints.images import picture_paths
from cli.messages import in_words
from cli.processes import any_rank, deferred_signals, rank
from cli.run_folder import (
    CHECKPOINT,
    FILES,
    find_generator,
    full_paths,
    made_by,
    make_folder,
    read_config,
)
from cli.settings import EMBEDDED, flag

OF_A_CALL = "out overwrite resume save_every device keep_memory".split()  # not of the result


class Keeper:
    """The `steps` of both training loops of ipl.py.

        keeper = Keeper(folder, settings, device)           nothing is written yet
        with keeper:                                        makes the folder, and holds it
            ... = ipl.adapt(..., steps=keeper)
            save_run(...)                                   writes the results
            keeper.finish()                                 nothing is left to go on with

    A checkpoint has the settings by name and, for each loop by name, the steps done and the state
    that ipl.py names. With it a run goes on to the same bits on the same machine; it does not with
    another device or number of processes. `finished` says that nothing is left to do.

    depends_on: settings -> what the result depends on, by name; read: a finished run's folder ->
    its settings; both of the main command, unless another has settings of its own.

    Raises ValueError, of one line: for files in the folder that would be lost, for a checkpoint
    that is damaged, for a run of other settings, and names those that differ.
    """

    def __init__(self, folder, settings, device, depends_on=None, read=read_config):
        self.depends_on, self.read = depends_on or of_the_result, read
        self.folder, self.path, self.cfg = folder, folder / CHECKPOINT, settings
        self.found, self.loops, self.finished, self.stage = {}, {}, False, None
        self.seconds = {}  # {stage: that this process has spent in it}
        self.settings = self.depends_on(settings) | {"device": device.type}
        refusal = None
        if rank() == 0:
            self.stamp = self._stamp()
            try:
                self._look(settings.resume, settings.overwrite)
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
            settings, self.found = read_checkpoint(self.path)
        else:
            if self.read is read_config and (other := made_by(self.folder)):
                raise ValueError(f"{self.folder} is a run of {other}; wanted: another --out")
            self.finished, settings = True, self.depends_on(self.read(self.folder))
        if different := [
            f"{flag(name) if name.isidentifier() else name} {told(begun)}, not {told(value)}"
            for name, value in self.settings.items()
            if (begun := settings.get(name, value)) != value
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

    def __exit__(self, kind, error, _):
        """Errors say how to go on. A run that diverges is kept as it was before the step that did,
        if that is finite."""
        try:
            if kind is FloatingPointError:
                with contextlib.suppress(FloatingPointError, OSError):
                    self.save()
        finally:
            self.waiting.__exit__(None, None, None)
            if rank() == 0:
                os.close(self.lock)
        if kind is FloatingPointError:
            raise FloatingPointError(f"{error}, with --overwrite, or another --out") from error
        if kind is KeyboardInterrupt:
            where, number = error.args or ("the run is unfinished", signal.SIGINT)
            words = f"stopped, {where}; the same command with --resume goes on"
            raise KeyboardInterrupt(words, number) from None
        if kind and issubclass(kind, OSError) and error.filename:
            wanted = "a folder to write in, with room, and the same command with --resume"
            raise ValueError(f"{in_words(error)}; wanted: {wanted}") from error

    def __call__(self, stage, total, state):
        """The steps of a stage that are left.

        The state is saved every `save_every` steps, after the last one, and when one of SIGNALS
        ends the run: KeyboardInterrupt(where, signal) is raised between two steps. A signal during
        the last step of all, or while results are written, finds nothing left to stop.
        """
        name = f"stage {stage}"
        if name in self.loops:  # stage 1 of a further CLIP
            name += f", CLIP {len(self.loops) + 1}"
        kept, self.stage = self.found.pop(name, None), stage
        done = self._restore(state, kept) if kept else 0
        loop = self.loops[name] = {"state": state, "done": done, "before": light(state)}
        start = time.perf_counter()
        for step in ipl.progress(stage, total, state, done=done):
            yield step
            loop |= {"done": step + 1, "before": light(state)}
            last = loop["done"] == total
            stop = not last and any_rank(bool(self.received))
            if last or stop or loop["done"] % self.cfg.save_every == 0:
                self.save()
            if stop:
                where = f"stage {stage}, {loop['done']} of {total} steps are saved"
                raise KeyboardInterrupt(where, (self.received or [signal.SIGTERM])[0])
        self.stage = None
        self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start

    def _restore(self, state, kept):
        """Put what a checkpoint has of a loop into its state -> the steps done."""
        try:
            for name, part in state.items():
                if isinstance(part, list):
                    part[:] = kept["state"][name]
                elif isinstance(part, torch.Generator):
                    part.set_state(kept["state"][name])
                else:
                    part.load_state_dict(kept["state"][name])
            return kept["done"]
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.path} does not fit this run's networks ({type(error).__name__}: {error}); "
                "wanted: --overwrite, to begin anew"
            ) from error

    def save(self):
        """Write the state as it was before the step that is under way.

        Raises FloatingPointError if there is a number in it that is not finite, and writes nothing.
        """
        loops = {}
        for name, loop in self.loops.items():
            heavy = {k: x.state_dict() for k, x in loop["state"].items() if k not in loop["before"]}
            if not all(x.isfinite().all() for x in tensors(heavy)):
                where = f"{name}, after {loop['done']} steps"
                raise FloatingPointError(f"{where}: weights are not finite; wanted: a smaller rate")
            loops[name] = {"done": loop["done"], "state": heavy | loop["before"]}
        if rank():  # the others hold the same
            return
        buffer = io.BytesIO()
        torch.save({"settings": self.settings, "loops": loops}, buffer)
        write_atomically(self.path, lambda aside: aside.write_bytes(buffer.getbuffer()))

    def where_memory_ends(self):
        """The stage that is under way, and what takes memory there, in words."""
        size = {1: "batch_mapper", 2: "batch", "few-shot": "batch"}.get(self.stage, "samples")
        where = "outside the stages" if self.stage is None else f"in stage {self.stage}"
        return f"{where}; wanted: less than {flag(size)} {getattr(self.cfg, size)}"

    def finish(self):
        """Results are written: nothing is left to go on with."""
        self.path.unlink(missing_ok=True)  # somebody may have been faster


def told(value):
    """A setting, as a command line has it."""
    return value if value != "" else "''"


def light(state):
    """A copy of what a step changes before it is known to be good, and what is no network."""
    lists = {name: list(part) for name, part in state.items() if isinstance(part, list)}
    rngs = {name: part for name, part in state.items() if isinstance(part, torch.Generator)}
    return lists | {name: rng.get_state() for name, rng in rngs.items()}


def tensors(state):
    """The floating point tensors of a nested state dict."""
    if isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors(value)
    elif torch.is_tensor(state) and state.is_floating_point():
        yield state


def read_checkpoint(path):
    """-> settings, {name: loop}. Raises ValueError, of one line, if it is damaged."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of strange files
            kept = torch.load(path, map_location="cpu", weights_only=True)
        return dict(kept["settings"]), {name: dict(x) for name, x in kept["loops"].items()}
    except Exception as error:  # whatever a foreign file can raise
        raise ValueError(
            f"{path}: damaged, or no checkpoint of a run ({type(error).__name__}); wanted: "
            "--overwrite, to begin anew"
        ) from error


def of_the_result(settings):
    """What a run's result depends on: settings by their names, and its files' content."""
    settings = full_paths(settings)
    named = settings.generator, *settings.clip
    files = [x for x in named if x and x != EMBEDDED and Path(x).exists()]
    if settings.generator in (None, EMBEDDED):
        files += [miniature.DDPM if settings.generator else miniature.GENERATOR, miniature.CLIP]
    found = {name: x for name, x in asdict(settings).items() if name not in OF_A_CALL}
    for name in (settings.images, settings.target_images):
        if name and Path(name).is_dir():
            with warnings.catch_warnings(action="ignore"):  # they are given where it is read
                found[f"SHA-256 of {name}"] = sha256_of_pictures(picture_paths(Path(name)))
    return found | {f"SHA-256 of {name}": sha256(name) for name in files}


def sha256_of_pictures(paths):
    """Of their names and content."""
    said = "".join(f"{path.name} {sha256(path)} " for path in paths)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def sha256(path):
    """Of a file; of a folder, of what is in it, which may be in a folder of its own, but for hidden
    files, such as a file manager or Jupyter leaves there for having looked."""
    if Path(path).is_dir():
        inside = sorted(x for x in Path(path).rglob("*") if x.is_file())
        inside = [x for x in inside if "/." not in f"/{x.relative_to(path)}"]
        return hashlib.sha256("".join(map(sha256, inside)).encode()).hexdigest()[:16]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
