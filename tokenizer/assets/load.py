"""Files of 3D assets -> `Mesh`.

Assets come from strangers, so nothing of a file is believed before it is checked: sizes before memory is taken,
references before they are opened (`tokenizer.assets.files`), and whatever a parser trips over becomes one `InputError`
here, in `load_mesh_from` and `load_mesh`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal

import numpy as np

from tokenizer.assets.files import AssetFiles, FolderFiles, MappedFiles, MissingFileError, shortened
from tokenizer.assets.gltf import read_gltf
from tokenizer.assets.materials import Pictures, Remarks
from tokenizer.assets.mesh import Mesh
from tokenizer.assets.obj import read_obj
from tokenizer.assets.off import read_off
from tokenizer.assets.ply import read_ply
from tokenizer.assets.shapes import Shape, Source, to_mesh
from tokenizer.assets.stl import read_stl
from tokenizer.errors import InputError

Up = Literal["auto", "y", "z"]

MAX_FACES: Final = 5_000_000

_READERS: Final[Mapping[str, Callable[[bytes, Source], Shape]]] = {
    ".glb": read_gltf,
    ".gltf": read_gltf,
    ".obj": read_obj,
    ".ply": read_ply,
    ".stl": read_stl,
    ".off": read_off,
}
_Y_UP: Final = (".glb", ".gltf", ".obj")

ASSET_ENDINGS: Final = tuple(_READERS)
"""Endings of the files that `load_mesh` reads."""

# (x, y, z) -> (x, -z, y): the y axis of the file points up in the world.
_Y_TO_Z: Final = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])


def is_asset(path: str | os.PathLike[str]) -> bool:
    """Whether the ending of `path` is one of `ASSET_ENDINGS`."""
    return Path(path).suffix.lower() in ASSET_ENDINGS


def load_mesh(path: str | os.PathLike[str], *, up: Up = "auto", max_faces: int = MAX_FACES) -> Mesh:
    """Load a 3D asset as one triangle mesh.

    Files that the asset refers to are read from its own folder only. Missing or damaged textures and materials give an
    `AssetWarning` that names them, and a plain colour instead.

    Args:
        path: a file with one of `ASSET_ENDINGS`.
        up: which axis of the file points up. "auto" takes y for glTF and OBJ, z for PLY, STL and OFF.
        max_faces: assets with more triangles are refused.

    Returns:
        The mesh in its own units, z up, not normalised; `to_original` leads back to the axes of the file.

    Raises:
        InputError: not an asset, damaged, too large, nothing to draw in it, or it refers to buffers elsewhere.
    """
    return _load(lambda: FolderFiles(Path(path)), os.fspath(path), up, max_faces)


def load_mesh_from(files: Mapping[str, bytes], name: str, *, up: Up = "auto", max_faces: int = MAX_FACES) -> Mesh:
    """Load a 3D asset from memory, as `load_mesh` does from disk.

    Args:
        files: contents of an archive by name, with forward slashes.
        name: which of them is the asset; the files in its folder are those it may refer to.
        up: as in `load_mesh`.
        max_faces: as in `load_mesh`.
    """
    return _load(lambda: MappedFiles(files, name), name, up, max_faces)


def _load(open_files: Callable[[], AssetFiles], name: str, up: Up, max_faces: int) -> Mesh:
    ending = Path(name).suffix.lower()
    if ending not in _READERS:
        given = f"ending '{ending}'" if ending else "no ending"
        raise InputError(f"{name}: {given}; assets are {', '.join(ASSET_ENDINGS)}")
    if up not in ("auto", "y", "z"):
        raise InputError(f"up is 'auto', 'y' or 'z', not '{up}'")
    remarks = Remarks(name)
    try:
        files = open_files()
        data = files.main()
        if not data:
            raise InputError(f"{name}: is empty (0 bytes)")
        # What overflows or is no number is dropped with its triangle; nobody needs to hear of it twice.
        with np.errstate(all="ignore"):
            shape = _READERS[ending](data, Source(files, Pictures(remarks), remarks, max_faces))
            mesh = to_mesh(shape, name, remarks)
    except MissingFileError as error:
        raise InputError(f"{name}: {error}") from error
    except InputError:
        raise
    # Whatever a parser raises on bytes that it did not expect, the fault lies in the file.
    except Exception as error:
        reason = shortened(" ".join(str(error).split())) or type(error).__name__
        raise InputError(f"{name}: is damaged, or not a {ending} file that can be read ({reason})") from error
    remarks.give()
    turned = up == "y" or (up == "auto" and ending in _Y_UP)
    return mesh.transformed(_Y_TO_Z) if turned else mesh
