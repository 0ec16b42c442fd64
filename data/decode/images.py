"""Pictures in shards -> the pixels that a view shows of them.

Only what the view shows is resized, and large JPEGs are reduced by 2, 4 or 8 while they are decoded, to no less than
twice the resized picture: the antialiased reduction that follows sees all frequencies that it keeps. What a picture may
be (palettes, 16 bits, alpha, EXIF rotation) is as in `tokenizer.media.images`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from data.resolution import Size, View
from data.samples import SampleError
from tokenizer.errors import InputError
from tokenizer.media.images import describe_source, open_image, to_rgb

DAMAGED = "damaged picture"

_FILTER = Image.Resampling.BICUBIC
_DRAFT_MARGIN = 2
_PLAIN_MODES = ("RGB", "L")
"""Of pictures that can be resized before they become RGB."""

_Transpose = Image.Transpose
# EXIF orientation: what brings the stored picture upright, whether that exchanges its axes, and which of the stored
# axes (x, y) run against the upright picture's.
_TURNS: dict[int, tuple[Image.Transpose, bool, tuple[bool, bool]]] = {
    2: (_Transpose.FLIP_LEFT_RIGHT, False, (True, False)),
    3: (_Transpose.ROTATE_180, False, (True, True)),
    4: (_Transpose.FLIP_TOP_BOTTOM, False, (False, True)),
    5: (_Transpose.TRANSPOSE, True, (False, False)),
    6: (_Transpose.ROTATE_270, True, (False, True)),
    7: (_Transpose.TRANSVERSE, True, (True, True)),
    8: (_Transpose.ROTATE_90, True, (True, False)),
}


def read_picture(data: bytes, name: str, view: Callable[[Size], View]) -> NDArray[np.uint8]:
    """Decode, turn upright, resize and cut a picture.

    Args:
        data: the file.
        name: of the sample, for errors.
        view: gives what is to be seen of an upright picture of so many rows and columns; its errors pass through.

    Returns:
        uint8 [H, W, 3], RGB, of the size of the view.

    Raises:
        SampleError: "damaged picture" for anything that cannot be decoded to its end, or is no picture.
    """
    with _decoding(name, data):
        image = open_image(data)
        plain = image.mode in _PLAIN_MODES and not image.has_transparency_data
        if not plain:
            image = Image.fromarray(to_rgb(image, name))
        elif image.format != "JPEG":
            image.load()  # others than JPEG may keep their orientation behind the pixels
        orientation = _orientation(image) if plain else 1
    _, swapped, _ = _TURNS.get(orientation, (None, False, None))
    stored = image.size
    chosen = view(stored if swapped else (stored[1], stored[0]))
    with _decoding(name, data):
        rows, columns = chosen.resized
        if image.format == "JPEG":
            wanted = (rows, columns) if swapped else (columns, rows)
            image.draft(None, (_DRAFT_MARGIN * wanted[0], _DRAFT_MARGIN * wanted[1]))
        image.load()
        return np.array(_cut(image, stored, chosen, orientation).convert("RGB"))


def cut(frame: NDArray[np.uint8], view: View) -> NDArray[np.uint8]:
    """Resize and cut upright pixels: uint8 [H, W, 3] -> uint8 [h, w, 3], of the size of the view."""
    image = Image.fromarray(frame)
    return np.array(_cut(image, image.size, view, 1))


def _cut(image: Image.Image, stored: tuple[int, int], view: View, orientation: int) -> Image.Image:
    """What `view` shows of `image`, which may be a reduction of a stored picture of `stored` columns and rows."""
    turn, swapped, against = _TURNS.get(orientation, (None, False, (False, False)))
    resized, corner, size = ((pair[0], pair[1]) if swapped else (pair[1], pair[0]) for pair in _sides(view))
    # A reduction rounds incomplete pixels up to whole ones: its exact size is that of the stored picture, divided.
    shrunk = round(stored[0] / image.width) or 1
    low, high = [0.0, 0.0], [0.0, 0.0]
    for axis in (0, 1):
        extent = stored[axis] / shrunk
        start, stop = corner[axis], corner[axis] + size[axis]
        if against[axis]:
            start, stop = resized[axis] - stop, resized[axis] - start
        low[axis], high[axis] = start / resized[axis] * extent, min(extent, stop / resized[axis] * extent)
    part = image.resize(size, _FILTER, box=(low[0], low[1], high[0], high[1]))
    return part if turn is None else part.transpose(turn)


def _sides(view: View) -> tuple[Size, Size, Size]:
    return view.resized, view.corner, view.size


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels, which are intact
        return 1


@contextmanager
def _decoding(name: str, data: bytes) -> Iterator[None]:
    """Whatever damaged bytes lead Pillow's decoders to, as one error."""
    try:
        yield
    except InputError as error:
        raise SampleError(DAMAGED, f"{name}: {str(error).removeprefix(f'{describe_source(data)}: ')}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SampleError(DAMAGED, f"{name}: the picture is truncated or damaged ({reason})") from None
