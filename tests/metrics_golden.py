"""Reference values of the metrics: golden/metrics.json, by the libraries that others use.

    pip install torch-fidelity piq
    python tests/metrics_golden.py

The values of HED and IR-SE50 are those of the classes in sniklaus/pytorch-hed (run.py, of 2018) and
gwang-kim/DiffusionCLIP (models/insight_face/), with the weights of `weights_like`: they stay as
they are in the file.
"""

import json
import zlib
from pathlib import Path

import torch

FILE = Path(__file__).parent / "golden" / "metrics.json"


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(n, side, seed):
    """Four pictures and what noise makes of them, uint8 [n, 3, side, side]."""
    x = (127 + 60 * draw(n, 3, side, side, seed=seed)).clamp(0, 255).to(torch.uint8)
    y = 0.8 * x + 20 * draw(n, 3, side, side, seed=seed + 1)
    return x, y.clamp(0, 255).to(torch.uint8)


def features():
    return draw(60, 8, seed=2), 1.3 * draw(60, 8, seed=3) + 0.2


def weights_like(state):
    """Weights of the same names and shapes, by the names alone; batch norms stay near 1."""
    made = {}
    for name, x in state.items():
        if not x.is_floating_point():
            made[name] = torch.zeros(x.shape, dtype=x.dtype)
            continue
        noise = draw(*x.shape, seed=zlib.crc32(name.encode()))
        if x.ndim > 1:
            made[name] = noise / x[0].numel() ** 0.5
        elif name.endswith("running_mean") or name.endswith("bias"):
            made[name] = 0.1 * noise
        else:
            made[name] = 1 + 0.1 * noise.clamp(-3, 3)
    return made


def values():
    """{name: what the libraries say of the inputs above}."""
    import piq
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    found = {}
    for side in (32, 400):
        x, y = (z / 255 for z in pictures(4, side, side))
        found[f"psnr {side}"] = piq.psnr(x, y, reduction="none").tolist()
        found[f"ssim {side}"] = piq.ssim(x, y, reduction="none").tolist()
    a, b = features()
    statistics = [fid_features_to_statistics(z.double()) for z in (a, b)]
    found["frechet"] = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    sizes = {"kid_subsets": 1, "kid_subset_size": len(a), "verbose": False}
    kid = kid_features_to_metric(a.double(), b.double(), **sizes)
    found["kid"] = float(kid["kernel_inception_distance_mean"])
    found["is"] = isc_features_to_metric(3 * a, 10, False)["inception_score_mean"]
    return found


if __name__ == "__main__":
    content = json.loads(FILE.read_text()) if FILE.exists() else {}
    FILE.write_text(json.dumps(content | values(), indent=1) + "\n")
