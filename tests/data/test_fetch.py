"""What workers give is what this process reads itself, whatever it is; every thread that waits hears of an end."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from data import fetch
from data.faults import Quarantine
from data.samples import DEEPEST_FACTS, Item, Raw
from data.shards.manifest import ShardSet, read_set
from tests.data.loading import IMAGE, TinyDecoder, feed, ids, load, steps, tiny_set
from tests.data.shard_files import tar_of
from tokenizer.errors import InputError

ONE: dict[str, Any] = {"ratios": {IMAGE: 1}, "every_step": ()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return tiny_set(tmp_path_factory.mktemp("sets"), "a", 50, 9)


def nested(levels: int) -> bytes:
    """Facts of a sample with lists within each other."""
    return b'{"tokens": 3, "x": ' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


def test_outcomes_of_nested_facts_do_not_depend_on_workers(tmp_path: Path) -> None:
    depths = {7: DEEPEST_FACTS, 11: DEEPEST_FACTS + 1, 20: 400, 33: 700, 34: 50_000}
    members = [
        member
        for number in range(50)
        for member in ((f"k{number:02d}.jpg", b"x"), (f"k{number:02d}.json", nested(depths.get(number, 2))))
    ]
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    found = []
    for workers in (0, 2):
        quarantine = Quarantine(1.0, tmp_path / f"{workers}.jsonl")
        chosen = [feed(read_set(tmp_path / "0.tar"), TinyDecoder("a", IMAGE), epochs=1)]
        with load({}, chosen, workers=workers, quarantine=quarantine, **ONE) as loader:
            found.append([ids(step) for step in loader])
        assert quarantine.causes == {"unexpected error": 4}
    assert found[0] == found[1]
    assert sum(len(batch) for step in found[0] for batch in step) == 46
    assert (tmp_path / "0.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()


@dataclass(frozen=True)
class Signed(TinyDecoder):
    """Says which process read a sample."""

    def __call__(self, raw: Raw, epoch: int) -> Item:
        item = super().__call__(raw, epoch)
        return replace(item, facts={**item.facts, "read by": os.getpid()})


@pytest.mark.parametrize(("workers", "lanes_of_each"), [(6, [1, 1, 1, 1, 1, 1]), (4, [2, 2, 1, 1])])
def test_lanes_of_all_sources_are_shared_evenly_among_workers(
    workers: int, lanes_of_each: list[int], tmp_path: Path
) -> None:
    sources = {name: tiny_set(tmp_path, name, 24, 12) for name in "abc"}
    chosen = [feed(shards, Signed(name, IMAGE), epochs=1) for name, shards in sources.items()]
    lanes: dict[int, set[str]] = {}
    with load({}, chosen, workers=workers, **ONE) as loader:
        for step in loader:
            for item in step[0].items:
                # Two shards of a source, two lanes: a shard stands for a lane.
                lanes.setdefault(item.facts["read by"], set()).add(item.source + item.id[:17])
    assert sorted(map(len, lanes.values()), reverse=True) == lanes_of_each


@dataclass(frozen=True)
class Stubborn(TinyDecoder):
    """Puts something into some items that cannot travel, or that cannot be read where it arrives."""

    what: str = "unsendable"

    def __call__(self, raw: Raw, epoch: int) -> Item:
        item = super().__call__(raw, epoch)
        if raw.key not in ("a0012", "a0030"):
            return item
        odd: object = threading.Lock() if self.what == "unsendable" else Unreadable()
        return replace(item, facts={**item.facts, "odd": odd})


class Unreadable:
    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def test_what_cannot_be_sent_is_a_fault_in_its_place(pictures: ShardSet, tmp_path: Path) -> None:
    quarantine = Quarantine(1.0, tmp_path / "quarantine.jsonl")
    with load({}, [feed(pictures, Stubborn("a", IMAGE), epochs=1)], workers=2, quarantine=quarantine, **ONE) as loader:
        workers = [worker.process for worker in loader._fetcher._workers]  # type: ignore[attr-defined]
        seen = [name for step in loader for batch in ids(step) for name in batch]
        assert [worker.process for worker in loader._fetcher._workers] == workers  # type: ignore[attr-defined]
    assert len(seen) == len(set(seen)) == 48
    assert quarantine.causes == {"unexpected error": 2}
    told = (tmp_path / "quarantine.jsonl").read_text()
    # The fourth sample of the second shard, the fourth of the fourth one; nine in each.
    for number, index in ((1, 3), (3, 3)):
        assert f"{pictures.shards[number].url}: sample {index} cannot be sent: TypeError" in told


def test_what_cannot_be_read_on_arrival_ends_the_run_with_one_line(pictures: ShardSet) -> None:
    chosen = [feed(pictures, Stubborn("a", IMAGE, what="unreadable"), epochs=1)]
    with (
        load({}, chosen, workers=2, timeout=20.0, **ONE) as loader,
        pytest.raises(InputError, match=r"^a data worker sent what cannot be read: ValueError: invalid literal"),
    ):
        list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_closed_loader_says_so(pictures: ShardSet, workers: int) -> None:
    loader = load({}, [feed(pictures, TinyDecoder("a", IMAGE))], workers=workers, **ONE)
    steps(loader, 3)
    loader.close()
    caught: list[BaseException] = []

    def go_on() -> None:
        try:
            steps(loader, 300)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    thread.join(10)
    assert [(type(error), str(error)) for error in caught] == [(InputError, fetch.CLOSED)]
    loader.close()  # twice is once


def test_next_of_closed_workers_does_not_wait(pictures: ShardSet) -> None:
    """Also for chunks that were submitted before."""
    loader = load({}, [feed(pictures, TinyDecoder("a", IMAGE, sleepers=("a0000",)), shuffle=False)], workers=1, **ONE)
    loader._taps["a"]._plan()
    loader.close()
    start = time.monotonic()
    with pytest.raises(InputError, match="the loader is closed"):
        loader._fetcher.next("a")
    assert time.monotonic() - start < 0.5


def test_a_thread_that_waits_hears_of_the_close(pictures: ShardSet) -> None:
    loader = load({}, [feed(pictures, TinyDecoder("a", IMAGE, sleepers=("a0000",)), shuffle=False)], workers=1, **ONE)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            next(loader)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(1.5)  # until it waits for the sample that never ends
    assert thread.is_alive()
    loader.close()
    thread.join(10)
    assert [(type(error), str(error)) for error in caught] == [(InputError, fetch.CLOSED)]
