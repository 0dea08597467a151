"""Several processes on one run, by torchrun and gloo. Run by torchrun, this file is the worker."""

import copy
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from command import NADA, ROOT, SHORT, WORLD, done, finish, history_of, names, start, until_saved
from torch.nn.utils import get_total_norm

import ipl
from checkpoints import load_generator
from cli import processes

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def alike(row, expected, rel=1e-5):
    """Two rows of a history: the same layers, and numbers close to each other."""
    assert row.pop("layers", None) == expected.get("layers")
    expected = {name: value for name, value in expected.items() if name != "layers"}
    assert row == pytest.approx(expected, rel=rel, abs=1e-6)


def torchrun(number, *words, **more):
    more |= {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    return start(*words, before=[*TORCHRUN, str(number)], **more)


# ----------------------------------------------------------------------------------------------
# The worker: one step of both stages -> losses, chosen layers, gradients


def one_step(method, layers, bank=0):
    cfg = ipl.Config(
        noise="fixed", eps=0.1, crop=0.2, batch=4, batch_mapper=8, layer_batch=8, steps=1,
        steps_mapper=1, num_layers=3, lambda_source=0.5, layers=layers, bank=bank,
        lambda_image=0.5,
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


CASES = [("ipl", "adaptive"), ("nada", "all"), ("ipl", "all", 16)]

if __name__ == "__main__":
    torch.manual_seed(int(os.environ["RANK"]))  # what ranks share comes from their arguments alone
    processes.join(torch.device("cpu"))
    found = [one_step(*case) for case in CASES]
    torch.save(found, f"{sys.argv[1]}/{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
    processes.leave()


@pytest.mark.filterwarnings("ignore:stage 1 learned", "ignore:after 1 steps")
def test_two_processes_are_one_of_twice_the_batch(tmp_path):
    finish(torchrun(2, tmp_path, script="tests/test_processes.py"))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for case, *of_ranks in zip(CASES, first, second, strict=True):
        history, gradients = one_step(*case)
        for rows, grads in of_ranks:
            for row, expected in zip(rows, history, strict=True):
                alike(row, expected)
            assert grads.keys() == gradients.keys()
            for part in ("mapper.", "conv"):  # a noise strength alone is a sum that all but cancels
                whole = {name: x for name, x in gradients.items() if name.startswith(part)}
                difference = get_total_norm([grads[name] - x for name, x in whole.items()])
                assert difference < 1e-5 * get_total_norm(whole.values()) and len(whole) > 7


# ----------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "words, line",
    [("--batch 3", "a multiple of 2"), ("", "samples.png")],  # that one rank 0 alone can see
)
def test_what_all_processes_refuse_is_said_once(tmp_path, words, line):
    (tmp_path / "samples.png").write_text("mine")
    job = torchrun(2, *WORLD, *SHORT, *words.split(), "--out", tmp_path)
    ours = [x for x in job.communicate()[1].splitlines() if x.startswith("ipl.py")]
    assert job.returncode != 0 and len(ours) == 1 and line in ours[0]
    assert names(tmp_path) == {"samples.png"}


def test_targets_are_spread_over_processes(tmp_path):
    words = [*WORLD, *NADA, "--seed", "3"]
    words += ["--target", "anime", "--target", "sketch", "--target", "a  zombie"]
    spread, in_a_row = tmp_path / "spread", tmp_path / "in a row"
    finish(torchrun(2, *words, "--out", spread))
    done(*words, "--out", in_a_row)
    made = {f"photo-to-{name}-nada" for name in ("a-zombie", "anime", "sketch")}
    assert names(spread) == names(in_a_row) == made
    for name in made:
        rows = zip(history_of(spread / name), history_of(in_a_row / name), strict=True)
        for row, expected in rows:
            alike(row, expected, rel=1e-4)  # other numbers of threads


def workers(job):
    """{rank: process id} of the processes that torchrun has started."""
    found = {}
    for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
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
    assert job.returncode != 0 and f"ipl.py: error: rank {1 - rank}: lost the other" in err
    said, _ = finish(torchrun(1 + rank, *words, "--resume"))  # with one, or with two
    assert said.count("samples.png") == 1 and len(names(out)) == 6  # of rank 0 alone
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
    assert job.returncode != 0 and "of 2000 steps are saved" in err
    assert (out / "checkpoint.pt").stat().st_mtime_ns > first and not list(out.glob(".*"))
