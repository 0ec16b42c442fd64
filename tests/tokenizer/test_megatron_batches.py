"""Batch sizes with Megatron: several micro-batches of a task in a step are the plain engine's step at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tokenizer.megatron_batches_processes import NAMES
from tests.tokenizer.megatron_runs import found, run_worker
from tests.tokenizer.megatron_training_processes import WORLDS
from tests.tokenizer.test_megatron_training import CLOSE, difference, needs_megatron

pytestmark = needs_megatron


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_worker(tmp_path_factory.mktemp("megatron_batches"), "megatron_batches_processes")


@pytest.mark.parametrize("name", NAMES[1:])
def test_steps_of_many_micro_batches_are_those_of_the_plain_engine(runs: Path, name: str) -> None:
    plain = found(runs, "plain")
    for rank in range(WORLDS[name]):
        ours = found(runs, name, rank)
        for mine, theirs in zip(ours["steps"], plain["steps"], strict=True):
            assert difference(mine, theirs) < CLOSE
        assert difference(ours["seen"], plain["seen"]) < CLOSE


def test_data_parallel_processes_have_as_many_micro_batches_though_one_is_idle(runs: Path) -> None:
    first, second, plain = found(runs, "dp", 0), found(runs, "dp", 1), found(runs, "plain")
    assert first["taken"] == second["taken"]
    assert first["idle"] + second["idle"] > 0
    # Two tasks a step, in two turns where one process has both.
    assert any(len(tasks) > 4 for tasks in plain["taken"])
    assert any(len(tasks) > 2 for tasks in first["taken"])
