"""CLIPs in the formats that exist, two of them of published size; and what is no CLIP of ours."""

import copy
import warnings
import zipfile
from pathlib import Path

import clip
import pytest
import safetensors.torch
import torch
from conftest import GOLDEN, refusal, rng

import ipl
import miniature
from checkpoints.clip import RELEASED, read_clip
from tests.nvidia_pickles import dumps

TINY = torch.load(GOLDEN / "clip_tiny.pt", weights_only=True)
COUNTS = {"input_resolution", "context_length", "vocab_size"}


def random_clip(name):
    """Stored as published: weights of convolutions and matrices in float16, others in float32."""
    layers, width, patch, text_width, text_layers, features = RELEASED[name]
    sizes = (features, 224, layers, width, patch, 77, 49408)
    with torch.device("meta"):
        model = clip.model.CLIP(*sizes, text_width, text_width // 64, text_layers)
    model = model.to_empty(device="cpu")
    for key, x in model.state_dict().items():
        if key.endswith("running_var"):
            x.uniform_(0.5, 1.5, generator=rng())
        elif x.is_floating_point():
            one = 1.0 if x.ndim == 1 and key.endswith("weight") else 0.0  # of LayerNorm, BatchNorm
            x.normal_(one, 0.03, generator=rng())
        else:
            x.zero_()  # a counter
    for block in model.transformer.resblocks:
        block.attn_mask = model.build_attention_mask()
    model.logit_scale.data.fill_(4.6)
    clip.model.convert_weights(model)
    return model.eval()


def save_archive(model, path, size=224):
    """A TorchScript archive as OpenAI's: traced modules, and three sizes among the buffers."""
    stored = model.state_dict()
    model = copy.deepcopy(model).float()
    for key, number in ("input_resolution", size), ("context_length", 77), ("vocab_size", 49408):
        if hasattr(model, key):
            delattr(model, key)
        model.register_buffer(key, torch.tensor(number))
    with warnings.catch_warnings(action="ignore"):
        example = torch.zeros(1, 3, size, size)
        traced = torch.jit.trace_module(model, {"encode_image": example}, check_trace=False)
        for key, x in (*traced.named_parameters(), *traced.named_buffers()):
            if key in stored:
                x.data = stored[key]
        traced.save(str(path))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The tiny CLIP as an archive."""
    path = tmp_path_factory.mktemp("clip") / "archive.pt"
    save_archive(clip.model.build_model(dict(TINY)), path, size=32)
    return path


def assert_tiny(state):
    assert state.keys() == TINY.keys() - COUNTS
    assert all(torch.equal(x, TINY[key]) and x.dtype == TINY[key].dtype for key, x in state.items())


# ----------------------------------------------------------------------------------------------
# Read


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_both_formats_give_the_features_of_the_model(tmp_path, name):
    model = random_clip(name)
    torch.save(model.state_dict(), tmp_path / "state_dict.pt")
    save_archive(model, tmp_path / "archive.pt")
    expected = {key: x for key, x in model.state_dict().items() if x.is_floating_point()}
    model.float()
    images, tokens = torch.rand(1, 3, 224, 224, generator=rng()), clip.tokenize("a photo of a face")
    for path in tmp_path / "state_dict.pt", tmp_path / "archive.pt":
        state = read_clip(path)
        assert state.keys() == expected.keys()
        for key, x in expected.items():
            assert torch.equal(state[key], x) and state[key].dtype == x.dtype
        loaded, transform = ipl.load_clip(state)
        with torch.no_grad():
            torch.testing.assert_close(loaded.encode_image(images), model.encode_image(images))
            torch.testing.assert_close(loaded.encode_text(tokens), model.encode_text(tokens))
        assert transform(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 224, 224)
        path.unlink()  # some 300 MB


def test_all_formats(tmp_path, save, archive):
    wrapped = {f"module.{key}": x for key, x in TINY.items()}
    paths = {
        archive: "",
        GOLDEN / "clip_tiny.pt": "",
        save(dict(TINY), "a"): "",
        save(dict(TINY), "b", _use_new_zipfile_serialization=False): "",
        save(dict(TINY), "c.pt", safetensors.torch.save_file): "",
        save(dict(TINY), "d", lambda content, path: path.write_bytes(dumps(content, 4))): "",
        save(wrapped, "e"): "left out 'module.' before",
        save(wrapped, "f", safetensors.torch.save_file): "left out 'module.' before",
        save({"state_dict": TINY, "epoch": 1, "name": "ViT-B-32-quickgelu"}, "g"): "",
        save({"state_dict": wrapped, "name": "ViT-B-32"}, "h"): "whose own models have GELU",
        save({"state_dict": TINY, "name": "-quickgelu", "args": Path("x")}, "i"): "left unread",
    }
    for path, said in paths.items():
        with warnings.catch_warnings(record=True, action="always") as caught:
            assert_tiny(read_clip(path))
        assert any(said in str(w.message) for w in caught) if said else not caught


def test_other_types_become_float32(save):
    state = read_clip(save({k: x.bfloat16() if x.ndim > 1 else x for k, x in TINY.items()}))
    assert {x.dtype for x in state.values()} <= {torch.float32, torch.float16}
    assert torch.equal(state["visual.proj"], TINY["visual.proj"].bfloat16().float())


def test_another_architecture_is_told(save):
    """Widths and depths that are none of OpenAI's, unless it is small as the miniature's."""
    assert read_clip(miniature.CLIP)
    for heads, told in ((2, False), (4, True)):
        wide = clip.model.CLIP(32, 32, 1, 128, 8, 77, 100, 64 * heads, heads, 1)
        path = save(wide.state_dict())
        if told:
            with pytest.warns(UserWarning, match="none of OpenAI's models; .* QuickGELU"):
                assert read_clip(path)
        assert told or read_clip(path)


# ----------------------------------------------------------------------------------------------
# Refused


class Call:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def changed(**changes):
    state = {**TINY, **{name.replace("__", "."): x for name, x in changes.items()}}
    return {name: x for name, x in state.items() if x is not None}


NARROW = clip.model.CLIP(8, 32, 1, 64, 8, 77, 50, 96, 1, 1).state_dict()
DEEP = {f"transformer.resblocks.{i}.ln_1.weight": torch.zeros(64) for i in range(101)}
OTHERS = [  # content, message
    ([1], "no state dict; wanted: the state dict of a CLIP under OpenAI's key names"),
    (Call("x"), "the name '"),
    ({}, "not a CLIP under OpenAI's key names, it lacks 'text_projection'"),
    ({"text_model.embeddings.position_ids": torch.zeros(1)}, "not a CLIP under OpenAI's key names"),
    (changed(visual__proj=None), "not a CLIP under OpenAI's key names, it lacks 'visual.layer1.0."),
    (changed(ln_final__bias=None), "not a CLIP under OpenAI's key names, it lacks 'ln_final.bias'"),
    (
        changed(logit_bias=torch.zeros(1)),
        "not a CLIP under OpenAI's key names, it has 'logit_bias'",
    ),
    (changed(ln_final__bias=torch.zeros(3)), "ln_final.bias is (3,), not (64,)"),
    (changed(text_projection=torch.zeros(3)), "text_projection is (3,); wanted: 2 dimensions"),
    (changed(logit_scale=torch.tensor(torch.nan)), "not finite: 'logit_scale'; wanted: another"),
    (
        changed(ln_final__bias=Call("x")),
        "'ln_final.bias' is not a plain tensor of floats: the name",
    ),
    (NARROW, "widths 64 and 96; wanted: multiples of 64, as OpenAI's"),
    ({**TINY, **DEEP}, "more than 100 layers; wanted: at most 36, as OpenAI's"),
]


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_other_files(save, number):
    content, message = OTHERS[number]
    assert refusal(read_clip, save(content)).startswith(message)
    assert not Path("x").exists()


class Hostile(torch.nn.Module):
    """Writes a file when it is opened: TorchScript runs __setstate__, and it can save."""

    def __init__(self, marker: str):
        super().__init__()
        self.marker = marker

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.marker, self.training = state
        torch.save(torch.zeros(1), self.marker)


def test_code_of_an_archive_is_not_run(tmp_path):
    path, marker = tmp_path / "archive.pt", tmp_path / "pwned"
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(Hostile(str(marker))).save(str(path))
    marker.unlink(missing_ok=True)  # to save it may run it as well
    assert refusal(read_clip, path)
    assert not marker.exists()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.load(str(path))
    assert marker.exists()  # so the test can fail


def test_other_pickles_in_an_archive(tmp_path, archive):
    path, marker = tmp_path / "other.pt", tmp_path / "pwned"
    own = b"\x80\x02c__torch__\nA\n)\x81q\x00}(X\x01\x00\x00\x00ah\x00ub."  # obj.a = obj
    inner = [dumps(x, 2) for x in (Call(marker), [Call(marker)], 5, {"visual": None}, ())]
    for pickled in (own, *inner):
        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
        assert refusal(read_clip, path)
    assert not marker.exists()
