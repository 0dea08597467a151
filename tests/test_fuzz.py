"""2,000 damaged files, in a process of its own; and proof that the check can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fuzz_checkpoints.py"


def fuzz(folder, seed, count, *loader):
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(seed), str(count), str(folder), *loader],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
    )


def test_damaged_files_load_or_are_refused(tmp_path):
    done = fuzz(tmp_path, 0, 2000)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.returncode, sorted(tmp_path.iterdir())[-1], done.stderr)
    *faults, summary = lines
    assert not faults
    assert summary["files"] == 2000 and summary["growth_mb"] < 1024
    assert 20 < summary["loaded"] < 1000  # neither harmless nor hopeless


@pytest.mark.parametrize(
    "loader, words",
    [("large", "memory"), ("type", "TypeError"), ("lines", "two"), ("path", "somewhere")],
)
def test_faults_are_seen(tmp_path, loader, words):
    done = fuzz(tmp_path, 0, 2, loader)
    first = json.loads(done.stdout.splitlines()[0])
    assert words in first["fault"] and (tmp_path / first["file"]).exists()


@pytest.mark.parametrize("loader", ["slow", "crash"])
def test_what_kills_is_seen(tmp_path, loader):
    done = fuzz(tmp_path, 0, 2, loader)
    assert done.returncode < 0 and not done.stdout
