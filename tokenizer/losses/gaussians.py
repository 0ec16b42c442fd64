"""Rendered Gaussians: how far drawn views are from real ones.

    L1 = mean |c - c_hat|,  L2 = mean (c - c_hat)^2,  A = mean |alpha - alpha_hat|,  each in [0, 1] for values in 0..1

c are colours over black, so that what is transparent in the original must be black or transparent; A asks for
transparent. The paper names L1 for 3D (PAPER 2); `weights` says why the others are there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.gaussians.rasterize import Rendering


@dataclass(frozen=True, slots=True)
class RenderingTerms:
    """The terms of one asset, each a scalar: the mean over views, pixels and colours."""

    l1: Tensor
    l2: Tensor
    coverage: Tensor


def rendering_terms(rendering: Rendering, pictures: Tensor) -> RenderingTerms:
    """Compare drawn views with real ones.

    Args:
        rendering: of V views over a black background.
        pictures: uint8 [V, H, W, 4], the real views, colours not multiplied by alpha; moved to the rendering's device.

    Returns:
        Scalars in float32 (float64 for float64 Gaussians).

    Raises:
        InputError: pictures of another number or size than the drawn ones.
    """
    if pictures.shape != (*rendering.alpha.shape, 4):
        raise InputError(
            f"views drawn as {list(rendering.alpha.shape)} are compared with pictures [V, H, W, 4] of the same sizes, "
            f"got {list(pictures.shape)}"
        )
    wanted = pictures.to(rendering.colours.device).to(rendering.colours.dtype) / 255
    alpha = wanted[..., 3]
    difference = rendering.colours - wanted[..., :3] * alpha[..., None]
    return RenderingTerms(
        l1=difference.abs().mean(),
        l2=difference.square().mean(),
        coverage=(rendering.alpha - alpha).abs().mean(),
    )
