"""Section 4: prompt construction and encoding."""

import hashlib

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN as FOLDER
from conftest import close

import ipl

GOLDEN = torch.load(FOLDER / "ipl_losses.pt", weights_only=True)
TEMPLATE_LIST = torch.load(FOLDER / "clip_tiny_io.pt", weights_only=True)["template_list"]


@pytest.fixture
def clip_model(clip_pair):
    return clip_pair[0]


def test_construct_prompts(clip_model):
    g = GOLDEN["prompt"]
    ctx = GOLDEN["stage1"]["prompts"]
    for name in ("source", "target"):
        prompts = ipl.construct_prompts(clip_model, ctx, GOLDEN["config"][f"{name}_class"])
        B, L, _ = prompts.shape
        published = torch.cat(
            [g[f"{name}_prefix"].expand(B, -1, -1), ctx, g[f"{name}_suffix"].expand(B, -1, -1)], 1
        )
        assert L == 1 + 4 + 1 + 1  # one token for the label
        assert torch.equal(prompts, published[:, :L])


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_golden_prompt_features(clip_model, stage):
    g = GOLDEN[stage]
    ctx = GOLDEN["stage1"]["prompts"] if stage == "stage1" else golden_mapper()(g["w"])
    close(ipl.encode_prompts(clip_model, ctx, "photo"), g["source_text_features"][:, 0])
    close(ipl.encode_prompts(clip_model, ctx, "anime"), g["target_text_features"][:, 0])


def golden_mapper():
    mapper = ipl.LatentMapper(32, 4, 64)
    for i in range(4):
        mapper.weights[i].data.copy_(GOLDEN["mapper_state"][f"mapping.mapping.{i + 1}.weight"])
        mapper.biases[i].data.copy_(GOLDEN["mapper_state"][f"mapping.mapping.{i + 1}.bias"])
    return mapper


@pytest.mark.parametrize("label", ["photo", "anime painting", "sketch of the human face"])
def test_a_prompt_of_words_equals_encode_text(clip_model, label):
    """With CLIP's own embeddings of "a photo of a" as ctx, the prompt is a plain text."""
    ctx = clip_model.token_embedding(clip.tokenize("a photo of a")[:, 1:5])
    text = clip_model.encode_text(clip.tokenize(f"a photo of a {label}"))
    close(ipl.encode_prompts(clip_model, ctx, label), text)


def test_padding_changes_nothing(clip_model):
    ctx = GOLDEN["stage1"]["prompts"]
    prompts = ipl.construct_prompts(clip_model, ctx, "anime")
    B, L, _ = prompts.shape
    eot = torch.full((B,), L - 1)
    junk = torch.randn(B, 9, 64, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([prompts, junk], dim=1)
    close(
        ipl.encode_embeddings(clip_model, padded, eot),
        ipl.encode_embeddings(clip_model, prompts, eot),
    )


def test_batch_equals_one_by_one(clip_model):
    ctx = GOLDEN["stage1"]["prompts"]
    together = ipl.encode_prompts(clip_model, ctx, "anime")
    order = torch.tensor([3, 1, 0, 2])
    close(ipl.encode_prompts(clip_model, ctx[order], "anime"), together[order])
    for i in range(len(ctx)):
        close(ipl.encode_prompts(clip_model, ctx[i : i + 1], "anime")[0], together[i])


@pytest.mark.parametrize("labels", [("photo", "anime"), ("photo", "an old painting"), ("b c", "x")])
def test_both_prompts_in_one_pass_are_those_of_two(clip_model, labels):
    """Whichever of the two is longer."""
    cfg = ipl.Config(source=labels[0], target=labels[1], residual="none")
    ctx = GOLDEN["stage1"]["prompts"]
    features_of = ipl.prompt_features(cfg, clip_model, lambda w: ctx, stage=1)
    for found, label in zip(features_of(torch.zeros(len(ctx), 1)), labels, strict=True):
        close(found, ipl.encode_prompts(clip_model, ctx, label))


def test_the_prompt_has_a_gradient_and_clip_has_none(clip_model):
    ctx = GOLDEN["stage1"]["prompts"].clone().requires_grad_()
    ipl.encode_prompts(clip_model, ctx, "anime").sum().backward()
    assert ctx.grad.abs().sum() > 0
    assert all(p.grad is None for p in clip_model.parameters())


def test_label_changes_the_feature(clip_model):
    ctx = GOLDEN["stage1"]["prompts"]
    features = [ipl.encode_prompts(clip_model, ctx, label) for label in ("photo", "anime")]
    assert (features[0] - features[1]).norm() > 1e-2


def test_too_long_a_prompt_is_refused(clip_model):
    label = "anime " * 60
    with pytest.raises(ValueError, match="tokens; this CLIP reads 77"):
        ipl.encode_prompts(clip_model, torch.zeros(1, 40, 64), label)
    with pytest.raises(ValueError, match="too long"):
        ipl.encode_prompts(clip_model, torch.zeros(1, 4, 64), label * 2)


def test_label_features(clip_model):
    g, published = GOLDEN["stage1"], TEMPLATE_LIST["sha256_each"]
    ours = [hashlib.sha256(t.encode()).hexdigest() for t in ipl.TEMPLATES]
    templates = [ipl.TEMPLATES[ours.index(digest)] for digest in published]  # in their order
    assert sorted(ours) == sorted(published) and len(ours) == TEMPLATE_LIST["count"] == 79
    for name in ("source", "target"):
        label = GOLDEN["config"][f"{name}_class"]
        close(ipl.label_features(clip_model, label), g[f"template_{name}_mean"][0])
        features = ipl.encode_texts(clip_model, [t.format(label) for t in templates])
        close(F.normalize(features, dim=-1), g[f"template_features_{name}_normed"])


def test_residual_features(clip_model):
    stage1 = [GOLDEN["stage1"][f"init_{name}_features"][0] for name in ("source", "target")]
    stage2 = GOLDEN["stage2"]["residual_as_run"]["features"][0]
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
