"""Video made from photographs: a smooth virtual camera, and cut-outs that move on their own.

Openly licensed video is scarce in packages, photographs are less so. A pan, zoom and rotation over a photograph gives
clips whose motion is exact at subpixel precision, with the disocclusions of a second layer where a cut-out moves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FRAMES = 16
SIDE = 192
MAX_SPEED = 6.0
LAYERED = 0.4
"""Share of clips that should have one or two cut-outs in front."""
_MIN_SHORT = 208
# Frames are drawn at twice their size and reduced, so edges are as sharp and free of aliasing as in a downscaled film.
_SUPERSAMPLE = 2


@dataclass(frozen=True)
class _Path:
    """A motion over `FRAMES` frames: shift [T, 2] in output pixels (x, y), zoom [T] and angle [T] in radians."""

    shift: NDArray[np.float64]
    zoom: NDArray[np.float64]
    angle: NDArray[np.float64]


def _draw_path(rng: np.random.Generator, still: float, max_speed: float) -> _Path:
    """A smooth random motion, centred on the middle frame; with probability `still` nothing moves at all."""
    time = np.arange(FRAMES) - (FRAMES - 1) / 2
    if rng.random() < still:
        return _Path(np.zeros((FRAMES, 2)), np.ones(FRAMES), np.zeros(FRAMES))
    # Squaring favours slow motion, as in real footage, while the range still reaches `max_speed`.
    speed, heading = max_speed * rng.random() ** 2, rng.uniform(0, 2 * math.pi)
    velocity = speed * np.array([math.cos(heading), math.sin(heading)])
    shift = time[:, None] * velocity
    # A slow sway makes the velocity change within the clip, as a hand-held camera's does.
    sway = rng.uniform(0, 1.5, size=2) * (rng.random() < 0.5)
    phase = rng.uniform(0, 2 * math.pi, size=2)
    shift = shift + sway * np.sin(2 * math.pi * time[:, None] / rng.uniform(12, 40) + phase)
    zoom_rate = rng.normal(0, 0.005) * float(rng.random() < 0.5)
    turn_rate = rng.normal(0, 0.004) * float(rng.random() < 0.4)
    return _Path(shift, np.exp(time * zoom_rate), np.asarray(time * turn_rate, dtype=np.float64))


def _affine(centre: NDArray[np.float64], scale: float, angle: float, out: float) -> tuple[float, ...]:
    """Coefficients for `Image.transform`: output pixel -> source pixel, with the output's middle at `centre`."""
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    middle = out / 2
    return (
        cos, -sin, float(centre[0]) - cos * middle + sin * middle,
        sin, cos, float(centre[1]) - sin * middle - cos * middle,
    )  # fmt: skip


def _reach(path: _Path) -> NDArray[np.float64]:
    """Corners [T, 4, 2] of the view relative to its starting centre, in output pixels."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (SIDE / 2 + 1)
    cos, sin = np.cos(path.angle), np.sin(path.angle)
    rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2) / path.zoom[:, None, None]
    reach: NDArray[np.float64] = path.shift[:, None] + np.einsum("tij,cj->tci", rotation, corners)
    return reach


def _fit(path: _Path, width: float, height: float) -> _Path:
    """Shrink the motion until the view never leaves a picture of `width` x `height` output pixels."""
    while True:
        reach = _reach(path).reshape(-1, 2)
        if np.all(reach.max(0) - reach.min(0) <= (width, height)):
            return path
        path = _Path(path.shift * 0.8, path.zoom**0.8, path.angle * 0.8)


def _photograph_frames(photograph: Image.Image, rng: np.random.Generator, still: float) -> list[Image.Image]:
    """Frames at the supersampled size: a camera moving over `photograph`."""
    short = min(photograph.size)
    view_short = float(np.exp(rng.uniform(math.log(_MIN_SHORT), math.log(min(640, short)))))
    path = _fit(_draw_path(rng, still, MAX_SPEED), *(view_short * side / short for side in photograph.size))
    # The source is reduced (antialiased) to the supersampled density, never enlarged.
    density = min(_SUPERSAMPLE * view_short, short) / short
    source = photograph.resize([round(side * density) for side in photograph.size], Image.Resampling.LANCZOS)
    per_pixel = min(source.size) / view_short  # source pixels per output pixel
    reach = _reach(path).reshape(-1, 2)
    room = np.array(source.size) / per_pixel
    centre = rng.uniform(-reach.min(0), np.maximum(room - reach.max(0), -reach.min(0)))
    frames = []
    for shift, zoom, angle in zip(path.shift, path.zoom, path.angle, strict=True):
        size = SIDE * _SUPERSAMPLE
        matrix = _affine((centre + shift) * per_pixel, per_pixel / _SUPERSAMPLE / float(zoom), float(angle), size)
        frames.append(source.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC))
    return frames


def _overlay(frames: list[Image.Image], cutout: Image.Image, rng: np.random.Generator) -> list[Image.Image]:
    """Let an RGBA cut-out move over the frames with a motion of its own."""
    size = SIDE * _SUPERSAMPLE
    length = rng.uniform(40, 130) * _SUPERSAMPLE
    scale = min(length / max(cutout.size), 1.0)
    cutout = cutout.resize([max(1, round(side * scale)) for side in cutout.size], Image.Resampling.LANCZOS)
    enlarge = length / max(cutout.size)  # above 1 only for cut-outs smaller than asked for
    path = _draw_path(rng, 0.1, MAX_SPEED)
    position = rng.uniform(0.2 * size, 0.8 * size, size=2)
    result = []
    for frame, shift, zoom, angle in zip(frames, path.shift, path.zoom, path.angle, strict=True):
        unit = 1 / (enlarge * float(zoom))  # cut-out pixels per frame pixel
        # The cut-out's middle lands on `place`: move the output's middle to it in the cut-out's own (rotated) frame.
        offset = size / 2 - (position + shift * _SUPERSAMPLE)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        centre = np.array(cutout.size) / 2 + unit * (turn @ offset)
        matrix = _affine(centre, unit, float(angle), size)
        layer = cutout.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        result.append(Image.alpha_composite(frame.convert("RGBA"), layer).convert("RGB"))
    return result


def camera_clip(
    photograph: Image.Image, cutouts: Sequence[Image.Image], rng: np.random.Generator, *, still: float = 0.15
) -> NDArray[np.uint8]:
    """Draw one clip of a camera moving over a photograph, with cut-outs moving independently in front.

    Args:
        photograph: RGB, short side at least 208 (the view and a margin for rotation).
        cutouts: RGBA pictures, drawn in this order; may be empty.
        rng: decides speed (0 to about 6 pixels a frame), direction, sway, zoom, rotation and scale.
        still: probability that the camera does not move.

    Returns:
        uint8 [16, 192, 192, 3].
    """
    assert photograph.mode == "RGB", photograph.mode
    assert min(photograph.size) >= _MIN_SHORT, photograph.size
    frames = _photograph_frames(photograph, rng, still)
    for cutout in cutouts:
        frames = _overlay(frames, cutout, rng)
    return np.stack([np.asarray(frame.resize((SIDE, SIDE), Image.Resampling.BOX)) for frame in frames])
