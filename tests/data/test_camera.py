"""Clips of a virtual camera over photographs: smooth, never past an edge, with cut-outs that move on their own."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data.sources.camera import FRAMES, SIDE, camera_clip


def test_camera_clip_moves_smoothly_and_stays_inside() -> None:
    # A picture that is nowhere black: a view that left it would show black corners.
    ramp = np.linspace(60, 250, 400)
    photograph = Image.fromarray(np.stack([np.broadcast_to(ramp, (300, 400))] * 3, -1).astype(np.uint8))
    moved = []
    for seed in range(12):
        clip = camera_clip(photograph, [], np.random.default_rng(seed))
        assert clip.shape == (FRAMES, SIDE, SIDE, 3)
        assert clip.dtype == np.uint8
        assert clip.min() >= 58
        steps = np.abs(np.diff(clip.astype(float), axis=0)).mean((1, 2, 3))
        moved.append(steps.mean())
        assert steps.max() <= 8  # 6 pixels a frame on a slope of at most 190 / 208 a pixel, and a little zoom
    assert max(moved) > 0.5


def test_still_camera_repeats_its_frame_and_a_cutout_moves_over_it() -> None:
    rng = np.random.default_rng(0)
    photograph = Image.fromarray(rng.integers(0, 256, size=(256, 256, 3), dtype=np.uint8))
    still = camera_clip(photograph, [], np.random.default_rng(3), still=1.0)
    assert np.array_equal(still, np.broadcast_to(still[:1], still.shape))
    disc = Image.new("RGBA", (90, 90), (255, 0, 0, 255))
    layered = camera_clip(photograph, [disc], np.random.default_rng(3), still=1.0)
    covered = (layered != still).any(-1)
    assert covered.any((1, 2)).all()
    assert not np.array_equal(covered[0], covered[-1])
    red = np.array([255, 0, 0])
    assert all((frame == red).all(-1).any() for frame in layered)
