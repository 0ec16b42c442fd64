"""Fréchet distance of two sets of features, from statistics that stream and merge.

    d = |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))         (Heusel et al. 2017, arXiv 1706.08500, equation 6)

The root of the product is where implementations part: C1 C2 is not symmetric, and its root by a general routine comes
out complex or fails for singular covariances. Here each covariance is C = A' A, and the trace of the root is the sum of
the singular values of A1 A2', which is real and never negative. With more samples than features, A comes from the
eigenvectors of C; with fewer, A is the centred features themselves, so the distance is exact for singular covariances,
and takes milliseconds.

Everything is float64 on the CPU. A float32 sum over 50,000 samples is wrong in the digits that tokenizers differ in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenizer.errors import InputError


class FeatureStatistics:
    """Number, mean and covariance of features that arrive in batches of any size.

    Features are kept as they are until there are more of them than channels; from then on, blocks of as many samples as
    channels are folded into mean and scatter (sum of centred outer products) by the update of Chan et al. 1979. So the
    result does not depend on the batch size at all, on the order and on how samples were spread over processes only by
    rounding, and memory is at most two matrices of width x width.

    Args:
        width: channels of a feature.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._folded = 0
        self._mean = torch.zeros(width, dtype=torch.float64)
        self._scatter: Tensor | None = None
        self._rows: list[Tensor] = []
        self._waiting = 0

    @property
    def count(self) -> int:
        """Samples so far."""
        return self._folded + self._waiting

    def update(self, features: Tensor) -> None:
        """Add samples.

        Args:
            features: floating [B, width], on any device.

        Raises:
            InputError: another shape, or a value that is not finite; nothing has been added then.
        """
        if features.ndim != 2 or features.shape[1] != self.width:
            raise InputError(f"statistics of {self.width} features take [B, {self.width}], not {list(features.shape)}")
        rows = features.detach().to("cpu", torch.float64, copy=True)
        if not bool(rows.isfinite().all()):
            raise InputError("a feature is not finite: the pictures it was computed from are damaged")
        self._rows.append(rows)
        self._waiting += len(rows)
        # Blocks of exactly `width` samples, whatever the batches were: rounding is the same for every batch size.
        while self._waiting > self.width:
            waiting = self._waiting_rows()
            self._fold(waiting[: self.width])
            self._set_rows(waiting[self.width :].clone())

    def merge(self, other: FeatureStatistics) -> None:
        """Add the samples of `other`, which stays as it is. No sample may be in both: sums cannot be told apart.

        Raises:
            InputError: another width.
        """
        if other.width != self.width:
            raise InputError(f"statistics of {other.width} features cannot be added to those of {self.width}")
        if other._scatter is not None:
            self._add(other._folded, other._mean, other._scatter)
        for rows in list(other._rows):
            self.update(rows)

    @property
    def mean(self) -> Tensor:
        """float64 [width]; needs a sample."""
        shift: Tensor = (self._waiting_rows() - self._mean).sum(dim=0) / self.count
        return self._mean + shift

    @property
    def covariance(self) -> Tensor:
        """Unbiased, float64 [width, width]; needs two samples."""
        whole = FeatureStatistics(self.width)
        if self._scatter is not None:
            whole._add(self._folded, self._mean, self._scatter)
        if self._waiting:
            whole._fold(self._waiting_rows())
        scatter = torch.zeros(self.width, self.width) if whole._scatter is None else whole._scatter
        return scatter / (self.count - 1)

    def factor(self) -> Tensor:
        """A with A' A = covariance: float64 [count, width] for at most `width` samples, else [width, width]."""
        if self._scatter is None:
            factor: Tensor = (self._waiting_rows() - self.mean) / math.sqrt(self.count - 1)
        else:
            values, vectors = torch.linalg.eigh(self.covariance)
            # Eigenvalues that are zero come out as small as rounding, and of either sign.
            factor = values.clamp_min(0).sqrt()[:, None] * vectors.T
        return factor

    def state(self) -> dict[str, Tensor]:
        """All there is to know, as tensors for a file or another process; `from_state` reads it."""
        state = {
            "count": torch.tensor(self._folded),
            "mean": self._mean.clone(),
            "rows": self._waiting_rows(),
        }
        return state if self._scatter is None else {**state, "scatter": self._scatter.clone()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> FeatureStatistics:
        """Statistics equal to those whose `state` this is.

        Raises:
            InputError: a tensor is missing or has another shape or type.
        """
        width = state["mean"].numel() if "mean" in state else 0
        shapes = {"count": (), "mean": (width,), "rows": (-1, width)}
        if "scatter" in state:
            shapes["scatter"] = (width, width)
        for name, shape in shapes.items():
            value = state.get(name)
            fits = value is not None and value.ndim == len(shape)
            if value is None or not fits or any(a not in (-1, b) for a, b in zip(shape, value.shape, strict=True)):
                raise InputError(f"state of feature statistics: '{name}' is missing or has another shape: start anew")
        result = cls(width)
        result._folded = int(state["count"])
        result._mean = state["mean"].double().clone()
        result._scatter = state["scatter"].double().clone() if "scatter" in state else None
        result._set_rows(state["rows"].double().clone())
        return result

    def _waiting_rows(self) -> Tensor:
        return torch.cat([torch.empty(0, self.width, dtype=torch.float64), *self._rows])

    def _set_rows(self, rows: Tensor) -> None:
        self._rows, self._waiting = ([rows] if len(rows) else []), len(rows)

    def _fold(self, rows: Tensor) -> None:
        mean = rows.mean(dim=0)
        centred = rows - mean
        self._add(len(rows), mean, centred.T @ centred)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances"."""
        if self._scatter is None:
            self._scatter = torch.zeros(self.width, self.width, dtype=torch.float64)
        total = self._folded + count
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(shift, shift, alpha=self._folded * count / total)
        self._mean += shift * (count / total)
        self._folded = total


@dataclass(frozen=True, slots=True)
class FrechetDistance:
    """A Fréchet distance, and what it was computed from.

    Attributes:
        value: `from_means` + `from_covariances`, never negative.
        from_means: squared distance of the means.
        from_covariances: the rest; the paper splits its figure in the same way (section 2).
        samples: number of samples of either side.
        width: number of features.
        warning: one line for people if the covariances are singular, else None.
    """

    value: float
    from_means: float
    from_covariances: float
    samples: tuple[int, int]
    width: int
    warning: str | None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "value": self.value,
            "from_means": self.from_means,
            "from_covariances": self.from_covariances,
            "samples": list(self.samples),
            "features": self.width,
            "warning": self.warning,
        }


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> FrechetDistance:
    """Distance of two sets of features, taken to be Gaussian.

    With n samples and D features it takes O(n^2 D) where n <= D, else O(D^3): about 15 s at D = 2048 on one core.

    Raises:
        InputError: widths that differ, or fewer than two samples on a side.
    """
    if first.width != second.width:
        raise InputError(
            f"a Fréchet distance needs features of one network, not {first.width} and {second.width} of them"
        )
    if min(first.count, second.count) < 2:
        raise InputError(
            f"a Fréchet distance needs at least two samples on either side, not {first.count} and {second.count}"
        )
    a, b = first.factor(), second.factor()
    from_means = float((first.mean - second.mean).square().sum())
    traces = float(a.square().sum() + b.square().sum())
    # Equal sets give a difference of rounding errors, of either sign.
    from_covariances = max(0.0, traces - 2 * float(torch.linalg.svdvals(a @ b.T).sum()))
    samples = first.count, second.count
    return FrechetDistance(
        value=from_means + from_covariances,
        from_means=from_means,
        from_covariances=from_covariances,
        samples=samples,
        width=first.width,
        warning=_warning(samples, first.width),
    )


def _warning(samples: tuple[int, int], width: int) -> str | None:
    if min(samples) > width:
        return None
    counts = f"{samples[0]}" if samples[0] == samples[1] else f"{samples[0]} and {samples[1]}"
    return (
        f"{counts} samples for {width} features: covariances are singular and the distance is biased; "
        f"compare it only with distances of as many samples, or give more than {width}"
    )
