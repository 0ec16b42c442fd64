"""`Gaussians`: 3D Gaussians as files, viewers and rasterisers want them, and how the decoder's raw output becomes them.

The type is the same whether a network wrote the Gaussians or a file held them: nothing in it belongs to a decoder
(FORMAT 11). Shape legend: M Gaussians of a batch, G Gaussians of a voxel, N voxels, B assets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.gaussians.config import GaussianDecoderConfig
from tokenizer.model.precision import at_least_float32
from tokenizer.sparse import SparseTokens

SH_DEGREE_0 = 0.28209479177387814
"""The constant spherical harmonic, 1 / (2 sqrt(pi))."""

CHANNELS = {"means": 3, "scales": 3, "quaternions": 4, "dc": 3, "opacity_logits": 1}
"""Columns of the fields of `Gaussians`: 14 numbers describe one Gaussian."""


@dataclass(frozen=True, slots=True)
class Gaussians:
    """The Gaussians of a batch of assets, one asset after the other; all floating fields share dtype and device.

    means: [M, 3] centres in the world; a normalised asset fills the cube from -0.5 to 0.5, z up.
    scales: [M, 3] standard deviations along the Gaussian's own axes, positive, in world units.
    quaternions: [M, 4] (w, x, y, z) from its own axes to the world's, of any length but zero.
    dc: [M, 3] coefficients of the constant spherical harmonic, one for each colour.
    opacity_logits: [M, 1] logits of the opacity at the centre.
    lengths: [B] int64 on the CPU, Gaussians of each asset, M in all.

    Raises:
        InputError: a shape is another one, or `lengths` does not add up to M.
    """

    means: Tensor
    scales: Tensor
    quaternions: Tensor
    dc: Tensor
    opacity_logits: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        for name, width in CHANNELS.items():
            shape = tuple(getattr(self, name).shape)
            if shape != (len(self.means), width):
                raise InputError(f"{name} of Gaussians must be [{len(self.means)}, {width}], got {list(shape)}")
        total = int(self.lengths.sum())
        if total != len(self.means):
            raise InputError(f"lengths of Gaussians add up to {total}, but there are {len(self.means)}")

    def __len__(self) -> int:
        """M, the number of Gaussians; `len(gaussians.lengths)` is the number of assets."""
        return len(self.means)

    @property
    def rotations(self) -> Tensor:
        """[M, 4] unit quaternions (w, x, y, z)."""
        return F.normalize(self.quaternions, dim=-1)

    @property
    def opacities(self) -> Tensor:
        """[M, 1] in 0..1."""
        return torch.sigmoid(self.opacity_logits)

    @property
    def colours(self) -> Tensor:
        """[M, 3] red, green, blue, display values from 0; nominally at most 1."""
        return (SH_DEGREE_0 * self.dc + 0.5).clamp_min(0.0)

    @property
    def covariances(self) -> Tensor:
        """[M, 6] covariance matrices R S S^T R^T, upper triangle xx, xy, xz, yy, yz, zz."""
        spread = rotation_matrices(self.rotations) * self.scales[:, None, :]
        full = spread @ spread.transpose(1, 2)
        rows, columns = torch.triu_indices(3, 3, device=full.device)
        return full[:, rows, columns]

    def __getitem__(self, item: int) -> Gaussians:
        """The Gaussians of one asset of the batch, as a batch of one."""
        if not -len(self.lengths) <= item < len(self.lengths):
            raise IndexError(f"item {item} of a batch of {len(self.lengths)}")
        item %= len(self.lengths)
        first = int(self.lengths[:item].sum())
        rows = slice(first, first + int(self.lengths[item]))
        return self.select(rows, self.lengths[item : item + 1])

    def __iter__(self) -> Iterator[Gaussians]:
        return (self[item] for item in range(len(self.lengths)))

    def select(self, rows: Tensor | slice, lengths: Tensor | None = None) -> Gaussians:
        """Some of the Gaussians.

        Args:
            rows: integers [K] in the order wanted, bool [M], or a slice; of the whole batch.
            lengths: [B] int64 on the CPU, how many of them each asset gets; by default they become one asset.
        """
        chosen = {name: getattr(self, name)[rows] for name in CHANNELS}
        return Gaussians(
            **chosen, lengths=torch.tensor([len(chosen["means"])], device="cpu") if lengths is None else lengths
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Gaussians:
        """The same on another device or in another floating dtype; `lengths` stays on the CPU."""
        moved = {name: getattr(self, name).to(device=device, dtype=dtype) for name in CHANNELS}
        return Gaussians(**moved, lengths=self.lengths)

    def detach(self) -> Gaussians:
        """The same values, without their history of gradients."""
        return Gaussians(**{field.name: getattr(self, field.name).detach() for field in fields(self)})


class RawParameters(NamedTuple):
    """The raw output of the decoder, one row for each Gaussian, with the config's factors applied.

    positions: [M, 3] centres in the unit cube, whose voxels the tokens sit on.
    dc: [M, 3] as in `Gaussians`.
    scales: [M, 3] before bias, softplus and minimum.
    rotations: [M, 4] to be added to the identity quaternion.
    opacities: [M, 1] logits before bias.
    """

    positions: Tensor
    dc: Tensor
    scales: Tensor
    rotations: Tensor
    opacities: Tensor


def raw_parameters(raw: SparseTokens, perturbation: Tensor, config: GaussianDecoderConfig) -> RawParameters:
    """Take the output of the network apart; arguments as for `raw_to_gaussians`."""
    groups = at_least_float32(raw.features).split([size * config.gaussians for size in (3, 3, 3, 4, 1)], dim=-1)
    position, dc, scale, rotation, opacity = (
        group.unflatten(-1, (config.gaussians, -1)) * factor
        for group, factor in zip(groups, config.factors, strict=True)
    )
    centre = (raw.positions[:, None, 1:].to(position.dtype) + 0.5) / config.resolution
    offset = torch.tanh(position + perturbation.to(position.dtype)) * (0.5 * config.voxel_size / config.resolution)
    return RawParameters(*(group.flatten(0, 1) for group in (centre + offset, dc, scale, rotation, opacity)))


def raw_to_gaussians(raw: SparseTokens, perturbation: Tensor, config: GaussianDecoderConfig) -> Gaussians:
    """Interpret the output of the network.

    Args:
        raw: [N, 14 G]: position 3G, colour 3G, scale 3G, rotation 4G, opacity G; inside each, Gaussian after Gaussian.
        perturbation: [G, 3] from `offset_perturbation`.
        config: constants.

    Returns:
        N * G Gaussians, voxel after voxel, in float32 at least.
    """
    parameters = raw_parameters(raw, perturbation, config)
    scale_bias = config.initial_scale + math.log(-math.expm1(-config.initial_scale))  # inverse of softplus
    opacity_bias = math.log(config.initial_opacity / (1.0 - config.initial_opacity))  # inverse of the sigmoid
    return Gaussians(
        means=parameters.positions - 0.5,
        scales=torch.sqrt(F.softplus(parameters.scales + scale_bias).square() + config.minimum_scale**2),
        quaternions=torch.cat([parameters.rotations[:, :1] + 1.0, parameters.rotations[:, 1:]], dim=1),
        dc=parameters.dc,
        opacity_logits=parameters.opacities + opacity_bias,
        lengths=raw.lengths * config.gaussians,
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
