"""3D Gaussians seen by one pinhole camera: ellipses in pixels (elliptical weighted averaging).

The projection is linearised at the centre of each Gaussian (Zwicker et al., EWA splatting, 2002, section 6; Kerbl et
al., 3D Gaussian Splatting, 2023, section 4). A Gaussian has the covariance A A^T, where the columns of A are its axes
(rotation times scales), and so its picture has P P^T with P = J W A, two rows of three. Everything follows from these
rows: the determinant of P P^T is the squared length of their cross product, which is never negative and loses no
digits for Gaussians seen edge on.

The mip filter (Yu et al., Mip-Splatting, 2024, section 4.2; FORMAT 11) widens the picture by `kernel_size` and lowers
the opacity by what the widening would add in light, so that a Gaussian smaller than a pixel neither vanishes nor grows.

Shape legend: M Gaussians. Components come first here, [3, M] and not [M, 3]: long rows are what a processor is fast at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.cameras import Cameras

MAX_SCALE = 1e3
"""World units, of which the asset fills one: wider Gaussians look the same."""

MAX_SPREAD = 1e6
"""Pixels: wider Gaussians look the same in any picture, and the fourth power of this is a float32."""

MARGIN = 0.15
"""Beyond this part of the picture outside its edges the linearisation no longer follows the centre of a Gaussian.

A Gaussian far to the side of a camera would otherwise spread over the whole picture.
"""

MIN_FILTER = 2.5e-5
"""Least ratio of the determinants before and after the filter: opacity falls to 1/200 at most, as in Mip-Splatting."""

MIN_OPACITY = 1e-6
"""Far below anything that is drawn; keeps the logarithm of the opacity finite."""


@dataclass(frozen=True, slots=True)
class Splats:
    """The picture of M Gaussians, in pixels (x right, y down, from the upper left corner); differentiable.

    centres: [2, M].
    covariances: [3, M] xx, xy, yy of the widened ellipse; conics: [3, M] the same of its inverse.
    log_opacities: [M] natural logarithm of the opacity after the filter.
    depths: [M] z of the centre before the camera, in world units.
    in_front: [M] bool. Where it is false, the other fields are finite and mean nothing.
    """

    centres: Tensor
    covariances: Tensor
    conics: Tensor
    log_opacities: Tensor
    depths: Tensor
    in_front: Tensor


def axes_of(scales: Tensor, rotations: Tensor) -> Tensor:
    """[3, 3, M]: for each world axis, the components of the Gaussians' three axes, as long as `scales`.

    Args:
        scales: [M, 3] standard deviations in world units.
        rotations: [M, 4] unit quaternions (w, x, y, z).
    """
    w, x, y, z = rotations.T.contiguous().unbind()
    a, b, c = scales.clamp_max(MAX_SCALE).T.contiguous().unbind()
    rows = [
        [a * (1 - 2 * (y * y + z * z)), b * (2 * (x * y - w * z)), c * (2 * (x * z + w * y))],
        [a * (2 * (x * y + w * z)), b * (1 - 2 * (x * x + z * z)), c * (2 * (y * z - w * x))],
        [a * (2 * (x * z - w * y)), b * (2 * (y * z + w * x)), c * (1 - 2 * (x * x + y * y))],
    ]
    axes: Tensor = torch.stack([entry for row in rows for entry in row]).unflatten(0, (3, 3))
    return axes


def project(
    means: Tensor,
    axes: Tensor,
    opacities: Tensor,
    camera: Cameras,
    size: tuple[int, int],
    *,
    kernel_size: float,
    near: float,
) -> Splats:
    """Project Gaussians into one view.

    Args:
        means: [3, M] in the world.
        axes: [3, 3, M] from `axes_of`.
        opacities: [M] in 0..1.
        camera: one view.
        size: (height, width) of the picture in pixels.
        kernel_size: variance of the mip filter in square pixels, positive.
        near: Gaussians with less depth are not in front.
    """
    height, width = size
    rotation, offset = camera.world_to_camera[0, :3, :3], camera.world_to_camera[0, :3, 3:]
    intrinsics = camera.intrinsics[0]
    local = torch.addmm(offset, rotation, means)
    in_front = local[2] > near
    # Replaced rather than dropped: the gradient of a Gaussian behind the camera is then zero, never 0 x infinity.
    sideways, depth = torch.where(in_front, local[:2], 0.0), torch.where(in_front, local[2], 1.0)
    nearness = 1.0 / depth
    slopes = sideways * nearness
    to_pixels = intrinsics[:2] * torch.tensor([[width], [height]], dtype=local.dtype, device=local.device)
    scaling, middle = to_pixels[:, :2], to_pixels[:, 2:]

    # d pixel / d (x, y, z) = [scaling, -scaling slopes] / z, turned to the axes of the world.
    low, high = _slope_limits(intrinsics)
    towards = scaling @ torch.minimum(torch.maximum(slopes, low), high)
    jacobian = (scaling @ rotation[:2])[:, :, None] - towards[:, None] * rotation[2, :, None]
    first, second = (jacobian * nearness)[:, :, None].mul(axes).sum(1).clamp(-MAX_SPREAD, MAX_SPREAD)

    (a, b, c), (d, e, f) = first, second
    sharp = (b * f - c * e).square() + (c * d - a * f).square() + (a * e - b * d).square()
    xx, xy, yy = first.square().sum(0), (first * second).sum(0), second.square().sum(0)
    determinant = sharp + kernel_size * (xx + yy) + kernel_size**2
    xx, yy = xx + kernel_size, yy + kernel_size
    dimming = 0.5 * (sharp / determinant).clamp_min(MIN_FILTER).log()
    return Splats(
        centres=torch.addmm(middle, scaling, slopes),
        covariances=torch.stack([xx, xy, yy]),
        conics=torch.stack([yy, -xy, xx]) / determinant,
        log_opacities=opacities.clamp_min(MIN_OPACITY).log() + dimming,
        depths=depth,
        in_front=in_front,
    )


def _slope_limits(intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """The least and greatest x / z and y / z [2, 1] of the picture and its margin."""
    focal, centre = intrinsics.diagonal()[:2], intrinsics[:2, 2]
    ends = torch.stack([(-MARGIN - centre) / focal, (1.0 + MARGIN - centre) / focal])
    return ends.amin(0)[:, None], ends.amax(0)[:, None]
