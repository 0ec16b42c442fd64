"""Shards as a source of `atoken evaluate`: the same samples as from files, each once, and faults by number."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest

from data.config import open_held_out
from data.evaluation import PackedAsset, ShardSource, open_shards
from data.shards.manifest import read_set
from tests.data.made_samples import asset_files, clip_file, picture_file, scene
from tests.data.shard_files import tar_of
from tokenizer.errors import InputError
from tokenizer.evaluation.command.datasets import READERS, Source, open_source
from tokenizer.evaluation.command.presets import find_preset
from tokenizer.evaluation.command.samples import load_sample

NATIVE = find_preset("native")


def pictures(folder: Path, shards: int = 3, each: int = 4) -> list[bytes]:
    """Tars of PNGs with captions and labels; returns the files in order."""
    files = [picture_file(scene(1, 32 + number, 40)[0] + np.uint8(number), "PNG") for number in range(shards * each)]
    folder.mkdir()
    for shard in range(shards):
        members = []
        for number in range(shard * each, (shard + 1) * each):
            facts = json.dumps({"label": f"class {number % 2}"}).encode()
            caption = f"picture {number}\n\nsecond line".encode()
            members += [(f"{number:04d}.png", files[number]), (f"{number:04d}.txt", caption)]
            members += [(f"{number:04d}.json", facts)]
        (folder / f"s-{shard}.tar").write_bytes(tar_of(members))
    return files


def opened(spec: Path) -> Source:
    source: Source = ShardSource(read_set(str(spec)), str(spec))  # mypy checks that the protocol of the tokenizer fits
    return source


def test_the_tokenizer_finds_shards_through_the_entry_point(tmp_path: Path) -> None:
    pictures(tmp_path / "set", 1)
    assert "shards" in {entry.name for entry in importlib.metadata.entry_points(group=READERS)}
    assert isinstance(open_source(str(tmp_path / "set")), ShardSource)
    assert open_shards(str(tmp_path)) is None
    assert isinstance(open_source(str(tmp_path / "set" / "s-0.tar")), ShardSource)


@pytest.mark.parametrize("numbers", [list(range(12)), [0, 5, 6, 11], [7], list(range(1, 12, 3))])
def test_any_process_reads_any_part_of_a_set(tmp_path: Path, numbers: list[int]) -> None:
    files = pictures(tmp_path / "set")
    source = opened(tmp_path / "set")
    found = list(source.read(numbers))
    assert [raw.content for raw in found] == [files[number] for number in numbers]
    assert [raw.id for raw in found] == [f"s-{number // 4}.tar/{number:04d}.png" for number in numbers]
    assert found[0].captions == (f"picture {numbers[0]}", "second line")
    assert found[0].label == f"class {numbers[0] % 2}"
    assert len({raw.digest() for raw in found}) == len(numbers)
    sample = load_sample(found[-1], NATIVE)
    assert sample.frames.shape == (1, 32 + numbers[-1], 40, 3)
    assert source.facts()["samples"] == len(source) == 12


def test_what_cannot_be_read_comes_as_a_fault_and_the_rest_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    files = pictures(folder)
    source = opened(folder)
    damaged = folder / "s-1.tar"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 3])
    found = list(source.read(range(12)))
    assert len(found) == 12
    whole = [number for number, raw in enumerate(found) if raw.fault is None]
    assert {0, 1, 2, 3, 4, 8, 9, 10, 11} <= set(whole)
    assert {6, 7}.isdisjoint(whole)
    assert all(found[number].content == files[number] for number in whole)
    assert len({raw.id for raw in found}) == 12
    with pytest.raises(InputError, match=r"s-1\.tar"):
        load_sample(found[7], NATIVE)


def test_clips_and_packed_assets_become_what_is_measured(tmp_path: Path) -> None:
    files, facts = asset_files()
    members = [(f"a.{ending}", data) for ending, data in files.items()]
    tars = {
        "clips": tar_of([("c.mp4", clip_file(6))]),
        "assets": tar_of([*members, ("a.json", json.dumps(facts).encode())]),
    }
    for name, tar in tars.items():
        (tmp_path / f"{name}.tar").write_bytes(tar)
    clip = load_sample(next(iter(opened(tmp_path / "clips.tar").read([0]))), NATIVE)
    assert clip.frames.shape == (6, 96, 128, 3)
    assert clip.frame_rate == 25
    raw = next(iter(opened(tmp_path / "assets.tar").read([0])))
    assert isinstance(raw.content, PackedAsset)
    assert raw.content.rule == "surface"
    asset = load_sample(raw, NATIVE)
    assert asset.frames.shape == (2, 32, 32, 3)  # the unseen views alone
    assert asset.asset is not None


def test_latents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latents.tar").write_bytes(tar_of([("a.latents.safetensors", b"x")]))
    with pytest.raises(InputError, match="holds latents"):
        open_shards(str(tmp_path / "latents.tar"))


def test_a_held_out_source_of_broken_samples_says_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "broken.tar").write_bytes(tar_of([("0000.png", b"no picture"), ("0001.png", b"none either")]))
    settings = {"name": "mine", "task": "image_reconstruction", "shards": str(tmp_path / "broken.tar")}
    with pytest.raises(InputError, match=r"mine: none of its samples .*; 2 are broken, the last: broken\.tar/0001"):
        open_held_out([settings], budget=256, limit=10)
