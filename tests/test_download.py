"""Checkpoints behind URLs: whole or absent, and one line, whatever the server does."""

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import safetensors.torch
from conftest import GOLDEN, assert_same, refusal

from checkpoints import CheckpointError, load_generator
from checkpoints.download import download

TINY = GOLDEN / "rosinality_tiny.pt"
DATA = TINY.read_bytes()
HALF = DATA[: len(DATA) // 2]
SHA256 = hashlib.sha256(DATA).hexdigest()


def send(handler, data=DATA, status=200, length=None):
    handler.send_response(status)
    if length != "":
        handler.send_header("Content-Length", str(len(data) if length is None else length))
    handler.end_headers()
    handler.wfile.write(data)


def sends(*args, **kwargs):
    return lambda handler: send(handler, *args, **kwargs)


class Server(ThreadingHTTPServer):
    """Its answers, functions of the handler, come in turn; the last is repeated."""

    def __init__(self):
        self.answers, self.requests = [send], 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                self.requests += 1
                try:
                    self.answers[min(self.requests, len(self.answers)) - 1](handler)
                except OSError:  # the client has gone
                    pass

            def log_message(handler, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/nets/tiny.pt"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def cached(tmp_path):
    folder = tmp_path / "cache" / "stylegan2_ops"
    return lambda: os.listdir(folder) if folder.exists() else []


# ----------------------------------------------------------------------------------------------
# Whole


def test_a_file_is_downloaded_once(server, cached):
    assert_same(load_generator(server.url), load_generator(TINY))
    path, url = download(server.url), f"{server.url}#sha256={SHA256.upper()}"
    assert path.read_bytes() == DATA and download(url) == path and server.requests == 1
    assert cached() == [path.name] and path.name.endswith("-tiny.pt")
    path.write_bytes(b"damaged")
    assert download(server.url) == path and server.requests == 1
    assert download(url).read_bytes() == DATA and server.requests == 2
    server.answers = [sends(b"other")]
    assert download(f"{server.url}?v=2").read_bytes() == b"other"


def test_several_that_want_the_same_file_at_once(server, cached):
    with ThreadPoolExecutor(4) as pool:
        found = [path.read_bytes() for path in pool.map(download, 4 * [server.url])]
    assert found == 4 * [DATA] and len(cached()) == 1


def test_the_content_says_the_format(server, checkpoint):
    state = {**checkpoint["g_ema"], "latent_avg": checkpoint["latent_avg"]}
    server.answers = [sends(safetensors.torch.save(state))]
    assert_same(load_generator(server.url), load_generator(TINY))


# ----------------------------------------------------------------------------------------------
# Absent


def stall(handler):
    send(handler, HALF, length=len(DATA))
    handler.wfile.flush()
    time.sleep(1)


DAMAGED = "damaged, or more than plain tensors"
ANSWERS = {  # function of the handler, what is said
    "not found": (sends(b"sorry", 404), "HTTP status 404 Not Found"),
    "overloaded": (sends(b"", 503), "HTTP status 503 Service Unavailable"),
    "cut": (sends(HALF, length=len(DATA)), f"{len(HALF)} bytes read"),
    "too long": (sends(length=len(DATA) + 1), f"{len(DATA)} bytes read, 1 more expected"),
    "too short": (sends(length=len(DATA) - 1), DAMAGED),
    "a length of text": (sends(length="many"), "many"),
    "a huge length": (sends(length="9" * 20), f"{len(DATA)} bytes read"),
    "no length": (sends(HALF, length=""), DAMAGED),
    "a page": (sends(b"<html>"), "damaged, or written by neither pickle nor torch.save"),
    "stalling": (stall, "timed out"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_not_whole_is_absent(server, cached, monkeypatch, name):
    """It is refused in one line, leaves nothing, and is fetched anew by the next call."""
    answer, said = ANSWERS[name]
    monkeypatch.setattr("checkpoints.download.TIMEOUT", 0.5)
    server.answers = [answer, send]
    assert said in refusal(load_generator, server.url) and not cached()
    assert load_generator(server.url).resolution == 32 and server.requests == 2


@pytest.mark.parametrize("data", [HALF, DATA[::-1]])
def test_the_wrong_file(server, cached, data):
    server.answers = [sends(data), send]
    with pytest.raises(CheckpointError) as error:
        load_generator(f"{server.url}#sha256={SHA256}")
    said = f"{server.url}: its sha256 is {hashlib.sha256(data).hexdigest()}, not {SHA256}"
    assert str(error.value) == said and not cached()
    assert load_generator(f"{server.url}#sha256={SHA256}").resolution == 32


URLS = {
    "http://": "",
    "http:///x": "",
    "http://127.0.0.1:x/y": "",
    "http://[/y": "",
    **{
        f"{x}://127.0.0.1/y": "no URL to load from" for x in ("ftp", "file", "s3", "htps", "HTTPSS")
    },
    **{
        f"http://127.0.0.1/y#{x}": "#"
        for x in ("sha256=12", f"md5={SHA256}", SHA256, "sha256=" + 64 * "g")
    },
}


@pytest.mark.parametrize("url", URLS)
def test_urls_that_are_none(url):
    """Nothing is asked for."""
    with pytest.raises(CheckpointError) as error:
        load_generator(url)
    assert str(error.value).startswith(f"{url.split('#')[0]}: {URLS[url]}")


def test_nobody_is_there(server, cached):
    server.shutdown()
    server.server_close()
    assert "Connection refused" in refusal(load_generator, server.url) and not cached()


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(CheckpointError, match="stylegan2_ops: (Not a directory|File exists)"):
        load_generator(server.url)
