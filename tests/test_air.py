"""AIR: its equations, what anchors must leave alone, and its command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command import SHORT, WORLD, same, stopping
from conftest import close, normal, rng

import ipl
from cli import air as command
from cli.run_folder import read_config
from variants import air

pytestmark = pytest.mark.filterwarnings("ignore:stage 1 learned little")
TINY = air.Config(
    method="nada", target="anime", steps=6, start=3, interval=2, latents=5, prompt_steps=3, ema=0.5,
    noise="fixed", eps=0.1, crop=0.2, steps_mapper=2, batch_mapper=4,
)  # fmt: skip


def run(cfg, source, clip_pair, **more):
    return air.adapt(cfg, source, clip_pair, rng=rng(), **more)


def plain(cfg, source, clip_pair):
    return ipl.adapt(cfg, source, [clip_pair], rng=rng())


def assert_equal(a, b):
    """Two results of stage 2, bit for bit: generators and histories."""
    assert a[2] == b[2]
    torch.testing.assert_close(a[0].state_dict(), b[0].state_dict(), rtol=0, atol=0)


def test_published_values():
    cfg = air.Config()
    assert (cfg.method, cfg.steps, cfg.start, cfg.interval) == ("nada", 301, 150, 30)
    assert (cfg.latents, cfg.truncation, cfg.prompt_steps, cfg.prompt_lr) == (1000, 0.7, 200, 0.001)
    assert (cfg.lr, cfg.batch, cfg.ema, cfg.betas, cfg.lambda_air) == (0.002, 2, 0.99, (0, 0.99), 1)


# ----------------------------------------------------------------------------------------------
# The equations


def test_mean_step_by_hand():
    before, after = normal(3, 4), normal(3, 4, seed=1)
    steps = [b / b.norm() - a / a.norm() for a, b in zip(before, after, strict=True)]
    mean = sum(x / x.norm() for x in steps)
    close(air.mean_step(before, after), mean / mean.norm())
    assert air.alignment(3 * mean, before, after) == pytest.approx(1, abs=1e-5)
    assert air.alignment(-mean, before, after) == pytest.approx(-1, abs=1e-5)


@pytest.mark.parametrize("source, target", [("photo", "anime"), ("photo", "pixel art"),
                                            ("pixel art", "photo")])  # fmt: skip
@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_labels_mixed_position_by_position(clip_pair, source, target, a):
    """As all 77 positions would be, padding and all."""
    model, length = clip_pair[0], clip_pair[0].context_length
    texts = [f"a photo of a {label}" for label in (source, target)]
    tokens = ipl.openai_clip().tokenize(texts, context_length=length)
    x, y = model.token_embedding(tokens.long())
    ctx, eot = x[None, 1:5], tokens[1:].argmax(dim=1)
    expected = ipl.encode_embeddings(model, ((1 - a) * x + a * y)[None], eot)
    found = air.encode_between(model, ctx, source, target, a)
    close(found, expected / expected.norm())


def test_the_prompt_learns_and_its_copies_stay_equal(clip_pair):
    model, cfg = clip_pair[0], replace(TINY, prompt_steps=20, prompt_lr=0.01)
    texts, ctx = air.label_texts(model, "photo"), normal(1, 4, 64) / 10
    goal = F.normalize(normal(texts.shape[1], seed=1), dim=-1)
    before = air.align_prompt(replace(cfg, prompt_steps=0), model, ctx, goal, texts, 0.5)
    one = air.align_prompt(cfg, model, ctx, goal, texts, 0.5)
    five = air.align_prompt(cfg, model, ctx.repeat(5, 1, 1), goal, texts, 0.5)
    assert one[2] < before[2] - 0.01 and (one[0] - ctx).abs().max() > 0.01
    close(five[0], one[0].expand(5, -1, -1), scale=1e-3)
    assert five[2] == pytest.approx(one[2], abs=1e-4)


def test_a_prompt_that_is_the_source_gives_the_first_direction(source, clip_pair, monkeypatch):
    """With T_P,k := T_source,k the corrected direction is that of the labels."""
    model, images = clip_pair[0], []
    texts, goal = (air.label_texts(model, x) for x in ("photo", "anime"))
    monkeypatch.setattr(
        air, "align_prompt", lambda *x: images.append(x[3]) or (x[2], texts.clone(), 0.0)
    )
    anchor = air.Anchor(source, TINY.latents, texts.clone())
    air.renew(TINY, anchor, source, clip_pair, 4)
    steps = F.normalize(F.normalize(goal, dim=-1) - F.normalize(texts, dim=-1), dim=-1)
    close(anchor.delta, F.normalize(steps.mean(dim=0), dim=-1))
    nada = ipl.label_direction(TINY, model)(torch.zeros(1, 1))[0]
    assert F.cosine_similarity(anchor.delta, nada, dim=0) > 0.98
    assert anchor.step == 4 and images[0].norm() == 0  # nothing has moved


# ----------------------------------------------------------------------------------------------
# Training


def test_no_anchor_before_the_start(source, clip_pair):
    *with_anchors, rows = run(TINY, source, clip_pair)
    nada = plain(TINY, source, clip_pair)
    assert [row["step"] for row in rows] == [4]
    assert with_anchors[2][:4] == nada[2][:4] and with_anchors[2][4:] != nada[2][4:]
    *late, rows = run(replace(TINY, start=6), source, clip_pair)
    assert not rows
    assert_equal(late, nada)


@pytest.mark.parametrize("method", ["nada", "ipl"])
@pytest.mark.parametrize("noise", ["fixed", "fresh"])
def test_without_its_weight_it_is_the_method_below_to_the_bit(source, clip_pair, method, noise):
    cfg = replace(TINY, lambda_air=0, method=method, noise=noise)
    *found, rows = run(cfg, source, clip_pair)
    assert len(rows) == 1
    assert_equal(found, plain(cfg, source, clip_pair))


def test_at_an_anchor_the_offset_is_nothing_and_the_loss_one(source, clip_pair):
    """0/0, guarded by eps; without noise nor eps it is refused."""
    cfg = replace(TINY, lambda_air=0.25)
    history, nada = run(cfg, source, clip_pair)[2], plain(cfg, source, clip_pair)[2]
    assert history[4]["loss"] == pytest.approx(nada[4]["loss"] + 0.25, abs=1e-4)
    assert history[4]["grad_norm"] < 100
    assert abs(history[5]["loss"] - nada[5]["loss"] - 0.25) > 1e-3  # it has begun to move
    with pytest.raises(ValueError, match="0 by 0 at an anchor"):
        run(replace(cfg, eps=0.0), source, clip_pair)
    assert run(replace(cfg, eps=0.0, noise="fresh"), source, clip_pair)[3]  # published: noise


def test_the_anchor_is_the_raw_generator(source, clip_pair):
    raw = {}

    def look(stage, total, state):
        for step in range(total):
            if step == 3:  # the next thing is the anchor
                raw.update({name: x.clone() for name, x in state["target"].state_dict().items()})
            yield step
            raw["anchor"] = state["anchor"].generator.state_dict()

    cfg, true = replace(TINY, interval=3, steps=4), normal(5, 32, seed=2)
    *_, rows = run(cfg, source, clip_pair, steps=look, true_features=true)
    torch.testing.assert_close(raw.pop("anchor"), raw, rtol=0, atol=0)
    assert any((x != source.state_dict()[name]).any() for name, x in raw.items())
    ((step, _, cos_air, cos, left),) = (row.values() for row in rows)
    assert step == 3 and left > 0 and -1 <= cos_air <= 1 and -1 <= cos <= 1 and cos_air != cos


# ----------------------------------------------------------------------------------------------
# The command

ARGS = [*WORLD, *SHORT, "--steps", "6", "--start", "2", "--interval", "2", "--latents", "5"]
ARGS += ["--prompt-steps", "3", "--samples", "1", "--save-every", "1"]


def done(out, *words):
    command.main([*ARGS, "--out", out, *words])


@pytest.mark.parametrize("method", ["nada", "ipl"])
def test_anchors_survive_being_stopped(tmp_path, method):
    """Before the first anchor, at it, at one of others, after it."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    done(whole, "--method", method)
    before = 2 * (method == "ipl")
    for step in (before + 2, 1, 2):
        with stopping(step), pytest.raises(SystemExit):
            done(again, "--method", method, "--resume")
    done(again, "--method", method, "--resume")
    same(again, whole)
    lines = (whole / "anchors.jsonl").read_text()
    assert (again / "anchors.jsonl").read_text() == lines
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [2, 4]
    assert read_config(whole).method == method  # python ipl.py sample can read it


@pytest.mark.parametrize("words, line", [
    ("--latents 0", "counts from 1"),
    ("--lambda-air nan", "lambda_air from 0"),
    ("--noise fixed", "0 by 0"),
    ("--generator miniature-ddpm", "wanted: python ipl.py"),
])  # fmt: skip
def test_bad_input(tmp_path, capsys, words, line):
    with pytest.raises(SystemExit) as stop:
        command.main([*ARGS, *words.split(), "--out", tmp_path / "run"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and line in err and len(err.splitlines()) == 1
    assert not Path(tmp_path / "run").exists()
