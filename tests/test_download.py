"""Checkpoints behind URLs: whole or absent, and one line, whatever the server does."""

import hashlib
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import ipl
from checkpoints import CheckpointError, download, load_generator

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "rosinality_tiny.pt"
DATA = TINY.read_bytes()
HALF = len(DATA) // 2
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server:
    """A file server whose answers come from `answers`, in turn; the last one is repeated.

    An answer: function of the handler. `ranges`: the Range header of each request that came in.
    """

    def __init__(self):
        self.answers, self.ranges = [whole], []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler):
                self.ranges.append(handler.headers["Range"])
                answer = self.answers[min(len(self.ranges), len(self.answers)) - 1]
                try:
                    answer(handler)
                except OSError:  # the client has gone
                    pass

            def log_message(handler, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/nets/tiny.pt"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()


def send(handler, data, status=200, length=True, **headers):
    handler.send_response(status)
    if length is not None and "Content_Length" not in headers:
        headers["Content_Length"] = len(data) if length is True else length
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(data)


def whole(handler):
    send(handler, DATA)


def part(end=None, version='"1"', data=DATA):
    """Answers what is asked for, but stops at byte `end`; the file is of `version`."""

    def answer(handler):
        start, asked = 0, handler.headers["Range"]
        if asked and handler.headers["If-Range"] == version:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        headers = {"ETag": version}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        status = 206 if start else 200
        send(handler, data[start:end], status, length=len(data) - start, **headers)

    return answer


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.001)
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


def cached(tmp_path, hidden=False):
    """What is in the cache; hidden: with the parts of files that are not there yet."""
    names = os.listdir(tmp_path / "cache" / "stylegan2_ops")
    return [name for name in names if hidden or not name.startswith(".")]


def fetch(url):
    return download.download(url).read_bytes()


def refusal(function, url, **kwargs):
    with pytest.raises(CheckpointError) as error:
        function(url, **kwargs)
    message = str(error.value)
    assert message.startswith(url.partition("#")[0]) and "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------
# Whole


def test_a_file_is_downloaded_once(server, tmp_path):
    a, b = load_generator(server.url), load_generator(TINY)
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    assert fetch(server.url) == DATA and fetch(f"{server.url}#sha256={SHA256}") == DATA
    assert server.ranges == [None]
    assert len(cached(tmp_path, hidden=True)) == 1 and cached(tmp_path)[0].endswith("-tiny.pt")


