"""Shards of other makers in `atoken evaluate`: no sample is lost where shards or keys are called alike."""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.evaluation import shortest_names
from tests.tokenizer.evaluation_files import options, scene
from tokenizer.errors import InputError
from tokenizer.evaluation.accumulate import shard
from tokenizer.evaluation.command.datasets import RawSample, open_source
from tokenizer.evaluation.command.evaluate import evaluate

ADAPTER = "tests.tokenizer.evaluation_files:Coarse"


def png(number: int) -> bytes:
    coded = io.BytesIO()
    Image.fromarray(scene(number, 24, 20)[0]).save(coded, "PNG")
    return coded.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def run(data: Path | str, out: Path) -> dict[str, Any]:
    found = evaluate(options(data, out, models=[], adapters=[ADAPTER]), lambda *_: pytest.fail("no model is asked for"))
    assert found is not None
    return found


def read(spec: Path | str, processes: int = 1) -> list[RawSample]:
    """All samples, read by so many processes, in the order of their numbers."""
    source = open_source(str(spec))
    found: dict[int, RawSample] = {}
    for rank in range(processes):
        numbers = shard(range(len(source)), rank, processes)
        found |= zip(numbers, source.read(numbers), strict=True)
    return [found[number] for number in sorted(found)]


def test_shards_of_one_name_lose_nothing(tmp_path: Path) -> None:
    """A broken sample has the name of a good one of another shard: neither takes the other with it."""
    write_tar(tmp_path / "train" / "000000.tar", [("a.png", png(1)), ("b.png", png(2))])
    write_tar(tmp_path / "test" / "000000.tar", [("a.png", b"broken"), ("b.png", png(4)), ("c.png", png(5))])
    results = run(f"{tmp_path}/{{train,test}}/000000.tar", tmp_path / "out")
    assert results["samples"] == {"image": 4}
    assert list(results["left_out"]["reasons"]) == ["test/000000.tar/a.png"]
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 5
    for name in ("train/000000.tar/b.png", "test/000000.tar/b.png"):
        assert sum(f'"{name}"' in line for line in lines) == 1


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_keys_that_repeat_in_a_tar_are_told_apart_whoever_reads_them(tmp_path: Path, processes: int) -> None:
    files = [png(number) for number in range(5)]
    names = ["a.png", "b.png", "a.png", "a.png", "c.png"]
    # Two files that follow each other with one key are one sample: a caption stands between the second and third "a".
    members = [(name, data) for name, data in zip(names, files, strict=True)]
    members.insert(3, ("x.txt", b"no picture"))
    path = write_tar(tmp_path / "0.tar", members)
    found = read(path, processes)
    assert [raw.id for raw in found] == [
        f"0.tar/{name}" for name in ("a.png", "b.png", "a.2.png", "x", "a.4.png", "c.png")
    ]
    assert [raw.content for raw in found if raw.fault is None] == files
    if processes == 1:
        results = run(path, tmp_path / "out")
        assert (results["samples"], results["left_out"]["samples"]) == ({"image": 5}, 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_broken_sample_is_left_out_by_the_process_that_has_it_and_no_other(tmp_path: Path, processes: int) -> None:
    """Sample 1 has a file twice: a process that reads 0 and 2 comes past it."""
    members = [("0.png", png(0)), ("1.png", png(1)), ("1.png", png(1)), ("2.png", png(2)), ("3.png", png(3))]
    found = read(write_tar(tmp_path / "0.tar", members), processes)
    assert [raw.id for raw in found] == ["0.tar/0.png", "0.tar (sample 1)", "0.tar/2.png", "0.tar/3.png"]
    assert [raw.fault is None for raw in found] == [True, False, True, True]


def test_shards_are_called_by_as_little_as_tells_them_apart() -> None:
    assert shortest_names(["x/0.tar", "x/1.tar"]) == ["0.tar", "1.tar"]
    assert shortest_names(["x/a/0.tar", "y/a/0.tar", "y/b/0.tar", "y/1.tar"]) == [
        "x/a/0.tar",
        "y/a/0.tar",
        "b/0.tar",
        "1.tar",
    ]
    assert shortest_names(["0.tar", "x/0.tar", "0.tar"]) == ["0.tar", "x/0.tar", "0.tar#2"]


def test_classes_may_be_files_of_their_own(tmp_path: Path) -> None:
    members = [("a.png", png(1)), ("a.cls", b"7"), ("b.png", png(2)), ("b.cls", b"cat\n"), ("c.png", png(3))]
    members += [("c.cls", b"9"), ("c.json", b'{"label": "dog"}')]
    assert [raw.label for raw in read(write_tar(tmp_path / "0.tar", members))] == ["7", "cat", "dog"]


def test_shards_without_manifest_that_were_changed_are_another_set(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "set" / "0.tar", [("a.png", png(1))])
    before, size = open_source(str(path.parent)).facts(), path.stat().st_size
    run(path.parent, tmp_path / "out")
    write_tar(path, [("a.png", png(2))])
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert path.stat().st_size == size
    assert open_source(str(path.parent)).facts() != before
    with pytest.raises(InputError, match=r"other arguments \(data\)"):
        run(path.parent, tmp_path / "out")


def test_keys_that_are_not_utf_8_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name, data in (("café.png", png(1)), ("né.png", b"broken")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    results = run(path, tmp_path / "out")
    assert (results["samples"], list(results["left_out"]["reasons"])) == ({"image": 1}, [r"0.tar/n\udce9.png"])
    assert run(path, tmp_path / "out") == results


def test_ids_are_those_of_one_sample_each(tmp_path: Path) -> None:
    """Faults without a key, keys that are numbers, and repeated ones together."""
    members = [
        ("1.png", png(0)),
        ("x.png", png(1)),
        ("x.png", png(1)),
        ("1.png", b"broken"),
        ("y.txt", b""),
        ("1.jpg", png(2)),
    ]
    write_tar(tmp_path / "s" / "0.tar", members)
    write_tar(tmp_path / "t" / "0.tar", members)
    found = Counter(raw.id for raw in read(f"{tmp_path}/{{s,t}}/0.tar", 2))
    assert len(found) == 10
    assert set(found.values()) == {1}
