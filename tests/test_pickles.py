"""The restricted reader: nothing is run, and no file makes it slow, large or crash."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import clip  # noqa: F401  read_clip does it late, and its memory would count
import pytest
import torch
from conftest import GOLDEN, assert_same, refusal
from nvidia_pickles import Payload, dumps, members, module, torch_save, zipped

from checkpoints import CheckpointError, load_generator
from checkpoints.clip import read_clip
from checkpoints.pickles import MAX_OPERATIONS
from checkpoints.stylegan2 import read_checkpoint

TINY, BIAS = GOLDEN / "rosinality_tiny.pt", "convs.0.activate.bias"


@pytest.fixture
def refused(tmp_path):
    """refused(data) -> why. It must take neither 2 seconds nor 100 MB, one at each door."""

    def refused(data, doors=(load_generator, load_generator)):
        path = tmp_path / "network.pkl"
        path.write_bytes(data)
        start = time.process_time()
        message = refusal(doors[0], path)
        seconds = time.process_time() - start
        tracemalloc.start()  # which makes it slower
        refusal(doors[1], path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seconds < 2 and peak < 100e6 + 4 * len(data), (seconds, peak)
        assert message.isascii() and message.isprintable()
        return message

    return refused


def text(value):
    value = value.encode()
    return b"X" + struct.pack("<I", len(value)) + value


def item(key, value):
    """A dict with one item: both are opcodes that make one value."""
    return b"}" + key + value + b"s"


def binary(data):
    return b"B" + struct.pack("<I", len(data)) + data


def call(module, name, args=b")"):
    return f"c{module}\n{name}\n".encode() + args + b"R"


def nested(operations):
    """A file of torch.save in the file, as NVIDIA's pickles have them, with another value."""
    empty = torch_save({}, new=False)
    data = empty[: empty.index(b"\x80\x02}q\x00.")] + b"\x80\x02" + operations + b"."
    return call("torch.storage", "_load_from_bytes", binary(data) + b"\x85")


