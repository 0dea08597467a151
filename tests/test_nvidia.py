"""NVIDIA's pickles: golden numbers of the published networks, all variants, and what is refused."""

import pickle

import numpy as np
import pytest
import torch
from conftest import GOLDEN, assert_same, close, normal, refusal
from nvidia_pickles import Call, dumps, module, network, torch_save

from checkpoints import load_generator, save_generator
from stylegan2_ops import Generator

FILES = ["nvidia_tiny", "nvidia_tiny_py311"]
FILES += [f"nvidia_variant_{name}" for name in ("clamp", "cond", "resnet")]
IO = {  # their golden numbers
    name: torch.load(GOLDEN / f"{name.removesuffix('_py311')}_io.pt", weights_only=True)
    for name in FILES
}


def load(name, class_index=None):
    if "cond" in name and class_index is None:
        class_index = 0
    return load_generator(GOLDEN / f"{name}.pkl", class_index=class_index)


def golden_close(actual, expected):
    close(actual, expected, rtol=0, scale=3e-6)


@pytest.mark.parametrize("name", FILES)
def test_images_gradient_mapping_and_truncation(name):
    golden, generator = IO[name], load(name)
    kinds = {"psi1": "const", "plus": "ws_plus_const", "mix": "ws_mix_const"}
    for w in ("psi1", "psi07", "psi05_cutoff3", "plus", "mix"):
        image = golden[f"image_{kinds.get(w, f'const_{w}')}"]
        golden_close(generator.synthesis(golden[f"ws_{w}"]), image)
    w = golden["ws_plus"].clone().requires_grad_()
    (generator.synthesis(w) * golden["grad"]["r"]).sum().backward()
    close(w.grad, golden["grad"]["grad_ws_plus"])
    for noise in generator.noises.buffers():
        noise.zero_()
    golden_close(generator.synthesis(golden["ws_psi1"]), golden["image_none"])
    for i, z in enumerate(golden["z"]):
        generator = load(name, None if golden["c"] is None else int(golden["c"][i].argmax()))
        w = generator.mapping(z[None])[0]
        golden_close(w, golden["w"][i])
        golden_close(generator.w_avg.lerp(w, 0.7), golden["ws_psi07"][i, 0])


def test_same_as_the_converted_file():
    assert_same(load("nvidia_tiny"), load_generator(GOLDEN / "nvidia_tiny_as_rosinality.pt"))


def test_conditional_needs_a_class(tmp_path):
    path, saved = GOLDEN / "nvidia_variant_cond.pkl", tmp_path / "g.safetensors"
    for wrong in (None, 5):
        said = refusal(load_generator, path, class_index=wrong)
        assert said.startswith(f"class {wrong} of 5 classes; ") and said.endswith(" from 0 to 4")
    said = refusal(load_generator, GOLDEN / "nvidia_tiny.pkl", class_index=0)
    assert said == "class 0 of no classes; wanted: no class index"
    generator = load_generator(path, class_index=3)
    save_generator(generator, saved)
    assert load_generator(saved).class_index == 3
    assert load_generator(saved, class_index=1).class_index == 1


@pytest.mark.parametrize("name", ["nvidia_variant_clamp", "nvidia_variant_resnet"])
def test_clamp_and_float16_blocks(name):
    """float16 on a CUDA device only; here the CPU is taken for one."""
    generator, w = load(name), IO[name]["ws_plus"]
    outputs = []
    for layer in [generator.conv1, *generator.convs]:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    exact = generator.synthesis(w)
    if "clamp" in name:
        assert max(output.abs().max() for output in outputs) == 1.25
    outputs.clear()
    generator.fp16_device, generator.num_fp16_res = "cpu", 1
    generator.requires_grad_()
    image = generator.synthesis(w)
    types = [output.dtype for output in outputs]
    assert types == 3 * [torch.float32] + 2 * [torch.float16] and image.dtype == torch.float32
    assert 0 < (image - exact).abs().max() < 3e-3 * exact.abs().max()
    image.sum().backward()
    assert all(p.grad.isfinite().all() for p in generator.convs.parameters())


