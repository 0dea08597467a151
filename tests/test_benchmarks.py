"""The benchmarks: both orders of a step are the same mathematics, and they run to the end."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, close, normal, rng

import ipl
from benchmarks import growth, ops, published_order, step, worlds
from checkpoints import load_generator

CFG = ipl.Config(
    noise="fixed", eps=0.1, num_layers=4, batch_mapper=3, batch=2, layer_batch=2, steps=1,
    steps_mapper=1, lambda_source=0.5,
)  # fmt: skip


def build(size=32, device="cpu"):
    generator = load_generator(GOLDEN / "rosinality_tiny.pt", device)
    return worlds.World(CFG, generator, *ipl.load_clip(GOLDEN / "clip_tiny.pt", device))


def same(ours, theirs):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        close(p, q)
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            close(p.grad, q.grad)


@pytest.mark.filterwarnings("ignore:stage 1 learned little", "ignore:after 1 steps")
@pytest.mark.parametrize("residual", ["published", "label", "none"])
def test_the_published_order_is_the_same_mathematics(residual):
    world = build()._replace(cfg=replace(CFG, residual=residual))
    cfg, source, clip_model, transform = world
    z = {n: normal(n, source.z_dim, seed=n) for n in (2, 3)}
    mapper = ipl.LatentMapper(source.w_dim, cfg.n_ctx, 64, rng())
    directions = [ipl.prompt_directions(cfg, clip_model, copy.deepcopy(mapper))]
    frozen = cfg, source, copy.deepcopy(clip_model).requires_grad_(), transform
    more = {"rng": rng(), "draw_z": z.get, "steps": lambda stage, total, state: range(total)}

    theirs = copy.deepcopy(mapper)
    optimizer = published_order.adam(cfg, 1, theirs)
    loss = published_order.mapper_step(*frozen, theirs, optimizer, z[3])
    ours, history = ipl.train_mapper(*world, mapper=copy.deepcopy(mapper), **more)
    close(history[0]["loss"], loss)
    same(ours, theirs)

    target, theirs = worlds.moved(source), worlds.moved(source)
    their_average = copy.deepcopy(source)
    networks = mapper, theirs, their_average, published_order.adam(cfg, 2, theirs)
    loss, layers = published_order.generator_step(*frozen, *networks, z[2], z[2])
    average, history = ipl.adapt_generator(
        cfg, source, [(clip_model, transform)], directions, target=target, **more
    )
    close(history[0]["loss"], loss)
    assert layers == history[0]["layers"] and len(layers) == cfg.num_layers
    assert abs(loss - 1) > 1e-3  # that of equal images
    same(target, theirs)
    same(average, their_average)
    assert all(p.grad is not None for p in frozen[2].visual.parameters())
    assert all(p.grad is None for p in clip_model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--same-malloc"]])
def test_steps_from_end_to_end(tmp_path, capsys, monkeypatch, flags):
    kept = []
    monkeypatch.setattr(step, "keep_memory", kept.append)
    step.main([*f"--sizes 32 --repeats 1 --layer-batch 3 --out {tmp_path}".split(), *flags], build)
    assert set(kept[::2]) == {True} and set(kept[1::2]) == {bool(flags)}  # ours and theirs in turn
    lines = capsys.readouterr().out.splitlines()
    assert [line[:15] for line in lines[4:6]] == ["32 px, stage 1 ", "32 px, stage 2 "]
    found = json.loads((tmp_path / "step.json").read_text())
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert {"cpu", "threads", "torch", "seed"} <= found["hardware"].keys()
    assert found["same malloc"] == bool(flags)
    assert [row["batches"] for row in found["steps"]] == ["3", "2+3*"]
    for row in found["steps"]:
        assert row["loss"]["ours"] == pytest.approx(row["loss"]["published"], rel=1e-4)
        assert 0 < row["memory_ratio"] < 1 and 0 < row["of_peak"]["with choice"] < 1
        for way, parts in row["parts"].items():
            target = {"layer choice", "trainable generator", "CLIP of target"}  # of stage 2 alone
            zero = {name for name, seconds in parts.items() if seconds <= 0}
            assert zero <= (target if row["stage"] == 1 else set())
            assert sum(parts.values()) == pytest.approx(row["seconds"][way], rel=5)


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--stages 1 --repeats 1", "32 px, stage 1: loss is .* in the published order"),
        ("--repeats 0", "--repeats is 0"),
        ("--batch 0", "--batch is 0"),
        ("--device tpu", "tpu"),
    ],
)
def test_what_is_not_timed(tmp_path, capsys, monkeypatch, argv, words):
    """A published order that differs, and what there is none of: a line each."""
    different = lambda clip_model, ctx, label: ctx.mean(dim=1) @ clip_model.text_projection  # noqa: E731
    monkeypatch.setattr(published_order, "encode_prompts", different)
    with pytest.raises(SystemExit) as exit_:
        step.main(f"--sizes 32 --out {tmp_path} {argv}".split(), build)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and re.search(words, line) and not list(tmp_path.iterdir())


def test_operators_need_a_gpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ops"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^benchmarks.ops needs a CUDA device$"):
        ops.main()


@pytest.mark.slow
def test_growth_from_end_to_end(tmp_path, capsys):
    argv = f"--resolutions 32 --batches 2 3 --processes 2 --repeats 1 --out {tmp_path}".split()
    growth.main(argv, build)
    found = json.loads((tmp_path / "growth.json").read_text())["growth"]
    assert (tmp_path / "growth.png").stat().st_size > 1000
    points = {axis: list(rows["2"]["seconds"]) for axis, rows in found.items()}
    assert points == {"resolution": ["32"], "batch": ["2", "3"], "processes": ["2"]}
    assert all(x > 0 for rows in found.values() for x in rows["1"]["seconds"].values())
    assert "Each process has one thread" in capsys.readouterr().out


def test_a_series_ends_before_it_takes_too_long():
    found, ended = growth.series([1, 2, 4, 8], 2, 60, lambda x: 3.0 * x**2)
    assert found == {1: 3, 2: 12, 4: 48} and ended == "8 left out: a step could take 192 s"
    assert growth.exponent(found) == pytest.approx(2)
    assert growth.exponent({1: 3.0}) is None
