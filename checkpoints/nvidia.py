"""NVIDIA's networks: stylegan2-ada-pytorch, and StyleGAN2 in the stylegan3 repository.

What their modules, tensors and attributes mean is in the published `training/networks.py` and
`training/networks_stylegan2.py`. No weight has to be turned or scaled to be one of ours.
"""

import re

from checkpoints.pickles import CheckpointError, Module, Opaque, some

# Attributes by which a layer would not be ours; one that is not in the file has this value.
_WANTED = {
    r"": {"img_channels": 3},
    r"mapping\.fc\d+": {"activation": "lrelu", "bias_gain": 0.01},
    r"mapping\.embed|.*\.affine": {"activation": "linear", "bias_gain": 1},
    r"synthesis\.b\d+\.conv[01]": {"activation": "lrelu", "use_noise": True},
}
_WANTED_OF_D = {
    r"": {"img_channels": 3, "c_dim": 0},
    r"b\d+": {"architecture": "resnet"},
    r"b\d+\.(fromrgb|conv[01])|b4\.conv": {"activation": "lrelu"},
    r"b\d+\.skip": {"activation": "linear", "conv_clamp": None},
    r"b4\.mbstd": {"num_channels": 1},
    r"b4\.fc": {"activation": "lrelu", "bias_gain": 1},
    r"b4\.out": {"activation": "linear", "bias_gain": 1},
}
# A module that only another family has, its name, and what our network lacks for it.
_FOURIER = "synthesis layers of another kind: Fourier features, filtered nonlinearities"
_OTHERS = (
    ("mapping.embed_proj", "a StyleGAN-XL", f"{_FOURIER}, class embeddings"),
    ("synthesis.input", "a StyleGAN3", _FOURIER),
    ("backbone.synthesis", "an EG3D (tri-plane)", "a volume renderer, and a camera for each image"),
)
# Tensors of a layer. Ours: theirs.
_LINEAR = {"weight": "weight", "bias": "bias"}
_MODULATED = {
    "conv.weight": "weight",
    "conv.modulation.weight": "affine.weight",
    "conv.modulation.bias": "affine.bias",
}
_CONV = {**_MODULATED, "noise.weight": "noise_strength", "activate.bias": "bias"}
_TO_RGB = {**_MODULATED, "bias": "bias"}
_SHORTCUT = {"weight": "weight", "blur.kernel": "resample_filter"}


def read_nvidia(module, read):
    """A Module -> (the arguments of Generator, its state dict, w_avg [w_dim] or None).

    read: (name, StoredTensor) -> tensor.
    Raises CheckpointError if it is no StyleGAN2 generator, or of a kind that our network is not.
    """
    for path, kind, needed in _OTHERS:
        if _has(module, path):
            wanted = f"a StyleGAN2 or StyleGAN2-ADA network; this one would need {needed}"
            raise CheckpointError(f"G_ema is {kind} generator; wanted: {wanted}")
    modules, tensors = _flatten(module, "G_ema")
    sizes = sorted(int(name[11:]) for name in modules if re.fullmatch(r"synthesis\.b\d+", name))
    if len(sizes) < 2 or sizes != [4 << k for k in range(len(sizes))]:
        raise CheckpointError("G_ema is no StyleGAN2 generator: its blocks are not 4, 8, 16, ...")
    attribute = _attributes(modules, _WANTED, "G_ema")
    blocks = [f"synthesis.b{size}" for size in sizes]
    layers = [name for name in modules if re.fullmatch(r"synthesis.*\.(conv[01]|torgb)", name)]
    architectures = {attribute(name, "architecture", "skip") for name in blocks}
    clamps = {attribute(name, "conv_clamp", None) for name in layers}
    fp16 = [bool(attribute(name, "use_fp16", False)) for name in blocks]
    if len(architectures) != 1 or len(clamps) != 1 or fp16[0] or fp16 != sorted(fp16):
        raise CheckpointError("G_ema: its blocks differ in architecture, conv_clamp or use_fp16")

    config = {
        "resolution": sizes[-1],
        "n_mlp": sum(bool(re.fullmatch(r"mapping\.fc\d+", name)) for name in modules),
        "z_dim": attribute("", "z_dim", None),
        "c_dim": attribute("", "c_dim", 0),
        "architecture": architectures.pop(),
        "conv_clamp": clamps.pop(),
        "num_fp16_res": sum(fp16),
    }
    names = _names(sizes, config["n_mlp"], config["c_dim"], config["architecture"])
    if missing := [name for name in names.values() if name not in tensors]:
        raise CheckpointError(f"G_ema lacks {some(missing)}")
    unused = sorted(tensors.keys() - names.values() - {"mapping.w_avg"})
    if extra := [name for name in unused if not name.endswith("resample_filter")]:
        raise CheckpointError(f"G_ema is not a plain StyleGAN2 generator, it has {some(extra)}")

    state = {ours: _fit(ours, read(theirs, tensors[theirs])) for ours, theirs in names.items()}
    firsts = ["conv1", *(f"convs.{2 * k}" for k in range(len(sizes) - 1))]
    biases = [state[f"{first}.activate.bias"] for first in firsts]
    config["channels"] = {size: b.numel() for size, b in zip(sizes, biases, strict=True)}
    config["w_dim"] = state["conv1.conv.modulation.weight"].shape[-1]
    w_avg = tensors.get("mapping.w_avg")
    return config, state, None if w_avg is None else read("mapping.w_avg", w_avg)


