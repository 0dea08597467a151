"""Downloading a checkpoint once, whole or not at all."""

import re
import sys
from pathlib import Path
from urllib.parse import urldefrag

from checkpoints.pickles import CheckpointError

TIMEOUT = 30.0  # seconds without a byte


def split_url(path):
    """(address, sha256 or "") if `path` is a URL, None if it is a file's.

    Raises CheckpointError for a scheme other than http:// and https://, and for a fragment other
    than #sha256=<64 hex digits>.
    """
    if not (scheme := re.match(r"(\w[\w+.-]+)://", str(path))):
        return None
    try:
        address, fragment = urldefrag(str(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if scheme[1].lower() not in ("http", "https"):
        raise CheckpointError(f"{address}: no URL to load from; wanted: http:// or https://")
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", fragment):
        raise CheckpointError(f"{address}: #{fragment[:80]}; wanted: #sha256= and 64 hex digits")
    return address, fragment.removeprefix("sha256=").lower()


def download(url):
    """The path of the file behind `url`, which is downloaded unless it was before.

    url: http:// or https://. If it ends in #sha256=<64 hex digits>, the file must have that digest.
    The folder is stylegan2_ops in $XDG_CACHE_HOME, or in ~/.cache; the file's name ends like the
    URL. It is there when it is complete: bytes are gathered aside, and thrown away if the
    connection breaks; a call begins anew. On a terminal a bar shows the progress.

    Raises CheckpointError.
    """
    import pooch  # here: it and requests are only for those who download
    import requests

    address, digest = split_url(url)
    pooch.get_logger().setLevel("WARNING")
    options = {"timeout": TIMEOUT, "headers": {"Accept-Encoding": "identity"}}
    bar = sys.stderr.isatty()
    downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=2**20, **options)
    folder, found = pooch.os_cache("stylegan2_ops"), None

    def fetch(url, path, caller):
        nonlocal found
        downloader(url, path, caller)
        found = pooch.file_hash(path)

    try:
        return Path(pooch.retrieve(address, digest or None, path=folder, downloader=fetch))
    except requests.HTTPError as error:
        reason = f"HTTP status {error.response.status_code} {error.response.reason}"
    except (requests.RequestException, ValueError) as error:
        while cause := error.__cause__ or error.__context__:  # the innermost one says it shortest
            error = cause
        reason = f"its sha256 is {found}, not {digest}" if found else " ".join(str(error).split())
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror or error}") from error
    raise CheckpointError(f"{address}: {reason}")
