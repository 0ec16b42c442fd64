"""Pinhole cameras: where views of an asset are taken from, and their place in a `transforms.json` (FORMAT 13).

World: right-handed, z up, the asset in the cube from -0.5 to 0.5. Cameras look along +z with x right and y down
(OpenCV). Intrinsics are in units of the image's width and height: the centre is (0.5, 0.5). A pixel (row i, column j)
of an H x W image covers (j .. j + 1) / W and (i .. i + 1) / H, so its centre is half a pixel further.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenizer.errors import InputError

FIELD_OF_VIEW = math.radians(40.0)
"""Of the cameras made here, across the picture."""

_GOLDEN_ANGLE = math.pi * (3.0 - math.sqrt(5.0))


@dataclass(frozen=True, slots=True)
class Cameras:
    """V pinhole cameras: world_to_camera [V, 4, 4] and intrinsics [V, 3, 3], floating."""

    world_to_camera: Tensor
    intrinsics: Tensor

    def __post_init__(self) -> None:
        if self.world_to_camera.ndim != 3 or self.world_to_camera.shape[1:] != (4, 4):
            raise InputError(f"world_to_camera must be [V, 4, 4], got {tuple(self.world_to_camera.shape)}")
        if self.intrinsics.shape != (len(self.world_to_camera), 3, 3):
            raise InputError(
                f"intrinsics must be [{len(self.world_to_camera)}, 3, 3], got {tuple(self.intrinsics.shape)}"
            )

    def __len__(self) -> int:
        """V, the number of views."""
        return len(self.world_to_camera)

    def __getitem__(self, views: slice) -> Cameras:
        """Some of the views."""
        return Cameras(self.world_to_camera[views], self.intrinsics[views])

    @property
    def centres(self) -> Tensor:
        """[V, 3] where the cameras stand in the world."""
        rotation, offset = self.world_to_camera[:, :3, :3], self.world_to_camera[:, :3, 3:]
        centres: Tensor = -(rotation.transpose(1, 2) @ offset)[..., 0]
        return centres

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cameras:
        return Cameras(self.world_to_camera.to(device, dtype), self.intrinsics.to(device, dtype))

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points [P, 3] -> image coordinates [V, P, 2] (u right, v down, 0..1 inside) and depths [V, P]."""
        rotation, offset = self.world_to_camera[:, :3, :3], self.world_to_camera[:, :3, 3]
        local = points @ rotation.transpose(1, 2) + offset[:, None]
        homogeneous = local @ self.intrinsics.transpose(1, 2)
        return homogeneous[..., :2] / homogeneous[..., 2:], local[..., 2]


def sphere_cameras(count: int, radius: float, *, phase: float = 0.0, field_of_view: float = FIELD_OF_VIEW) -> Cameras:
    """Cameras spread evenly over a sphere (a Fibonacci spiral), all looking at the origin.

    Args:
        count: V.
        radius: of the sphere the cameras must see whole, in world units; they stand where it just fills the picture.
        phase: turns the spiral about the vertical axis, in radians. Another phase gives views that others have not.
        field_of_view: across the picture, in radians.
    """
    if count < 1:
        raise InputError(f"the number of views must be at least 1, got {count}")
    number = torch.arange(count, dtype=torch.float64, device="cpu")
    height = 1.0 - (2.0 * number + 1.0) / count
    around = _GOLDEN_ANGLE * number + phase
    ring = (1.0 - height.square()).sqrt()
    return orbit_cameras(torch.stack([ring * around.cos(), ring * around.sin(), height], 1), radius, field_of_view)


def turntable_cameras(
    count: int, radius: float, *, elevation: float = math.radians(20.0), field_of_view: float = FIELD_OF_VIEW
) -> Cameras:
    """Cameras that walk once around the vertical axis at `elevation` (radians); arguments as for `sphere_cameras`.

    The first stands in front, on the -y side.
    """
    if count < 1:
        raise InputError(f"the number of views must be at least 1, got {count}")
    around = torch.arange(count, dtype=torch.float64, device="cpu") * (2 * math.pi / count) - math.pi / 2
    up, level = math.sin(elevation), math.cos(elevation)
    return orbit_cameras(
        torch.stack([level * around.cos(), level * around.sin(), torch.full_like(around, up)], 1), radius, field_of_view
    )


