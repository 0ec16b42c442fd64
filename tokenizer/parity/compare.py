"""How close is close enough: one rule for each kind of tensor, and the row of the table that comes out.

Tolerances (FORMAT 14, 16), relative to the standard deviation of the recorded tensor unless it says otherwise:

    computed in     networks     resized pixels     integers and copied pixels
    float32         1e-4         1e-5 absolute      exact
    float64         1e-9, or 1e-6 where the recording was rounded to float32
    bfloat16        root mean square 3e-2, largest 2.5e-1; at most 5% of quantised codes differ

The reference in bfloat16 differs from itself in float32 by about 1% root mean square; two bfloat16 computations that
round differently are a little further apart. A code differs where a latent lies close to a rounding boundary.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_TOLERANCE = 1e-4
FLOAT64_TOLERANCE = 1e-9
ROUNDED_TOLERANCE = 1e-6
PIXEL_TOLERANCE = 1e-5
BFLOAT16_RMS_TOLERANCE = 3e-2
BFLOAT16_MAX_TOLERANCE = 2.5e-1
BFLOAT16_CODES_TOLERANCE = 5e-2

_HALF_ULP = 2.0**-24


class Rule(enum.Enum):
    """What a recorded tensor is compared as."""

    NETWORK = "network"
    PIXELS = "pixels"
    CODES = "codes"
    EXACT = "exact"


@dataclass(frozen=True, slots=True)
class Value:
    """What this project computes for one recorded tensor."""

    tensor: Tensor
    rule: Rule = Rule.NETWORK


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report.

    file / tensor: where; the tensor is empty for a line about the whole file.
    dtype: the precision it was computed in, or that of the recording for inputs.
    error / tolerance / measure: "max/std", "rms/std", "max" or "differing"; None where nothing was compared.
    verdict: "ok", "input" or "ignored"; anything else is a failure.
    detail: why, for failures.
    """

    file: str
    tensor: str
    dtype: str
    verdict: str
    error: float | None = None
    tolerance: float | None = None
    measure: str = ""
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.verdict in ("ok", "input", "ignored")


def compare(file: str, name: str, value: Value, recorded: Tensor, dtype: torch.dtype, rounded: bool) -> Row:
    """Compare one tensor.

    Args:
        value: what was computed, in `dtype` where that matters.
        recorded: what the reference gave.
        rounded: the recording holds a float64 result rounded to float32.
    """
    ours, theirs = value.tensor.detach().cpu(), recorded
    kind = dtype_name(dtype if value.rule is Rule.NETWORK else theirs.dtype)
    if ours.shape != theirs.shape:
        detail = f"computed {list(ours.shape)}, recorded {list(theirs.shape)}"
        return Row(file, name, kind, "wrong shape", detail=detail)
    measures = _measures(value.rule, ours, theirs, dtype, rounded)
    # The first measure out of tolerance is the one worth telling; NaN is out of any tolerance.
    measure, error, tolerance = next((m for m in measures if not m[1] <= m[2]), measures[0])
    return Row(file, name, kind, "ok" if error <= tolerance else "out of tolerance", error, tolerance, measure)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measures(
    rule: Rule, ours: Tensor, theirs: Tensor, dtype: torch.dtype, rounded: bool
) -> list[tuple[str, float, float]]:
    """(measure, error, tolerance), all of which must hold."""
    difference = (ours.double() - theirs.double()).abs()
    if not difference.numel():
        return [("max", 0.0, 0.0)]
    largest = float(difference.max())
    half = dtype in (torch.bfloat16, torch.float16)
    if rule is Rule.CODES and half:
        return [("differing", float((difference > 0).double().mean()), BFLOAT16_CODES_TOLERANCE)]
    if rule in (Rule.EXACT, Rule.CODES):
        return [("max", largest, 0.0)]
    if rule is Rule.PIXELS:
        return [("max", largest, PIXEL_TOLERANCE)]
    scale = spread(theirs)
    if half:
        rms = float(difference.square().mean().sqrt())
        return [
            ("rms/std", rms / scale, BFLOAT16_RMS_TOLERANCE),
            ("max/std", largest / scale, BFLOAT16_MAX_TOLERANCE),
        ]
    if rounded:
        # What the rounding of the recording itself may add is not our error.
        largest = float((difference - _HALF_ULP * theirs.double().abs()).clamp_min(0).max())
        return [("max/std", largest / scale, ROUNDED_TOLERANCE)]
    return [("max/std", largest / scale, FLOAT64_TOLERANCE if theirs.dtype == torch.float64 else FLOAT32_TOLERANCE)]


def spread(recorded: Tensor) -> float:
    """Standard deviation; of a constant tensor its magnitude, of zeros 1."""
    values = recorded.double()
    deviation = float(values.std()) if values.numel() > 1 else 0.0
    magnitude = float(values.abs().max())
    # A spread that is only rounding noise on a constant says nothing about its scale.
    if deviation > 1e-6 * magnitude:
        return deviation
    return magnitude or 1.0