def test_several_that_want_the_same_file_at_once(server, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch(server.url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == 4 * [DATA] and len(server.ranges) == 1


def test_other_files_have_other_names(server):
    server.answers = [whole, lambda handler: send(handler, b"other")]
    assert fetch(server.url) == DATA and fetch(f"{server.url}?v=2") == b"other"


def test_a_slow_server(server):
    def slow(handler):
        send(handler, b"", length=len(DATA))
        for i in range(0, len(DATA), 2**14):
            time.sleep(0.05)  # in all longer than the timeout, which is of a byte
            handler.wfile.write(DATA[i : i + 2**14])

    server.answers = [slow]
    assert fetch(server.url) == DATA and server.ranges == [None]


def test_a_stalling_server(server):
    def stall(handler):
        part(HALF)(handler)
        handler.wfile.flush()
        time.sleep(1)

    server.answers = [stall, part()]
    assert fetch(server.url) == DATA and server.ranges == [None, f"bytes={HALF}-"]


def test_a_cut_connection_goes_on_where_it_was(server, tmp_path):
    server.answers = [part(1000), part(HALF), part(1 + HALF), part()]
    assert fetch(server.url) == DATA
    assert server.ranges == [None, "bytes=1000-", f"bytes={HALF}-", f"bytes={HALF + 1}-"]
    assert len(cached(tmp_path, hidden=True)) == 1


def test_a_stopped_program_goes_on_where_it_was(server, tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    server.answers = [part(HALF), part()]
    with monkeypatch.context() as patch:
        patch.setattr(download.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(server.url)
    assert not cached(tmp_path)
    assert fetch(server.url) == DATA and server.ranges == [None, f"bytes={HALF}-"]


def test_a_server_that_knows_no_ranges_starts_anew(server):
    server.answers = [lambda handler: send(handler, DATA[:HALF], length=len(DATA)), whole]
    assert fetch(server.url) == DATA and server.ranges == [None, None]


def test_a_file_that_changes_is_not_mixed(server):
    new = bytes(len(DATA))
    server.answers = [part(HALF, '"1"'), part(None, '"2"', new)]
    assert fetch(server.url) == new


@pytest.mark.parametrize("span", [f"bytes 7-{len(DATA) - 1}/{len(DATA)}", "bytes */9", "nonsense"])
def test_the_wrong_part_is_not_used(server, span):
    def wrong(handler):
        send(handler, DATA[7:], 206, Content_Range=span, ETag='"1"')

    server.answers = [part(HALF), wrong, part()]
    assert fetch(server.url) == DATA and server.ranges[-1] is None


def test_a_server_that_forgets_what_it_began(server):
    server.answers = [part(HALF), lambda handler: send(handler, b"", 416), part()]
    assert fetch(server.url) == DATA and server.ranges[-1] is None


def test_an_overloaded_server_is_asked_again(server):
    server.answers = [lambda handler: send(handler, b"", 503), whole]
    assert fetch(server.url) == DATA and len(server.ranges) == 2


# ----------------------------------------------------------------------------------------------
# Absent


def test_not_found(server, tmp_path):
    server.answers = [lambda handler: send(handler, b"sorry", 404)]
    assert refusal(load_generator, server.url) == f"{server.url}: HTTP status 404 Not Found"
    assert len(server.ranges) == 1 and not cached(tmp_path, hidden=True)


def test_a_server_that_always_cuts(server, tmp_path):
    server.answers = [part(1000)]
    message = refusal(load_generator, server.url)
    assert f"the connection ended after 1,000 of {len(DATA):,} bytes" in message
    assert message.endswith("the next call goes on after 1,000 bytes")
    assert len(server.ranges) == download.ATTEMPTS and not cached(tmp_path)


def test_a_length_that_is_too_long(server, tmp_path):
    server.answers = [lambda handler: send(handler, DATA, length=len(DATA) + 1)]
    message = refusal(load_generator, server.url)
    assert f"the connection ended after {len(DATA):,} of {len(DATA) + 1:,} bytes" in message
    assert not cached(tmp_path)


def test_a_length_that_is_too_short(server, tmp_path):
    """Unseen by HTTP; but the file is damaged, is not kept, and is fetched again."""
    server.answers = [lambda handler: send(handler, DATA, length=len(DATA) - 1), whole]
    assert "damaged, or more than plain tensors" in refusal(load_generator, server.url)
    assert not cached(tmp_path)
    assert load_generator(server.url).resolution == 32


@pytest.mark.parametrize("length", ["-1", "many", "9" * 20])
def test_a_length_that_is_none(server, tmp_path, length):
    server.answers = [lambda handler: send(handler, DATA, length=length)]
    refusal(load_generator, server.url)
    assert not cached(tmp_path)


def test_an_unknown_length(server, tmp_path):
    server.answers = [lambda handler: send(handler, DATA, length=None)]
    assert "of unknown length; wanted: #sha256=" in refusal(load_generator, server.url)
    assert not cached(tmp_path)
    assert fetch(f"{server.url}#sha256={SHA256}") == DATA
    server.answers = [lambda handler: send(handler, DATA[:HALF], length=None)]
    assert "its sha256 is" in refusal(fetch, f"{server.url}?2#sha256={SHA256}")
    assert len(cached(tmp_path, hidden=True)) == 1


def test_the_wrong_file(server, tmp_path):
    server.answers = [lambda handler: send(handler, DATA[::-1]), whole]
    message = refusal(load_generator, f"{server.url}#sha256={SHA256}")
    assert f"its sha256 is {hashlib.sha256(DATA[::-1]).hexdigest()}, not {SHA256}" in message
    assert not cached(tmp_path, hidden=True)
    assert load_generator(f"{server.url}#sha256={SHA256}").resolution == 32


@pytest.mark.parametrize("fragment", ["sha256=12", "md5=" + SHA256, SHA256, "sha256=" + 64 * "g"])
def test_a_checksum_that_is_none(server, fragment):
    assert "wanted: #sha256= and 64 hex digits" in refusal(fetch, f"{server.url}#{fragment}")
    assert not server.ranges


def test_a_damaged_cache_is_replaced_if_there_is_a_checksum(server):
    url = f"{server.url}#sha256={SHA256}"
    path = download.download(url)
    path.write_bytes(b"damaged")
    assert download.download(server.url) == path and len(server.ranges) == 1
    assert fetch(url) == DATA and len(server.ranges) == 2


def test_nobody_is_there(server, tmp_path):
    server.server.shutdown()
    server.server.server_close()
    message = refusal(load_generator, server.url)
    assert "refused" in message and "goes on" not in message
    assert not cached(tmp_path)


@pytest.mark.parametrize("url", ["http://", "http:///x", "http://127.0.0.1:x/y", "http://[/y"])
def test_urls_that_are_none(server, url):
    refusal(load_generator, url)


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(CheckpointError, match="stylegan2_ops: Not a directory"):
        load_generator(server.url)


# ----------------------------------------------------------------------------------------------
# The command line


def test_commands_take_urls(server, tmp_path, capsys):
    ipl.main(["inspect", server.url])
    assert "resolution      32\n" in capsys.readouterr().out
    ipl.main(["convert", server.url, str(tmp_path / "copy.safetensors")])
    assert load_generator(tmp_path / "copy.safetensors").resolution == 32
    short = "--method nada --steps 1 --layer-batch 1 --samples 1".split()
    world = ["--generator", server.url, "--clip", str(GOLDEN / "clip_tiny.pt")]
    ipl.main([*world, *short, "--out", str(tmp_path / "run")])
    ipl.main(["sample", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "grid.png")])
    assert len(server.ranges) == 1
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        ipl.main(["inspect", f"{server.url}#sha256=1"])
    said = capsys.readouterr()
    assert exit_.value.code == 2 and not said.out
    assert said.err.startswith(f"ipl.py: error: {server.url}: ") and said.err.count("\n") == 1
