"""Which files of a folder a command works on, and which are only parts of others."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

from tokenizer.assets.files import FolderFiles, MissingFileError, relative
from tokenizer.assets.load import ASSET_ENDINGS, is_asset
from tokenizer.assets.views import TRANSFORMS_FILE
from tokenizer.errors import InputError

MAX_BYTES = 2**28
"""Of a .gltf or .mtl file; in a larger one no textures are looked for."""

MAX_LINE = 2000
"""Characters of a line of an .mtl file that may name a texture."""

_LIBRARY = re.compile(rb"^[ \t]*mtllib[ \t]+([^\r\n]+)", re.MULTILINE)


def is_asset_input(path: Path) -> bool:
    """Whether a command should take `path` for a 3D asset: by its ending, or as the description of views."""
    return is_asset(path) or path.name == TRANSFORMS_FILE


def find_inputs(folder: Path) -> list[Path]:
    """Pictures, videos and assets below `folder`, sorted. A folder of views is one asset. Left out are pictures that an
    .obj (through its .mtl) or .gltf file names as its textures, what lies beside or below views, and .ply files of
    Gaussians.

    Raises:
        InputError: there is nothing.
    """
    from tokenizer.media import find_media

    if (folder / TRANSFORMS_FILE).is_file():
        return [folder / TRANSFORMS_FILE]
    shown = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    assets = [path for path in shown if is_asset_input(path) and not _holds_gaussians(path)]
    views = {path.parent for path in assets if not is_asset(path)}
    textures = {_key(texture) for path in assets for texture in textures_of(path)}
    try:
        media = find_media(folder)
    except InputError:
        media = []
    found = assets + [path for path in media if _key(path) not in textures and views.isdisjoint(path.parents)]
    if not found:
        raise InputError(f"{folder}: no pictures, videos or 3D assets ({', '.join(ASSET_ENDINGS)}) in it")
    return sorted(found)


def textures_of(asset: Path) -> Iterator[Path]:
    """Files that a mesh may mean by the textures it names; none where it cannot be read, and not all need exist."""
    kind = asset.suffix.lower()
    try:
        names = _named_by_obj(asset) if kind == ".obj" else _named_by_gltf(asset) if kind == ".gltf" else ()
        for name in names:
            try:
                yield asset.parent / relative(name)
            except MissingFileError:  # lies elsewhere, or is no name
                continue
    except (OSError, ValueError, RecursionError):  # whoever loads the mesh says what is wrong with it
        return


def _named_by_obj(asset: Path) -> Iterator[str]:
    files = FolderFiles(asset)
    with asset.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        libraries = {match[1].decode("utf-8", errors="replace") for match in _LIBRARY.finditer(contents)}
    for library in sorted(libraries):
        try:
            text = files.read(library, MAX_BYTES).decode("utf-8", errors="replace")
        except MissingFileError:
            continue
        for line in text.splitlines():
            if len(line) < MAX_LINE and not line.lstrip().startswith("#"):
                yield from _endings(line)


def _endings(line: str) -> Iterable[str]:
    """A line without its first word, its first two, ...: options come before a file name, which may hold spaces."""
    words = line.strip()
    while len(pieces := words.split(maxsplit=1)) == 2:
        words = pieces[1]
        yield words


def _named_by_gltf(asset: Path) -> Iterator[str]:
    if asset.stat().st_size > MAX_BYTES:
        return
    document = json.loads(asset.read_bytes())
    images = document.get("images", []) if isinstance(document, dict) else []
    for image in images if isinstance(images, list) else []:
        uri = image.get("uri") if isinstance(image, dict) else None
        if isinstance(uri, str) and not uri.startswith("data:"):
            yield unquote(uri)


def _key(path: Path) -> str:
    """Files made on Windows and macOS often differ from their references in upper and lower case."""
    return str(path).lower()


def _holds_gaussians(path: Path) -> bool:
    """Whether a file is what `decode` writes, rather than a mesh."""
    if path.suffix.lower() != ".ply":
        return False
    with path.open("rb") as file:
        return b" f_dc_0" in file.read(4096)
