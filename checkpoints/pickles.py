"""Reading what pickle and torch.save wrote, without running any of it.

A pickle is a program for a small stack machine, and the machine of Python lets it call whatever it
names. The one here knows the operations and the names that checkpoints are made of, and each of
them builds plain, inert values. Any other name stands for a value that stays unread (Opaque), and
any other operation is refused. Nothing that a file merely claims takes time or memory: lengths,
sizes and strides are compared with the bytes that are there.
"""

import functools
import io
import math
import pickle
import struct
import zipfile
from pickle import UnpicklingError
from types import FunctionType
from typing import NamedTuple

import torch

# A training checkpoint at 1024 needs less than a third of either.
MAX_OPERATIONS = 300_000
MAX_MEMBERS = 10_000  # of a zip archive


class CheckpointError(ValueError):
    """A file from which nothing can be read; the message is one line."""


def some(names):
    """The first three names, and how many more there are; for messages."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"{name!r:.80}" for name in names[:3]) + more


class Storage:
    """A flat array in a file, taken out of it when `flat` is first asked for."""

    def __init__(self, dtype, numel):
        if not isinstance(dtype, torch.dtype) or not _is_size(numel):
            raise UnpicklingError("a storage without type or size")
        self.dtype = dtype
        self.numel = numel
        self.nbytes = numel * dtype.itemsize

    def read(self):
        """Its bytes; whoever makes a storage says how."""
        raise UnpicklingError("a storage without bytes")

    @functools.cached_property
    def flat(self):
        data = self.read()
        if len(data) != self.nbytes:
            raise UnpicklingError(f"{len(data)} bytes where {self.nbytes} are declared")
        if not data:
            return torch.empty(0, dtype=self.dtype)
        return torch.frombuffer(bytearray(data), dtype=self.dtype)


class StoredTensor(NamedTuple):
    """What a file says of a tensor: a view of a storage, which may be wrong before `check`."""

    storage: Storage
    offset: int
    size: tuple
    stride: tuple

    def check(self):
        """Raise UnpicklingError if elements are not in the storage, or repeated beyond its size."""
        if len(self.size) > 8 or not all(map(_is_size, (self.offset, *self.size, *self.stride))):
            raise UnpicklingError("not a shape")
        numel = math.prod(self.size)
        steps = zip(self.size, self.stride, strict=True)
        end = self.offset + sum((n - 1) * step for n, step in steps) + 1 if numel else 0
        if max(numel, end) > self.storage.numel:
            raise UnpicklingError("more elements than the file has")


class Module(NamedTuple):
    """A module of NVIDIA's pickles: the name of its class, and its attributes without its code."""

    class_name: str
    state: dict


class Record:
    """An object of a TorchScript archive: its attributes, without its code."""

    attributes = None  # {name: value}, once they are read


class Opaque(NamedTuple):
    """A value that no network needs, such as a training script's arguments, left unread.

    name: "module.name" of its class or function, which is never looked up. known: whether files
    of generators have it.
    """

    name: str
    known: bool = True

    def __str__(self):
        return f"the name {self.name!a} is not allowed"


def read_pickled(data, room=0):
    """-> (value, the names that are none of a checkpoint's, whose values are left unread).

    data: the bytes of a file of pickle or of torch.save (zip or legacy format). The value consists
    of None, numbers, text, bytes, tuples, lists, dicts, StoredTensor, Module and Opaque; dicts keep
    the items whose keys are text or sizes. room: to how many bytes a compressed storage may unfold,
    if that is more than twice the bytes of the file.

    Raises UnpicklingError if the file is cut short or not made of such; what else is damaged may
    raise anything, after bounded time and memory. CheckpointError: of TensorFlow.
    """
    operations, names = iter(range(MAX_OPERATIONS)), _Names(_NAMES)
    if data.startswith(b"PK\x03\x04"):
        value = _read_zip(data, operations, names, room)
    elif data.startswith(_LEGACY_START):
        value = _read_legacy(operations, memoryview(data), names)
    else:
        value = _Run(operations, memoryview(data), 0, names).load()
    return value, [names[key].name for key in names if key not in _NAMES]


