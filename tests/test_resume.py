"""A run that is stopped goes on to the same bits. (tests/soak.py does it at random moments.)"""

import os
import shutil
import signal
from unittest import mock

import pytest
import torch
from command import WORLD, answer, done, history_of, same, start, until_saved

import ipl
from cli import keeper, pictures, processes, run_folder
from cli.settings import Settings

SHORT = "--steps-mapper 5 --batch-mapper 4 --steps 6 --layer-batch 2 --samples 2 --crop 0.1".split()
SOME = [0, 3, 8]  # of the eleven steps of both stages; the others are slow


class Killed(BaseException):
    """As abrupt as a test in one process can be."""


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "of_run", lambda make: dict.fromkeys(make, b"a picture"))
        yield


def train(out, *args):
    return done(*WORLD, *SHORT, "--save-every", "2", "--out", out, *args)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out)
    return out


def killed(n, out, *args):
    """A run that is killed in its n-th step, counted over all stages."""

    def counted(stage, total, state, done=0):
        nonlocal n
        for step in range(done, total):
            if n == 0:
                raise Killed
            n -= 1
            yield step

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ipl, "progress", counted)
        train(out, *args)


def loops_of(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)["loops"]


@pytest.mark.parametrize(
    "step", [x if x in SOME else pytest.param(x, marks=pytest.mark.slow) for x in range(11)]
)
def test_every_step(whole, tmp_path, step):
    out = tmp_path / "run"
    killed(step, out)
    assert (out / "checkpoint.pt").exists() == (step >= 2)
    train(out, "--resume")
    same(out, whole)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--method", "nada", "--layers", "all", "--noise", "fixed", "--eps", "0.1"],
        ["--layer-every", "3", "--num-layers", "2"],
        ["--clip", WORLD[3], "{other}", "--clip-weights", "1", "0.5"],
    ],
    ids=["ipl", "nada", "layers that are kept", "two CLIPs"],
)
def test_kinds_of_runs_stopped_again_and_again(tmp_path, args):
    other = torch.load(WORLD[3], weights_only=True)
    torch.save(other | {"visual.proj": -other["visual.proj"]}, tmp_path / "other.pt")
    args = [word.format(other=tmp_path / "other.pt") for word in args]
    train(tmp_path / "whole", *args)
    for step in (3, 2):
        killed(step, tmp_path / "run", *args, "--resume")
    train(tmp_path / "run", *args, "--resume")
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("name", sorted({*run_folder.FILES} - {"generator.safetensors"}))
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


def test_overwrite_begins_anew_and_a_finished_run_says_so(whole, tmp_path):
    killed(4, tmp_path / "run", "--seed", "5")
    train(tmp_path / "run", "--overwrite")
    assert "is a finished run: nothing is left to do\n" in train(tmp_path / "run", "--resume")
    same(tmp_path / "run", whole)


def test_a_new_run_replaces_the_old_one_only_at_the_end(whole, tmp_path):
    out, other = tmp_path / "run", ["--method", "nada", "--steps", "9"]
    shutil.copytree(whole, out)
    killed(8, out, "--overwrite", *other)
    same(out, whole)
    train(out, "--resume", *other)
    assert not (out / "mapper.safetensors").exists() and len(history_of(out)) == 9


def test_a_checkpoint_names_what_it_holds(tmp_path):
    killed(8, tmp_path / "run")
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert kept["settings"]["batch_mapper"] == 4 and kept["settings"]["device"] == "cpu"
    (_, first), (_, second) = kept["loops"].items()
    assert list(kept["loops"]) == ["stage 1", "stage 2"] and first["done"] == 5
    assert set(first["state"]) == {"mapper", "optimizer", "rng", "history"}
    assert set(second["state"]) == {"target", "average", "optimizer", "rng", "history", "layers"}


