"""NVIDIA's generators: stylegan2-ada-pytorch, and StyleGAN2 in the stylegan3 repository.

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
    modules, tensors = _flatten(module)
    if "synthesis.input" in modules:
        raise CheckpointError("G_ema is a StyleGAN3 generator; wanted: a StyleGAN2 generator")
    sizes = sorted(int(name[11:]) for name in modules if re.fullmatch(r"synthesis\.b\d+", name))
    if len(sizes) < 2 or sizes != [4 << k for k in range(len(sizes))]:
        raise CheckpointError("G_ema is no StyleGAN2 generator: its blocks are not 4, 8, 16, ...")

    def attribute(name, key, default):
        value = modules[name].state.get(key, default)
        if value is not None and type(value) not in (bool, int, float, str):
            where = f"{name}.{key}".lstrip(".")
            raise CheckpointError(f"G_ema.{where} is a {type(value).__name__}; wanted: a number")
        return value

    for pattern, attributes in _WANTED.items():
        for name in filter(re.compile(pattern).fullmatch, modules):
            for key, wanted in attributes.items():
                if (found := attribute(name, key, wanted)) != wanted:
                    where = f"{name}.{key}".lstrip(".")
                    raise CheckpointError(f"G_ema.{where} is {found!r:.40}; wanted: {wanted!r}")
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


def _flatten(root):
    """All modules from `root` down, and all their tensors, by dotted name."""
    modules, tensors, todo, parts = {}, {}, {"": root}, 0
    while todo:
        name, module = todo.popitem()
        if isinstance(module, Module):  # what has the same parts as another one counts as well
            parts += 1 + sum(len(module.state[k]) for k in ("_modules", "_parameters", "_buffers"))
        if not isinstance(module, Module) or parts > 10_000 or len(module.state) > 300:
            raise CheckpointError(f"G_ema.{name} is no module, or one of too many")
        for key, value in module.state.items():  # it may be another network
            if isinstance(value, Opaque) and not value.known:
                raise CheckpointError(f"{f'G_ema.{name}'.rstrip('.')} has {key!r:.80}: {value}")
        modules[name] = module
        for kind, found in ("_modules", todo), ("_parameters", tensors), ("_buffers", tensors):
            for key, value in module.state[kind].items():
                if len(key) > 40 or not key.isidentifier() or len(name) > 80:
                    raise CheckpointError(f"G_ema.{name[:80]} has a part {key[:40]!r}")
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
