"""CLIPs of the published architectures and sizes, with random weights, in OpenAI's two formats."""

import copy
import pickle
import random
import warnings
import zipfile
from pathlib import Path

import clip
import pytest
import torch
from fuzz_checkpoints import PICKLE, flip_bits, truncate, within_zip

import ipl

GOLDEN = Path(__file__).parent / "golden"
TEXT = dict(context_length=77, vocab_size=49408, transformer_width=512, transformer_heads=8,
            transformer_layers=12)  # fmt: skip
MODELS = {
    "ViT-B/32": dict(embed_dim=512, vision_layers=12, vision_width=768, vision_patch_size=32),
    "RN50": dict(embed_dim=1024, vision_layers=(3, 4, 6, 3), vision_width=64,
                 vision_patch_size=None),
}  # fmt: skip


def random_clip(name):
    """Stored as published: weights of convolutions and matrices in float16, others in float32."""
    with torch.device("meta"):
        model = clip.model.CLIP(image_resolution=224, **MODELS[name], **TEXT)
    model, rng = model.to_empty(device="cpu"), torch.Generator().manual_seed(0)
    for key, x in model.state_dict().items():
        if key.endswith("running_var"):
            x.uniform_(0.5, 1.5, generator=rng)
        elif x.is_floating_point():
            one = 1.0 if x.ndim == 1 and key.endswith("weight") else 0.0  # of LayerNorm, BatchNorm
            x.normal_(one, 0.03, generator=rng)
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


@pytest.mark.parametrize("name", MODELS)
def test_both_formats_give_the_features_of_the_model(tmp_path, name):
    model = random_clip(name)
    torch.save(model.state_dict(), tmp_path / "state_dict.pt")
    save_archive(model, tmp_path / "archive.pt")
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        script = torch.jit.load(str(tmp_path / "archive.pt"))
    assert script.state_dict()["visual.conv1.weight"].dtype == torch.float16
    assert {"input_resolution", "context_length", "vocab_size"} <= script.state_dict().keys()
    del script

    model.float()
    images, tokens = torch.rand(1, 3, 224, 224), clip.tokenize("a photo of a face")
    with torch.no_grad():
        expected = model.encode_image(images), model.encode_text(tokens)
    for path in tmp_path / "state_dict.pt", tmp_path / "archive.pt":
        loaded, transform = ipl.load_clip(path)
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        for key, x in model.state_dict().items():
            assert torch.equal(state[key], x) and state[key].dtype == x.dtype
        with torch.no_grad():
            assert torch.equal(loaded.encode_image(images), expected[0])
            assert torch.equal(loaded.encode_text(tokens), expected[1])
            text = ipl.encode_texts(loaded, "a photo of a face")
            torch.testing.assert_close(text, expected[1], rtol=1e-3, atol=1e-4)
        assert transform(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 224, 224)
        del loaded, state
        path.unlink()  # some 300 MB


# ----------------------------------------------------------------------------------------------
# Small archives: nothing in them is run, and damage is seen


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The tiny CLIP as an archive."""
    path = tmp_path_factory.mktemp("clip") / "archive.pt"
    state_dict = torch.load(GOLDEN / "clip_tiny.pt", weights_only=True)
    save_archive(clip.model.build_model(state_dict), path, size=32)
    return path


def test_a_small_archive(archive):
    a, b = (ipl.load_clip(path)[0].state_dict() for path in (archive, GOLDEN / "clip_tiny.pt"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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
    with pytest.raises(ValueError, match="cannot be loaded"):
        ipl.load_clip(path)
    assert not marker.exists()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.load(str(path))
    assert marker.exists()  # so the test can fail


def rewritten(archive, path, change):
    """The archive with other bytes for its pickle."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("/data.pkl") else data)
    return path


class Call:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_other_pickles_in_an_archive(tmp_path, archive):
    marker = tmp_path / "pwned"
    for content in (Call(marker), [Call(marker)], 5, {"visual": None}, ()):
        pickled = pickle.dumps(content, protocol=2)
        path = rewritten(archive, tmp_path / "other.pt", lambda data, new=pickled: new)
        with pytest.raises(ValueError, match="cannot be loaded"):
            ipl.load_clip(path)
    assert not marker.exists()


def test_an_object_in_itself_ends(tmp_path, archive):
    """obj.a = obj, in the operations of a pickle."""
    own = b"\x80\x02c__torch__\nA\n)\x81q\x00}(X\x01\x00\x00\x00ah\x00ub."
    path = rewritten(archive, tmp_path / "own.pt", lambda data: own)
    with pytest.raises(ValueError, match="cannot be loaded .UnpicklingError"):
        ipl.load_clip(path)


def test_damaged_archives_load_or_are_refused(tmp_path, archive):
    rng, data, path, loaded = random.Random(0), archive.read_bytes(), tmp_path / "clip.pt", 0
    for _ in range(100):
        damage = rng.choice([flip_bits, truncate, *map(within_zip, PICKLE)])
        path.write_bytes(damage(rng, data))
        try:
            ipl.load_clip(path)
            loaded += 1
        except ValueError as error:
            assert "cannot be loaded" in str(error) and "\n" not in str(error)
    assert loaded < 50
