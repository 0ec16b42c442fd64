"""URLs: what is there is streamed; what is not, stalls or breaks off is one line that names it, and never hangs."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data import urls
from data.names import file_beside, file_name
from data.samples import SampleError
from data.shards import reader
from data.shards.manifest import read_set
from data.shards.reader import read_shard
from data.shards.writer import write_set
from data.urls import UNREACHABLE, expand_urls, is_remote, open_url
from tests.data.shard_files import make, read_until_fault, tar_of
from tokenizer.errors import InputError

TAR = tar_of({f"{n:03d}.{extension}": bytes([n]) * 9000 for n in range(60) for extension in ("jpg", "txt")})


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, and `TAR` in the ways that servers fail. Knows no ranges, as the simplest servers, but one.

    /flaky.tar fails once, /refused.tar always; /stalls.tar sends half and then nothing; /dies.tar promises all, sends
    half and hangs up; /tires.tar sends a third of what is asked for, but knows ranges and names the version;
    /whole.tar is good.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.over = threading.Event()


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def __init__(self, request: object, client: object, server: Server) -> None:
        super().__init__(request, client, server, directory=str(server.folder))  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path == "/refused.tar" or (self.path == "/flaky.tar" and self.server.requests.count(self.path) == 1):
            self.send_error(503)
        elif self.path in ("/whole.tar", "/flaky.tar", "/stalls.tar", "/dies.tar"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(TAR)))
            self.end_headers()
            good = self.path in ("/whole.tar", "/flaky.tar")
            self.wfile.write(TAR if good else TAR[: len(TAR) // 2])
            if self.path == "/stalls.tar":
                self.server.over.wait(30)
        elif self.path == "/tires.tar":
            first = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(len(TAR) - first))
            self.send_header("ETag", '"1"')
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(TAR) - 1}/{len(TAR)}")
            self.end_headers()
            self.wfile.write(TAR[first : first + len(TAR) // 3])
            self.server.over.wait(0.2)  # what has not been read when a connection is lost is lost with it
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    with Server(tmp_path) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield serving
        serving.over.set()
        serving.shutdown()
        thread.join()


def at(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


def test_any_number_of_shards_may_be_open(server: Server) -> None:
    """Each lane of each source has one: 26 sources of four lanes have more than the 100 that aiohttp allows at once."""
    with contextlib.ExitStack() as stack:
        for _ in range(104):
            stream = stack.enter_context(open_url(at(server, "stalls.tar"), tries=1, timeout=5.0))
            assert stream.read(1000) == TAR[:1000]
    assert len(server.requests) == 104


def test_a_set_on_a_server_is_read_like_one_on_disk(server: Server, tmp_path: Path) -> None:
    write_set(tmp_path / "set", "images", range(6), make, jobs_per_shard=3, workers=1, facts={})
    there = read_set(at(server, "set"))
    assert there == read_set(at(server, "set/manifest.json"))
    here = read_set(tmp_path / "set")
    assert [(s.name, s.samples, s.sha256) for s in there.shards] == [(s.name, s.samples, s.sha256) for s in here.shards]
    for far, near in zip(there.shards, here.shards, strict=True):
        both = zip(read_shard(far.url, samples=far.samples), read_shard(near.url, 0), strict=True)
        assert all((a.id, a.files) == (b.id, b.files) for a, b in both)
        assert [raw.index for raw in read_shard(far.url, 2)] == list(range(2, far.samples))


def test_what_lets_in_to_the_manifest_lets_in_to_its_shards(server: Server, tmp_path: Path) -> None:
    """Signed URLs carry a query, which is no part of what samples are called: the next one is signed anew."""
    write_set(tmp_path / "set", "images", range(6), make, jobs_per_shard=3, workers=1, facts={})
    for spec in ("set?sig=a/b.c", "set/?sig=a/b.c", "set/manifest.json?sig=a/b.c"):
        there = read_set(at(server, spec))
        assert [s.url for s in there.shards] == [
            at(server, f"set/{s.name}?sig=a/b.c") for s in read_set(tmp_path / "set").shards
        ]
        raws = [raw for shard in there.shards for raw in read_shard(shard.url, samples=shard.samples)]
        assert [raw.id for raw in raws] == [
            raw.id for shard in read_set(tmp_path / "set").shards for raw in read_shard(shard.url)
        ]
    (alone,) = read_set(at(server, "set/shard-000000.tar?sig=a/b.c")).shards
    assert alone.name == "shard-000000.tar"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("shard-0.tar", "shard-0.tar"),
        ("a/what?.tar", "what?.tar"),
        ("s3://bucket/a/x#1.tar", "x#1.tar"),
        ("HTTPS://host/a%20b.tar?x=1/2#part", "a b.tar"),
        ("https://host/get?shard=12", "get?shard=12"),
    ],
)
def test_names_of_files(url: str, name: str) -> None:
    assert file_name(url) == name
    assert file_name(file_beside(url, "c d?.tar")) == "c d?.tar"


def test_faults_of_servers_are_told_from_the_end_of_a_tar(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "open_url", functools.partial(open_url, backoff=0.01, timeout=0.5))
    whole = [raw.files for raw in read_shard(at(server, "whole.tar"))]
    assert len(whole) == 60
    for path in ("flaky.tar", "tires.tar"):
        assert [raw.files for raw in read_shard(at(server, path))] == whole
    for path, tries, samples, reason in (
        ("gone.tar", 1, 0, "not found"),
        ("refused.tar", 3, 0, "503"),
        ("stalls.tar", 1, 1, "no answer for 0.5 s"),
        ("dies.tar", 1, 0, "ayload"),
    ):
        start = time.monotonic()
        found, error = read_until_fault(at(server, path))
        assert error is not None
        assert error.cause == UNREACHABLE
        assert re.match(f"{at(server, path)}: .*{reason}", str(error))
        assert time.monotonic() - start < 5
        assert server.requests.count("/" + path) == tries
        assert samples <= len(found) < 60
        assert [raw.files for raw in found] == whole[: len(found)]
    with pytest.raises(SampleError, match="not found"):
        read_set(at(server, "gone"))


def test_a_server_that_is_not_there() -> None:
    pytest.importorskip("aiohttp")
    start = time.monotonic()
    with (
        pytest.raises(SampleError, match=r"127\.0\.0\.1:9/x\.tar") as raised,
        open_url("http://127.0.0.1:9/x.tar", backoff=0.05),
    ):
        pass
    assert raised.value.cause == UNREACHABLE
    assert 0.15 <= time.monotonic() - start < 5


def test_commands_are_read_and_their_failure_told(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(TAR)
    assert len(list(read_shard(f"pipe:cat {path} | cat"))) == 60
    for command, reason in (
        (f"head -c 40000 {path}; echo no more >&2; exit 3", "status 3: no more"),
        (f"cat {path}; false", "status 1: it printed no reason"),
        ("nosuchcommand", "status 127: .*not found"),
    ):
        with pytest.raises(SampleError, match=reason) as raised:
            list(read_shard(f"pipe:{command}"))
        assert raised.value.cause == UNREACHABLE
    with pytest.raises(SampleError, match=r"no answer for 0\.2 s"), open_url("pipe:sleep 60", timeout=0.2) as stream:
        stream.read()


def test_commands_end_with_their_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(TAR)
    pid = tmp_path / "pid"
    samples = read_shard(f"pipe:sh -c 'echo $$ > {pid}; cat {path}; exec sleep 60' | cat")
    next(samples)
    process = int(pid.read_text())
    os.kill(process, 0)
    samples.close()
    end = time.monotonic() + 5
    while Path(f"/proc/{process}").exists() and time.monotonic() < end:
        time.sleep(0.01)  # whoever inherits it has to take its status
    assert not Path(f"/proc/{process}").exists()


def test_local_files_in_each_spelling(tmp_path: Path) -> None:
    path = tmp_path / "a b.bin"
    path.write_bytes(b"12345")
    for url in (path, str(path), f"file://{path}", f"file://{tmp_path}/a%20b.bin"):
        with open_url(url) as stream:
            assert (stream.read(2), stream.seek(1, os.SEEK_CUR), stream.read()) == (b"12", 3, b"45")
        assert not is_remote(str(url))
    for missing in (tmp_path / "none", f"file://{tmp_path}/none"):
        with pytest.raises(SampleError, match="none: not found"), open_url(missing):
            pass
    with pytest.raises(SampleError, match="directory"), open_url(tmp_path):
        pass


def test_object_stores_stream_through_fsspec() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for number in range(2):
        store.pipe(f"/set/{number}.tar", TAR)
    assert expand_urls("memory://set/*.tar") == ["memory:///set/0.tar", "memory:///set/1.tar"]
    assert len(list(read_shard("memory://set/0.tar", 10))) == 50
    with pytest.raises(SampleError, match="not found"), open_url("memory://set/2.tar"):
        pass


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"^s3://b/a\.tar: .*pip install s3fs$") as raised, open_url("s3://b/a.tar"):
        pass
    assert not isinstance(raised.value, SampleError)  # no other shard could be read either: the run must end
    with pytest.raises(InputError, match=r"gopher://b/a\.tar: .*not known"), open_url("gopher://b/a.tar"):
        pass


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("x.tar", ["x.tar"]),
        ("s3://b/x-{08..11}.tar", [f"s3://b/x-{number}.tar" for number in ("08", "09", "10", "11")]),
        ("x-{0..2}.tar", ["x-0.tar", "x-1.tar", "x-2.tar"]),
        ("x-{9..11}.tar", ["x-9.tar", "x-10.tar", "x-11.tar"]),
        ("x-{2..0}", ["x-2", "x-1", "x-0"]),
        ("{a,b}/{000..001}", ["a/000", "a/001", "b/000", "b/001"]),
        ("x{,y}", ["x", "xy"]),
        ("{a,{b,c}}", ["a", "b", "c"]),
        ("http://h/x?a={1..2}", ["http://h/x?a=1", "http://h/x?a=2"]),
        ("pipe:awk '{print}' {1..2}", ["pipe:awk '{print}' 1", "pipe:awk '{print}' 2"]),
    ],
)
def test_braces(spec: str, expected: list[str]) -> None:
    assert expand_urls(spec) == expected


def test_patterns_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.tar", "a.tar", "c.txt", "d{1,2}.tar"):
        (tmp_path / name).touch()
    assert expand_urls(f"{tmp_path}/*.tar") == [f"{tmp_path}/{name}" for name in ("a.tar", "b.tar", "d{1,2}.tar")]
    assert expand_urls(f"file://{tmp_path}/[ab].tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert expand_urls(f"{tmp_path}/{{a,c}}.t*") == [f"{tmp_path}/a.tar", f"{tmp_path}/c.txt"]
    assert expand_urls(f"{tmp_path}/d{{1,2}}.tar") == [f"{tmp_path}/d{{1,2}}.tar"]
    with pytest.raises(InputError, match="no file matches"):
        expand_urls(f"{tmp_path}/*.zip")
    monkeypatch.setattr(urls, "MOST_URLS", 99)
    assert len(expand_urls("{1..99}")) == 99
    with pytest.raises(InputError, match="more than 99 URLs"):
        expand_urls("{1..10}{1..10}")
