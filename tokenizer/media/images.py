"""Pictures in files <-> uint8 arrays [H, W, 3].

What a file may hold is wide (palettes, 16 bits, CMYK, alpha, EXIF rotation, several frames); what comes out is always
8-bit RGB, upright, on white. Colour profiles are not applied: the numbers in the file are taken as sRGB.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError

MAX_PIXELS: Final = 200_000_000
"""A picture or video frame of this many pixels or more is refused before it is decoded."""

IMAGE_ENDINGS: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".tga")
"""Endings by which a folder's pictures are found. Any file that Pillow can identify can be loaded by name."""

SAVED_IMAGE_ENDINGS: Final = (".png", ".jpg", ".jpeg", ".webp")

LARGEST_SIDES: Final = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383}
"""Pixels a side that a format holds, where it is fewer than pictures may have."""

ImageSource = str | os.PathLike[str] | bytes | Image.Image

# What Pillow's decoders raise on damaged data, besides its own UnidentifiedImageError (an OSError). A bomb is told from
# the header of a frame, which may be larger than that of its file.
DECODING_ERRORS: Final = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error),
    Image.DecompressionBombError,
)

# Pillow's own limit on pixels is a global that `Image.open` reads; it is lifted for the moment of opening only.
_pillow_limit = threading.Lock()


def load_image(source: ImageSource, *, frame: int | None = None, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Load one picture.

    Args:
        source: path, encoded bytes or PIL image.
        frame: which frame of an animated picture; without it the first one, or of a PIL image the current one.
        max_pixels: pictures with this many pixels or more are refused from the header, before decoding.

    Returns:
        uint8 [H, W, 3], RGB in 0..255. EXIF rotation is applied, transparent pixels are composited on white, 16-bit
        values are scaled to 8 bits (65535 -> 255), grey, palette and CMYK pictures are converted.

    Raises:
        InputError: not a picture, empty, truncated or damaged, too large, no such frame, or pixels whose range is not
            known (32-bit integers and floats).
    """
    name = describe_source(source)
    image = source if isinstance(source, Image.Image) else open_image(source, max_pixels=max_pixels)
    _check_size(image, name, max_pixels)
    try:
        if frame is not None:
            image.seek(frame)
    except EOFError as error:
        raise InputError(f"{name}: has no frame {frame}; it holds {getattr(image, 'n_frames', 1)}") from error
    except DECODING_ERRORS as error:
        raise damaged(name, error) from error
    return to_rgb(image, name)


def open_image(source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture and read its header only.

    Raises:
        InputError: no such file, empty, not a picture, or at least `max_pixels` pixels.
    """
    name = describe_source(source)
    if not isinstance(source, bytes):
        check_file(source)
    elif not source:
        raise InputError(f"{name}: is empty")
    with _pillow_limit:
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        except DECODING_ERRORS as error:
            raise InputError(f"{name}: is not a picture that can be read, or its header is damaged") from error
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit
    _check_size(image, name, max_pixels)
    return image


def to_rgb(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Decode an opened PIL image at its current frame to uint8 [H, W, 3]; `name` is used in errors."""
    try:
        image.load()
    except DECODING_ERRORS as error:
        raise damaged(name, error) from error
    # Pillow opens PGM files of 9 to 16 bits as 32-bit integers, brought to 0..65535 whatever their range.
    grey16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    image = _upright(image)
    if grey16:
        return _grey16_to_rgb(image)
    if image.mode in ("I", "F"):
        raise InputError(f"{name}: has 32-bit pixels (mode {image.mode}) of unknown range; save it with 8 or 16 bits")
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
        return np.array(image.convert("RGB"))
    except ValueError as error:
        raise InputError(f"{name}: pixels of mode {image.mode} cannot be converted to RGB; save it as RGB") from error


def save_image(image: NDArray[np.uint8], path: str | os.PathLike[str], *, quality: int = 95) -> None:
    """Write a picture whole or not at all, in the format of the ending of `path`.

    Args:
        image: uint8 [H, W, 3], RGB.
        path: ends in .png (lossless), .jpg, .jpeg or .webp (both lossy).
        quality: 1..100 of the lossy formats.

    Raises:
        InputError: unknown ending, not a uint8 array [H, W, 3], or more pixels a side than the format holds.
        OSError: the file cannot be written (no room, no permission).
    """
    target = Path(path)
    check_image_ending(target)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(f"{target}: a picture to write is uint8 [H, W, 3], this is {image.dtype} {list(image.shape)}")
    check_sides(target, image.shape[0], image.shape[1], LARGEST_SIDES, ".png")
    # Full chroma: the default halves the colour resolution, which shows at the tokenizer's patch borders.
    options: dict[str, Any] = {"quality": quality, "subsampling": 0} if target.suffix.lower() != ".png" else {}
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(
        encoded, Image.registered_extensions()[target.suffix.lower()], **options
    )
    # Through memory: Pillow's own writing takes a short write, the last one on a full disk, for success.
    with atomic_path(target) as temporary:
        temporary.write_bytes(encoded.getbuffer())


def check_image_ending(path: Path) -> None:
    """Raise `InputError` that lists the known endings unless a picture can be written to `path`."""
    if path.suffix.lower() not in SAVED_IMAGE_ENDINGS:
        given = f"ending '{path.suffix}'" if path.suffix else "no ending"
        raise InputError(f"{path}: {given}; pictures are written as {', '.join(SAVED_IMAGE_ENDINGS)}")


def check_sides(path: Path, height: int, width: int, largest: Mapping[str, int], instead: str) -> None:
    """Raise `InputError`, which recommends `instead`, unless the format of `path` holds pictures of this size."""
    limit = largest.get(path.suffix.lower())
    if limit is not None and max(height, width) > limit:
        raise InputError(
            f"{path}: {width}x{height} is more than the {limit} pixels a side that {path.suffix} holds; write {instead}"
        )


def check_file(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a Path, or raise `InputError` if it is missing, a folder or empty."""
    file = Path(path)
    if not file.exists():
        raise InputError(f"{file}: no such file")
    if file.is_dir():
        raise InputError(f"{file}: is a folder, not a file")
    if file.is_file() and file.stat().st_size == 0:
        raise InputError(f"{file}: is empty (0 bytes)")
    return file


def describe_source(source: ImageSource) -> str:
    """A short name for error messages."""
    if isinstance(source, bytes):
        return f"picture of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", "") or f"PIL image {source.width}x{source.height}")
    return os.fspath(source)


def damaged(name: str, error: Exception) -> InputError:
    """The error for data that starts well and cannot be decoded to its end."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{name}: is truncated or damaged ({reason})")


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    if image.width * image.height >= max_pixels:
        raise InputError(
            f"{name}: {image.width}x{image.height} is {image.width * image.height / 1e6:.0f} megapixels; "
            f"pictures must stay below {max_pixels / 1e6:g}: resize it first"
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except DECODING_ERRORS:
        # A damaged EXIF block says nothing about the pixels, which are intact: keep them as they are stored.
        return image


def _grey16_to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)  # 257 = 65535 / 255, rounded to nearest
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)
