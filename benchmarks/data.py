"""`python -m benchmarks.data`: the loader beside a bare loop over webdataset that decodes the same.

A shard each of photographs, of clips and of assets is written to a temporary folder. "ours" is the loader in one
process: reading, faults, decoding, packing. "bare" takes the samples from `webdataset` and does the same decoding with
Pillow, decord and safetensors alone: each picture to the same size, each clip the same frames, each asset its voxels
and the same number of views. Both take turns on one core; the fastest pass of each counts. MB are bytes of the shard.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import check_options, describe, seconds_in_turns
from data.decode.assets import encode_asset_files
from data.decode.decoder import Decoder, DecodeSettings
from data.loader import Feed, Loader
from data.making.media import encoded_clip
from data.mixture import Source, Task
from data.samples import VIEWS_EXTENSION, VOXELS_EXTENSION, Kind
from data.shards.manifest import ShardSet
from data.shards.writer import Record, write_set
from data.stream import Reading
from tokenizer.assets.load import load_mesh
from tokenizer.assets.packing import pack
from tokenizer.assets.raycast import render_views
from tokenizer.atomic import atomic_path
from tokenizer.cameras import sphere_cameras
from tokenizer.cli.outcome import run
from tokenizer.demo import ASSET, CLIP, PHOTOGRAPH
from tokenizer.media import VideoReader, load_image

IMAGE_SIDE, FRAMES, VIEWS = 256, 16, 4
FILM_FRAMES = 48
FILM_SIZE = (144, 256)
"""Rows and columns of the frames, as `IMAGE_SIDE` makes them."""


@dataclass(frozen=True)
class Case:
    """What is read: a set, how we decode it, and how a bare loop does.

    count: samples of a pass.
    """

    kind: Kind
    task: Task
    shards: ShardSet
    settings: DecodeSettings
    bare: Callable[[dict[str, bytes]], object]


def cases(folder: Path, count: int) -> list[Case]:
    """The three sets, written below `folder`."""
    sides = DecodeSettings(training=False, min_side=16, max_side=IMAGE_SIDE)
    clips = DecodeSettings(training=False, min_side=16, max_side=IMAGE_SIDE, frames=(FRAMES, FRAMES), strides=((1, 1),))
    return [
        Case("images", Task.IMAGE_RECONSTRUCTION, _write(folder, "images", photographs(4 * count)), sides, bare_image),
        Case("videos", Task.VIDEO_RECONSTRUCTION, _write(folder, "videos", films(count)), clips, bare_video),
        Case(
            "assets",
            Task.ASSET_RECONSTRUCTION,
            _write(folder, "assets", models(count)),
            DecodeSettings(training=False, views=VIEWS),
            bare_asset,
        ),
    ]


def _write(folder: Path, kind: Kind, records: list[Record]) -> ShardSet:
    def one(number: int) -> Iterator[Record]:
        yield records[number]

    jobs = list(range(len(records)))
    return write_set(folder / kind, kind, jobs, one, jobs_per_shard=len(jobs), workers=1, facts={})


def photographs(count: int) -> list[Record]:
    """JPEGs of 640 x 480 with the detail of a photograph: enlarged cuts of the demonstration's."""
    from PIL import Image

    whole = Image.fromarray(load_image(PHOTOGRAPH))
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        width = int(rng.integers(whole.width // 2, whole.width))
        height = min(whole.height, width * 3 // 4)
        left = int(rng.integers(0, whole.width - width + 1))
        top = int(rng.integers(0, whole.height - height + 1))
        buffer = io.BytesIO()
        whole.resize((640, 480), box=(left, top, left + width, top + height)).save(buffer, "JPEG", quality=90)
        records.append(Record(f"{number:06d}", {"jpg": buffer.getvalue(), "txt": b"a cup of coffee"}))
    return records


def films(count: int) -> list[Record]:
    """Copies of the demonstration's clip, enlarged to 640 x 360 and played forth and back for two seconds."""
    from PIL import Image

    video = VideoReader(CLIP)
    frames = [Image.fromarray(frame).resize((640, 360), Image.Resampling.BICUBIC) for frame in video.frames()]
    forth = np.stack([np.asarray(frame) for frame in frames])
    clip = encoded_clip(np.concatenate([forth, forth[::-1]])[:FILM_FRAMES], video.fps)
    return [Record(f"{number:06d}", {"mp4": clip, "txt": b"a bunny"}) for number in range(count)]


def models(count: int) -> list[Record]:
    """Copies of the demonstration's asset, with 8 views."""
    mesh = load_mesh(ASSET).normalised()
    views = render_views(mesh, sphere_cameras(8, mesh.radius), IMAGE_SIDE)
    voxels = pack(views, "surface", 32)
    files, facts = encode_asset_files(voxels.features, voxels.coordinates, 32, "surface", views)
    return [Record(f"{number:06d}", files, facts) for number in range(count)]


# ---------------------------------------------------------------------- the bare loops


def bare_image(sample: dict[str, bytes]) -> object:
    """Decode, reduce to the same size, cut to whole patches."""
    from PIL import Image

    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    factor = IMAGE_SIDE / max(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)
    rows, columns = image.height // 16 * 16, image.width // 16 * 16
    return np.asarray(image)[:rows, :columns], sample["txt"].decode()


def bare_video(sample: dict[str, bytes]) -> object:
    """Decode the same frames, reduced to the same size."""
    import decord

    rows, columns = FILM_SIZE
    reader = decord.VideoReader(io.BytesIO(sample["mp4"]), width=columns, height=rows, num_threads=1)
    frames = reader.get_batch(list(range(FRAMES))).asnumpy()
    return frames[:, : frames.shape[1] // 16 * 16, : frames.shape[2] // 16 * 16], sample["txt"].decode()


def bare_asset(sample: dict[str, bytes]) -> object:
    """Read the voxels, decode the picture of all views and take some out."""
    import safetensors.torch
    from PIL import Image

    voxels = safetensors.torch.load(sample[VOXELS_EXTENSION])
    sheet = np.asarray(Image.open(io.BytesIO(sample[VIEWS_EXTENSION])).convert("RGBA"))
    side = json.loads(sample["json"])["view_size"]
    columns = sheet.shape[1] // side
    places = [(number // columns * side, number % columns * side) for number in range(VIEWS)]
    return voxels, np.stack([sheet[row : row + side, column : column + side] for row, column in places])


# ---------------------------------------------------------------------- measuring


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """One record: passes over the set, ours and bare in turns."""
    import webdataset

    source = Source(name="set", task=case.task, samples=case.shards.samples)
    decode = Decoder("set", case.task, case.kind, case.settings)
    url = case.shards.shards[0].url

    def ours() -> None:
        feed = Feed(source, case.shards, decode, Reading(lanes=1, epochs=1))
        loader = Loader([feed], ratios={case.task: 1}, budgets={case.task: 16384}, seed=0, every_step=())
        seen = sum(len(batch) for step in loader for batch in step)
        assert seen == case.shards.samples, f"{seen} of {case.shards.samples}: {loader.quarantine.summary()}"

    def bare() -> None:
        seen = 0
        for sample in webdataset.WebDataset(url, shardshuffle=False, empty_check=False):
            case.bare(sample)
            seen += 1
        assert seen == case.shards.samples

    ours_time, bare_time = seconds_in_turns([ours, bare], torch.device("cpu"), repeats)
    samples, megabytes = case.shards.samples, case.shards.bytes / 1e6
    return {
        "kind": case.kind,
        "samples": samples,
        "samples/s": samples / ours_time,
        "MB/s": megabytes / ours_time,
        "bare samples/s": samples / bare_time,
        "bare MB/s": megabytes / bare_time,
        "ratio": bare_time / ours_time,
    }


def main(arguments: list[str]) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=32, help="clips and assets of a pass; four times as many pictures")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file too")
    options = parser.parse_args(arguments)
    return run(lambda: _run(options, " ".join(["python -m benchmarks.data", *arguments])))


def _run(options: argparse.Namespace, command: str) -> None:
    check_options(options, "count", "repeats")
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # figures are of one core, whatever libraries start
    report: dict[str, Any] = {"command": command}
    report |= describe(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        report["records"] = [measure(case, options.repeats) for case in cases(Path(folder), options.count)]
    Console().print(_table(report))
    if options.out:
        with atomic_path(options.out) as path:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.out}")


def _table(report: dict[str, Any]) -> Table:
    table = Table(title=f"one core of {report['device']}")
    for column in report["records"][0]:
        table.add_column(column, justify="left" if column == "kind" else "right")
    for record in report["records"]:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4g}" for value in record.values()))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
