"""The experiments on the embedded world: miniature/evaluate.py and miniature/inspect.py."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import rng

import ipl
import miniature
from cli.settings import MINIATURE
from miniature import evaluate, faces, inspect

SHORT = replace(MINIATURE, steps=1, batch=2, steps_mapper=1, batch_mapper=4)
HASTY = pytest.mark.filterwarnings("ignore:after 1 steps", "ignore:stage 1 learned little")


def test_interval_is_students():
    assert evaluate.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3, pytest.approx(1.963, abs=0.001))


@HASTY
@pytest.mark.slow
def test_evaluate_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PUBLISHED", {"residual": "published"})
    cfg = evaluate.Config(("anime",), seeds=(1, 2), out=tmp_path, n=16, processes=1, preset=SHORT)
    evaluate.main(cfg)
    table = (tmp_path / "table.md").read_text()
    assert all(x in table for x in (*evaluate.METHODS, "ipl − nada", "truth", "±"))
    monkeypatch.setattr(evaluate, "train", None)  # whatever is finished is not done again
    evaluate.main(cfg)
    assert (tmp_path / "table.md").read_text() == table
    (tmp_path / "anime-nada-2.json").unlink()
    with pytest.raises(TypeError):
        evaluate.main(cfg)
    other = replace(cfg, n=17, preset=replace(SHORT, lr=0.5))
    with pytest.raises(ValueError, match="rows of another n, lr; wanted: a new --out"):
        evaluate.main(other)


@HASTY
@pytest.mark.slow
def test_evaluate_shares_the_machine(tmp_path):
    cfg = evaluate.Config(("anime",), ("nada", "ipl"), seeds=(1,), n=16, preset=SHORT)
    for processes in (1, 2):
        evaluate.main(replace(cfg, out=tmp_path / str(processes), processes=processes))
    first, second = (torch.load(tmp_path / n / "anime-ipl-1.pt", weights_only=True) for n in "12")
    torch.testing.assert_close(first, second, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"targets": ("cyberpunk",)}, "--targets cyberpunk; wanted: anime, sketch"),
        ({"methods": ("nada", "nada")}, "--methods is empty, or names one twice"),
        ({"preset": replace(MINIATURE, source="anime")}, "--preset.source is fixed"),
        ({"run": Path("nowhere")}, "nowhere is no finished run"),
    ],
)
def test_evaluate_refuses(tmp_path, asked, answer):
    with pytest.raises(ValueError, match=answer):
        evaluate.main(evaluate.Config(out=tmp_path / "out", **asked))
    assert not (tmp_path / "out").exists()


def test_evaluate_answers_in_one_line():
    command = [sys.executable, "-m", "miniature.evaluate", "--processes", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("evaluate: error: --processes must be")


@pytest.mark.parametrize("domain", ["monster", "anime"])
def test_inspect_knows_the_truth(domain):
    persons = faces.sample_persons(64, rng(inspect.Config.seed))
    row = inspect.row(*ipl.load_clip(miniature.CLIP), persons, domain)
    assert 0 < row["floor"] < 0.5 and row["caption"] > row["NADA"] > 0.5
    assert max(row[cue] for cue in faces.CUES) <= 0.75  # none carries the way alone
    if domain == "monster":  # changes by who it is, and the language can say so
        assert row["room"] >= 0.3 and row["caption"] >= row["NADA"] + 0.15
