"""NVIDIA's pickles: golden numbers of the published networks, all variants, and what is refused."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from conftest import GOLDEN, assert_same, close, normal, refusal

from checkpoints import load_generator, save_generator
from checkpoints.nvidia import _names
from checkpoints.stylegan2 import read_checkpoint
from stylegan2_ops import Generator
from tests.nvidia_pickles import Call, dumps, module, nvidia_module, nvidia_pickle, torch_save

FILES = [
    "nvidia_tiny",
    "nvidia_tiny_py311",
    *(f"nvidia_variant_{x}" for x in "clamp cond resnet".split()),
]
IO = {  # their golden numbers
    name: torch.load(GOLDEN / f"{name.removesuffix('_py311')}_io.pt", weights_only=True)
    for name in FILES
}


def load(name, class_index=None):
    if "cond" in name and class_index is None:
        class_index = 0
    return load_generator(GOLDEN / f"{name}.pkl", class_index=class_index)


def assert_golden(actual, expected):
    close(actual, expected, rtol=0, scale=3e-6)


# ----------------------------------------------------------------------------------------------
# Golden numbers


@pytest.mark.parametrize("name", FILES)
def test_images(name):
    golden, generator = IO[name], load(name)
    for w, image in {
        "ws_psi1": "image_const",
        "ws_psi07": "image_const_psi07",
        "ws_psi05_cutoff3": "image_const_psi05_cutoff3",
        "ws_plus": "image_ws_plus_const",
        "ws_mix": "image_ws_mix_const",
    }.items():
        assert_golden(generator.synthesis(golden[w]), golden[image])
    for noise in generator.noises.buffers():
        noise.zero_()
    assert_golden(generator.synthesis(golden["ws_psi1"]), golden["image_none"])
    assert_golden(generator.synthesis(golden["ws_psi07"]), golden["image_none_psi07"])


@pytest.mark.parametrize("name", FILES)
def test_mapping_and_truncation(name):
    golden = IO[name]
    for i, z in enumerate(golden["z"]):
        class_index = None if golden["c"] is None else int(golden["c"][i].argmax())
        generator = load(name, class_index)
        w = generator.mapping(z[None])[0]
        assert_golden(w, golden["w"][i])
        truncated = generator.w_avg + 0.7 * (w - generator.w_avg)
        assert_golden(truncated, golden["ws_psi07"][i, 0])


@pytest.mark.parametrize("name", FILES)
def test_layers_and_gradient(name):
    golden, generator = IO[name], load(name)
    outputs, expected = {}, golden["layer_outputs_const_z0"]
    for key in expected:
        if "conv" in key:  # ours sums the image up within ToRGB
            size, index = int(key[1:].split(".")[0]), int(key[-1])
            ours = "conv1" if size == 4 else f"convs.{2 * size.bit_length() - 8 + index}"
            generator.get_submodule(ours).register_forward_hook(
                lambda module, args, output, key=key: outputs.update({key: output})
            )
    generator.synthesis(golden["ws_psi1"][:1])
    assert len(outputs) == generator.num_ws - 1
    for key, output in outputs.items():
        assert_golden(output, expected[key])
    w = golden["ws_plus"].clone().requires_grad_()
    (generator.synthesis(w) * golden["grad"]["r"]).sum().backward()
    close(w.grad, golden["grad"]["grad_ws_plus"])


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_is_that_of_g_ema(name):
    expected = IO[name]["expected"]["G_ema"]
    layout, config, state, w_avg, beside = read_checkpoint(GOLDEN / f"{name}.pkl")
    assert layout == "NVIDIA's"
    names = _names(
        list(config["channels"]), *(config[x] for x in ("n_mlp", "c_dim", "architecture"))
    )
    assert state.keys() == names.keys()
    tensors = {names[ours]: t / 4 if ours.endswith("kernel") else t for ours, t in state.items()}
    tensors["mapping.w_avg"] = w_avg
    for theirs, tensor in tensors.items():
        digest = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        assert digest == expected[theirs]["sha256"], theirs
        assert tensor.numel() == torch.Size(expected[theirs]["shape"]).numel()
    unused = expected.keys() - tensors.keys()
    assert all(name.endswith("resample_filter") for name in unused)
    assert beside == ["training_set_kwargs", "G", "D", "augment_pipe"]


def test_same_as_the_converted_file():
    assert_same(load("nvidia_tiny"), load_generator(GOLDEN / "nvidia_tiny_as_rosinality.pt"))


def test_attributes():
    clamp, cond, resnet = (load(f"nvidia_variant_{name}") for name in ("clamp", "cond", "resnet"))
    assert (clamp.conv_clamp, clamp.num_fp16_res, clamp.architecture) == (1.25, 2, "skip")
    assert (cond.conv_clamp, cond.num_fp16_res, cond.c_dim, cond.class_index) == (None, 0, 5, 0)
    assert (resnet.architecture, resnet.c_dim, resnet.n_mlp) == ("resnet", 0, 2)
    assert load("nvidia_tiny").channels == {4: 24, 8: 24, 16: 16, 32: 8}


# ----------------------------------------------------------------------------------------------
# Classes, clamp, float16


def test_conditional_needs_a_class(tmp_path):
    path, other = GOLDEN / "nvidia_variant_cond.pkl", GOLDEN / "nvidia_tiny.pkl"
    for wrong in (None, 5, -1):
        said = refusal(load_generator, path, class_index=wrong)
        assert said.startswith(f"class {wrong} of 5 classes; wanted: a class index")
        assert said.endswith(" from 0 to 4")
    said = refusal(load_generator, other, class_index=0)
    assert said == "class 0 of no classes; wanted: no class index"
    generator = load_generator(path, class_index=3)
    save_generator(generator, tmp_path / "g.safetensors")
    assert load_generator(tmp_path / "g.safetensors").class_index == 3
    assert load_generator(tmp_path / "g.safetensors", class_index=1).class_index == 1
    generator.class_index = None
    with pytest.raises(ValueError, match="class_index must be below 5, not None"):
        generator.mapping(torch.zeros(1, 16))


def layer_outputs(generator):
    """A list to which the convolutions append what they return."""
    outputs = []
    for layer in [generator.conv1, *generator.convs]:
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


def test_clamp_bounds_every_layer():
    generator = load("nvidia_variant_clamp")
    outputs = layer_outputs(generator)
    generator.synthesis(IO["nvidia_variant_clamp"]["ws_plus"])
    assert max(output.abs().max() for output in outputs) == 1.25


@pytest.mark.parametrize("name", ["nvidia_variant_clamp", "nvidia_variant_resnet"])
def test_float16_blocks(name):
    """On a CUDA device only; here the CPU is taken for one."""
    generator, w = load(name), IO[name]["ws_plus"]
    exact, outputs = generator.synthesis(w), layer_outputs(generator)
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
    w = normal(2, 8)
    image = generator.synthesis(w)
    generator.num_fp16_res = 0
    exact = generator.synthesis(w)
    assert (image - exact).abs().max() < 1e-2 * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["nvidia_tiny", "nvidia_variant_clamp"])
def test_on_a_gpu(name):
    generator, golden = load_generator(GOLDEN / f"{name}.pkl", "cuda"), IO[name]
    tolerance = 1e-2 if generator.num_fp16_res else 1e-4
    image = generator.synthesis(golden["ws_plus"].cuda()).cpu()
    expected = golden["image_ws_plus_const"]
    assert (image - expected).abs().max() < tolerance * expected.abs().max()


# ----------------------------------------------------------------------------------------------
# Variants that have no golden numbers

VARIANTS = {
    "plain": {},
    "orig": {"architecture": "orig"},
    "narrow z": {"z_dim": 5},
    "all": {
        "architecture": "resnet", "c_dim": 3, "class_index": 2, "conv_clamp": 256, "z_dim": 12,
        "num_fp16_res": 1, "n_mlp": 2,
    },
}  # fmt: skip


def variant(name, resolution=16):
    torch.manual_seed(0)
    channels = {4: 10, 8: 9, 16: 7, 32: 4}
    generator = Generator(resolution, channels, w_dim=8, **{"n_mlp": 3, **VARIANTS[name]})
    generator.w_avg.copy_(torch.randn(8))
    for parameter in generator.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return generator.requires_grad_(False)


@pytest.mark.parametrize("writer", [3, 4, 5, "torch.save", "torch.save, before 1.6", "alone"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_read_and_kept(tmp_path, name, writer):
    generator, path = variant(name), tmp_path / "network.pkl"
    if type(writer) is int:
        path.write_bytes(nvidia_pickle(generator, writer))
    else:
        network = nvidia_module(generator)
        content = network if writer == "alone" else {"G": None, "D": None, "G_ema": network}
        path.write_bytes(torch_save(content, new="before" not in writer))
    read = load_generator(path, class_index=generator.class_index)
    assert_same(read, generator)
    save_generator(read, tmp_path / "network.safetensors")
    assert_same(load_generator(tmp_path / "network.safetensors"), generator)
    z = normal(2, generator.z_dim)
    assert generator.synthesis(generator.mapping(z)).shape == (2, 3, 16, 16)


def test_orig_is_the_convolutions_and_one_to_rgb():
    generator, w = variant("orig"), normal(2, 8)
    noises = list(generator.noises.buffers())
    x = generator.conv1(generator.input.input.expand(2, -1, -1, -1), w, noises[0])
    for conv, noise in zip(generator.convs, noises[1:], strict=True):
        x = conv(x, w, noise)
    close(generator.synthesis(w), generator.to_rgbs[0](x, w))
    assert len(generator.layers()) == generator.num_ws == 6


@pytest.mark.parametrize(
    "name, misfit",
    [
        ("orig", "the orig architecture"),
        ("narrow z", "z of 5 and w of 8 numbers"),
        ("all", "3 classes"),
    ],
)
def test_what_rosinalitys_layout_cannot_hold(tmp_path, name, misfit):
    said = refusal(lambda path: save_generator(variant(name), path), tmp_path / "network.pt")
    assert said == f"no place for {misfit} in rosinality's layout; wanted: a .safetensors file"
    assert not list(tmp_path.iterdir())


def test_clamp_and_float16_survive_in_rosinalitys_layout(tmp_path):
    """Beside g_ema, where only we look: the layout itself has no place for them."""
    generator = load("nvidia_variant_clamp")
    save_generator(generator, tmp_path / "network.pt")
    content = torch.load(tmp_path / "network.pt", weights_only=True)
    assert content.keys() == {"g_ema", "latent_avg", "generator_config"}
    assert content["g_ema"].keys() == Generator(16, generator.channels, 16, 2).state_dict().keys()
    assert_same(load_generator(tmp_path / "network.pt"), generator)


# ----------------------------------------------------------------------------------------------
# Refusals


def changed(path, **changes):
    """A plain network with other attributes or parts in the module at `path`."""
    root = nvidia_module(variant("plain"))
    state = root.args[0]["state"]
    for part in filter(None, path.split(".")):
        state = state["_modules"][part].args[0]["state"]
    for name, value in changes.items():
        kind = next((k for k in ("_parameters", "_buffers", "_modules") if name in state[k]), None)
        (state[kind] if kind else state)[name] = value
    return {"G_ema": root}


def attention():
    content = changed("synthesis.b8")
    block = content["G_ema"].args[0]["state"]["_modules"]["synthesis"].args[0]["state"]["_modules"]
    block["b8"].args[0]["state"]["_modules"]["attn"] = module("Attention", {"q": torch.zeros(2)})
    return content


def stylegan3():
    signal = module("SynthesisInput", size=np.array([36, 36]), bandwidth=np.float64(2))
    synthesis = module("SynthesisNetwork", {}, {}, {"input": signal, "L0_36_512": module("L")})
    mapping = module("MappingNetwork", {}, {"w_avg": torch.zeros(8)})
    network = module("Generator", {}, {}, {"synthesis": synthesis, "mapping": mapping})
    return {"G": None, "G_ema": network}


TENSORFLOW = Call("dnnlib.tflib.network", "Network", {"version": 4})
CONV, DIFFER = (
    "synthesis.b8.conv0",
    "G_ema: its blocks differ in architecture, conv_clamp or use_fp16",
)
OTHERS = [
    ((TENSORFLOW, TENSORFLOW, TENSORFLOW), "a pickle of the TensorFlow era; wanted: "),
    (stylegan3(), "G_ema is a StyleGAN3 generator; wanted: a StyleGAN2 generator"),
    (attention(), "G_ema is not a plain StyleGAN2 generator, it has 'synthesis.b8.attn.q'"),
    ({"G": stylegan3()["G_ema"]}, 'not a generator checkpoint, it has no "G_ema"; wanted: '),
    (changed("", img_channels=1), "G_ema.img_channels is 1; wanted: 3"),
    (changed("", z_dim="8"), "the config's z_dim is '8'; wanted: 1 to 65535"),
    (changed("", z_dim=[8]), "G_ema.z_dim is a list; wanted: a number"),
    (changed("", z_dim=9), "style.1.weight is (8, 8), not (8, 9)"),
    (changed("mapping.fc0", bias_gain=0.1), "G_ema.mapping.fc0.bias_gain is 0.1; wanted: 0.01"),
    (changed(CONV, use_noise=False), f"G_ema.{CONV}.use_noise is False; wanted: True"),
    (changed(CONV, activation="relu"), f"G_ema.{CONV}.activation is 'relu'; wanted: 'lrelu'"),
    (changed(CONV, conv_clamp=1), DIFFER),
    (changed("synthesis.b8", use_fp16=True), DIFFER),
    (changed(CONV, weight=None), f"G_ema lacks '{CONV}.weight'"),
    (changed(CONV, weight=5), f"'{CONV}.weight' is not a plain tensor of floats"),
    (changed(CONV, weight=torch.zeros(9, 10, 3, 2)),
     "convs.0.conv.weight is (1, 9, 10, 3, 2), not (1, 9, 10, 3, 3)"),
    (changed(CONV, weight=torch.full((9, 10, 3, 3), torch.nan)), "not finite: 'convs.0.conv.weight'"),
    (changed("synthesis", b4=None), "G_ema is no StyleGAN2 generator: its blocks are not 4, 8, 16,"),
    (changed("synthesis", b8=3), "G_ema.synthesis.b8 is no module, or one of too many"),
    (changed("mapping", w_avg=torch.zeros(7)), '"latent_avg" is not a vector of 8'),
    (changed("mapping", w_avg=torch.full([8], torch.nan)), "not finite: 'latent_avg'"),
    (changed("mapping", x=Call("a.b", "C")), "G_ema.mapping has 'x': the name 'a.b.C' is not allowed"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_other_networks(tmp_path, number):
    content, message = OTHERS[number]
    path = tmp_path / "network.pkl"
    for data in (dumps(content, 3), dumps(content, pickle.HIGHEST_PROTOCOL), torch_save(content)):
        path.write_bytes(data)
        assert refusal(load_generator, path).startswith(message)