def test_float16_does_not_overflow():
    generator = Generator(16, {4: 8, 8: 8, 16: 8}, w_dim=8, conv_clamp=256, num_fp16_res=2)
    for conv in generator.convs:
        conv.conv.modulation.weight.data *= 1e4  # styles and weights beyond float16's 65504
        conv.conv.weight.data *= 1e5
    generator.fp16_device = "cpu"
    image = generator.synthesis(normal(2, 8))
    generator.num_fp16_res = 0
    exact = generator.synthesis(normal(2, 8))
    assert (image - exact).abs().max() < 1e-2 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name, tolerance", [("nvidia_tiny", 1e-4), ("nvidia_variant_clamp", 1e-2)])
def test_on_a_gpu(name, tolerance):
    generator = load_generator(GOLDEN / f"{name}.pkl", "cuda")
    image = generator.synthesis(IO[name]["ws_plus"].cuda()).cpu()
    close(image, IO[name]["image_ws_plus_const"], rtol=0, scale=tolerance)


MISFITS = {  # what rosinality's layout has no place for
    "variant_clamp": None,
    "variant_cond": "5 classes",
    "variant_resnet": "the resnet architecture",
}


@pytest.mark.parametrize("name", MISFITS)
def test_variants_are_read_and_kept(tmp_path, name):
    root, generator, path = network(name), load(f"nvidia_{name}"), tmp_path / "network.pt"
    content = {"G": None, "D": None, "G_ema": root}
    for data in (dumps(content, 3), *(torch_save(root, new) for new in (True, False))):
        path.write_bytes(data)
        assert_same(load_generator(path, class_index=generator.class_index), generator)
    path.unlink()
    save_generator(generator, tmp_path / "network.safetensors")
    assert_same(load_generator(tmp_path / "network.safetensors"), generator)
    if misfit := MISFITS[name]:
        said = refusal(lambda path: save_generator(generator, path), path)
        expected = f"no place for {misfit} in rosinality's layout; wanted: a .safetensors file"
        assert said == expected and not path.exists()
        return
    save_generator(generator, path)  # the clamp lies beside g_ema, where only we look
    assert_same(load_generator(path), generator)


def test_orig_is_the_convolutions_and_one_to_rgb():
    generator, w = Generator(16, {4: 8, 8: 8, 16: 8}, w_dim=8, architecture="orig"), normal(2, 8)
    noises = list(generator.noises.buffers())
    x = generator.conv1(generator.input.input.expand(2, -1, -1, -1), w, noises[0])
    for conv, noise in zip(generator.convs, noises[1:], strict=True):
        x = conv(x, w, noise)
    close(generator.synthesis(w), generator.to_rgbs[0](x, w))
    assert len(generator.layers()) == generator.num_ws == 6


def other(path, **changes):
    return {"G_ema": network("variant_resnet", path, **changes)}


