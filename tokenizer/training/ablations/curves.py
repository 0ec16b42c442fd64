"""What runs have measured, by step: from their own validation, or from what `perception` made of their checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizer.errors import InputError
from tokenizer.training.ablations.perception import MEASURED
from tokenizer.training.ablations.plan import Study, Variant
from tokenizer.training.curriculum.records import METRICS, SPEED, lines_of

_VALIDATION = "validation/"

Points = list[tuple[int, float]]
"""Step and value, in the order of the steps."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What something took. seconds: of training, with the validations in between but not the last."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.steps + other.steps, self.tokens + other.tokens, self.seconds + other.seconds)


def cost_of(run: Path) -> Cost:
    """What a run took."""
    trained = [line for line in lines_of(run / METRICS) if "tokens" in line]
    if not trained:
        raise InputError(f"{run / METRICS}: has no step in it; remove the run and train it again")
    seconds = sum(float(line["seconds"]) for line in lines_of(run / SPEED))
    return Cost(int(trained[-1]["step"]), int(trained[-1]["tokens"]), seconds)


def points_of(run: Path, column: str, *, perceptual: bool) -> Points:
    """The values of one figure; steps that have none are left out."""
    name = column if perceptual else _VALIDATION + column
    lines = lines_of(run / (MEASURED if perceptual else METRICS))
    return [(int(line["step"]), float(line[name])) for line in lines if line.get(name) is not None]


@dataclass(frozen=True, slots=True)
class Curves:
    """Of one variant.

    points: by column, over the steps of all its runs. borders: steps at which a run follows another. cost: of all runs.
    """

    points: dict[str, Points]
    borders: list[int]
    cost: Cost

    def final(self, column: str) -> float | None:
        """The last value of a figure, where there is one."""
        return self.points[column][-1][1] if self.points[column] else None


def curves_of(study: Study, variant: Variant, folder: Path) -> Curves:
    """Curves over all runs of a variant, one behind the other.

    Args:
        folder: of the study's runs.
    """
    points: dict[str, Points] = {column: [] for column in study.columns}
    first = study.run(variant.runs[0]).after
    if study.perceptual and first is not None:  # validation measures step 0 by itself
        for column in study.columns:
            points[column] += [(0, value) for _, value in points_of(folder / first, column, perceptual=True)[-1:]]
    cost, borders = Cost(), []
    for number, name in enumerate(variant.runs):
        if number:
            borders.append(cost.steps)
        for column in study.columns:
            found = points_of(folder / name, column, perceptual=study.perceptual)
            # A run begins where the one before has ended, and has measured the same again.
            points[column] += [(cost.steps + step, value) for step, value in found if step or not number]
        cost += cost_of(folder / name)
    return Curves(points, borders, cost)
