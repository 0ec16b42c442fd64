"""`rasterize`: Gaussians and cameras in, pictures out; one function over two engines.

The torch engine runs everywhere, in float32 and float64; `projection`, `tiles` and `rasterize_torch` describe it, in
this order. On CUDA the package gsplat is faster where it is installed. Both give the same pictures but for the limits
stated in `rasterize_gsplat`.

Shape legend: M Gaussians, V views, H x W pixels.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenizer.cameras import Cameras
from tokenizer.errors import InputError
from tokenizer.gaussians import rasterize_gsplat, rasterize_torch
from tokenizer.gaussians.attributes import Gaussians
from tokenizer.model.precision import full_precision

Engine = Literal["auto", "torch", "gsplat"]

KERNEL_SIZE = 0.1
"""Variance of the mip filter of the released renderer, in square pixels (FORMAT 11)."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """Pictures of V views.

    colours: [V, H, W, 3] over the background, in the units of the Gaussians' colours (display values, 0..1).
    alpha: [V, H, W] in 0..1, what the Gaussians cover.
    depth: [V, H, W] mean z before the camera of what covers the pixel, in world units; 0 where nothing does.
    """

    colours: Tensor
    alpha: Tensor
    depth: Tensor


def rasterize(
    gaussians: Gaussians,
    cameras: Cameras,
    size: int | tuple[int, int],
    *,
    background: tuple[float, float, float] | Tensor = (0.0, 0.0, 0.0),
    kernel_size: float = KERNEL_SIZE,
    near: float = 0.01,
    engine: Engine = "auto",
) -> Rendering:
    """Draw the Gaussians of one asset from every camera.

    Args:
        gaussians: one asset; of a batch, take `gaussians[i]`.
        cameras: V views; they are moved to the Gaussians' device and dtype.
        size: (H, W), or one number for square pictures. Pixel (row i, column j) is seen through its centre,
            ((j + 0.5) / W, (i + 0.5) / H) in the units of the intrinsics.
        background: colour [3] behind everything, or a picture [H, W, 3] or [V, H, W, 3].
        kernel_size: variance in square pixels of the mip filter, which widens every Gaussian and dims it by as much.
        near: Gaussians whose centre has less z before the camera are not drawn, in world units.
        engine: "torch", "gsplat" (in float32), or "auto": gsplat for float32 on CUDA if it is installed, else torch.

    Returns:
        A `Rendering`, differentiable with respect to all attributes of the Gaussians (once) and to the background.

    Raises:
        InputError: a batch of several assets, a bad size or argument, Gaussians that are not finite, or no gsplat.
    """
    if len(gaussians.lengths) != 1:
        raise InputError(f"rasterize draws one asset, got a batch of {len(gaussians.lengths)}; draw gaussians[i]")
    return rasterize_tensors(
        gaussians.means,
        gaussians.scales,
        gaussians.rotations,
        gaussians.opacities,
        gaussians.colours,
        cameras,
        size,
        background=background,
        kernel_size=kernel_size,
        near=near,
        engine=engine,
    )


def rasterize_tensors(
    means: Tensor,
    scales: Tensor,
    rotations: Tensor,
    opacities: Tensor,
    colours: Tensor,
    cameras: Cameras,
    size: int | tuple[int, int],
    *,
    background: tuple[float, float, float] | Tensor = (0.0, 0.0, 0.0),
    kernel_size: float = KERNEL_SIZE,
    near: float = 0.01,
    engine: Engine = "auto",
) -> Rendering:
    """`rasterize` for plain tensors.

    Args:
        means / scales: [M, 3] in world units.
        rotations: [M, 4] unit quaternions (w, x, y, z).
        opacities: [M, 1] or [M], in 0..1.
        colours: [M, 3].

    The other arguments, the result and the errors are those of `rasterize`. Half types are drawn in float32.
    """
    height, width = _size(size)
    if not 0 < kernel_size < math.inf or not 0 < near < math.inf:
        raise InputError(f"kernel_size and near must be positive, got {kernel_size} and {near}")
    dtype, device = full_precision(means.dtype), means.device
    attributes = {"means": means, "scales": scales, "rotations": rotations, "opacities": opacities, "colours": colours}
    means, scales, rotations, opacities, colours = (
        _checked(name, tensor, len(means), dtype) for name, tensor in attributes.items()
    )
    cameras = cameras.to(device, dtype)
    if not bool(cameras.world_to_camera.isfinite().all() & cameras.intrinsics.isfinite().all()):
        raise InputError("a camera's matrix is not finite; check world_to_camera and intrinsics")
    behind = _background(background, (len(cameras), height, width), means)
    draw = rasterize_torch.draw if choose_engine(engine, device, dtype) == "torch" else rasterize_gsplat.draw
    # Half precision would move Gaussians by whole pixels.
    with torch.autocast(device.type, enabled=False):
        picture, depth, alpha = draw(
            means, scales, rotations, opacities, colours, cameras, (height, width), kernel_size=kernel_size, near=near
        )
        return Rendering(colours=picture + (1.0 - alpha[..., None]) * behind, alpha=alpha, depth=depth)


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise InputError(f"size must be (height, width) of at least one pixel, got {size}")
    return height, width


def _checked(name: str, tensor: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """An attribute in `dtype`, opacities as [M]."""
    columns = {"rotations": 4, "opacities": 1}.get(name, 3)
    if name == "opacities" and tensor.ndim == 1:
        tensor = tensor[:, None]
    if tensor.shape != (count, columns):
        raise InputError(f"{name} of {count} Gaussians must be [{count}, {columns}], got {list(tensor.shape)}")
    broken = ~tensor.isfinite().all(1)
    if bool(broken.any()):
        raise InputError(f"{name} of {int(broken.sum())} of {count} Gaussians are not finite; leave those out")
    tensor = tensor.to(dtype)
    return tensor[:, 0] if columns == 1 else tensor


def _background(background: tuple[float, float, float] | Tensor, shape: tuple[int, int, int], like: Tensor) -> Tensor:
    behind = torch.as_tensor(background, dtype=like.dtype, device=like.device)
    if tuple(behind.shape) not in ((3,), (*shape[1:], 3), (*shape, 3)):
        raise InputError(
            f"background must be [3], {[*shape[1:], 3]} or {[*shape, 3]} for these views, got {list(behind.shape)}"
        )
    return behind


def choose_engine(
    engine: Engine, device: torch.device, dtype: torch.dtype = torch.float32
) -> Literal["torch", "gsplat"]:
    """The engine that `rasterize` uses for Gaussians of `dtype` on `device`; `InputError` if there is none such."""
    if engine not in ("auto", "torch", "gsplat"):
        raise InputError(f"engine must be 'auto', 'torch' or 'gsplat', got {engine!r}")
    if engine == "gsplat" and device.type != "cuda":
        raise InputError(f"the engine 'gsplat' draws on CUDA alone, but the Gaussians are on {device}; use 'torch'")
    if engine == "auto":
        fast = device.type == "cuda" and dtype == torch.float32 and importlib.util.find_spec("gsplat") is not None
        return "gsplat" if fast else "torch"
    return engine
