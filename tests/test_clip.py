"""Section 2: CLIP's loading, image transform and encoders against golden/clip_tiny_io.pt."""

import warnings
from pathlib import Path

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, close

import ipl

IO = torch.load(GOLDEN / "clip_tiny_io.pt", weights_only=True)


def images(case):
    return case["u8"].float() / 127.5 - 1 if "u8" in case else case["x_fp16"].float()


@pytest.mark.parametrize("case", IO["images"], ids=lambda case: case["name"])
def test_images(clip_pair, case):
    clip_model, transform = clip_pair
    x = images(case).requires_grad_()
    close(transform(x), case["preprocessed"])
    features = ipl.image_encoder(clip_model, transform)(x)
    close(features, case["features"])
    close(F.normalize(features, dim=-1), case["features_normed"])
    if "grad_x" in case:
        (grad,) = torch.autograd.grad((features * case["r"]).sum(), x)
        close(grad, case["grad_x"])


def test_transform_keeps_the_gradient_outside_the_range(clip_pair):
    x = torch.full((1, 3, 32, 32), 1.5, requires_grad=True)
    clip_pair[1](x).sum().backward()
    assert (x.grad > 0).all()


@pytest.mark.parametrize("size", [(40, 32), (32, 41), (17, 90), (101, 33)])
def test_transform_crops_the_centre_of_the_longer_side(clip_pair, size):
    from torchvision.transforms.v2 import functional as TF

    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = TF.resize((x + 1) / 2, 32, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    y = TF.normalize(TF.center_crop(y, 32), ipl.CLIP_MEAN, ipl.CLIP_STD)
    close(clip_pair[1](x), y)


def test_texts(clip_pair):
    g = IO["texts"]
    features = ipl.encode_texts(clip_pair[0], g["strings"])
    close(features, g["features"])
    tokens, eot = ipl.tokenize(clip_pair[0], g["strings"])
    assert torch.equal(tokens, g["tokens"][:, : tokens.shape[1]].long())
    assert torch.equal(eot, g["tokens"].argmax(dim=-1))


@pytest.mark.parametrize("text", IO["texts"]["strings"])
def test_each_text_alone_equals_encode_text(clip_pair, text):
    """True length against 77: attention is causal, padding changes nothing."""
    close(
        ipl.encode_texts(clip_pair[0], text),
        clip_pair[0].encode_text(clip.tokenize(text)),
    )


def test_logits(clip_pair):
    clip_model = clip_pair[0]
    g = IO["logits"]
    x = F.normalize(clip_model.encode_image(IO["images"][0]["preprocessed"]), dim=-1)
    strings = [IO["texts"]["strings"][i] for i in g["texts"]]
    t = F.normalize(ipl.encode_texts(clip_model, strings), dim=-1)
    close(clip_model.logit_scale.exp() * x @ t.T, g["per_image"])


def test_loaded_clip_is_frozen_float32_in_eval_mode(clip_pair):
    clip_model = clip_pair[0]
    assert not clip_model.training
    for p in clip_model.parameters():
        assert p.dtype == torch.float32 and not p.requires_grad


def test_blocks_keep_their_mask(clip_pair):
    masks = [block.attn_mask.clone() for block in clip_pair[0].transformer.resblocks]
    ipl.encode_texts(clip_pair[0], "anime")
    for block, mask in zip(clip_pair[0].transformer.resblocks, masks, strict=True):
        assert torch.equal(block.attn_mask, mask) and mask.shape == (77, 77)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_autocast_is_close_and_returns_float32(clip_pair, half):
    x = images(IO["images"][0])
    exact = ipl.image_encoder(*clip_pair)(x)
    fast = ipl.image_encoder(*clip_pair, ipl.Config(autocast="clip", half=half))(x)
    assert fast.dtype == torch.float32
    assert (F.cosine_similarity(exact, fast) > 0.99).all()


def test_a_name_goes_to_clip_load(monkeypatch, clip_pair):
    asked = []

    def load(name, device, jit):
        asked.append((name, str(device), jit))
        state_dict = torch.load(GOLDEN / "clip_tiny.pt", weights_only=True)
        return clip.model.build_model(state_dict), None

    monkeypatch.setattr(clip, "load", load)
    clip_model, _ = ipl.load_clip("ViT-B/32")
    assert asked == [("ViT-B/32", "cpu", False)]
    close(ipl.encode_texts(clip_model, "anime"), ipl.encode_texts(clip_pair[0], "anime"))


def test_neither_name_nor_file():
    with pytest.raises(ValueError, match=r"'ViT-X'.*FileNotFoundError.* one of RN50"):
        ipl.load_clip("ViT-X")


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("pwned_by_pickle"),)


@pytest.mark.parametrize("content", ["text", "list", "other", "script", "hostile", "cut"])
def test_foreign_files_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "clip.pt"
    if content == "text":
        path.write_text("not a checkpoint")
    elif content == "script":
        with warnings.catch_warnings(action="ignore"):
            torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    elif content == "cut":
        path.write_bytes((GOLDEN / "clip_tiny.pt").read_bytes()[:5000])
    else:
        torch.save(
            {"list": [1], "other": {"a": torch.zeros(1)}, "hostile": Hostile()}[content], path
        )
    with pytest.raises(ValueError, match="cannot be loaded"):
        ipl.load_clip(path)
    assert not (tmp_path / "pwned_by_pickle").exists()
