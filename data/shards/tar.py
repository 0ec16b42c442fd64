"""Files in a tar, as a stream; headers are parsed here, since `tarfile` takes several times as long for each.

Knows what writers of data sets produce: ustar with and without prefix, long names of GNU ("L") and POSIX ("x"), and
sizes in octal or binary. Folders, links and anything else that is no file are passed over. A checksum guards every
header, and a tar must end with a block of zeros, so damage and truncation are told from each other and from the end.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from data.samples import SampleError

TRUNCATED = "truncated shard"
DAMAGED = "damaged shard"

BLOCK = 512
_END = bytes(BLOCK)
_PIECE = 16 * 1024 * 1024
"""Bytes read at once where the length of the stream is unknown: a header may promise more than ever comes."""
_LONGEST_NAME = 1024 * 1024
"""Bytes that the headers of a long name may have."""
_AFTER_END = 1024 * 1024
"""Bytes read behind the end of a tar, to see how a command ends."""


class TarFiles:
    """The files of a tar, in order; each pass over them continues where the stream stands.

        for name, size in files:
            contents = files.read()  # or not: then they are passed over, unread where the stream can seek

    Args:
        stream: at the beginning of the tar.
        url: names the tar in errors.

    Raises (while iterating or reading):
        SampleError: "truncated shard": the stream ends before the tar does; "damaged shard": a header that cannot be
            right, or no tar at all.
    """

    def __init__(self, stream: io.BufferedReader, url: str) -> None:
        self._stream, self._url = stream, url
        self._length = _length(stream)
        self._position = 0
        self._size = 0
        self._unread = 0  # of the current file and what fills its last block

    @property
    def length(self) -> int:
        """Length of the stream where it can seek, else how much of it was read."""
        return self._position if self._length is None else self._length

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Name and size in bytes of each file."""
        name, size = "", -1  # from headers of long names; they hold for the next header only
        while (header := self._next_header()) is not None:
            kind = header[156:157]
            if kind in b"LKxgX":
                extended = self._extended(header)
                if kind == b"L":
                    name = _text(extended)
                elif kind in b"xX":
                    name, size = self._pax(extended, name, size)
                continue
            own_name, own_size = name or _name(header), self._number(header) if size < 0 else size
            name, size = "", -1
            if kind == b"S":
                raise self._damaged(f"'{own_name}' is a sparse file, which is not supported")
            self._expect(0 if kind in b"123456" else own_size)
            if kind in b"0\x007" and not own_name.endswith("/"):
                yield own_name, own_size

    def read(self) -> bytes:
        """Contents of the file that the iteration has come to; once."""
        contents = self._take(self._size)
        self._unread -= self._size
        return contents

    def _next_header(self) -> bytes | None:
        """The next header with a right checksum; None at the end of the tar."""
        if self._unread > BLOCK:
            self._pass_over(self._unread)
            self._unread = 0
        # What fills the last block of a file comes with the header behind it: one call less for each file.
        gap, self._unread = self._unread, 0
        header = self._stream.read(gap + BLOCK)[gap:]
        if len(header) < BLOCK:
            # Zeros that are cut short are the cut end of a whole tar.
            if header and not any(header):
                return None
            raise self._truncated("empty file" if self._position == 0 and not header else "no end of a tar")
        start, self._position = self._position + gap, self._position + gap + BLOCK
        if header == _END:
            if self._length is None:
                self._position += len(self._stream.read(_AFTER_END))
            return None
        if not _is_sound(header):
            raise self._damaged(_not_a_tar(header) if start == 0 else f"damaged header at byte {start}")
        return header

    def _expect(self, size: int) -> None:
        self._size = size
        self._unread = -(-size // BLOCK) * BLOCK

    def _take(self, size: int) -> bytes:
        self._check_length(size)
        piece = size if self._length is not None else min(size, _PIECE)
        data = self._stream.read(piece)
        if len(data) < size:
            pieces, count = [data], len(data)
            while count < size and (data := self._stream.read(min(size - count, _PIECE))):
                pieces.append(data)
                count += len(data)
            data = b"".join(pieces)
        self._position += len(data)
        if len(data) < size:
            raise self._truncated("a file is cut short")
        return data

    def _pass_over(self, size: int) -> None:
        self._check_length(size)
        if self._length is not None:
            self._stream.seek(size, io.SEEK_CUR)
            self._position += size
            return
        while size > 0:
            size -= len(self._take(min(size, _PIECE)))

    def _check_length(self, size: int) -> None:
        if self._length is not None and self._position + size > self._length:
            self._position = self._length
            raise self._truncated("a file is cut short")

    def _extended(self, header: bytes) -> bytes:
        """Contents of a header of long names."""
        size = self._number(header)
        if size > _LONGEST_NAME:
            raise self._damaged(f"a name of {size} bytes")
        self._expect(size)
        return self.read()

    def _pax(self, records: bytes, name: str, size: int) -> tuple[str, int]:
        """Name and size after the records of a POSIX header, "LENGTH KEY=VALUE\\n"."""
        try:
            while records:
                length = int(records[: records.index(b" ")])
                if not 4 < length <= len(records):
                    raise ValueError
                key, _, value = records[records.index(b" ") + 1 : length - 1].partition(b"=")
                records = records[length:]
                if key == b"path":
                    name = _text(value)
                elif key == b"size":
                    size = int(value)
                elif key.startswith(b"GNU.sparse"):
                    raise self._damaged("holds a sparse file, which is not supported")
        except SampleError:
            raise
        except ValueError:
            raise self._damaged("an extended header that is none") from None
        return name, size

    def _number(self, header: bytes) -> int:
        """Size of the file: octal, or binary where that has too few digits."""
        if header[124] & 0x80:
            return int.from_bytes(header[124:136], "big") & ((1 << 95) - 1)
        try:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError:
            size = -1
        if size < 0:
            raise self._damaged(f"a size that is no number, {header[124:136]!r}")
        return size

    def _truncated(self, what: str) -> SampleError:
        return SampleError(TRUNCATED, f"{self._url}: ends after {self._position} bytes: {what}")

    def _damaged(self, what: str) -> SampleError:
        return SampleError(DAMAGED, f"{self._url}: {what}")


def _length(stream: io.BufferedReader) -> int | None:
    if not stream.seekable():
        return None
    length = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    return length


def _is_sound(header: bytes) -> bool:
    """Whether the checksum, the sum of all other bytes and eight spaces, is right."""
    try:
        stored = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    others = header[:148] + b"        " + header[156:]
    total = sum(others)
    # Some old writers added signed bytes.
    return stored == total or stored == total - 256 * sum(byte > 127 for byte in others)


def _not_a_tar(header: bytes) -> str:
    if header.startswith(b"\x1f\x8b"):
        return "compressed with gzip; unpack it, or read it as 'pipe:gzip -dc FILE'"
    return "not a tar"


def _name(header: bytes) -> str:
    name = _text(header[:100])
    # POSIX keeps the folders of long names apart; GNU has other things there.
    if header[345] and header[257:263] == b"ustar\0":
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    # Names that are not UTF-8 keep their bytes.
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
