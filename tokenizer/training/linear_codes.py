"""Fitting K linear codes to patches: each patch belongs to the code that reconstructs it best (K-subspaces)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class FittedCodes:
    """means [K, F], bases [K, c, F] with orthonormal rows, spreads [K, c] of the coefficients, mean squared error."""

    means: Tensor
    bases: Tensor
    spreads: Tensor
    error: float


def fit_codes(patches: Tensor, codes: int, channels: int, iterations: int, generator: torch.Generator) -> FittedCodes:
    """Alternate between assigning patches to subspaces and one step of subspace iteration for each.

    Args:
        patches: [n, F] float, n well above codes x channels.
        codes, channels: K and c.
        iterations: rounds; the error falls with each and settles after about a dozen.
        generator: decides the random start.
    """
    count = len(patches)
    start_mean = patches.mean(dim=0)
    start = torch.linalg.qr(torch.randn(patches.shape[1], channels, generator=generator))[0]
    for _ in range(6):
        start = _refine(patches - start_mean, start)
    label = torch.randint(codes, (count,), generator=generator)
    means, bases = [start_mean] * codes, [start] * codes
    for round_number in range(iterations):
        for k in range(codes):
            mine = patches[label == k]
            if len(mine) < 3 * channels:  # a starved code starts again from random patches
                mine = patches[torch.randint(count, (20 * channels,), generator=generator)]
            means[k] = mine.mean(dim=0)
            centred = mine - means[k]
            for _ in range(3 if round_number == 0 else 1):
                bases[k] = _refine(centred, bases[k])
        errors = torch.stack([_error(patches - mean, basis) for mean, basis in zip(means, bases, strict=True)], dim=1)
        label = errors.argmin(dim=1)
    spreads = []
    for k in range(codes):
        coefficients = (patches[label == k] - means[k]) @ bases[k]
        # Principal axes inside the subspace: uncorrelated channels, strongest first.
        _, axes = torch.linalg.eigh(coefficients.T @ coefficients)
        bases[k] = bases[k] @ axes.flip(1)
        spreads.append((coefficients @ axes.flip(1)).square().mean(dim=0).sqrt().clamp_min(1e-3))
    error = float(errors.min(dim=1).values.mean()) / patches.shape[1]
    return FittedCodes(torch.stack(means), torch.stack(bases).transpose(1, 2), torch.stack(spreads), error)


def principal_components(centred: Tensor, count: int) -> Tensor:
    """[F, count] orthonormal columns, strongest first."""
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors[:, -count:].flip(1)


def _refine(centred: Tensor, basis: Tensor) -> Tensor:
    refined: Tensor = torch.linalg.qr(centred.T @ (centred @ basis))[0]
    return refined


def _error(centred: Tensor, basis: Tensor) -> Tensor:
    """Squared distance of each row from the span of the columns, [n]."""
    return centred.square().sum(dim=1) - (centred @ basis).square().sum(dim=1)
