"""How the networks of the miniature world were trained: one command a file."""

import torch


def pick_device(name):
    """auto (a GPU if there is one), cpu, cuda or cuda:<n> -> torch.device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def recorded(step, device, first=3):
    """step, ready to be called many times; on a GPU recorded once and replayed, as a CUDA graph.

    A step of many small operations costs a GPU more to be told than to do. step: a function without
    arguments that reads and writes the same tensors each time, never waits for a result, draws its
    chance from torch's own generators, and returns a tensor, which the next call overwrites. An
    optimiser in it is made with capturable=True, its rate, if it changes, a tensor. The first steps
    run as they are: they make what lasts.
    """
    if device.type != "cuda":
        return step
    side, graph, calls, result = torch.cuda.Stream(), torch.cuda.CUDAGraph(), 0, None

    def call():
        nonlocal calls, result
        calls += 1
        if calls <= first:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = step()
            torch.cuda.current_stream().wait_stream(side)
            return result
        if calls == first + 1:
            with torch.cuda.graph(graph):
                result = step()
        graph.replay()
        return result

    return call
