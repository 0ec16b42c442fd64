"""The loader as a run uses it: many workers, many processes, kills, broken samples, and the same batches after all."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.faults import Quarantine
from data.fetch import Workers
from data.loader import Loader
from data.mixture import Task
from data.shards.manifest import ShardSet
from tests.data.loading import BUDGETS, IMAGE, UNDERSTOOD, VIDEO, TinyDecoder, feed, feeds, ids, load, steps, tiny_set
from tokenizer.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ShardSet]:
    folder = tmp_path_factory.mktemp("sets")
    return {name: tiny_set(folder, name, n, each) for name, n, each in (("a", 50, 9), ("b", 25, 25), ("v", 31, 8))}


def one_epoch(sets: dict[str, ShardSet], rank: int, world: int) -> Loader:
    """One source, one epoch, this process's share of it."""
    chosen = [feed(sets["a"], TinyDecoder("a", IMAGE), epochs=1)]
    return Loader(chosen, ratios={IMAGE: 1}, budgets=BUDGETS, seed=3, every_step=(), rank=rank, world=world)


def test_batches_are_packed_of_one_task_and_in_exact_ratio(sets: dict[str, ShardSet]) -> None:
    loader = load(sets)
    drawn = [next(loader) for _ in range(300)]
    assert all(first.task == UNDERSTOOD for first, _ in drawn)
    assert Counter(second.task for _, second in drawn) == {IMAGE: 200, VIDEO: 100}
    for batch in (batch for step in drawn for batch in step):
        assert 0 < sum(item.tokens for item in batch.items) <= BUDGETS[batch.task]
        assert {item.task for item in batch.items} == {batch.task}
    pictures = Counter(item.source for _, batch in drawn for item in batch.items if batch.task == IMAGE)
    # As many samples as the sources' sizes say; what packing holds back makes the difference.
    assert abs(pictures["a"] - 2 * pictures["b"]) <= 2 * 64
    report = loader.reports[IMAGE]
    assert report.running.largest <= 2
    assert report.running.batches == 200


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(sets: dict[str, ShardSet], workers: int) -> None:
    with load(sets) as alone, load(sets, workers=workers) as together:
        assert steps(together, 40) == steps(alone, 40)
    assert not multiprocessing.active_children()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.integers(0, 40))
def test_a_run_goes_on_exactly(sets: dict[str, ShardSet], before: int) -> None:
    whole, resumed = load(sets), load(sets)
    steps(whole, before)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed.load_state_dict([state])
    assert resumed.state_dict() == state
    assert steps(resumed, 25) == steps(whole, 25)


def test_a_run_goes_on_with_other_workers(sets: dict[str, ShardSet]) -> None:
    whole = load(sets)
    with load(sets, workers=2) as first:
        assert steps(first, 17) == steps(whole, 17)
        state = first.state_dict()
    with load(sets, workers=1) as second:
        second.load_state_dict([state])
        assert steps(second, 17) == steps(whole, 17)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    amounts=st.lists(st.integers(0, 6), min_size=4, max_size=4),
)
def test_another_number_of_processes_loses_and_repeats_nothing(
    sets: dict[str, ShardSet], before: int, after: int, amounts: list[int]
) -> None:
    seen: Counter[str] = Counter()
    states = []
    for rank in range(before):
        loader = one_epoch(sets, rank, before)
        for _ in range(amounts[rank]):
            if (batches := next(loader, None)) is not None:
                seen.update(ids(batches)[0])
        states.append(loader.state_dict())
    for rank in range(after):
        loader = one_epoch(sets, rank, after)
        loader.load_state_dict(states)
        for batches in loader:
            seen.update(ids(batches)[0])
    assert len(seen) == 50
    assert set(seen.values()) == {1}


