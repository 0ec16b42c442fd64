"""Batch sizes with Megatron: several micro-batches of a task in a step are the plain engine's step at every layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tokenizer.curriculum_data import ROOT, make_sets
from tests.tokenizer.megatron_batches_processes import NAMES
from tests.tokenizer.megatron_training_processes import WORLDS
from tests.tokenizer.test_megatron_training import CLOSE, difference, needs_megatron

pytestmark = needs_megatron


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron_batches")
    make_sets(folder)
    arguments = [sys.executable, "-m", "tests.tokenizer.megatron_batches_processes", str(folder)]
    subprocess.run(arguments, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


def found(runs: Path, name: str, rank: int = 0) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((runs / f"{name}-{rank}.json").read_text())
    return values


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
