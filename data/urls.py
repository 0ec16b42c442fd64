"""Opening what a URL names as a stream, and finding the URLs that a pattern stands for.

A shard is read once, from its first byte to its last, so every source is a plain stream with a large read-ahead:
one request for http(s), taken up again where it broke off if the server can; blocks in order for object stores; the
output of a command for `pipe:`. Nothing is downloaded as a whole. Whatever goes wrong while reading becomes a
`SampleError` with the cause "unreachable shard", so that it is never mistaken for the end of a file; a package that is
missing stays an `InputError`, since no shard can be read then.
"""

from __future__ import annotations

import contextlib
import glob
import http
import io
import itertools
import os
import re
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from data.samples import SampleError
from data.versions import Version
from tokenizer.errors import InputError

UNREACHABLE = "unreachable shard"
"""Cause of a `SampleError` for a URL that cannot be opened, or fails while it is read."""

READ_AHEAD = 256 * 1024
"""Bytes a stream reads at once."""
BLOCK = 8 * 1024 * 1024
"""Bytes of one request to an object store."""
MOST_URLS = 1_000_000
"""A pattern may stand for so many."""

_PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_PATIENCE = 2.0
"""Seconds that a command has to end by itself after it was asked to."""


@contextmanager
def open_url(
    url: str | os.PathLike[str], *, tries: int = 3, backoff: float = 0.5, timeout: float = 60.0
) -> Iterator[io.BufferedReader]:
    """Open a path or URL for reading from its beginning.

    Args:
        url: a path, `file://`, `http(s)://`, `s3://`, `gs://` or another scheme of fsspec, or `pipe:COMMAND`, whose
            standard output is read (a shell runs the command; it is ended, at the latest, when the stream is closed).
        tries: how often a remote URL is tried to open; what is said not to exist is tried once.
        backoff: seconds before the second try; doubled before each further one.
        timeout: seconds without a byte after which an http(s) server or a command counts as dead. Object stores have
            the limits of their own packages.

    Yields:
        A buffered stream. Only local files and object stores can seek.

    Raises:
        SampleError: "unreachable shard": it cannot be opened, or, from the stream's methods, reading failed: a lost
            connection, no answer in time, a command that ends with another status than 0.
        InputError: the scheme is unknown, or the package for it is not installed.
    """
    name = os.fspath(url)
    stream: io.BufferedReader = io.BufferedReader(
        _Source(_open_raw(name, tries, backoff, timeout), name, timeout), READ_AHEAD
    )
    try:
        yield stream
    finally:
        stream.close()


def is_remote(url: str) -> bool:
    """Whether `url` is neither a local path nor `file://`; a `pipe:` is remote."""
    return scheme_of(url) not in ("", "file")


def scheme_of(url: str) -> str:
    """ "pipe", "file", "http", "s3" ...; "" for a path."""
    if url.startswith("pipe:"):
        return "pipe"
    match = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*)://", url)
    return match[1].lower() if match else ""


def local_path(url: str) -> Path:
    """The path that a local URL, or a path, names."""
    return Path(unquote(urlsplit(url).path)) if scheme_of(url) == "file" else Path(url)


def expand_urls(spec: str) -> list[str]:
    """All URLs that a pattern stands for, in order.

    Braces with a range ({000000..000009}, zeros kept) or alternatives ({train,test}) are written out for any URL;
    `*`, `?` and `[...]` match files on the local disk and in object stores, sorted. A path that exists stands for
    itself, whatever its characters.

    Raises:
        InputError: a pattern without a match, or for more than `MOST_URLS`.
    """
    if not is_remote(spec) and local_path(spec).exists():
        return [spec]
    urls = list(itertools.islice(_braces(spec), MOST_URLS + 1))
    if len(urls) > MOST_URLS:
        raise InputError(f"{spec}: stands for more than {MOST_URLS} URLs")
    return list(dict.fromkeys(match for url in urls for match in _matches(url)))


