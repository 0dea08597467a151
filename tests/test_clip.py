"""Section 2: CLIP's loading, image transform and encoders against golden/clip_tiny_io.pt."""

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
    assert asked == [("ViT-B/32", "cpu", False)] and not clip_model.training
    assert {(p.dtype, p.requires_grad) for p in clip_model.parameters()} == {(torch.float32, False)}
    close(ipl.encode_texts(clip_model, "anime"), ipl.encode_texts(clip_pair[0], "anime"))


def test_neither_name_nor_file(tmp_path):
    with pytest.raises(ValueError, match=r"'ViT-X'.*FileNotFoundError.* one of RN50"):
        ipl.load_clip("ViT-X")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt' cannot be loaded"):
        ipl.load_clip(tmp_path / "other.pt")
