"""A run that is stopped goes on to the same bits. (tests/soak.py does it at random moments.)"""

import os
import shutil
import signal
from unittest import mock

import pytest
import torch
from command import WORLD, answer, done, history_of, same, start, stopping, two_clips, until_saved

import ipl
from cli import pictures, processes, resume, run_folder
from cli.settings import Settings

SHORT = "--steps-mapper 5 --batch-mapper 4 --steps 6 --layer-batch 2 --samples 2 --crop 0.1".split()
SOME = [0, 3, 8]  # of the eleven steps of both stages; the others are slow


class Killed(BaseException):
    """As abrupt as a test in one process can be."""


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    with mock.patch.object(pictures, "of_run", lambda make: dict.fromkeys(make, b"a picture")):
        yield


def train(out, *args):
    return done(*WORLD, *SHORT, "--save-every", "2", "--out", out, *args)


def killed(n, out, *args):
    with stopping(n, Killed), pytest.raises(Killed):
        train(out, *args)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out)
    return out


def loops_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["loops"]


@pytest.mark.parametrize(
    "step", [x if x in SOME else pytest.param(x, marks=pytest.mark.slow) for x in range(11)]
)
def test_every_step(whole, tmp_path, step):
    out = tmp_path / "run"
    killed(step, out)
    assert (out / "checkpoint.pt").exists() == (step >= 2)
    if step == 8:
        (name, first), (_, second) = loops_of(out).items()
        assert name == "stage 1" and first["done"] == 5
        assert set(first["state"]) == {"mapper", "optimizer", "rng", "history"}
        assert set(second["state"]) == {*"target average optimizer rng history layers".split()}
    train(out, "--resume")
    same(out, whole)


NADA = "--method nada --layers all --noise fixed --eps 0.1"


BANK = "--bank 9 --noise fresh"


@pytest.mark.parametrize("kind", [NADA, BANK, "--layer-every 3 --num-layers 2", "two CLIPs"])
def test_kinds_of_runs_stopped_again_and_again(tmp_path, kind):
    args = two_clips(tmp_path) if kind == "two CLIPs" else kind.split()
    train(tmp_path / "whole", *args)
    for step in (3, 2):
        killed(step, tmp_path / "run", *args, "--resume")
    train(tmp_path / "run", *args, "--resume")
    same(tmp_path / "run", tmp_path / "whole")


ELSEWHERE = {"generator.safetensors", "anchors.jsonl"}  # of other generators, of AIR


@pytest.mark.parametrize("name", sorted({*run_folder.FILES} - ELSEWHERE))
def test_killed_while_a_file_is_written(whole, tmp_path, monkeypatch, name):
    """Whatever file it was: the half of it is gone, and the run goes on."""
    out, replace = tmp_path / "run", os.replace

    def cut(aside, path):
        if path.name == name:
            aside.write_bytes(aside.read_bytes()[:100])
            shutil.copy(aside, path.with_name(f".{path.stem}.4194305{path.suffix}"))  # no such pid
            raise Killed
        replace(aside, path)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(Killed):
        train(out)
    assert len(list(out.glob(".*"))) == 1
    monkeypatch.undo()
    train(out, "--resume")
    same(out, whole)
    assert not list(out.glob(".*"))


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, fsync, replace = [], os.fsync, os.replace

    def named(aside, path):
        assert flushed[-1] == aside.stat().st_ino
        replace(aside, path)

    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", named)
    train(tmp_path / "run", "--steps", "1", "--steps-mapper", "1")
    assert len(flushed) == 2 * 6 + 2 * 2  # six files and two checkpoints, and their folder after


def test_overwrite_begins_anew_and_replaces_the_old_run_only_at_the_end(whole, tmp_path):
    out, other = tmp_path / "run", ["--method", "nada", "--steps", "9"]
    shutil.copytree(whole, out)
    killed(8, out, "--overwrite", *other)
    same(out, whole)
    train(out, "--resume", *other)
    assert not (out / "mapper.safetensors").exists() and len(history_of(out)) == 9
    killed(4, out, "--overwrite", "--seed", "5")
    train(out, "--overwrite")
    assert "nothing is left to do" in train(out, "--resume")
    same(out, whole)


