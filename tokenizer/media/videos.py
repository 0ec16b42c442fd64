"""Videos in files -> blocks of uint8 frames [T, H, W, 3], in memory that does not grow with the length."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenizer.errors import InputError
from tokenizer.media.animations import decode_animation, is_animation, scan_animation
from tokenizer.media.containers import decode, scan
from tokenizer.media.images import MAX_PIXELS, check_file

VIDEO_ENDINGS: Final = (".mp4", ".webm", ".mkv", ".mov", ".m4v", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv")
"""Endings by which a folder's videos are found. Any file that FFmpeg can open can be read by name; so can GIF, WebP
and PNG files, animated or with one frame."""


class VideoReader:
    """A video file as blocks of frames.

    All frames are kept, also where the frame rate varies; `fps` is then the average. Turns and mirror
    images stored in the file are applied. Transparent pixels are on white. Audio is ignored. Every iteration opens the
    file anew and decodes from its start.

    Args:
        path: a file that FFmpeg opens, or an animated GIF, WebP or PNG.
        max_pixels: frames with this many pixels or more are refused.

    Raises:
        InputError: missing, empty, not a video, without frames, truncated, or frames too large.

    Attributes:
        num_frames: how many frames the file lists.
        fps: average frames per second.
        variable_frame_rate: whether the time between frames varies by more than rounding.
        timestamps: float64 [num_frames], seconds from the first frame, ascending.
        height, width: of the upright frames, in pixels.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> None:
        self.path: Path = check_file(path)
        self._animated = is_animation(self.path)
        index = scan_animation(self.path) if self._animated else scan(self.path)
        self.timestamps: NDArray[np.float64] = index.timestamps
        self.num_frames: int = len(index.timestamps)
        self.fps: Fraction = index.fps
        self.variable_frame_rate: bool = index.variable
        self.height, self.width = self._frame_size()
        if self.height * self.width >= max_pixels:
            raise InputError(
                f"{self.path}: frames of {self.width}x{self.height} are {self.height * self.width / 1e6:.0f} "
                f"megapixels; they must stay below {max_pixels / 1e6:g}: scale the video first"
            )

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Decode frame by frame: uint8 [H, W, 3], RGB.

        Raises:
            InputError: a frame is damaged, or its size differs from the first one's.
        """
        decoded = decode_animation(self.path) if self._animated else decode(self.path)
        for number, frame in enumerate(decoded):
            if frame.shape[:2] != (self.height, self.width):
                raise InputError(
                    f"{self.path}: frame {number} is {frame.shape[1]}x{frame.shape[0]} and the first one "
                    f"{self.width}x{self.height}; scale the video to one size"
                )
            yield frame

    def blocks(self, length: int = 16) -> Iterator[NDArray[np.uint8]]:
        """Decode in blocks of `length` frames, the last one shorter: uint8 [T, H, W, 3], RGB."""
        if length < 1:
            raise InputError(f"blocks of {length} frames; a block needs at least 1")
        block: list[NDArray[np.uint8]] = []
        for frame in self.frames():
            block.append(frame)
            if len(block) == length:
                yield np.stack(block)
                block = []
        if block:
            yield np.stack(block)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return self.blocks()

    def read(self) -> NDArray[np.uint8]:
        """Decode everything at once: uint8 [T, H, W, 3]. For clips that fit in memory."""
        return np.stack(list(self.frames()))

    def _frame_size(self) -> tuple[int, int]:
        # Decoded and not read from the header, because only the frame tells its rotation, and proves that one exists.
        with closing(decode_animation(self.path) if self._animated else decode(self.path)) as decoded:
            for frame in decoded:
                return frame.shape[0], frame.shape[1]
        raise InputError(f"{self.path}: is a video with no frames that can be decoded")
