"""2,000 damaged files, in a process of its own; and proof that the check can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import CheckpointError
from tests.fuzz_checkpoints import fault


def fuzz(folder, count, faulty=None):
    """faulty: the source of a loader that does wrong."""
    code = "import pathlib, signal, torch; from tests.fuzz_checkpoints import main; "
    code += f"hoard = []; main(0, {count}, pathlib.Path({str(folder)!r}), {faulty})"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_damaged_files_load_or_are_refused(tmp_path):
    done = fuzz(tmp_path, 2000)
    assert done.returncode == 0, (done.returncode, sorted(tmp_path.iterdir())[-1], done.stderr)
    *faults, summary = map(json.loads, done.stdout.splitlines())
    assert not faults
    assert summary["files"] == 2000 and summary["growth_mb"] < 1024
    assert 20 < summary["loaded"] < 1000  # neither harmless nor hopeless


@pytest.mark.slow
def test_what_takes_all_memory_or_time_or_kills_is_seen(tmp_path):
    done = fuzz(tmp_path, 1, "lambda path: hoard.append(torch.ones(2**29))")
    first = json.loads(done.stdout.splitlines()[0])
    assert "memory" in first["fault"] and (tmp_path / first["file"]).exists()
    for faulty in ("sum(range(10**10))", "signal.raise_signal(signal.SIGSEGV)"):
        done = fuzz(tmp_path, 1, f"lambda path: {faulty}")
        assert done.returncode < 0 and not done.stdout


def test_other_faults_are_seen(tmp_path):
    for message in (f"{tmp_path}: one\ntwo", "somewhere: something"):

        def load(path, message=message):
            raise CheckpointError(message)

        assert fault(load, tmp_path) == (f"message {message!r}", False)
    assert fault(lambda path: [][path], tmp_path)[0].startswith("TypeError: ")
