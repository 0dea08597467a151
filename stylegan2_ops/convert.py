"""What `python ipl.py convert` and `python ipl.py inspect` do. Neither runs a network."""

from pathlib import Path

from .checkpoints import empty_generator, read_checkpoint, write_checkpoint


def convert(source, target):
    """Write the generator of file or URL `source` to `target`, .pt or .safetensors, bit for bit.

    Raises ValueError if target is neither, CheckpointError if source cannot be read or does not fit
    rosinality's layout, which .pt is, and OSError if target cannot be written.
    """
    if Path(target).suffix not in (".pt", ".safetensors"):
        raise ValueError(f"{target}: wanted: a name in .pt (rosinality's layout) or .safetensors")
    write_checkpoint(read_checkpoint(source), target)


def describe(path):
    """What is in a file or behind a URL, in words, a line for each fact."""
    config, state, w_avg, beside = read_checkpoint(path)
    parameters = list(empty_generator(config).parameters())
    convs = sum(name.endswith(".noise.weight") for name in state)
    to_rgbs = sum(name.startswith("to_rgb") and name.endswith(".conv.weight") for name in state)
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    clamp, fp16, classes = (config[name] for name in ("conv_clamp", "num_fp16_res", "c_dim"))
    facts = {
        "resolution": config["resolution"],
        "channels": ", ".join(f"{size}: {width}" for size, width in config["channels"].items()),
        "z_dim, w_dim": f"{config['z_dim']}, {config['w_dim']}",
        "layers": f"{config['n_mlp']} of the mapping, {convs} convolutions, {to_rgbs} to RGB",
        "architecture": config["architecture"],
        "conv_clamp": "none" if clamp is None else f"{clamp:g}",
        "float16": f"{fp16} highest resolutions, on a GPU" if fp16 else "none",
        "classes": f"{classes}, one is chosen by --class" if classes else "none",
        "parameters": f"{sum(p.numel() for p in parameters):,}, stored as {', '.join(types)}",
        "w_avg": "none, it will be estimated" if w_avg is None else "in the file",
        "beside it": ", ".join(f"{name!s:.40}" for name in beside) or "nothing",
    }
    return "".join(f"{name:14}{value}\n" for name, value in facts.items())