def test_kill_and_resume_at_any_moment(sets: dict[str, ShardSet], tmp_path: Path) -> None:
    """A run that is killed with SIGKILL again and again writes the same ids as one that is not."""
    program = tmp_path / "run.py"
    program.write_text(
        textwrap.dedent(
            """
            import json, sys
            from pathlib import Path
            from data.shards.manifest import read_set
            from tests.data.loading import load
            from tokenizer.atomic import atomic_path

            if __name__ == "__main__":
                folder, log, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
                checkpoint = log.with_suffix(".json")
                loader = load({name: read_set(folder / name) for name in "abv"})
                lines = []
                if checkpoint.exists():
                    state = json.loads(checkpoint.read_text())
                    loader.load_state_dict([state["loader"]])
                    lines = state["lines"]
                while len(lines) < count:
                    lines.append([[item.id for item in batch.items] for batch in next(loader)])
                    with atomic_path(checkpoint) as path:
                        path.write_text(json.dumps({"loader": loader.state_dict(), "lines": lines}))
                loader.close()
            """
        )
    )
    folder = Path(sets["a"].shards[0].url).parents[1]
    log, environment = tmp_path / "log", {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program), str(folder), str(log), "120"]
    checkpoint = log.with_suffix(".json")
    for kill in range(2):
        process = subprocess.Popen(command, env=environment, cwd=ROOT)
        wanted = 25 * (kill + 1)
        while not (checkpoint.exists() and len(json.loads(checkpoint.read_text())["lines"]) >= wanted):
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=120)
    assert json.loads(checkpoint.read_text())["lines"] == steps(load(sets), 120)


def test_a_signal_to_all_processes_of_a_job_ends_no_worker(sets: dict[str, ShardSet]) -> None:
    """A cluster that takes a machine back sends SIGTERM to all; the run goes on until it has saved, then ends them."""
    healthy = steps(load(sets), 30)
    loader = load(sets, workers=2)
    found = steps(loader, 10)
    workers = [worker.process for worker in loader._fetcher._workers]  # type: ignore[attr-defined]
    for process in workers:
        os.kill(process.pid, signal.SIGTERM)
    assert found + steps(loader, 20) == healthy
    assert [worker.process for worker in loader._fetcher._workers] == workers  # type: ignore[attr-defined]
    loader.close()
    assert not any(process.is_alive() for process in workers)


