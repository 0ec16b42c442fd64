"""Counts of what cannot be used: when they stop a run, what they name, and that they go on where the run does."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from data.faults import MOST_NAMED, TOO_LARGE, Quarantine
from data.samples import Fault
from data.shards.manifest import ShardSet, read_set
from data.tap import read_items
from tests.data.loading import IMAGE, TinyDecoder, feed, load, steps, tiny_set
from tests.data.shard_files import tar_of
from tokenizer.errors import InputError

ONE: dict[str, Any] = {"ratios": {IMAGE: 1}, "budgets": {IMAGE: 9}, "every_step": ()}
"""Every tenth sample is too large."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return tiny_set(tmp_path_factory.mktemp("sets"), "a", 50, 9)


def large(number: int) -> Fault:
    return Fault(TOO_LARGE, "s.tar", -1, f"s.tar/{number}: larger", key=f"s.tar/{number}")


def read(quarantine: Quarantine, count: int, source: str = "a") -> None:
    for _ in range(count):
        quarantine.count_good(source)


def leave_out(quarantine: Quarantine, count: int, source: str = "a") -> None:
    for number in range(count):
        quarantine.leave_out(source, large(number))


def test_nine_tenths_of_a_source_may_be_too_large() -> None:
    quarantine = Quarantine()
    read(quarantine, 1000)
    leave_out(quarantine, 900)
    with pytest.raises(InputError, match=r"^source a: 901 of 1000 samples are too large; .*; the last: s\.tar/0: larg"):
        leave_out(quarantine, 1)
    # Another source is judged by itself.
    read(quarantine, 1000, "b")
    leave_out(quarantine, 900, "b")


def test_no_source_is_judged_by_less_than_two_hundred_samples() -> None:
    quarantine = Quarantine()
    for number in range(199):
        read(quarantine, 1)
        quarantine.leave_out("a", large(number))
    read(quarantine, 1)
    with pytest.raises(InputError, match="200 of 200 samples are too large"):
        leave_out(quarantine, 1)


def test_no_run_is_judged_by_less_than_two_hundred_samples() -> None:
    quarantine = Quarantine(max_share=0.0)
    quarantine.add(Fault("truncated shard", "s.tar", 0, "s.tar: ends", samples=199))
    with pytest.raises(InputError, match="200 of 200 samples are broken"):
        quarantine.add(Fault("damaged picture", "s.tar", 3, "s.tar/3: is damaged"))
    fair = Quarantine(max_share=0.5)
    read(fair, 100)
    fair.add(Fault("truncated shard", "s.tar", 0, "s.tar: ends", samples=100))
    with pytest.raises(InputError, match="101 of 201"):
        fair.add(Fault("damaged picture", "s.tar", 3, "s.tar/3: is damaged"))


def test_counts_go_on_with_the_run() -> None:
    """What is too large too: else a source that nobody can use would be judged anew after every restart."""
    before = Quarantine()
    read(before, 300)
    leave_out(before, 270)
    before.add(Fault("damaged picture", "s.tar", 3, "s.tar/3: is damaged"))
    after = Quarantine()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert (after.good, after.causes, after.too_large) == (300, {"damaged picture": 1}, {"a": (300, 270)})
    with pytest.raises(InputError, match="271 of 300 samples are too large"):
        leave_out(after, 1)


