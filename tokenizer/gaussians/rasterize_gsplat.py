"""The gsplat engine: the same pictures from the CUDA kernels of the package gsplat (nerfstudio project).

`rasterize_mode="antialiased"` with `eps2d` is the mip filter of `projection`: the same variance on the diagonal, the
same ratio of determinants in the opacity. What remains different:

- gsplat has no least filter ratio, so that Gaussians seen exactly edge on are dimmed further (by 0.005 at most);
- some releases of it clamp alpha at 0.99, ours at 0.999 (0.01 at most, behind Gaussians that are nearly opaque);
- it works in float32, so that here and there an alpha falls on the other side of the cut at 1 / 255.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tokenizer.cameras import Cameras
from tokenizer.errors import require_package

TOLERANCE = 0.012
"""To the torch engine, of colour, alpha or depth; one pixel in a thousand may exceed it, by up to three times."""


def draw(
    means: Tensor,
    scales: Tensor,
    rotations: Tensor,
    opacities: Tensor,
    colours: Tensor,
    cameras: Cameras,
    size: tuple[int, int],
    *,
    kernel_size: float,
    near: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Colours [V, H, W, 3] over black, mean depth [V, H, W] and alpha [V, H, W], in the dtype of `means`.

    Arguments are those of `rasterize_tensors`, checked there; opacities are [M].

    Raises:
        InputError: gsplat is not installed.
    """
    require_package("gsplat", "drawing Gaussians with its CUDA kernels (engine 'gsplat')")
    gsplat = import_module("gsplat")

    height, width = size
    if not len(means) or not len(cameras):
        empty = means.new_zeros(len(cameras), height, width)
        return empty[..., None].expand(-1, -1, -1, 3), empty, empty
    pixels = torch.tensor([[width], [height], [1.0]], device=means.device, dtype=means.dtype)
    arguments: dict[str, Any] = {
        "means": means,
        "quats": rotations,
        "scales": scales,
        "opacities": opacities,
        "colors": colours,
        "viewmats": cameras.world_to_camera,
        "Ks": cameras.intrinsics * pixels,
    }
    layers, alpha, _ = gsplat.rasterization(
        **{name: tensor.float().contiguous() for name, tensor in arguments.items()},
        width=width,
        height=height,
        near_plane=near,
        eps2d=kernel_size,
        rasterize_mode="antialiased",
        render_mode="RGB+ED",
        packed=True,
    )
    layers, alpha = layers.to(means.dtype), alpha.to(means.dtype)
    return layers[..., :3], layers[..., 3], alpha[..., 0]
