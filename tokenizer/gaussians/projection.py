"""3D Gaussians seen by one pinhole camera: ellipses in pixels (elliptical weighted averaging).

The projection is linearised at the centre of each Gaussian (Zwicker et al., EWA splatting, 2002, section 6; Kerbl et
al., 3D Gaussian Splatting, 2023, section 4). A Gaussian has the covariance A A^T, where the columns of A are its axes
(rotation times scales), and so its picture has P P^T with P = J W A, two rows of three. Everything follows from these
rows: the determinant of P P^T is the squared length of their cross product, which is never negative and loses no
digits for Gaussians seen edge on.

The mip filter (Yu et al., Mip-Splatting, 2024, section 4.2; FORMAT 11) widens the picture by `kernel_size` and lowers
the opacity by what the widening would add in light, so that a Gaussian smaller than a pixel neither vanishes nor grows.

Shape legend: M Gaussians.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenizer.cameras import Cameras

MAX_SCALE = 1e3
"""World units, of which the asset fills one: wider Gaussians look the same, and their squares stay in float32."""

MARGIN = 0.15
"""Beyond this part of the picture outside its edges the linearisation no longer follows the centre of a Gaussian.

A Gaussian far to the side of a camera would otherwise spread over the whole picture.
"""

MIN_FILTER = 2.5e-5
"""Least ratio of the determinants before and after the filter: opacity falls by 1/200 at most, as in Mip-Splatting."""

MIN_OPACITY = 1e-6
"""Far below anything that is drawn; keeps the logarithm of the opacity finite."""


@dataclass(frozen=True, slots=True)
class Splats:
    """The picture of M Gaussians, in pixels (x right, y down, from the upper left corner); differentiable.

    centres: [M, 2].
    covariances: [M, 3] xx, xy, yy of the widened ellipse; conics: [M, 3] the same of its inverse.
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
        means: [M, 3] in the world.
        axes: [M, 3, 3], columns: the axes of each Gaussian, as long as its standard deviations.
        opacities: [M] in 0..1.
        camera: one view.
        size: (height, width) of the picture in pixels.
        kernel_size: variance of the mip filter in square pixels, positive.
        near: Gaussians with less depth are not in front.
    """
    height, width = size
    rotation, offset = camera.world_to_camera[0, :3, :3], camera.world_to_camera[0, :3, 3]
    intrinsics = camera.intrinsics[0]
    local = means @ rotation.T + offset
    in_front = local[:, 2] > near
    # Replaced rather than dropped: the gradient of a Gaussian behind the camera is then zero, never 0 x infinity.
    safe = torch.tensor([0.0, 0.0, 1.0], dtype=local.dtype, device=local.device)
    local = torch.where(in_front[:, None], local, safe)
    depth = local[:, 2]
    slopes = local[:, :2] / depth[:, None]
    pixels = torch.tensor([width, height], dtype=local.dtype, device=local.device)
    to_pixels = intrinsics[:2] * pixels[:, None]
    centres = slopes @ to_pixels[:, :2].T + to_pixels[:, 2]

    low, high = _slope_limits(intrinsics)
    limited = torch.minimum(torch.maximum(slopes, low), high)
    towards = limited @ to_pixels[:, :2].T
    # d pixel / d (x, y, z) = [to_pixels | -towards] / z; its first part is the same for every Gaussian.
    across = to_pixels[:, :2] @ rotation[:2]
    jacobian = (across - towards[:, :, None] * rotation[2]) / depth[:, None, None]
    first, second = torch.bmm(jacobian, axes).unbind(1)

    sharp = torch.linalg.cross(first, second).square().sum(1)
    xx, xy, yy = first.square().sum(1), (first * second).sum(1), second.square().sum(1)
    determinant = sharp + kernel_size * (xx + yy) + kernel_size**2
    xx, yy = xx + kernel_size, yy + kernel_size
    dimming = 0.5 * (sharp / determinant).clamp_min(MIN_FILTER).log()
    return Splats(
        centres=centres,
        covariances=torch.stack([xx, xy, yy], 1),
        conics=torch.stack([yy, -xy, xx], 1) / determinant[:, None],
        log_opacities=opacities.clamp_min(MIN_OPACITY).log() + dimming,
        depths=depth,
        in_front=in_front,
    )


def _slope_limits(intrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """The least and greatest x / z and y / z [2] of the picture and its margin."""
    focal, centre = intrinsics.diagonal()[:2], intrinsics[:2, 2]
    ends = torch.stack([(-MARGIN - centre) / focal, (1.0 + MARGIN - centre) / focal])
    return ends.amin(0), ends.amax(0)
