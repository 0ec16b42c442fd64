"""Frames of animated pictures (GIF, WebP, APNG) through Pillow, which composes partial frames as browsers do."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenizer.errors import InputError
from tokenizer.media.containers import FrameIndex, index_frames
from tokenizer.media.images import DECODING_ERRORS, check_file, damaged, open_image, to_rgb

# Other formats with several frames are not animations: pages of a TIFF, the views of a stereo JPEG (MPO).
_ANIMATED_FORMATS = ("GIF", "WEBP", "PNG")

# What browsers show for frames that state no duration.
_DEFAULT_MILLISECONDS = 100.0


def is_animation(path: Path) -> bool:
    """Whether `path` is a GIF, WebP or PNG with more than one frame.

    Raises:
        InputError: no such file, or an empty one.
    """
    check_file(path)
    try:
        image = open_image(path)
    except InputError:
        return False
    with image:
        try:
            if image.format not in _ANIMATED_FORMATS or not getattr(image, "is_animated", False):
                return False
            # Frames are counted only where that matters: a cut GIF has several, however many.
            return not image.info.get("default_image") or len(_frames(image)) > 1
        except DECODING_ERRORS:
            return False


def scan_animation(path: Path) -> FrameIndex:
    """Read when each frame of an animated picture is shown.

    Raises:
        InputError: the file is truncated or damaged.
    """
    with open_image(path) as image:
        durations = []
        try:
            for frame in _frames(image):
                image.seek(frame)
                if image.format == "WEBP":
                    image.load()  # Pillow knows a WebP frame's duration only after decoding it
                durations.append(float(image.info.get("duration") or _DEFAULT_MILLISECONDS))
        except DECODING_ERRORS as error:
            raise damaged(str(path), error) from error
    starts = np.concatenate([[0.0], np.cumsum(durations[:-1])]) / 1000
    # Formats count in milliseconds or hundredths, so 30 frames per second come as steps of 3 and 4 hundredths.
    return index_frames(starts, tick=0.01, declared_rate=None)


def decode_animation(path: Path) -> Generator[NDArray[np.uint8], None, None]:
    """Decode an animated picture frame by frame as uint8 [H, W, 3] RGB, transparent pixels on white.

    Raises:
        InputError: a frame is damaged.
    """
    with open_image(path) as image:
        for frame in _frames(image):
            try:
                image.seek(frame)
            except DECODING_ERRORS as error:
                raise damaged(str(path), error) from error
            yield to_rgb(image, str(path))


def _frames(image: Image.Image) -> range:
    """Numbers of the frames that are shown.

    Pillow counts as frame 0 what a PNG holds for programs that know no animation, where it is no part of it.
    """
    return range(int(bool(image.info.get("default_image"))), getattr(image, "n_frames", 1))
