"""Damaged files for load_generator and read_clip: each loads or is refused, in 2 seconds and 1 GB.

  python -m tests.fuzz_checkpoints [SEED [COUNT [FOLDER]]]     0, 2000, a temporary folder

prints a line of JSON for each file that does something else and one of counts at the end; what
kills or blocks the process is for the caller to see. The same seed and number make the same file.
"""

import io
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
import zipfile
from pathlib import Path

import clip
import safetensors.torch
import torch

from checkpoints import CheckpointError, load_generator, save_generator
from checkpoints.clip import read_clip
from stylegan2_ops import Generator
from tests.nvidia_pickles import nvidia_pickle, torch_save

SECONDS, BYTES = 2, 2**30  # of CPU time, of memory
GOLDEN = Path(__file__).parent / "golden"
OPCODES = [ord(op.code) for op in pickletools.opcodes]
HUGE = [2**7, 2**8 - 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
WORDS = [*map(str, HUGE), "-1", "1e400", "null", "[]", '"x"', "0", "9" * 5000]  # in JSON


def seeds(folder):
    """{name: bytes} of files that load, in all formats; those for read_clip begin with clip."""
    torch.manual_seed(0)
    sizes = {"resolution": 8, "channels": {4: 3, 8: 2}, "w_dim": 4, "n_mlp": 1}
    small = Generator(**sizes, conv_clamp=256, num_fp16_res=1)
    other = Generator(**sizes, z_dim=3, c_dim=2, class_index=1, architecture="resnet")
    save_generator(small, folder / "small.pt")
    save_generator(other, folder / "other.safetensors")
    content = {"g_ema": small.state_dict(), "args": Path("x"), "g_optim": {"state": {0: {"a": 1}}}}
    model = clip.model.CLIP(8, 16, 1, 64, 8, 7, 50, 64, 1, 1).eval()
    with warnings.catch_warnings(action="ignore"):
        inputs = {"encode_image": torch.zeros(1, 3, 16, 16)}
        archive = torch.jit.trace_module(model, inputs, check_trace=False).save_to_buffer()
    wrapped = {f"module.{key}": x for key, x in model.state_dict().items()}
    return {
        **{name: (folder / name).read_bytes() for name in ("small.pt", "other.safetensors")},
        "legacy.pt": torch_save(content, new=False),
        "three.pkl": nvidia_pickle(small, 3),
        "four.pkl": nvidia_pickle(small, 4),
        "golden.pkl": (GOLDEN / "nvidia_variant_resnet.pkl").read_bytes(),
        "golden.pt": (GOLDEN / "rosinality_tiny.pt").read_bytes(),
        "clip.pt": archive,
        "clip2.pt": torch_save({"state_dict": wrapped}),
        "clip3.safetensors": safetensors.torch.save(model.state_dict()),
    }


# ----------------------------------------------------------------------------------------------
# Damage: (rng, bytes) -> bytes


def flip_bits(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def truncate(rng, data):
    return data[: rng.randrange(len(data))]


def move_bytes(rng, data):
    """Delete, repeat or overwrite a stretch."""
    size = rng.randint(1, min(len(data), rng.choice([1, 8, 100, 10_000])))
    i, j = (rng.randrange(len(data) - size + 1) for _ in range(2))
    stretch = data[i : i + size]
    deleted, repeated = data[:i] + data[i + size :], data[:j] + stretch + data[j:]
    return rng.choice([deleted, repeated, data[:j] + stretch + data[j + size :]])


def change_numbers(rng, data):
    """Write huge or small numbers over any bytes; or over the lengths, sizes and memo slots that
    are arguments of a pickle's operations; or other operations.
    """
    data, places, kind = bytearray(data), [], rng.choice(["any", "argument", "operation"])
    try:
        for _, _, position in pickletools.genops(bytes(data)) if kind != "any" else ():
            places.append(position)
    except ValueError:  # no pickle from there on
        pass
    for _ in range(rng.choice([1, 1, 2, 5])):
        start = rng.choice(places) if places else rng.randrange(len(data))
        new = struct.pack("<Q", rng.choice(HUGE))[: rng.choice([1, 2, 4, 8])]
        if kind == "operation":
            new = bytes([rng.choice(OPCODES)])
        start += kind == "argument"
        data[start : start + len(new)] = new
    return bytes(data)


def change_json(rng, data):
    """Huge numbers in the JSON at the head of a .safetensors file, whose length is set right."""
    size = int.from_bytes(data[:8], "little")
    head, rest = data[8 : 8 + size], data[8 + size :]
    i = rng.choice([i for i in range(size) if head[i : i + 1].isdigit()])
    head = head[:i] + rng.choice(WORDS).encode() + head[i + 1 :]
    return struct.pack("<Q", len(head)) + head + rest


def change_member(rng, data):
    """Damage to one member of a zip archive, most often its pickle, with a valid checksum."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        pickled = next(name for name in names if name.endswith("data.pkl"))
        chosen = rng.choice([pickled, pickled, pickled, rng.choice(names)])
        for name in names:
            member = old.read(name)
            damage = rng.choice(ANY)
            new.writestr(name, damage(rng, member) if name == chosen and member else member)
    return buffer.getvalue()


ANY = [flip_bits, truncate, move_bytes, change_numbers, change_numbers, change_numbers]


def damaged(files, seed, number):
    """-> (the name of an intact file, the bytes of its damaged copy)"""
    rng = random.Random(f"{seed}/{number}")
    name = rng.choice([*files, "three.pkl", "four.pkl", "small.pt"])
    data, damages = files[name], list(ANY)
    if data.startswith(b"PK"):
        damages += 8 * [change_member]
    if name.endswith(".safetensors"):
        damages += 3 * [change_json]
    for _ in range(rng.choice([1, 1, 1, 2])):
        if data:
            try:
                data = rng.choice(damages)(rng, data)
            except Exception:  # the first damage left nothing that the second can work on
                break
    return name, data


# ----------------------------------------------------------------------------------------------
# The check


def fault(load, path):
    """What `load` does wrong with the file, or None; and whether it loads."""
    try:
        load(path)
        return None, True
    except CheckpointError as error:
        message, cause = str(error), error.__cause__
        if not message.startswith(f"{path}: ") or "\n" in message or len(message) > 600:
            return f"message {message[:300]!r}", False
        if isinstance(cause, MemoryError) or "can't allocate" in str(cause):
            return f"memory: {cause!r:.300}", False
        return None, False
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300], False


def main(seed, count, folder, faulty=None):
    """faulty: a loader that does wrong, to show that it is seen."""
    files, doors = seeds(folder), {True: read_clip, False: load_generator}
    warnings.simplefilter("ignore")  # what they say of values that stay unread
    for name, data in files.items():  # they load, and what torch imports late is imported
        path = folder / f"seed-{name}"
        path.write_bytes(data)
        doors[name.startswith("clip")](path)
    if sys.platform == "linux":
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, now + BYTES))
    before, loaded, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0.0
    for number in range(count):
        name, data = damaged(files, seed, number)
        path = folder / f"{number}-{name}"
        path.write_bytes(data)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)  # its signal kills
        found, ok = fault(faulty or doors[name.startswith("clip")], path)
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - start
        if found is None and seconds > SECONDS:
            found = f"{seconds:.1f} s"
        if found:
            print(json.dumps({"file": path.name, "fault": found}), flush=True)
        else:
            path.unlink()
        loaded, slowest = loaded + ok, max(slowest, seconds)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    summary = {"files": count, "loaded": loaded, "slowest_s": slowest, "growth_mb": peak}
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    seed, count, *folder = sys.argv[1:] + ["0", "2000"][len(sys.argv) - 1 :]
    with tempfile.TemporaryDirectory() as temporary:
        main(seed, int(count), Path(*folder or [temporary]))
