"""Checkpoints behind URLs: whole or absent, and one line, whatever the server does."""

import contextlib
import hashlib
import socketserver
import threading
import time

import pytest
from conftest import GOLDEN, assert_same, refusal

from checkpoints import CheckpointError, load_generator
from checkpoints.download import download

TINY = GOLDEN / "rosinality_tiny.pt"
DATA = TINY.read_bytes()
HALF, SHA256 = DATA[: len(DATA) // 2], hashlib.sha256(DATA).hexdigest()
LENGTH = f"Content-Length: {len(DATA)}"


def answer(data, length=LENGTH, status="200 OK"):
    return f"HTTP/1.0 {status}\r\n{length}\r\n\r\n".encode() + data


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that gives its answers in turn, and then the whole file; and our cache."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(2**16)
            server.requests += 1
            data = server.answers.pop(0) if server.answers else answer(DATA)
            with contextlib.suppress(OSError):  # the client has gone
                self.request.sendall(data)
            time.sleep(server.pause)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.answers, server.requests, server.pause, server.daemon_threads = [], 0, 0, True
        server.url = f"http://127.0.0.1:{server.server_address[1]}/nets/tiny.pt"
        server.cached = lambda: list((tmp_path / "cache").glob("*/*"))
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


def test_a_file_is_downloaded_once(server):
    assert_same(load_generator(server.url), load_generator(TINY))
    path, url = download(server.url), f"{server.url}#sha256={SHA256.upper()}"
    assert path.read_bytes() == DATA and download(url) == path and server.requests == 1
    assert server.cached() == [path] and path.name.endswith("-tiny.pt")
    path.write_bytes(b"damaged")
    assert download(server.url) == path and server.requests == 1
    assert download(url).read_bytes() == DATA and server.requests == 2
    server.answers = [answer(HALF, "Content-Type: x")]
    assert download(f"{server.url}?v=2").read_bytes() == HALF


X, PAGE = hashlib.sha256(b"x").hexdigest(), b"<html>"
ANSWERS = {  # the end of the URL, the first answer, what is said
    "not found": ("", answer(b"", status="404 Not Found"), "HTTP status 404 Not Found"),
    "cut": ("", answer(HALF), f"{len(HALF)} bytes read"),
    "cut, no length": ("", answer(HALF, "Content-Type: x"), "damaged, or more than plain"),
    "a page": ("", answer(PAGE, "Content-Length: 6"), "a web page, such as one that asks"),
    "stalling": ("", answer(HALF), "timed out"),
    "checksum": (f"#sha256={SHA256}", answer(b"x", "A: b"), f"its sha256 is {X}, not {SHA256}"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_what_is_not_whole_is_absent(server, monkeypatch, name):
    """It is refused in one line, leaves nothing, and is fetched anew by the next call."""
    end, first, said = ANSWERS[name]
    monkeypatch.setattr("checkpoints.download.TIMEOUT", 0.5)
    server.answers, server.pause = [first], int(name == "stalling")
    with pytest.raises(CheckpointError) as error:
        load_generator(server.url + end)
    assert str(error.value).startswith(f"{server.url}: ") and said in str(error.value)
    assert "\n" not in str(error.value) and not server.cached()
    server.pause = 0
    assert load_generator(server.url + end).resolution == 32 and server.requests == 2


URLS = dict.fromkeys(["http://", "http:///x", "http://127.0.0.1:x/y", "http://[/y"], "")
URLS |= {f"{scheme}://127.0.0.1/y": "no URL to load from; " for scheme in ("ftp", "file", "htps")}
URLS |= {f"http://127.0.0.1/y#{x}": "#" for x in ("sha256=12", f"md5={SHA256}", SHA256)}


def test_no_cache_no_url_and_no_server(server, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(CheckpointError, match="stylegan2_ops: (Not a directory|File exists)"):
        load_generator(server.url)
    (tmp_path / "cache").unlink()
    for url, said in URLS.items():
        with pytest.raises(CheckpointError) as error:
            load_generator(url)
        assert str(error.value).startswith(f"{url.split('#')[0]}: {said}")
    server.shutdown()
    server.server_close()
    assert "Connection refused" in refusal(load_generator, server.url) and not server.cached()
