"""Against a server on this machine that breaks connections off, ignores ranges or has another file."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from quest.runtime import download
from quest.runtime.download import checked, fetch, sha256_of

DATA = bytes(range(256)) * 400
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves DATA; `cut` bytes per connection at most, with or without ranges."""

    def __init__(self):
        self.cut, self.ranges, self.asked = len(DATA), True, []
        self.shrinks = False  # whether every second connection breaks off earlier
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/weights.bin"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        if self.path != "/weights.bin":
            return self.send_error(404)
        if start >= len(DATA):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(DATA)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if asked and self.server.ranges else 200)
        if asked and self.server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        self.wfile.write(DATA[start : start + self.server.cut - self.server.shrinks * (len(self.server.asked) % 2)])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    served = Server()
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def test_fetched_once(server, tmp_path):
    path = tmp_path / "new" / "weights.bin"
    assert fetch(server.url, path, SHA256) == path and path.read_bytes() == DATA
    assert fetch(server.url, path, SHA256[:8]) == path
    assert server.asked == [None] and [file.name for file in path.parent.iterdir()] == ["weights.bin"]


def test_broken_connections_are_taken_up_where_they_broke(server, tmp_path):
    server.cut = 40_000
    fetch(server.url, tmp_path / "weights.bin", SHA256)
    assert server.asked == [None, "bytes=40000-", "bytes=80000-"]
    assert sha256_of(tmp_path / "weights.bin") == SHA256


def test_goes_on_from_an_earlier_try(server, tmp_path):
    (tmp_path / "weights.bin.part").write_bytes(DATA[:1000])
    fetch(server.url, tmp_path / "weights.bin", SHA256)
    assert server.asked == ["bytes=1000-"]
    # A server that knows no ranges sends all of it again, and it is not appended.
    server.ranges = False
    (tmp_path / "other.bin.part").write_bytes(DATA[:1000])
    assert fetch(server.url, tmp_path / "other.bin", SHA256).read_bytes() == DATA


def test_a_part_longer_than_the_file_is_started_again(server, tmp_path):
    (tmp_path / "weights.bin.part").write_bytes(DATA + b"more")
    assert fetch(server.url, tmp_path / "weights.bin", SHA256).read_bytes() == DATA


def test_another_file_is_refused_and_removed(server, tmp_path):
    with pytest.raises(ValueError, match=f"weights.bin: SHA-256 is {SHA256}, expected 12345678; .*removed"):
        fetch(server.url, tmp_path / "weights.bin", "12345678")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_checked_and_never_replaced(server, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(DATA[:-1])  # truncated
    with pytest.raises(ValueError, match=rf"weights.bin \({len(DATA) - 1} bytes\): SHA-256 is .*; remove it to fetch"):
        fetch(server.url, path, SHA256)
    assert path.read_bytes() == DATA[:-1] and not server.asked


def test_failures_say_where_to_put_the_file(server, tmp_path):
    path = tmp_path / "weights.bin"
    with pytest.raises(OSError, match=rf"status 404 .*put it at {path} \(SHA-256 abc\)$"):
        fetch(server.url + "x", path, "abc")
    server.cut = 0  # accepts connections and says nothing
    with pytest.raises(OSError, match="put it at .*weights.bin.part is kept"):
        (tmp_path / "weights.bin.part").write_bytes(DATA[:1000])
        fetch(server.url, path, SHA256)
    assert (tmp_path / "weights.bin.part").read_bytes() == DATA[:1000]


def test_a_server_that_starts_over_is_given_up(server, tmp_path):
    """It sends the beginning again and again, sometimes more of it and sometimes less."""
    server.cut, server.ranges, server.shrinks = 40_000, False, True
    with pytest.raises(OSError, match="the connection broke off; fetch it elsewhere"):
        fetch(server.url, tmp_path / "weights.bin", SHA256)
    assert len(server.asked) <= 8


def test_unknown_hash_is_told(server, tmp_path, capsys):
    fetch(server.url, tmp_path / "weights.bin")
    assert f"SHA-256 {SHA256}" in capsys.readouterr().err


def test_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.ckpt: no such file; put the LDM checkpoint there"):
        checked(tmp_path / "model.ckpt", hint="put the LDM checkpoint there")
    (tmp_path / "model.ckpt").write_bytes(DATA)
    assert checked(tmp_path / "model.ckpt", SHA256) == checked(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="truncated or another file"):
        checked(tmp_path / "model.ckpt", "0" * 64)


def test_a_complete_part_is_taken_and_not_fetched_again(server, tmp_path):
    """What a kill leaves between the last byte and the rename."""
    part = tmp_path / "weights.bin.part"
    part.write_bytes(DATA)
    assert fetch(server.url, tmp_path / "weights.bin", SHA256).read_bytes() == DATA
    assert server.asked == [] and not part.exists()
    part.write_bytes(DATA)
    assert fetch(server.url, tmp_path / "unknown.bin").read_bytes() == DATA  # no hash is known, and no part there
    (tmp_path / "other.bin.part").write_bytes(DATA)
    server.asked.clear()
    assert fetch(server.url, tmp_path / "other.bin").read_bytes() == DATA
    assert server.asked == [f"bytes={len(DATA)}-"], "the server said that nothing follows"


def test_a_part_that_is_longer_than_the_file_is_fetched_again(server, tmp_path):
    (tmp_path / "weights.bin.part").write_bytes(DATA + b"more")
    assert fetch(server.url, tmp_path / "weights.bin", SHA256).read_bytes() == DATA