def test_a_process_that_never_closes_its_loader_ends(sets: dict[str, ShardSet], tmp_path: Path) -> None:
    program = tmp_path / "run.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            from data.shards.manifest import read_set
            from tests.data.loading import load

            if __name__ == "__main__":
                loader = load({name: read_set(Path(sys.argv[1]) / name) for name in "abv"}, workers=2)
                next(loader)
            """
        )
    )
    folder = Path(sets["a"].shards[0].url).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(program), str(folder)], env=environment, cwd=ROOT, check=True, timeout=60)


def test_a_killed_worker_is_replaced(sets: dict[str, ShardSet], tmp_path: Path) -> None:
    healthy = load(sets, [feed(sets["a"], TinyDecoder("a", IMAGE))], ratios={IMAGE: 1}, every_step=())
    deadly = TinyDecoder("a", IMAGE, killers=("a0003", "a0031"), once=str(tmp_path))
    with load(sets, [feed(sets["a"], deadly)], ratios={IMAGE: 1}, every_step=(), workers=2) as loader:
        assert steps(loader, 20) == steps(healthy, 20)
        assert loader.quarantine.bad == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a0003", "a0031"]


def test_samples_that_kill_or_stop_workers_are_left_out(sets: dict[str, ShardSet], tmp_path: Path) -> None:
    decoder = TinyDecoder("a", IMAGE, killers=("a0007",), sleepers=("a0020",), broken=("a0041",))
    quarantine = Quarantine(1.0, tmp_path / "quarantine.jsonl")
    options = {"ratios": {IMAGE: 1}, "every_step": (), "workers": 2, "timeout": 2.0, "quarantine": quarantine}
    with load(sets, [feed(sets["a"], decoder, epochs=1)], **options) as loader:
        seen = [name for step in loader for batch in ids(step) for name in batch]
    assert len(seen) == len(set(seen)) == 47
    assert quarantine.causes == {"lost worker": 2, "damaged picture": 1}
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    details = {line["index"]: line["detail"] for line in lines if line["cause"] == "lost worker"}
    assert "killed by SIGKILL" in details[7]
    assert "gave no answer for 2 s" in details[2]  # the third sample of its shard
    assert [line["key"] for line in lines if line["cause"] == "damaged picture"] == ["a0041"]


def test_workers_that_die_again_and_again_end_the_run(sets: dict[str, ShardSet]) -> None:
    decoder = TinyDecoder("a", IMAGE, killers=tuple(f"a{number:04d}" for number in range(50)))
    loader = load(sets, [feed(sets["a"], decoder)], ratios={IMAGE: 1}, every_step=(), workers=1)
    assert isinstance(loader._fetcher, Workers)
    with loader, pytest.raises(InputError, match="data workers died 9 times, the last one was killed by SIGKILL"):
        steps(loader, 10)


def test_too_many_broken_samples_stop_the_run(sets: dict[str, ShardSet]) -> None:
    decoder = TinyDecoder("a", IMAGE, broken=("a0001", "a0002", "a0003"))
    one = {"ratios": {IMAGE: 1}, "every_step": ()}
    strict = load(sets, [feed(sets["a"], decoder)], quarantine=Quarantine(0.05), **one)
    with pytest.raises(InputError, match=r"of \d+ samples are broken \(damaged picture: 1\d\), more than .* 0.05"):
        steps(strict, 1000)
    patient = load(sets, [feed(sets["a"], decoder)], quarantine=Quarantine(0.07), **one)
    steps(patient, 100)
    assert patient.quarantine.causes.keys() == {"damaged picture"}


@pytest.mark.parametrize("epochs", [None, 2])
def test_a_source_without_a_whole_sample_is_not_read_for_ever(sets: dict[str, ShardSet], epochs: int | None) -> None:
    """However many may be broken, and whatever other sources give."""
    broken = TinyDecoder("a", IMAGE, broken=tuple(f"a{number:04d}" for number in range(sets["a"].samples)))
    both = [feed(sets["a"], broken, epochs=epochs), feed(sets["b"], TinyDecoder("b", IMAGE))]
    quarantine = Quarantine(1.0)
    loader = load(sets, both, quarantine=quarantine, ratios={IMAGE: 1}, every_step=())
    with loader, pytest.raises(InputError, match=r"source a: not one of its samples can be read; the last: .*a00"):
        steps(loader, 100)
    assert quarantine.bad == sets["a"].samples + 1


def test_damaged_and_vanished_shards_are_counted_and_passed(tmp_path: Path) -> None:
    found = tiny_set(tmp_path, "a", 50, 10)
    cut, gone = Path(found.shards[1].url), Path(found.shards[3].url)
    cut.write_bytes(cut.read_bytes()[:4500])
    gone.unlink()
    quarantine = Quarantine(1.0, tmp_path / "quarantine.jsonl")
    chosen = [feed(found, TinyDecoder("a", IMAGE), epochs=2)]
    one = {"ratios": {IMAGE: 1}, "every_step": (), "quarantine": quarantine}
    seen = Counter(name for step in load({}, chosen, **one) for batch in ids(step) for name in batch)
    readable = len(seen) // 2
    assert 30 < readable < 40
    assert set(seen.values()) == {1}
    assert quarantine.causes == {"truncated shard": 2 * (40 - readable), "unreachable shard": 20}
    causes = [json.loads(line)["cause"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(causes) == ["truncated shard", "unreachable shard"]


@pytest.mark.parametrize("batches", [{}, {IMAGE: 5}])
def test_samples_larger_than_the_budget_are_named_and_not_broken(
    sets: dict[str, ShardSet], tmp_path: Path, batches: dict[Task, int]
) -> None:
    one = {"ratios": {IMAGE: 1}, "budgets": {IMAGE: 9}, "batches": batches, "every_step": ()}
    quarantine = Quarantine(0.0, tmp_path / "quarantine.jsonl")
    loader = load(sets, [feed(sets["a"], TinyDecoder("a", IMAGE), epochs=6)], quarantine=quarantine, **one)
    assert sum(len(batch.items) for step in loader for batch in step) == 6 * 45
    assert (quarantine.bad, quarantine.causes, quarantine.too_large) == (0, {}, {"a": (300, 30)})
    assert loader.reports[IMAGE].skipped == 30
    named = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [line["cause"] for line in named] == ["too large"] * 30  # their names say the epoch
    assert "10 tokens, at most 9 fit a batch" in named[0]["detail"]


def test_counts_of_several_processes_add_up_and_those_of_older_checkpoints_are_understood() -> None:
    quarantine = Quarantine()
    new = {"good": 5, "causes": {"damaged picture": 1}, "too large": {"a": [5, 2]}}
    old = {"good": 3, "causes": {"too large": 4, "damaged picture": 2}}
    quarantine.load_state_dict(new, old, new)
    assert (quarantine.good, quarantine.causes, quarantine.too_large) == (13, {"damaged picture": 4}, {"a": (10, 4)})
    again = Quarantine()
    again.load_state_dict(json.loads(json.dumps(quarantine.state_dict())))
    assert again.state_dict() == quarantine.state_dict()


@pytest.mark.parametrize("batches", [{}, {IMAGE: 5}])
def test_a_source_of_which_hardly_any_sample_fits_stops_the_run(
    sets: dict[str, ShardSet], batches: dict[Task, int]
) -> None:
    chosen = [feed(sets["a"], TinyDecoder("a", IMAGE)), feed(sets["b"], TinyDecoder("b", IMAGE))]
    one = {"ratios": {IMAGE: 1}, "budgets": {IMAGE: 1}, "batches": batches, "every_step": ()}
    loader = load(sets, chosen, quarantine=Quarantine(0.0), **one)
    # A tenth of the samples has one token, so that just as many are too large as may be; the next one is one too many.
    message = r"^source a: \d+ of \d+ samples are too large; raise the budget of its task or .*: \d+ tokens, at most 1"
    with pytest.raises(InputError, match=message):
        steps(loader, 1000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "has seed 3, this one 4"),
        ({"budgets": {**BUDGETS, IMAGE: 26}}, "'budget': 25.*'budget': 26"),
        ({"ratios": {IMAGE: 1, VIDEO: 1}}, "has weights"),
        ({"chosen": "other reading"}, "source a is not what it was"),
    ],
)
def test_other_runs_are_refused(sets: dict[str, ShardSet], change: dict[str, Any], message: str) -> None:
    state = load(sets).state_dict()
    options = dict(change)
    chosen = feeds(sets, window=7) if options.pop("chosen", None) else None
    with pytest.raises(InputError, match=message):
        load(sets, chosen, **options).load_state_dict([state])


def test_states_must_be_those_of_one_run(sets: dict[str, ShardSet]) -> None:
    states = [one_epoch(sets, rank, 3).state_dict() for rank in range(3)]
    with pytest.raises(InputError, match="states of processes"):
        one_epoch(sets, 0, 3).load_state_dict(states[:2])
    loader = one_epoch(sets, 0, 1)
    next(loader)
    with pytest.raises(InputError, match="has given batches already"):
        loader.load_state_dict(states)


def test_impossible_loaders_are_refused(sets: dict[str, ShardSet]) -> None:
    with pytest.raises(InputError, match="no token budget for video_reconstruction"):
        load(sets, budgets={IMAGE: 10, UNDERSTOOD: 10})
    with pytest.raises(InputError, match=r"rank must lie in 0\.\.1"):
        load(sets, rank=2, world=2)
    with pytest.raises(InputError, match="workers must not be negative"):
        load(sets, workers=-1)
    crowd = load(sets, rank=40, world=41)
    with pytest.raises(InputError, match="too few samples for 41 processes"):
        next(crowd)


def test_waiting_is_measured(sets: dict[str, ShardSet]) -> None:
    loader = load(sets)
    steps(loader, 5)
    time.sleep(0.2)
    first = loader.wait_share()
    time.sleep(0.1)
    assert 0 < first < 1
    assert loader.wait_share() < 0.01
    assert Task.IMAGE_RECONSTRUCTION in loader.reports
