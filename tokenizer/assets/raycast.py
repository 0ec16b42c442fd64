"""Views of a mesh by ray casting: embree finds what a ray hits, numpy finds the colour. No GPU, GL or window system.

Colours are display values (sRGB) throughout. Antialiasing is spent where it shows: one ray through the centre of every
pixel, then a grid of rays in the pixels whose neighbours look different. Textures are filtered bilinearly at the mip
level that fits the pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from tokenizer.assets.mesh import Material, Mesh
from tokenizer.assets.texture import MipMaps
from tokenizer.assets.views import EMPTY, Views
from tokenizer.cameras import Cameras
from tokenizer.errors import InputError, require_package

Floats = NDArray[np.float32]
Light = Literal["studio", "none"]

MAX_LAYERS = 16
"""Transparent surfaces that a ray passes before it is given up."""

_STEP = 1e-5
"""How far beyond a transparent surface a ray goes on, in world units; float32 rays cannot tell less apart."""

_VISIBLE = 0.05
"""Opacity below which a surface has no depth."""

_AMBIENT = 0.45
_LAMPS = (((-0.45, -0.70, 0.55), 0.55), ((0.80, 0.35, 0.25), 0.25), ((0.10, 0.80, -0.40), 0.15))
"""Directions towards the lamps and their strengths. They stand still in the world, so views agree on colours."""

_CONTRAST = 6 / 255
"""Neighbouring pixels that differ by more than this are looked at more closely."""


def render_views(
    mesh: Mesh,
    cameras: Cameras,
    size: int = 256,
    *,
    light: Light = "studio",
    samples: int = 4,
    on_view: Callable[[], object] | None = None,
) -> Views:
    """Colour, alpha and depth of a mesh as the cameras see it.

    Args:
        mesh: in world units, usually `Mesh.normalised()`.
        cameras: V of them.
        size: rows and columns of a view.
        light: "studio" is one fixed rig of lamps on matt surfaces, "none" shows the colours as they are.
        samples: rays along each side of a pixel at edges; 1 switches antialiasing off.
        on_view: called after each view, for progress.

    Returns:
        Views with straight alpha; the depth of a pixel is that of its centre, at the first surface that is at least
        half opaque, or where there is none, at the first one that can be seen.

    Raises:
        InputError: `embreex` is not installed, or a size or number of samples below 1.
    """
    if size < 1 or samples < 1:
        raise InputError(f"views need at least one row and one ray, got size {size} and samples {samples}")
    scene = Scene(mesh, light)
    colours = np.zeros((len(cameras), size, size, 4), dtype=np.uint8)
    depths = np.full((len(cameras), size, size), EMPTY, dtype=np.float32)
    for view in range(len(cameras)):
        rays = _PixelRays(cameras[view : view + 1], size)
        straight, depths[view] = _render(scene, rays, samples)
        colours[view] = (straight * 255 + 0.5).astype(np.uint8)
        if on_view is not None:
            on_view()
    return Views(colours, torch.from_numpy(depths), cameras)


def _render(scene: Scene, rays: _PixelRays, samples: int) -> tuple[Floats, Floats]:
    """Straight colours [H, W, 4] and depth [H, W] of one view."""
    size = rays.size
    rows, columns = (index.ravel() for index in np.indices((size, size), dtype=np.int32))
    hit = scene.cast(rays.origin, rays.directions(rows + 0.5, columns + 0.5), rays.spread)
    premultiplied = hit.colour.reshape(size, size, 4)
    if samples > 1:
        edges = _edges(premultiplied, hit.face.reshape(size, size) >= 0)
        edge_rows, edge_columns = np.nonzero(edges)
        offset = (np.arange(samples) + 0.5) / samples
        grid_rows = (edge_rows[:, None, None] + offset[:, None]).repeat(samples, axis=2)
        grid_columns = (edge_columns[:, None, None] + offset).repeat(samples, axis=1)
        fine = scene.cast(rays.origin, rays.directions(grid_rows.ravel(), grid_columns.ravel()), rays.spread / samples)
        premultiplied[edge_rows, edge_columns] = fine.colour.reshape(-1, samples**2, 4).mean(axis=1)
    alpha = premultiplied[..., 3:]
    straight = np.concatenate([premultiplied[..., :3] / np.maximum(alpha, 1e-6), alpha], axis=-1)
    return np.clip(straight, 0, 1), hit.depth.reshape(size, size)


def _edges(colours: Floats, covered: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels with a neighbour of another look."""
    edges = np.zeros(covered.shape, dtype=bool)
    for axis in (0, 1):
        low = tuple(slice(None, -1) if a == axis else slice(None) for a in (0, 1))
        high = tuple(slice(1, None) if a == axis else slice(None) for a in (0, 1))
        differs = np.abs(colours[low] - colours[high]).max(axis=-1) > _CONTRAST
        differs |= covered[low] != covered[high]
        edges[low] |= differs
        edges[high] |= differs
    return edges


