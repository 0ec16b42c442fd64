"""Which frames of a clip are seen (PAPER 3). Pure functions: chance comes in as numbers in [0, 1).

    reconstruction    16 to 32 frames, whole patches, every 1st to 3rd (small motion: consistency) or every 4th to 12th
                      (large motion: diversity) frame of the source; both regimes equally often
    understanding     1 frame per second, at most 64

Too few frames for what was drawn: the stride shrinks to the largest that fits; at stride 1 the length does, to whole
patches. What is shorter than a patch, or fills the last one only in part, gets its last frame again, as padding does in
`tokenizer.patches`. The paper says nothing about short clips, nor how often each regime is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Range = tuple[int, int]
"""Smallest and largest, both included."""

FRAMES: Range = (16, 32)
STRIDES: tuple[Range, ...] = ((1, 3), (4, 12))
MAX_FRAMES = 64
FPS = 1.0

DRAWS = 4
"""How many numbers `reconstruction_frames` takes."""

_ROUNDING = 1e-6
"""Time stamps are multiples of ticks that are no binary fractions: a clip of 5 s may measure 5.0000001."""


def reconstruction_frames(
    count: int,
    drawn: Sequence[float] | None = None,
    *,
    frames: Range = FRAMES,
    strides: Sequence[Range] = STRIDES,
    multiple: int = 4,
) -> list[int]:
    """A run of evenly spaced frames.

    Args:
        count: frames of the clip, at least 1.
        drawn: `DRAWS` numbers, for regime, stride, length and start. None, for evaluation: the longest run at the
            smallest stride, from the start of the clip.
        frames: shortest and longest run, multiples of `multiple`.
        strides: in frames of the source, a range for each regime.
        multiple: frames of a patch; the length is a multiple of it.

    Returns:
        Indices in 0..count - 1, ascending, equal ones only where the clip is shorter than a patch.
    """
    if count < multiple:
        return [*range(count), *[count - 1] * (multiple - count)]
    length, stride, begin = frames[1], min(low for low, _ in strides), 0.0
    if drawn is not None:
        regime, pace, size, begin = drawn
        low, high = strides[int(regime * len(strides))]
        stride = low + int(pace * (high - low + 1))
        length = frames[0] + int(size * ((frames[1] - frames[0]) // multiple + 1)) * multiple
    length = min(length, count // multiple * multiple)
    stride = max(1, min(stride, (count - 1) // max(1, length - 1)))
    start = int(begin * (count - (length - 1) * stride))
    return [start + stride * number for number in range(length)]


def understanding_frames(
    times: NDArray[np.float64],
    phase: float = 0.5,
    *,
    fps: float = FPS,
    max_frames: int = MAX_FRAMES,
    multiple: int = 4,
) -> list[int]:
    """Frames at even times, whatever the frame rate and however it varies.

    Args:
        times: when each frame of the clip is shown, [T], seconds, ascending.
        phase: where in its interval each moment lies, in [0, 1); the middle for evaluation.
        fps: moments per second.
        max_frames: a multiple of `multiple`; a clip with more moments is seen at this many, spread evenly.
        multiple: frames of a patch; the last frame is repeated until the number is a multiple of it.

    Returns:
        Indices in 0..T - 1, ascending, with repetitions where frames are shown for longer than an interval.
    """
    shown = times - times[0]
    duration = float(shown[-1]) + (float(np.median(np.diff(shown))) if len(shown) > 1 else 1 / fps)
    moments = max(1, math.ceil(duration * fps - phase - _ROUNDING))
    interval = 1 / fps
    if moments > max_frames:
        moments, interval = max_frames, duration / max_frames
    seconds = (np.arange(moments) + phase) * interval
    found = np.searchsorted(shown, seconds + _ROUNDING, side="right") - 1
    indices: list[int] = found.clip(0, len(shown) - 1).tolist()
    return indices + indices[-1:] * (-moments % multiple)
