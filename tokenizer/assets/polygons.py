"""Polygons -> triangles: fans or halves where they are convex, ears where they are not (Meisters, 1975)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenizer.assets.mesh import Floats

_CORNERS_AT_ONCE: Final = 2**17
_COMPARED_AT_ONCE: Final = 2**18
_LARGEST_FAN: Final = 1000
_COMPARISONS_OF_A_CALL: Final = 200  # take as long as numpy's calls around a few of them


class Budget:
    """Comparisons that the search for ears may take; they can grow with the cube of the corners.

    The default lasts a few seconds, real assets need a small part of it. Afterwards `_fan` has to do.
    """

    def __init__(self, comparisons: int = 50_000_000) -> None:
        self._left = comparisons

    def allows(self, comparisons: int) -> bool:
        """Take so many, if they are left."""
        self._left -= comparisons
        return self._left >= 0


@dataclass(frozen=True, slots=True)
class Polygons:
    """P polygons of n corners each.

    vertices: [P, n] rows of the vertices of the file. numbers: [P] which polygons of the file they are.
    corners: [P, n, ...] something that belongs to each corner, or None.
    """

    vertices: NDArray[np.int64]
    numbers: NDArray[np.int64]
    corners: NDArray[Any] | None = None


@dataclass(frozen=True, slots=True)
class Triangles:
    """faces: [F, 3]. polygons: [F] which polygon of the file a triangle is part of, ascending. corners: [F, 3, ...]."""

    faces: NDArray[np.int64]
    polygons: NDArray[np.int64]
    corners: NDArray[Any] | None


def cut_polygons(groups: Sequence[Polygons], positions: Floats) -> Triangles:
    """All polygons of a file as triangles, in the order of the file; those with fewer than three corners vanish.

    Args:
        groups: in any order; `corners` in all or in none.
        positions: [V, 3] the vertices.

    Raises:
        ValueError: a polygon refers to a vertex that does not exist.
    """
    budget = Budget()
    faces, polygons, corners = [np.empty((0, 3), np.int64)], [np.empty(0, np.int64)], []
    for count in sorted({group.vertices.shape[1] for group in groups} - {0, 1, 2}):
        same = [group for group in groups if group.vertices.shape[1] == count]
        vertices = np.concatenate([group.vertices for group in same])
        numbers = np.concatenate([group.numbers for group in same])
        wrong = ((vertices < 0) | (vertices >= len(positions))).any(axis=1)
        if wrong.any():
            raise ValueError(f"face {int(numbers[wrong].min()) + 1} refers to a vertex that does not exist")
        cut = triangulated(positions[vertices], budget)
        which = np.arange(len(cut))[:, None, None]
        faces.append(vertices[which, cut].reshape(-1, 3))
        polygons.append(np.repeat(numbers, count - 2))
        attached = [group.corners for group in same if group.corners is not None]
        if attached:
            table = np.concatenate(attached)
            corners.append(table[which, cut].reshape(-1, 3, *table.shape[2:]))
    order = np.argsort(np.concatenate(polygons), kind="stable")
    return Triangles(
        np.concatenate(faces)[order],
        np.concatenate(polygons)[order],
        np.concatenate(corners)[order] if corners else None,
    )


def triangulated(points: Floats, budget: Budget) -> NDArray[np.int64]:
    """Cut P polygons of n corners each into triangles of the same sense of rotation.

    Args:
        points: [P, n, 3] corners in order, n at least 3. Polygons should be flat, but need not be.
        budget: for those that are not convex.

    Returns:
        [P, n - 2, 3] numbers of corners.
    """
    count, n = points.shape[:2]
    triangles: NDArray[np.int64] = np.repeat(_fan(n)[None], count, axis=0)
    if n == 3:
        return triangles
    reflex = _reflex_corners(points)
    if n == 4:
        # The diagonal has to start at the corner that points inwards.
        triangles = (triangles + np.argmax(reflex, axis=1)[:, None, None]) % 4
        return triangles
    concave = np.flatnonzero(reflex.any(axis=1))
    if n > _LARGEST_FAN:
        for one in concave:
            triangles[one] = _ears_nearby(_flattened(points[one : one + 1])[0], budget)
        return triangles
    for some in np.array_split(concave, len(concave) * n // _CORNERS_AT_ONCE + 1):
        if len(some):
            triangles[some] = _ears(_flattened(points[some]), budget)
    return triangles


def _fan(n: int) -> NDArray[np.int64]:
    """[n - 2, 3] numbers of corners.

    The triangles of a fan all meet in one corner: thousands of them are long slivers side by side, of which a ray would
    have to look at every one. Large polygons are halved instead, and their halves, and so on.
    """
    if n <= _LARGEST_FAN:
        return np.stack([np.zeros(n - 2, dtype=np.int64), np.arange(1, n - 1), np.arange(2, n)], axis=1)
    parts: list[NDArray[np.int64]] = []
    first, last = np.array([0]), np.array([n - 1])
    while len(first):
        middle = (first + last) // 2
        parts.append(np.stack([first, middle, last], axis=1))
        first, last = np.concatenate([first, middle]), np.concatenate([middle, last])
        first, last = first[last - first > 1], last[last - first > 1]
    return np.concatenate(parts)


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
    """[P, n, 2] polygons seen along their normals, counter-clockwise."""
    normals = _normals(points)
    across = np.cross(normals, np.eye(3)[np.argmin(np.abs(normals), axis=1)])
    across /= np.maximum(np.linalg.norm(across, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    axes = np.stack([across, np.cross(normals, across)], axis=2)
    flat: Floats = (points - points[:, :1]) @ axes
    return flat


def _ears(points: Floats, budget: Budget) -> NDArray[np.int64]:
    """[P, n - 2, 3] triangles of simple polygons [P, n, 2]: cut off corners whose triangle holds no other corner."""
    count, n = points.shape[:2]
    which = np.arange(count)
    left = np.tile(np.arange(n), (count, 1))  # [P, m] the corners that are left, m falls from n to 3
    ears = np.zeros((count, n), dtype=bool)  # [P, m] those of them that are known to be ears; a cut may free others
    triangles = np.empty((count, n - 2, 3), dtype=np.int64)
    for cut in range(n - 3):
        m = n - cut
        stuck = ~ears.any(axis=1)
        if not budget.allows(int(stuck.sum()) * m**2 + 2 * count * m):
            triangles[:, cut:] = left[:, _fan(m)]
            return triangles
        if stuck.any():
            ears[stuck] = _all_ears(points[which[stuck, None], left[stuck]])
        place = np.argmax(ears, axis=1)
        ends = np.stack([place - 1, place, place + 1], axis=1) % m
        triangles[:, cut] = left[which[:, None], ends]
        kept = np.arange(m) != place[:, None]
        left, ears = (table[kept].reshape(count, m - 1) for table in (left, ears))
        # The cut changes the triangles of its two neighbours only.
        ring = points[which[:, None], left]
        for neighbour in ((place - 1) % (m - 1), place % (m - 1)):
            ears[which, neighbour] = _are_ears(ring, neighbour[:, None])[:, 0]
    triangles[:, -1] = left
    return triangles


def _ears_nearby(points: Floats, budget: Budget) -> NDArray[np.int64]:
    """[n - 2, 3] triangles of one large simple polygon [n, 2].

    As in `_ears`, but corners wait in a queue, so that triangles grow in all places alike, and each is compared with
    the corners alone that lie between the left and the right end of its triangle.
    """
    n = left = len(points)
    before, after = [n - 1, *range(n - 1)], [*range(1, n), 0]
    present = np.ones(n, dtype=bool)
    order = np.argsort(points[:, 0])
    across = points[order, 0]
    triangles = np.empty((n - 2, 3), dtype=np.int64)
    waiting = deque((corner, 0) for corner in range(n))
    turn = [0] * n  # of each corner; where another one waits in the queue, a later one stands for it
    since = n  # how many were left when all were put into the queue
    while left > 3:
        if not waiting:
            if left == since:
                break
            # A cut changes the triangles of its two neighbours, but may free others too.
            since = left
            waiting.extend((corner, turn[corner]) for corner in np.flatnonzero(present).tolist())
        corner, number = waiting.popleft()
        if number != turn[corner]:
            continue
        ends = [before[corner], corner, after[corner]]
        triangle = points[ends]
        first = int(np.searchsorted(across, triangle[:, 0].min()))
        last = int(np.searchsorted(across, triangle[:, 0].max(), side="right"))
        if not budget.allows(_COMPARISONS_OF_A_CALL + last - first):
            break
        others = order[first:last]
        if not _is_ear(triangle, points[others[present[others]]]):
            continue
        triangles[n - left] = ends
        present[corner] = False
        left -= 1
        before[ends[2]], after[ends[0]] = ends[0], ends[2]
        for neighbour in (ends[0], ends[2]):
            turn[neighbour] += 1
            waiting.append((neighbour, turn[neighbour]))
        if 2 * left < len(order):
            order = order[present[order]]
            across = points[order, 0]
    triangles[n - left :] = np.flatnonzero(present)[_fan(left)]
    return triangles


def _is_ear(triangle: Floats, others: Floats) -> bool:
    """Whether a triangle [3, 2] turns as its polygon does, and no corner of [m, 2] blocks it; see `_are_ears`."""
    a, b, c = triangle
    if _area(a, b, c) <= 0:
        return False
    blocked = np.ones(len(others), dtype=bool)
    for start, end in ((a, b), (b, c), (c, a)):
        blocked &= (_area(start, end, others) >= 0) & (others != start).any(axis=1)
    return not blocked.any()


def _all_ears(ring: Floats) -> NDArray[np.bool_]:
    """[P, m] which corners of polygons [P, m, 2] can be cut off."""
    count, m = ring.shape[:2]
    some = max(1, _COMPARED_AT_ONCE // (count * m))
    corners = [np.tile(np.arange(first, min(first + some, m)), (count, 1)) for first in range(0, m, some)]
    return np.concatenate([_are_ears(ring, numbers) for numbers in corners], axis=1)


def _are_ears(ring: Floats, corners: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[P, k] whether corners [P, k] of polygons [P, m, 2] can be cut off."""
    m = ring.shape[1]
    which = np.arange(len(ring))[:, None]
    a, b, c = (ring[which, (corners + step) % m] for step in (-1, 0, 1))
    others = ring[:, None]  # [P, 1, m, 2] against the triangles [P, k, 1, 2]
    blocked = np.ones((*corners.shape, m), dtype=bool)
    for start, end in ((a, b), (b, c), (c, a)):
        blocked &= _area(start[:, :, None], end[:, :, None], others) >= 0
        # Neither the triangle's own corners block it, nor others at the same place, where an outline touches itself.
        blocked &= (others != start[:, :, None]).any(axis=3)
    ears: NDArray[np.bool_] = (_area(a, b, c) > 0) & ~blocked.any(axis=2)
    return ears


def _area(a: Floats, b: Floats, c: Floats) -> Floats:
    """Twice the signed area of triangles in the plane."""
    area: Floats = (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])
    return area
