"""Section 2: CLIP's loading, image transform and encoders against golden/clip_tiny_io.pt."""

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, close, rng
from torchvision.transforms.v2 import functional as TF

import ipl

IO = torch.load(GOLDEN / "clip_tiny_io.pt", weights_only=True)


@pytest.mark.parametrize("case", IO["images"], ids=lambda case: case["name"])
def test_images(clip_pair, case):
    x = case["u8"].float() / 127.5 - 1 if "u8" in case else case["x_fp16"].float()
    x.requires_grad_()
    close(clip_pair[1](x), case["preprocessed"])
    features = ipl.image_encoder(*clip_pair)(x)
    close(features, case["features"])
    close(F.normalize(features, dim=-1), case["features_normed"])
    if "grad_x" in case:
        close(torch.autograd.grad((features * case["r"]).sum(), x)[0], case["grad_x"])
    for half in ("bf16", "fp16"):
        fast = ipl.image_encoder(*clip_pair, ipl.Config(autocast="clip", half=half))(x)
        assert fast.dtype == torch.float32
        assert (F.cosine_similarity(features, fast) > 0.99).all()


@pytest.mark.parametrize("size", [(40, 32), (32, 41), (17, 90), (101, 33)])
def test_transform_crops_the_centre_of_the_longer_side(clip_pair, size):
    x = 2 * torch.rand(1, 3, *size, generator=rng()) - 1
    y = TF.resize((x + 1) / 2, 32, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    y = TF.normalize(TF.center_crop(y, 32), ipl.CLIP_MEAN, ipl.CLIP_STD)
    close(clip_pair[1](x), y)
    outside = torch.full((1, 3, 32, 32), 1.5, requires_grad=True)  # no clamp: it has a gradient
    clip_pair[1](outside).sum().backward()
    assert (outside.grad > 0).all()


def test_texts_and_logits(clip_pair):
    """At their true length against 77: attention is causal, padding changes nothing."""
    clip_model, g = clip_pair[0], IO["texts"]
    masks = [block.attn_mask.clone() for block in clip_model.transformer.resblocks]
    features = ipl.encode_texts(clip_model, g["strings"])
    close(features, g["features"])
    for text in g["strings"]:
        close(ipl.encode_texts(clip_model, text), clip_model.encode_text(clip.tokenize(text)))
    for block, mask in zip(clip_model.transformer.resblocks, masks, strict=True):
        assert torch.equal(block.attn_mask, mask) and mask.shape == (77, 77)
    tokens, eot = ipl.tokenize(clip_model, g["strings"])
    assert torch.equal(tokens, g["tokens"][:, : tokens.shape[1]].long())
    assert torch.equal(eot, g["tokens"].argmax(dim=-1))
    x = F.normalize(clip_model.encode_image(IO["images"][0]["preprocessed"]), dim=-1)
    t = F.normalize(features[IO["logits"]["texts"]], dim=-1)
    close(clip_model.logit_scale.exp() * x @ t.T, IO["logits"]["per_image"])


def test_a_name_goes_to_clip_load(monkeypatch, clip_pair):
    asked = []

    def load(name, device, jit):
        asked.append((name, str(device), jit))
        state_dict = torch.load(GOLDEN / "clip_tiny.pt", weights_only=True)
        return clip.model.build_model(state_dict), None

    monkeypatch.setattr(clip, "load", load)
    clip_model, _ = ipl.load_clip("ViT-B/32")
    assert asked == [("ViT-B/32", "cpu", False)] and not clip_model.training
    assert {(p.dtype, p.requires_grad) for p in clip_model.parameters()} == {(torch.float32, False)}
    close(ipl.encode_texts(clip_model, "anime"), ipl.encode_texts(clip_pair[0], "anime"))


def test_neither_name_nor_file(tmp_path):
    with pytest.raises(ValueError, match=r"'ViT-X'.*FileNotFoundError.* one of RN50"):
        ipl.load_clip("ViT-X")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt' cannot be loaded"):
        ipl.load_clip(tmp_path / "other.pt")
