"""Damaged files for load_generator and read_clip: each loads or is refused, in 2 seconds and 1 GB.

  python -m tests.fuzz_checkpoints [SEED [COUNT [FOLDER]]]     0, 2000, a temporary folder

prints a line of JSON for each file that does something else and one of counts at the end; what
kills or blocks the process is for the caller to see. The same seed and number make the same file.
"""

import contextlib
import json
import pickletools
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

import clip
import safetensors.torch
import torch

from checkpoints import CheckpointError, load_generator, save_generator
from checkpoints.clip import read_clip
from tests.nvidia_pickles import GOLDEN, dumps, members, network, torch_save, zipped

SECONDS, BYTES = 2, 2**30  # of CPU time, of memory
OPCODES = [ord(op.code) for op in pickletools.opcodes]
HUGE = [2**7, 2**8 - 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
JSON = [*map(str, HUGE), "-1", "1e400", "null", "[]", '"x"', "0", "9" * 5000]
KINDS = ["cut", "move", "move", "flip", "number", "argument", "operation"]


def seeds(folder):
    """{name: bytes} of files that load, in all formats; those for read_clip begin with clip."""
    small = load_generator(GOLDEN / "nvidia_variant_clamp.pkl")
    for name in ("small.pt", "other.safetensors"):
        save_generator(small, folder / name)
    content = {"g_ema": small.state_dict(), "args": Path("x"), "g_optim": {"state": {0: {"a": 1}}}}
    model = clip.model.CLIP(8, 16, 1, 64, 8, 7, 50, 64, 1, 1).eval()
    with warnings.catch_warnings(action="ignore"):
        inputs = {"encode_image": torch.zeros(1, 3, 16, 16)}
        archive = torch.jit.trace_module(model, inputs, check_trace=False).save_to_buffer()
    wrapped = {f"module.{key}": x for key, x in model.state_dict().items()}
    return {
        **{name: (folder / name).read_bytes() for name in ("small.pt", "other.safetensors")},
        "legacy.bin": torch_save(content, new=False),
        "three.pkl": dumps({"D": None, "G_ema": network("variant_clamp")}, 3),
        "four.pkl": dumps({"D": None, "G_ema": network("variant_resnet")}, 4),
        "clip.pt": archive,
        "clip2.pt": torch_save({"state_dict": wrapped}),
        "clip3.safetensors": safetensors.torch.save(model.state_dict()),
    }


def damage(rng, data):
    """Cut or move bytes, flip bits, write huge numbers, other arguments or other operations."""
    kind, size = rng.choice(KINDS), rng.choice([1, 1, 2, 4, 8, 100, 10_000])
    i, j, places = rng.randrange(len(data)), rng.randrange(len(data)), range(len(data))
    if kind == "cut":
        return data[:i]
    if kind == "move":  # or delete, or repeat
        return data[:j] + data[i : i + rng.choice([0, size])] + data[j + rng.choice([0, size]) :]
    if kind in ("argument", "operation"):
        with contextlib.suppress(ValueError):  # no pickle
            places = [place for _, _, place in pickletools.genops(data)]
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        i, number = rng.choice(places), struct.pack("<Q", rng.choice(HUGE))[:size]
        if kind == "flip":
            data[i] ^= 1 << rng.randrange(8)
        elif kind == "operation":
            data[i] = rng.choice(OPCODES)
        else:
            i += kind == "argument"
            data[i : i + len(number)] = number
    return bytes(data)


def damage_json(rng, data):
    """Other values in the JSON at the head of a .safetensors file, whose length is set right."""
    size = 8 + int.from_bytes(data[:8], "little")
    i = rng.choice([i for i in range(8, size) if data[i : i + 1].isdigit()])
    head = data[8:i] + rng.choice(JSON).encode() + data[i + 1 : size]
    return struct.pack("<Q", len(head)) + head + data[size:]


def damage_member(rng, data):
    """Damage to one member of a zip archive, most often its pickle, with a valid checksum."""
    files = members(data)
    chosen = rng.choice(3 * ["data.pkl"] + [rng.choice([*files])])
    return zipped({**files, chosen: damage(rng, files[chosen])})


def damaged(files, seed, number):
    """-> (the name of an intact file, the bytes of its damaged copy)"""
    rng = random.Random(f"{seed}/{number}")
    name = rng.choice([*files, "three.pkl", "four.pkl", "small.pt"])
    more = {".pt": damage_member, ".safetensors": damage_json}.get(Path(name).suffix, damage)
    data = rng.choice([damage, more])(rng, files[name])
    return name, damage(rng, data) if data and rng.random() < 0.25 else data


def fault(load, path):
    """What `load` does wrong with the file; "" if it refuses it as it should, None if it loads."""
    try:
        load(path)
    except CheckpointError as error:
        message, cause = str(error), error.__cause__
        said = message.startswith(f"{path}: ") and "\n" not in message and len(message) <= 600
        memory = isinstance(cause, MemoryError) or "can't allocate" in str(cause)
        return "" if said and not memory else f"{message[:300]!r}, {cause!r:.300}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]


def main(seed, count, folder, faulty=None):
    """faulty: a loader that does wrong, to show that it is seen."""
    files, doors, loaded = seeds(folder), {True: read_clip, False: load_generator}, 0
    warnings.simplefilter("ignore")  # what they say of values that stay unread
    for name, data in files.items():  # they load, and what torch imports late is imported
        path = folder / f"seed-{name}"
        path.write_bytes(data)
        doors[name.startswith("clip")](path)
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, now + BYTES))
    for number in range(count):
        name, data = damaged(files, seed, number)
        path = folder / f"{number}-{name}"
        path.write_bytes(data)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)  # its signal kills
        found = fault(faulty or doors[name.startswith("clip")], path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - start
        loaded += found is None
        if found or seconds > SECONDS:
            print(json.dumps({"file": path.name, "fault": found or f"{seconds:.1f} s"}), flush=True)
        else:
            path.unlink()
    print(json.dumps({"files": count, "loaded": loaded}), flush=True)


if __name__ == "__main__":
    seed, count, *folder = sys.argv[1:] + ["0", "2000"][len(sys.argv) - 1 :]
    with tempfile.TemporaryDirectory() as temporary:
        main(seed, int(count), Path(*folder or [temporary]))
