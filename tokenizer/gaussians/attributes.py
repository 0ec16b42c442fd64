"""Raw output of the Gaussian decoder -> Gaussians with positions, colours, scales, rotations and opacities (FORMAT 11).

Shape legend: M Gaussians of a batch, G Gaussians of a voxel, B items.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.gaussians.config import GaussianDecoderConfig
from tokenizer.model.precision import at_least_float32
from tokenizer.sparse import SparseTokens

SH_DEGREE_0 = 0.28209479177387814
"""The constant spherical harmonic, 1 / (2 sqrt(pi))."""


@dataclass(frozen=True, slots=True)
class Gaussians:
    """Gaussians of a batch of assets, item after item, voxel after voxel.

    The fields are what an optimiser or a .ply file holds; the properties are what a renderer needs.

    unit_positions: [M, 3], in the unit cube, whose voxels the tokens sit on.
    dc: [M, 3] coefficients of the constant spherical harmonic, one for each colour.
    raw_scales: [M, 3] before bias and softplus.
    raw_rotations: [M, 4] (w, x, y, z), to be added to the identity and normalised.
    raw_opacities: [M, 1] before bias and sigmoid.
    lengths: [B] int64 on the CPU, Gaussians of each item.
    minimum_scale / initial_scale / initial_opacity: constants of the decoder that made them.
    """

    unit_positions: Tensor
    dc: Tensor
    raw_scales: Tensor
    raw_rotations: Tensor
    raw_opacities: Tensor
    lengths: Tensor
    minimum_scale: float
    initial_scale: float
    initial_opacity: float

    def __len__(self) -> int:
        """M, the number of Gaussians."""
        return len(self.unit_positions)

    @property
    def positions(self) -> Tensor:
        """[M, 3] centres in the world, whose cube reaches from -0.5 to 0.5."""
        return self.unit_positions - 0.5

    @property
    def colours(self) -> Tensor:
        """[M, 3] red, green, blue, from 0; nominally at most 1."""
        return (SH_DEGREE_0 * self.dc + 0.5).clamp_min(0.0)

    @property
    def scales(self) -> Tensor:
        """[M, 3] standard deviations along the three axes, in world units."""
        bias = self.initial_scale + math.log(-math.expm1(-self.initial_scale))
        return torch.sqrt(F.softplus(self.raw_scales + bias).square() + self.minimum_scale**2)

    @property
    def unnormalised_rotations(self) -> Tensor:
        """[M, 4] quaternions (w, x, y, z) around the identity, of any length; what .ply files hold."""
        return torch.cat([self.raw_rotations[:, :1] + 1.0, self.raw_rotations[:, 1:]], dim=1)

    @property
    def rotations(self) -> Tensor:
        """[M, 4] unit quaternions (w, x, y, z)."""
        return F.normalize(self.unnormalised_rotations, dim=-1)

    @property
    def opacity_logits(self) -> Tensor:
        """[M, 1] logits of `opacities`."""
        return self.raw_opacities + math.log(self.initial_opacity / (1.0 - self.initial_opacity))

    @property
    def opacities(self) -> Tensor:
        """[M, 1] in 0..1."""
        return torch.sigmoid(self.opacity_logits)

    @property
    def covariances(self) -> Tensor:
        """[M, 6] covariance matrices R S S^T R^T, upper triangle xx, xy, xz, yy, yz, zz."""
        spread = rotation_matrices(self.rotations) * self.scales[:, None, :]
        full = spread @ spread.transpose(1, 2)
        rows, columns = torch.triu_indices(3, 3, device=full.device)
        return full[:, rows, columns]

    def __getitem__(self, item: int) -> Gaussians:
        """The Gaussians of one asset of the batch."""
        if not -len(self.lengths) <= item < len(self.lengths):
            raise IndexError(f"item {item} of a batch of {len(self.lengths)}")
        item %= len(self.lengths)
        first = int(self.lengths[:item].sum())
        rows = slice(first, first + int(self.lengths[item]))
        return replace(
            self,
            unit_positions=self.unit_positions[rows],
            dc=self.dc[rows],
            raw_scales=self.raw_scales[rows],
            raw_rotations=self.raw_rotations[rows],
            raw_opacities=self.raw_opacities[rows],
            lengths=self.lengths[item : item + 1],
        )

    def __iter__(self) -> Iterator[Gaussians]:
        return (self[item] for item in range(len(self.lengths)))


def raw_to_gaussians(raw: SparseTokens, perturbation: Tensor, config: GaussianDecoderConfig) -> Gaussians:
    """Interpret the output of the network.

    Args:
        raw: [N, 14 G]: position 3G, colour 3G, scale 3G, rotation 4G, opacity G; inside each, Gaussian after Gaussian.
        perturbation: [G, 3] from `offset_perturbation`.
        config: constants.

    Returns:
        N * G Gaussians, voxel after voxel, in float32 at least.
    """
    groups = at_least_float32(raw.features).split([size * config.gaussians for size in (3, 3, 3, 4, 1)], dim=-1)
    position, dc, scale, rotation, opacity = (
        group.unflatten(-1, (config.gaussians, -1)) * factor
        for group, factor in zip(groups, config.factors, strict=True)
    )
    centre = (raw.positions[:, None, 1:].to(position.dtype) + 0.5) / config.resolution
    offset = torch.tanh(position + perturbation.to(position.dtype)) * (0.5 * config.voxel_size / config.resolution)
    return Gaussians(
        unit_positions=(centre + offset).flatten(0, 1),
        dc=dc.flatten(0, 1),
        raw_scales=scale.flatten(0, 1),
        raw_rotations=rotation.flatten(0, 1),
        raw_opacities=opacity.flatten(0, 1),
        lengths=raw.lengths * config.gaussians,
        minimum_scale=config.minimum_scale,
        initial_scale=config.initial_scale,
        initial_opacity=config.initial_opacity,
    )


def offset_perturbation(count: int, voxel_size: float) -> Tensor:
    """[count, 3] float32: raw offsets that spread the Gaussians of a voxel evenly before anything is learned.

    The Hammersley points h(g) = (g / G, radical inverses of g to bases 2 and 3), as atanh((2 h - 1) / voxel_size).
    """
    points = [(g / count, _radical_inverse(g, 2), _radical_inverse(g, 3)) for g in range(count)]
    return torch.atanh((2.0 * torch.tensor(points, dtype=torch.float64) - 1.0) / voxel_size).float()


def _radical_inverse(number: int, base: int) -> float:
    """The digits of `number` mirrored at the point: 6 = 110 in base 2 becomes 0.011 = 0.375."""
    value, weight = 0.0, 1.0 / base
    while number:
        number, digit = divmod(number, base)
        value += digit * weight
        weight /= base
    return value


def rotation_matrices(quaternions: Tensor) -> Tensor:
    """Unit quaternions [M, 4] (w, x, y, z) -> rotation matrices [M, 3, 3]."""
    w, x, y, z = quaternions.unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
