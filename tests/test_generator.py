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


def test_images(generator):
    """Of one w for all layers and of one for each, as they are, truncated, and mixed from two z."""
    close(generator.mapping(IO["z"]), IO["w"])
    for name, psi, image in (
        ("w", 1, "image_trunc1"), ("w", 0.7, "image_trunc07"),
        ("wplus", 1, "image_wplus"), ("wplus", 0.5, "image_wplus_trunc05"),
    ):  # fmt: skip
        close(generator.synthesis(ipl.truncate(IO[name], IO["mean_latent"], psi)), IO[image])
    for case in IO["mix"], IO["mix_trunc07"]:
        first = torch.arange(generator.num_ws) < case["inject_index"]
        ws = [generator.mapping(case[z])[:, None] for z in ("z1", "z2")]
        psi = case.get("truncation", 1)
        w = ipl.truncate(torch.where(first[:, None], *ws), IO["mean_latent"], psi)
        close(w, case["latent"])
        close(generator.synthesis(w), case["image"])
    image = generator.double().synthesis(generator.mapping(IO["z"].double()))
    torch.testing.assert_close(image, IO["image_trunc1_f64"], rtol=0, atol=1e-9)


def test_noise_buffers_are_the_noise_and_a_copy_has_its_own(generator):
    twin = copy.deepcopy(generator)
    for i, noise in enumerate(IO["explicit_noise"]["noise"]):
        setattr(twin.noises, f"noise_{i}", noise)
    close(twin.synthesis(IO["w"]), IO["explicit_noise"]["image"])
    for noise in twin.noises.buffers():
        noise.zero_()
    close(twin.synthesis(IO["w"]), IO["image_zero_noise"])
    for tensor in (*twin.parameters(), twin.w_avg):
        tensor.zero_()
    close(generator.synthesis(IO["w"]), IO["image_trunc1"])
    assert generator.w_avg.any()


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


def test_sizes():
    channels = {4: 12, 8: 10, 16: 8, 32: 4}
    generator = Generator(16, channels, w_dim=6, n_mlp=2)
    assert (generator.z_dim, generator.w_dim, generator.num_ws) == (6, 6, 6)
    assert generator.channels == {4: 12, 8: 10, 16: 8} and generator.w_avg.shape == (6,)
    assert generator.synthesis(generator.mapping(torch.randn(0, 6))).shape == (0, 3, 16, 16)
    with pytest.raises(ValueError, match="power of two"):
        Generator(24, channels, w_dim=6)


def test_layers_are_what_each_w_feeds(generator):
    layers, fed, w = generator.layers(), {}, IO["wplus"][:1]
    for module in generator.modules():
        if hasattr(module, "modulation"):
            module.register_forward_pre_hook(lambda m, args: fed.update({m: args[1]}))
    generator.synthesis(w)
    modules = [*(layer.conv for layer in layers[:-1]), generator.to_rgbs[-1].conv]
    torch.testing.assert_close(torch.stack([fed[m] for m in modules], dim=1), w)
    assert layers[-1] is layers[-2] is generator.convs[-1]


def test_fresh_noise_is_drawn_from_the_given_generator_only(generator):
    w, before = IO["w"][:1].expand(2, -1), torch.random.get_rng_state()
    first, again, other = (generator.synthesis(w, rng=rng(seed)) for seed in (1, 1, 2))
    fixed, fixed_again = generator.synthesis(w), generator.synthesis(w)
    assert torch.equal(first, again) and torch.equal(fixed, fixed_again)
    for x, y in (first, other), (first, fixed), first.split(1):
        assert (x - y).abs().max() > 0.01
    assert torch.equal(torch.random.get_rng_state(), before)