# ----------------------------------------------------------------------------------------------
# Signals, and a second process


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_save_and_stop(tmp_path, name):
    out, number = tmp_path / "run", getattr(signal, name)
    args = [*WORLD, *SHORT, "--steps", "60", "--method", "nada", "--out", out]
    job = start(*args, "--save-every", "1")
    until_saved(job, out)
    job.send_signal(number)
    said, words = job.communicate(timeout=60)
    saved = loops_of(out)["stage 2"]["done"]
    assert (job.returncode, said) == (128 + number, "") and 0 < saved < 60
    assert f"stage 2, {saved} of 60 steps are saved" in words.splitlines()[-1]
    done(*args, "--resume", "--save-every", "7")
    assert [row["step"] for row in history_of(out)] == list(range(60))


@pytest.mark.parametrize("stage, number", [(1, signal.SIGUSR1), (2, signal.SIGHUP)])
def test_a_signal_while_the_last_step_is_saved(whole, tmp_path, monkeypatch, stage, number):
    save = resume.Keeper.save

    def interrupted(self):
        save(self)
        if self.stage == stage and self.loops[f"stage {stage}"]["done"] == (5, 6)[stage - 1]:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(resume.Keeper, "save", interrupted)
    code, _, err = answer(*WORLD, *SHORT, "--out", tmp_path / "run")
    if stage == 1:
        assert code == 128 + number and "stage 2, 1 of 6 steps are saved" in err
        monkeypatch.undo()
        train(tmp_path / "run", "--resume")
    same(tmp_path / "run", whole)  # in stage 2, it was all but finished


def test_signals_that_are_ignored_stay_so_and_handlers_of_others_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    handlers = [signal.getsignal(x) for x in processes.SIGNALS]
    try:
        with processes.deferred_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not received and handlers == [signal.getsignal(x) for x in processes.SIGNALS]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_process_that_looked_too_early_does_no_harm(whole, tmp_path):
    """Between its look at the folder and its work there, another one had it."""
    early = resume.Keeper(tmp_path / "run", Settings(), torch.device("cpu"))
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match="another process works there"), early:
        pass
    same(tmp_path / "run", whole)


# ----------------------------------------------------------------------------------------------
# Training that goes wrong


@pytest.mark.parametrize(
    "name, step, done, wanted",
    [
        ("contrastive_loss", 3, {"stage 1": 3}, "--lr-mapper"),
        ("directional_loss", 3, {"stage 1": 5, "stage 2": 3}, "--lr"),
        ("directional_loss", 0, {"stage 1": 5, "stage 2": 0}, "--eps 0.1"),
    ],
)
def test_the_state_before_the_step_is_kept(whole, tmp_path, name, step, done, wanted):
    right, factors = getattr(ipl, name), iter([1] * step + [torch.nan])
    with mock.patch.object(ipl, name, lambda *args, **more: right(*args, **more) * next(factors)):
        code, _, err = answer(*WORLD, *SHORT, "--out", tmp_path / "run")
    assert code == 1 and f"step {step}: loss is nan" in err and wanted in err.splitlines()[-1]
    assert {name: loop["done"] for name, loop in loops_of(tmp_path / "run").items()} == done
    train(tmp_path / "run", "--resume")  # as if it had been the machine's fault
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("args", ["--lr-mapper 1e30", f"{NADA} --lr 1e20"])
def test_a_run_that_diverges_keeps_what_is_finite_and_the_run_before(whole, tmp_path, args):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    code, _, err = answer(*WORLD, *SHORT, *args.split(), "--out", out, "--overwrite")
    assert code == 1 and "with --overwrite, or another --out" in err.splitlines()[-1]
    same(out, whole)
    for loop in loops_of(out).values():
        assert all(x.isfinite().all() for x in resume.tensors(loop["state"]))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("alloc: can't allocate memory")],
)
def test_out_of_memory_says_where_and_what_helps(tmp_path, error):
    with mock.patch.object(ipl, "directional_loss", side_effect=error):
        code, _, err = answer(*WORLD, *SHORT, "--out", tmp_path / "run")
    assert code == 1 and "out of memory in stage 2; wanted: less than --batch 2\n" in err
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_deterministic_asks_torch_which_warns_where_it_cannot(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    try:
        processes.choose_kernels(deterministic=True, tf32=False)
        with pytest.warns(UserWarning, match="put_ does not have a deterministic"):
            torch.rand(5).put_(torch.tensor([0]), torch.tensor([1.0]))
    finally:
        torch.use_deterministic_algorithms(False)
