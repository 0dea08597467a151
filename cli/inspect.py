"""python ipl.py inspect: what is in a checkpoint. No network runs."""

from checkpoints import diffusion
from checkpoints.pickles import some
from checkpoints.stylegan2 import TRAINING, empty_generator, read_checkpoint
from cli.settings import expand


def inspect(source: str, /):
    """Print what is in a checkpoint, a line for each fact.

    Args:
        source: Checkpoint, a file or a URL; of a diffusion model, a folder or a file.
    """
    if diffusion.is_diffusion(expand(source)):
        facts = of_diffusion(diffusion.read_checkpoint(expand(source)))
    else:
        facts = of_stylegan2(expand(source))
    print("\n".join(f"{name:16}{value}" for name, value in facts.items()))


def of_diffusion(checkpoint):
    """{name: fact} of a diffusion model."""
    layout, config, schedule, state, _ = checkpoint
    attention = [kind.startswith("Attn") for kind in config["down_block_types"]]
    sides = [config["sample_size"] >> i for i in range(len(attention))]
    widths = zip(sides, config["block_out_channels"], strict=True)
    at = ", ".join(str(side) for side, has in zip(sides, attention, strict=True) if has)
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    beta, end, n = (schedule[k] for k in ("beta_start", "beta_end", "num_train_timesteps"))
    learned = ", and variances, left alone" if config["out_channels"] == 6 else ""
    return {
        "layout": layout,
        "resolution": config["sample_size"],
        "channels": ", ".join(f"{side}: {width}" for side, width in widths),
        "blocks": f"{config['layers_per_block']} at each size, attention at {at or 'none'}",
        "predicts": f"{schedule['prediction_type']}, the noise{learned}",
        "schedule": f"{schedule['beta_schedule']}, beta {beta:g} to {end:g} in {n} steps",
        "parameters": f"{sum(x.numel() for x in state.values()):,}, stored as {', '.join(types)}",
    }


def of_stylegan2(source):
    """{name: fact} of a GAN."""
    layout, config, state, w_avg, beside = read_checkpoint(source)
    generator = empty_generator(config)
    convs = sum(name.endswith(".noise.weight") for name in state)
    to_rgbs = sum(name.startswith("to_rgb") and name.endswith(".conv.weight") for name in state)
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    clamp, fp16, classes = (config[name] for name in ("conv_clamp", "num_fp16_res", "c_dim"))
    chosen = config["class_index"]
    drawn = "--class-index chooses" if chosen is None else f"of which it draws {chosen}"
    parameters = sum(p.numel() for p in generator.parameters())
    training = [name for name in beside if name in TRAINING]
    unknown = [name for name in beside if name not in TRAINING]
    return {
        "layout": layout,
        "resolution": config["resolution"],
        "channels": ", ".join(f"{size}: {width}" for size, width in config["channels"].items()),
        "z_dim, w_dim": f"{config['z_dim']}, {config['w_dim']}",
        "num_ws": generator.num_ws,
        "layers": f"{config['n_mlp']} of the mapping, {convs} convolutions, {to_rgbs} to RGB",
        "architecture": config["architecture"],
        "conv_clamp": "none" if clamp is None else f"{clamp:g}",
        "float16": f"{fp16} highest resolutions, on a GPU" if fp16 else "none",
        "classes": f"{classes}, {drawn}" if classes else "none",
        "parameters": f"{parameters:,}, stored as {', '.join(types)}",
        "w_avg": "none, it will be estimated" if w_avg is None else "in the file",
        "training state": ", ".join(training) or "none",
        "unknown": some(unknown) or "nothing",
    }