def read_nvidia_discriminator(module, read):
    """A Module -> (the arguments of Discriminator, its state dict); else as `read_nvidia`."""
    modules, tensors = _flatten(module, "D")
    sizes = sorted(int(name[1:]) for name in modules if re.fullmatch(r"b\d{1,9}", name))
    if len(sizes) < 2 or sizes != [4 << k for k in range(len(sizes))]:
        raise CheckpointError("D is no StyleGAN2 discriminator: its blocks are not 4, 8, 16, ...")
    attribute = _attributes(modules, _WANTED_OF_D, "D")
    if "b4.mbstd" not in modules:
        raise CheckpointError("D has no 'b4.mbstd'; wanted: a minibatch standard deviation")
    layers = [name for name in modules if re.fullmatch(r"b\d+\.(fromrgb|conv[01]?)", name)]
    clamps = {attribute(name, "conv_clamp", None) for name in layers}
    if len(clamps) != 1:
        raise CheckpointError("D: its blocks differ in conv_clamp")
    names = _names_of_d(sizes)
    if missing := [name for name in names.values() if name not in tensors]:
        raise CheckpointError(f"D lacks {some(missing)}")
    unused = sorted(tensors.keys() - names.values())
    if extra := [name for name in unused if not name.endswith("resample_filter")]:
        raise CheckpointError(f"D is not a plain StyleGAN2 discriminator, it has {some(extra)}")
    state = {ours: read(theirs, tensors[theirs]) for ours, theirs in names.items()}
    biases = {4: "b4.conv.bias"} | {size: f"b{size}.conv0.bias" for size in sizes[1:]}
    ours_of = {theirs: ours for ours, theirs in names.items()}
    return {
        "resolution": sizes[-1],
        "channels": {size: state[ours_of[theirs]].numel() for size, theirs in biases.items()},
        "stddev_group": attribute("b4.mbstd", "group_size", 4),
        "conv_clamp": clamps.pop(),
    }, state


def _names_of_d(sizes):
    """{our name: NVIDIA's} of all tensors of a discriminator, sizes 4, 8, ..., R."""
    first = f"b{sizes[-1]}.fromrgb"
    layers = {"convs.0.0.weight": f"{first}.weight", "convs.0.1.bias": f"{first}.bias"}
    for k, size in enumerate(reversed(sizes[1:]), 1):
        layers |= {
            f"convs.{k}.conv1.0.weight": f"b{size}.conv0.weight",
            f"convs.{k}.conv1.1.bias": f"b{size}.conv0.bias",
            f"convs.{k}.conv2.0.kernel": f"b{size}.conv1.resample_filter",
            f"convs.{k}.conv2.1.weight": f"b{size}.conv1.weight",
            f"convs.{k}.conv2.2.bias": f"b{size}.conv1.bias",
            f"convs.{k}.skip.0.kernel": f"b{size}.skip.resample_filter",
            f"convs.{k}.skip.1.weight": f"b{size}.skip.weight",
        }
    last = {"final_conv.0.weight": "conv.weight", "final_conv.1.bias": "conv.bias"}
    for i, name in enumerate(("fc", "out")):
        last |= {f"final_linear.{i}.{kind}": f"{name}.{kind}" for kind in ("weight", "bias")}
    return layers | {ours: f"b4.{theirs}" for ours, theirs in last.items()}


