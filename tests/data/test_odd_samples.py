"""Samples of other makers, as their tars have them: read for what they say, or left out by name; no run ends at one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data.decode.decoder import Decoder, DecodeSettings
from data.latents import tokenize
from data.latents.encode import Untouched, _frame_rate
from data.latents.statistics import Moments
from data.latents.tokenize import Settings, tokenize_shards
from data.mixture import Task
from data.samples import DEEPEST_FACTS, Item, Raw
from data.shards.manifest import read_set
from data.shards.reader import read_shard
from tests.data.shard_files import tar_of
from tests.data.test_tokenize import png, settings_for
from tokenizer.errors import InputError

PICTURE = png(1, 32, 32)


def raw(**files: bytes) -> Raw:
    return Raw("s.tar", 0, "k", files)


def test_numbers_that_no_float_holds_become_nothing() -> None:
    text = b'{"a": 1e999, "b": [-1e999, NaN, Infinity, 2.5, 1e308], "c": 7}'
    assert raw(json=text).facts() == {"a": None, "b": [None, None, None, 2.5, 1e308], "c": 7}
    json.dumps(raw(json=text).facts(), allow_nan=False)


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"x":', "}")])
def test_facts_have_a_depth_that_every_reader_shares(opening: str, closing: str) -> None:
    def nested(levels: int) -> Raw:
        return raw(json=('{"y":' + opening * (levels - 1) + "1" + closing * (levels - 1) + "}").encode())

    assert "y" in nested(DEEPEST_FACTS).facts()
    for levels in (DEEPEST_FACTS + 1, 500, 100_000):
        with pytest.raises(InputError, match=r"^s\.tar/k\.json: (lists or objects within each other|not readable)"):
            nested(levels).facts()
    wide = raw(json=json.dumps({"boxes": [[1, 2]] * 1000}).encode())
    assert len(wide.facts()["boxes"]) == 1000


def test_halves_of_characters_are_replaced() -> None:
    facts = rb'{"caption": "a \ud800b \ud83c\udfe0", "label": "\udc00c"}'
    sample = raw(json=facts)
    assert (sample.caption(), sample.label()) == ("a \N{REPLACEMENT CHARACTER}b 🏠", "\N{REPLACEMENT CHARACTER}c")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cls": b"Zebra\n"}, "zebra"),
        ({"cls": b"0"}, "0"),
        ({"cls": b"7", "json": b'{"label": null}'}, "7"),
        ({"cls": b"7", "json": b'{"label": "Horse"}'}, "horse"),
        ({"json": b'{"label": 0}'}, "0"),
    ],
)
def test_labels_of_other_makers_are_captions(files: dict[str, bytes], expected: str) -> None:
    shown = DecodeSettings(min_side=16, max_side=32, label_share=1.0)
    decoder = Decoder("s", Task.IMAGE_UNDERSTANDING, "images", shown)
    assert decoder(raw(png=PICTURE, txt=b"a caption", **files), 0).caption == expected


def test_a_label_in_a_file_of_its_own_is_kept_with_the_latents() -> None:
    def item(sample: Raw, _: int) -> Item:
        return Item(sample.id, "s", Task.IMAGE_RECONSTRUCTION, 1)

    kept = Untouched(item)
    assert kept(raw(cls=b"7", json=b'{"label": null, "n": 1}'), 0).facts == {"label": "7", "n": 1}
    assert kept(raw(cls=b"7", json=b'{"label": 8}'), 0).facts == {"label": 8}


ODD: list[tuple[str, list[tuple[str, bytes]]]] = [
    ("repeated key", [("a.png", PICTURE), ("b.png", PICTURE), ("a.png", png(2, 32, 32))]),
    ("impossible key", [("/data/a.png", PICTURE), ("b.png", PICTURE), ("c.png", PICTURE)]),
    ("impossible key", [("a.png", PICTURE), ("x/../a.png", PICTURE), ("b.png", PICTURE)]),
    ("damaged facts", [("a.png", PICTURE), ("b.png", PICTURE), ("c.png", PICTURE), ("c.json", b"[" * 5000)]),
]


@pytest.mark.parametrize(("cause", "members"), ODD)
def test_an_odd_sample_is_left_out_and_the_others_tokenised(
    cause: str, members: list[tuple[str, bytes]], tiny_models: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(tar_of(members))
    (tmp_path / "in" / "1.tar").write_bytes(tar_of([("z.png", PICTURE)]))
    report = tokenize_shards(str(tmp_path / "in"), tmp_path / "out", settings_for(tiny_models))
    assert (report.complete, report.samples, report.encoded_samples, report.causes) == (True, 3, 3, {cause: 1})
    (skipped,) = read_set(tmp_path / "out").skipped
    assert skipped.reason.startswith(f"{cause}: ")
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["cause"] == cause
    assert skipped.name == f"0.tar/{json.loads(line)['key']}"
    assert tokenize_shards(str(tmp_path / "in"), tmp_path / "out", settings_for(tiny_models)).written == 0


def test_facts_and_captions_that_cannot_be_written_are_cleaned(tiny_models: Path, tmp_path: Path) -> None:
    members = {
        "a.png": PICTURE,
        "a.json": rb'{"caption": "\ud800abc", "score": 1e999}',
        "b.png": PICTURE,
        "b.json": rb'{"label": "\udfff"}',
    }
    (tmp_path / "0.tar").write_bytes(tar_of(members))
    report = tokenize_shards(str(tmp_path / "0.tar"), tmp_path / "out", settings_for(tiny_models))
    assert (report.samples, report.causes) == (2, {})
    first, second = read_shard(str(tmp_path / "out" / "0.tar"))
    assert first.caption() == "\N{REPLACEMENT CHARACTER}abc"
    assert first.facts() == {"caption": "\ud800abc", "score": None}
    assert second.facts() == {"label": "\udfff"}


def test_a_frame_rate_beyond_reason_is_none(clip: NDArray[np.uint8]) -> None:
    def of(rate: object) -> float:
        pixels = torch.from_numpy(clip)
        return _frame_rate(Item("i", "s", Task.VIDEO_RECONSTRUCTION, 1, pixels=pixels, facts={"fps": rate}))

    assert [of(rate) for rate in (25, 29.97, 10**400, 0, -1, "30", None)] == [25.0, 29.97, 0, 0, 0, 0, 0]


@pytest.fixture
def halfway(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Settings]:
    """Three shards that one process has written, and no process has joined."""
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.tar").write_bytes(tar_of([(f"k{number}.png", png(number, 32, 32))]))
    settings = settings_for(tiny_models)
    with monkeypatch.context() as patch:
        patch.setattr("data.latents.tokenize.merge_set", lambda *_, **__: None)
        assert not tokenize_shards(str(tmp_path / "in"), tmp_path / "out", settings).complete
    return tmp_path, settings


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff\x00", b"{}", b"[1]", b'{"tokens": 1}'])
def test_a_shard_without_moments_that_can_be_read_is_written_again(
    halfway: tuple[Path, Settings], damaged: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, settings = halfway
    moments = folder / "out" / "1.moments.json"
    whole, tar = moments.read_bytes(), (folder / "out" / "1.tar").read_bytes()
    moments.write_bytes(damaged)
    with monkeypatch.context() as patch:  # a process whose shard it is not leaves it to the other
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "0")
        other = tokenize_shards(str(folder / "in"), folder / "out", settings)
        assert (other.written, other.complete) == (0, False)
    report = tokenize_shards(str(folder / "in"), folder / "out", settings)
    assert (report.written, report.complete, report.samples) == (1, True, 3)
    assert (folder / "out" / "1.tar").read_bytes() == tar
    facts = read_set(folder / "out").facts["statistics"]
    assert facts["tokens"] > json.loads(whole)["tokens"]
    assert not moments.exists()


def test_moments_are_on_the_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a power cut leaves a name and no contents."""
    named, synced = tmp_path / "1.moments.json", []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.is_file() and not named.exists():
            synced.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    tokenize._write_moments(named, Moments(1, *np.ones((3, 2))))
    assert synced == [named.read_bytes()] != [b""]
    assert tokenize._read_moments(named) is not None
