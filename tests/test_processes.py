"""Several processes on one run, by torchrun and gloo. Run by torchrun, this file is the worker."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.utils import get_total_norm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # torchrun knows no pytest

import ipl  # noqa: E402
from checkpoints import load_generator  # noqa: E402
from cli import processes  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"
WORLD = ["--generator", str(GOLDEN / "rosinality_tiny.pt"), "--clip", str(GOLDEN / "clip_tiny.pt")]
SHORT = "--steps-mapper 2 --batch-mapper 4 --steps 2 --layer-batch 2 --samples 3".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def torchrun(processes, *args, folder=ROOT):
    return subprocess.Popen(
        [*TORCHRUN, str(processes), *map(str, args)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by jobs in "&"
    )


# ----------------------------------------------------------------------------------------------
# The worker: one step of both stages -> losses, chosen layers, gradients


def one_step(method, layers):
    cfg = ipl.Config(
        noise="fixed", eps=0.1, crop=0.2, batch=4, batch_mapper=8, layer_batch=8, steps=1,
        steps_mapper=1, num_layers=3, lambda_source=0.5, layers=layers,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    generator, pair = load_generator(WORLD[1]), ipl.load_clip(WORLD[3])
    mapper = ipl.LatentMapper(32, 4, 64, rng)
    _, history = ipl.train_mapper(cfg, generator, *pair, rng=rng, mapper=mapper)
    gradients = {f"mapper.{name}": p.grad for name, p in mapper.named_parameters()}
    direct = ipl.label_direction(cfg, pair[0])
    if method == "ipl":
        direct = ipl.prompt_directions(cfg, pair[0], mapper)
    target = copy.deepcopy(generator)
    _, rows = ipl.adapt_generator(cfg, generator, *pair, direct, rng=rng, target=target)
    gradients |= {name: p.grad for name, p in target.named_parameters() if p.grad is not None}
    return history + rows, gradients


CASES = [("ipl", "adaptive"), ("nada", "all")]

if __name__ == "__main__":
    torch.manual_seed(int(os.environ["RANK"]))  # what ranks share comes from their arguments alone
    processes.join(torch.device("cpu"))
    found = [one_step(*case) for case in CASES]
    torch.save(found, f"{sys.argv[1]}/{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_of_twice_the_batch(tmp_path):
    job = torchrun(2, __file__, tmp_path)
    _, err = job.communicate()
    assert job.returncode == 0, err
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for case, *of_ranks in zip(CASES, first, second, strict=True):
        history, gradients = one_step(*case)
        for rows, grads in of_ranks:
            for row, expected in zip(rows, history, strict=True):
                assert row.keys() == expected.keys() and row.get("layers") == expected.get("layers")
                for name in row.keys() - {"layers"}:
                    assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
            assert grads.keys() == gradients.keys()
            for part in ("mapper.", "conv"):  # a noise strength alone is a sum that all but cancels
                names = [name for name in grads if name.startswith(part)]
                difference = [grads[name] - gradients[name] for name in names]
                whole = [gradients[name] for name in names]
                assert get_total_norm(difference) < 1e-5 * get_total_norm(whole) and len(names) > 7


# ----------------------------------------------------------------------------------------------
# The command line


def test_several_processes_make_one_run(tmp_path):
    args = [ROOT / "ipl.py", *WORLD, *SHORT, "--out"]
    job = torchrun(2, *args, tmp_path / "two")
    out, err = job.communicate()
    assert job.returncode == 0, err
    assert out.count("samples.png") == 1  # of rank 0
    assert len(list((tmp_path / "two").iterdir())) == 6
    history = (tmp_path / "two" / "history.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in history] == [0, 1, 0, 1]


def test_batches_that_cannot_be_shared_are_refused_once(tmp_path):
    args = [*WORLD, *SHORT, "--batch", "3", "--out", tmp_path / "run"]
    job = torchrun(2, ROOT / "ipl.py", *args)
    _, err = job.communicate()
    assert job.returncode != 0
    assert [line for line in err.splitlines() if line.startswith("ipl.py")] == [
        "ipl.py: error: --batch 3; wanted: a multiple of 2, the number of processes"
    ]
    assert not list(tmp_path.iterdir())


def test_what_rank_0_alone_can_see_is_refused_once(tmp_path):
    (tmp_path / "samples.png").write_text("mine")
    job = torchrun(2, ROOT / "ipl.py", *WORLD, *SHORT, "--out", tmp_path)
    _, err = job.communicate()
    assert job.returncode != 0
    assert [line for line in err.splitlines() if line.startswith("ipl.py")] == [
        f"ipl.py: error: {tmp_path} has a samples.png; wanted: another --out, or --overwrite"
    ]


def test_a_target_that_fails_does_not_keep_the_others_from_being_made(tmp_path, capsys):
    args = [*WORLD, *SHORT, "--method", "nada", "--layers", "all", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as exit_:
        with (tmp_path / "photo-to-anime-nada").open("w"):
            ipl.main([*args, "--target", "anime", "--target", "sketch"])
    assert exit_.value.code == 2
    assert "photo-to-anime-nada: File exists" in capsys.readouterr().err
    assert (tmp_path / "photo-to-sketch-nada" / "generator.pt").exists()


def test_targets_are_spread_over_processes(tmp_path, capsys):
    args = [*WORLD, *SHORT, "--method", "nada", "--seed", "3"]
    targets = ["--target", "anime", "--target", "sketch", "--target", "a  zombie"]
    job = torchrun(2, ROOT / "ipl.py", *args, *targets, "--out", tmp_path / "spread")
    out, err = job.communicate()
    assert job.returncode == 0, err
    ipl.main([*args, *targets, "--out", str(tmp_path / "in a row")])
    names = [f"photo-to-{name}-nada" for name in ("a-zombie", "anime", "sketch")]
    for folder in ("spread", "in a row"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    for name in names:
        histories = [
            map(json.loads, (tmp_path / folder / name / "history.jsonl").read_text().splitlines())
            for folder in ("spread", "in a row")
        ]
        for row, expected in zip(*histories, strict=True):
            assert row.pop("layers") == expected.pop("layers")
            assert row == pytest.approx(expected, rel=1e-4)  # other numbers of threads


def workers(job):
    """{rank: process id} of the processes that torchrun has started."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    found = {}
    for pid in children:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(word[5:]): int(pid) for word in words if word.startswith(b"RANK=")}
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_job_which_resumes(tmp_path, rank):
    out = tmp_path / "run"
    args = [*WORLD, *SHORT, "--steps", "60", "--save-every", "3", "--out", str(out)]
    job = torchrun(2, ROOT / "ipl.py", *args)
    try:
        while not (out / "checkpoint.pt").exists():
            assert job.poll() is None, job.communicate()
            time.sleep(0.01)
        os.kill(workers(job)[rank], 9)
        _, err = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode != 0
    lost = "lost the other processes of this run; the same command with --resume goes on"
    assert f"ipl.py: error: rank {1 - rank}: {lost}" in err
    again = torchrun(1 + rank, ROOT / "ipl.py", *args, "--resume")  # with one, or with two
    _, err = again.communicate()
    assert again.returncode == 0, err
    history = (out / "history.jsonl").read_text().splitlines()
    steps = [(json.loads(row)["stage"], json.loads(row)["step"]) for row in history]
    assert steps == [(1, 0), (1, 1), *((2, i) for i in range(60))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_torchrun_save_the_run(tmp_path, number):
    out = tmp_path / "run"
    args = [*WORLD, *SHORT, "--method", "nada", "--steps", "2000", "--save-every", "3"]
    job = torchrun(2, ROOT / "ipl.py", *args, "--out", out)
    while not (out / "checkpoint.pt").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    first = (out / "checkpoint.pt").stat().st_mtime_ns
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert job.returncode != 0 and "of 2000 steps are saved; the same command with --re" in err
    assert (out / "checkpoint.pt").stat().st_mtime_ns > first and not list(out.glob(".*"))
