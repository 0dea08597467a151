"""2,000 damaged files, in a process of its own; and proof that the check can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz_checkpoints import LOADERS, fault


def fuzz(folder, count, *loader):
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz_checkpoints", "0", str(count), str(folder), *loader],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_damaged_files_load_or_are_refused(tmp_path):
    done = fuzz(tmp_path, 2000)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, (done.returncode, sorted(tmp_path.iterdir())[-1], done.stderr)
    *faults, summary = lines
    assert not faults
    assert summary["files"] == 2000 and summary["growth_mb"] < 1024
    assert 20 < summary["loaded"] < 1000  # neither harmless nor hopeless


@pytest.mark.parametrize("name, words", [("type", "TypeError"), ("lines", "two"), ("path", "some")])
def test_faults_are_seen(tmp_path, name, words):
    assert words in fault(LOADERS[name], tmp_path / "x")[0]


@pytest.mark.slow
def test_what_takes_all_memory_or_time_or_kills_is_seen(tmp_path):
    first = json.loads(fuzz(tmp_path, 1, "large").stdout.splitlines()[0])
    assert "memory" in first["fault"] and (tmp_path / first["file"]).exists()
    for loader in ("slow", "crash"):
        done = fuzz(tmp_path, 1, loader)
        assert done.returncode < 0 and not done.stdout