def _braces(spec: str) -> Iterator[str]:
    """`spec` with its first pair of braces that means something written out, and so on."""
    for match in _BRACES.finditer(spec):
        if choices := _choices(match[1]):
            for choice in choices:
                yield from _braces(spec[: match.start()] + choice + spec[match.end() :])
            return
    yield spec


def _choices(inside: str) -> Sequence[str] | Iterator[str]:
    if bounds := _RANGE.fullmatch(inside):
        first, last = int(bounds[1]), int(bounds[2])
        # As a shell has it: {08..10} keeps zeros, {8..10} and {0..10} have none.
        padded = any(len(bound) > 1 and bound[0] == "0" for bound in bounds.groups())
        width = max(map(len, bounds.groups())) if padded else 0
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        return (f"{number:0{width}d}" for number in numbers)
    return inside.split(",") if "," in inside else ()


def _matches(url: str) -> Sequence[str]:
    scheme = scheme_of(url)
    # "?" begins the query of an http URL, and web servers list no files.
    if not glob.has_magic(url) or scheme in ("pipe", "http", "https"):
        return [url]
    if is_remote(url):
        system, path = _file_system(url)
        found = [str(system.unstrip_protocol(match)) for match in sorted(system.glob(path))]
    else:
        found = sorted(glob.glob(str(local_path(url)), recursive=True))  # noqa: PTH207
    if not found:
        raise InputError(f"{url}: no file matches")
    return found


class _Source(io.RawIOBase):
    """The bytes of any stream; whatever its reads raise becomes a `SampleError` that names the URL."""

    def __init__(self, stream: Any, url: str, timeout: float) -> None:
        self._stream, self._url, self._timeout = stream, url, timeout
        self._seekable = scheme_of(url) not in ("pipe", "http", "https") and bool(stream.seekable())

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._stream.readinto(buffer))
        except SampleError:
            raise
        except Exception as error:
            raise _unreachable(self._url, error, self._timeout) from error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return int(self._stream.seek(offset, whence))
        except Exception as error:
            raise _unreachable(self._url, error, self._timeout) from error

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _unreachable(url: str, error: Exception, timeout: float) -> SampleError:
    if isinstance(error, TimeoutError):
        reason = f"no answer for {timeout:g} s"
    elif isinstance(error, FileNotFoundError):
        reason = "not found"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = " ".join(str(error).split()) or type(error).__name__
    return SampleError(UNREACHABLE, f"{url}: {reason}")


def _open_raw(url: str, tries: int, backoff: float, timeout: float) -> Any:
    scheme = scheme_of(url)
    if scheme == "pipe":
        return _Command(url, timeout)
    if not is_remote(url):
        try:
            return local_path(url).open("rb", buffering=0)
        except OSError as error:
            raise _unreachable(url, error, timeout) from error
    if scheme in ("http", "https"):
        return _Download(url, tries, backoff, timeout)
    system, path = _file_system(url)
    return _tried(
        lambda: system.open(path, "rb", block_size=BLOCK, cache_type="readahead"), url, tries, backoff, timeout
    )


def _tried(attempt: Callable[[], Any], url: str, tries: int, backoff: float, timeout: float) -> Any:
    """What `attempt` gives, at the latest by the last of `tries`."""
    for left in reversed(range(tries)):
        try:
            return attempt()
        except Exception as error:
            if left == 0 or _permanent(error):
                raise _unreachable(url, error, timeout) from error
        time.sleep(backoff)
        backoff *= 2
    raise InputError(f"{url}: must be tried at least once")