def read_script(data):
    """{dotted name: tensor} of all floats in `data`, the bytes of a TorchScript archive.

    Those are the parameters and buffers of the module in it. Its code stays unread: torch.jit.load
    would compile it and run what it calls __setstate__, and TorchScript can write files. Errors as
    `read_pickled`, and CheckpointError.
    """
    operations = iter(range(MAX_OPERATIONS))
    todo, seen, tensors = {"": _read_zip(data, operations, _SCRIPT)}, set(), {}
    read = tensor_reader(4 * len(data))
    for _ in operations:
        if not todo:
            return tensors
        name, value = todo.popitem()
        if isinstance(value, Record):
            if value in seen or len(name) > 200:
                raise UnpicklingError(f"{name!a:.80} is an object in two places, or too deep")
            seen.add(value)
            todo |= {f"{name}.{key}".lstrip("."): x for key, x in value.attributes.items()}
        elif isinstance(value, StoredTensor) and value.storage.dtype.is_floating_point:
            tensors[name] = read(name, value)
    raise UnpicklingError(f"more than {MAX_OPERATIONS:,} operations")


def tensor_reader(limit):
    """read(name, StoredTensor) -> tensor of floats, contiguous and in memory of its own.

    Raises CheckpointError naming the tensor if it is none, or if tensors and storages come to more
    than `limit` bytes in all.
    """
    left, storages = limit, set()

    def read(name, stored):
        nonlocal left
        storage = stored.storage if isinstance(stored, StoredTensor) else None
        if type(name) is not str or storage is None or not storage.dtype.is_floating_point:
            why = f": {stored}" if isinstance(stored, Opaque) else ""
            raise CheckpointError(f"{name!r:.80} is not a plain tensor of floats{why}")
        try:
            stored.check()
            left -= math.prod(stored.size) * storage.dtype.itemsize
            left -= 0 if storage in storages else storage.nbytes
            if left < 0:
                raise UnpicklingError("more bytes than the file has")
            storages.add(storage)
            view = storage.flat.as_strided(stored.size, stored.stride, stored.offset)
        except UnpicklingError as error:
            message = f"{name!r:.80} is not a plain tensor of floats: {error}"
            raise CheckpointError(message) from error
        return view.clone(memory_format=torch.contiguous_format)

    return read


# ----------------------------------------------------------------------------------------------
# torch.save


