"""The restricted reader: what it may name, and that no file makes it slow, large or crash."""

import io
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from nvidia_pickles import dumps, module, nvidia_module

from checkpoints import CheckpointError, load_generator
from checkpoints.pickles import MAX_OPERATIONS
from stylegan2_ops import Generator

TINY = Path(__file__).parent / "golden" / "rosinality_tiny.pt"


def text(value):
    value = value.encode()
    return b"X" + struct.pack("<I", len(value)) + value


def item(key, value):
    """A dict with one item: both are opcodes that make one value."""
    return b"}" + key + value + b"s"


def binary(data):
    return b"B" + struct.pack("<I", len(data)) + data


def legacy(content):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def call(module, name, args=b")"):
    return f"c{module}\n{name}\n".encode() + args + b"R"


def refusal(path, data):
    """The message of the refusal, which must take neither 2 seconds nor 100 MB."""
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(CheckpointError) as error:
        load_generator(path)
    seconds = time.process_time() - start
    tracemalloc.start()  # which makes it slower
    with pytest.raises(CheckpointError):
        load_generator(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 2 and peak < 100e6 + 4 * len(data), (seconds, peak)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def refused(tmp_path):
    return lambda data: refusal(tmp_path / "network.pkl", data)


# ----------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "module, name",
    [
        ("os", "system"),
        ("posix", "system"),
        ("torch.serialization", "os.system"),
        ("torch", "load"),
        ("torch", "FloatStorage.__class__"),
        ("torch.storage", "_load_from_bytes.__globals__"),
        ("collections", "OrderedDict.__init__"),
        ("dnnlib.util", "open_url"),
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("copyreg", "_reconstructor"),
    ],
)
def test_names_are_matched_exactly(refused, module, name):
    wanted = f"the name '{module}.{name}' is not allowed"
    assert wanted in refused(b"\x80\x02" + call(module, name, b"(X\1\0\0\0xt") + b".")
    assert wanted in refused(b"\x80\x04" + text(module) + text(name) + b"\x93.")
    nested = b"\x80\x02" + call(module, name) + b"."
    head = legacy({})[: legacy({}).index(b"\x80\x02}q\x00.")]
    outer = call("torch.storage", "_load_from_bytes", binary(head + nested) + b"\x85")
    assert wanted in refused(b"\x80\x03" + outer + b".")


def test_a_nested_file_may_name_storages_only(refused):
    """Even what the outer file may name."""
    head = legacy({})[: legacy({}).index(b"\x80\x02}q\x00.")]
    nested = b"\x80\x02" + call("collections", "OrderedDict") + b"."
    outer = call("torch.storage", "_load_from_bytes", binary(head + nested) + b"\x85")
    assert "'collections.OrderedDict' is not allowed" in refused(b"\x80\x03" + outer + b".")


def test_names_cannot_write_to_the_terminal(refused):
    message = refused(call("\x1b[2J\u202e", "x" * 150) + b".")
    assert message.isascii() and message.isprintable()


# ----------------------------------------------------------------------------------------------
# Abuse of the stack machine

# A tuple of 2 ** 60 elements by reference, and one of 100,000 levels: to hash, compare or print
# them takes for ever, or the whole C stack.
WIDE = b"N\x85q\0" + b"h\0h\0\x86q\0" * 60
DEEP = b"N" + b"\x85" * 100_000
LONG = b"(" + b"N" * 100_000  # elements


def often(value, function, more=b""):
    """A call of a large value, ever again: each of these small operations takes all of it."""
    return value + b"q\1c" + function + b"\nq\0(" + (b"h\0h\1" + more + b"R") * 10_000 + b"t."


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
    "too many operations": b"N" * (MAX_OPERATIONS + 1) + b".",
    "many lists": b"]" * (MAX_OPERATIONS + 1) + b".",
    "deep lists": b"]" * (MAX_OPERATIONS // 3) + b"a" * (MAX_OPERATIONS // 3 - 1) + b".",
    "deep tuples": DEEP + b".",
    "deep key": item(DEEP, b"N") + b".",
    "wide key": item(WIDE, b"N") + b".",
    "wide set": b"\x8f(" + WIDE + b"\x90.",
    "wide set from a call": call("builtins", "set", b"]" + WIDE + b"a\x85") + b".",
    "key that cannot be one": item(b"]", b"N") + b".",
    "list in itself": item(text("G_ema"), b"]q\0h\0a") + b".",
    "dict in itself": b"}q\0" + text("G_ema") + b"h\0s.",
    "odd items": b"}(" + text("G_ema") + b"u.",
    "items of a list": b"]" + text("x") + b"Ns.",
    "append to a dict": b"}Na.",
    "call of a number": b"K\1)R.",
    "call of a text": text("eval") + b")R.",
    "call without a tuple": b"ccollections\nOrderedDict\n]R.",
    "call of a type": call("torch", "FloatStorage", b"K\1\x85") + b".",
    "state of a number": b"K\1}b.",
    "old text operation": b"S'x'\n.",
    "old instance": b"(ios\nsystem\n.",
    "extension registry": b"\x82\1.",
    "persistent id": text("storage") + b"Q.",
    "nested, not bytes": call("torch.storage", "_load_from_bytes", b"K\1\x85") + b".",
    "nested zip": call("torch.storage", "_load_from_bytes", binary(b"PK\3\4") + b"\x85") + b".",
    "set of a number": call("builtins", "set", b"K\1\x85") + b".",
    "long sizes": often(b"]" + LONG + b"e", b"torch\nSize", b"\x85"),
    "long sets": often(b"]" + LONG + b"e", b"builtins\nset", b"\x85"),
    "sets of bytes": often(binary(bytes(10**7)), b"builtins\nset", b"\x85"),
    "long calls": often(LONG + b"t", b"torch\ndevice"),
    "keys of one hash": b"}(" + b"".join(
        b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"N" for k in range(1, 50_000)
    ) + b"u.",
    "set of one hash": b"\x8f(" + b"".join(
        b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") for k in range(1, 100_000)
    ) + b"\x90.",
    "tensor of a number": call("torch._utils", "_rebuild_tensor_v2", b"(K\1K\1K\1K\1t") + b".",
}


