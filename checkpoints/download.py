"""Downloading a checkpoint once, whole or not at all."""

import fcntl
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

from checkpoints.pickles import CheckpointError

ATTEMPTS = 4  # without progress
PAUSE = 0.5  # seconds before the second of them, and twice as long before each that follows
TIMEOUT = 30.0  # seconds without a byte


def download(url):
    """The path of the file behind `url`, which is downloaded unless it was before.

    url: http:// or https://. If it ends in #sha256=<64 hex digits>, the file must have that digest.
    The folder is stylegan2_ops in $XDG_CACHE_HOME, or in ~/.cache; the file's name ends like the
    URL. It is there when it is complete: bytes are first gathered aside. What a cut connection
    or a stopped program has left there is continued, if the server says that the file is the same.
    On a terminal a bar shows the progress. Another process that wants the same file waits.

    Raises CheckpointError, after some more attempts if they may help.
    """
    try:
        address, fragment = urllib.parse.urldefrag(url)
        name = urllib.parse.urlsplit(address).path.rpartition("/")[2]
    except ValueError as error:
        raise CheckpointError(f"{url}: {error}") from error
    digest = fragment.removeprefix("sha256=").lower()
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", fragment):
        raise CheckpointError(f"{address}: #{fragment[:80]}; wanted: #sha256= and 64 hex digits")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stylegan2_ops"
    name = re.sub(r"[^\w.-]", "_", name)[-80:]
    path = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{name}"
    part, note = (path.with_name(f".{path.name}.{suffix}") for suffix in ("part", "note"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(note, "a+") as lock:  # its text: the version of the file that `part` begins
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if digest and path.exists() and _sha256(path) != digest:
                    path.unlink()
                if not path.exists():
                    _repeat(address, part, lock, bool(digest))
                    if digest and (found := _sha256(part)) != digest:
                        part.unlink()
                        raise CheckpointError(f"{address}: its sha256 is {found}, not {digest}")
                    os.replace(part, path)
            finally:
                if not part.exists():
                    note.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}") from error
    return path


def _repeat(address, part, note, verified):
    """Gather the file in `part`, with a new attempt where the last one ended."""
    failures, best = 0, -1
    while failures < ATTEMPTS:
        if failures:
            time.sleep(PAUSE * 2 ** (failures - 1))
        try:
            return _attempt(address, part, note, verified)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"HTTP status {error.code} {http.client.responses.get(error.code, '')}".strip()
            if error.code == 416:  # no such range: what is there is not a part of the file
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise CheckpointError(f"{address}: {reason}") from error
        except urllib.error.URLError as error:
            reason = error.reason
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{address}: {error}") from error
        size = part.stat().st_size if part.exists() else 0
        failures = 1 if size > best else failures + 1
        best = max(best, size)
    reason = " ".join(str(reason).split())
    more = f"; the next call goes on after {size:,} bytes" if size else ""
    raise CheckpointError(f"{address}: {reason}{more}")


def _attempt(address, part, note, verified):
    """One request, for what `part` lacks. Raises OSError if the answer ends too early."""
    note.seek(0)
    start, version = part.stat().st_size if part.exists() else 0, note.read()
    headers = {"Accept-Encoding": "identity", "User-Agent": "stylegan2_ops"}
    if start and version:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
            if not span or int(span[1]) != start or _version(response) not in ("", version):
                part.unlink()
                raise OSError("the answer is another part, or of another file")
            total = int(span[2])
        else:
            start = 0
            note.truncate(0)
            note.write(_version(response))
            note.flush()
        if total is None and not verified and not response.chunked:
            raise CheckpointError(f"{address}: of unknown length; wanted: #sha256=... at its end")
        if (needed := (total or 0) - start) > (free := shutil.disk_usage(part.parent).free):
            where = part.parent
            raise CheckpointError(f"{address}: {needed:,} bytes, but {where} has {free:,} left")

        bar = tqdm(
            desc=address.rpartition("/")[2], total=total, initial=start,
            unit="B", unit_scale=True, disable=None,
        )
        with bar, open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            while data := response.read1(2**20):
                start += file.write(data)
                bar.update(len(data))
    if total is not None and start != total:
        raise OSError(f"the connection ended after {start:,} of {total:,} bytes")


def _version(response):
    """What tells that the file is still the same: a strong ETag, or the time of the last change."""
    etag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified", "") if etag.startswith("W/") else etag


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
