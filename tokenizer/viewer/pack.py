"""Gaussians as few bytes for the page: 30 for each, 40 characters in base64.

Planes one after the other, little-endian, so that the page can lay typed arrays over them (`scene.js` is the inverse):

    means     float32 [M, 3]  as they are: assets and whole streets alike
    rotations uint32  [M]     the three smallest components of the unit quaternion in 10 bits each, and which is largest
    scales    uint16  [M, 3]  logarithms, evenly between the least and the greatest
    paint     uint16  [M, 4]  red, green, blue from 0 to the greatest, opacity from 0 to 1

A rotation is off by 0.28 degrees at most; a scale by half a step, which is 0.01 % where the scales span six decades.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenizer.gaussians import Gaussians

BYTES = 30
"""For each Gaussian."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What the page must know to unpack and frame the Gaussians.

    count: M.
    scale_range: natural logarithms that the ends of the scales stand for.
    peak: the colour that 65535 stands for, at least 1.
    centre / radius: a sphere that holds all but stray Gaussians, in world units.
    """

    count: int
    scale_range: tuple[float, float]
    peak: float
    centre: tuple[float, float, float]
    radius: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def most_visible(gaussians: Gaussians, count: int) -> Gaussians:
    """The `count` Gaussians with the greatest product of opacity and mean silhouette, in their order; all if fewer."""
    if len(gaussians) <= count:
        return gaussians
    a, b, c = gaussians.scales.double().unbind(1)
    # An ellipsoid with axes a, b, c casts shadows of pi bc, pi ca and pi ab along its axes.
    weight = gaussians.opacities[:, 0].double() * (a * b + b * c + c * a)
    return gaussians.select(torch.topk(weight, count).indices.sort().values)


def pack(gaussians: Gaussians) -> tuple[Scene, bytes]:
    """One asset, at least one Gaussian, finite values -> (what describes the bytes, the bytes)."""
    gaussians = gaussians.detach().to(device="cpu", dtype=torch.float64)
    logarithms = gaussians.scales.log().numpy()
    low, high = float(logarithms.min()), float(logarithms.max())
    colours = gaussians.colours.numpy()
    peak = max(1.0, float(colours.max()))
    paint = np.concatenate([colours / peak, gaussians.opacities.numpy()], axis=1)
    centre, radius = _framing(gaussians)
    planes = (
        gaussians.means.numpy().astype("<f4"),
        _pack_rotations(gaussians.rotations.numpy()),
        _to_16_bits((logarithms - low) / max(high - low, 1e-9)),
        _to_16_bits(paint),
    )
    scene = Scene(count=len(gaussians), scale_range=(low, high), peak=peak, centre=centre, radius=radius)
    return scene, b"".join(plane.tobytes() for plane in planes)


def _to_16_bits(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    return np.rint(np.clip(values, 0, 1) * 65535).astype("<u2")


def _pack_rotations(quaternions: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Unit quaternions [M, 4] -> [M]: bits 30..31 say which component is left out, 0..29 hold the others in order."""
    rows = np.arange(len(quaternions))
    largest = np.abs(quaternions).argmax(axis=1)
    # q and -q are one rotation: with the largest component positive it follows from the others.
    signed = quaternions * np.where(quaternions[rows, largest] < 0, -1.0, 1.0)[:, None]
    others = np.array([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])[largest]
    # The others are at most 1 / sqrt(2) in size.
    small = signed[rows[:, None], others] * math.sqrt(2)
    levels = np.rint((np.clip(small, -1, 1) + 1) / 2 * 1023).astype(np.uint32)
    shifted: NDArray[np.uint32] = levels << np.array([20, 10, 0], dtype=np.uint32)
    packed: NDArray[np.uint32] = np.bitwise_or.reduce(shifted, axis=1) | largest.astype(np.uint32) << np.uint32(30)
    return packed.astype("<u4")


def _framing(gaussians: Gaussians) -> tuple[tuple[float, float, float], float]:
    """A sphere around the Gaussians; the outermost hundredth does not count, it may be far away."""
    means, reach = gaussians.means.numpy(), 2 * gaussians.scales.numpy().max(axis=1)
    x, y, z = np.quantile(means, [0.01, 0.99], axis=0).mean(axis=0).tolist()
    distances = np.linalg.norm(means - np.array([x, y, z]), axis=1) + reach
    return (x, y, z), float(np.quantile(distances, 0.99))
