"""What several test files share: the golden numbers, and the small networks they are of."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ipl
from checkpoints import CheckpointError, load_generator

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = ipl.Config(noise="fixed", num_layers=4, batch_mapper=4, batch=2)
QUICK = replace(PUBLISHED, steps_mapper=3, steps=3, ema=0.5, eps=0.1, layer_batch=2, crop=0.2)


def close(actual, expected, rtol=1e-4, scale=1e-5):
    """assert_close, with an absolute tolerance of `scale` of the largest number expected."""
    expected = torch.as_tensor(expected, dtype=torch.float32)
    atol = scale * float(expected.detach().abs().max())
    torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=rtol, atol=atol)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


@pytest.fixture(scope="session")
def golden():
    """Numbers of the published losses and training loops."""
    return torch.load(GOLDEN / "ipl_losses.pt", weights_only=True)


@pytest.fixture(scope="session")
def clip_pair():
    return ipl.load_clip(GOLDEN / "clip_tiny.pt")


@pytest.fixture(scope="session")
def source():
    return load_generator(GOLDEN / "rosinality_tiny.pt").eval()


@pytest.fixture
def target(source, golden):
    """A target generator some steps on, as in the golden run."""
    target = copy.deepcopy(source)
    assert not target.load_state_dict(golden["trainable_state_params"], strict=False)[1]
    return target


def golden_parameter(mapper, name):
    """The parameter with a name such as mapping.mapping.1.weight."""
    _, _, i, kind = name.split(".")
    return {"weight": mapper.weights, "bias": mapper.biases}[kind][int(i) - 1]


@pytest.fixture
def mapper(golden):
    mapper = ipl.LatentMapper(32, 4, 64)
    for name, x in golden["mapper_state"].items():
        golden_parameter(mapper, name).data.copy_(x)
    return mapper


# For the readers of checkpoints


def refusal(load, path, **kwargs):
    """The one line in which `load` refuses a file, without the path that it begins with."""
    with pytest.raises(CheckpointError) as error:
        load(path, **kwargs)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400
    return message.removeprefix(f"{path}: ")


def assert_same(a, b):
    """Two generators of the same kind, bit for bit."""
    assert a.config == b.config
    a, b = a.state_dict() | {"w_avg": a.w_avg}, b.state_dict() | {"w_avg": b.w_avg}
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def checkpoint():
    """A small checkpoint in rosinality's layout, to be changed at will."""
    return torch.load(GOLDEN / "rosinality_tiny.pt", weights_only=True)


@pytest.fixture
def save(tmp_path):
    """save(content, name) -> the path of the file."""

    def save(content, name="generator.pt", save=torch.save, **kwargs):
        save(content, tmp_path / name, **kwargs)
        return tmp_path / name

    return save
