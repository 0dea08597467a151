"""Section 5: the losses and their gradients, and what they must do in general."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close, normal

import ipl

# --------------------------------------------------------------------------------------------
# Stage 1, golden

WEIGHTS = {
    "lambda_l1_src0": (1, 0),
    "lambda_l1_src1": (1, 1),
    "lambda_l05_src2": (0.5, 2),
    "lambda_l0": (0, 0),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_stage1_losses_and_gradients(golden, clip_pair, mapper, name):
    clip_model, transform = clip_pair
    g, expected = golden["stage1"], golden["stage1"][name]
    lambda_domain, lambda_source = WEIGHTS[name]
    image_features = ipl.image_encoder(clip_model, transform)(g["imgs"])
    close(F.normalize(image_features, dim=-1), g["image_features_normed"])

    residuals = ipl.residual_features(ipl.Config(), clip_model, stage=1)
    ctx = mapper(g["w"])
    t_source = ipl.encode_prompts(clip_model, ctx, "photo") + residuals[0]
    t_target = ipl.encode_prompts(clip_model, ctx, "anime") + residuals[1]
    close(F.normalize(t_source, dim=-1), g["text_source_after_residual"])
    close(F.normalize(t_target, dim=-1), g["text_target_after_residual"])

    contrastive = ipl.contrastive_loss(image_features, t_source, clip_model.logit_scale.exp())
    source = ipl.domain_loss(t_source, g["template_source_mean"][0])
    target = ipl.domain_loss(t_target, g["template_target_mean"][0])
    close(contrastive, expected["contrastive"])
    close(source, expected["source_domain"])
    close(target, expected["target_domain"])
    loss = contrastive + lambda_domain * (target + lambda_source * source)
    close(loss, expected["total"])

    loss.backward()
    for i in range(4):
        for kind, p in (("weight", mapper.weights[i]), ("bias", mapper.biases[i])):
            key = f"mapping.mapping.{i + 1}.{kind}"
            close(p.grad.norm(), expected["grad_norm"][key])
            if "grad" in expected:
                close(p.grad, expected["grad"][key])


# --------------------------------------------------------------------------------------------
# Stage 2, golden


@pytest.mark.parametrize("name", ["ipl_as_run_by_train_py", "ipl_with_class_in_residual", "nada"])
def test_stage2_losses_and_gradients(golden, clip_pair, mapper, name):
    clip_model, transform = clip_pair
    g, expected = golden["stage2"], golden["stage2"][name]
    cfg = ipl.Config(residual="label" if "class" in name else "published")
    if name == "nada":
        directions = ipl.label_direction(cfg, clip_model)
    else:
        directions = ipl.prompt_directions(cfg, clip_model, mapper)
    delta_text = directions(g["w"])
    close(F.normalize(delta_text, dim=-1), expected["target_direction"].expand(2, -1))

    encode_images = ipl.image_encoder(clip_model, transform)
    x_target = g["trainable_img"].clone().requires_grad_()
    source, target = encode_images(g["frozen_img"]), encode_images(x_target)
    close(F.normalize(source, dim=-1), g["frozen_img_features_normed"])
    close(F.normalize(target, dim=-1), g["trainable_img_features_normed"])
    delta_image = ipl.feature_delta(source, target)
    close(F.normalize(delta_image, dim=-1), expected["edit_direction"])
    loss = ipl.directional_loss(delta_image, delta_text)
    close(loss, expected["loss"])
    close(torch.autograd.grad(loss, x_target)[0], expected["grad_target_img"])


@pytest.mark.parametrize("name", ["ipl", "nada"])
def test_stage2_with_resized_images(golden, clip_pair, name):
    g = golden["stage2"]["resized_images"]
    expected = g[name]
    encode_images = ipl.image_encoder(*clip_pair)
    x_target = g["target_img_fp16"].float().requires_grad_()
    source, target = encode_images(g["src_img_fp16"].float()), encode_images(x_target)
    delta_image = ipl.feature_delta(source, target)
    loss = ipl.directional_loss(delta_image, expected["target_direction"])
    close(loss, expected["loss"])
    if "grad_target_img" in expected:
        close(torch.autograd.grad(loss, x_target)[0], expected["grad_target_img"])


# --------------------------------------------------------------------------------------------
# Properties


def halves(image_features, text_features, scale):
    logits = scale * F.normalize(image_features, dim=-1) @ F.normalize(text_features, dim=-1).T
    match = torch.arange(len(logits))
    return F.cross_entropy(logits, match), F.cross_entropy(logits.T, match)


@pytest.mark.parametrize("B", [2, 5, 32])
def test_a_shared_prompt_leaves_log_B(B):
    """The paper's point: one prompt for all images cannot tell them apart."""
    images, prompt = normal(B, 16), normal(1, 16, seed=1).expand(B, -1)
    image_to_text, text_to_image = halves(images, prompt, 100)
    loss = ipl.contrastive_loss(images, prompt, 100)
    torch.testing.assert_close(2 * loss - text_to_image, torch.tensor(math.log(B)))
    torch.testing.assert_close(image_to_text, torch.tensor(math.log(B)))
    own = ipl.contrastive_loss(images, images, 100)
    assert own < loss


