"""Checkpoints: whole files, bit for bit; files that people have; all others end in one line."""

import argparse
import collections
import datetime
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import GOLDEN, assert_same, normal, refusal

from checkpoints import CheckpointError, load_generator, save_generator
from checkpoints.files import write_atomically
from checkpoints.stylegan2 import read_checkpoint
from stylegan2_ops import Generator

TINY = GOLDEN / "rosinality_tiny.pt"
WANTED = "wanted: a StyleGAN2 checkpoint (.pt, .pkl, .safetensors) or the URL of one"
CONV = "convs.0.conv.weight"


# ----------------------------------------------------------------------------------------------
# Reading and writing


def test_reads_sizes_off_the_tensors(checkpoint):
    generator = load_generator(TINY)
    assert generator.resolution == 32 and generator.n_mlp == 4 and generator.w_dim == 32
    assert generator.channels == {4: 32, 8: 24, 16: 24, 32: 16}
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    state = generator.state_dict()
    assert state.keys() == checkpoint["g_ema"].keys()
    assert all(torch.equal(state[name], checkpoint["g_ema"][name]) for name in state)
    assert torch.equal(generator.w_avg, checkpoint["latent_avg"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("resolution", [8, 64])
def test_round_trip(tmp_path, suffix, resolution):
    channels = {4: 5, 8: 7, 16: 4, 32: 3, 64: 2}
    generator = Generator(resolution, channels, w_dim=6, n_mlp=3)
    generator.w_avg.copy_(normal(6))
    path = tmp_path / f"generator{suffix}"
    for _ in range(2):  # the second time over a file that is there
        save_generator(generator, path)
        assert os.listdir(tmp_path) == [path.name]
    before = torch.random.get_rng_state()
    assert_same(load_generator(path), generator)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_layouts_of_what_is_saved(tmp_path, checkpoint):
    for suffix in (".pt", ".safetensors"):
        save_generator(load_generator(TINY), tmp_path / f"g{suffix}")
    saved = torch.load(tmp_path / "g.pt", weights_only=True)
    assert saved.keys() == checkpoint.keys() == {"g_ema", "latent_avg"}
    assert saved["g_ema"].keys() == checkpoint["g_ema"].keys()
    assert all(torch.equal(saved["g_ema"][name], x) for name, x in checkpoint["g_ema"].items())
    with safetensors.safe_open(tmp_path / "g.safetensors", "pt") as file:
        assert "latent_avg" in file.keys() and '"resolution": 32' in file.metadata()["config"]


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "generator.pt"
    path.write_text("old")

    def broken(file):
        if isinstance(file, Path):
            file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        save_generator(load_generator(TINY), path)
    assert os.listdir(tmp_path) == [path.name] and path.read_text() == "old"


# ----------------------------------------------------------------------------------------------
# Files that people have


def test_adapted_generator_has_no_latent_avg(save, checkpoint):
    """Outputs of IPL and NADA: the centre is the mean w, the same on every reading."""
    path = save({"g_ema": checkpoint["g_ema"], "g_optim": {"state": {}, "param_groups": []}})
    before = torch.random.get_rng_state()
    generator, again = load_generator(path), load_generator(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(generator.w_avg, again.w_avg)
    w = generator.mapping(normal(4096, 32, seed=7))
    assert (generator.w_avg - w.mean(0)).norm() < 0.1 * w.std(0).norm()


def test_what_is_not_learned_may_be_missing(save, checkpoint):
    expected, state = load_generator(TINY).state_dict(), checkpoint["g_ema"]
    for name in [name for name in state if name.endswith(".kernel")]:
        del state[name]
    assert_same(load_generator(save(checkpoint)), load_generator(TINY))
    for name in [name for name in state if name.startswith("noises.")]:
        del state[name]
    with pytest.warns(UserWarning, match="lacks 'noises.noise_0', .* 4 more, .* with seed 0"):
        generator = load_generator(save(checkpoint))
    noises = dict(generator.noises.named_buffers())
    again = dict(Generator(**generator.config).noises.named_buffers())
    assert [x.shape for x in noises.values()] == [x.shape for x in again.values()]
    values = torch.cat([x.flatten() for x in noises.values()])
    assert torch.equal(noises["noise_0"], normal(1, 1, 4, 4))
    assert values.mean().abs() < 0.1 and (values.std() - 1).abs() < 0.1
    for name, x in generator.state_dict().items():
        assert name.startswith("noises.") or torch.equal(x, expected[name])


@pytest.mark.parametrize("prefix", ["module.", "generator.", "_orig_mod.module."])
def test_wrappers_are_left_out(save, checkpoint, prefix):
    state = {f"{prefix}{name}": x for name, x in checkpoint["g_ema"].items()}
    for path in (
        save({**checkpoint, "g_ema": state}),
        save(
            {**state, "latent_avg": checkpoint["latent_avg"]}, "g.bin", safetensors.torch.save_file
        ),
    ):
        with pytest.warns(UserWarning, match=f"left out '{prefix}'"):
            assert_same(load_generator(path), load_generator(TINY))


def test_a_state_dict_alone(save, checkpoint):
    generator, expected = load_generator(save(checkpoint["g_ema"])), load_generator(TINY)
    generator.w_avg.copy_(expected.w_avg)  # which it lacks
    assert_same(generator, expected)


@pytest.mark.parametrize("name", ["g", "g.pt", "g.pkl", "g.safetensors"])
def test_the_content_says_the_format(tmp_path, name):
    save_generator(load_generator(TINY), tmp_path / "tiny.safetensors")
    golden = GOLDEN / "nvidia_tiny.pkl", GOLDEN / "nvidia_tiny_as_rosinality.pt"
    for source in (TINY, tmp_path / "tiny.safetensors", *golden):
        (tmp_path / name).write_bytes(source.read_bytes())
        assert_same(load_generator(tmp_path / name), load_generator(source))


def test_training_checkpoint_with_its_arguments(save, checkpoint):
    args = argparse.Namespace(size=32, lr=0.002, path="data")
    extras = {"g": {}, "d": {}, "g_optim": {}, "d_optim": {}, "args": args, "ada_aug_p": 0.1}
    known = [
        b"x",
        b"",
        {1},
        np.float64(0.5),
        np.arange(3),
        torch.device("cpu"),
        {0.5: 1, (1, 2): 3},
    ]
    path = save({**checkpoint, **extras, "iter": known})
    assert_same(load_generator(path), load_generator(TINY))
    with pytest.warns(UserWarning, match="ignored 'colour'"):
        load_generator(save({**checkpoint, "colour": 1}))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_values_beside_the_generator_stay_unread(tmp_path, save, checkpoint, protocol):
    inside = [1]
    inside.append((inside,))
    proof = tmp_path / "proof"
    values = {
        "pathlib.": Path("x"),
        "torch.float16": torch.float16,
        "collections.defaultdict": collections.defaultdict(list, x=[1]),
        "collections.deque": collections.deque([1, inside]),
        "datetime.datetime": datetime.datetime(2024, 1, 1),
        "": [frozenset([1]), bytearray(b"x")],  # some protocols name them
        "posix.system": Payload(proof),
        "torch._utils._rebuild_sparse_tensor": torch.zeros(3).to_sparse(),
        "torch.ComplexFloatStorage": torch.zeros(3, dtype=torch.complex64),
    }
    for name, value in values.items():
        path = save({**checkpoint, "args": {"value": value}}, pickle_protocol=protocol)
        if name:
            with pytest.warns(UserWarning, match=f"left unread, as nothing is run: .*'{name}"):
                assert_same(load_generator(path), load_generator(TINY))
    assert not proof.exists()


def test_other_types_are_read_as_float32(save, checkpoint):
    half = {name: tensor.half() for name, tensor in checkpoint["g_ema"].items()}
    generator = load_generator(save({**checkpoint, "g_ema": half}))
    assert {tensor.dtype for tensor in generator.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(generator.convs[0].conv.weight, half[CONV].float())


# ----------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("name", [CONV, "noises.noise_2", "latent_avg"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_what_is_not_finite_is_named(save, checkpoint, name, value):
    state = checkpoint if name == "latent_avg" else checkpoint["g_ema"]
    state[name] = state[name].double()  # 1e300 is infinite as float32
    state[name].view(-1)[3] = value
    for load in (load_generator, read_checkpoint):
        assert refusal(load, save(checkpoint)).startswith(f"not finite: '{name}'")


def test_weights_that_make_no_finite_w(save, checkpoint):
    for i in range(1, 5):
        checkpoint["g_ema"][f"style.{i}.weight"] *= 1e30
    assert "its w are not finite" in refusal(load_generator, save({"g_ema": checkpoint["g_ema"]}))


def test_missing_file_and_folder(tmp_path):
    for name in ("none.pt", "none.safetensors"):
        said = refusal(load_generator, tmp_path / name)
        assert said == f"No such file or directory; {WANTED}"
    assert refusal(load_generator, tmp_path) == f"Is a directory; {WANTED}"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged(tmp_path, suffix):
    path = tmp_path / f"generator{suffix}"
    save_generator(load_generator(TINY), path)
    data, page = path.read_bytes(), b"<!DOCTYPE html><title>Sign in</title>"
    for damaged in (b"", data[:-1], data[: len(data) // 2], data[:10], page, bytes(len(data))):
        path.write_bytes(damaged)
        assert refusal(load_generator, path).startswith("damaged, ")
    path.write_bytes(page)
    assert "or written by neither pickle nor torch.save (" in refusal(load_generator, path)


CLIP = torch.load(GOLDEN / "clip_tiny.pt", weights_only=True)
OTHERS = [  # content: message
    ([1, 2], "not a generator checkpoint; "),
    (torch.zeros(2), "not a generator checkpoint; "),
    ({}, 'not a generator checkpoint, it has no "g_ema" or "G_ema"; '),
    ({"g": {}}, 'not a generator checkpoint, it has no "g_ema"; '),
    ({"G": {}, "G_ema": None}, 'not a generator checkpoint, it has no "G_ema"; '),
    (
        {"g_ema": Path("x")},
        'not a generator checkpoint, it has no "g_ema", but the name \'pathlib.',
    ),
    (Payload("x"), "the name 'posix.system' is not allowed; "),
    (CLIP, "a CLIP, not a generator; "),
    ({"g_ema": CLIP}, "a CLIP, not a generator; "),
    (
        {"g_ema": {"x": torch.zeros(1)}},
        "not a rosinality generator, it lacks 'input.input', 'conv1.",
    ),
    ({"G_ema": {}, "g_ema": {"synthesis.b4.const": torch.zeros(1)}}, "NVIDIA's tensors without"),
]


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_other_files(save, number):
    content, message = OTHERS[number]
    assert refusal(load_generator, save(content)).startswith(message)


def changed(name, value):
    return lambda state: state.update({name: value})


PLAIN = "'convs.0.activate.bias' is not a plain tensor of floats"
BIAS = "convs.0.activate.bias"
CHANGES = [  # of the state dict: message
    (lambda state: state.pop("style.1.bias"), "it lacks 'style.1.bias'"),
    (lambda state: state.pop("convs.5.conv.weight"), "it lacks 'convs.5.conv.weight'"),
    (lambda state: state.pop("to_rgbs.2.bias"), "it lacks 'to_rgbs.2.bias'"),
    (changed("convs.6.conv.weight", torch.zeros(1)), "it has 'convs.6.conv.weight'"),
    (changed("convs.99.conv.weight", torch.zeros(1)), "the config's resolution is "),
    (changed("style.2.weight", torch.zeros(32, 16)), "style.2.weight is (32, 16), not (32, 32)"),
    (changed("to_rgb1.bias", torch.zeros(3)), "to_rgb1.bias is (3,), not (1, 3, 1, 1)"),
    (changed("convs.0.conv.blur.kernel", torch.zeros(3, 3)), "kernel is (3, 3), not (4, 4)"),
    (changed("noises.noise_6", torch.zeros(3, 3)), "noises.noise_6 is (3, 3), not (1, 1, 32, 32)"),
    (changed(BIAS, None), PLAIN),
    (changed(BIAS, torch.zeros(24, dtype=torch.int64)), PLAIN),
    (changed(BIAS, torch.zeros(1).expand(10**12)), PLAIN),
    (changed(BIAS, torch.zeros(24).to_sparse()), f"{PLAIN}: the name 'torch._utils._rebuild_sp"),
    (changed(BIAS, Payload("x")), f"{PLAIN}: the name 'posix.system' is not allowed"),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_the_tensor_at_fault_is_named(save, checkpoint, number):
    change, message = CHANGES[number]
    change(checkpoint["g_ema"])
    assert message in refusal(load_generator, save(checkpoint))


@pytest.mark.parametrize("value", [0.5, torch.zeros(31), torch.zeros(32, dtype=torch.int64)])
def test_bad_latent_avg(save, checkpoint, value):
    said = refusal(load_generator, save({**checkpoint, "latent_avg": value}))
    assert said == '"latent_avg" is not a vector of 32'


def test_a_small_file_makes_no_large_noise(save):
    """4096 x 4096 by its convolutions, each of one channel."""
    state = Generator(8, {4: 1, 8: 1}, w_dim=1, n_mlp=1).state_dict()
    state = {name: x for name, x in state.items() if not name.startswith("noises.")}
    for i in range(2, 20):
        state |= {
            f"convs.{i}{n[7:]}": x for n, x in state.items() if n.startswith(f"convs.{i % 2}.")
        }
    for i in range(1, 10):
        state |= {f"to_rgbs.{i}{n[9:]}": x for n, x in state.items() if n.startswith("to_rgbs.0.")}
    said = refusal(load_generator, save({"g_ema": {n: x.clone() for n, x in state.items()}}))
    assert said.startswith("not a rosinality generator, it lacks 'noises.noise_0'")


def test_errors_are_value_errors():
    assert issubclass(CheckpointError, ValueError)
