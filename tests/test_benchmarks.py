"""The benchmarks: both orders of a step are the same mathematics, and they run to the end."""

import copy
import json
import re
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from conftest import GOLDEN, close, normal

import ipl
from benchmarks import diffusion, growth, networks, ops, published_order, step
from checkpoints import load_generator

CFG = ipl.Config(
    noise="fixed", eps=0.1, num_layers=4, batch_mapper=3, batch=2, layer_batch=2, steps=1,
    steps_mapper=1, lambda_source=0.5,
)  # fmt: skip


def build(size=32, device="cpu"):
    generator = load_generator(GOLDEN / "rosinality_tiny.pt", device)
    return networks.World(CFG, generator, *ipl.load_clip(GOLDEN / "clip_tiny.pt", device))


def same(ours, theirs):
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        close(p, q, scale=1e-4)
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            close(p.grad, q.grad, scale=1e-4)


@pytest.mark.parametrize("residual", ["published", "label", "none"])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_published_order_is_the_same_mathematics(stage, residual, monkeypatch):
    generator_step = Mock(wraps=published_order.generator_step)
    monkeypatch.setattr(published_order, "generator_step", generator_step)
    world = build()._replace(cfg=replace(CFG, residual=residual))
    z = {n: normal(n, world.generator.z_dim, seed=n) for n in (2, 3)}
    mapper = networks.new_mapper(world)
    target = networks.moved(world.generator) if stage == 2 else None
    their_step, theirs, their_clip, _ = step.published_step(world, stage, copy.deepcopy(mapper))
    expected = their_step(z[3]) if stage == 1 else their_step(z[2], z[2])
    found, (row,) = step.run_ours(
        world, stage, mapper, lambda stage, total, state: range(total), target, z.get
    )
    close(row["loss"], expected["loss"])
    same(target or found, theirs)
    if stage == 2:
        same(found, generator_step.call_args.args[6])  # the moving averages
        assert row["layers"] == expected["layers"] and len(row["layers"]) == CFG.num_layers
        assert abs(row["loss"] - 1) > 1e-3  # that of equal images
        assert all(p.grad is not None for p in their_clip.visual.parameters())
    assert all(p.grad is None for p in world.clip_model.parameters())


@pytest.mark.slow
def test_steps_of_the_miniature_with_its_own_preset(tmp_path):
    words = "--sizes 128 --repeats 1 --batch-mapper 2 --batch 1 --layer-batch 2 --out"
    step.main([*words.split(), str(tmp_path)])
    found = json.loads((tmp_path / "step.json").read_text())
    assert [row["stage"] for row in found["steps"]] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--same-malloc"]])
def test_steps_from_end_to_end(tmp_path, capsys, monkeypatch, flags):
    kept = []
    monkeypatch.setattr(step, "keep_memory", kept.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    step.main([*f"--sizes 32 --repeats 1 --layer-batch 3 --out {tmp_path}".split(), *flags], build)
    assert not torch.backends.cudnn.allow_tf32
    assert set(kept[::2]) == {True} and set(kept[1::2]) == {bool(flags)}  # ours and theirs in turn
    lines = capsys.readouterr().out.splitlines()
    assert [line[:15] for line in lines[4:6]] == ["32 px, stage 1 ", "32 px, stage 2 "]
    assert (tmp_path / "step.png").stat().st_size > 1000
    found = json.loads((tmp_path / "step.json").read_text())
    assert {"cpu", "threads", "torch", "seed"} <= found["hardware"].keys()
    assert found["same malloc"] == bool(flags)
    assert [row["batches"] for row in found["steps"]] == ["3", "2+3*"]
    for row in found["steps"]:
        assert 0 < row["memory_ratio"] < 1 and 0 < row["of_peak"]["with choice"] < 1
        for parts in row["parts"].values():
            zero = {name for name, seconds in parts.items() if seconds <= 0}
            of_stage_2 = {"layer choice", "trainable generator", "CLIP of target"}
            assert zero == (of_stage_2 if row["stage"] == 1 else set())


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
    encode_prompts = published_order.encode_prompts
    monkeypatch.setattr(published_order, "encode_prompts", lambda *x: 2 + encode_prompts(*x))
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


def test_checkpointing_saves_memory_and_no_gradient(capsys):
    diffusion.main("--batch 1 --steps 2 4 --repeats 1".split())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    peaks = [int(line[-2]) for line in lines]
    assert [line[2] for line in lines] == ["kept", "checkpointed"] * 2
    assert peaks[1] < 0.8 * peaks[0] and peaks[3] < 1.3 * peaks[1] < peaks[2] / 2  # MB
