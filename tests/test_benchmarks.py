"""The benchmarks: both orders of a step are the same mathematics, and they run to the end."""

import copy
import json
from dataclasses import replace
from functools import partial

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


@pytest.mark.filterwarnings("ignore:stage 1 learned little", "ignore:after 1 steps")
@pytest.mark.parametrize("residual", ["published", "label", "none"])
def test_the_published_order_is_the_same_mathematics(residual):
    world = build()._replace(cfg=replace(CFG, residual=residual))
    cfg, source, clip_model, transform = world
    z = {n: normal(n, source.z_dim, seed=n) for n in (2, 3)}
    mapper = ipl.LatentMapper(source.w_dim, cfg.n_ctx, 64, rng())
    directions = [ipl.prompt_directions(cfg, clip_model, copy.deepcopy(mapper))]
    frozen = cfg, source, copy.deepcopy(clip_model).requires_grad_(), transform

    theirs = copy.deepcopy(mapper)
    optimizer = published_order.adam(cfg, 1, theirs)
    loss = published_order.mapper_step(*frozen, theirs, optimizer, z[3])
    more = {"rng": rng(), "draw_z": z.get, "steps": lambda stage, total, state: range(total)}
    ours, history = ipl.train_mapper(*world, mapper=copy.deepcopy(mapper), **more)
    close(history[0]["loss"], loss)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(p.grad, q.grad)
        close(p, q)

    target, theirs = worlds.moved(source), worlds.moved(source)
    their_average = copy.deepcopy(source)
    optimizer = published_order.adam(cfg, 2, theirs)
    networks = mapper, theirs, their_average, optimizer
    loss, layers = published_order.generator_step(*frozen, *networks, z[2], z[2])
    average, history = ipl.adapt_generator(
        cfg, source, [(clip_model, transform)], directions, target=target, **more
    )
    close(history[0]["loss"], loss)
    assert layers == history[0]["layers"] and len(layers) == cfg.num_layers
    assert abs(loss - 1) > 1e-3  # that of equal images
    for (name, p), q in zip(target.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            close(p.grad, q.grad)
    for p, q in zip(average.parameters(), their_average.parameters(), strict=True):
        close(p, q)
    assert all(p.grad is not None for p in frozen[2].visual.parameters())
    assert all(p.grad is None for p in clip_model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--same-malloc"]])
def test_steps_from_end_to_end(tmp_path, capsys, monkeypatch, flags):
    """Freed memory is kept by ours always, by the published order with --same-malloc only."""
    keep_memory, now, kept = step.keep_memory, [None], {}
    monkeypatch.setattr(step, "keep_memory", lambda keep: (now.append(keep), keep_memory(keep)))

    def noting(function, *args, **more):
        kept.setdefault(function.__module__, set()).add(now[-1])
        return function(*args, **more)

    for module, name in (ipl, "accuracy"), (published_order, "label_feature"):
        monkeypatch.setattr(module, name, partial(noting, getattr(module, name)))
    step.main([*f"--sizes 32 --repeats 1 --layer-batch 3 --out {tmp_path}".split(), *flags], build)
    keep_memory(False)
    assert kept == {"ipl": {True}, "benchmarks.published_order": {bool(flags)}}
    lines = capsys.readouterr().out.splitlines()
    assert [line[:15] for line in lines[4:6]] == ["32 px, stage 1 ", "32 px, stage 2 "]
    found = json.loads((tmp_path / "step.json").read_text())
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert {"cpu", "threads", "torch", "seed"} <= found["hardware"].keys()
    assert found["same malloc"] == bool(flags)
    for row, batches in zip(found["steps"], ("3", "2+3*"), strict=True):
        assert row["batches"] == batches
        assert row["loss"]["ours"] == pytest.approx(row["loss"]["published"], rel=1e-4)
        assert 0 < row["memory_ratio"] < 1 and 0 < row["of_peak"]["with choice"] < 1
        for way in step.WAYS:
            parts = row["parts"][way]
            assert (parts["layer choice"] > 0) == (row["stage"] == 2) and min(parts.values()) >= 0
            for name in ("texts", "frozen generator", "CLIP of source", "backward"):
                assert parts[name] > 0
            assert sum(parts.values()) == pytest.approx(row["seconds"][way], rel=5)


def test_nothing_is_timed_if_the_two_ways_differ(tmp_path, capsys, monkeypatch):
    def wrong(clip_model, ctx, label):
        return ctx.mean(dim=1) @ clip_model.text_projection

    monkeypatch.setattr(published_order, "encode_prompts", wrong)
    with pytest.raises(SystemExit):
        step.main(f"--sizes 32 --stages 1 --repeats 1 --out {tmp_path}".split(), build)
    error = capsys.readouterr().err
    assert "32 px, stage 1: loss is" in error and "in the published order" in error
    assert len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", ["--repeats 0", "--batch 0", "--device tpu"])
def test_bad_arguments_end_in_one_line(tmp_path, capsys, argv):
    with pytest.raises(SystemExit) as exit_:
        step.main(f"{argv} --sizes 32 --out {tmp_path}".split(), build)
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_operators_need_a_gpu(monkeypatch):
    monkeypatch.setattr("sys.argv", ["ops"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="^benchmarks.ops needs a CUDA device$"):
        ops.main()


# ----------------------------------------------------------------------------------------------
# Growth


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