def stylegan3(class_name="Generator", embed=None):
    """As training/networks_stylegan3.py has its parts, two layers of them; embed: StyleGAN-XL's."""

    def linear(inputs, outputs):
        parts = {"weight": torch.ones(outputs, inputs), "bias": torch.zeros(outputs)}
        return module("FullyConnectedLayer", parts, bias_gain=1, activation="linear")

    def layer(size):
        parts = {"weight": torch.ones(4, 4, 3, 3), "bias": torch.zeros(4)}
        filters = {"up_filter": torch.ones(12), "down_filter": None}
        sizes = {"in_size": np.array([size, size]), "in_cutoff": np.float64(2), "up_factor": 2}
        return module("SynthesisLayer", parts | filters, {"affine": linear(16, 4)}, **sizes)

    signal = {"freqs": torch.ones(4, 2), "phases": torch.ones(4), "transform": torch.eye(3)}
    numbers = {"size": np.array([36, 36]), "bandwidth": np.float64(2)}
    layers = {"input": module("SynthesisInput", signal, {"affine": linear(16, 4)}, **numbers)}
    names = ["L0_36_4", "L1_36_4"]
    layers |= {name: layer(36) for name in names}
    mapping = {"fc0": linear(16, 16), "fc1": linear(16, 16)}
    if embed:  # of a class that persistence does not hold
        mapping |= {"embed": embed, "embed_proj": linear(16, 16)}
    return module(class_name, {}, {
        "synthesis": module("SynthesisNetwork", {}, layers, layer_names=names, w_dim=16),
        "mapping": module("MappingNetwork", {}, mapping, w_dim=16),
    }, z_dim=16, img_resolution=16, img_channels=3)  # fmt: skip


STYLEGAN3, XL = stylegan3(), stylegan3(embed=Call("foreign.sparse", "Embedding"))
EG3D = module("TriPlaneGenerator", {}, {
    "renderer": Call("training.volumetric_rendering.renderer", "ImportanceRenderer"),
    "backbone": module("Generator", {}, {"synthesis": module("SynthesisNetwork")}),
})  # fmt: skip
TENSORFLOW = Call("dnnlib.tflib.network", "Network", {"version": 4})
NAN, ATTENTION = torch.full([16, 16, 3, 3], torch.nan), {"a": module("A", {"q": torch.ones(2)})}
FC, CONV = "mapping.fc0", "synthesis.b8.conv0"
OTHERS = [  # content: message
    ((TENSORFLOW, TENSORFLOW, TENSORFLOW), "a pickle of the TensorFlow era; wanted: "),
    ({"G": None, "G_ema": STYLEGAN3}, "G_ema is a StyleGAN3 generator; wanted: a StyleGAN2 or "),
    ({"G_ema": XL}, "G_ema is a StyleGAN-XL generator; wanted: a StyleGAN2 or "),
    ({"G_ema": EG3D}, "G_ema is an EG3D (tri-plane) generator; wanted: a StyleGAN2 or "),
    ({"G_ema": module("G", {}, {"synthesis": 1})}, "G_ema.synthesis is no module"),
    ({"G": STYLEGAN3}, 'not a generator checkpoint, it has no "G_ema"; wanted: '),
    (other(FC, _modules=ATTENTION), f"G_ema is not a plain StyleGAN2 generator, it has '{FC}"),
    (other(FC, bias_gain=0.1), f"G_ema.{FC}.bias_gain is 0.1; wanted: 0.01"),
    (other(CONV, conv_clamp=1), "G_ema: its blocks differ in architecture, conv_clamp or use_fp16"),
    (other(CONV, weight=None), f"G_ema lacks '{CONV}.weight'"),
    (other(CONV, weight=torch.zeros(9, 16, 3, 3)), "convs.0.conv.weight is (1, 9, 16, 3, 3)"),
    (other(CONV, weight=NAN), "not finite: 'convs.0.conv.weight'"),
    (other("synthesis", b4=None), "G_ema is no StyleGAN2 generator: its blocks are not 4, 8,"),
    (other("mapping", w_avg=torch.zeros(7)), '"latent_avg" is not a vector of 16'),
    (other("mapping", x=Call("a.b", "C")), "G_ema.mapping has 'x': the name 'a.b.C' is not"),
]  # fmt: skip


@pytest.mark.parametrize("content, message", OTHERS, ids=range(len(OTHERS)))
def test_other_networks(tmp_path, content, message):
    path = tmp_path / "network.pkl"
    for data in (dumps(content, 3), dumps(content, pickle.HIGHEST_PROTOCOL), torch_save(content)):
        path.write_bytes(data)
        assert refusal(load_generator, path).startswith(message)
