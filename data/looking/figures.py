"""Figures of a set from the measures of its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.samples import Item

QUANTITIES = (
    *("width", "height", "aspect", "frames", "seconds", "frames_per_second"),
    *("voxels", "tokens", "caption_characters", "caption_words"),
)
"""What may be measured, in the order in which it is told."""

TOP_LABELS = 30

_QUANTILES = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}


@dataclass(slots=True)
class Figures:
    """Collects the measures of samples."""

    samples: int = 0
    captions: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, item: Item) -> None:
        """Count a sample as `data.looking.look.Look` gives it."""
        self.samples += 1
        self.captions += item.caption is not None
        if item.facts["label"] is not None:
            self.labels[item.facts["label"]] += 1
        for name in QUANTITIES:
            if name in item.facts:
                self.values.setdefault(name, []).append(float(item.facts[name]))

    def array(self, name: str) -> NDArray[np.float64]:
        """All values of a quantity, in the order of the samples; empty where it is not measured."""
        return np.array(self.values.get(name, []), dtype=np.float64)

    def as_json(self) -> dict[str, Any]:
        """Shares, quantiles and the most frequent labels."""
        labelled = self.labels.total()
        return {
            "looked_at": self.samples,
            "with_caption": self.captions / max(1, self.samples),
            "with_label": labelled / max(1, self.samples),
            "quantities": {name: quantiles(self.array(name)) for name in QUANTITIES if name in self.values},
            "labels": len(self.labels),
            "most_frequent_labels": [list(pair) for pair in self.top_labels()],
        }

    def top_labels(self) -> list[tuple[str, int]]:
        """The most frequent ones with their counts; equals in alphabetical order."""
        return sorted(self.labels.items(), key=lambda pair: (-pair[1], pair[0]))[:TOP_LABELS]


def quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    """ "min", "5%", "median", "95%", "max" and "mean"; quantiles are values that occur."""
    found = np.quantile(values, list(_QUANTILES.values()), method="inverted_cdf")
    told = {name: float(value) for name, value in zip(_QUANTILES, found, strict=True)}
    return told | {"mean": float(values.mean())}


def table(figures: Mapping[str, Any]) -> list[Sequence[str]]:
    """Rows of a table for people: a quantity and its quantiles."""
    return [
        (name.replace("_", " "), *(number(value) for value in quantity.values()))
        for name, quantity in figures["quantities"].items()
    ]


def number(value: float) -> str:
    """Four digits, without an exponent for what is counted."""
    return f"{value:.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.4g}"
