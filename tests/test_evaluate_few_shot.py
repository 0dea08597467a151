"""miniature/evaluate_few_shot.py: its own figures by hand, and a run from end to end."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import normal
from test_evaluate import HASTY, one_painter  # noqa: F401

from miniature import evaluate, evaluate_few_shot, faces
from variants import fewshot

CFG = evaluate_few_shot.Config(
    ("anime",), ("tgan", "rssa"), words=(), shots=(1, 2), seeds=(1, 2), n=16, held_out=4,
    processes=1, moments=(0.5,), preset=fewshot.Config(steps=2, batch=2, ema=0.5),
)  # fmt: skip


def test_a_cluster_without_a_pair_counts_nothing():
    centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    features = torch.tensor([[0.0, 1.0], [0.0, -1.0], [10.0, 1.0]])
    assert evaluate_few_shot.in_clusters(features, centers) == pytest.approx(2 / 3)
    many = torch.cat([features[:2], 100 * torch.ones(9, 2)])
    assert evaluate_few_shot.in_clusters(many, centers[:1], at_most=2) == pytest.approx(2)


def test_copies_are_nearer_to_the_shots_than_the_truth_is():
    true, shots = normal(40, 8), normal(4, 8, seed=1)
    same = evaluate_few_shot.of_shots(true, true, shots)
    assert same == {"clusters": 1, "nearest": 1}
    copies = evaluate_few_shot.of_shots(shots.repeat(10, 1), true, shots)
    assert copies["nearest"] < 0.01 and copies["clusters"] < 0.01


@pytest.mark.parametrize("n", [1, 3, 5, 40])
def test_the_discriminator_is_asked_in_whole_groups(n):
    class Signs(torch.nn.Module):
        stddev_group = 4

        def forward(self, x):
            assert len(x) % 4 == 0
            return x.mean((1, 2, 3))[:, None]

    images = torch.ones(n, 3, 2, 2)
    images[0] *= -1
    right = [evaluate_few_shot.share_right(Signs(), images, real) for real in (True, False)]
    assert right == pytest.approx([(n - 1) / n, 1 / n])


def test_from_how_many_shots_on():
    cfg = replace(CFG, methods=("cdc",), shots=(1, 5, 10))
    figures = {("cdc", 1): 3, ("cdc", 5): 1, ("cdc", 10): 1, ("nada", 0): 2, ("ipl", 0): 0}

    def mean(target, method, k, name):
        return figures[method, k]

    def since(word):
        return evaluate_few_shot.better_from(cfg, mean, "anime", "cdc", word)

    assert (since("nada"), since("ipl")) == ("5", "none")
    figures["cdc", 10] = 2  # no better in the end
    assert since("nada") == "none"
    figures |= {("cdc", 1): 1, ("cdc", 10): 1}
    assert since("nada") == "1"
    cfg = replace(cfg, methods=("rssa",), shots=(1,))  # which needs two: there is nothing to say
    assert evaluate_few_shot.better_from(cfg, mean, "anime", "rssa", "nada") == ""


def test_a_table_without_words_says_nothing_of_them():
    cfg = replace(CFG, words=(), targets=("anime",), methods=("tgan",), shots=(5,), seeds=(1,))
    row = dict.fromkeys(evaluate_few_shot.SHOWN, 0.5) | {"seconds": 5400.0, "device": "cpu"}
    keys = ("source", 0, None), ("truth", 0, None), ("tgan", 5, 1)
    rows = {("anime", *key): row for key in keys}
    said = evaluate_few_shot.table(cfg, rows)
    assert ", seed 1; " in said and "took 1.5 hours" in said
    assert not any(x in said for x in ("words", "NADA", "GPU"))
    rows["anime", "tgan", 5, 1] = row | {"device": "cuda"}
    assert "was on a GPU in 1 of 1 runs" in evaluate_few_shot.table(cfg, rows)


@HASTY
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:D sees each shot", "ignore:the average will be")
def test_from_end_to_end_and_on_where_it_was(tmp_path, monkeypatch, one_painter):  # noqa: F811
    cfg = replace(CFG, out=tmp_path, words=("nada",))
    short = replace(evaluate.MINIATURE, steps=1, batch=2)
    monkeypatch.setattr(evaluate, "MINIATURE", short)
    plain = evaluate.Config
    monkeypatch.setattr(evaluate, "Config", lambda **x: plain(preset=short, bank=4, **x))
    evaluate_few_shot.main(cfg)
    words = (tmp_path / "table.md").read_text()
    assert all(x in words for x in ("| NADA |", "| tgan, 1 |", "| rssa, 2 |", "| anime | tgan |"))
    assert "rssa, 1" not in words  # which needs two shots
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [x["step"] for x in rows[-1]["moments"]] == [1, 2] and 0 < rows[-1]["clusters"] < 3
    first, second = (x.count("|") for x in words.splitlines()[4:6])
    assert first == second == 4  # a header and the line below it, as Markdown wants
    monkeypatch.setattr(evaluate_few_shot, "run_any", None)  # what is finished is not done again
    evaluate_few_shot.main(cfg)
    assert (tmp_path / "table.md").read_text() == words
    with pytest.raises(ValueError, match="rows of another few shots: lr; wanted: a new --out"):
        evaluate_few_shot.main(replace(cfg, preset=replace(cfg.preset, lr=0.5)))


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ({"targets": ("cyberpunk",)}, "--targets cyberpunk; wanted: anime, sketch"),
        ({"methods": ("tgan", "ada")}, "--methods ada; wanted: tgan, freezed"),
        ({"methods": ()}, "--methods is empty"),
        ({"methods": ("rssa",), "shots": (1,)}, "wanted: --shots from 2"),
        ({"words": ("few",)}, "--words few; wanted: nada"),
        ({"shots": (5, 5)}, "--shots 5, 5; wanted: numbers from 1 on"),
        ({"moments": (25,)}, "--moments between 0 and 1"),
        ({"preset": fewshot.Config(steps=0)}, "--steps must be at least 1"),
        ({"preset": fewshot.Config(method="ewc")}, "wanted: --methods"),
    ],
)
def test_refuses(tmp_path, asked, answer):
    with pytest.raises(ValueError, match=answer):
        evaluate_few_shot.main(evaluate_few_shot.Config(out=tmp_path / "out", **asked))
    assert not (tmp_path / "out").exists()


def test_held_out_pictures_stay_the_same():
    first, again = (evaluate_few_shot.held_out.__wrapped__("anime", 2) for _ in range(2))
    assert first.equal(again) and first.shape == (2, 3, faces.SIZE, faces.SIZE)