# ----------------------------------------------------------------------------------------------
# Signals


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_save_and_stop(tmp_path, name):
    out, number = tmp_path / "run", getattr(signal, name)
    args = [*WORLD, *SHORT, "--steps", "60", "--method", "nada", "--out", out]
    job = start(*args, "--save-every", "1")
    until_saved(job, out)
    job.send_signal(number)
    said, words = job.communicate(timeout=60)
    assert job.returncode == 128 + number and said == ""
    saved = loops_of(out)["stage 2"]["done"]
    assert 0 < saved < 60 and "stopping after this step; Ctrl-C stops at once" in words
    told = f"ipl.py: stopped, stage 2, {saved} of 60 steps are saved; the same command with --res"
    assert words.splitlines()[-1].startswith(told)
    done(*args, "--resume", "--save-every", "7")
    assert [row["step"] for row in history_of(out)] == list(range(60))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_signal_while_the_last_step_is_saved(whole, tmp_path, monkeypatch, stage, number):
    save = keeper.Keeper.save

    def interrupted(self):
        save(self)
        if self.stage == stage and self.loops[f"stage {stage}"]["done"] == (5, 6)[stage - 1]:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(keeper.Keeper, "save", interrupted)
    if stage == 2:  # it is all but finished
        train(tmp_path / "run")
    else:
        code, _, err = answer(*WORLD, *SHORT, "--out", tmp_path / "run")
        assert code == 128 + number and "stage 2, 1 of 6 steps are saved" in err
        monkeypatch.undo()
        train(tmp_path / "run", "--resume")
    same(tmp_path / "run", whole)


def test_signals_that_are_ignored_stay_so_and_handlers_of_others_come_back(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    handlers = [signal.getsignal(x) for x in processes.SIGNALS]
    try:
        with processes.deferred_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not received
        assert [signal.getsignal(x) for x in processes.SIGNALS] == handlers
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_process_that_looked_too_early_does_no_harm(whole, tmp_path):
    """Between its look at the folder and its work there, another one had it."""
    early = keeper.Keeper(tmp_path / "run", Settings(), torch.device("cpu"))
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match="another process works there"), early:
        pass
    same(tmp_path / "run", whole)


# ----------------------------------------------------------------------------------------------
# Training that goes wrong


@pytest.mark.parametrize(
    "name, stage, step, words",
    [
        ("contrastive_loss", 1, 3, "wanted: a smaller --lr-mapper"),
        ("directional_loss", 2, 3, "wanted: a smaller --lr"),
        ("directional_loss", 2, 0, "wanted: --eps 0.1, for images that do not differ yet"),
    ],
)
def test_the_state_before_the_step_is_kept(whole, tmp_path, monkeypatch, name, stage, step, words):
    right, calls = getattr(ipl, name), []

    def wrong(*args, **more):
        calls.append(name)
        return right(*args, **more) * (torch.nan if len(calls) == step + 1 else 1)

    monkeypatch.setattr(ipl, name, wrong)
    code, _, err = answer(*WORLD, *SHORT, "--out", tmp_path / "run")
    assert code == 1 and f"error: stage {stage}, step {step}: loss is nan; {words}" in err
    steps = {name: loop["done"] for name, loop in loops_of(tmp_path / "run").items()}
    assert steps == ({"stage 1": step} if stage == 1 else {"stage 1": 5, "stage 2": step})
    monkeypatch.undo()
    train(tmp_path / "run", "--resume")  # as if it had been the machine's fault
    same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "args",
    ["--lr-mapper 1e30", "--lr 1e20 --method nada --noise fixed --eps 0.1 --layers all"],
    ids=["stage 1", "stage 2"],
)
def test_a_run_that_diverges_keeps_what_is_finite_and_the_run_before(whole, tmp_path, args):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    code, _, err = answer(*WORLD, *SHORT, *args.split(), "--out", out, "--overwrite")
    assert code == 1 and "with --overwrite, or another --out" in err.splitlines()[-1]
    same(out, whole)
    for loop in loops_of(out).values():
        assert all(x.isfinite().all() for x in keeper.tensors(loop["state"]))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "cpu"],
)
def test_out_of_memory(tmp_path, monkeypatch, error):
    monkeypatch.setattr(ipl, "directional_loss", mock.Mock(side_effect=error))
    code, _, err = answer(*WORLD, *SHORT, "--out", tmp_path / "run")
    words = "out of memory in stage 2; wanted: less than --batch 2"
    assert code == 1 and err.splitlines()[-1] == f"ipl.py: error: {words}"
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_deterministic_asks_torch_and_says_where_it_cannot(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    right = ipl.directional_loss

    def uneven(*args):  # put_ has no deterministic form, on a CPU either
        torch.rand(5).put_(torch.tensor([0]), torch.tensor([1.0]))
        return right(*args)

    monkeypatch.setattr(ipl, "directional_loss", uneven)
    try:
        _, _, err = answer(*WORLD, *SHORT, "--out", tmp_path / "run", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "ipl.py: warning: put_ does not have a deterministic implementation" in err
