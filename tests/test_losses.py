"""Section 5: the losses and their gradients, and what they must do in general."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close, golden_parameter, normal

import ipl


@pytest.mark.parametrize(
    ("name", "lambda_domain", "lambda_source"),
    [("l1_src0", 1, 0), ("l1_src1", 1, 1), ("l05_src2", 0.5, 2), ("l0", 0, 0)],
)
def test_stage1_losses_and_gradients(golden, clip_pair, mapper, name, lambda_domain, lambda_source):
    clip_model, g, expected = clip_pair[0], golden["stage1"], golden["stage1"][f"lambda_{name}"]
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
    label, prompt = ipl.label_direction, ipl.prompt_directions
    clip_model, nada = clip_pair[0], name == "nada"
    direction = label(cfg, clip_model) if nada else prompt(cfg, clip_model, mapper)
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


def test_a_bank_is_more_to_tell_apart():
    """The batch itself as the bank is no bank; of more images, the own one is among them."""
    images, texts = normal(4, 16), normal(4, 16, seed=1)
    batch = ipl.contrastive_loss(images, texts, 10)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = ipl.contrastive_loss(images, texts, 10, 3 * images[order], order.argsort())
    torch.testing.assert_close(shuffled, batch)
    bank = torch.cat([normal(20, 16, seed=2), images])
    assert ipl.contrastive_loss(images, texts, 10, bank, torch.arange(20, 24)) > batch


def test_feature_delta_and_the_loss_of_equal_images():
    """With eps it is finite, with a gradient of at most 1 / eps; without, 0/0, as published."""
    source, text = normal(4, 16), normal(4, 16, seed=2)
    step = F.normalize(text, dim=1) - F.normalize(source, dim=1)
    torch.testing.assert_close(ipl.feature_delta(3 * source, text / 5), step)  # of any scale
    target = source.clone().requires_grad_()
    loss = ipl.directional_loss(ipl.feature_delta(source, target), text, eps=0.1)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(1.0))
    assert target.grad.isfinite().all() and 0 < target.grad.norm() < 10
    assert ipl.directional_loss(torch.zeros(4, 16), text).isnan()
    # eps vanishes as the images part
    exact, near, far = (ipl.directional_loss(100 * source, text, x) for x in (0, 1e-4, 100.0))
    torch.testing.assert_close(near, exact)
    assert far > exact + 0.01 or exact > 1
    # the other losses of equal features: 0 along the label, 2 against it, and finite gradients
    x = normal(1, 16).expand(4, -1).clone().requires_grad_()
    along, against = (ipl.domain_loss(x, scale * x[0].detach()) for scale in (3, -0.2))
    torch.testing.assert_close(torch.stack([along, against]), torch.tensor([0.0, 2.0]))
    (ipl.contrastive_loss(x, x, 100) + along).backward()
    assert x.grad.isfinite().all()
