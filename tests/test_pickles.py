"""The restricted reader: nothing is run, and no file makes it slow, large or crash."""

import io
import os
import pickle
import struct
import tempfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, assert_same, refusal

from checkpoints import CheckpointError, load_generator
from checkpoints.clip import read_clip
from checkpoints.pickles import MAX_OPERATIONS
from checkpoints.stylegan2 import read_checkpoint
from stylegan2_ops import Generator
from tests.nvidia_pickles import Call, dumps, module, nvidia_module, torch_save

TINY = GOLDEN / "rosinality_tiny.pt"


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


# ----------------------------------------------------------------------------------------------
# Pickles as operations


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


def often(value, function, more=b""):
    """A call of a large value, ever again: each of these small operations takes all of it."""
    return value + b"q\1c" + function + b"\nq\0(" + (b"h\0h\1" + more + b"R") * 10_000 + b"t."


# A tuple of 2 ** 60 elements by reference, and one of 100,000 levels: to hash, compare or print
# them takes for ever, or the whole C stack.
WIDE = b"N\x85q\0" + b"h\0h\0\x86q\0" * 60
DEEP = b"N" + b"\x85" * 100_000
LONG = b"(" + b"N" * 100_000  # elements
ONE_HASH = [b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") for k in range(1, 50_000)]
ABUSE = {
    "empty": b"",
    "no stop": b"\x80\x03N",
    "only stop": b".",
    "text of 2^63 bytes": b"\x8d" + struct.pack("<Q", 2**63) + b"x.",
    "text of 4 GB": b"X\xff\xff\xff\xffx.",
    "bytes of 2^62": b"\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "frame of 2^63": b"\x80\x04\x95" + struct.pack("<Q", 2**63) + b"K\1.",
    "int of 2 GB": b"\x8b\xff\xff\xff\x7f1.",
    "int in digits": b"L" + b"9" * 10_000_000 + b"L\n.",
    "endless line": b"c" + b"x" * 10_000_000,
    "memo slot 2^32": b"Nr\xff\xff\xff\xff0.",
    "empty memo slot": b"h\5.",
    "no mark": b"N\x85t.",
    "many marks": b"(" * 500_000 + b".",
    "marks out of order": b"N(" + b"\x87" * 5 + b"t.",
    "nothing to drop": b"0000.",
    "too many operations": b"N" * (MAX_OPERATIONS + 1) + b".",
    "many lists": b"]" * (MAX_OPERATIONS + 1) + b".",
    "deep lists": b"]" * (MAX_OPERATIONS // 3) + b"a" * (MAX_OPERATIONS // 3 - 1) + b".",
    "deep tuples": DEEP + b".",
    "deep key": item(DEEP, b"N") + b".",
    "wide key": item(WIDE, b"N") + b".",
    "wide set": b"\x8f(" + WIDE + b"\x90.",
    "wide frozen set": b"(" + WIDE + b"\x91.",
    "wide set from a call": call("builtins", "set", b"]" + WIDE + b"a\x85") + b".",
    "list in itself": item(text("G_ema"), b"]q\0h\0a") + b".",
    "dict in itself": b"}q\0" + text("G_ema") + b"h\0s.",
    "odd items": b"}(" + text("G_ema") + b"u.",
    "items of a list": b"]" + text("x") + b"Ns.",
    "append to a dict": b"}Na.",
    "call of a number": b"K\1)R.",
    "call of a text": text("eval") + b")R.",
    "call without a tuple": b"ccollections\nOrderedDict\n]R.",
    "call of a type": call("torch", "FloatStorage", b"K\1\x85") + b".",
    "call with names": b"ccollections\nOrderedDict\n)}\x92.",
    "state of a number": b"K\1}b.",
    "old text operation": b"S'x'\n.",
    "old instance": b"(ios\nsystem\n.",
    "extension registry": b"\x82\1.",
    "persistent id": text("storage") + b"Q.",
    "nested, not bytes": call("torch.storage", "_load_from_bytes", b"K\1\x85") + b".",
    "nested zip": call("torch.storage", "_load_from_bytes", binary(b"PK\3\4") + b"\x85") + b".",
    "long sizes": often(b"]" + LONG + b"e", b"torch\nSize", b"\x85"),
    "long sets": often(b"]" + LONG + b"e", b"builtins\nset", b"\x85"),
    "sets of bytes": often(binary(bytes(10**7)), b"builtins\nset", b"\x85"),
    "long calls": often(LONG + b"t", b"torch\ndevice"),
    "long names": text("x" * 10**7) + b"q\0" + text("x" * 10**7) + b"q\1"
    + b"h\0h\0\x93h\0h\1\x93" * 10_000 + b".",
    "many names": b"".join(f"cm\n{k}\n".encode() for k in range(100_000)) + b".",
    "keys of one hash": b"}(" + b"N".join(ONE_HASH) + b"Nu.",
    "set of one hash": b"\x8f(" + b"".join(ONE_HASH) + b"\x90.",
    "tensor of a number": call("torch._utils", "_rebuild_tensor_v2", b"(K\1K\1K\1K\1t") + b".",
    "wide name": b"}(" + text("state_dict") + b"}" + text("name") + WIDE + b"u.",
    "wrappers in wrappers": item(text("module." * 10**6), b"N") + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", ABUSE)
def test_abuse(refused, name):
    assert refused(ABUSE[name], (load_generator, read_clip))


# ----------------------------------------------------------------------------------------------
# Programs


class Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture
def hostile(checkpoint):
    """{name: bytes}: two golden files, and a program at any place of a checkpoint."""
    names = ("nvidia_hostile", "nvidia_hostile_nested")
    files = {f"golden {name}": (GOLDEN / f"{name}.pkl").read_bytes() for name in names}
    contents = {"alone": Payload(), "in a list": [Payload()]}
    for key in ("g_ema", "G_ema", "latent_avg", "generator_config", "args", "state_dict"):
        contents[key] = {**checkpoint, key: Payload()}
    contents["weight"] = {"g_ema": {**checkpoint["g_ema"], "style.1.bias": Payload()}}
    for name, content in contents.items():
        files |= {name: torch_save(content), f"{name}, old": torch_save(content, new=False)}
        files[f"{name}, pickle"] = dumps(content, 4)
    return files


@pytest.mark.filterwarnings("ignore:.*left unread", "ignore:.*ignored")
@pytest.mark.parametrize("door", [load_generator, read_checkpoint, read_clip])
def test_no_program_is_run(tmp_path, monkeypatch, hostile, door):
    monkeypatch.chdir(tmp_path)
    marker = Path(tempfile.gettempdir()) / "pwned_by_pickle"  # of the golden files
    marker.unlink(missing_ok=True)
    loaded = set()
    for name, data in hostile.items():
        Path("network.pkl").write_bytes(data)
        try:
            door("network.pkl")
            loaded.add(name.split(",")[0])
        except CheckpointError as error:
            if name.startswith("golden") and door is not read_clip:
                assert "the name 'posix.system' is not allowed" in str(error)
    assert loaded == (set() if door is read_clip else {"G_ema", "args", "state_dict"})
    assert os.listdir() == ["network.pkl"] and not marker.exists()
    pickle.loads(hostile["alone, pickle"])
    assert Path("pwned").exists()  # so the test can fail


# ----------------------------------------------------------------------------------------------
# Names

NAMES = """os:system posix:system torch:load torch:FloatStorage.__class__ builtins:eval
    torch.serialization:os.system torch.storage:_load_from_bytes.__globals__ __builtin__:getattr
    collections:OrderedDict.__init__ dnnlib.util:open_url copyreg:_reconstructor"""


@pytest.mark.parametrize("load", [load_generator, read_clip])
@pytest.mark.parametrize("name", NAMES.split())
def test_no_name_is_looked_up(refused, name, load):
    module, function = name.split(":")
    wanted = f"the name '{module}.{function}' is not allowed"
    for value in (
        b"\x80\x02" + call(module, function, b"(X\1\0\0\0xt") + b".",
        b"\x80\x04" + text(module) + text(function) + b"\x93.",
        b"\x80\x04" + text(module) + text(function) + b"\x93N\x85}\x92.",
        b"\x80\x03" + nested(call(module, function)) + b".",
    ):
        assert wanted in refused(value, (load, load))


def test_names_elsewhere(refused):
    """A nested file may name storages only; and no name can write to the terminal."""
    data = nested(call("collections", "OrderedDict"))
    assert "'collections.OrderedDict' is not allowed" in refused(b"\x80\x03" + data + b".")
    escape = call("\x1b[2J\u202e", "x" * 150)
    assert refused(escape + b".") and refused(item(text("g_ema"), escape) + b".")


def test_one_nested_file_many_times(refused):
    """Three operations more for some 60: they count as one file's."""
    data = dumps(torch.zeros(2), 3)
    start = data.index(b"B", data.index(b"_load_from_bytes"))
    inner = data[start : start + 5 + struct.unpack_from("<I", data, start + 1)[0]]
    function = b"ctorch.storage\n_load_from_bytes\nq\0"
    many = function + inner + b"\x85q\1" + b"h\0h\1R" * 20_000
    assert "more than 300,000 operations" in refused(b"\x80\x03(" + many + b"t.")


# ----------------------------------------------------------------------------------------------
# Sizes that a file claims


def members(content):
    """The members of a .pt by name, without the folder they are in."""
    with zipfile.ZipFile(io.BytesIO(torch_save(content))) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def zipped(files, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


BIAS = "convs.0.activate.bias"


@pytest.fixture
def marked(checkpoint):
    """(members of a checkpoint, the member of its BIAS, where data.pkl names that member)"""
    checkpoint["g_ema"][BIAS] = torch.arange(24.0)
    files = members(checkpoint)
    key = next(k for k, v in files.items() if v == torch.arange(24.0).numpy().tobytes())
    return files, key, files["data.pkl"].index(text(key.removeprefix("data/")))


def test_legacy_compressed_and_strided_files_are_the_same(tmp_path, checkpoint):
    """Transposed, shared and shifted tensors, as training code saves them."""
    path, expected, state = tmp_path / "network.pt", load_generator(TINY), checkpoint["g_ema"]
    flat = torch.cat([torch.ones(5), state[BIAS], state["style.1.bias"]])
    state[BIAS], state["style.1.bias"] = flat[5:29], flat[29:]
    weight = state["convs.1.conv.weight"][0].contiguous(memory_format=torch.channels_last)
    state["convs.1.conv.weight"] = weight[None]
    state["style.2.weight"] = state["style.2.weight"].T.contiguous().T
    compressed = zipped(members(checkpoint), zipfile.ZIP_DEFLATED)
    for data in (torch_save(checkpoint), torch_save(checkpoint, new=False), compressed):
        path.write_bytes(data)
        assert_same(load_generator(path), expected)


def test_a_storage_that_claims_more_than_its_bytes(refused, marked):
    """Older versions of torch.load read on behind the end."""
    files, key, start = marked
    claim = files["data.pkl"].index(b"K\x18t", start)  # the tuple ends in the number of elements
    for number in (b"K\x19", b"J\xff\xff\xff\x7f", b"\x8a\x06\xff\xff\xff\xff\xff\x3f"):
        data = files["data.pkl"][:claim] + number + files["data.pkl"][claim + 2 :]
        message = refused(zipped({**files, "data.pkl": data}))
        assert f"'{BIAS}' is not a plain tensor of floats: " in message
    message = refused(zipped({**files, key: files[key][:-4]}))
    assert "92 bytes where 96 are declared" in message


SHAPES = [  # offset, size and stride
    (b"K\1K\x18\x85K\1\x85", "more elements than the file has"),  # offset 1
    (b"K\0K\x18\x85K\2\x85", "more elements than the file has"),  # stride 2
    (b"K\0K\x19\x85K\0\x85", "more elements than the file has"),  # 25 times the first
    (b"K\0J\xff\xff\xff\xff\x85K\1\x85", "not a shape"),  # size -1
    (b"J\xff\xff\xff\xffK\x18\x85K\1\x85", "not a shape"),  # offset -1
    (b"K\0K\x18\x85J\xff\xff\xff\xff\x85", "not a shape"),  # stride -1
    (b"K\0\x8a\x20" + b"\x7f" * 32 + b"\x85K\1\x85", "not a shape"),
    (b"K\0(" + b"\x8a\x05\0\0\0\0\1" * 8 + b"t(" + b"K\0" * 8 + b"t", "more elements"),
    (b"K\0(" + b"K\1" * 9 + b"t(" + b"K\1" * 9 + b"t", "not a shape"),
    (b"K\0K\x18\x85K\1K\1\x86", "damaged, or more than plain tensors (ValueError)"),
]


def test_a_view_beyond_its_storage(refused, marked):
    files, _, start = marked
    data = files["data.pkl"]
    start = data.index(b"Q", start) + 1  # BINPERSID
    end = data.index(b"\x89h", start)  # requires_grad=False, then the OrderedDict of hooks
    for shape, message in SHAPES:
        assert message in refused(zipped({**files, "data.pkl": data[:start] + shape + data[end:]}))


def test_tensors_that_share_bytes_or_are_compressed_do_not_multiply_them(refused):
    shared = torch.zeros(2**20)
    state = {"g_ema": {f"{i}": shared for i in range(200)}}  # 200 times the same 4 MB
    for data in (torch_save(state), torch_save(state, new=False)):
        assert len(data) < 5e6 and "more bytes than the file has" in refused(data)
    files = members({"g_ema": {str(i): torch.zeros(3 * 10**6) for i in range(10)}})
    data = zipped(files, zipfile.ZIP_DEFLATED)  # some 1,000 times smaller than it unfolds to
    assert len(data) < 200_000 and "more bytes than the file has" in refused(data)
    files = members({"g_ema": {str(i): torch.zeros(1) for i in range(10)}})
    files |= {f"data/{i}": bytes(12 * 10**6) for i in range(10)}
    assert "larger than the file" in refused(zipped(files, zipfile.ZIP_DEFLATED))


def test_damaged_archives(refused, checkpoint):
    files = members(checkpoint)
    flipped = bytearray(zipped(files))
    flipped[flipped.index(files["data/7"])] ^= 1  # one bit of a weight: the checksum tells
    old, one = (
        torch_save(checkpoint, new=False),
        torch_save({"g_ema": {"0": torch.zeros(32)}}, new=False),
    )
    swapped = old.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    assert swapped != old
    for data, message in (
        (zipped({"x": b"1"}), "not of torch.save"),
        (zipped({**files, "more/data.pkl": b"N."}), "not of torch.save"),
        (zipped({**files, "byteorder": b"big"}), "big-endian"),
        (zipped(files) + b"PK\1\2" * 10_001, "more than 10,000 members"),
        (zipped(files, zipfile.ZIP_BZIP2), "larger than the file"),
        (zipped(files, zipfile.ZIP_LZMA), "larger than the file"),
        (zipped({**files, "data/0": files["data/0"][:-1]}), "is not a plain tensor"),
        (bytes(flipped), "BadZipFile"),
        (zipped({name: x for name, x in files.items() if name != "data/7"}), "KeyError"),
        (old + b"\0", "bytes where"),
        (old[:-1], "bytes where"),
        (swapped, "big-endian"),
        *((one[:-136] + struct.pack("<q", n) + one[-128:], "not the number of elements")
          for n in (31, 33, 2**62)),
    ):  # fmt: skip
        assert message in refused(data)


# ----------------------------------------------------------------------------------------------
# Structures that are valid pickles


def wide(levels=60):
    value = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def test_wide_attributes(refused, checkpoint):
    small = Generator(8, {4: 3, 8: 2}, w_dim=4, n_mlp=1).requires_grad_(False)
    for name in ("z_dim", "c_dim", "img_channels"):
        assert refused(dumps({"G_ema": nvidia_module(small, **{name: wide()})}))
    network = nvidia_module(small)
    synthesis = network.args[0]["state"]["_modules"]["synthesis"].args[0]["state"]
    for block in synthesis["_modules"].values():
        block.args[0]["state"]["architecture"] = wide()
    assert "architecture is a list" in refused(dumps({"G_ema": network}))

    config = load_generator(TINY).config
    for name in config:
        for value in (wide(), {"x": wide()}, "x" * 10**6, 2**2000, -1, float("nan")):
            content = {**checkpoint, "generator_config": {**config, name: value}}
            assert f"the config's {name} is " in refused(torch_save(content))
    for value in (wide(), {"x" * 10**6: 1}, {}, "x", 5):
        content = {**checkpoint, "generator_config": value}
        assert "the config does not consist of" in refused(torch_save(content))


def test_trees_of_modules(refused):
    two = module("Leaf", {"x": torch.zeros(1)})
    for _ in range(60):
        two = module("Two", {}, {}, {"a": two, "b": two})
    many = module("Leaf")
    for _ in range(4):
        many = module("Many", {}, {}, {f"x{i}": many for i in range(200)})
    leaf = module("Leaf", {f"x{i}": torch.zeros(1) if i == 0 else None for i in range(10_000)})
    broad = module("Broad", {}, {}, {f"x{i}": leaf for i in range(10_000)})
    absent = module("Leaf", {f"x{i}": None for i in range(9_000)})
    broader = module("Broad", {}, {}, {f"x{i}": absent for i in range(5_000)})
    rich = module("Rich", **{f"x{i}": Call("a", "b") for i in range(10_000)})
    richer = module("Richer", {}, {}, {f"x{i}": rich for i in range(9_000)})
    long = module("Long", {}, {}, {"x" * 10**6: module("Leaf")})
    empty = module("Empty", {}, {}, {"": module("Leaf")})
    for network in (two, many, broad, broader, richer, long, empty):
        assert refused(dumps({"G_ema": network})).startswith("G_ema")

    meta = item(text("class_name"), text("Loop")) + text("state") + b"}("
    meta += text("_modules") + b"}q\0" + text("_parameters") + b"}" + text("_buffers") + b"}us"
    loop = call("torch_utils.persistence", "_reconstruct_persistent_obj", meta + b"\x85") + b"q\1"
    root = item(text("G_ema"), loop) + text("modules") + b"h\0" + text("loop") + b"h\1ss."
    assert refused(root).endswith(".loop.loop. has a part 'loop'")  # a module in itself
