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

import torch
from safetensors.torch import load_file

import cli

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


def start(*words, folder=ROOT, before=(sys.executable,), script="ipl.py", **environment):
    """A process of its own, with stdout and stderr piped."""
    return subprocess.Popen(
        [*before, str(ROOT / script), *map(str, words)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by jobs in "&"
    )


def until_saved(job, out):
    """Waits for the first checkpoint of a process."""
    while not (out / "checkpoint.pt").exists():
        assert job.poll() is None, job.communicate()
        time.sleep(0.002)


def history_of(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def result(run):
    """What a run results in: {name: tensor} of its networks, and its history."""
    state = torch.load(run / "generator.pt", weights_only=True)
    tensors = {**state["g_ema"], "latent_avg": state["latent_avg"]}
    if (run / "mapper.safetensors").exists():
        tensors |= load_file(run / "mapper.safetensors")
    return tensors, history_of(run)


def same(run, expected):
    """To the bit."""
    (tensors, history), (wanted, rows) = result(run), result(expected)
    assert tensors.keys() == wanted.keys() and history == rows
    assert all(torch.equal(x, wanted[name]) for name, x in tensors.items())