def _attributes(modules, wanted, network):
    """attribute(module's name, key, default) -> its value, a plain one.

    Raises CheckpointError, also now, if those in `wanted` have other values. network: its name.
    """

    def attribute(name, key, default):
        value = modules[name].state.get(key, default)
        if value is not None and type(value) not in (bool, int, float, str):
            where, kind = f"{name}.{key}".lstrip("."), type(value).__name__
            raise CheckpointError(f"{network}.{where} is a {kind}; wanted: a number")
        return value

    for pattern, attributes in wanted.items():
        for name in filter(re.compile(pattern).fullmatch, modules):
            for key, value in attributes.items():
                if (found := attribute(name, key, value)) != value:
                    where = f"{name}.{key}".lstrip(".")
                    raise CheckpointError(f"{network}.{where} is {found!r:.40}; wanted: {value!r}")
    return attribute


def _has(module, path):
    """Whether there is something at a dotted path below a module."""
    for name in path.split("."):
        if not isinstance(module, Module):
            return False
        module = module.state["_modules"].get(name)
    return module is not None


def _flatten(root, network):
    """All modules from `root` down, and all their tensors, by dotted name."""
    modules, tensors, todo, parts = {}, {}, {"": root}, 0
    while todo:
        name, module = todo.popitem()
        if isinstance(module, Module):  # what has the same parts as another one counts as well
            parts += 1 + sum(len(module.state[k]) for k in ("_modules", "_parameters", "_buffers"))
        if not isinstance(module, Module) or parts > 10_000 or len(module.state) > 300:
            raise CheckpointError(f"{network}.{name} is no module, or one of too many")
        for key, value in module.state.items():  # it may be another network
            if isinstance(value, Opaque) and not value.known:
                raise CheckpointError(f"{f'{network}.{name}'.rstrip('.')} has {key!r:.80}: {value}")
        modules[name] = module
        for kind, found in ("_modules", todo), ("_parameters", tensors), ("_buffers", tensors):
            for key, value in module.state[kind].items():
                if len(key) > 40 or not key.isidentifier() or len(name) > 80:
                    raise CheckpointError(f"{network}.{name[:80]} has a part {key[:40]!r}")
                if value is not None:
                    found[f"{name}.{key}".lstrip(".")] = value
    return modules, tensors


def _names(sizes, n_mlp, c_dim, architecture):
    """{our name: NVIDIA's} of all tensors of a generator."""
    names = {"input.input": "synthesis.b4.const"}

    def add(ours, theirs, layer):
        names.update({f"{ours}.{our}": f"{theirs}.{their}" for our, their in layer.items()})

    for i in range(n_mlp):
        add(f"style.{i + 1}", f"mapping.fc{i}", _LINEAR)
    if c_dim:
        add("embed", "mapping.embed", _LINEAR)
    for i in range(2 * len(sizes) - 1):  # b4 has no conv0
        ours = f"convs.{i - 1}" if i else "conv1"
        theirs = f"synthesis.b{4 << (i + 1) // 2}.conv{(i + 1) % 2}"
        add(ours, theirs, _CONV)
        names[f"noises.noise_{i}"] = f"{theirs}.noise_const"
        if i % 2:
            names[f"{ours}.conv.blur.kernel"] = f"{theirs}.resample_filter"
    for k, size in enumerate(sizes[1:]):
        if architecture == "skip":
            add(f"to_rgbs.{k}", f"synthesis.b{size}.torgb", _TO_RGB)
            names[f"to_rgbs.{k}.upsample.kernel"] = f"synthesis.b{size}.resample_filter"
        if architecture == "resnet":
            add(f"skips.{k}", f"synthesis.b{size}.skip", _SHORTCUT)
    if architecture == "skip":
        add("to_rgb1", "synthesis.b4.torgb", _TO_RGB)
    else:
        add("to_rgbs.0", f"synthesis.b{sizes[-1]}.torgb", _TO_RGB)
    return names


def _fit(name, tensor):
    """NVIDIA's tensor in the shape of ours called `name`."""
    if name.endswith(".kernel"):
        return tensor * 4  # the gain of upsampling, which NVIDIA applies in use
    if name.startswith("noises."):
        return tensor[None, None]
    if name.startswith("to_rgb") and name.endswith(".bias") and "modulation" not in name:
        return tensor[None, :, None, None]
    if name == "input.input" or name.endswith((".conv.weight", ".noise.weight")):
        return tensor[None]
    return tensor
