"""What `python ipl.py convert` and `python ipl.py inspect` do. Neither runs a network."""

from pathlib import Path

from .checkpoints import TRAINING, empty_generator, read_checkpoint, write_checkpoint
from .pickles import some


def convert(source: str, target: Path, /):
    """Write the generator of a checkpoint (a file or a URL) to another file, bit for bit.

    The name of the new file ends in .pt, for rosinality's layout, or in .safetensors. A file that
    is there is replaced. Raises ValueError if it is neither or in no folder, CheckpointError if the
    source cannot be read or does not fit rosinality's layout, OSError if the file cannot be
    written.
    """
    if target.suffix not in (".pt", ".safetensors") or not target.parent.is_dir():
        raise ValueError(
            f"cannot convert to {target}; wanted: a name in .pt (rosinality's layout) or "
            ".safetensors, in a folder that is there"
        )
    write_checkpoint(read_checkpoint(source), target)
    print(f"{target}: the generator of {source}")


def inspect(source: str, /):
    """Print what is in a checkpoint (a file or a URL), a line for each fact.

    Raises CheckpointError if it cannot be read.
    """
    layout, config, state, w_avg, beside = read_checkpoint(source)
    generator = empty_generator(config)
    convs = sum(name.endswith(".noise.weight") for name in state)
    to_rgbs = sum(name.startswith("to_rgb") and name.endswith(".conv.weight") for name in state)
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    clamp, fp16, classes = (config[name] for name in ("conv_clamp", "num_fp16_res", "c_dim"))
    parameters = sum(p.numel() for p in generator.parameters())
    training = [name for name in beside if name in TRAINING]
    unknown = [name for name in beside if name not in TRAINING]
    facts = {
        "layout": layout,
        "resolution": config["resolution"],
        "channels": ", ".join(f"{size}: {width}" for size, width in config["channels"].items()),
        "z_dim, w_dim": f"{config['z_dim']}, {config['w_dim']}",
        "num_ws": generator.num_ws,
        "layers": f"{config['n_mlp']} of the mapping, {convs} convolutions, {to_rgbs} to RGB",
        "architecture": config["architecture"],
        "conv_clamp": "none" if clamp is None else f"{clamp:g}",
        "float16": f"{fp16} highest resolutions, on a GPU" if fp16 else "none",
        "classes": f"{classes}, --class-index chooses" if classes else "none",
        "parameters": f"{parameters:,}, stored as {', '.join(types)}",
        "w_avg": "none, it will be estimated" if w_avg is None else "in the file",
        "training state": ", ".join(training) or "none",
        "unknown": some(unknown) or "nothing",
    }
    print("\n".join(f"{name:16}{value}" for name, value in facts.items()))