def test_counts_of_a_loader_are_dealt_to_the_first_process_alone(pictures: ShardSet) -> None:
    """Every process saves its own, and they are added up: what all had loaded would count several times."""
    chosen = [feed(pictures, TinyDecoder("a", IMAGE, broken=("a0001", "a0002", "a0033")))]

    def of(world: int, states: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        found = []
        for rank in range(world):
            loader = load({}, chosen, rank=rank, world=world, quarantine=Quarantine(1.0), **ONE)
            if states is not None:
                loader.load_state_dict(json.loads(json.dumps(states)))
            else:
                steps(loader, 12)
            found.append(loader.state_dict())
        return found

    def total(states: list[dict[str, Any]]) -> tuple[int, int, int, int]:
        counts = [state["quarantine"] for state in states]
        read, left_out = (sum(count["too large"].get("a", (0, 0))[part] for count in counts) for part in (0, 1))
        return sum(count["good"] for count in counts), sum(sum(c["causes"].values()) for c in counts), read, left_out

    states = of(2)
    expected = total(states)
    assert min(expected) > 0
    for world in (3, 1, 2, 2, 5):
        dealt = of(world, states)
        assert total(dealt) == expected
        if world != len(states):
            assert [state["quarantine"]["good"] for state in dealt] == [expected[0]] + [0] * (world - 1)
        states = dealt


def test_the_first_samples_of_a_source_that_are_too_large_are_named(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(file=file)
    for source in ("a", "b"):
        for number in range(3 * MOST_NAMED):
            read(quarantine, 2, source)
            quarantine.leave_out(source, Fault(TOO_LARGE, f"{source}.tar", -1, "large", key=f"{number}"))
    # A run that goes on has named them, and a broken sample is named all the same.
    again = Quarantine(file=file)
    again.load_state_dict(quarantine.state_dict())
    for number in range(3 * MOST_NAMED, 4 * MOST_NAMED):
        again.leave_out("a", Fault(TOO_LARGE, "a.tar", -1, "large", key=f"{number}"))
    again.add(Fault("damaged picture", "a.tar", 7, "damaged", key="7"))
    assert again.too_large == {"a": (6 * MOST_NAMED, 4 * MOST_NAMED), "b": (6 * MOST_NAMED, 3 * MOST_NAMED)}
    *named, last = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [(f"{source}.tar", f"{number}") for source in ("a", "b") for number in range(MOST_NAMED)]
    assert [(line["shard"], line["key"]) for line in named] == expected
    assert last["cause"] == "damaged picture"


def test_samples_that_are_too_large_take_no_memory() -> None:
    quarantine = Quarantine()
    read(quarantine, 20_000)
    leave_out(quarantine, MOST_NAMED)
    tracemalloc.start()
    for number in range(MOST_NAMED, 10_000):
        quarantine.leave_out("a", Fault(TOO_LARGE, f"shard-{number}.tar", -1, "x" * 100, key=f"{number:09d}"))
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 50_000  # bytes; keys of all would be 2.6 million


def test_a_fault_is_named_once_and_counted_every_time(tmp_path: Path) -> None:
    quarantine = Quarantine(1.0, tmp_path / "quarantine.jsonl")
    for epoch, key in itertools.product(range(3), ("x", "y")):
        quarantine.add(Fault("damaged picture", "s.tar", 0, f"epoch {epoch}", key=key))
    assert quarantine.causes == {"damaged picture": 6}
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["key"], line["detail"]) for line in lines] == [("x", "epoch 0"), ("y", "epoch 0")]


def test_a_run_that_goes_on_does_not_repeat_what_a_killed_one_named(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    faults = [
        Fault("damaged picture", "s.tar", 0, "seen\u2028so", key="x\udcff"),
        Fault("repeated file", "s.tar", 3, "twice"),
        Fault(TOO_LARGE, "s.tar", -1, "large", key="y"),
        Fault("truncated shard", "t.tar", 5, "short", samples=9),
    ]
    for number in range(1, len(faults) + 1):  # each time from the beginning, and one further
        quarantine = Quarantine(1.0, file)
        for fault in faults[:number]:
            quarantine.add(fault)
        assert quarantine.bad == sum(fault.samples for fault in faults[:number])
        with file.open("a") as lines:
            lines.write("[half a line\n")
    named = [line for line in file.read_text().split("\n") if line.startswith("{")]
    assert [json.loads(line)["detail"] for line in named] == [fault.detail for fault in faults]


def test_samples_without_a_key_are_named_by_their_place_and_shards_once(tmp_path: Path) -> None:
    twice, facts = [3, 7, 11], b'{"tokens": 1}'
    members = [(f"{n:03d}.json", facts) for n in range(20) for _ in range(2 if n in twice else 1)]
    members.append(("020.jpg", b"x"))  # else they were of no kind
    whole = tar_of(members)
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(whole)
    shards = read_set(str(tmp_path))
    (tmp_path / "b.tar").write_bytes(whole[: 3 * 1024])
    quarantine = Quarantine(1.0, tmp_path / "quarantine.jsonl")
    read = list(read_items(shards, TinyDecoder("a", IMAGE), quarantine=quarantine))
    # Of the cut shard two samples are sure to be whole.
    assert quarantine.causes == {"repeated file": 3, "truncated shard": 19, "unexpected error": 1}
    assert len(read) == 17 + 2
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    named = [(line["cause"], Path(line["shard"]).name, line["index"]) for line in lines]
    assert [entry for entry in named if entry[0] == "repeated file"] == [("repeated file", "a.tar", n) for n in twice]
    assert [entry[1:] for entry in named if entry[0] == "truncated shard"] == [("b.tar", 2)]


def test_a_sample_that_is_too_large_is_named_with_its_shard(pictures: ShardSet, tmp_path: Path) -> None:
    quarantine = Quarantine(1.0, tmp_path / "quarantine.jsonl")
    list(load({}, [feed(pictures, TinyDecoder("a", IMAGE), epochs=1)], quarantine=quarantine, **ONE))
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert {line["shard"] for line in lines} <= {shard.url for shard in pictures.shards}
    assert all(line["key"].split("/")[0] == line["shard"].rsplit("/", 1)[-1] for line in lines)
