"""How far apart two results are, in one number that no NaN hides from: `max` passes over one that is not its first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers; infinity if one is not finite."""
    known = list(values)
    return max(known) if all(map(math.isfinite, known)) else math.inf


def of_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference of any tensor, relative to the largest value of that tensor; infinite for other names."""
    if found.keys() != expected.keys():
        return math.inf
    return largest(
        float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-6))
        for name in expected
    )
