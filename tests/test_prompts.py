"""Sections 3 and 4: the latent mapper, prompt construction and encoding."""

import hashlib

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, close, rng

import ipl

TEMPLATE_LIST = torch.load(GOLDEN / "clip_tiny_io.pt", weights_only=True)["template_list"]


@pytest.fixture
def clip_model(clip_pair):
    return clip_pair[0]


def test_scale_of_w_does_not_matter(golden, mapper):
    w = golden["stage1"]["w"]
    torch.testing.assert_close(mapper(7 * w), mapper(w), rtol=1e-4, atol=1e-5)


def test_initialisation():
    first, again, other = (ipl.LatentMapper(64, 4, 32, rng(seed)) for seed in (0, 0, 1))
    for a, b, c in zip(first.weights, again.weights, other.weights, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert abs(float(a.detach().std()) * first.lr_mul - 1) < 0.1
    assert all(not bias.any() for bias in first.biases)


def test_initialisation_leaves_the_global_seed_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ipl.LatentMapper(8, 4, 8, rng())
    assert torch.equal(torch.rand(3), expected)


def test_construct_prompts(golden, clip_model):
    g = golden["prompt"]
    ctx = golden["stage1"]["prompts"]
    for name in ("source", "target"):
        prompts = ipl.construct_prompts(clip_model, ctx, golden["config"][f"{name}_class"])
        B, L, _ = prompts.shape
        published = torch.cat(
            [g[f"{name}_prefix"].expand(B, -1, -1), ctx, g[f"{name}_suffix"].expand(B, -1, -1)], 1
        )
        assert L == 1 + 4 + 1 + 1  # one token for the label
        assert torch.equal(prompts, published[:, :L])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_golden_prompt_features(golden, clip_model, mapper, stage):
    g = golden[stage]
    ctx = mapper(g["w"])
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


def test_padding_changes_nothing(golden, clip_model):
    ctx = golden["stage1"]["prompts"]
    prompts = ipl.construct_prompts(clip_model, ctx, "anime")
    B, L, _ = prompts.shape
    eot = torch.full((B,), L - 1)
    junk = torch.randn(B, 9, 64, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([prompts, junk], dim=1)
    close(
        ipl.encode_embeddings(clip_model, padded, eot),
        ipl.encode_embeddings(clip_model, prompts, eot),
    )


def test_the_prompt_has_a_gradient_and_clip_has_none(golden, clip_model):
    ctx = golden["stage1"]["prompts"].clone().requires_grad_()
    ipl.encode_prompts(clip_model, ctx, "anime").sum().backward()
    assert ctx.grad.abs().sum() > 0
    assert all(p.grad is None for p in clip_model.parameters())


def test_too_long_a_prompt_is_refused(clip_model):
    label = "anime " * 60
    with pytest.raises(ValueError, match="tokens; this CLIP reads 77"):
        ipl.encode_prompts(clip_model, torch.zeros(1, 40, 64), label)
    with pytest.raises(ValueError, match="too long"):
        ipl.encode_prompts(clip_model, torch.zeros(1, 4, 64), label * 2)


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
    stage1 = [golden["stage1"][f"init_{name}_features"][0] for name in ("source", "target")]
    stage2 = golden["stage2"]["residual_as_run"]["features"][0]
    published, label, none = (
        ipl.Config(residual=residual) for residual in ("published", "label", "none")
    )
    close(ipl.residual_features(published, clip_model, stage=1), torch.stack(stage1))
    close(ipl.residual_features(published, clip_model, stage=2), torch.stack([stage2, stage2]))
    for stage in (1, 2):
        close(ipl.residual_features(label, clip_model, stage), torch.stack(stage1))
        assert not ipl.residual_features(none, clip_model, stage).any()


def test_a_label_that_was_never_read(clip_model):
    """Rows of the token embedding that no training has touched are 0; braces are just letters."""
    with pytest.warns(UserWarning, match="never read 'a {weird} label'"):
        assert ipl.label_features(clip_model, "a {weird} label").isfinite().all()
