"""How the networks of the miniature world were trained: one command a file."""

import torch


def pick_device(name):
    """auto (a GPU if there is one), cpu, cuda or cuda:<n> -> torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
