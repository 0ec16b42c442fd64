"""Views of an asset: colour, alpha, depth and cameras; in memory and as a folder with a `transforms.json` (FORMAT 13).

A folder holds `transforms.json`, pictures `000.png`, `001.png`, ... and depths `000_depth.npy`, ... (float32, or
`000_depth.exr` as renderers write them), so that views rendered elsewhere are read the same way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.atomic import atomic_path
from tokenizer.cameras import Cameras, cameras_from_transforms, transforms_from_cameras
from tokenizer.errors import InputError, require_package

TRANSFORMS_FILE = "transforms.json"

EMPTY = -1.0
"""Depth where there is nothing."""

MAX_VIEWS, MAX_SIDE = 1000, 8192
_FAR = 1e6
"""Renderers write huge depths where there is nothing."""


@dataclass(frozen=True, slots=True)
class Views:
    """V square views of one asset.

    colours: uint8 [V, H, W, 4], straight alpha, black where alpha is zero.
    depth: float32 [V, H, W], distance along the camera axis, negative where there is nothing.
    cameras: V of them.
    """

    colours: NDArray[np.uint8]
    depth: Tensor
    cameras: Cameras

    def __post_init__(self) -> None:
        shape = self.colours.shape
        if self.colours.dtype != np.uint8 or len(shape) != 4 or shape[3] != 4 or shape[1] != shape[2]:
            raise InputError(f"views must be uint8 [V, H, H, 4], got {self.colours.dtype} {shape}")
        if not len(self.colours) == len(self.depth) == len(self.cameras):
            raise InputError(
                f"{len(self.colours)} pictures, {len(self.depth)} depth maps and {len(self.cameras)} cameras; "
                "each view needs one"
            )

    def __len__(self) -> int:
        """V, the number of views."""
        return len(self.colours)

    @property
    def size(self) -> int:
        """Rows and columns of a view."""
        return int(self.colours.shape[1])

    def composited(self, background: float = 0.0) -> Tensor:
        """The pictures on a flat background: float32 [V, H, W, 3] in 0..1."""
        pixels = torch.from_numpy(self.colours).float() / 255
        alpha = pixels[..., 3:]
        return pixels[..., :3] * alpha + background * (1 - alpha)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write a new folder, whole or not at all.

        Raises:
            InputError: the folder exists.
        """
        from PIL import Image

        if Path(folder).exists():
            raise InputError(f"{folder}: exists already; name a new folder for the views")
        frames = transforms_from_cameras(self.cameras)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for number, frame in enumerate(frames):
                frame["file_path"] = f"{number:03d}.png"
                Image.fromarray(self.colours[number]).save(temporary / f"{number:03d}.png")
                np.save(temporary / f"{number:03d}_depth.npy", self.depth[number].float().numpy())
            text = json.dumps({"frames": frames}, indent=1) + "\n"
            (temporary / TRANSFORMS_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> Views:
        """Read a folder of views.

        Raises:
            InputError: something is missing, unreadable, or of another size than the rest.
        """
        root = Path(folder)
        transforms = _read_transforms(root / TRANSFORMS_FILE)
        cameras = cameras_from_transforms(transforms)
        if len(cameras) > MAX_VIEWS:
            raise InputError(f"{root}: {len(cameras)} views; at most {MAX_VIEWS} are read")
        files = [_picture_file(root, frame, number) for number, frame in enumerate(transforms["frames"])]
        pictures = [_read_picture(file) for file in files]
        depths = [_read_depth(file) for file in files]
        shapes = {picture.shape[:2] for picture in pictures}
        if len(shapes) != 1 or next(iter(shapes))[0] != next(iter(shapes))[1]:
            raise InputError(f"{root}: views must all be square and of one size, got {sorted(shapes)}")
        if len({depth.shape for depth in depths}) != 1:
            raise InputError(f"{root}: depth maps must all have one size")
        return cls(np.stack(pictures), torch.from_numpy(np.stack(depths)), cameras)


def _read_transforms(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; a folder of views needs it")
    try:
        transforms = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({' '.join(str(error).split())})") from None
    frames = transforms.get("frames") if isinstance(transforms, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise InputError(f"{path}: must hold an object with a list 'frames'")
    return dict(transforms)


def _picture_file(root: Path, frame: dict[str, Any], number: int) -> Path:
    # Programs on Windows separate folders with backslashes.
    name = str(frame.get("file_path", f"{number:03d}.png")).replace("\\", "/")
    file, whole = _inside(root, name), _inside(root, f"{name}.png")
    # Many leave the ending out, and a name such as "frame.0001" only seems to have one.
    return whole if not Path(name).suffix or (whole.is_file() and not file.is_file()) else file


def _inside(root: Path, name: str) -> Path:
    file = (root / name).resolve()
    if not file.is_relative_to(root.resolve()):
        raise InputError(f"{root / TRANSFORMS_FILE}: '{name}' lies outside its folder, which is refused")
    return file


def _read_picture(file: Path) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(file) as picture:
            if max(picture.size) > MAX_SIDE:
                raise InputError(f"{file}: {picture.width} x {picture.height} pixels; views have at most {MAX_SIDE}")
            return np.asarray(picture.convert("RGBA"))
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: not a readable picture ({' '.join(str(error).split())})") from None


def _read_depth(picture: Path) -> NDArray[np.float32]:
    array, exr = (picture.with_name(f"{picture.stem}_depth{ending}") for ending in (".npy", ".exr"))
    if array.is_file():
        try:
            depth = np.load(array, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{array}: not a readable array ({' '.join(str(error).split())})") from None
    elif exr.is_file():
        depth = _read_exr(exr)
    else:
        raise InputError(f"{array}: no such file (nor {exr.name}); each view needs its depth")
    if depth.ndim != 2 or depth.dtype.kind != "f":
        raise InputError(f"{array}: depth must be floating [H, W], got {depth.dtype} {depth.shape}")
    # In float64, as no half float is as far; what is not a number is not in this range either.
    far = depth.astype(np.float64)
    return np.where((far >= 0) & (far < _FAR), far, EMPTY).astype(np.float32)


def _read_exr(file: Path) -> NDArray[np.floating[Any]]:
    """The first channel."""
    require_package("OpenEXR", "reading .exr depth maps")
    import OpenEXR

    try:
        with OpenEXR.File(str(file)) as image:
            channel: NDArray[np.floating[Any]] = next(iter(image.channels().values())).pixels
    except Exception as error:  # the library raises its own and standard errors alike
        raise InputError(f"{file}: not a readable .exr ({' '.join(str(error).split())})") from None
    return channel if channel.ndim == 2 else channel[..., 0]
