"""Polygons -> triangles: fans where they are convex, ears where they are not (Meisters, 1975)."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.mesh import Floats

# Looking for ears takes time that grows with the square of the corners; beyond this, and beyond this many polygons of
# one call, a fan has to do. Real assets stay far below (a font's letter has some fifty corners).
_MAX_CORNERS: Final = 256
_MAX_STEPS: Final = 100_000


def triangulated(points: Floats) -> NDArray[np.int64]:
    """Cut P polygons of n corners each into triangles of the same sense of rotation.

    Args:
        points: [P, n, 3] corners in order, n at least 3. Polygons should be flat, but need not be.

    Returns:
        [P, n - 2, 3] numbers of corners.
    """
    count, n = points.shape[:2]
    fan = np.stack([np.zeros(n - 2, dtype=np.int64), np.arange(1, n - 1), np.arange(2, n)], axis=1)
    triangles: NDArray[np.int64] = np.repeat(fan[None], count, axis=0)
    if n == 3:
        return triangles
    reflex = _reflex_corners(points)
    if n == 4:
        # The diagonal has to start at the corner that points inwards.
        triangles = (triangles + np.argmax(reflex, axis=1)[:, None, None]) % 4
        return triangles
    steps = 0
    for number in np.flatnonzero(reflex.any(axis=1)):
        if n > _MAX_CORNERS or steps > _MAX_STEPS:
            break
        steps += n
        triangles[number] = _ears(_flattened(points[number]))
    return triangles


def _reflex_corners(points: Floats) -> NDArray[np.bool_]:
    """[P, n] whether the outline turns the other way at a corner than around the polygon as a whole."""
    ahead = np.roll(points, -1, axis=1) - points
    turns = np.cross(np.roll(ahead, 1, axis=1), ahead)
    size = np.linalg.norm(ahead, axis=2)
    # Corners on a straight line turn by rounding noise only.
    noise = 1e-6 * size * np.roll(size, 1, axis=1)
    reflex: NDArray[np.bool_] = np.einsum("pnc,pc->pn", turns, _normals(points)) < -noise
    return reflex


def _normals(points: Floats) -> Floats:
    """[P, 3] unit normals (Newell's method), zero where there is no area."""
    local = points - points[:, :1]
    normals = np.cross(local, np.roll(local, -1, axis=1)).sum(axis=1)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    unit: Floats = normals / np.where(length > 0, length, 1)
    return unit


def _flattened(points: Floats) -> Floats:
    """[n, 2] a polygon seen along its normal, counter-clockwise."""
    normal = _normals(points[None])[0]
    across = np.cross(normal, np.eye(3)[np.argmin(np.abs(normal))])
    across /= max(float(np.linalg.norm(across)), np.finfo(np.float64).tiny)
    return np.stack([points @ across, points @ np.cross(normal, across)], axis=1)


def _ears(points: Floats) -> NDArray[np.int64]:
    """[n - 2, 3] triangles of one simple polygon [n, 2]: cut off corners whose triangle holds no other corner."""
    left = list(range(len(points)))
    triangles = []
    while len(left) > 3:
        ring = np.array(left)
        before, after = points[np.roll(ring, 1)], points[np.roll(ring, -1)]
        convex = np.flatnonzero(_area(before, points[ring], after) > 0)
        place = next((i for i in convex if _is_ear(points, left, int(i))), 0)
        triangles.append((left[place - 1], left[place], left[(place + 1) % len(left)]))
        del left[place]
    triangles.append((left[0], left[1], left[2]))
    return np.array(triangles, dtype=np.int64)


def _is_ear(points: Floats, left: list[int], place: int) -> bool:
    a, b, c = left[place - 1], left[place], left[(place + 1) % len(left)]
    others = points[[i for i in left if i not in (a, b, c)]]
    corners = points[[a, b, c]]
    # Outlines with holes touch themselves: a corner at the same place as one of the triangle's does not block it.
    others = others[(others[:, None] != corners[None]).any(axis=2).all(axis=1)]
    inside = np.ones(len(others), dtype=bool)
    for start, end in ((0, 1), (1, 2), (2, 0)):
        inside &= _area(corners[start], corners[end], others) >= 0
    return not bool(inside.any())


def _area(a: Floats, b: Floats, c: Floats) -> Floats:
    """Twice the signed area of triangles in the plane."""
    area: Floats = (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])
    return area
