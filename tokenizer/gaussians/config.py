"""Sizes and constants of the Gaussian decoder, checked when they are made (FORMAT 11)."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizer.assets.rules import PackingRule
from tokenizer.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class GaussianDecoderConfig:
    """The network and the meaning of its output; the defaults are the released ones.

    width / depth / heads / mlp_width: channels, blocks, attention heads, hidden channels of the MLP.
    inputs: channels of a voxel token, the first frame of a decoded patch.
    window: voxels along an edge of an attention window; every second block shifts its windows by half of it.
    resolution: voxels along an edge of the unit cube.
    gaussians: Gaussians for each voxel.
    voxel_size: how far a Gaussian may lie from the centre of its voxel, in voxel widths from end to end.
    minimum_scale: added in quadrature to every scale, in units of the cube.
    initial_scale / initial_opacity: what the network gives where its output is zero, before `minimum_scale`.
    factors: what the raw output is multiplied with: position, colour, scale, rotation, opacity.
    skip: a linear layer beside the transformer, from the voxel token straight to the raw output. For small models,
        which it lets start at a linear fit (`tokenizer.training.gaussian_start`); released ones have none.
    packing: how the voxels were packed that the decoder was trained on.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    inputs: int = 768
    window: int = 8
    resolution: int = 64
    gaussians: int = 32
    voxel_size: float = 1.5
    minimum_scale: float = 9e-4
    initial_scale: float = 4e-3
    initial_opacity: float = 0.1
    factors: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 0.1, 1.0)
    skip: bool = False
    packing: PackingRule = "released"

    def __post_init__(self) -> None:
        for name in ("width", "heads", "mlp_width", "inputs", "resolution", "gaussians"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.depth < 0:
            raise InputError(f"depth must not be negative, got {self.depth}")
        if self.width % self.heads:
            raise InputError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width < 6:
            raise InputError(f"width {self.width} has no room for the sine and cosine of three axes; use 6 or more")
        if self.window < 2 or self.window % 2:
            raise InputError(f"window must be even and at least 2, got {self.window}")
        if self.voxel_size <= 1:
            raise InputError(f"voxel_size must be more than 1 (the offsets fill a whole voxel), got {self.voxel_size}")
        if self.initial_scale <= 0 or not 0 < self.initial_opacity < 1:
            raise InputError(
                f"initial_scale must be positive and initial_opacity in (0, 1), got {self.initial_scale} and "
                f"{self.initial_opacity}"
            )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def outputs(self) -> int:
        """Raw channels of a voxel: 3 position, 3 colour, 3 scale, 4 rotation, 1 opacity for each Gaussian."""
        return 14 * self.gaussians
