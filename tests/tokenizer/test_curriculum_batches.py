"""Steps of several micro-batches a task: the same loss however samples are spread, in step in all processes."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import Batch
from data.config import open_training_loader
from data.mixture import Task
from data.samples import Item
from tests.tokenizer.curriculum_data import ROOT, StubTower, lines, make_sets, pictures_alone, smoke
from tokenizer.errors import InputError
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum.launch import train
from tokenizer.training.curriculum.preparation import NOTHING, Latest, Patches, Preparer, in_parts, stream_seed
from tokenizer.training.curriculum.processes import Processes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    make_sets(folder)
    return folder


def batch_of(sizes: list[int]) -> Batch:
    items = [Item(str(number), "s", Task.IMAGE_RECONSTRUCTION, tokens) for number, tokens in enumerate(sizes)]
    return Batch(Task.IMAGE_RECONSTRUCTION, items)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 12))
def test_batches_are_split_into_as_many_as_wanted_and_none_is_empty(sizes: list[int], number: int) -> None:
    parts = in_parts([batch_of(sizes)], number)
    assert len(parts) == min(number, len(sizes))
    assert all(part.items for part in parts)
    assert [item.id for part in parts for item in part.items] == [str(place) for place in range(len(sizes))]


def test_the_largest_is_split_in_the_middle_of_its_tokens() -> None:
    assert [part.ids for part in batch_of([1, 1, 1, 3]).split()] == [["0", "1", "2"], ["3"]]
    assert [part.ids for part in batch_of([9, 1]).split()] == [["0"], ["1"]]
    parts = in_parts([batch_of([9]), batch_of([2, 3]), batch_of([2, 2])], 4)
    assert [part.num_tokens for part in parts] == [9, 2, 3, 4]
    with pytest.raises(InputError, match="a batch of 1 items cannot be split"):
        batch_of([9]).split()


def test_patches_of_one_micro_batch_at_a_time_are_kept() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def make(number: int) -> SparseTokens:
        tokens = SparseTokens(
            torch.full((number, 3), float(number)), torch.zeros(number, 4, dtype=torch.int32), [number]
        )
        made.append(weakref.ref(tokens.features))
        return tokens

    latest = Latest()
    first, second = (Patches(functools.partial(make, number), latest) for number in (2, 3))
    assert first.tokens() is first.tokens()
    assert second.tokens().num_tokens == 3
    assert [kept() is not None for kept in made] == [False, True]
    # What is counted after a step makes nothing anew.
    assert (first.places().num_tokens, second.places().num_tokens, len(made)) == (2, 3, 2)
    assert torch.equal(first.tokens().features, torch.full((2, 3), 2.0))
    assert [kept() is not None for kept in made] == [False, False, True]


def test_the_loss_does_not_depend_on_how_samples_are_spread(sets: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "tokenizer" / "curriculum_batches_worker.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=sets, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    whole: dict[str, Any] = torch.load(tmp_path / "whole-0.pt")
    assert all(len(taken) == 4 for taken in whole["taken"])  # two tasks in two turns
    for name in ("parts", "ddp", "fsdp2"):
        other: dict[str, Any] = torch.load(tmp_path / f"{name}-0.pt")
        assert max(len(taken) for taken in other["taken"]) > (4 if name == "parts" else 2)
        for before, after in zip(whole["losses"], other["losses"], strict=True):
            assert before == pytest.approx(after, rel=1e-9, abs=1e-9)
        for part in ("model", "average"):
            for tensor, expected in zip(other[part].values(), whole[part].values(), strict=True):
                torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)
    for layout in ("ddp", "fsdp2"):
        first, second = (torch.load(tmp_path / f"{layout}-{rank}.pt") for rank in (0, 1))
        # They were given different numbers, in one case even more micro-batches than the other has samples.
        assert first["given"] != second["given"]
        assert first["taken"] == second["taken"]
        assert first["idle"] + second["idle"] > 0
        assert all(Counter(found) >= Counter(had) for found, had in zip(first["taken"], first["given"], strict=True))


def test_a_task_counts_by_its_turns_and_noise_by_its_place(sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sets)
    changes = ("start={kind: scratch}", "data.batches={image_understanding: 9, video_reconstruction: 9}")
    config = smoke(3, *changes, "data.ratios={video_reconstruction: 1, image_reconstruction: 1}")
    # Samples of tasks that are not drawn any more would be refused.
    sources = [source for source in config.data["sources"] if "asset" not in source["task"]]
    data = {**config.data, "sources": [s for s in sources if s["task"] != "video_understanding"]}
    loader = open_training_loader(data, seed=0, rank=0, world=1, quarantine_file=None)
    turns = [next(loader), next(loader)]
    preparer = Preparer(Processes(CPU), CPU, (4, 16, 16), StubTower(), None, 5, None)
    parts = preparer(turns, 7)
    assert [part.task for part in parts] == [str(batch.task) for turn in turns for batch in turn]
    counts = Counter(part.task for part in parts)
    assert counts["video_reconstruction"] == 2
    assert {part.task: part.share for part in parts} == {
        "image_understanding": 1.0,
        "video_reconstruction": 0.5,
        "image_reconstruction": 0.5,
    }
    assert len({part.seed for part in parts}) == len(parts)
    firsts = {(part.task, part.share): part.seed for part in reversed(parts)}
    assert firsts["image_understanding", 1.0] == stream_seed(5, 7, 0, 0)
    assert {seed for (task, _), seed in firsts.items() if task != "image_understanding"} == {
        stream_seed(5, 7, 1, 0),
        stream_seed(5, 7, 1, 1),
    }
    items = [part.totals.items for part in parts if part.task == "video_reconstruction"]
    assert items == [9, 9]
    assert NOTHING not in [part.totals for part in parts]


def test_a_run_with_several_micro_batches_goes_on_and_keeps_them_where_a_step_is_bad(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizer.training.curriculum.torch_engine import TorchEngine

    monkeypatch.chdir(sets)
    right, calls = TorchEngine.forward_backward, iter(range(100))

    def wrong(self: TorchEngine, prepared: Any) -> dict[str, float]:
        found = right(self, prepared)
        return {**found, "loss": float("nan")} if next(calls) == 1 else found

    changes = ("data.batches={image_reconstruction: 9}", "data.budgets.image_reconstruction=20", "checkpoint.every=2")
    quick = ("validation={}", "log.pictures_every=3", f"out={tmp_path}/run")
    monkeypatch.setattr(TorchEngine, "forward_backward", wrong)
    assert train(pictures_alone("steps=2", *changes, *quick), CPU) == 0
    assert train(pictures_alone("steps=6", *changes, *quick), CPU) == 0
    monkeypatch.setattr(TorchEngine, "forward_backward", right)
    kept = torch.load(tmp_path / "run" / "bad-steps" / "step-000001-process-0.pt", weights_only=True)
    assert len(kept) > 1
    assert sum(len(part["ids"]) for part in kept) == sum(len(part["captions"]) for part in kept) == 9
    rows = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in rows] == [1, 2, 3, 4, 5, 6]
    assert not any(name.startswith("too large") for name in rows[-1])
    assert (tmp_path / "run" / "pictures" / "step-000003" / "image_reconstruction.png").exists()


def test_samples_too_large_for_a_batch_are_in_the_log(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sets)
    changes = ("data.budgets.image_reconstruction=5", "data.max_broken=0.0", "steps=12", "validation={}")
    assert train(pictures_alone(*changes, f"out={tmp_path}/run", "log.pictures_every=100"), CPU) == 0
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["too large/image_reconstruction"] > 0
    assert '"cause": "too large"' in (tmp_path / "run" / "quarantine.jsonl").read_text()
