"""Files that appear whole or not at all."""

import os


def write_atomically(path, write):
    """write(file aside), flush it to the disk, rename: `path` appears whole or not at all.

    Raises OSError, with `path` as its file.
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # else the new name may be lost with the power
        os.close(folder)
    except OSError as error:  # which names the file aside, or none
        words = f"cannot be written: {error.strerror or error}"
        raise OSError(error.errno, words, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)
