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


def fit_codes(
    patches: Tensor, codes: int, channels: int, iterations: int, generator: torch.Generator, *, common: bool = False
) -> FittedCodes:
    """Alternate between assigning patches to subspaces and one step of subspace iteration for each.

    PSNR is a relative measure, so each place counts by the inverse of the error that a single linear code makes there:
    otherwise rough textures would own all the codes.

    Args:
        patches: [places, n, F] float; places x n well above codes x channels.
        codes, channels: K and c.
        iterations: rounds; the error falls with each and settles after about a dozen.
        generator: decides the random start.
        common: the last code is fitted to all patches, whichever code they belong to, each as much as any other: for
            what is rare and unlike the rest, as a cut is in a film.
    """
    weights = _relative_weights(patches, channels, generator)
    patches = patches.flatten(0, 1)
    count = len(patches)
    everything = torch.arange(count)
    start = _start(patches.shape[1], channels, generator)
    start_mean = _mean(patches, weights)
    for _ in range(6):
        start = _refine(patches - start_mean, weights, start)
    label = torch.randint(codes, (count,), generator=generator)
    means, bases = [start_mean] * codes, [start] * codes
    for round_number in range(iterations):
        for k in range(codes):
            mine, weight = everything[label == k], weights
            if common and k == codes - 1:
                mine, weight = everything, torch.ones_like(weights)
            elif len(mine) < 3 * channels:  # a starved code starts again from random patches
                mine = torch.randint(count, (20 * channels,), generator=generator)
            means[k] = _mean(patches[mine], weight[mine])
            for _ in range(3 if round_number == 0 else 1):
                bases[k] = _refine(patches[mine] - means[k], weight[mine], bases[k])
        errors = torch.stack([_error(patches - mean, basis) for mean, basis in zip(means, bases, strict=True)], dim=1)
        label = errors.argmin(dim=1)
    spreads = []
    for k in range(codes):
        coefficients = (patches[label == k] - means[k]) @ bases[k]
        # Principal axes inside the subspace: uncorrelated channels, strongest first.
        _, axes = torch.linalg.eigh(coefficients.T @ coefficients)
        bases[k] = bases[k] @ axes.flip(1)
        power = (coefficients @ axes.flip(1)).square().sum(dim=0) / max(1, len(coefficients))  # a code may own nothing
        spreads.append(power.sqrt().clamp_min(1e-3))
    error = float(errors.min(dim=1).values.mean()) / patches.shape[1]
    return FittedCodes(torch.stack(means), torch.stack(bases).transpose(1, 2), torch.stack(spreads), error)


def _relative_weights(patches: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """[places * n]: one over the mean error of a single linear code at each place, floored, with mean 1."""
    flat = patches.flatten(0, 1)
    centred = flat - flat.mean(dim=0)
    basis, one = _start(flat.shape[1], channels, generator), torch.ones(len(flat))
    for _ in range(8):
        basis = _refine(centred, one, basis)
    error = _error(centred, basis).clamp_min(0).view(patches.shape[:2]).mean(dim=1)
    weights = 1 / (error + 0.2 * error.median() + 1e-6)  # a store of flat pictures has no error at all
    relative: Tensor = (weights / weights.mean()).repeat_interleave(patches.shape[1])
    return relative


def _start(features: int, channels: int, generator: torch.Generator) -> Tensor:
    start: Tensor = torch.linalg.qr(torch.randn(features, channels, generator=generator)).Q
    return start


def _mean(patches: Tensor, weights: Tensor) -> Tensor:
    mean: Tensor = weights @ patches / weights.sum()
    return mean


def principal_components(centred: Tensor, count: int) -> Tensor:
    """[F, count] orthonormal columns, strongest first."""
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    strongest: Tensor = vectors[:, -count:].flip(1)
    return strongest


def _refine(centred: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
    """One step of subspace iteration on the weighted covariance."""
    refined: Tensor = torch.linalg.qr(centred.T @ (weights[:, None] * (centred @ basis))).Q
    return refined


def _error(centred: Tensor, basis: Tensor) -> Tensor:
    """Squared distance of each row from the span of the columns, [n]."""
    error: Tensor = centred.square().sum(dim=1) - (centred @ basis).square().sum(dim=1)
    return error
