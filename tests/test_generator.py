"""The generator: golden numbers of rosinality's network, and the protocol the method relies on."""

import copy
from pathlib import Path

import pytest
import torch

import ipl
from checkpoints import load_generator
from stylegan2_ops import Generator

GOLDEN = Path(__file__).parent / "golden"
IO = torch.load(GOLDEN / "rosinality_tiny_io.pt", weights_only=True)


@pytest.fixture
def generator():
    return load_generator(GOLDEN / "rosinality_tiny.pt")


def assert_golden(actual, expected):
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol)


def truncate(w, psi):
    return ipl.truncate(w, IO["mean_latent"], psi)


# ----------------------------------------------------------------------------------------------
# Golden numbers


def test_mapping(generator):
    assert_golden(generator.mapping(IO["z"]), IO["w"])


@pytest.mark.parametrize(
    "name, w",
    [
        ("image_trunc1", IO["w"]),
        ("image_trunc07", truncate(IO["w"], 0.7)),
        ("image_wplus", IO["wplus"]),
        ("image_wplus_trunc05", truncate(IO["wplus"], 0.5)),
    ],
)
def test_images(generator, name, w):
    assert_golden(generator.synthesis(w), IO[name])


@pytest.mark.parametrize("name", ["mix", "mix_trunc07"])
def test_style_mixing(generator, name):
    case = IO[name]
    w1, w2 = (
        truncate(generator.mapping(case[z]), case.get("truncation", 1)) for z in ("z1", "z2")
    )
    first = torch.arange(generator.num_ws) < case["inject_index"]
    w = torch.where(first[:, None], w1[:, None], w2[:, None])
    assert_golden(w, case["latent"])
    assert_golden(generator.synthesis(w), case["image"])


def test_noise_buffers_are_the_noise(generator):
    for i, noise in enumerate(IO["explicit_noise"]["noise"]):
        setattr(generator.noises, f"noise_{i}", noise)
    assert_golden(generator.synthesis(IO["w"]), IO["explicit_noise"]["image"])
    for noise in generator.noises.buffers():
        noise.zero_()
    assert_golden(generator.synthesis(IO["w"]), IO["image_zero_noise"])


def test_layer_outputs(generator):
    outputs = {"input": generator.input.input}
    for name in IO["layer_outputs_z0"].keys() - {"input"}:
        generator.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output})
        )
    generator.synthesis(IO["w"][:1])
    for name, expected in IO["layer_outputs_z0"].items():
        assert_golden(outputs[name], expected)


def test_double_precision(generator):
    generator.double()
    torch.testing.assert_close(generator.mapping(IO["z"].double()), IO["w_f64"], rtol=0, atol=1e-9)
    image = generator.synthesis(IO["w_f64"])
    torch.testing.assert_close(image, IO["image_trunc1_f64"], rtol=0, atol=1e-9)


def test_gradients_of_synthesis(generator):
    generator.requires_grad_()
    w = IO["wplus"].clone().requires_grad_()
    (generator.synthesis(w) * IO["grad"]["r"]).sum().backward()
    assert_golden(w.grad, IO["grad"]["grad_wplus"])
    parameters = dict(generator.named_parameters())
    for name, expected in IO["grad"]["param_grad_norm"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(expected, rel=1e-4)
    for name, expected in IO["grad"]["param_grad"].items():
        assert_golden(parameters[name].grad, expected)


def test_gradients_through_the_mapping(generator):
    generator.requires_grad_()
    z = IO["z"].clone().requires_grad_()
    (generator.synthesis(generator.mapping(z)) * IO["grad"]["r"]).sum().backward()
    assert_golden(z.grad, IO["grad_z"]["grad_z"])
    parameters = dict(generator.named_parameters())
    for name, expected in IO["grad_z"]["param_grad_norm"].items():
        assert parameters[name].grad.norm().item() == pytest.approx(expected, rel=1e-4)


# ----------------------------------------------------------------------------------------------
# Protocol


def test_sizes():
    channels = {4: 12, 8: 10, 16: 8, 32: 4}
    generator = Generator(16, channels, w_dim=6, n_mlp=2)
    assert (generator.z_dim, generator.w_dim, generator.num_ws) == (6, 6, 6)
    assert generator.channels == {4: 12, 8: 10, 16: 8}
    assert generator.w_avg.shape == (6,)
    assert generator.synthesis(generator.mapping(torch.randn(3, 6))).shape == (3, 3, 16, 16)
    assert generator.synthesis(torch.randn(0, 6)).shape == (0, 3, 16, 16)
    for resolution in (4, 24, 0):
        with pytest.raises(ValueError, match="power of two"):
            Generator(resolution, channels, w_dim=6)
    with pytest.raises(AssertionError):
        generator.synthesis(torch.randn(3, 5, 6))


def test_layers_are_what_each_w_feeds(generator):
    layers = generator.layers()
    assert len(layers) == generator.num_ws
    fed = {}
    for module in generator.modules():
        if hasattr(module, "modulation"):
            module.register_forward_pre_hook(lambda m, args: fed.update({m: args[1]}))
    w = IO["wplus"][:1]
    generator.synthesis(w)
    for j, layer in enumerate(layers[:-1]):
        assert torch.equal(fed[layer.conv], w[:, j])
    assert torch.equal(fed[generator.to_rgbs[-1].conv], w[:, -1])
    assert layers[-1] is layers[-2] is generator.convs[-1]
    trained = {parameter for layer in layers for parameter in layer.parameters()}
    frozen = {name for name, p in generator.named_parameters() if p not in trained}
    assert {name.split(".")[0] for name in frozen} == {"style", "input", "to_rgb1", "to_rgbs"}


def test_fresh_noise_is_drawn_from_the_given_generator_only(generator):
    w = IO["w"]
    before = torch.random.get_rng_state()
    first, again, other = (
        generator.synthesis(w, rng=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, generator.synthesis(w))
    assert torch.equal(generator.synthesis(w), generator.synthesis(w))
    same = generator.synthesis(w[:1].expand(2, -1), rng=torch.Generator().manual_seed(1))
    assert not torch.equal(same[0], same[1])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_w_and_its_repetition_give_one_image(generator):
    repeated = IO["w"][:, None].repeat(1, generator.num_ws, 1)
    assert_golden(generator.synthesis(repeated), generator.synthesis(IO["w"]))


def test_copy_is_independent(generator):
    twin = copy.deepcopy(generator)
    assert torch.equal(twin.w_avg, generator.w_avg)
    twin.convs[0].conv.weight.zero_()
    twin.w_avg.zero_()
    assert_golden(generator.synthesis(IO["w"]), IO["image_trunc1"])
    assert generator.w_avg.any()
