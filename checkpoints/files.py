"""Files: read in whole, and written whole or not at all."""

import contextlib
import errno
import os
import pickle
import warnings
from pathlib import Path

from checkpoints.download import download, split_url
from checkpoints.pickles import CheckpointError, some

# What a program puts before the names of a network that it has wrapped.
WRAPPERS = ("module.", "_orig_mod.", "generator.", "model.", "clip.")


def read_file(path, wanted, parse):
    """parse(the bytes of a file, notes) -> its result; each of the notes is given as a warning.

    path: a file, or a URL (http:// or https://), which is downloaded once: see `download`.
    wanted: what would be right, in words. Whatever goes wrong is raised as a CheckpointError of one
    line, which begins with the path.
    """
    if url := split_url(path):
        file = download(path)
    else:
        file = Path(path)
    data, notes = b"", []
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise CheckpointError(f"not a regular file; wanted: {wanted}")
        data = file.read_bytes()
        if not data:
            raise CheckpointError(f"damaged, it is empty; wanted: {wanted}")
        if data.startswith(b"version https://git-lfs"):
            raise CheckpointError("a pointer of Git LFS, not the file; wanted: git lfs pull")
        value = parse(data, notes)
    except Exception as error:  # bytes that are no checkpoint can fail in any way
        if url and not url[1]:  # it may have been cut short unseen: the next call fetches it again
            file.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: {_reason(error, data, wanted)}") from error
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=4)
    return value


def _reason(error, data, wanted):
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}; wanted: {wanted}"
    if isinstance(error, MemoryError):
        return f"there is too little memory for its {len(data):,} bytes; wanted: more of it"
    kind = type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        kind += f": {error}"
    other = "more than plain tensors"
    if not (is_safetensors(data) or data.startswith((b"PK", b"\x80"))):
        other = "written by neither pickle nor torch.save"
        if data.lstrip().startswith(b"<"):
            other = "a web page, such as one that asks to log in or to confirm"
    return f"damaged, or {other} ({kind}); wanted: {wanted}"


def is_safetensors(data):
    """Whether the bytes of a file are in safetensors format: the size of a header, and JSON."""
    return data[5:9] == b"\0\0\0{"


def unwrapped(state, notes):
    """A state dict without what wrappers put before all of its keys; a note says so."""
    start = ""
    for prefix in 4 * WRAPPERS:  # they may lie in each other
        if state and all(str(key).startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
            start += prefix
    if start:
        notes.append(f"left out {start!r} before the names of all tensors")
    return state


def check_names(state, expected, kind):
    """Raise CheckpointError unless a state dict has the names and shapes of an expected one.

    The message names the tensors at fault. kind: what has the expected ones, in words.
    """
    if missing := [name for name in expected if name not in state]:
        raise CheckpointError(f"not {kind}, it lacks {some(missing)}")
    if extra := [name for name in state if name not in expected]:
        raise CheckpointError(f"not {kind}, it has {some(extra)}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            found, wanted = tuple(state[name].shape), tuple(tensor.shape)
            raise CheckpointError(f"{name} is {found}, not {wanted}")


def check_finite(state):
    """Raise CheckpointError if tensors, in float32, hold NaN or infinity; it names them."""
    if broken := [name for name, x in state.items() if not x.float().isfinite().all()]:
        raise CheckpointError(f"not finite: {some(broken)}; wanted: another checkpoint")


def write_atomically(path, write):
    """write(file aside), flush it to the disk, rename: `path` appears whole or not at all.

    Raises OSError, with `path` as its file.
    """
    # a name may have 255 bytes, and a letter has up to 4
    aside = path.with_name(f".{path.stem[:50]}.{os.getpid()}{path.suffix}")
    try:
        write(aside)
        _flush(aside)
        os.replace(aside, path)
        with contextlib.suppress(OSError):  # of a file system that cannot flush folders
            _flush(path.parent)  # else the new name may be lost with the power
    except OSError as error:  # which names the file aside, or none
        words = f"cannot be written: {error.strerror or error}"
        raise OSError(error.errno, words, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def _flush(path):
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:  # of a file system over a network, or of a user's program
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(number)
