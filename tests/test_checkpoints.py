"""Checkpoints: whole files, bit for bit; files that people have; all others end in one line."""

import argparse
import collections
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import GOLDEN, assert_same, normal, refusal
from nvidia_pickles import Payload

from checkpoints import load_generator, save_generator
from checkpoints.stylegan2 import WANTED, read_checkpoint
from stylegan2_ops import Generator

TINY = GOLDEN / "rosinality_tiny.pt"
BIAS = "convs.0.activate.bias"


def test_reads_sizes_off_the_tensors(checkpoint):
    generator = load_generator(TINY)
    assert generator.resolution == 32 and generator.n_mlp == 4 and generator.w_dim == 32
    assert generator.channels == {4: 32, 8: 24, 16: 24, 32: 16}
    assert not generator.training and not any(p.requires_grad for p in generator.parameters())
    state = generator.state_dict()
    assert all(torch.equal(state[name], x) for name, x in checkpoint["g_ema"].items())
    assert torch.equal(generator.w_avg, checkpoint["latent_avg"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_round_trip(tmp_path, suffix):
    generator, path = Generator(8, {4: 5, 8: 7}, w_dim=6, n_mlp=3), tmp_path / f"generator{suffix}"
    generator.w_avg.copy_(normal(6))
    for _ in range(2):  # the second time over a file that is there
        save_generator(generator, path)
        assert os.listdir(tmp_path) == [path.name]
    assert_same(load_generator(path), generator)
    if suffix == ".pt":
        assert torch.load(path, weights_only=True).keys() == {"g_ema", "latent_avg"}
    else:
        with safetensors.safe_open(path, "pt") as file:
            assert '"resolution": 8' in file.metadata()["config"]


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "generator.pt"
    path.write_text("old")

    def full(file):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save_generator(load_generator(TINY), path)
    assert os.listdir(tmp_path) == [path.name] and path.read_text() == "old"


def test_adapted_generator_has_no_latent_avg(save, checkpoint):
    """Outputs of IPL and NADA: the centre is the mean w, the same on every reading."""
    path = save({"g_ema": checkpoint["g_ema"], "g_optim": {"state": {}, "param_groups": []}})
    before = torch.random.get_rng_state()
    generator = load_generator(path)
    assert_same(generator, load_generator(path))
    assert torch.equal(torch.random.get_rng_state(), before)
    w = generator.mapping(normal(4096, 32, seed=7))
    assert (generator.w_avg - w.mean(0)).norm() < 0.1 * w.std(0).norm()
    assert_same(load_generator(save(checkpoint["g_ema"])), generator)  # a state dict alone
    halves = {name: tensor.half() for name, tensor in checkpoint["g_ema"].items()}
    floats = {name: tensor.float() for name, tensor in halves.items()}
    assert_same(load_generator(save(halves)), load_generator(save(floats)))


def test_what_is_not_learned_may_be_missing(save, checkpoint):
    state, expected = checkpoint["g_ema"], load_generator(TINY)
    checkpoint["g_ema"] = {name: x for name, x in state.items() if not name.endswith(".kernel")}
    assert_same(load_generator(save(checkpoint)), expected)
    checkpoint["g_ema"] = {name: x for name, x in state.items() if not name.startswith("noises.")}
    with pytest.warns(UserWarning, match="lacks 'noises.noise_0', .* 4 more, .* with seed 0"):
        generator = load_generator(save(checkpoint))
    assert torch.equal(generator.noises.noise_0, normal(1, 1, 4, 4))
    assert abs(generator.noises.noise_6.std() - 1) < 0.1
    generator.noises.load_state_dict(expected.noises.state_dict())
    assert_same(generator, expected)


@pytest.mark.parametrize("prefix", ["module.", "generator.", "_orig_mod.module."])
def test_wrappers_are_left_out(save, checkpoint, prefix):
    state = {f"{prefix}{name}": x for name, x in checkpoint["g_ema"].items()}
    average = {"latent_avg": checkpoint["latent_avg"]}
    plain = save({**state, **average}, "g.bin", safetensors.torch.save_file)
    for path in (plain, save({"g_ema": state, **average})):
        with pytest.warns(UserWarning, match=f"left out '{prefix}'"):
            assert_same(load_generator(path), load_generator(TINY))


def test_the_content_says_the_format(tmp_path):
    save_generator(load_generator(TINY), tmp_path / "tiny.safetensors")
    for source in (TINY, GOLDEN / "nvidia_tiny.pkl", tmp_path / "tiny.safetensors"):
        for name in ("g", "g.pt", "g.pkl", "g.safetensors"):
            (tmp_path / name).write_bytes(source.read_bytes())
            assert_same(load_generator(tmp_path / name), load_generator(source))


@pytest.mark.parametrize("protocol", [2, 5])
def test_other_values_beside_the_generator_stay_unread(save, protocol):
    content, expected = torch.load(TINY, weights_only=True), load_generator(TINY)
    known = [b"x", b"", {1}, np.float64(0.5), np.arange(3), torch.device("cpu"), {0.5: 1, (1,): 3}]
    content |= {"g": {}, "d_optim": {}, "args": argparse.Namespace(size=32), "iter": known}
    assert_same(load_generator(save(content, pickle_protocol=protocol)), expected)  # no warning
    with pytest.warns(UserWarning, match="ignored 'colour'"):
        assert_same(load_generator(save({**content, "colour": 1})), expected)
    inside = [1]
    inside.append((inside,))  # a tuple in itself
    for name, value in {
        "pathlib.": [Path("x"), inside, frozenset([1]), bytearray(b"x")],
        "collections.defaultdict": collections.defaultdict(list, x=[1]),
        "posix.system": Payload(),
        "torch._utils._rebuild_sparse_tensor": torch.zeros(3).to_sparse(),
    }.items():
        path = save({**content, "args": {"value": value}}, pickle_protocol=protocol)
        with pytest.warns(UserWarning, match=f"left unread, as nothing is run: .*'{name}"):
            assert_same(load_generator(path), expected)


def test_missing_and_damaged_files(tmp_path):
    said = refusal(load_generator, tmp_path / "x.pt")
    assert said == f"No such file or directory; wanted: {WANTED}"
    assert refusal(load_generator, tmp_path) == f"Is a directory; wanted: {WANTED}"
    page, path = b"<!DOCTYPE html><title>Sign in</title>", tmp_path / "generator.safetensors"
    save_generator(load_generator(TINY), path)
    for data in (TINY.read_bytes(), path.read_bytes()):
        for damaged in (b"", data[:-1], data[: len(data) // 2], data[:10], bytes(len(data)), page):
            path.write_bytes(damaged)
            said = refusal(load_generator, path)
            assert said.startswith("damaged, ")
    assert said.startswith("damaged, or a web page, such as one that asks to log in ")


def test_weights_that_make_no_finite_w(save, checkpoint):
    for i in range(1, 5):
        checkpoint["g_ema"][f"style.{i}.weight"] *= 1e30
    assert "its w are not finite" in refusal(load_generator, save({"g_ema": checkpoint["g_ema"]}))


CLIP, NOT = torch.load(GOLDEN / "clip_tiny.pt", weights_only=True), "not a generator checkpoint"
ONE, PLAIN = torch.zeros(1), f"'{BIAS}' is not a plain tensor of floats"
LACKS = "not a rosinality generator, it lacks"
OTHERS = [  # content: message
    ([1, 2], f"{NOT}; "),
    ({"g_ema": Payload()}, f"{NOT}, it has no \"g_ema\", but the name 'posix.system' is not all"),
    (Payload(), "the name 'posix.system' is not allowed; "),
    (CLIP, "a CLIP, not a generator; "),
    ({"g_ema": {"x": ONE}}, f"{LACKS} 'input.input', 'conv1."),
    ({"g_ema": {"synthesis.b4.const": ONE}}, "NVIDIA's tensors without"),
]
CHANGES = [  # name in the checkpoint or its state dict, its value: message
    ("latent_avg", torch.zeros(31), '"latent_avg" is not a vector of 32'),
    ("convs.6.conv.weight", ONE, "not a rosinality generator, it has 'convs.6.conv.weight'"),
    ("convs.99.conv.weight", ONE, "the config's resolution is "),
    ("style.2.weight", torch.zeros(32, 16), "style.2.weight is (32, 16), not (32, 32)"),
    ("latent_avg", torch.full([32], torch.nan), "not finite: 'latent_avg'"),
    (BIAS, torch.full([24], 1e300, dtype=torch.float64), f"not finite: '{BIAS}'"),  # as float32
    (BIAS, torch.zeros(24, dtype=torch.int64), PLAIN),
    (BIAS, ONE.expand(10**12), PLAIN),
    (BIAS, Payload(), f"{PLAIN}: the name 'posix.system' is not allowed"),
]


def test_other_files(save, checkpoint):
    for content, message in OTHERS:
        assert refusal(load_generator, save(content)).startswith(message)
    for name, value, message in CHANGES:
        content = {**checkpoint, "g_ema": dict(checkpoint["g_ema"])}
        part = content if name == "latent_avg" else content["g_ema"]
        part[name] = value
        for load in (load_generator, read_checkpoint):
            assert refusal(load, save(content)).startswith(message)
