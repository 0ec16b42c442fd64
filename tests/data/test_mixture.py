"""Mixtures: ratios that hold after every single draw, and schedules that go on where they stopped."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mixture import ASSET_STAGE, IMAGE_STAGE, VIDEO_STAGE, Mixture, RoundRobin, Source, Task
from tokenizer.errors import InputError
from tokenizer.training.curriculum.tasks import TASKS

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
WEIGHT = st.one_of(st.integers(1, 60), st.fractions(Fraction(1, 9), 9, max_denominator=9))
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=14)

SOURCES = (
    Source(name="alt-text", task=Task.IMAGE_UNDERSTANDING, samples=5000),
    Source(name="photographs", task=Task.IMAGE_RECONSTRUCTION, samples=300),
    Source(name="emoji", task=Task.IMAGE_RECONSTRUCTION, samples=100),
    Source(name="captioned-clips", task=Task.VIDEO_UNDERSTANDING, samples=40),
    Source(name="films", task=Task.VIDEO_RECONSTRUCTION, samples=100),
    Source(name="games", task=Task.VIDEO_RECONSTRUCTION, samples=100, weight=Fraction(1, 2)),
    Source(name="captioned-furniture", task=Task.ASSET_UNDERSTANDING, samples=7),
    Source(name="furniture", task=Task.ASSET_RECONSTRUCTION, samples=9),
)


def robin(weights: list[int | Fraction]) -> RoundRobin:
    return RoundRobin({f"source {i}": weight for i, weight in enumerate(weights)})


def assert_within_one(counts: dict[str, int], weights: dict[str, Fraction]) -> None:
    share = Fraction(sum(counts.values())) / sum(weights.values())
    assert all(abs(counts.get(name, 0) - share * weight) < 1 for name, weight in weights.items())


@QUICK
@given(WEIGHTS, st.integers(1, 150))
def test_every_count_is_within_one_of_its_share_after_every_draw(weights: list[int | Fraction], draws: int) -> None:
    schedule = robin(weights)
    counts: Counter[str] = Counter()
    for _ in range(draws):
        counts[schedule.draw()] += 1
        assert_within_one(counts, {f"source {i}": Fraction(weight) for i, weight in enumerate(weights)})


def test_weights_that_break_the_rule_of_the_largest_deficit() -> None:
    weights: list[int | Fraction] = [40, 20, 5, 2, 40, 1, 20, 20, 1]
    schedule = robin(weights)
    for _ in range(sum(schedule.weights.values())):
        schedule.draw()
        assert_within_one(schedule.counts, {f"source {i}": Fraction(weight) for i, weight in enumerate(weights)})
    assert list(schedule.counts.values()) == weights


@QUICK
@given(WEIGHTS, st.integers(0, 60), st.integers(1, 40))
def test_schedules_go_on_where_they_stopped(weights: list[int | Fraction], before: int, after: int) -> None:
    whole, resumed = robin(weights), robin(weights)
    for _ in range(before):
        whole.draw()
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert [resumed.draw() for _ in range(after)] == [whole.draw() for _ in range(after)]


def test_a_long_run_stays_exact() -> None:
    schedule = RoundRobin({"a": 10**12 + 39, "b": Fraction(1, 7), "c": 3})
    start = {name: weight * 10**6 for name, weight in schedule.weights.items()}
    schedule.load_state_dict({"weights": schedule.weights, "counts": start})
    assert [schedule.draw() for _ in range(3)] == ["a"] * 3


def test_tasks_have_the_names_that_training_knows() -> None:
    """The trainer may not know this room, so it names the tasks itself."""
    assert tuple(Task) == TASKS


def drawn_sources(mixture: Mixture) -> list[Source]:
    return [mixture.draw(task) for task in mixture.step()]


@pytest.mark.parametrize(("ratios", "steps"), [(VIDEO_STAGE, 9), (ASSET_STAGE, 9), (IMAGE_STAGE, 1)])
def test_the_stages_of_the_paper(ratios: dict[Task, int], steps: int) -> None:
    mixture = Mixture([s for s in SOURCES if s.task in ratios or s.task == Task.IMAGE_UNDERSTANDING], ratios)
    for _ in range(3):
        drawn = [drawn_sources(mixture) for _ in range(steps)]
        assert all(always.name == "alt-text" for always, _ in drawn)
        assert Counter(source.task for _, source in drawn) == ratios


def test_sources_share_a_task_by_size_and_weight() -> None:
    mixture = Mixture(SOURCES, ASSET_STAGE)
    counts = Counter(source.name for _ in range(54) for source in drawn_sources(mixture))
    assert {name: counts[name] for name in ("photographs", "emoji")} == {"photographs": 9, "emoji": 3}
    assert {name: counts[name] for name in ("films", "games")} == {"films": 16, "games": 8}


@QUICK
@given(st.integers(0, 70))
def test_mixtures_go_on_where_they_stopped(before: int) -> None:
    whole, resumed = Mixture(SOURCES, ASSET_STAGE), Mixture(SOURCES, ASSET_STAGE)
    for _ in range(before):
        drawn_sources(whole)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed.load_state_dict(state)
    assert [drawn_sources(resumed) for _ in range(20)] == [drawn_sources(whole) for _ in range(20)]
    steps = Mixture(SOURCES, ASSET_STAGE)
    steps.load_state_dict(state, steps_only=True)
    resumed.load_state_dict(state)
    assert [steps.step() for _ in range(20)] == [resumed.step() for _ in range(20)]
    assert steps.draw(Task.VIDEO_RECONSTRUCTION) == Mixture(SOURCES, ASSET_STAGE).draw(Task.VIDEO_RECONSTRUCTION)


def test_states_of_other_mixtures_are_refused() -> None:
    state = Mixture(SOURCES, ASSET_STAGE).state_dict()
    video = Mixture([s for s in SOURCES if not s.task.startswith("asset")], VIDEO_STAGE)
    with pytest.raises(InputError, match="asset_understanding"):
        video.load_state_dict(state)
    grown = [Source(name=s.name, task=s.task, samples=s.samples + 1) for s in SOURCES]
    with pytest.raises(InputError, match="same sources and sizes"):
        Mixture(grown, ASSET_STAGE).load_state_dict(state)


@pytest.mark.parametrize(
    ("sources", "ratios", "message"),
    [
        ((*SOURCES, SOURCES[1]), ASSET_STAGE, "given twice: photographs"),
        (SOURCES[:-1], ASSET_STAGE, "no source for asset_reconstruction"),
        (SOURCES, VIDEO_STAGE, "never drawn: captioned-furniture, furniture"),
        (SOURCES, {**ASSET_STAGE, Task.IMAGE_UNDERSTANDING: 1}, "in every step and in the ratios"),
        (SOURCES, {**ASSET_STAGE, Task.VIDEO_RECONSTRUCTION: 44.4}, "got 44.4"),
        (SOURCES, {**ASSET_STAGE, Task.VIDEO_RECONSTRUCTION: 0}, "must be positive"),
        (
            (Source(name="none", task=Task.IMAGE_RECONSTRUCTION, samples=0), *SOURCES),
            ASSET_STAGE,
            "none: sizes and weights must be positive",
        ),
        (
            (Source(name="half", task=Task.IMAGE_RECONSTRUCTION, samples=4, weight=0.5), *SOURCES),  # type: ignore[arg-type]
            ASSET_STAGE,
            "half: sizes and weights must be positive",
        ),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(sources: tuple[Source, ...], ratios: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mixture(sources, ratios)


def test_a_schedule_needs_a_name() -> None:
    with pytest.raises(InputError, match="at least one"):
        RoundRobin({})