@pytest.mark.parametrize("name", ABUSE)
def test_abuse(refused, name):
    assert refused(ABUSE[name])


def test_one_nested_file_many_times(refused):
    """Three operations more for some 60: they count as one file's."""
    data = dumps(torch.zeros(2), 3)
    start = data.index(b"B", data.index(b"_load_from_bytes"))
    nested = data[start : start + 5 + struct.unpack_from("<I", data, start + 1)[0]]
    function = b"ctorch.storage\n_load_from_bytes\nq\0"
    many = function + nested + b"\x85q\1" + b"h\0h\1R" * 20_000
    assert "more than 300,000 operations" in refused(b"\x80\x03(" + many + b"t.")


# ----------------------------------------------------------------------------------------------
# Sizes that a file claims


def members(content):
    """The members of a .pt by name, without the folder they are in."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def zipped(files, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


@pytest.fixture
def checkpoint():
    return torch.load(TINY, weights_only=True)


BIAS = "convs.0.activate.bias"


def with_bias(checkpoint, bias):
    return {**checkpoint, "g_ema": {**checkpoint["g_ema"], BIAS: bias}}


def test_legacy_and_compressed_files_are_the_same(tmp_path, checkpoint):
    expected = load_generator(TINY).state_dict()
    for data in (legacy(checkpoint), zipped(members(checkpoint), zipfile.ZIP_DEFLATED)):
        (tmp_path / "network.pt").write_bytes(data)
        state = load_generator(tmp_path / "network.pt").state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_views_of_storages(tmp_path, checkpoint):
    """Transposed, shared and shifted tensors, as training code saves them."""
    expected, state = load_generator(TINY).state_dict(), checkpoint["g_ema"]
    flat = torch.cat([torch.ones(5), state[BIAS], state["style.1.bias"]])
    state[BIAS], state["style.1.bias"] = flat[5:29], flat[29:]
    weight = state["convs.1.conv.weight"][0].contiguous(memory_format=torch.channels_last)
    state["convs.1.conv.weight"] = weight[None]
    state["style.2.weight"] = state["style.2.weight"].T.contiguous().T
    for new in (True, False):
        torch.save(checkpoint, tmp_path / "network.pt", _use_new_zipfile_serialization=new)
        read = load_generator(tmp_path / "network.pt").state_dict()
        assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_a_storage_that_claims_more_than_its_bytes(refused, checkpoint):
    """Older versions of torch.load read on behind the end."""
    files = members(with_bias(checkpoint, torch.arange(24.0)))
    key = next(k for k, v in files.items() if v == torch.arange(24.0).numpy().tobytes())
    name = text(key.removeprefix("data/"))
    start = files["data.pkl"].index(name)
    claim = files["data.pkl"].index(b"K\x18t", start)  # the tuple ends in the number of elements
    for number in (b"K\x19", b"J\xff\xff\xff\x7f", b"\x8a\x06\xff\xff\xff\xff\xff\x3f"):
        data = files["data.pkl"][:claim] + number + files["data.pkl"][claim + 2 :]
        message = refused(zipped({**files, "data.pkl": data}))
        assert f"'{BIAS}' is not a plain tensor of floats: " in message
    message = refused(zipped({**files, key: files[key][:-4]}))
    assert "92 bytes where 96 are declared" in message


@pytest.mark.parametrize(
    "shape, message",
    [
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
    ],
)
def test_a_view_beyond_its_storage(refused, checkpoint, shape, message):
    files = members(with_bias(checkpoint, torch.arange(24.0)))
    key = next(k for k, v in files.items() if v == torch.arange(24.0).numpy().tobytes())
    data = files["data.pkl"]
    start = data.index(text(key.removeprefix("data/")))
    start = data.index(b"Q", start) + 1  # BINPERSID; then the offset, size and stride
    end = data.index(b"\x89h", start)  # requires_grad=False, then the OrderedDict of hooks
    assert message in refused(zipped({**files, "data.pkl": data[:start] + shape + data[end:]}))


def test_tensors_that_share_bytes_do_not_multiply_them(refused):
    """200 times the same 4 MB."""
    shared = torch.zeros(2**20)
    state = {f"{i}": shared for i in range(200)}
    for data in (zipped(members({"g_ema": state})), legacy({"g_ema": state})):
        assert len(data) < 5e6 and "more bytes than the file has" in refused(data)


def test_compressed_zeros(refused):
    """Some 1,000 times smaller than what they unfold to."""
    files = members({"g_ema": {str(i): torch.zeros(3 * 10**6) for i in range(10)}})
    data = zipped(files, zipfile.ZIP_DEFLATED)
    assert len(data) < 200_000 and "more bytes than the file has" in refused(data)
    files = members({"g_ema": {str(i): torch.zeros(1) for i in range(10)}})
    files |= {f"data/{i}": bytes(12 * 10**6) for i in range(10)}
    assert "larger than the file" in refused(zipped(files, zipfile.ZIP_DEFLATED))


def test_archives(refused, checkpoint):
    files = members(checkpoint)
    assert "not of torch.save" in refused(zipped({"x": b"1"}))
    assert "not of torch.save" in refused(zipped({**files, "more/data.pkl": b"N."}))
    assert "big-endian" in refused(zipped({**files, "byteorder": b"big"}))
    assert "more than 10,000 members" in refused(zipped(files) + b"PK\1\2" * 10_001)
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        assert "larger than the file" in refused(zipped(files, method))
    damaged = {**files, "data/0": files["data/0"][:-1]}
    assert "is not a plain tensor" in refused(zipped(damaged))
    data = bytearray(zipped(files))
    data[data.index(files["data/7"])] ^= 1  # one bit of a weight: the checksum tells
    assert "BadZipFile" in refused(bytes(data))
    missing = {name: data for name, data in files.items() if name != "data/7"}
    assert "KeyError" in refused(zipped(missing))


def test_legacy_archives(refused, checkpoint):
    data = legacy(checkpoint)
    assert "bytes where" in refused(data + b"\0")
    assert "bytes where" in refused(data[:-1])
    one = legacy({"g_ema": {"0": torch.zeros(32)}})
    for count in (31, 33, 2**62):
        message = refused(one[:-136] + struct.pack("<q", count) + one[-128:])
        assert "not the number of elements" in message
    swapped = data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    assert swapped != data and "big-endian" in refused(swapped)


# ----------------------------------------------------------------------------------------------
# Structures that are valid pickles


def small():
    return Generator(8, {4: 3, 8: 2}, w_dim=4, n_mlp=1).requires_grad_(False)


def wide(levels=60):
    value = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def test_wide_attributes(refused):
    for name in ("z_dim", "c_dim", "img_channels"):
        network = nvidia_module(small(), **{name: wide()})
        assert refused(dumps({"G_ema": network}))
    network = nvidia_module(small())
    synthesis = network.args[0]["state"]["_modules"]["synthesis"].args[0]["state"]
    for block in synthesis["_modules"].values():
        block.args[0]["state"]["architecture"] = wide()
    assert "architecture is a list" in refused(dumps({"G_ema": network}))


def test_wide_config(refused, checkpoint):
    config = load_generator(TINY).config
    for name in config:
        for value in (wide(), {"x": wide()}, "x" * 10**6, 2**2000, -1, float("nan")):
            content = {**checkpoint, "generator_config": {**config, name: value}}
            assert f"the config's {name} is " in refused(zipped(members(content)))
    for value in (wide(), {"x" * 10**6: 1}, {}, "x", 5):
        content = {**checkpoint, "generator_config": value}
        assert "the config does not consist of" in refused(zipped(members(content)))


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
    long = module("Long", {}, {}, {"x" * 10**6: module("Leaf")})
    empty = module("Empty", {}, {}, {"": module("Leaf")})
    for network in (two, many, broad, broader, long, empty):
        assert refused(dumps({"G_ema": network})).startswith("G_ema")


def test_a_module_in_itself(refused):
    meta = item(text("class_name"), text("Loop")) + text("state") + b"}("
    meta += text("_modules") + b"}q\0" + text("_parameters") + b"}" + text("_buffers") + b"}us"
    loop = call("torch_utils.persistence", "_reconstruct_persistent_obj", meta + b"\x85") + b"q\1"
    root = item(text("G_ema"), loop) + text("modules") + b"h\0" + text("loop") + b"h\1ss."
    assert refused(root).endswith(".loop.loop. has a part 'loop'")