def orbit_cameras(directions: Tensor, radius: float, field_of_view: float = FIELD_OF_VIEW) -> Cameras:
    """Cameras in the given unit directions [V, 3] that look at the origin and just see a sphere of `radius`."""
    if not (radius > 0 and 0 < field_of_view < math.pi):
        raise InputError(f"radius must be positive and the field of view in 0..pi, got {radius} and {field_of_view}")
    directions = directions.double()
    forward = -directions
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device="cpu").expand_as(forward)
    pole = forward[:, 2:].abs() > 1 - 1e-9
    up = torch.where(pole, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, device="cpu"), up)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=1)
    down = torch.linalg.cross(forward, right)
    rotation = torch.stack([right, down, forward], dim=1)
    matrices = torch.eye(4, dtype=torch.float64, device="cpu").repeat(len(directions), 1, 1)
    matrices[:, :3, :3] = rotation
    matrices[:, 2, 3] = radius / math.sin(field_of_view / 2)
    return Cameras(matrices.float(), _intrinsics(torch.full((len(directions),), field_of_view, device="cpu")))


def cameras_from_transforms(transforms: Mapping[str, Any]) -> Cameras:
    """Cameras of a NeRF-style `transforms.json`.

    Args:
        transforms: "frames", each with "transform_matrix" (camera to world, OpenGL axes) and "camera_angle_x"
            (radians), which may stand at the top level instead.
    """
    frames = transforms.get("frames")
    shared = transforms.get("camera_angle_x")
    if not frames or any(
        "transform_matrix" not in frame or frame.get("camera_angle_x", shared) is None for frame in frames
    ):
        raise InputError("camera transforms need 'frames', each with 'transform_matrix' and 'camera_angle_x'")
    try:
        camera_to_world = torch.tensor(
            [frame["transform_matrix"] for frame in frames], dtype=torch.float32, device="cpu"
        )
        angle = torch.tensor(
            [frame.get("camera_angle_x", shared) for frame in frames], dtype=torch.float32, device="cpu"
        )
    except (TypeError, ValueError):
        raise InputError("camera transforms: a transform_matrix or camera_angle_x is not made of numbers") from None
    if camera_to_world.shape[1:] != (4, 4):
        raise InputError(f"each transform_matrix must be 4 x 4, got {tuple(camera_to_world.shape[1:])}")
    if not bool(camera_to_world.isfinite().all()) or not bool(((angle > 0) & (angle < math.pi)).all()):
        raise InputError("camera transforms: matrices must be finite and camera_angle_x in 0..pi")
    camera_to_world[:, :3, 1:3] *= -1  # OpenGL looks along -z with y up
    try:
        return Cameras(torch.linalg.inv(camera_to_world), _intrinsics(angle))
    except RuntimeError:
        raise InputError("camera transforms: a transform_matrix cannot be inverted") from None


def transforms_from_cameras(cameras: Cameras) -> list[dict[str, Any]]:
    """The frames of a `transforms.json`: the inverse of `cameras_from_transforms`."""
    camera_to_world = torch.linalg.inv(cameras.world_to_camera.double())
    camera_to_world[:, :3, 1:3] *= -1
    angle = 2 * torch.atan(0.5 / cameras.intrinsics[:, 0, 0].double())
    return [
        {"transform_matrix": matrix, "camera_angle_x": value}
        for matrix, value in zip(camera_to_world.tolist(), angle.tolist(), strict=True)
    ]


def _intrinsics(field_of_view: Tensor) -> Tensor:
    """[V] radians -> [V, 3, 3] float32, in units of the image."""
    intrinsics = torch.zeros(len(field_of_view), 3, 3, device="cpu")
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = 0.5 / torch.tan(field_of_view.float() / 2)
    intrinsics[:, :2, 2] = 0.5
    intrinsics[:, 2, 2] = 1.0
    return intrinsics
