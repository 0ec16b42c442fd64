"""Shards of a few tiny samples, and settings of runs on them, for the tests of the curriculum."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from data.shards.writer import Record, write_set
from tests.data.made_samples import asset_files, clip_file, picture_file
from tokenizer.config import load_config, parse_config, read_mapping
from tokenizer.training.curriculum.config import RunConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "tokenizer" / "stages"

IMITATED = 12
"""Numbers of what a network is said to have seen in some of the samples."""
IMITATING = ("loss.imitation=0.3", f"choices.imitated_width={IMITATED}")
"""Settings of a run that learns them."""


def seen(number: int) -> dict[str, bytes]:
    """What a network saw in two samples of three."""
    written = io.BytesIO()
    np.save(written, np.random.default_rng(number).random(IMITATED).astype(np.float16))
    return {"teacher.npy": written.getvalue()} if number % 3 else {}


def picture(number: int) -> Iterator[Record]:
    """A square of one colour on another ground, 32 to 64 pixels a side."""
    rng = np.random.default_rng(number)
    name = list(COLOURS)[number % len(COLOURS)]
    height, width = (16 * int(n) for n in rng.integers(2, 5, 2))
    pixels = np.full((height, width, 3), rng.integers(0, 256), np.uint8)
    pixels[8 : height - 8, 8 : width - 8] = COLOURS[name]
    pixels = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    caption = f"a {name} square number {number}".encode()
    files = {"png": picture_file(pixels, "PNG"), "txt": caption, **seen(number)}
    yield Record(f"p{number:03d}", files, {"label": name})


def clip(number: int) -> Iterator[Record]:
    """The same moving colours every time, under another caption."""
    yield Record(f"v{number:03d}", {"mp4": clip_file(16, 32, 32), "txt": f"waves number {number}".encode()}, {})


def asset(number: int) -> Iterator[Record]:
    """The same voxels every time, of one of two classes."""
    files, facts = asset_files()
    label = ("chair", "table")[number % 2]
    files = {**files, "txt": f"a {label} number {number}".encode(), **seen(number)}
    yield Record(f"a{number:03d}", files, {**facts, "label": label})


def make_sets(folder: Path, *, videos: bool = True) -> None:
    """`datasets/smoke/{images,videos,assets}` below a folder, as the smoke configurations name them."""
    kinds: dict[str, Any] = {"images": (picture, 24)}
    if videos:
        kinds |= {"videos": (clip, 8), "assets": (asset, 8)}
    for kind, (make, count) in kinds.items():
        out = folder / "datasets" / "smoke" / kind
        write_set(out, kind, list(range(count)), make, jobs_per_shard=2, workers=1, facts={})  # type: ignore[arg-type]


def lines(path: Path) -> list[dict[str, Any]]:
    """A JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class StubTower:
    """A `TextTower` without weights: a text's vector is drawn from its letters."""

    name = "stub"
    width = 16

    def encode(self, texts: Sequence[str]) -> Tensor:
        seeds = [zlib.crc32(text.encode()) for text in texts]
        rows = [torch.randn(self.width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)


def smoke(stage: int, *overrides: str) -> RunConfig:
    """A smoke configuration with changes."""
    return load_config(RunConfig, CONFIGS / f"smoke-stage{stage}.yaml", overrides)


def pictures_alone(*overrides: str) -> RunConfig:
    """Stage 1 without texts: what starts and steps fastest."""
    values = read_mapping(CONFIGS / "smoke-stage1.yaml")
    values["text"] = {"tower": "none"}
    values["data"]["every_step"] = []
    del values["data"]["budgets"]["image_understanding"]
    values["data"]["sources"] = values["data"]["sources"][1:]
    values["validation"]["sources"] = values["validation"]["sources"][:1]
    for override in overrides:
        key, _, text = override.partition("=")
        node: dict[str, Any] = values
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = yaml.safe_load(text)
    return parse_config(RunConfig, values, "pictures alone")
