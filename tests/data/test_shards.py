"""Shards: what is written is read, by others too; the same bytes however it was made; every kind of damage is told."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data.samples import Raw, SampleError
from data.shards import reader
from data.shards.manifest import MANIFEST, read_set, verify
from data.shards.reader import read_shard, scan_shard
from data.shards.tar import BLOCK, DAMAGED, TRUNCATED
from data.shards.writer import (
    Record,
    Skipped,
    begin_set,
    finished_shard,
    merge_set,
    plan_of,
    shard_name,
    write_set,
    write_shard,
)
from tests.data import shard_files
from tests.data.shard_files import FACTS, folder_of, make, read_until_fault, tar_of
from tokenizer.errors import InputError

ROOT = Path(__file__).parent.parent.parent
QUICK = settings(max_examples=40, deadline=None, derandomize=True)
QUIET = Console(quiet=True)

# No surrogates: other readers print names. No control characters and no dots: those are refused.
PARTS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="./\\"), min_size=1, max_size=120)
KEYS = st.lists(PARTS, min_size=1, max_size=3).map("/".join)
EXTENSIONS = st.sampled_from(("jpg", "png", "txt", "views.webp", "voxels.safetensors"))
RECORDS = st.lists(
    st.builds(
        Record,
        key=KEYS,
        files=st.dictionaries(EXTENSIONS, st.binary(max_size=1100), max_size=4),
        facts=st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(), max_size=3),
    ),
    max_size=6,
    unique_by=lambda record: record.key,
)


def written(records: list[Record]) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (record.key, {**record.files, "json": json.dumps(record.facts, sort_keys=True).encode()}) for record in records
    ]


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, list[Raw]]:
    """A tar of three samples of two files each, and what is in it."""
    path = tmp_path / "plain.tar"
    members = {f"{n}.{extension}": bytes([n]) * 700 for n in range(1, 4) for extension in ("jpg", "txt")}
    path.write_bytes(tar_of(members))
    return path, list(read_shard(str(path)))


@QUICK
@given(records=RECORDS)
def test_what_is_written_is_read(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("round") / "shard-000000.tar"
    shard, skipped = write_shard(path, [*records, Skipped("x", "why")])
    samples = list(read_shard(str(path), samples=len(records)))
    assert [(raw.key, dict(raw.files)) for raw in samples] == written(records)
    assert [raw.index for raw in samples] == list(range(len(records)))
    assert (shard.samples, shard.bytes) == (len(records), path.stat().st_size)
    assert finished_shard(path) == (shard, skipped) == (shard, [Skipped("x", "why")])
    middle = len(records) // 2
    assert [raw.files for raw in read_shard(f"pipe:cat {path}", middle)] == [raw.files for raw in samples[middle:]]
    for start in range(len(records) + 1):
        assert list(read_shard(str(path), start)) == samples[start:]


@QUICK
@given(records=RECORDS)
def test_others_read_what_is_written(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = tmp_path_factory.mktemp("others") / "shard-000000.tar"
    write_shard(path, records)
    with path.open("rb") as file:
        members = webdataset.tariterators.tar_file_expander([{"url": "", "stream": file}])
        samples = list(webdataset.tariterators.group_by_keys(members))
    found = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in samples]
    assert found == [entry for entry in written(records) if not entry[0].startswith("__")]


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_writers_are_read(tmp_path: Path, how: int) -> None:
    folder = "f" * 90 + "/" + "g" * 50
    names = {"./a.JPG": b"1", "a.txt": b"2", f"{folder}/b.jpg": b"3", ".hidden": b"4", "noending": b"5", "c.jpg": b""}
    path = tmp_path / "other.tar"
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=how) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            entry = tarfile.TarInfo("link.jpg")
            entry.type, entry.linkname = kind, "a.jpg"
            tar.addfile(entry)
        for name, data in names.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), 1.5 if how == tarfile.PAX_FORMAT else 1
            tar.addfile(entry, io.BytesIO(data))
    path.write_bytes(file.getvalue())
    assert [(raw.key, dict(raw.files)) for raw in read_shard(str(path))] == [
        ("a", {"jpg": b"1", "txt": b"2"}),
        (f"{folder}/b", {"jpg": b"3"}),
        ("c", {"jpg": b""}),
    ]


def test_every_truncation_is_told(plain: tuple[Path, list[Raw]], tmp_path: Path) -> None:
    path, samples = plain
    data = path.read_bytes()
    end = 3 * 2 * 3 * BLOCK  # six files, each a header and two blocks
    cut = tmp_path / "cut.tar"
    offsets = [0, 1, 100, 511]
    # Around every header, within contents, at their end, and in what fills their last block.
    offsets += [
        base + step for base in range(0, end, 3 * BLOCK) for step in (512, 513, 900, 1211, 1212, 1213, 1535, 1536)
    ]
    for offset in offsets:
        for url in (str(cut), f"pipe:cat {cut}"):
            if url != str(cut) and offset % 3:
                continue  # starting a process for each takes long
            cut.write_bytes(data[:offset])
            found, error = read_until_fault(url)
            assert error is not None, offset
            assert error.cause == TRUNCATED, offset
            assert str(error).startswith(f"{url}: ends after"), offset
            # A sample is only given if something behind it shows that it is whole.
            whole = max(0, offset - BLOCK) // (6 * BLOCK)
            assert [raw.files for raw in found] == [raw.files for raw in samples[:whole]], offset
            assert scan_shard(url).samples == whole, offset
    for offset in (end + 1, end + 511, end + 512, end + 700, len(data) - 1):
        cut.write_bytes(data[:offset])
        assert read_until_fault(str(cut))[1] is None  # nothing is lost with the zeros at the end
    cut.write_bytes(data)
    assert scan_shard(str(cut)).samples == 3
    found, error = read_until_fault(str(cut), samples=4)
    assert (len(found), error.cause if error else "") == (3, TRUNCATED)


def test_every_flipped_bit_of_a_header_is_told_or_harmless(plain: tuple[Path, list[Raw]], tmp_path: Path) -> None:
    path, samples = plain
    data = path.read_bytes()
    bad = tmp_path / "bad.tar"
    harmless = 0
    start = 6 * BLOCK  # the header of the second sample
    for bit in range(0, 8 * BLOCK, 7):  # 7 is prime to 8: all bits of bytes take part
        flipped = bytearray(data)
        flipped[start + bit // 8] ^= 1 << bit % 8
        bad.write_bytes(flipped)
        found, error = read_until_fault(str(bad))
        if error is None:
            assert [raw.files for raw in found] == [raw.files for raw in samples], bit
            harmless += 1
        else:
            assert error.cause in (DAMAGED, TRUNCATED), bit
            assert found == []  # the first sample may go on in the broken header
    assert harmless <= 8  # only what ends the digits of the checksum may change


@pytest.mark.parametrize(
    ("contents", "cause", "message"),
    [
        (b"", TRUNCATED, "empty file"),
        (b"<html>404</html>".ljust(2000), DAMAGED, "not a tar"),
        (b"\x1f\x8b".ljust(2000, b"x"), DAMAGED, "gzip -dc"),
        (tar_of([("a.jpg", b"1"), ("a.JPG", b"2"), ("b.jpg", b"3")]), reader.REPEATED, "'a.JPG' twice"),
        (tar_of([("a.jpg", b"1" * 2000), ("b.jpg", b"3")]), reader.TOO_LARGE, "2000 bytes, at most 1000"),
    ],
)
def test_faults_are_named(
    contents: bytes, cause: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "LARGEST_FILE", 1000)
    path = tmp_path / "x.tar"
    path.write_bytes(contents)
    found, error = read_until_fault(str(path))
    assert error is not None
    assert (found, error.cause) == ([], cause)
    assert message in str(error)
    if cause in reader.SINGLE:
        assert [raw.key for raw in read_shard(str(path), 1)] == ["b"]


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("a.jpg")
    entry.size = 3 * 1024**3
    path = tmp_path / "liar.tar"
    path.write_bytes(entry.tobuf() + b"little")
    for url in (str(path), f"pipe:cat {path}"):
        assert (read_until_fault(url)[1] or SampleError("", "")).cause == TRUNCATED


@pytest.mark.parametrize(
    "record",
    [
        *(Record(key, {}) for key in ("", "a.b", "/a", "a/../b", "./a", "a/", "a\nb")),
        *(Record("a", {extension: b""}) for extension in ("", "JPG", "json", "a/b", ".jpg")),
        *(Record("a", {}, {"x": value}) for value in (float("nan"), b"", {1, 2})),
    ],
)
def test_what_could_not_be_read_again_is_not_written(record: Record, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sample"):
        write_shard(tmp_path / "shard-000000.tar", [Record("ok", {}), record])
    with pytest.raises(InputError, match="another one"):
        write_shard(tmp_path / "shard-000000.tar", [Record("ok", {}), Record("ok", {})])
    assert list(tmp_path.iterdir()) == []


def build(out: Path, workers: int = 1, make: Callable[[int], Iterator[Record | Skipped]] = make, seed: int = 7) -> None:
    facts = {**FACTS, "seed": seed}
    write_set(out, "images", range(12), make, jobs_per_shard=3, workers=workers, facts=facts, console=QUIET)


def test_a_set_is_the_same_whatever_the_workers(tmp_path: Path) -> None:
    build(tmp_path / "one")
    build(tmp_path / "two", workers=2)
    files = folder_of(tmp_path / "one")
    assert files == folder_of(tmp_path / "two")
    assert sorted(files) == [MANIFEST, *(shard_name(number) for number in range(4))]
    shards = read_set(tmp_path / "one")
    assert (shards.kind, shards.samples, shards.facts) == ("images", 15, FACTS)
    assert shards.skipped == (Skipped("five.jpg", "not a picture"),)
    assert shards.bytes == sum(len(data) for name, data in files.items() if name != MANIFEST)
    raws = [raw for shard in shards.shards for raw in read_shard(shard.url, samples=shard.samples)]
    assert [raw.files["jpg"] for raw in raws if "jpg" in raw.files] == [
        shard_files.contents(job)["jpg"] for job in range(12) if job != 5
    ]
    assert raws[0].facts() == {"label": "größe 0"}
    assert [problem for _, problem in verify(shards)] == [""] * 4
    (tmp_path / "one" / shard_name(2)).write_bytes(files[shard_name(2)].replace(b"caption 6", b"caption 9"))
    assert ["checksum" in problem for _, problem in verify(shards)] == [False, False, True, False]


def started(out: Path, workers: int) -> subprocess.Popen[bytes]:
    """Another process that writes the set slowly."""
    code = f"from tests.data.shard_files import *; write_slowly(Path({str(out)!r}), {workers})"
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)


def test_stopped_and_killed_runs_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    build(tmp_path / "calm")
    out = tmp_path / "set"
    with started(out, workers=2) as process:
        wait_for(lambda: len(list(out.glob(".shard-*.part.tar"))) == 2)  # both workers are there
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()
    assert b"KeyboardInterrupt" in said, said.decode()  # of the first process; the command line turns it into a word
    assert [path.name for path in out.iterdir() if path.name.startswith(".") or path.name == MANIFEST] == []
    with started(out, workers=1) as process:
        wait_for((out / "shard-000002.json").exists)
        wait_for(lambda: any(out.glob(".shard-000003.*")))
        process.kill()
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] != []
    with pytest.raises(InputError, match="not finished"):
        read_set(out)
    with pytest.raises(InputError, match="seed: 7 there, 8 now"):
        build(out, seed=8)
    kept = (out / shard_name(1)).stat().st_mtime_ns
    build(out)
    assert (out / shard_name(1)).stat().st_mtime_ns == kept
    assert folder_of(out) == folder_of(tmp_path / "calm")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited for too long"
        time.sleep(0.005)


def test_a_worker_that_dies_is_named_with_its_shard(tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(InputError, match=r"shard-000002\.tar: the worker that made it died \(killed by signal 9"):
        build(out, 2, shard_files.make_and_die)
    with pytest.raises(RuntimeError, match="on fire"):
        build(out, 2, shard_files.make_and_fail)
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    build(tmp_path / "calm")
    build(out)
    assert folder_of(out) == folder_of(tmp_path / "calm")


def test_folders_of_others_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "set")
    before = folder_of(tmp_path / "set")
    write_set(tmp_path / "set", "images", range(12), make, jobs_per_shard=3, workers=1, facts=FACTS)
    assert "complete already" in capsys.readouterr().err
    with pytest.raises(InputError, match="size of shards changed"):
        write_set(tmp_path / "set", "images", range(12), make, jobs_per_shard=4, workers=1, facts=FACTS)
    assert folder_of(tmp_path / "set") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(InputError, match="did not make"):
        build(tmp_path / "other")
    assert folder_of(tmp_path / "other") == {"shard-000000.tar": b"precious"}


def test_shards_without_samples_are_left_out(tmp_path: Path) -> None:
    made = write_set(tmp_path / "set", "images", [4, 5], make, jobs_per_shard=1, workers=1, facts={}, console=QUIET)
    assert [shard.name for shard in made.shards] == ["shard-000000.tar"]
    assert sorted(folder_of(tmp_path / "set")) == [MANIFEST, "shard-000000.tar"]
    assert read_set(tmp_path / "set") == made
    with pytest.raises(InputError, match=r"nothing became a sample, 1 were skipped \(five.jpg: not a picture\)"):
        write_set(tmp_path / "none", "images", [5], make, jobs_per_shard=1, workers=1, facts={}, console=QUIET)


def test_several_processes_fill_one_set(tmp_path: Path) -> None:
    out, names = tmp_path / "set", [shard_name(number) for number in range(2)]
    plan = plan_of("latents", ["a", "b"], {"model": "nano"})
    for number, name in enumerate(names):
        assert begin_set(out, plan, {"model": "nano"}) is None
        assert merge_set(out, "latents", names, {"model": "nano"}, plan=plan) is None
        write_shard(out / name, [Record(str(number), {"latents.safetensors": b"0"})], plan=plan)
    merged = merge_set(out, "latents", names, {"model": "nano"}, plan=plan)
    assert merged is not None
    assert merged == merge_set(out, "latents", names, {"model": "nano"}, plan=plan) == read_set(out)
    assert merged == begin_set(out, plan, {"model": "nano"})
    with pytest.raises(InputError, match="'nano' there, 'large' now"):
        begin_set(out, plan_of("latents", ["a", "b"], {"model": "large"}), {"model": "large"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a manifest of shards"),
        ({"version": 2}, "version 2, this AToken reads version 1"),
        ({"kind": "songs"}, "kind: "),
        ({"samples": 3}, "add up to 15 samples, not to 3"),
        ({"shards": [{"name": "../x.tar", "samples": 1, "bytes": 1, "sha256": ""}]}, r"shards\.0\.name"),
        ({"shards": [], "samples": 0, "bytes": 0}, "no samples"),
        ({"more": 1}, "more: "),
    ],
)
def test_manifests_are_checked(change: dict[str, object], message: str, tmp_path: Path) -> None:
    build(tmp_path / "set")
    path = tmp_path / "set" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        read_set(path)


def test_sets_that_are_none(tmp_path: Path) -> None:
    build(tmp_path / "set")
    (tmp_path / "set" / shard_name(1)).unlink()
    with pytest.raises(InputError, match=r"shard-000001\.tar: named in manifest.json, but missing"):
        read_set(tmp_path / "set")
    (tmp_path / "set" / MANIFEST).write_bytes(b"\xff")
    with pytest.raises(InputError, match="not readable as JSON"):
        read_set(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    for spec, message in (("empty", "neither manifest.json nor tars"), ("gone", "not found"), ("*.tar", "no file")):
        with pytest.raises(InputError, match=message):
            read_set(tmp_path / spec)


def test_tars_without_a_manifest_are_counted(tmp_path: Path) -> None:
    clips = tar_of({f"{n}.{extension}": b"0" * n for n in range(3) for extension in ("mp4", "jpg", "txt")})
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(clips)
    for spec in (tmp_path, tmp_path / "*.tar", f"{tmp_path}/{{0..2}}.tar", f"pipe:cat {tmp_path}/{{0,1,2}}.tar"):
        shards = read_set(spec, console=QUIET)
        assert (shards.kind, [shard.samples for shard in shards.shards]) == ("videos", [3, 3, 3]), spec
        assert shards.bytes == 3 * len(clips)
    with pytest.raises(InputError, match="no checksum is known"):
        list(verify(shards))
    (tmp_path / "1.tar").write_bytes(clips[:3000])
    shards = read_set(tmp_path, console=QUIET)
    assert ([shard.samples for shard in shards.shards], len(shards.skipped)) == ([3, 1, 3], 1)
    assert "ends after" in shards.skipped[0].reason
    (tmp_path / "texts.tar").write_bytes(tar_of({"a.txt": b"1"}))
    with pytest.raises(InputError, match=r"neither pictures, videos, voxels nor latents .* only \.txt"):
        read_set(tmp_path / "texts.tar", console=QUIET)
