"""The generator: golden numbers of rosinality's network, and the protocol the method relies on."""

import copy

import pytest
import torch
from conftest import GOLDEN, close, rng

import ipl
from checkpoints import load_generator
from stylegan2_ops import Generator

IO = torch.load(GOLDEN / "rosinality_tiny_io.pt", weights_only=True)


@pytest.fixture
def generator():
    return load_generator(GOLDEN / "rosinality_tiny.pt")


def truncate(w, psi):
    return ipl.truncate(w, IO["mean_latent"], psi)


# ----------------------------------------------------------------------------------------------
# Golden numbers


def test_images(generator):
    close(generator.mapping(IO["z"]), IO["w"])
    for name, w in {
        "image_trunc1": IO["w"],
        "image_trunc07": truncate(IO["w"], 0.7),
        "image_wplus": IO["wplus"],
        "image_wplus_trunc05": truncate(IO["wplus"], 0.5),
    }.items():
        close(generator.synthesis(w), IO[name])
    repeated = IO["w"][:, None].repeat(1, generator.num_ws, 1)
    close(generator.synthesis(repeated), IO["image_trunc1"])


@pytest.mark.parametrize("name", ["mix", "mix_trunc07"])
def test_style_mixing(generator, name):
    case = IO[name]
    first = torch.arange(generator.num_ws) < case["inject_index"]
    ws = [generator.mapping(case[z])[:, None] for z in ("z1", "z2")]
    w = truncate(torch.where(first[:, None], *ws), case.get("truncation", 1))
    close(w, case["latent"])
    close(generator.synthesis(w), case["image"])


def test_noise_buffers_are_the_noise(generator):
    for i, noise in enumerate(IO["explicit_noise"]["noise"]):
        setattr(generator.noises, f"noise_{i}", noise)
    close(generator.synthesis(IO["w"]), IO["explicit_noise"]["image"])
    for noise in generator.noises.buffers():
        noise.zero_()
    close(generator.synthesis(IO["w"]), IO["image_zero_noise"])


def test_layer_outputs(generator):
    outputs = {"input": generator.input.input}
    for name in IO["layer_outputs_z0"].keys() - {"input"}:
        generator.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output})
        )
    generator.synthesis(IO["w"][:1])
    for name, expected in IO["layer_outputs_z0"].items():
        close(outputs[name], expected)


def test_double_precision(generator):
    generator.double()
    w, image = generator.mapping(IO["z"].double()), generator.synthesis(IO["w_f64"])
    torch.testing.assert_close(w, IO["w_f64"], rtol=0, atol=1e-9)
    torch.testing.assert_close(image, IO["image_trunc1_f64"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("to, kind", [("wplus", "grad"), ("z", "grad_z")])
def test_gradients(generator, to, kind):
    """To W+, to z through the mapping, and to all weights."""
    x = IO[to].clone().requires_grad_()
    image = generator.requires_grad_().synthesis(x if to == "wplus" else generator.mapping(x))
    (image * IO["grad"]["r"]).sum().backward()
    close(x.grad, IO[kind][f"grad_{to}"])
    grads = {name: p.grad for name, p in generator.named_parameters()}
    for name, expected in IO[kind]["param_grad_norm"].items():
        close(grads[name].norm(), expected)
    for name, expected in IO[kind].get("param_grad", {}).items():
        close(grads[name], expected)


# ----------------------------------------------------------------------------------------------
# Protocol


def test_sizes():
    channels = {4: 12, 8: 10, 16: 8, 32: 4}
    generator = Generator(16, channels, w_dim=6, n_mlp=2)
    assert (generator.z_dim, generator.w_dim, generator.num_ws) == (6, 6, 6)
    assert generator.channels == {4: 12, 8: 10, 16: 8} and generator.w_avg.shape == (6,)
    assert generator.synthesis(generator.mapping(torch.randn(3, 6))).shape == (3, 3, 16, 16)
    assert generator.synthesis(torch.randn(0, 6)).shape == (0, 3, 16, 16)
    for resolution in (4, 24, 0):
        with pytest.raises(ValueError, match="power of two"):
            Generator(resolution, channels, w_dim=6)
    with pytest.raises(AssertionError):
        generator.synthesis(torch.randn(3, 5, 6))


def test_layers_are_what_each_w_feeds(generator):
    layers, fed, w = generator.layers(), {}, IO["wplus"][:1]
    for module in generator.modules():
        if hasattr(module, "modulation"):
            module.register_forward_pre_hook(lambda m, args: fed.update({m: args[1]}))
    generator.synthesis(w)
    modules = [*(layer.conv for layer in layers[:-1]), generator.to_rgbs[-1].conv]
    torch.testing.assert_close(torch.stack([fed[m] for m in modules], dim=1), w)
    assert layers[-1] is layers[-2] is generator.convs[-1]
    trained = {parameter for layer in layers for parameter in layer.parameters()}
    frozen = {name for name, p in generator.named_parameters() if p not in trained}
    assert {name.split(".")[0] for name in frozen} == {"style", "input", "to_rgb1", "to_rgbs"}


def test_fresh_noise_is_drawn_from_the_given_generator_only(generator):
    w, before = IO["w"][:1].expand(2, -1), torch.random.get_rng_state()
    first, again, other = (generator.synthesis(w, rng=rng(seed)) for seed in (1, 1, 2))
    fixed, fixed_again = generator.synthesis(w), generator.synthesis(w)
    assert torch.equal(first, again) and torch.equal(fixed, fixed_again)
    for x, y in (first, other), (first, fixed), first.split(1):
        assert (x - y).abs().max() > 0.01
    assert torch.equal(torch.random.get_rng_state(), before)


def test_copy_is_independent(generator):
    twin = copy.deepcopy(generator)
    assert torch.equal(twin.w_avg, generator.w_avg)
    twin.convs[0].conv.weight.zero_()
    twin.w_avg.zero_()
    close(generator.synthesis(IO["w"]), IO["image_trunc1"])
    assert generator.w_avg.any()