def _read_zip(data, operations, names, room=0):
    """The format of torch 1.6 on: <root>/data.pkl, and each storage in <root>/data/<key>."""
    if data.count(b"PK\x01\x02") > MAX_MEMBERS:
        raise UnpicklingError(f"more than {MAX_MEMBERS:,} members")
    archive = zipfile.ZipFile(io.BytesIO(data))
    roots = [name[: -len("data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UnpicklingError("a zip archive, but not of torch.save")
    root, limit = roots[0], max(room, 2 * len(data))

    def member(name):
        info = archive.getinfo(root + name)
        known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not known or max(info.file_size, info.compress_size) > limit:
            raise UnpicklingError("a member that is larger than the file")
        with archive.open(info) as file:
            return file.read(info.file_size)  # and no more, whatever the compressed bytes hold

    if f"{root}byteorder" in archive.namelist() and member("byteorder") != b"little":
        raise UnpicklingError("big-endian numbers")
    storages = {}

    def persistent(key, storage):
        storage.read = lambda: member(f"data/{key}")
        return storages.setdefault(key, storage)

    return _Run(operations, memoryview(member("data.pkl")), 0, names, persistent).load()


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # MAGIC_NUMBER of torch/serialization.py
_LEGACY_START = b"\x80\x02\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little") + b"."


def _read_legacy(operations, data, names):
    """The format before: four pickles, and in between the storages' keys, then the storages."""
    storages, position = {}, 0

    def persistent(key, storage):
        return storages.setdefault(key, storage)

    def load(names=None, persistent=None):
        nonlocal position
        run = _Run(operations, data, position, names or {}, persistent)
        value, position = run.load(), run.position
        return value

    magic, version, system = load(), load(), load()
    if (magic, version, system["little_endian"]) != (_LEGACY_MAGIC, 1001, True):
        raise UnpicklingError("not of torch.save, or of a big-endian machine")
    value = load(names, persistent)
    for key in load():
        storage = storages[_checked_key(key)]
        start = position + 8
        position = start + storage.nbytes
        storage.read = functools.partial(data.__getitem__, slice(start, position))
        if int.from_bytes(data[start - 8 : start], "little") != storage.numel:
            raise UnpicklingError(f"byte {start - 8}: not the number of elements")
    if position != len(data):
        raise UnpicklingError(f"{len(data)} bytes where {position} are declared")
    return value


# ----------------------------------------------------------------------------------------------
# The names that a file may use, and the functions they stand for


class _Names(dict):
    """{(module, name): value or function}; any other name is an Opaque from then on."""

    def __missing__(self, key):
        return self.setdefault(key, Opaque(".".join(key), known=False))


def _record():
    return Record()


def _dict():
    return {}


def _module(meta):
    return Module(meta["class_name"], meta["state"])


def _parameter(tensor, *rest):
    return tensor


def _tensor(storage, offset, size, stride, *rest):
    if isinstance(storage, Opaque):  # of a type that no network has, such as complex numbers
        return storage
    if not isinstance(storage, Storage) or type(size) is not tuple or type(stride) is not tuple:
        raise UnpicklingError("a tensor without storage or shape")
    return StoredTensor(storage, offset, size, stride)


def _nested(operations, data):
    """A storage of NVIDIA's pickles is a file of torch.save in the file, in the legacy format."""
    return _read_legacy(operations, data, _STORAGES)


_STORAGES = {
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "IntStorage"): torch.int32,
    ("torch", "ShortStorage"): torch.int16,
    ("torch", "CharStorage"): torch.int8,
    ("torch", "ByteStorage"): torch.uint8,
    ("torch", "BoolStorage"): torch.bool,
}
_READ = {
    **_STORAGES,
    ("collections", "OrderedDict"): _dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
}
_UNREAD = [  # also the attributes of StyleGAN3
    ("argparse", "Namespace"),
    ("builtins", "set"),
    ("__builtin__", "set"),
    ("__builtin__", "bytes"),  # this and the next: bytes in protocol 2
    ("_codecs", "encode"),
    ("torch", "device"),
    ("torch", "Size"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
]
_NAMES = {
    **_READ,
    **{key: Opaque(".".join(key)) for key in _UNREAD},
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.storage", "_load_from_bytes"): _nested,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _module,
    ("dnnlib.util", "EasyDict"): _dict,
}
_SCRIPT = {  # and, in `_Run.find`, all classes of the archive itself
    **_READ,
    ("torch.jit._pickle", "build_boollist"): Opaque("list"),
    ("torch.jit._pickle", "build_doublelist"): Opaque("list"),
    ("torch.jit._pickle", "build_intlist"): Opaque("list"),
    ("torch.jit._pickle", "build_tensorlist"): Opaque("list"),
    ("torch.jit._pickle", "restore_type_tag"): Opaque("tag"),
}


def _is_key(key):
    """Text or a size. To hash or compare nested tuples can take any time, or the whole C stack;
    and larger ints can all have the same hash, which makes a dict of them slow.
    """
    return type(key) is str or _is_size(key)


def _checked_key(key):
    if not _is_key(key):
        raise UnpicklingError(f"a {type(key).__name__} as a key")
    return key


def _is_size(number):
    return type(number) is int and 0 <= number < 2**48


# ----------------------------------------------------------------------------------------------
# The stack machine


class _Run:
    """One pickle in `data`, a memoryview, from `position` on.

    operations: an iterator that ends when too many were run; pickles in a file share it.
    names: {(module, name): function, type or Opaque}. persistent: (key, Storage) -> Storage.
    """

    def __init__(self, operations, data, position, names, persistent=None):
        self.operations = operations
        self.data = data
        self.position = position
        self.names = names
        self.persistent = persistent
        self.stack, self.marks, self.memo = [], [], {}

    def load(self):
        """The value; `position` is then behind it."""
        for _ in self.operations:
            start = self.position
            try:
                code = self.take(1)[0]
                if code == pickle.STOP[0]:
                    return self.stack.pop()
                if code in _VALUES:
                    self.stack.append(_VALUES[code](self))
                elif code in _ACTIONS:
                    _ACTIONS[code](self)
                else:
                    raise UnpicklingError(f"operation {code:#04x}")
            except UnpicklingError as error:
                raise UnpicklingError(f"byte {start}: {error}") from error
        raise UnpicklingError(f"more than {MAX_OPERATIONS:,} operations")

    def take(self, count):
        """A view of the next `count` bytes: a length alone costs nothing."""
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise UnpicklingError("cut short")
        return self.data[start : self.position]

    def integer(self, size, signed=False):
        return int.from_bytes(self.take(size), "little", signed=signed)

    def text(self, size):
        return str(self.take(self.integer(size)), "utf-8", "surrogatepass")

    def line(self):
        line, found, _ = bytes(self.data[self.position :][:200]).partition(b"\n")
        self.take(len(line) + len(found))
        return str(line, "utf-8")

    def top(self, kind):
        if type(self.stack[-1]) is not kind:
            raise UnpicklingError(f"no {kind.__name__} where one belongs")
        return self.stack[-1]

    def last(self, count):
        """The last `count` values, taken off the stack."""
        if count > len(self.stack):
            raise UnpicklingError("an empty stack")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def marked(self):
        """The values since the last mark, taken off the stack."""
        return self.last(max(0, len(self.stack) - self.marks.pop()))

    def remember(self, index):
        self.memo[index] = self.stack[-1]

    def extend(self, values):
        if type(self.stack[-1]) is not Opaque:
            self.top(list).extend(values)

    def set_items(self, items):
        if type(self.stack[-1]) is not Opaque:
            pairs = zip(items[::2], items[1::2], strict=True)
            self.top(dict).update({key: value for key, value in pairs if _is_key(key)})

    def unread_set(self):
        self.marked()
        return Opaque("set")

    def build(self):
        """The state of an object, which is left out unless it is a Record."""
        (state,) = self.last(1)
        if type(self.stack[-1]) is Record and type(state) is dict:
            self.stack[-1].attributes = state
        elif type(self.stack[-1]) not in (Opaque, dict):
            raise UnpicklingError("a state for a value without one")

    def find(self, module, name):
        if type(module) is not str or type(name) is not str or len(module) + len(name) > 200:
            raise UnpicklingError("a name that is no text, or too long")
        if module.startswith("dnnlib.tflib"):
            raise CheckpointError(
                "a pickle of the TensorFlow era; wanted: what NVIDIA's legacy.py makes of it"
            )
        if self.names is _SCRIPT and module.startswith("__torch__"):
            return _record  # the class of an object, whatever its name
        try:
            return self.names[module, name]
        except KeyError:
            raise UnpicklingError(str(Opaque(f"{module}.{name}"))) from None

    def call(self):
        function, args = self.last(2)
        if isinstance(function, Opaque):
            return function
        if not isinstance(function, FunctionType) or type(args) is not tuple or len(args) > 8:
            raise UnpicklingError("a call of what is no function, or with more than files have")
        return function(self.operations, *args) if function is _nested else function(*args)

    def call_with_names(self):
        if not isinstance(function := self.last(3)[0], Opaque):
            raise UnpicklingError("a call with named arguments")
        return function

    def persistent_id(self):
        kind, dtype, key, _, numel, *view = self.stack.pop()
        if self.persistent is None or kind != "storage" or view not in ([], [None]):
            raise UnpicklingError("a persistent id that is no storage")
        if isinstance(dtype, Opaque):
            return dtype
        return self.persistent(_checked_key(key), Storage(dtype, numel))


_VALUES = {  # what to put on the stack
    pickle.NONE[0]: lambda run: None,
    pickle.NEWTRUE[0]: lambda run: True,
    pickle.NEWFALSE[0]: lambda run: False,
    pickle.BININT[0]: lambda run: run.integer(4, signed=True),
    pickle.BININT1[0]: lambda run: run.integer(1),
    pickle.BININT2[0]: lambda run: run.integer(2),
    pickle.LONG1[0]: lambda run: run.integer(run.integer(1), signed=True),
    pickle.BINFLOAT[0]: lambda run: struct.unpack(">d", run.take(8))[0],
    pickle.SHORT_BINUNICODE[0]: lambda run: run.text(1),
    pickle.BINUNICODE[0]: lambda run: run.text(4),
    pickle.BINUNICODE8[0]: lambda run: run.text(8),
    pickle.BYTEARRAY8[0]: lambda run: run.take(run.integer(8)),
    pickle.SHORT_BINBYTES[0]: lambda run: run.take(run.integer(1)),
    pickle.BINBYTES[0]: lambda run: run.take(run.integer(4)),
    pickle.BINBYTES8[0]: lambda run: run.take(run.integer(8)),
    pickle.EMPTY_DICT[0]: lambda run: {},
    pickle.EMPTY_LIST[0]: lambda run: [],
    pickle.EMPTY_SET[0]: lambda run: Opaque("set"),
    pickle.EMPTY_TUPLE[0]: lambda run: (),
    pickle.FROZENSET[0]: lambda run: run.unread_set(),
    pickle.TUPLE1[0]: lambda run: tuple(run.last(1)),
    pickle.TUPLE2[0]: lambda run: tuple(run.last(2)),
    pickle.TUPLE3[0]: lambda run: tuple(run.last(3)),
    pickle.TUPLE[0]: lambda run: tuple(run.marked()),
    pickle.BINGET[0]: lambda run: run.memo[run.integer(1)],
    pickle.LONG_BINGET[0]: lambda run: run.memo[run.integer(4)],
    pickle.GLOBAL[0]: lambda run: run.find(run.line(), run.line()),
    pickle.STACK_GLOBAL[0]: lambda run: run.find(*run.last(2)),
    pickle.REDUCE[0]: lambda run: run.call(),
    pickle.NEWOBJ[0]: lambda run: run.call(),
    pickle.NEWOBJ_EX[0]: lambda run: run.call_with_names(),
    pickle.BINPERSID[0]: lambda run: run.persistent_id(),
}
_ACTIONS = {  # what else to do
    pickle.PROTO[0]: lambda run: run.take(1),
    pickle.FRAME[0]: lambda run: run.take(8),
    pickle.MARK[0]: lambda run: run.marks.append(len(run.stack)),
    pickle.BINPUT[0]: lambda run: run.remember(run.integer(1)),
    pickle.LONG_BINPUT[0]: lambda run: run.remember(run.integer(4)),
    pickle.MEMOIZE[0]: lambda run: run.remember(len(run.memo)),
    pickle.APPEND[0]: lambda run: run.extend(run.last(1)),
    pickle.APPENDS[0]: lambda run: run.extend(run.marked()),
    pickle.ADDITEMS[0]: lambda run: run.extend(run.marked()),  # an Opaque, as all sets
    pickle.POP[0]: lambda run: run.last(1),  # this and the next: of values in themselves
    pickle.POP_MARK[0]: lambda run: run.marked(),
    pickle.SETITEM[0]: lambda run: run.set_items(run.last(2)),
    pickle.SETITEMS[0]: lambda run: run.set_items(run.marked()),
    pickle.BUILD[0]: lambda run: run.build(),
}
