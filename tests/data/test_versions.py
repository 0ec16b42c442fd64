"""Downloads that broke off: what is read is one version of the file, or a fault; never the pieces of two."""

from __future__ import annotations

import functools
import http.server
import threading
import time
from collections.abc import Iterator, Mapping

import pytest

from data.samples import Raw, SampleError
from data.shards import reader
from data.shards.manifest import MANIFEST, read_set
from data.urls import UNREACHABLE, open_url
from data.versions import Version
from tests.data.shard_files import read_until_fault, tar_of

OLD, NEW = (tar_of({f"{n:03d}.jpg": bytes([n ^ change]) * 9000 for n in range(60)}) for change in (0, 255))
MONDAY, TUESDAY = "Mon, 02 Nov 2026 10:00:00 GMT", "Tue, 03 Nov 2026 10:00:00 GMT"


class Server(http.server.ThreadingHTTPServer):
    """Sends half of `OLD` with some headers, then hangs up; asked for the rest, it sends that of some file.

    first, rest: headers of the two answers. body: what the rest is of. shift: bytes by which it starts too late. short:
    bytes by which it ends too early, as its headers say.
    heeds: whether it answers a condition that does not hold any more with the whole file.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.first: Mapping[str, str] = {}
        self.rest: Mapping[str, str] = {}
        self.body, self.shift, self.short, self.heeds = OLD, 0, 0, False
        self.asked: list[str | None] = []

    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/a.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        wanted, server = self.headers.get("Range"), self.server
        if wanted is None:
            self.send({"Content-Length": str(len(OLD)), **server.first}, OLD[: len(OLD) // 2])
            time.sleep(0.05)  # what has not been read when a connection is lost is lost with it
            return
        condition = self.headers.get("If-Range")
        server.asked.append(condition)
        if server.heeds and condition not in (None, *server.rest.values()):
            self.send({"Content-Length": str(len(server.body)), **server.rest}, server.body)
            return
        first, stop = int(wanted[6:-1]) + server.shift, len(server.body) - server.short
        where = {"Content-Length": str(stop - first), "Content-Range": f"bytes {first}-{stop - 1}/{len(server.body)}"}
        self.send({**where, **server.rest}, server.body[first:stop], 206)

    def send(self, headers: Mapping[str, str], body: bytes, status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(reader, "open_url", functools.partial(open_url, backoff=0.01, timeout=5))
    with Server() as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def right(found: list[Raw]) -> bool:
    """Whether all samples are of the old version, in order."""
    return [raw.files["jpg"] for raw in found] == [bytes([n]) * 9000 for n in range(len(found))]


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        ({"ETag": '"1"'}, '"1"'),
        ({"ETag": '"1"', "Last-Modified": MONDAY}, '"1"'),
        ({"Last-Modified": MONDAY}, MONDAY),
        ({"ETag": 'W/"1"', "Last-Modified": MONDAY}, MONDAY),
        ({"ETag": 'W/"1"'}, None),
    ],
)
@pytest.mark.parametrize("heeds", [False, True])
def test_the_rest_of_the_same_version_is_read(
    server: Server, headers: dict[str, str], condition: str | None, heeds: bool
) -> None:
    server.first = server.rest = headers
    server.heeds = heeds
    found, error = read_until_fault(server.url(), 60)
    assert error is None
    assert len(found) == 60
    assert right(found)
    assert set(server.asked) == {condition}


@pytest.mark.parametrize(
    ("first", "rest", "shift", "heeds"),
    [
        ({}, {}, 0, False),  # a server that names no version may send any, and is not asked
        ({}, {"ETag": '"2"'}, 0, False),
        ({"ETag": '"1"'}, {"ETag": '"2"'}, 0, False),
        ({"ETag": '"1"'}, {"ETag": '"2"'}, 0, True),
        ({"Last-Modified": MONDAY}, {"Last-Modified": TUESDAY}, 0, True),
        ({"Last-Modified": MONDAY}, {"Last-Modified": TUESDAY}, 0, False),
        ({"ETag": 'W/"1"'}, {"ETag": 'W/"2"'}, 0, False),
        ({"ETag": 'W/"1"'}, {}, 0, False),
        ({"ETag": '"1"'}, {"ETag": '"1"'}, 512, False),
        ({"ETag": '"1"'}, {"ETag": '"1"', "Content-Range": "nonsense"}, 0, False),
    ],
)
def test_the_rest_of_another_version_is_a_fault(
    server: Server, first: dict[str, str], rest: dict[str, str], shift: int, heeds: bool
) -> None:
    server.first, server.rest, server.body, server.shift, server.heeds = first, rest, NEW, shift, heeds
    found, error = read_until_fault(server.url(), 60)
    assert error is not None
    assert error.cause == UNREACHABLE
    assert len(found) < 60
    assert right(found)
    assert bool(server.asked) == bool(first)


def test_a_part_of_the_rest_is_not_taken_for_all_of_it(server: Server) -> None:
    server.first = server.rest = {"ETag": '"1"'}
    server.short = 512
    with pytest.raises(SampleError) as caught, open_url(server.url(), backoff=0.01, timeout=5) as stream:
        stream.read()
    assert caught.value.cause == UNREACHABLE
    assert server.asked == ['"1"']


def test_lengths_and_compression_are_compared() -> None:
    version = Version.of({"ETag": '"1"', "Content-Length": "900"})
    assert version.has_rest({"Content-Range": "bytes 30-899/900"}, 30)
    assert version.has_rest({"Content-Range": "bytes 30-899/*"}, 30)
    assert not version.has_rest({"ETag": '"1"'}, 30)
    assert not Version("", "", "900").has_rest({"Content-Range": "bytes 30-899/900", "ETag": '"1"'}, 30)
    assert not version.has_rest({"Content-Range": "bytes 30-899/901"}, 30)
    assert not version.has_rest({"Content-Range": "bytes 30-899/900"}, 31)
    assert not version.has_rest({"Content-Range": "bytes 30-898/900"}, 30)
    assert not version.has_rest({"Content-Range": "bytes 30-898/*"}, 30)
    assert not Version('"1"', "", "").has_rest({"Content-Range": "bytes 30-898/900"}, 30)
    assert not version.has_rest({"Content-Range": "bytes 30-899/900", "Content-Encoding": "gzip"}, 30)
    assert Version.of({"ETag": '"1"', "Content-Encoding": "gzip"}) == Version("", "", "")
    assert Version.of({"ETag": '"1"', "Content-Encoding": "identity"}) == Version('"1"', "", "")
    # A server that sends in pieces tells no length beforehand.
    assert Version('"1"', "", "").has_rest({"Content-Range": "bytes 30-899/900"}, 30)


def test_a_folder_on_a_server_may_have_a_dot_in_its_name() -> None:
    """An object store, since it lists what is asked for no less than a web server does."""
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/dotted/a.tar", OLD)
    entry = f'{{"name": "a.tar", "samples": 60, "bytes": {len(OLD)}, "sha256": ""}}'
    head = f'"format": "atoken-shards", "version": 1, "kind": "images", "samples": 60, "bytes": {len(OLD)}'
    for folder in ("set-v1.0", "plain", "odd.tar"):
        store.pipe(f"/dotted/{folder}/a.tar", OLD)
        store.pipe(f"/dotted/{folder}/{MANIFEST}", f'{{{head}, "shards": [{entry}]}}'.encode())
    for name in ("set-v1.0", "set-v1.0/", f"set-v1.0/{MANIFEST}", "plain", "plain/", "odd.tar/"):
        found = read_set(f"memory://dotted/{name}")
        assert [shard.url for shard in found.shards] == [f"memory://dotted/{name.split('/')[0]}/a.tar"]
        assert (found.samples, found.shards[0].bytes) == (60, len(OLD))
    store.pipe("/dotted/download.bin", OLD)
    for name in ("a.tar", "download.bin", "a*.tar", "{a,a}.tar"):
        assert read_set(f"memory://dotted/{name}").samples == 60
