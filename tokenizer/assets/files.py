"""The files an asset may read: those in its own folder, and nothing else.

Assets name other files (materials, pictures, buffers), and assets come from strangers. A reference is read only if it
stays inside the folder of the asset: absolute paths, drive letters, URLs, `..` that lead out and links that point out
are refused before anything is opened, and so is everything that is not a regular file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from tokenizer.errors import InputError
from tokenizer.media.images import check_file

MAX_BYTES: Final = 2**30
"""A file of an asset that is larger is refused before it is read; some kinds have lower limits."""

_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")  # https:, file:, and the C: of Windows
_FOUND = "found among the files of the asset"


class MissingFileError(InputError):
    """A file that an asset names does not exist in its folder, or must not be read."""


class AssetFiles(Protocol):
    """An asset and the files beside it."""

    name: str
    """Of the asset itself, for error messages."""

    def main(self) -> bytes:
        """The asset itself."""

    def read(self, reference: str, max_bytes: int = MAX_BYTES) -> bytes:
        """A file that the asset names; `MissingFileError` if it is not there, lies outside or is larger."""


class FolderFiles:
    """An asset on disk, and its folder."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._root = path.parent.resolve()

    def main(self) -> bytes:
        file = check_file(self._path)
        if not file.is_file():
            raise InputError(f"{file}: is not a regular file")
        try:
            return _contents(file, "it", MAX_BYTES)
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from error

    def read(self, reference: str, max_bytes: int = MAX_BYTES) -> bytes:
        shown = shortened(reference)
        try:
            path = (self._root / relative(reference)).resolve()
            if not path.exists() and path.parent.is_relative_to(self._root) and path.parent.is_dir():
                # Files made on Windows and macOS often differ from their references in upper and lower case.
                alike = (other for other in path.parent.iterdir() if other.name.lower() == path.name.lower())
                path = next(alike, path).resolve()
            if not path.is_relative_to(self._root):
                raise MissingFileError(f"'{shown}' is a link that leads outside the folder of the asset; not opened")
            if not path.is_file():
                raise MissingFileError(f"'{shown}' is not {_FOUND}")
            return _contents(path, f"'{shown}'", max_bytes)
        except (OSError, RuntimeError) as error:  # no permission, a name that is too long, links in a circle
            raise MissingFileError(f"'{shown}' cannot be read") from error


class MappedFiles:
    """An asset among files in memory, as they come out of an archive: names with forward slashes -> contents."""

    def __init__(self, files: Mapping[str, bytes], name: str) -> None:
        if name not in files:
            raise InputError(f"{name}: is not among the {len(files)} files given")
        self.name = name
        self._files = files
        self._folder = PurePosixPath(name).parent
        self._by_lower_case: dict[str, str] | None = None

    def main(self) -> bytes:
        return self._files[self.name]

    def read(self, reference: str, max_bytes: int = MAX_BYTES) -> bytes:
        name = str(self._folder / relative(reference))
        if name not in self._files:
            if self._by_lower_case is None:
                self._by_lower_case = {name.lower(): name for name in self._files}
            name = self._by_lower_case.get(name.lower(), name)
        if name not in self._files:
            raise MissingFileError(f"'{shortened(reference)}' is not {_FOUND}")
        _check_bytes(len(self._files[name]), f"'{shortened(reference)}'", max_bytes)
        return self._files[name]


def _contents(path: Path, shown: str, max_bytes: int) -> bytes:
    _check_bytes(path.stat().st_size, shown, max_bytes)
    return path.read_bytes()


def _check_bytes(count: int, shown: str, max_bytes: int) -> None:
    if count > max_bytes:
        raise MissingFileError(f"{shown} has {count} bytes, more than the {max_bytes} allowed")


def relative(reference: str) -> PurePosixPath:
    """A reference as a path below the folder of the asset.

    Raises:
        MissingFileError: it leads out of the folder, or is no path.
    """
    path = reference.strip().strip('"').replace("\\", "/")
    parts: list[str] = []
    for part in path.split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    if path.startswith("/") or _SCHEME.match(path) or ".." in parts:
        raise MissingFileError(f"'{shortened(reference)}' lies outside the folder of the asset; not opened")
    if not parts or "\0" in path or len(path) > 1000:
        raise MissingFileError(f"'{shortened(reference)}' is not the name of a file")
    return PurePosixPath(*parts)


def shortened(text: str, limit: int = 120) -> str:
    """One line of at most `limit` characters, for messages about what a file says."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: limit + 1]).strip()
    return line if len(text) <= limit else line[:limit] + "..."
