"""Several processes on one run, by torchrun and gloo. Run by torchrun, this file is the worker."""

import copy
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import get_total_norm

sys.path[:0] = [str(Path(__file__).parents[1])]  # torchrun knows no pytest

from command import NADA, SHORT, WORLD, done, history_of, start, until_saved  # noqa: E402

import ipl  # noqa: E402
from checkpoints import load_generator  # noqa: E402
from cli import processes  # noqa: E402

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def torchrun(number, *words, **more):
    return start(*words, before=[*TORCHRUN, str(number)], PYTHONWARNINGS="ignore", **more)


def ours(err):
    return [line for line in err.splitlines() if line.startswith("ipl.py")]


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
    direction = ipl.label_direction(cfg, pair[0])
    if method == "ipl":
        direction = ipl.prompt_directions(cfg, pair[0], mapper)
    target = copy.deepcopy(generator)
    _, rows = ipl.adapt_generator(cfg, generator, [pair], [direction], rng=rng, target=target)
    gradients |= {name: p.grad for name, p in target.named_parameters() if p.grad is not None}
    return history + rows, gradients


CASES = [("ipl", "adaptive"), ("nada", "all")]

if __name__ == "__main__":
    torch.manual_seed(int(os.environ["RANK"]))  # what ranks share comes from their arguments alone
    processes.join(torch.device("cpu"))
    found = [one_step(*case) for case in CASES]
    torch.save(found, f"{sys.argv[1]}/{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:stage 1 learned", "ignore:after 1 steps")
def test_two_processes_are_one_of_twice_the_batch(tmp_path):
    job = torchrun(2, tmp_path, script="tests/test_processes.py")
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


@pytest.mark.parametrize(
    "words, line",
    [
        (["--batch", "3"], "--batch 3; wanted: a multiple of 2, the number of processes"),
        (["--overwrite", "--resume"], "--resume goes on with a run and --overwrite begins anew"),
        ([], "has a samples.png; wanted: another --out, or --overwrite"),  # rank 0 alone can see it
    ],
)
def test_what_all_processes_refuse_is_said_once(tmp_path, words, line):
    (tmp_path / "samples.png").write_text("mine")
    job = torchrun(2, *WORLD, *SHORT, *words, "--out", tmp_path)
    _, err = job.communicate()
    assert job.returncode != 0 and len(ours(err)) == 1 and line in ours(err)[0]
    assert len(list(tmp_path.iterdir())) == 1


def test_targets_are_spread_over_processes(tmp_path):
    words = [*WORLD, *NADA, "--seed", "3"]
    words += ["--target", "anime", "--target", "sketch", "--target", "a  zombie"]
    job = torchrun(2, *words, "--out", tmp_path / "spread")
    _, err = job.communicate()
    assert job.returncode == 0, err
    done(*words, "--out", tmp_path / "in a row")
    names = [f"photo-to-{name}-nada" for name in ("a-zombie", "anime", "sketch")]
    for folder in ("spread", "in a row"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == names
    for name in names:
        rows, expected = (history_of(tmp_path / x / name) for x in ("spread", "in a row"))
        for row, wanted in zip(rows, expected, strict=True):
            assert row.pop("layers") == wanted.pop("layers")
            assert row == pytest.approx(wanted, rel=1e-4)  # other numbers of threads


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
    words = [*WORLD, *SHORT, "--steps", "60", "--save-every", "3", "--out", out]
    job = torchrun(2, *words)
    try:
        until_saved(job, out)
        os.kill(workers(job)[rank], 9)
        _, err = job.communicate(timeout=60)
    finally:
        job.kill()
    lost = "lost the other processes of this run; the same command with --resume goes on"
    assert job.returncode != 0 and f"ipl.py: error: rank {1 - rank}: {lost}" in err
    again = torchrun(1 + rank, *words, "--resume")  # with one, or with two
    said, err = again.communicate()
    assert again.returncode == 0, err
    assert said.count("samples.png") == 1 and len(list(out.iterdir())) == 6  # of rank 0 alone
    steps = [(row["stage"], row["step"]) for row in history_of(out)]
    assert steps == [(1, 0), (1, 1), *((2, i) for i in range(60))]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_torchrun_save_the_run(tmp_path, number):
    out = tmp_path / "run"
    job = torchrun(2, *WORLD, *NADA, "--steps", "2000", "--save-every", "3", "--out", out)
    until_saved(job, out)
    first = (out / "checkpoint.pt").stat().st_mtime_ns
    job.send_signal(number)
    _, err = job.communicate(timeout=60)
    assert job.returncode != 0 and "of 2000 steps are saved; the same command with --re" in err
    assert (out / "checkpoint.pt").stat().st_mtime_ns > first and not list(out.glob(".*"))
