"""Pictures by the ten thousand, drawn once, by all processors."""

import contextlib
import functools
import hashlib
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints.files import write_atomically
from miniature import faces

CHUNK = 20  # persons that share a seed, whatever the number of processes


def chance(n, seed):
    """The noise [n, 1, SIZE, SIZE] of which the pictures of `draw` with this seed are made."""
    return torch.cat([_noise(min(CHUNK, n - i), seed, i) for i in range(0, n, CHUNK)])


def _noise(n, seed, first):
    rng = torch.Generator().manual_seed(seed * 1_000_003 + first)
    return torch.randn(n, 1, faces.SIZE, faces.SIZE, generator=rng)


@torch.inference_mode()
def _chunk(persons, styles, seed, first):
    torch.set_num_threads(1)
    noise = _noise(len(persons), seed, first)
    drawn = [faces.render(persons, s, noise=noise) for s in styles.unbind(1)]
    return ((torch.stack(drawn, 1) + 1) * 127.5).round().to(torch.uint8).numpy()  # sent as bytes


def draw(persons, styles, seed, *, processes=None, desc="pictures"):
    """Pictures, uint8 [n, 3, SIZE, SIZE], of persons in styles [n, 6], each with its own noise.

    Of styles [n, k, 6], k pictures of each person [n, k, 3, SIZE, SIZE], which share their noise.
    seed: of the noise, see `chance`. processes: how many draw, each on a thread; all processors
    unless told otherwise. The pictures are the same for any number.
    """
    n, several = len(persons), styles if styles.ndim == 3 else styles[:, None]
    places = range(0, n, CHUNK)
    parts = [(persons[i : i + CHUNK], several[i : i + CHUNK], seed, i) for i in places]
    images = torch.empty(n, several.shape[1], 3, faces.SIZE, faces.SIZE, dtype=torch.uint8)
    processes = min(processes or os.cpu_count() or 1, len(parts))
    with workers(processes) as pool:
        drawn = pool.map(_chunk, *zip(*parts, strict=True))
        for i, part in zip(places, tqdm(drawn, desc, len(parts), disable=None), strict=True):
            images[i : i + CHUNK] = torch.from_numpy(part)
    return images if styles.ndim == 3 else images[:, 0]


def ends_at_once():
    """In a process of its own: Ctrl-C, of which the first process tells."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def workers(n, begin=ends_at_once):
    """A pool of n processes, each of which begins so; they end with what is inside, whatever ends
    it."""
    with ProcessPoolExecutor(n, get_context("spawn"), begin) as pool:
        try:
            yield pool
        except BaseException:
            for child in active_children():
                child.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def kept(path, make, **asked):
    """What make() gives, tensors that torch can save: from its file, if that was made by the same
    renderer for the same numbers; else made, and kept there."""
    for name in ("faces", "portrait", "canvas"):
        painter = Path(faces.__file__).with_name(f"{name}.py")
        asked[name] = hashlib.sha256(painter.read_bytes()).hexdigest()
    found = torch.load(path, weights_only=True) if path.exists() else {}
    if found.get("asked") == asked:
        return found["drawn"]
    found = {"asked": asked, "drawn": make()}
    write_atomically(path, functools.partial(torch.save, found))
    return found["drawn"]


def as_images(pixels):
    """uint8 pictures, as floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1
