"""A run that is stopped goes on to the same bits. (tests/soak.py does it at random moments.)"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import ipl
from cli import processes, run_folder

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
WORLD = ["--generator", str(GOLDEN / "rosinality_tiny.pt"), "--clip", str(GOLDEN / "clip_tiny.pt")]
SHORT = "--steps-mapper 5 --batch-mapper 4 --steps 6 --layer-batch 2 --samples 2 --crop 0.1".split()
pytestmark = pytest.mark.filterwarnings("ignore:stage 1 learned little")


class Killed(BaseException):
    """As abrupt as a test in one process can be."""


def contents(folder):
    """What a run results in, byte for byte."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}


def train(out, *args):
    ipl.main([*WORLD, *SHORT, "--save-every", "2", "--out", str(out), *args])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out)
    return out


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n): the n-th step of the next run, counted over both stages, raises Killed."""
    log_step = ipl.log_step

    def stop_at(n):
        count = [n]

        def counted(*args, **more):
            if count[0] == 0:
                raise Killed
            count[0] -= 1
            log_step(*args, **more)

        monkeypatch.setattr(ipl, "log_step", counted)

    yield stop_at


@pytest.mark.parametrize("step", range(11))
def test_every_step(whole, stop_at, tmp_path, step):
    out = tmp_path / "run"
    stop_at(step)
    with pytest.raises(Killed):
        train(out)
    assert (out / "checkpoint.pt").exists() == (step >= 2)
    stop_at(99)
    train(out, "--resume")
    assert contents(out) == contents(whole)
    config, expected = (json.loads((x / "config.json").read_text()) for x in (out, whole))
    assert config | {"out": None} == expected | {"out": None}


def test_stopped_again_and_again(whole, stop_at, tmp_path):
    for step in (3, 2, 2, 2, 3):
        stop_at(step)
        with pytest.raises(Killed):
            train(tmp_path / "run", "--resume")
    stop_at(99)
    train(tmp_path / "run", "--resume")
    assert contents(tmp_path / "run") == contents(whole)


@pytest.mark.parametrize(
    "args",
    [
        ["--method", "nada", "--layers", "all", "--noise", "fixed", "--eps", "0.1"],
        ["--clip", WORLD[3], "{other}", "--clip-weights", "1", "0.5"],
    ],
)
def test_other_kinds_of_runs(stop_at, tmp_path, args):
    other = torch.load(WORLD[3], weights_only=True)
    other["visual.proj"] = -other["visual.proj"]
    torch.save(other, tmp_path / "other.pt")
    args = [word.format(other=tmp_path / "other.pt") for word in args]
    train(tmp_path / "whole", *args)
    for step in (3, 3):
        stop_at(step)
        with pytest.raises(Killed):
            train(tmp_path / "run", *args, "--resume")
    stop_at(99)
    train(tmp_path / "run", *args, "--resume")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


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
    assert len([path for path in out.iterdir() if path.name.startswith(".")]) == 1
    monkeypatch.setattr(os, "replace", replace)
    train(out, "--resume")
    assert contents(out) == contents(whole)


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, fsync, replace = [], os.fsync, os.replace

    def named(aside, path):
        assert flushed[-1] == aside.stat().st_ino
        replace(aside, path)

    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", named)
    train(tmp_path / "run", "--steps", "1", "--steps-mapper", "1")
    assert len(flushed) == 2 * 7 + 2  # six files and two checkpoints, and their folder after each


def test_overwrite_begins_anew(whole, stop_at, tmp_path):
    stop_at(4)
    with pytest.raises(Killed):
        train(tmp_path / "run", "--seed", "5")
    stop_at(99)
    train(tmp_path / "run", "--overwrite")
    assert contents(tmp_path / "run") == contents(whole)


def test_a_finished_run_says_so(whole, capsys):
    before = contents(whole)
    train(whole, "--resume")
    assert capsys.readouterr().out == f"{whole} is a finished run: nothing is left to do\n"
    assert contents(whole) == before


def test_a_new_run_replaces_the_old_one_only_at_the_end(whole, stop_at, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    stop_at(8)
    with pytest.raises(Killed):
        train(out, "--overwrite", "--method", "nada", "--steps", "9")
    kept = contents(out)
    kept.pop("checkpoint.pt")
    assert kept == contents(whole)
    stop_at(99)
    train(out, "--resume", "--method", "nada", "--steps", "9")
    assert not (out / "mapper.safetensors").exists()


# ----------------------------------------------------------------------------------------------
# Signals


def call(out, *args):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "ipl.py"), *WORLD, *SHORT, "--out", str(out), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by jobs in "&"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(tmp_path, number):
    out, long = tmp_path / "run", ["--steps", "60", "--method", "nada"]
    job = call(out, *long, "--save-every", "1")
    while not (out / "checkpoint.pt").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.002)
    job.send_signal(number)
    said, words = job.communicate(timeout=60)
    assert job.returncode == 128 + number and said == ""
    asked, told = words.split("\n")[1], words.split("\n")[-2]
    assert asked == "stopping after this step; Ctrl-C stops at once"
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["loops"][0]["step"]
    assert told == (
        f"ipl.py: stopped, stage 2, {saved} of 60 steps are saved; "
        "the same command with --resume goes on"
    )
    assert 0 < saved < 60
    again = call(out, *long)
    assert "is an unfinished run; wanted: --resume, another --out, or" in again.communicate()[1]
    assert again.returncode == 2
    again = call(out, *long, "--resume", "--save-every", "7")
    again.communicate()
    assert again.returncode == 0
    history = (out / "history.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in history] == list(range(60))


def test_a_second_process_that_looked_too_early_does_no_harm(whole, tmp_path):
    """Between its look at the folder and its work there, another one had it."""
    out = tmp_path / "run"
    early = run_folder.Keeper(out, ipl.asdict(ipl.Config()), torch.device("cpu"))
    train(out)
    with pytest.raises(ValueError, match="another process works there"), early:
        pass
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_signal_while_the_last_step_is_saved(whole, tmp_path, monkeypatch, capsys, stage):
    save = run_folder.Keeper.save

    def interrupted(keep):
        save(keep)
        if keep.stage == stage and keep.loops[-1]["step"] == (5, 6)[stage - 1]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_folder.Keeper, "save", interrupted)
    if stage == 2:  # it is all but finished
        train(tmp_path / "run")
    else:
        with pytest.raises(SystemExit) as exit_:
            train(tmp_path / "run")
        assert exit_.value.code == 128 + signal.SIGTERM
        assert "stage 2, 1 of 6 steps are saved" in capsys.readouterr().err
        monkeypatch.undo()
        train(tmp_path / "run", "--resume")
    assert contents(tmp_path / "run") == contents(whole)


def test_signals_that_are_ignored_stay_so(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with processes.deferred_signals() as received:
            os.kill(os.getpid(), signal.SIGINT)
        assert not received
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_of_others_are_put_back(tmp_path):
    before = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    train(tmp_path / "run", "--steps", "1", "--steps-mapper", "1")
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == before


# ----------------------------------------------------------------------------------------------
# Training that goes wrong


def poison(monkeypatch, name, value, step):
    """In one step of stage 2, the loss of ipl.<name> is multiplied by `value`."""
    right, calls = getattr(ipl, name), [0]

    def wrong(*args, **more):
        calls[0] += 1
        return right(*args, **more) * (value if calls[0] == step + 1 else 1)

    monkeypatch.setattr(ipl, name, wrong)


@pytest.mark.parametrize(
    "name, stage, step, words",
    [
        ("contrastive_loss", 1, 3, "wanted: a smaller rate (--lr-mapper)"),
        ("directional_loss", 2, 3, "wanted: a smaller rate (--lr)"),
        ("directional_loss", 2, 0, "wanted: --eps 0.1, for images that do not differ yet"),
    ],
)
def test_the_state_before_the_step_is_kept(
    tmp_path, monkeypatch, capsys, whole, name, stage, step, words
):
    poison(monkeypatch, name, float("nan"), step)
    with pytest.raises(SystemExit) as exit_:
        train(tmp_path / "run")
    said = capsys.readouterr().err
    assert exit_.value.code == 1 and said.count("\n") == 1
    assert said.startswith(f"ipl.py: error: stage {stage}, step {step}: loss is nan; {words}")
    loops = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["loops"]
    assert [loop["step"] for loop in loops] == ([step] if stage == 1 else [5, step])
    monkeypatch.undo()
    train(tmp_path / "run", "--resume")  # as if it had been the machine's fault
    assert contents(tmp_path / "run") == contents(whole)


def test_weights_that_are_not_finite_are_never_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        train(tmp_path / "run", "--lr-mapper", "1e30")
    said = capsys.readouterr().err
    assert exit_.value.code == 1 and said.count("\n") == 1 and "stage 1" in said
    assert "with --overwrite, or another --out" in said
    assert not (tmp_path / "run" / "generator.pt").exists()
    for loop in torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["loops"]:
        assert all(x.isfinite().all() for x in run_folder._tensors(loop["states"]))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)  # fmt: skip
def test_out_of_memory(tmp_path, monkeypatch, capsys, error):
    def full(*args, **more):
        raise error

    monkeypatch.setattr(ipl, "directional_loss", full)
    with pytest.raises(SystemExit) as exit_:
        train(tmp_path / "run")
    said = capsys.readouterr().err
    assert exit_.value.code == 1 and said == (
        "ipl.py: error: out of memory in stage 2, at 32 x 32 pixels; wanted: less than --batch 2\n"
    )
    assert (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_mapper_that_learned_nothing_is_told_before_stage_2(tmp_path, monkeypatch, capsys):
    def never(*args, **more):
        raise Killed

    monkeypatch.setattr(ipl, "adapt_generator", never)
    with pytest.raises(Killed), warnings.catch_warnings(action="always"):
        train(tmp_path / "run", "--lr-mapper", "1e-9")
    said = capsys.readouterr().err
    assert said.startswith("ipl.py: warning: stage 1 learned little: ") and said.count("\n") == 1
    assert "% of 4 images find their own prompt; wanted: more --steps-mapper, or another" in said


def test_accuracy_of_prompts():
    images, texts = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]] * 7
    assert ipl.retrieval_accuracy(images, texts) == 0.5
    assert ipl.retrieval_accuracy(images, images) == 1
    assert ipl.retrieval_accuracy(images.abs() + 1, texts[:1].expand(4, -1)) == 0.25  # all the same


# ----------------------------------------------------------------------------------------------
# Determinism


def test_deterministic_asks_torch_and_says_where_it_cannot(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    log_step = ipl.log_step

    def uneven(*args, **more):  # put_ has no deterministic form, on a CPU either
        torch.rand(5).put_(torch.tensor([0]), torch.tensor([1.0]))
        log_step(*args, **more)

    monkeypatch.setattr(ipl, "log_step", uneven)
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        with warnings.catch_warnings(action="always"):
            train(tmp_path / "run", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if "stage 1 learned" not in line]
    words = "ipl.py: warning: put_ does not have a deterministic implementation"
    assert lines and all(line.startswith(words) for line in lines)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["deterministic"] is True


def test_a_picture_does_not_depend_on_those_beside_it(whole):
    from checkpoints import load_generator

    generator = load_generator(whole / "generator.pt")
    z = ipl.sample_latents(6, generator.z_dim, seed=3)
    together = generator.synthesis(generator.mapping(z))
    order = torch.tensor([4, 0, 5, 2])
    some = generator.synthesis(generator.mapping(z[order]))
    torch.testing.assert_close(some, together[order], rtol=1e-4, atol=1e-5)
    alone = generator.synthesis(generator.mapping(z[3:4]))
    torch.testing.assert_close(alone, together[3:4], rtol=1e-4, atol=1e-5)
