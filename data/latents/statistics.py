"""Mean and spread of each latent channel over a set, as generators need them to normalise.

Moments are summed in float64 shard by shard, and shards joined in their order (Chan, Golub and LeVeque 1983), so the
result does not depend on how many processes shared the work, and none of them reads a latent twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """Of `tokens` tokens: the mean of each channel and the sum of its squared deviations from it, and the mean of the
    variances that the posterior gives; each [C]."""

    tokens: int
    mean: Values
    squares: Values
    variance: Values

    @classmethod
    def of(cls, means: NDArray[Any], logvars: NDArray[Any]) -> Moments:
        """Of one sample: means and log-variances [N, C], as they are stored."""
        latents = means.astype(np.float64)
        mean = latents.mean(axis=0)
        variance = np.exp(logvars.astype(np.float64)).mean(axis=0)
        return cls(len(latents), mean, np.square(latents - mean).sum(axis=0), variance)

    def __add__(self, other: Moments) -> Moments:
        tokens = self.tokens + other.tokens
        share, step = other.tokens / tokens, other.mean - self.mean
        return Moments(
            tokens,
            self.mean + step * share,
            self.squares + other.squares + np.square(step) * (self.tokens * share),
            self.variance + (other.variance - self.variance) * share,
        )

    def as_facts(self) -> dict[str, Any]:
        """What a manifest tells: per channel the mean and standard deviation of the posterior's means, and the average
        variance of the posterior itself. Latents that are drawn have the variance std^2 + posterior_variance."""
        return {
            "tokens": self.tokens,
            "mean": self.mean.tolist(),
            "std": np.sqrt(self.squares / self.tokens).tolist(),
            "posterior_variance": self.variance.tolist(),
        }

    def as_json(self) -> dict[str, Any]:
        """Everything, without loss."""
        arrays = {"mean": self.mean, "squares": self.squares, "variance": self.variance}
        return {"tokens": self.tokens, **{name: array.tolist() for name, array in arrays.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Moments:
        """The inverse of `as_json`."""
        arrays = (np.array(values[name], dtype=np.float64) for name in ("mean", "squares", "variance"))
        return cls(int(values["tokens"]), *arrays)