class _PixelRays:
    """Rays through the pixels of one camera, directions scaled so that distances along them are depths."""

    def __init__(self, camera: Cameras, size: int) -> None:
        self.size = size
        self.origin = camera.centres[0].numpy().astype(np.float32)
        self._rotation = camera.world_to_camera[0, :3, :3].double().numpy()
        self._inverse = np.linalg.inv(camera.intrinsics[0].double().numpy())
        # World units that a pixel spans at depth 1.
        self.spread = float(self._inverse[0, 0] / size)

    def directions(self, rows: NDArray[Any], columns: NDArray[Any]) -> Floats:
        """[P, 3] for image positions in pixels."""
        image = np.stack([columns / self.size, rows / self.size, np.ones(len(rows))], axis=1)
        directions: Floats = (image @ self._inverse.T @ self._rotation).astype(np.float32)
        return directions


@dataclass(frozen=True, slots=True)
class Hits:
    """colour [P, 4] premultiplied, depth [P] along the ray (`EMPTY` where there is nothing), face [P] (-1: none)."""

    colour: Floats
    depth: Floats
    face: NDArray[np.int64]


class Scene:
    """A mesh ready for rays.

    Args:
        mesh: at least one face.
        light: as for `render_views`.
    """

    def __init__(self, mesh: Mesh, light: Light = "studio") -> None:
        require_package("embreex", "rendering views of a mesh", "assets")
        from embreex import rtcore_scene
        from embreex.mesh_construction import TriangleMesh

        if not len(mesh.faces):
            raise InputError("the mesh has no faces, so there is nothing to see")
        self._mesh, self._light = mesh, light
        self._scene = rtcore_scene.EmbreeScene()
        self._buffers = TriangleMesh(self._scene, mesh.vertices.astype(np.float32), mesh.faces.astype(np.int32))
        self._pyramids = [None if m.texture is None else MipMaps(m.texture) for m in mesh.materials]
        self._solid = np.array([m.alpha == "opaque" for m in mesh.materials])
        self._density = self._texel_density()

    def cast(self, origin: Floats, directions: Floats, spread: float) -> Hits:
        """Follow rays from one point.

        Args:
            origin: [3].
            directions: [P, 3], of any length; depths are in units of it.
            spread: world units between neighbouring rays at depth 1; chooses the mip level.
        """
        count = len(directions)
        colour = np.zeros((count, 4), dtype=np.float32)
        depth, glass = (np.full(count, EMPTY, dtype=np.float32) for _ in range(2))
        first = np.full(count, -1, dtype=np.int64)
        live: NDArray[np.int64] = np.arange(count)
        origins: NDArray[Any] = np.broadcast_to(origin.astype(np.float32), (count, 3)).copy()
        travelled = np.zeros(count, dtype=np.float32)
        for _ in range(MAX_LAYERS):
            found = self._scene.run(origins, directions[live], output=True)
            hit = found["primID"] >= 0
            live, origins, travelled = live[hit], origins[hit], travelled[hit]
            face, distance = found["primID"][hit].astype(np.int64), found["tfar"][hit]
            if not len(live):
                break
            along = travelled + distance
            ray = directions[live]
            surface = self._shade(face, found["u"][hit], found["v"][hit], found["Ng"][hit], ray, along * spread)
            first[live] = np.where(first[live] < 0, face, first[live])
            visible = surface[:, 3] * (1 - colour[live, 3])
            colour[live, :3] += surface[:, :3] * visible[:, None]
            colour[live, 3] += visible
            glass[live] = np.where((glass[live] < 0) & (surface[:, 3] >= _VISIBLE), along, glass[live])
            depth[live] = np.where((depth[live] < 0) & (surface[:, 3] >= 0.5), along, depth[live])
            through = colour[live, 3] < 1 - 1 / 512
            if not through.any():
                break
            live, ray = live[through], ray[through]
            step = distance[through] + _STEP / np.linalg.norm(ray, axis=1)
            origins = origins[through] + ray * step[:, None]
            travelled = travelled[through] + step
        return Hits(colour, np.where(depth < 0, glass, depth), first)

    def pixel_rays(self, camera: Cameras, size: int) -> tuple[Floats, Floats]:
        """Origins and directions [H W, 3] through the pixel centres of one camera, row by row."""
        rays = _PixelRays(camera, size)
        rows, columns = (index.ravel() for index in np.indices((size, size)))
        directions = rays.directions(rows + 0.5, columns + 0.5)
        return np.broadcast_to(rays.origin, directions.shape).copy(), directions

    def first_faces(self, origins: Floats, directions: Floats) -> NDArray[np.int32]:
        """The face that each ray [P, 3] hits first, -1 for none; no colours, no transparency."""
        faces: NDArray[np.int32] = self._scene.run(origins, directions)
        return faces

    def _shade(
        self, face: NDArray[np.int64], u: Floats, v: Floats, normal: Floats, ray: Floats, footprint: Floats
    ) -> Floats:
        """Straight colour [P, 4] of hits, given by face and barycentric coordinates; alpha as the material says."""
        mesh = self._mesh
        weights = np.stack([1 - u - v, u, v], axis=1)
        material = mesh.face_materials[face]
        colour = np.array([m.colour for m in mesh.materials], dtype=np.float32)[material]
        if mesh.colours is not None:
            colour *= np.einsum("pc,pck->pk", weights, mesh.colours[face])
        if mesh.uv is not None:
            place = np.einsum("pc,pck->pk", weights, mesh.uv[face])
            for number, pyramid in enumerate(self._pyramids):
                rows = np.nonzero(material == number)[0]
                if pyramid is not None and len(rows):
                    texels = self._density[face[rows]] * footprint[rows]
                    colour[rows] *= pyramid.sample(place[rows], texels)
        colour[:, 3] = self._opacity(colour[:, 3], material)
        if self._light == "studio":
            colour[:, :3] *= _brightness(normal, ray)[:, None]
        return np.clip(colour, 0, 1, out=colour)

    def _opacity(self, alpha: Floats, material: NDArray[np.int64]) -> Floats:
        if self._solid.all():
            return np.ones_like(alpha)
        cut = np.array([m.alpha == "mask" for m in self._mesh.materials])[material]
        cutoff = np.array([m.cutoff for m in self._mesh.materials], dtype=np.float32)[material]
        alpha = np.where(cut, (alpha >= cutoff).astype(np.float32), alpha)
        return np.where(self._solid[material], np.float32(1), alpha)

    def _texel_density(self) -> Floats:
        """Texels for each world unit on each face [F], the square root of its area in texels over its area."""
        mesh = self._mesh
        if mesh.uv is None:
            return np.zeros(len(mesh.faces), dtype=np.float32)
        corners = mesh.vertices[mesh.faces]
        area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
        sides = np.array([_texture_sides(m) for m in mesh.materials], dtype=np.float64)[mesh.face_materials]
        uv = mesh.uv.astype(np.float64) * sides[:, None]
        (a, b), (c, d) = (uv[:, 1] - uv[:, 0]).T, (uv[:, 2] - uv[:, 0]).T
        density: Floats = np.sqrt(np.abs(a * d - b * c) / np.maximum(area, 1e-12)).astype(np.float32)
        return density


def _texture_sides(material: Material) -> tuple[int, int]:
    """Columns and rows."""
    if material.texture is None:
        return 0, 0
    height, width = material.texture.pixels.shape[:2]
    return width, height


def _brightness(normal: Floats, ray: Floats) -> Floats:
    """[P] what matt surfaces show of white light. Surfaces have two sides: the normal is that of the seen one."""
    length = np.linalg.norm(normal, axis=1, keepdims=True)
    unit = normal / np.maximum(length, 1e-20)
    unit = np.where((unit * ray).sum(axis=1, keepdims=True) > 0, -unit, unit)
    light = np.full(len(unit), _AMBIENT, dtype=np.float32)
    for direction, strength in _LAMPS:
        towards = np.array(direction) / np.linalg.norm(direction)
        light += strength * np.maximum(unit @ towards.astype(np.float32), 0)
    return np.minimum(light, 1)