# A tuple of 2 ** 60 elements by reference, and one of 100,000 levels: to hash, compare or print
# them takes for ever, or the whole C stack.
WIDE = b"N\x85q\0" + b"h\0h\0\x86q\0" * 60
DEEP = b"N" + b"\x85" * 100_000
ONE_HASH = [b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") for k in range(1, 50_000)]
META = item(text("class_name"), text("Loop")) + text("state") + b"}(" + text("_modules") + b"}q\0"
META += text("_parameters") + b"}" + text("_buffers") + b"}us"
LOOP = call("torch_utils.persistence", "_reconstruct_persistent_obj", META + b"\x85") + b"q\1"
ESCAPE = call("\x1b[2J\u202e", "x" * 150)  # no name can write to the terminal
TENSOR = dumps(torch.zeros(2), 3)
STORAGE = TENSOR[TENSOR.index(b"B", TENSOR.index(b"_load_from_bytes")) :]
STORAGE = STORAGE[: 5 + struct.unpack_from("<I", STORAGE, 1)[0]]
ABUSE = {
    "text of 2^63 bytes": b"\x8d" + struct.pack("<Q", 2**63) + b"x.",
    "int in digits": b"L" + b"9" * 10_000_000 + b"L\n.",
    "memo slot 2^32": b"Nr\xff\xff\xff\xff0.",
    "too many operations": b"N" * (MAX_OPERATIONS + 1) + b".",
    "deep lists": b"]" * (MAX_OPERATIONS // 3) + b"a" * (MAX_OPERATIONS // 3 - 1) + b".",
    "deep key": item(DEEP, b"N") + b".",
    "wide key": item(WIDE, b"N") + b".",
    "list in itself": item(text("G_ema"), b"]q\0h\0a") + b".",
    "module in itself": item(text("G_ema"), LOOP) + text("x") + b"h\0" + text("loop") + b"h\1ss.",
    "call of a type": call("torch", "FloatStorage", b"K\1\x85") + b".",
    "nested, no storage": nested(call("collections", "OrderedDict")) + b".",
    "nested ever again": b"(ctorch.storage\n_load_from_bytes\nq\0" + STORAGE + b"\x85q\1"
    + b"h\0h\1R" * 20_000 + b"t.",  # three operations more for some 60: they count as one file's
    "one long list, many sizes": b"](" + b"N" * 100_000 + b"eq\1ctorch\nSize\nq\0("
    + b"h\0h\1\x85R" * 10_000 + b"t.",
    "long names": text("x" * 10**7) + b"q\0" + text("x" * 10**7) + b"q\1"
    + b"h\0h\0\x93h\0h\1\x93" * 10_000 + b".",
    "escape": ESCAPE + b".",
    "keys of one hash": b"}(" + b"N".join(ONE_HASH) + b"Nu.",
    "wrappers in wrappers": item(text("module." * 10**6), b"N") + b".",
}  # fmt: skip
SAID = {"nested ever again": "300,000 operations", "module in itself": "has a part 'loop'"}


@pytest.mark.parametrize("name", ABUSE)
def test_abuse(refused, name):
    assert SAID.get(name, "") in refused(ABUSE[name], (load_generator, read_clip))


@pytest.mark.parametrize("load", [load_generator, read_clip])
@pytest.mark.parametrize("name", ["os:system", "torch:load", "torch.serialization:os.system",
                                  "collections:OrderedDict.__init__"])  # fmt: skip
def test_no_name_is_looked_up(refused, name, load):
    module, function = name.split(":")
    stacked = b"\x80\x04" + text(module) + text(function) + b"\x93"
    called = call(module, function, b"(X\1\0\0\0xt") + b"."
    inside = nested(call(module, function)) + b"."
    for data in (called, inside, stacked + b".", stacked + b"N\x85}\x92."):
        assert f"the name '{module}.{function}' is not allowed" in refused(data, (load, load))


class Script(torch.nn.Module):
    """Writes a file when it is opened: TorchScript runs __setstate__, and it can save."""

    @torch.jit.export
    def __getstate__(self):
        return self.training

    @torch.jit.export
    def __setstate__(self, state: bool):
        self.training = state
        torch.save(torch.zeros(1), "pwned")


def hostile(checkpoint):
    """{name: bytes}: golden files, and programs at any place of a checkpoint and an archive."""
    files = {f"golden, {path}": path.read_bytes() for path in GOLDEN.glob("nvidia_hostile*.pkl")}
    keys = "g_ema", "G_ema", "latent_avg", "generator_config", "args", "state_dict"
    contents = {key: {**checkpoint, key: Payload()} for key in keys}
    weight = {"g_ema": {**checkpoint["g_ema"], "style.1.bias": Payload()}}
    for name, content in {**contents, "alone": Payload(), "weight": weight}.items():
        files |= {name: torch_save(content), f"{name}, old": torch_save(content, new=False)}
        files[f"{name}, pickle"] = dumps(content, 4)
    script = files["script"] = torch.jit.script(Script()).save_to_buffer()
    in_itself = b"\x80\x02c__torch__\nA\n)\x81q\x00}(X\x01\x00\x00\x00ah\x00ub."  # obj.a = obj
    for data in (in_itself, dumps(Payload(), 2), dumps([Payload()], 2)):
        files[f"script, {data}"] = zipped({**members(script), "data.pkl": data})
    return files


@pytest.mark.filterwarnings("ignore")  # of values left unread, and of TorchScript
@pytest.mark.parametrize("door", [load_generator, read_checkpoint, read_clip])
def test_no_program_is_run(tmp_path, monkeypatch, checkpoint, door):
    monkeypatch.chdir(tmp_path)
    files, loaded = hostile(checkpoint), set()
    marker, golden = Path("pwned"), Path(tempfile.gettempdir()) / "pwned_by_pickle"
    for path in (marker, golden):  # to save the script runs it as well
        path.unlink(missing_ok=True)
    for name, data in files.items():
        Path("network.pkl").write_bytes(data)
        try:
            door("network.pkl")
            loaded.add(name.split(",")[0])
        except CheckpointError as error:
            if name.startswith("golden") and door is not read_clip:
                assert "the name 'posix.system' is not allowed" in str(error)
    assert loaded == (set() if door is read_clip else {"G_ema", "args", "state_dict"})
    assert os.listdir() == ["network.pkl"] and not golden.exists()
    for name, run in (("alone, pickle", pickle.load), ("script", torch.jit.load)):
        run(io.BytesIO(files[name]))
        assert marker.exists()  # so the test can fail
        marker.unlink()


def test_legacy_compressed_and_strided_files_are_the_same(tmp_path, checkpoint):
    """Transposed, shared and shifted tensors, as training code saves them."""
    path, expected, state = tmp_path / "network.pt", load_generator(TINY), checkpoint["g_ema"]
    flat = torch.cat([torch.ones(5), state[BIAS], state["style.1.bias"]])
    state[BIAS], state["style.1.bias"] = flat[5:29], flat[29:]
    weight = state["convs.1.conv.weight"][0].contiguous(memory_format=torch.channels_last)
    state["convs.1.conv.weight"] = weight[None]
    state["style.2.weight"] = state["style.2.weight"].T.contiguous().T
    new = torch_save(checkpoint)
    compressed = zipped(members(new), zipfile.ZIP_DEFLATED)
    for data in (new, torch_save(checkpoint, new=False), compressed):
        path.write_bytes(data)
        assert_same(load_generator(path), expected)


SHAPES = [  # offset, size and stride: message
    (b"K\1K\x18\x85K\1\x85", "more elements than the file has"),  # offset 1
    (b"K\0J\xff\xff\xff\xff\x85K\1\x85", "not a shape"),  # size -1
    (b"K\0\x8a\x20" + b"\x7f" * 32 + b"\x85K\1\x85", "not a shape"),
    (b"K\0(" + b"\x8a\x05\0\0\0\0\1" * 8 + b"t(" + b"K\0" * 8 + b"t", "more elements"),
    (b"K\0(" + b"K\1" * 9 + b"t(" + b"K\1" * 9 + b"t", "not a shape"),
    (b"K\0K\x18\x85K\1K\1\x86", "damaged, or more than plain tensors (ValueError)"),
]


def test_claims_of_a_storage_and_of_a_view(refused, checkpoint):
    """Older versions of torch.load read on behind the end."""
    checkpoint["g_ema"][BIAS] = torch.arange(24.0)
    files = members(torch_save(checkpoint))
    key = next(k for k, v in files.items() if v == torch.arange(24.0).numpy().tobytes())
    program, plain = files["data.pkl"], f"'{BIAS}' is not a plain tensor of floats: "
    claim = program.index(b"K\x18t", program.index(text(key.removeprefix("data/"))))
    view = program.index(b"Q", claim) + 1  # behind BINPERSID
    end = program.index(b"\x89h", view)  # requires_grad=False, then the OrderedDict of hooks
    cases = [(view, end, shape, message) for shape, message in SHAPES]
    cases += [(claim, claim + 2, number, plain) for number in (b"K\x19", b"J\xff\xff\xff\x7f")]
    for first, last, operations, message in cases:
        data = program[:first] + operations + program[last:]
        assert message in refused(zipped({**files, "data.pkl": data}))
    message = refused(zipped({**files, key: files[key][:-4]}))
    assert message.startswith(plain) and "92 bytes where 96 are declared" in message


def test_tensors_that_share_bytes_or_are_compressed_do_not_multiply_them(refused):
    shared = torch.zeros(2**20)
    state = {"g_ema": {f"{i}": shared for i in range(200)}}  # 200 times the same 4 MB
    for data in (torch_save(state), torch_save(state, new=False)):
        assert len(data) < 5e6 and "more bytes than the file has" in refused(data)
    for numel, message in ((3 * 10**6, "more bytes than the file has"), (1, "larger than the")):
        files = members(torch_save({"g_ema": {str(i): torch.zeros(numel) for i in range(10)}}))
        files |= {f"data/{i}": bytes(12 * 10**6) for i in range(10)}
        data = zipped(files, zipfile.ZIP_DEFLATED)  # 1,000 times smaller than it unfolds to
        assert len(data) < 200_000 and message in refused(data)


def test_damaged_archives(refused, checkpoint):
    files, old = members(torch_save(checkpoint)), torch_save(checkpoint, new=False)
    flipped = bytearray(zipped(files))
    flipped[flipped.index(files["data/7"])] ^= 1  # one bit of a weight: the checksum tells
    one = torch_save({"g_ema": {"0": torch.zeros(32)}}, new=False)
    for data, message in (
        (zipped({"x": b"1"}), "not of torch.save"),
        (zipped({**files, "byteorder": b"big"}), "big-endian"),
        (zipped(files) + b"PK\1\2" * 10_001, "more than 10,000 members"),
        (zipped(files, zipfile.ZIP_BZIP2), "larger than the file"),
        (bytes(flipped), "BadZipFile"),
        (old[:-1], "bytes where"),
        (one[:-136] + struct.pack("<q", 33) + one[-128:], "not the number of elements"),
    ):
        assert message in refused(data)


def test_wide_attributes(refused, checkpoint):
    wide = [1]
    for _ in range(60):
        wide = [wide, wide]

    def said(config):
        return refused(torch_save({**checkpoint, "generator_config": config}))

    config = load_generator(TINY).config
    for name in config:
        for value in (wide, "x" * 10**6, 2**2000, -1):
            assert f"the config's {name} is " in said({**config, name: value})
    for value in (wide, {"x" * 10**6: 1}, 5):
        assert "the config does not consist of" in said(value)


def test_trees_of_modules(refused):
    two, many = module("Leaf", {"x": torch.zeros(1)}), module("Leaf")
    for _ in range(60):
        two = module("Two", {}, {"a": two, "b": two})
    for _ in range(4):
        many = module("Many", {}, {f"x{i}": many for i in range(200)})
    absent = module("Leaf", {f"x{i}": None for i in range(9_999)})
    broad = module("Broad", {}, {f"x{i}": absent for i in range(9_000)})
    named = module("Names", {}, {"x" * 10**6: module("Leaf")})
    for root in (two, many, broad, named):
        assert refused(dumps({"G_ema": root})).startswith("G_ema")


@pytest.mark.slow
def test_damaged_files_load_or_are_refused(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz_checkpoints"]
    command, root = [*command, "0", "2000", str(tmp_path)], GOLDEN.parents[1]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, timeout=600)
    *faults, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and not faults and summary["files"] == 2000
    assert 20 < summary["loaded"] < 1000  # neither harmless nor hopeless
