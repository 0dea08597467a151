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

VARIANTS = ("clamp", "cond", "resnet")
FILES = ["nvidia_tiny", "nvidia_tiny_py311", *(f"nvidia_variant_{name}" for name in VARIANTS)]
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


# ----------------------------------------------------------------------------------------------
# Golden numbers


@pytest.mark.parametrize("name", FILES)
def test_images_mapping_and_truncation(name):
    golden, generator = IO[name], load(name)
    for w in ("psi1", "psi07", "psi05_cutoff3", "plus", "mix"):
        kind = {"psi1": "const", "plus": "ws_plus_const", "mix": "ws_mix_const"}
        image = golden[f"image_{kind.get(w, f'const_{w}')}"]
        golden_close(generator.synthesis(golden[f"ws_{w}"]), image)
    for noise in generator.noises.buffers():
        noise.zero_()
    golden_close(generator.synthesis(golden["ws_psi1"]), golden["image_none"])
    golden_close(generator.synthesis(golden["ws_psi07"]), golden["image_none_psi07"])
    for i, z in enumerate(golden["z"]):
        class_index = None if golden["c"] is None else int(golden["c"][i].argmax())
        generator = load(name, class_index)
        w = generator.mapping(z[None])[0]
        golden_close(w, golden["w"][i])
        golden_close(generator.w_avg.lerp(w, 0.7), golden["ws_psi07"][i, 0])


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
        golden_close(output, expected[key])
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
    generator = load_generator(GOLDEN / f"{name}.pkl", "cuda")
    image = generator.synthesis(IO[name]["ws_plus"].cuda()).cpu()
    tolerance = 1e-2 if generator.num_fp16_res else 1e-4
    close(image, IO[name]["image_ws_plus_const"], rtol=0, scale=tolerance)


# ----------------------------------------------------------------------------------------------
# Variants that have no golden numbers

KINDS = {
    "plain": {},
    "orig": {"architecture": "orig"},
    "narrow z": {"z_dim": 5},
    "all": dict(architecture="resnet", c_dim=3, class_index=2, conv_clamp=256, z_dim=12,
                num_fp16_res=1, n_mlp=2),
}  # fmt: skip
MISFITS = {
    "orig": "the orig architecture",
    "narrow z": "z of 5 and w of 8 numbers",
    "all": "3 classes",
}


def variant(name, resolution=16):
    torch.manual_seed(0)
    channels = {4: 10, 8: 9, 16: 7, 32: 4}
    generator = Generator(resolution, channels, w_dim=8, **{"n_mlp": 3, **KINDS[name]})
    generator.w_avg.copy_(torch.randn(8))
    for parameter in generator.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return generator.requires_grad_(False)


@pytest.mark.parametrize("writer", [3, 4, 5, "torch.save", "torch.save, before 1.6", "alone"])
@pytest.mark.parametrize("name", KINDS)
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


@pytest.mark.parametrize("name", MISFITS)
def test_what_rosinalitys_layout_cannot_hold(tmp_path, name):
    said = refusal(lambda path: save_generator(variant(name), path), tmp_path / "network.pt")
    misfit = f"no place for {MISFITS[name]} in rosinality's layout"
    assert said == f"{misfit}; wanted: a .safetensors file" and not list(tmp_path.iterdir())


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
        kinds = ("_parameters", "_buffers", "_modules")
        kind = next((k for k in kinds if name in state[k]), "_modules" if name == "attn" else None)
        (state[kind] if kind else state)[name] = value
    return {"G_ema": root}


SIGNAL = module("SynthesisInput", size=np.array([36, 36]), bandwidth=np.float64(2))
SYNTHESIS = module("SynthesisNetwork", {}, {}, {"input": SIGNAL, "L0_36_512": module("L")})
STYLEGAN3 = module("Generator", {}, {}, {"synthesis": SYNTHESIS, "mapping": module("M")})
TENSORFLOW = Call("dnnlib.tflib.network", "Network", {"version": 4})
NAN, ATTENTION = torch.full([810], torch.nan), module("Attention", {"q": torch.zeros(2)})
CONV, BLOCK = "synthesis.b8.conv0", "synthesis.b8"
DIFFER = "G_ema: its blocks differ in architecture, conv_clamp or use_fp16"
OTHERS = [  # content: message
    ((TENSORFLOW, TENSORFLOW, TENSORFLOW), "a pickle of the TensorFlow era; wanted: "),
    ({"G": None, "G_ema": STYLEGAN3}, "G_ema is a StyleGAN3 generator; wanted: a StyleGAN2 "),
    ({"G": STYLEGAN3}, 'not a generator checkpoint, it has no "G_ema"; wanted: '),
    (changed(BLOCK, attn=ATTENTION), f"G_ema is not a plain StyleGAN2 generator, it has '{BLOCK}"),
    (changed("", img_channels=1), "G_ema.img_channels is 1; wanted: 3"),
    (changed("", z_dim="8"), "the config's z_dim is '8'; wanted: 1 to 65535"),
    (changed("", z_dim=[8]), "G_ema.z_dim is a list; wanted: a number"),
    (changed("", z_dim=9), "style.1.weight is (8, 8), not (8, 9)"),
    (changed("mapping.fc0", bias_gain=0.1), "G_ema.mapping.fc0.bias_gain is 0.1; wanted: 0.01"),
    (changed(CONV, use_noise=False), f"G_ema.{CONV}.use_noise is False; wanted: True"),
    (changed(CONV, activation="relu"), f"G_ema.{CONV}.activation is 'relu'; wanted: 'lrelu'"),
    (changed(CONV, conv_clamp=1), DIFFER),
    (changed(BLOCK, use_fp16=True), DIFFER),
    (changed(CONV, weight=None), f"G_ema lacks '{CONV}.weight'"),
    (changed(CONV, weight=5), f"'{CONV}.weight' is not a plain tensor of floats"),
    (changed(CONV, weight=torch.zeros(9, 10, 3, 2)), "convs.0.conv.weight is (1, 9, 10, 3, 2)"),
    (changed(CONV, weight=NAN[:810].view(9, 10, 3, 3)), "not finite: 'convs.0.conv.weight'"),
    (changed("synthesis", b4=None), "G_ema is no StyleGAN2 generator: its blocks are not 4, 8,"),
    (changed("synthesis", b8=3), "G_ema.synthesis.b8 is no module, or one of too many"),
    (changed("mapping", w_avg=torch.zeros(7)), '"latent_avg" is not a vector of 8'),
    (changed("mapping", w_avg=NAN[:8]), "not finite: 'latent_avg'"),
    (changed("mapping", x=Call("a.b", "C")), "G_ema.mapping has 'x': the name 'a.b.C' is not"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_other_networks(tmp_path, number):
    content, message = OTHERS[number]
    path = tmp_path / "network.pkl"
    for data in (dumps(content, 3), dumps(content, pickle.HIGHEST_PROTOCOL), torch_save(content)):
        path.write_bytes(data)
        assert refusal(load_generator, path).startswith(message)
