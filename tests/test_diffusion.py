"""Diffusion models against the published functions: the network, steps, losses, a training run."""

from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, close, rng

import ipl
from checkpoints.diffusion import from_ddpm, from_guided
from diffusion import DiffusionGenerator, UNet, alphas_cumprod, generate, invert, step, timesteps
from diffusion.steps import everywhere
from diffusion.unet import config_of, time_waves

PUBLISHED = ipl.Config(
    method="nada", batch=1, steps=6, lr=1e-4, plain_adam=True, betas=(0.9, 0.999), growth=(1.3, 3),
    log_loss=True, clip_weights=(3.0,), layers="all", ema=0.0,
)  # fmt: skip


def read(name):
    return torch.load(GOLDEN / f"diffusion_{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def models():
    return read("models")


@pytest.fixture(scope="module")
def steps():
    return read("steps")


@pytest.fixture(scope="module")
def losses():
    return read("losses")


@pytest.fixture(scope="module")
def clip_of_then():
    """The CLIP of the golden losses: the miniature's, when they were made."""
    return ipl.load_clip(GOLDEN / "diffusion_clip.pt")


@pytest.fixture
def unet(models):
    return ddpm(models["state_dict"])


def ddpm(state):
    config, state = from_ddpm({name: x.float() for name, x in state.items()})
    unet = UNet(config | {"sample_size": 16})
    unet.load_state_dict(state)
    return unet.eval().requires_grad_(False)


@pytest.fixture
def alphas():
    return alphas_cumprod()


# ----------------------------------------------------------------------------------------------
# The network


def test_time_waves(models):
    t, y = models["temb"]["t"], models["temb"]["y"]
    close(time_waves(t, y.shape[1], flip=False, shift=1), y, rtol=1e-5)


def test_the_network_and_its_gradients(models, unet):
    golden = models["eps"]
    x = golden["x"].clone().requires_grad_()
    unet.requires_grad_(True)
    y = unet(x, golden["t"])
    close(y, golden["y"], rtol=1e-5)
    (y * golden["r"]).sum().backward()
    close(x.grad, golden["grad_x"])
    names, norms = golden["grad_norms"]["names"], golden["grad_norms"]["norms"]
    renamed = from_ddpm({name: models["state_dict"][name] for name in names})[1]
    parameters = dict(unet.named_parameters())
    close(torch.stack([parameters[name].grad.norm() for name in renamed]), norms)


def test_the_names_and_shapes_are_those_of_the_config():
    """All of a config has its way: levels, blocks, attention, heads, padding."""
    unet = UNet(config_of(16, (8, 16), (False, True), layers_per_block=2, norm_num_groups=4))
    names = {name.rsplit(".", 1)[0] for name, _ in unet.named_parameters()}
    assert {"down_blocks.1.attentions.1.to_q", "up_blocks.0.resnets.2.conv_shortcut"} <= names
    assert "down_blocks.1.downsamplers.0.conv" not in names
    assert unet.mid_block.attentions[0].heads == 2
    assert unet(torch.zeros(1, 3, 16, 16), torch.tensor([3])).shape == (1, 3, 16, 16)


# ----------------------------------------------------------------------------------------------
# Steps


def test_schedule_and_times(steps, alphas):
    close(alphas, steps["alphas_cumprod"], rtol=1e-6)
    for case in steps["sequences"]:
        assert timesteps(case["n"], case["t0"]) == case["seq"]


@pytest.mark.parametrize("name", ["reverse", "reverse_last", "invert", "invert_first_published"])
def test_single_steps(steps, unet, alphas, name):
    case = next(x for x in steps["cases"] if x["name"] == name)
    x, t = case["x"], case["t"]
    y, x0 = step(x, unet(x, everywhere(x, t)), t, case["t_next"], alphas)
    close(y, case["y"], rtol=1e-5)
    close(x0, case["x0"], rtol=1e-5)


def test_inversion_and_back(steps, unet, alphas):
    for case in steps["invert"]:
        times = timesteps(case["n"], case["t0"])
        close(invert(unet, case["x0"], times, alphas), case["x_lat"], scale=1e-4)
        few = timesteps(6, case["t0"])
        close(generate(unet, case["x_lat"], few, alphas), case["generated_6"], scale=1e-4)
        back = generate(unet, case["x_lat"], times, alphas)
        close(back, case["reconstruction"], scale=1e-4)


# ----------------------------------------------------------------------------------------------
# Losses, and DiffusionCLIP's training


def test_losses(losses, clip_of_then):
    clip_model, transform = clip_of_then
    E_I = ipl.image_encoder(clip_model, transform)
    cfg = ipl.Config(source=losses["source"], target=losses["target"])
    delta_text = ipl.label_direction(cfg, clip_model)(torch.zeros(1, 1))
    delta_text = delta_text / delta_text.norm(dim=-1, keepdim=True)
    close(delta_text, losses["text_direction"])
    x_source, x = losses["x_source"], losses["x_target"].clone().requires_grad_()
    d = ipl.directional_loss(ipl.feature_delta(E_I(x_source), E_I(x)), delta_text)
    close(d, losses["directional"])
    minus_log, l1 = -(1 - d / 2).log(), (x_source - x).abs().mean()
    close(minus_log, losses["minus_log"])
    close(l1, losses["l1"])
    total = losses["weights"]["clip"] * minus_log + losses["weights"]["l1"] * l1
    close(total, losses["total"])
    close(torch.autograd.grad(total, x)[0], losses["grad_x_target"], scale=1e-4)


def in_order(n):
    """Rows 0, 1, .., n - 1, 0, .. of a bank of n, one a call."""
    i = 0

    def draw(_):
        nonlocal i
        i += 1
        return torch.eye(n)[[(i - 1) % n]]

    return draw


def test_the_published_training(losses, models, clip_of_then, alphas):
    """Two passes over three pictures: the loss of each update, and how far each tensor moves."""
    golden = losses["trajectories"]["clip_finetune"]
    unet = ddpm(models["state_dict"])
    generator = DiffusionGenerator(unet, alphas, t0=golden["t0"], steps=golden["n_train"]).eval()
    w = generator.invert(golden["images"], golden["n_inv"])
    close(w[:, : -generator.code_dim], golden["x_lat"].flatten(1), scale=1e-4)
    generator.fill(w)
    apart = []

    def more_loss(x_source, x_target):
        apart.append((x_source - x_target).abs().mean((1, 2, 3)))
        return golden["l1_w"] * apart[-1]

    start = {name: x.clone() for name, x in unet.named_parameters()}
    renamed = from_ddpm({name: models["state_dict"][name] for name in golden["names"]})[1]
    norms = []

    def watch(stage, total, state):
        for i in range(total):
            yield i
            if i % 3 == 2:
                now = dict(state["target"].unet.named_parameters())
                norms.append(torch.stack([(now[k] - start[k]).norm() for k in renamed]))

    cfg = replace(PUBLISHED, source=losses["source"], target=losses["target"])
    adapted, _, history = ipl.adapt(
        cfg, generator, [clip_of_then], rng=rng(), draw_z=in_order(3), steps=watch,
        source_images=lambda z: golden["images"][z.argmax(1)], more_loss=more_loss,
    )  # fmt: skip
    l1 = golden["l1_w"] * torch.stack(apart)[:, 0].detach()
    loss = torch.tensor([row["loss"] for row in history]) - l1
    close(loss / golden["clip_w"], golden["loss_clip_printed"], rtol=2e-2)
    for found, norm in zip(norms, golden["update_norms"], strict=True):
        close(found.norm(), norm.norm(), rtol=1e-2)
    named, renamed = dict(adapted.unet.named_parameters()), from_ddpm(models["state_dict"])[1]
    names = dict(zip(models["state_dict"], renamed, strict=True))
    for name, x in golden["tensors_after"].items():
        if not name.endswith(".bias"):  # before a norm of one channel a bias moves by noise alone
            found, before = named[names[name]], start[names[name]]
            assert (found - x).norm() < 0.1 * (x - before).norm(), name


# ----------------------------------------------------------------------------------------------
# The generator


@pytest.fixture
def generator(unet, alphas):
    generator = DiffusionGenerator(unet, alphas, t0=300, steps=3).eval()
    images = torch.randn(5, 3, 16, 16, generator=rng()).clamp(-1, 1) * 0.5
    return generator.fill(generator.invert(images, 4))


def test_the_protocol_holds(generator):
    ipl.check_generator(generator)


def test_z_chooses_rows_and_none_twice(generator):
    z = generator.choose(7, rng())
    rows = z.argmax(1).tolist()
    assert z.shape == (7, 5) and sorted(rows[:5]) == [0, 1, 2, 3, 4]
    assert torch.equal(generator.mapping(z), generator.bank[rows])


def test_codes_are_standardised_over_the_bank(generator):
    codes = generator.bank[:, -generator.code_dim :]
    torch.testing.assert_close(codes.mean(0), torch.zeros(generator.code_dim), atol=1e-4, rtol=0)
    close(codes.std(0, correction=0), torch.ones(generator.code_dim), rtol=1e-3)


def test_the_gradient_through_checkpoints_is_that_of_the_plain_way(generator):
    w = generator.bank[:2]
    generator.unet.requires_grad_(True)
    names, parameters = zip(*generator.unet.named_parameters(), strict=True)
    found = torch.autograd.grad(generator.synthesis(w).square().sum(), parameters)
    x = w[:, : -generator.code_dim].unflatten(1, (3, 16, 16))
    plain = generate(generator.unet, x, timesteps(3, 300), generator.alphas)
    for name, a, b in zip(names, found, torch.autograd.grad(plain.square().sum(), parameters),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()), msg=name)


# ----------------------------------------------------------------------------------------------
# guided-diffusion's network


def test_a_guided_diffusion_network(models):
    """Learned variances, time as scale and shift, residual blocks that change the size, heads."""
    golden = models["improved"]
    state = {name: x.float() for name, x in golden["state_dict"].items()}
    config, renamed = from_guided(state, head=golden["kwargs"]["num_head_channels"])
    assert config["out_channels"] == 6 and config["sample_size"] == 16
    unet = UNet(config)
    unet.load_state_dict(renamed)
    close(unet.eval()(golden["x"], golden["t"]), golden["y"][:, :3], rtol=1e-5)
