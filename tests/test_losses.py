"""Section 5: the losses and their gradients, and what they must do in general."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close, golden_parameter, normal

import ipl

WEIGHTS = {
    "lambda_l1_src0": (1, 0),
    "lambda_l1_src1": (1, 1),
    "lambda_l05_src2": (0.5, 2),
    "lambda_l0": (0, 0),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_stage1_losses_and_gradients(golden, clip_pair, mapper, name):
    clip_model, g, expected = clip_pair[0], golden["stage1"], golden["stage1"][name]
    lambda_domain, lambda_source = WEIGHTS[name]
    image_features = ipl.image_encoder(*clip_pair)(g["imgs"])
    close(F.normalize(image_features, dim=-1), g["image_features_normed"])

    residuals, ctx = ipl.residual_features(ipl.Config(), clip_model, stage=1), mapper(g["w"])
    t_source, t_target = (
        ipl.encode_prompts(clip_model, ctx, label) + residual
        for label, residual in zip(("photo", "anime"), residuals, strict=True)
    )
    close(F.normalize(t_source, dim=-1), g["text_source_after_residual"])
    close(F.normalize(t_target, dim=-1), g["text_target_after_residual"])

    contrastive = ipl.contrastive_loss(image_features, t_source, clip_model.logit_scale.exp())
    source = ipl.domain_loss(t_source, g["template_source_mean"][0])
    target = ipl.domain_loss(t_target, g["template_target_mean"][0])
    loss = contrastive + lambda_domain * (target + lambda_source * source)
    found = {"contrastive": contrastive, "source_domain": source, "target_domain": target}
    for name, x in (found | {"total": loss}).items():
        close(x, expected[name])

    loss.backward()
    for name, norm in expected["grad_norm"].items():
        close(golden_parameter(mapper, name).grad.norm(), norm)
    for name, grad in expected.get("grad", {}).items():
        close(golden_parameter(mapper, name).grad, grad)


def check_stage2(clip_pair, x_source, x_target, delta_text, expected):
    """The loss and its gradient are as published -> the features of both, and their difference."""
    x_target, E_I = x_target.clone().requires_grad_(), ipl.image_encoder(*clip_pair)
    source, target = E_I(x_source), E_I(x_target)
    delta_image = ipl.feature_delta(source, target)
    loss = ipl.directional_loss(delta_image, delta_text)
    close(loss, expected["loss"])
    if "grad_target_img" in expected:
        close(torch.autograd.grad(loss, x_target)[0], expected["grad_target_img"])
    return [F.normalize(x, dim=-1) for x in (source, target, delta_image)]


@pytest.mark.parametrize("name", ["ipl_as_run_by_train_py", "ipl_with_class_in_residual", "nada"])
def test_stage2_losses_and_gradients(golden, clip_pair, mapper, name):
    g, expected = golden["stage2"], golden["stage2"][name]
    cfg = ipl.Config(residual="label" if "class" in name else "published")
    if name == "nada":
        direction = ipl.label_direction(cfg, clip_pair[0])
    else:
        direction = ipl.prompt_directions(cfg, clip_pair[0], mapper)
    delta_text = direction(g["w"])
    close(F.normalize(delta_text, dim=-1), expected["target_direction"].expand(2, -1))
    images = g["frozen_img"], g["trainable_img"]
    source, target, delta_image = check_stage2(clip_pair, *images, delta_text, expected)
    close(source, g["frozen_img_features_normed"])
    close(target, g["trainable_img_features_normed"])
    close(delta_image, expected["edit_direction"])


@pytest.mark.parametrize("name", ["ipl", "nada"])
def test_stage2_with_resized_images(golden, clip_pair, name):
    g = golden["stage2"]["resized_images"]
    images = g["src_img_fp16"].float(), g["target_img_fp16"].float()
    check_stage2(clip_pair, *images, g[name]["target_direction"], g[name])


@pytest.mark.parametrize("B", [2, 5, 32])
def test_a_shared_prompt_leaves_log_B(B):
    """The paper's point: one prompt for all images cannot tell them apart."""
    images, prompt = normal(B, 16), normal(1, 16, seed=1).expand(B, -1)
    logits = 100 * F.normalize(prompt, dim=-1) @ F.normalize(images, dim=-1).T
    text_to_image = F.cross_entropy(logits, torch.arange(B))
    loss = ipl.contrastive_loss(images, prompt, 100)
    torch.testing.assert_close(2 * loss - text_to_image, torch.tensor(math.log(B)))
    assert ipl.contrastive_loss(images, images, 100) < loss


def test_contrastive_loss_is_symmetric_and_scale_free():
    images, texts = normal(6, 16), normal(6, 16, seed=1)
    loss, order = ipl.contrastive_loss(images, texts, 10), torch.tensor([5, 3, 1, 0, 2, 4])
    for a, b in ((texts, images), (9 * images, texts / 7), (images[order], texts[order])):
        torch.testing.assert_close(ipl.contrastive_loss(a, b, 10), loss)


def test_losses_are_0_along_and_2_against_the_text():
    label, delta = normal(16), normal(4, 16)
    for loss, expected in (
        (ipl.domain_loss(3 * label.expand(4, -1), label), 0.0),
        (ipl.domain_loss(-label.expand(4, -1), 5 * label), 2.0),
        (ipl.directional_loss(delta, 3 * delta), 0.0),
        (ipl.directional_loss(delta, -delta), 2.0),
    ):
        torch.testing.assert_close(loss, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_feature_delta_is_the_step_on_the_sphere():
    source, target = normal(4, 16), normal(4, 16, seed=1)
    delta = ipl.feature_delta(3 * source, target / 5)  # of any scale
    torch.testing.assert_close(delta, F.normalize(target, dim=1) - F.normalize(source, dim=1))


def test_eps():
    """Equal images: finite, a gradient of at most 1 / eps; 0/0 without. It vanishes far away."""
    source, text = normal(4, 16), normal(4, 16, seed=2)
    target = source.clone().requires_grad_()
    loss = ipl.directional_loss(ipl.feature_delta(source, target), text, eps=0.1)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(1.0))
    assert target.grad.isfinite().all() and 0 < target.grad.norm() < 10
    assert ipl.directional_loss(torch.zeros(4, 16), text).isnan()
    exact, near, far = (ipl.directional_loss(100 * source, text, x) for x in (0, 1e-4, 100.0))
    torch.testing.assert_close(near, exact)
    assert far > exact + 0.01 or exact > 1
    # the other losses of equal features have finite gradients
    x = normal(1, 16).expand(4, -1).clone().requires_grad_()
    (ipl.contrastive_loss(x, x, 100) + ipl.domain_loss(x, x[0].detach())).backward()
    assert x.grad.isfinite().all()
