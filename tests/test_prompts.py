"""Sections 3 and 4: the latent mapper, prompt construction and encoding."""

import hashlib

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, close, normal, rng

import ipl

TEMPLATE_LIST = torch.load(GOLDEN / "clip_tiny_io.pt", weights_only=True)["template_list"]


@pytest.fixture
def clip_model(clip_pair):
    return clip_pair[0]


def test_initialisation():
    before = torch.get_rng_state()
    first, again, other = (ipl.LatentMapper(64, 4, 32, rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b, c in zip(first.weights, again.weights, other.weights, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert abs(float(a.detach().std()) * first.lr_mul - 1) < 0.1
    assert all(not bias.any() for bias in first.biases)


@pytest.mark.parametrize("name", ["source", "target"])
def test_construct_prompts(golden, clip_model, name):
    """As published, but for the padding, which changes nothing; CLIP gets no gradient."""
    g, ctx = golden["prompt"], golden["stage1"]["prompts"].clone().requires_grad_()
    prompts = ipl.construct_prompts(clip_model, ctx, golden["config"][f"{name}_class"])
    B, L, _ = prompts.shape
    prefix, suffix = (g[f"{name}_{part}"].expand(B, -1, -1) for part in ("prefix", "suffix"))
    assert L == 1 + 4 + 1 + 1  # one token for the label
    assert torch.equal(prompts, torch.cat([prefix, ctx, suffix], 1)[:, :L])
    padded, eot = torch.cat([prompts, normal(B, 9, 64)], dim=1), torch.full((B,), L - 1)
    features, same = (ipl.encode_embeddings(clip_model, x, eot) for x in (prompts, padded))
    close(same, features)
    features.sum().backward()
    assert ctx.grad.abs().sum() > 0
    assert all(p.grad is None for p in clip_model.parameters())


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_golden_prompt_features(golden, clip_model, mapper, stage):
    g = golden[stage]
    ctx = mapper(g["w"])
    torch.testing.assert_close(mapper(7 * g["w"]), ctx, rtol=1e-4, atol=1e-5)  # of any scale
    if stage == "stage1":
        close(ctx, g["prompts"])
        close(ctx.flatten(1), g["mapper_out"])
    t_source = ipl.encode_prompts(clip_model, ctx, "photo")
    close(t_source, g["source_text_features"][:, 0])
    close(ipl.encode_prompts(clip_model, ctx, "anime"), g["target_text_features"][:, 0])
    order = torch.arange(len(ctx)).flip(0)  # no prompt depends on another of its batch
    close(ipl.encode_prompts(clip_model, mapper(g["w"][order]), "photo"), t_source[order])


@pytest.mark.parametrize("label", ["photo", "anime painting", "sketch of the human face"])
def test_a_prompt_of_words_equals_encode_text(clip_model, label):
    """With CLIP's own embeddings of "a photo of a" as ctx, the prompt is a plain text."""
    ctx = clip_model.token_embedding(clip.tokenize("a photo of a")[:, 1:5])
    text = clip_model.encode_text(clip.tokenize(f"a photo of a {label}"))
    close(ipl.encode_prompts(clip_model, ctx, label), text)


def test_labels_that_cannot_be_read(clip_model):
    for n, n_ctx, words in ((60, 40, "tokens; this CLIP reads 77"), (120, 4, "too long")):
        with pytest.raises(ValueError, match=words):
            ipl.encode_prompts(clip_model, torch.zeros(1, n_ctx, 64), "anime " * n)
    # rows of the token embedding that no training has touched are 0; braces are just letters
    with pytest.warns(UserWarning, match="never read 'a {weird} label'"):
        assert ipl.label_features(clip_model, "a {weird} label").isfinite().all()


def test_label_features(golden, clip_model):
    g, published = golden["stage1"], TEMPLATE_LIST["sha256_each"]
    ours = [hashlib.sha256(t.encode()).hexdigest() for t in ipl.TEMPLATES]
    templates = [ipl.TEMPLATES[ours.index(digest)] for digest in published]  # in their order
    assert sorted(ours) == sorted(published) and len(ours) == TEMPLATE_LIST["count"] == 79
    for name in ("source", "target"):
        label = golden["config"][f"{name}_class"]
        close(ipl.label_features(clip_model, label), g[f"template_{name}_mean"][0])
        features = ipl.encode_texts(clip_model, [t.format(label) for t in templates])
        close(F.normalize(features, dim=-1), g[f"template_features_{name}_normed"])


def test_residual_features(golden, clip_model):
    labels = torch.cat([golden["stage1"][f"init_{x}_features"] for x in ("source", "target")])
    shared = golden["stage2"]["residual_as_run"]["features"][:1].expand(2, -1)
    for stage, published in ((1, labels), (2, shared)):
        for residual, expected in (("published", published), ("label", labels), ("none", 0)):
            features = ipl.residual_features(ipl.Config(residual=residual), clip_model, stage)
            close(features, torch.as_tensor(expected).expand_as(features))
