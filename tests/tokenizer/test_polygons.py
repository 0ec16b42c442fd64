"""Polygons are cut into triangles that cover them once, in a time that has an end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tokenizer.assets.polygons import Budget, triangulated

Array = NDArray[Any]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(4, 40))
def test_polygons_are_covered_once(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    # A star around a point is simple; jagged radii make it concave. Seen from any side, forwards or backwards.
    angles = 2 * np.pi * (np.arange(n) + rng.uniform(0.1, 0.9, n)) / n
    flat = rng.uniform(0.2, 1, (n, 1)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    polygon = (flat @ axes[:2])[None, :: rng.choice([-1, 1])]
    (cut,) = triangulated(polygon, Budget())
    a, b, c = (polygon[0][cut[:, corner]] for corner in range(3))
    normals = np.cross(b - a, c - a)
    whole = np.cross(polygon[0], np.roll(polygon[0], -1, axis=0)).sum(axis=0)
    # All turn the same way, and together they have the area of the polygon: nothing is covered twice, nothing beside.
    assert (normals @ whole > -1e-12).all()
    np.testing.assert_allclose(normals.sum(axis=0), whole, atol=1e-12)


@pytest.mark.parametrize("corners", [1000, 1001, 20_000])
def test_a_large_polygon_is_not_cut_into_slivers(corners: int) -> None:
    """Rays took a minute for the triangles of a fan of 100,000, all of which reach across the whole polygon."""
    angles = np.arange(corners) * 2 * np.pi / corners
    polygon = np.stack([np.cos(angles), np.sin(angles), np.zeros(corners)], axis=1)
    (cut,) = triangulated(polygon[None], Budget())
    a, b, c = (polygon[cut[:, corner]] for corner in range(3))
    areas = np.cross(b - a, c - a)[:, 2] / 2
    assert cut.shape == (corners - 2, 3)
    assert (areas > 0).all()
    assert areas.sum() == pytest.approx(corners / 2 * np.sin(2 * np.pi / corners))
    assert np.bincount(cut.reshape(-1), minlength=corners).min() >= 1
    if corners > 1000:
        assert np.bincount(cut.reshape(-1)).max() <= 2 * np.log2(corners) + 2


def large_outline(shape: str, corners: int) -> Array:
    """[about `corners`, 2] counter-clockwise."""
    around = np.linspace(0, 2 * np.pi, corners // 2, endpoint=False)
    circle = np.stack([np.cos(around), np.sin(around)], axis=1)
    if shape == "jagged":
        return np.stack([circle, 0.5 * circle], axis=1).reshape(-1, 2)
    if shape == "ring":  # a hole, reached by a bridge that is walked twice
        return np.concatenate([circle, circle[:1], 0.5 * circle[:1], 0.5 * circle[::-1]])
    turns = np.linspace(0, 20 * np.pi, corners // 2)[:, None]
    spiral = np.concatenate([np.cos(turns), np.sin(turns)], axis=1)
    return np.concatenate([(turns / 60 + 0.1) * spiral, ((turns / 60 + 0.05) * spiral)[::-1]])


@pytest.mark.parametrize("shape", ["jagged", "ring", "spiral"])
@pytest.mark.parametrize("step", [1, -1])
def test_large_polygons_that_are_not_convex_are_covered_once(shape: str, step: int) -> None:
    flat = large_outline(shape, 4000)
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    polygon = (flat @ axes[:2])[::step]
    (cut,) = triangulated(polygon[None], Budget())
    a, b, c = (polygon[cut[:, corner]] for corner in range(3))
    normals = np.cross(b - a, c - a)
    whole = np.cross(polygon, np.roll(polygon, -1, axis=0)).sum(axis=0)
    assert (normals @ whole > -1e-9).all()
    np.testing.assert_allclose(normals.sum(axis=0), whole, atol=1e-9)


def test_even_the_worst_polygon_has_an_end() -> None:
    budget = Budget(comparisons=100_000)
    (cut,) = triangulated(np.random.default_rng(0).normal(size=(1, 20_000, 3)), budget)
    assert cut.shape == (19_998, 3)
    np.testing.assert_array_equal(np.unique(cut), np.arange(20_000))
    assert not budget.allows(1)


def test_polygons_that_take_too_long_become_fans() -> None:
    points = np.random.default_rng(0).normal(size=(2, 50, 3))
    budget = Budget(comparisons=6000)
    first, second = (triangulated(points, budget) for _ in range(2))
    assert (first[:, 0] != second[:, 0]).any()  # an ear, while there was time to look for it
    fan = np.stack([np.zeros(48), np.arange(1, 49), np.arange(2, 50)], axis=1)
    np.testing.assert_array_equal(second, [fan, fan])
