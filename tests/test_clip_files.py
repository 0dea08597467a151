"""CLIPs in the formats that exist, of both architectures; and what is no CLIP of ours."""

import copy
import warnings
from pathlib import Path

import clip
import pytest
import safetensors.torch
import torch
from conftest import GOLDEN, close, refusal, rng
from nvidia_pickles import Payload, dumps

import ipl
import miniature
from checkpoints.clip import KIND, NUMBERS, RELEASED, _check, read_clip

TINY = torch.load(GOLDEN / "clip_tiny.pt", weights_only=True)


def save_archive(model, path):
    """A TorchScript archive as OpenAI's: traced modules, and three sizes among the buffers."""
    model, size = copy.deepcopy(model), model.visual.input_resolution
    for key, number in zip(NUMBERS, (size, 77, 49408), strict=True):
        if hasattr(model, key):
            delattr(model, key)
        model.register_buffer(key, torch.tensor(number))
    with warnings.catch_warnings(action="ignore"):
        example = {"encode_image": torch.zeros(1, 3, size, size)}
        torch.jit.trace_module(model, example, check_trace=False).save(str(path))


@pytest.mark.parametrize("path", [GOLDEN / "clip_tiny.pt", miniature.CLIP], ids=["ViT", "ResNet"])
def test_an_archive_gives_the_features_of_the_model(tmp_path, path):
    model = clip.model.build_model(torch.load(path, weights_only=True))  # in float16, as published
    size = model.visual.input_resolution
    save_archive(model, tmp_path / "archive.pt")
    state, expected = read_clip(tmp_path / "archive.pt"), model.state_dict()
    assert state.keys() == {key for key, x in expected.items() if x.is_floating_point()}
    for key, x in state.items():
        assert torch.equal(expected[key], x) and expected[key].dtype == x.dtype
    (loaded, transform), model = ipl.load_clip(state), model.float()
    images, tokens = torch.rand(1, 3, size, size, generator=rng()), clip.tokenize("a photo")
    with torch.no_grad():
        close(loaded.encode_image(images), model.encode_image(images))
        close(loaded.encode_text(tokens), model.encode_text(tokens))
    assert transform(torch.zeros(1, 3, 64, 64)).shape == (1, 3, size, size)


def test_all_formats(save):
    wrapped = {f"module.{key}": x for key, x in TINY.items()}
    own = {"state_dict": TINY, "epoch": 1, "name": "ViT-B-32-quickgelu"}  # of open_clip
    for path, said in {
        save(TINY, "a"): "",
        save(TINY, "b", _use_new_zipfile_serialization=False): "",
        save(TINY, "c.pt", safetensors.torch.save_file): "",
        save(TINY, "d", lambda content, path: path.write_bytes(dumps(content, 4))): "",
        save(wrapped, "e"): "left out 'module.' before",
        save(wrapped, "f", safetensors.torch.save_file): "left out 'module.' before",
        save(own, "g"): "",
        save({"state_dict": wrapped, "name": "ViT-B-32"}, "h"): "whose own models have GELU",
        save({**own, "args": Path("x")}, "i"): "left unread",
    }.items():
        with warnings.catch_warnings(record=True, action="always") as caught:
            state = read_clip(path)
        assert any(said in str(w.message) for w in caught) if said else not caught
        assert state.keys() == TINY.keys() - set(NUMBERS)
        assert all(torch.equal(x, TINY[k]) and x.dtype == TINY[k].dtype for k, x in state.items())


def test_other_types_become_float32(save):
    state = read_clip(save({k: x.bfloat16() if x.ndim > 1 else x for k, x in TINY.items()}))
    assert {x.dtype for x in state.values()} == {torch.float32, torch.float16}
    assert torch.equal(state["visual.proj"], TINY["visual.proj"].bfloat16().float())


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_architectures_are_known(name):
    layers, width, patch, text_width, text_layers, features = RELEASED[name]
    text = (77, 49408, text_width, text_width // 64, text_layers)
    with torch.device("meta"):
        state = clip.model.CLIP(features, 224, layers, width, patch, *text).state_dict()
    assert _check({k: x for k, x in state.items() if x.is_floating_point()}) == RELEASED[name]


def test_other_architectures_are_told(save):
    """But not of those as small as the miniature's, which are made by OpenAI's own class."""
    assert read_clip(miniature.CLIP) and read_clip(GOLDEN / "clip_tiny.pt")
    path = save(clip.model.CLIP(32, 32, 1, 128, 8, 77, 100, 256, 4, 1).state_dict())
    with pytest.warns(UserWarning, match="none of OpenAI's models; .* QuickGELU"):
        read_clip(path)


NARROW = clip.model.CLIP(8, 32, 1, 64, 8, 77, 50, 96, 1, 1).state_dict()
DEEP = {f"transformer.resblocks.{i}.ln_1.weight": torch.zeros(64) for i in range(101)}
OTHERS = [  # content, or changes of one that is right: message
    ([1], f"no state dict; wanted: the state dict of {KIND}"),
    (Payload(), "the name 'posix.system' is not allowed"),
    (dict(text_model=torch.zeros(1)), f"not {KIND}, it lacks 'text_projection'"),
    (NARROW, "widths 64 and 96; wanted: multiples of 64, as OpenAI's"),
    (TINY | DEEP, "more than 100 layers; wanted: at most 36, as OpenAI's"),
    (TINY | {"logit_bias": torch.zeros(1)}, f"not {KIND}, it has 'logit_bias'"),
    (TINY | {"ln_final.bias": torch.zeros(3)}, "ln_final.bias is (3,), not (64,)"),
    (TINY | {"text_projection": torch.zeros(3)}, "text_projection is (3,); wanted: 2 dimensions"),
    (TINY | {"logit_scale": torch.tensor(torch.nan)}, "not finite: 'logit_scale'; wanted: anoth"),
    (TINY | {"ln_final.bias": Payload()}, "'ln_final.bias' is not a plain tensor of floats: the n"),
    ({k: x for k, x in TINY.items() if k != "visual.proj"}, f"not {KIND}, it lacks 'visual.layer"),
    ({k: x for k, x in TINY.items() if k != "ln_final.bias"}, f"not {KIND}, it lacks 'ln_final.b"),
]


def test_other_files(save):
    for content, message in OTHERS:
        assert refusal(read_clip, save(content)).startswith(message)
