"""Calling the command line: short runs of tiny networks, in this process or in one of their own."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

import cli
import ipl

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
WORLD = ["--generator", str(GOLDEN / "rosinality_tiny.pt"), "--clip", str(GOLDEN / "clip_tiny.pt")]
SHORT = "--steps-mapper 2 --batch-mapper 4 --steps 2 --layer-batch 2 --samples 3".split()
NADA = "--method nada --layers all --steps 2 --samples 1".split()  # the shortest run


def answer(*words):
    """(exit code, stdout, stderr) of a command line, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(word) for word in words])
        except SystemExit as exit_:
            code = exit_.code
    return code, out.getvalue(), err.getvalue()


def done(*words):
    """What a command line that has to succeed says on stdout."""
    code, out, err = answer(*words)
    assert code == 0, err
    return out


def stopping(n, error=KeyboardInterrupt):
    """Inside, a run of this process ends with an error in its n-th step, of both stages."""

    def counted(stage, total, state, done=0):
        nonlocal n
        for step in range(done, total):
            if n == 0:
                raise error
            n -= 1
            yield step

    return mock.patch.object(ipl, "progress", counted)


def start(*words, folder=ROOT, before=(sys.executable,), script="ipl.py", **environment):
    """A process of its own, with stdout and stderr piped."""
    return subprocess.Popen(
        [*before, str(ROOT / script), *map(str, words)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        preexec_fn=hear_signals,
    )


def hear_signals():
    """Those that nohup and jobs in "&" ignore, and hand down."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finish(job):
    """(stdout, stderr) of a process that has to succeed."""
    out, err = job.communicate()
    assert job.returncode == 0, err
    return out, err


def until_saved(job, out):
    """Waits for the first checkpoint of a process."""
    while not (out / "checkpoint.pt").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.002)


def two_clips(folder):
    """The flags of the small CLIP and of one that sees the opposite."""
    state, path = torch.load(WORLD[3], weights_only=True), str(folder / "other.pt")
    torch.save(state | {"visual.proj": -state["visual.proj"]}, path)
    return ["--clip", WORLD[3], path, "--clip-weights", "1", "0.5"]


def names(folder):
    return {path.name for path in folder.iterdir()}


def history_of(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def networks(run):
    """{name: tensor} of what a run has trained."""
    state, mapper = torch.load(run / "generator.pt", weights_only=True), run / "mapper.safetensors"
    more = load_file(mapper) if mapper.exists() else {}
    return {**state["g_ema"], "latent_avg": state["latent_avg"], **more}


def same(run, expected):
    """The same networks, to the bit, and the same history."""
    assert history_of(run) == history_of(expected)
    torch.testing.assert_close(networks(run), networks(expected), rtol=0, atol=0)
