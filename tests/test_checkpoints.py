"""Checkpoints: whole files, bit for bit; every other file is refused in one line."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import safetensors
import torch

from checkpoints import CheckpointError, load_generator, save_generator
from checkpoints.files import write_atomically
from stylegan2_ops import Generator

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "rosinality_tiny.pt"


@pytest.fixture
def checkpoint():
    return torch.load(TINY, weights_only=True)


@pytest.fixture
def save(tmp_path):
    def save(content, name="generator.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def assert_same(a, b):
    a, b = a.state_dict() | {"w_avg": a.w_avg}, b.state_dict() | {"w_avg": b.w_avg}
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        load_generator(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
    return message.removeprefix(str(path))


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
    generator.w_avg.copy_(torch.randn(6))
    path = tmp_path / f"generator{suffix}"
    for _ in range(2):  # the second time over a file that is there
        save_generator(generator, path)
        assert os.listdir(tmp_path) == [path.name]
    before = torch.random.get_rng_state()
    assert_same(load_generator(path), generator)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_layout_is_rosinalitys(tmp_path, checkpoint):
    save_generator(load_generator(TINY), tmp_path / "generator.pt")
    saved = torch.load(tmp_path / "generator.pt", weights_only=True)
    assert saved.keys() == checkpoint.keys() == {"g_ema", "latent_avg"}
    assert saved["g_ema"].keys() == checkpoint["g_ema"].keys()
    for name, tensor in checkpoint["g_ema"].items():
        assert torch.equal(saved["g_ema"][name], tensor)


def test_safetensors_carry_the_sizes(tmp_path):
    path = tmp_path / "generator.safetensors"
    save_generator(load_generator(TINY), path)
    with safetensors.safe_open(path, "pt") as file:
        assert "latent_avg" in file.keys() and '"resolution": 32' in file.metadata()["config"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def broken(aside):
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_atomically(path, broken)
    assert os.listdir(tmp_path) == ["file.txt"] and path.read_text() == "old"
    write_atomically(path, lambda aside: aside.write_text("new"))
    assert os.listdir(tmp_path) == ["file.txt"] and path.read_text() == "new"


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError("disk full")

    path = tmp_path / "generator.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_generator(load_generator(TINY), path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


def test_adapted_generator_has_no_latent_avg(save, checkpoint):
    """Outputs of IPL and NADA: the centre is the mean w, the same on every reading."""
    path = save({"g_ema": checkpoint["g_ema"], "g_optim": {"state": {}, "param_groups": []}})
    before = torch.random.get_rng_state()
    generator, again = load_generator(path), load_generator(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(generator.w_avg, again.w_avg)
    w = generator.mapping(torch.randn(4096, 32, generator=torch.Generator().manual_seed(7)))
    assert (generator.w_avg - w.mean(0)).norm() < 0.1 * w.std(0).norm()


def test_training_checkpoint_with_its_arguments(save, checkpoint):
    args = argparse.Namespace(size=32, lr=0.002, path="data")
    extras = {"g": {}, "d": {}, "g_optim": {}, "d_optim": {}, "args": args, "ada_aug_p": 0.1}
    assert_same(load_generator(save({**checkpoint, **extras})), load_generator(TINY))


def test_unknown_entries_are_ignored_with_a_warning(save, checkpoint):
    path = save({**checkpoint, "colour": 1})
    with pytest.warns(UserWarning, match="ignored 'colour'"):
        assert_same(load_generator(path), load_generator(TINY))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(save, checkpoint, value):
    weight = checkpoint["g_ema"]["convs.0.conv.weight"].clone()
    weight.view(-1)[3] = value
    path = save({**checkpoint, "g_ema": {**checkpoint["g_ema"], "convs.0.conv.weight": weight}})
    with pytest.raises(CheckpointError, match="not finite: 'convs.0.conv.weight'"):
        load_generator(path)


def test_other_types_are_read_as_float32(save, checkpoint):
    half = {name: tensor.half() for name, tensor in checkpoint["g_ema"].items()}
    generator = load_generator(save({**checkpoint, "g_ema": half}))
    assert {tensor.dtype for tensor in generator.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(generator.convs[0].conv.weight, half["convs.0.conv.weight"].float())


# ----------------------------------------------------------------------------------------------
# Refusals


def test_missing_file_and_folder(tmp_path):
    wanted = "; wanted: a StyleGAN2 checkpoint (.pt, .pkl, .safetensors) or the URL of one"
    for name in ("none.pt", "none.safetensors"):
        assert refusal(tmp_path / name) == ": No such file or directory" + wanted
    assert refusal(tmp_path) == ": Is a directory" + wanted


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:10],
        lambda data: b"not a checkpoint\nat all",
        lambda data: bytes(len(data)),
    ],
    ids=["empty", "last byte", "half", "ten bytes", "text", "zeros"],
)
def test_damaged(tmp_path, suffix, damage):
    path = tmp_path / f"generator{suffix}"
    save_generator(load_generator(TINY), path)
    path.write_bytes(damage(path.read_bytes()))
    assert "damaged" in refusal(path)


def test_a_page_in_place_of_a_file(tmp_path):
    path = tmp_path / "network.pkl"
    path.write_text("<!DOCTYPE html><title>Sign in</title>")
    assert refusal(path).startswith(": damaged, or written by neither pickle nor torch.save (")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_no_code_is_run(tmp_path, save, checkpoint):
    proof = tmp_path / "proof"
    assert "UnpicklingError" in refusal(save({**checkpoint, "args": Payload(proof)}))
    plain = tmp_path / "generator.pkl"
    plain.write_bytes(pickle.dumps({"G_ema": Payload(proof)}))
    assert "UnpicklingError" in refusal(plain)
    assert not proof.exists()


@pytest.mark.parametrize("content", [[1, 2], 3.0, torch.zeros(2), {}, {"g_ema": torch.zeros(2)}])
def test_no_g_ema(save, content):
    assert refusal(save(content)).startswith(': not a generator checkpoint, it has no "g_ema"; wan')


def test_other_network(save):
    clip = torch.load(GOLDEN / "clip_tiny.pt", weights_only=True)
    assert refusal(save(clip)).startswith(": a CLIP, not a generator; wanted: a StyleGAN2")
    weights = {name: tensor for name, tensor in clip.items() if tensor.is_floating_point()}
    message = refusal(save({"g_ema": weights}))
    assert "not a rosinality generator, it lacks 'input.input', 'conv1" in message
    assert message.endswith("more")


@pytest.mark.parametrize(
    "name",
    ["style.1.bias", "input.input", "convs.5.conv.weight", "to_rgbs.2.bias", "noises.noise_6"],
)
def test_missing_tensor_is_named(save, checkpoint, name):
    del checkpoint["g_ema"][name]
    assert name in refusal(save(checkpoint))


def test_unexpected_tensor_is_named(save, checkpoint):
    checkpoint["g_ema"]["convs.6.conv.weight"] = torch.zeros(1)
    assert refusal(save(checkpoint)).endswith("it has 'convs.6.conv.weight'")


@pytest.mark.parametrize(
    "name, shape",
    [
        ("convs.3.conv.weight", (1, 24, 25, 3, 3)),
        ("style.2.weight", (32, 16)),
        ("to_rgb1.bias", (3,)),
        ("convs.0.conv.blur.kernel", (3, 3)),
    ],
)
def test_misshapen_tensor_is_named(save, checkpoint, name, shape):
    checkpoint["g_ema"][name] = torch.zeros(shape)
    assert f"{name} is {shape}, not " in refusal(save(checkpoint))


@pytest.mark.parametrize(
    "value",
    [
        None,
        "weights",
        torch.zeros(24, dtype=torch.int64),
        torch.zeros(1).expand(10**12),
    ],
    ids=["none", "text", "integers", "expanded"],
)
def test_values_that_are_no_plain_tensor(save, checkpoint, value):
    checkpoint["g_ema"]["convs.0.activate.bias"] = value
    assert "'convs.0.activate.bias' is not a plain tensor" in refusal(save(checkpoint))


@pytest.mark.parametrize("value", [torch.zeros(24).to_sparse(), torch.zeros(24, device="meta")])
def test_tensors_of_other_kinds(save, checkpoint, value):
    checkpoint["g_ema"]["convs.0.activate.bias"] = value
    assert "tensor' is not allowed" in refusal(save(checkpoint)).replace("_no_storage", "")


@pytest.mark.parametrize("value", [0.5, torch.zeros(31), torch.zeros(32, dtype=torch.int64)])
def test_bad_latent_avg(save, checkpoint, value):
    message = refusal(save({**checkpoint, "latent_avg": value}))
    assert message == ': "latent_avg" is not a vector of 32'
