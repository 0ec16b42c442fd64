"""`Mesh`: triangles with colours, as the ray caster wants them. Files become meshes in `tokenizer.assets.load`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenizer.errors import InputError

Floats = NDArray[np.floating[Any]]
Wrap = Literal["repeat", "clamp", "mirror"]


@dataclass(frozen=True, slots=True)
class Texture:
    """pixels: uint8 [H, W, 4], display values (sRGB), row 0 at the top, where v = 1. wrap_u / wrap_v: outside 0..1."""

    pixels: NDArray[np.uint8]
    wrap_u: Wrap = "repeat"
    wrap_v: Wrap = "repeat"


@dataclass(frozen=True, slots=True)
class Material:
    """colour: red, green, blue, alpha in 0..1, display values; multiplied with the texture and the corner colours.

    alpha: "opaque" ignores alpha, "mask" cuts at `cutoff`, "blend" composites (front to back).
    """

    colour: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 1.0)
    texture: Texture | None = None
    alpha: Literal["opaque", "mask", "blend"] = "opaque"
    cutoff: float = 0.5


@dataclass(frozen=True, slots=True)
class Mesh:
    """F triangles.

    vertices: [V, 3] float64, world units, z up.
    faces: [F, 3] int64 rows of `vertices`.
    face_materials: [F] int64 rows of `materials`.
    materials: at least one.
    uv: [F, 3, 2] float32 texture coordinates of the corners (v up), or None where nothing is textured.
    colours: [F, 3, 4] float32 colours of the corners in 0..1, or None for white.
    to_original: [4, 4] float64; takes `vertices` back to the axes and units of the file.
    """

    vertices: Floats
    faces: NDArray[np.int64]
    face_materials: NDArray[np.int64]
    materials: tuple[Material, ...]
    uv: NDArray[np.float32] | None = None
    colours: NDArray[np.float32] | None = None
    to_original: Floats = field(default_factory=lambda: np.eye(4))

    @property
    def bounds(self) -> Floats:
        """[2, 3] the lowest and highest corner of the box around the used vertices."""
        used = self.vertices[self.faces.reshape(-1)]
        return np.stack([used.min(axis=0), used.max(axis=0)])

    @property
    def radius(self) -> float:
        """Largest distance of a used vertex from the origin."""
        return float(np.linalg.norm(self.vertices[self.faces.reshape(-1)], axis=1).max())

    def transformed(self, matrix: Floats) -> Mesh:
        """The mesh after an affine `matrix` [4, 4]; `to_original` still leads back to the file."""
        moved = self.vertices @ matrix[:3, :3].T + matrix[:3, 3]
        return replace(self, vertices=moved, to_original=self.to_original @ np.linalg.inv(matrix))

    def normalised(self) -> Mesh:
        """Centred and scaled alike along all axes, so that the longest side of its box reaches from -0.5 to 0.5.

        Raises:
            InputError: the box is a single point, or not finite.
        """
        low, high = self.bounds
        side = float((high - low).max())
        if not np.isfinite(side) or side <= 0:
            raise InputError("the mesh has no extent (all its corners are one point, or not finite)")
        matrix = np.eye(4)
        matrix[:3, :3] /= side
        matrix[:3, 3] = -(low + high) / 2 / side
        return self.transformed(matrix)