def test_contrastive_loss_is_symmetric_and_scale_free():
    images, texts = normal(6, 16), normal(6, 16, seed=1)
    loss = ipl.contrastive_loss(images, texts, 10)
    torch.testing.assert_close(ipl.contrastive_loss(texts, images, 10), loss)
    torch.testing.assert_close(ipl.contrastive_loss(9 * images, texts / 7, 10), loss)
    order = torch.tensor([5, 3, 1, 0, 2, 4])
    torch.testing.assert_close(ipl.contrastive_loss(images[order], texts[order], 10), loss)


def test_domain_loss():
    label = normal(16)
    torch.testing.assert_close(ipl.domain_loss(3 * label.expand(4, -1), label), torch.tensor(0.0))
    torch.testing.assert_close(ipl.domain_loss(-label.expand(4, -1), 5 * label), torch.tensor(2.0))


def test_feature_delta_is_the_step_on_the_sphere():
    source, target = normal(4, 16), normal(4, 16, seed=1)
    delta = ipl.feature_delta(3 * source, target / 5)  # of any scale
    expected = target / target.norm(dim=1, keepdim=True) - source / source.norm(dim=1, keepdim=True)
    torch.testing.assert_close(delta, expected)


def test_directional_loss_is_0_along_and_2_against_the_text():
    delta = normal(4, 16)
    torch.testing.assert_close(
        ipl.directional_loss(delta, 3 * delta), torch.tensor(0.0), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(ipl.directional_loss(delta, -delta), torch.tensor(2.0))


def test_directional_loss_of_equal_images():
    """Finite with eps, 0/0 without, as published; and its gradient is bounded by 1 / eps."""
    source, text = normal(4, 16), normal(4, 16, seed=2)
    target = source.clone().requires_grad_()
    loss = ipl.directional_loss(ipl.feature_delta(source, target), text, eps=0.1)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(1.0))
    assert target.grad.isfinite().all() and 0 < target.grad.norm() < 10
    assert ipl.directional_loss(torch.zeros(4, 16), text).isnan()


def test_other_losses_of_equal_features_have_finite_gradients():
    x = normal(1, 16).expand(4, -1).clone().requires_grad_()
    ipl.contrastive_loss(x, x, 100).backward()
    ipl.domain_loss(x, x[0].detach()).backward()
    assert x.grad.isfinite().all()


def test_eps_vanishes_as_the_images_part():
    delta, text = 100 * normal(4, 16), normal(4, 16, seed=2)
    exact = ipl.directional_loss(delta, text)
    torch.testing.assert_close(ipl.directional_loss(delta, text, 1e-4), exact)
    assert ipl.directional_loss(delta, text, 100.0) > exact + 0.01 or exact > 1