def _permanent(error: Exception) -> bool:
    """Whether another try is of no use."""
    status = getattr(error, "status", 0)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return refused or isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for `url`, and its path there."""
    import fsspec

    scheme = scheme_of(url)
    try:
        system, path = fsspec.core.url_to_fs(url, **({"get_client": _client} if scheme in ("http", "https") else {}))
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        remedy = f"pip install {package}" if package else " ".join(str(error).split())
        raise InputError(f"{url}: reading {scheme}:// URLs needs a package that is not installed: {remedy}") from None
    except ValueError as error:
        raise InputError(f"{url}: {' '.join(str(error).split())}") from None
    return system, str(path)


async def _client(**options: Any) -> Any:
    import aiohttp

    # By default it has 100 connections; each lane of a loader holds one, and the next would wait for ever.
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), **options)


class _Download(io.RawIOBase):
    """One request for a whole file, as fsspec streams it.

    A reader that is slow, for a validation or a checkpoint, makes servers hang up: then the rest is asked for, where
    the server knows ranges and says which version of the file it sends (ETag or Last-Modified). What it sends in place
    of the rest of that version is not used.
    """

    def __init__(self, url: str, tries: int, backoff: float, timeout: float) -> None:
        self._system, self._path = _file_system(url)
        self._tries, self._backoff, self._timeout = tries, backoff, timeout
        self._position = 0
        self._file = _tried(self._request, url, tries, backoff, timeout)
        self._version = Version.of(self._file.r.headers)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        for left in reversed(range(self._tries)):
            try:
                count = int(self._file.readinto(buffer))
            except Exception:
                if left == 0 or not self._go_on():
                    raise
            else:
                self._position += count
                return count
        return 0

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _request(self, **headers: str) -> Any:
        import aiohttp

        # The limits are for each wait: the default one is for the whole file, which large shards on slow lines pass.
        limits = aiohttp.ClientTimeout(
            total=None, connect=self._timeout, sock_connect=self._timeout, sock_read=self._timeout
        )
        # With any size given, fsspec asks no HEAD before, which presigned URLs refuse; a stream does not use it.
        # Compression on the way would make a rest useless.
        options = {"block_size": 0, "size": 1, "timeout": limits}
        return self._system.open(self._path, "rb", **options, headers={"Accept-Encoding": "identity", **headers})

    def _go_on(self) -> bool:
        """Ask for the rest, of the same file."""
        if not (self._version.tag or self._version.modified):
            return False
        time.sleep(self._backoff)
        headers = {"Range": f"bytes={self._position}-"}
        if condition := self._version.condition:
            headers["If-Range"] = condition
        with contextlib.suppress(Exception):  # the first failure is the one to tell
            rest = self._request(**headers)
            partial = rest.r.status == http.HTTPStatus.PARTIAL_CONTENT
            if partial and self._version.has_rest(rest.r.headers, self._position):
                self._file.close()
                self._file = rest
                return True
            rest.close()
        return False


class _Command(io.RawIOBase):
    """What a shell command prints. Its failure is an error at the end of its output, not an early end."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url, self._timeout = url, timeout
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        # With pipefail, "curl URL | decrypt" fails where curl does.
        shell = ["bash", "-o", "pipefail", "-c"] if shutil.which("bash") else ["sh", "-c"]
        # A group of its own, so that every process of a pipeline can be ended.
        self._process = subprocess.Popen(
            [*shell, url.removeprefix("pipe:")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._output, selectors.EVENT_READ)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._selector.select(self._timeout):
            raise TimeoutError
        count = int(self._output.readinto(buffer) or 0)  # type: ignore[attr-defined]
        if count == 0 and (status := self._status()):
            raise SampleError(UNREACHABLE, f"{self._url}: {status}")
        return count

    def _status(self) -> str:
        """Why the command failed; empty where it did not."""
        try:
            code = self._process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            return f"closed its output but did not end for {self._timeout:g} s"
        if code == 0:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "it printed no reason")
        return f"the command ended with status {code}: {said}"

    def close(self) -> None:
        if not self.closed:
            self._selector.close()
            self._output.close()
            self._end()
            self._errors.close()
        super().close()

    def _end(self) -> None:
        """End the command, kindly first, and take its status, so that no process stays behind."""
        if self._process.poll() is not None:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE)
                return
