"""Looking at shards: figures that are right, captions in any script, sets of other makers, broken samples."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from fontTools.fontBuilder import FontBuilder  # type: ignore[import-untyped]
from fontTools.pens.ttGlyphPen import TTGlyphPen  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

from data.latents.format import LatentItem, encode_latents
from data.looking import fonts
from data.looking.figures import Figures, quantiles, table
from data.looking.fonts import Fonts, wrapped
from data.looking.plots import draw_plots
from data.shards.manifest import Shard, ShardSet
from data.show import Report, first_samples, show
from tokenizer.errors import InputError
from tokenizer.media import VideoWriter
from tokenizer.patches import VisualSize

CAPTIONS = ["a cat & <b>a dog</b>", "一只猫", "قطة", "кот 🐱"]


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> None:
    """A plain WebDataset tar, without manifest."""
    with tarfile.open(path, "w") as tar:
        for number, files in enumerate(samples):
            for extension, contents in files.items():
                entry = tarfile.TarInfo(f"{number:04d}.{extension}")
                entry.size = len(contents)
                tar.addfile(entry, io.BytesIO(contents))


def jpeg(seed: int, height: int, width: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def pictures(count: int) -> list[dict[str, bytes]]:
    """Of all sizes; every fifth without caption, the third one truncated, labels as other makers have them."""
    samples = []
    for number in range(count):
        contents = jpeg(number, 40 + 8 * number, 64)
        files = {"jpg": contents[: len(contents) // 2] if number == 3 else contents, "cls": b"%d" % (number % 2)}
        if number % 5:
            files["txt"] = CAPTIONS[number % 4].encode()
        samples.append(files)
    return samples


def test_a_set_of_another_maker(tmp_path: Path) -> None:
    write_tar(tmp_path / "pictures.tar", pictures(12))
    report = show(str(tmp_path / "pictures.tar"), tmp_path / "out", count=12)
    told = report.as_json()
    kept = [number for number in range(12) if number != 3]
    assert (told["kind"], told["samples"], told["looked_at"], told["shards"]) == ("images", 12, 11, 1)
    assert told["with_caption"] == pytest.approx(8 / 11)
    assert (told["labels"], told["most_frequent_labels"]) == (2, [["0", 6], ["1", 5]])
    assert told["broken"] == {"damaged picture": 1}
    heights = [40 + 8 * number for number in kept]
    assert told["quantities"]["height"] == quantiles(np.array(heights, dtype=np.float64))
    assert told["quantities"]["tokens"]["max"] == (40 + 8 * 11) // 16 * 4
    assert told["quantities"]["caption_characters"]["max"] == len(CAPTIONS[0])
    assert json.loads((tmp_path / "out" / "statistics.json").read_text()) == told
    (broken,) = (tmp_path / "out" / "broken.jsonl").read_text().splitlines()
    assert json.loads(broken)["key"] == "0003"
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert page.count("<figure ") == 11
    assert "a cat &amp; &lt;b&gt;a dog" in page
    assert all(caption in page for caption in CAPTIONS[1:])
    assert "damaged picture: 1" in report.as_text()
    with Image.open(tmp_path / "out" / "plots.png") as plots:
        plots.load()
        assert len(plots.getcolors(1 << 20) or []) > 10


def test_plots_name_the_median_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = Figures(samples=4, values={"tokens": [384.0, 504.0, 925.0, 12345.0]})
    told: list[str] = []
    panels: list[Axes] = []
    line = Axes.axvline

    def noted(panel: Axes, x: float, *, label: str, **style: Any) -> Any:
        told.append(label)
        panels.append(panel)
        return line(panel, x, label=label, **style)

    monkeypatch.setattr(Axes, "axvline", noted)
    draw_plots(tmp_path / "plots.png", figures, None, Fonts())
    ((name, _, _, median, *_),) = table(figures.as_json())
    assert (name, told) == ("tokens", [f"median {median}"])
    assert all(legend is not None and legend.get_frame_on() for legend in (panel.get_legend() for panel in panels))


def test_the_sheet_shows_the_samples_that_the_seed_draws(tmp_path: Path) -> None:
    colours = [(200, 20 * number, 10) for number in range(10)]
    samples = []
    for colour in colours:
        buffer = io.BytesIO()
        Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
        samples.append({"png": buffer.getvalue()})
    write_tar(tmp_path / "plain.tar", samples)
    seen: dict[int, set[tuple[int, ...]]] = {}
    for seed in (0, 1):
        report = show(str(tmp_path / "plain.tar"), tmp_path / "out", count=3, seed=seed)
        told = report.as_text().splitlines()[-1].rpartition(": ")[2].split(", ")
        assert sorted(told) == sorted(path.name for path in (tmp_path / "out").iterdir())
        first = (tmp_path / "out" / "sheet.png").read_bytes()
        show(str(tmp_path / "plain.tar"), tmp_path / "out", count=3, seed=seed)
        assert (tmp_path / "out" / "sheet.png").read_bytes() == first
        with Image.open(io.BytesIO(first)) as sheet:
            counts = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
        # 30x20 pixels, enlarged by 5 to fit 160x160.
        seen[seed] = {colour for colour in colours if counts.get(colour, 0) == 150 * 100}
        assert len(seen[seed]) == 3
    assert seen[0] != seen[1]


def test_clips_are_measured_and_shown_by_three_frames(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    frames = np.zeros((9, 48, 64, 3), np.uint8)
    frames[:3, ..., 0], frames[3:6, ..., 1], frames[6:, ..., 2] = 250, 250, 250
    with VideoWriter(path, 10, 48, 64) as writer:
        writer.write(frames)
    write_tar(tmp_path / "clips.tar", [{"mp4": path.read_bytes()}, {"mp4": path.read_bytes()[:200]}])
    told = show(str(tmp_path / "clips.tar"), tmp_path / "out").as_json()
    values = {name: quantity["median"] for name, quantity in told["quantities"].items()}
    assert values == pytest.approx(
        {"width": 64, "height": 48, "aspect": 4 / 3, "frames": 9, "seconds": 0.9, "frames_per_second": 10, "tokens": 24}
    )
    assert told["broken"] == {"damaged video": 1}
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    columns = [np.nonzero((pixels.argmax(axis=2) == c) & (np.ptp(pixels, axis=2) > 150))[1].mean() for c in range(3)]
    assert columns == sorted(columns)


def voxels(number: int) -> bytes:
    arrays: dict[str, NDArray[Any]] = {
        "features": np.zeros((number, 768), np.uint8),
        "coordinates": np.stack([np.arange(number)] * 3, axis=1).astype(np.int16),
        "world_to_camera": np.eye(4, dtype=np.float32)[None],
        "intrinsics": np.eye(3, dtype=np.float32)[None],
        "seen": np.ones(1, dtype=bool),
    }
    return bytes(safetensors.numpy.save(arrays))


def test_assets_and_latents_are_looked_at_too(tmp_path: Path) -> None:
    facts = json.dumps({"resolution": 16, "label": "chair"}).encode()
    write_tar(tmp_path / "assets.tar", [{"voxels.safetensors": voxels(n), "json": facts} for n in (5, 7, 9)])
    told = show(str(tmp_path / "assets.tar"), tmp_path / "looks").as_json()
    assert told["quantities"]["voxels"] == {"min": 5, "5%": 5, "median": 7, "95%": 9, "max": 9, "mean": 7}
    assert told["most_frequent_labels"] == [["chair", 3]]
    item = LatentItem(
        positions=torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.int32),
        pooled=torch.zeros(2),
        size=VisualSize("video", 8, 16, 32),
        model="m",
        fingerprint="f",
        indices=torch.tensor([[0], [3], [1]], dtype=torch.int32),
    )
    write_tar(tmp_path / "latents.tar", [{"latents.safetensors": encode_latents(item, "0")}])
    assert show(str(tmp_path / "latents.tar"), tmp_path / "latents").figures["quantities"]["tokens"]["max"] == 3


def test_a_set_without_any_sample_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "bad.tar", [{"jpg": b"no picture"}])
    with pytest.raises(InputError, match=r"no sample can be read \(damaged picture: 1\)"):
        show(str(tmp_path / "bad.tar"), tmp_path / "out")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(sum), st.integers(1, 150), st.integers(0, 3))
def test_a_large_set_is_looked_at_in_equal_parts(counts: list[int], limit: int, seed: int) -> None:
    whole = ShardSet("images", tuple(Shard(f"{n}.tar", count, 0, "") for n, count in enumerate(counts)))
    part = first_samples(whole, limit, seed)
    assert part.samples == min(limit, whole.samples)
    taken = {shard.url: shard.samples for shard in part.shards}
    most = max(taken.values())
    for number, count in enumerate(counts):
        share = taken.get(f"{number}.tar", 0)
        assert share <= count
        if len(part.shards) == sum(map(bool, counts)):  # a shard gives less than others only if it has no more
            assert share >= min(count, most - 1)


def test_a_few_samples_of_each_shard_are_read(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [{"jpg": jpeg(number, 32, 32)}] * 9)
    report = show(str(tmp_path / "{0..2}.tar"), tmp_path / "out", limit=7)
    assert (report.figures["samples"], report.figures["looked_at"], report.figures["broken"]) == (27, 7, {})


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab c漢字.-"), max_size=60), st.integers(3, 20), st.integers(1, 5))
def test_wrapped_text_fits_and_loses_nothing_but_its_end(text: str, width: int, lines: int) -> None:
    made = wrapped(text, len, width, lines)
    assert len(made) <= lines
    assert all(len(line) <= width for line in made)
    joined, whole = "".join(made).replace(" ", ""), "".join(text.split())
    assert joined == whole or (joined.endswith("…") and whole.startswith(joined[:-1]) and len(made) == lines)


def font_of(characters: str, path: Path) -> Path:
    """A font that draws these characters, and nothing else, as filled squares."""
    names = [".notdef", *(f"u{ord(character):X}" for character in characters)]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(dict(zip(map(ord, characters), names[1:], strict=True)))
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (900, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def test_captions_get_the_font_that_has_their_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some, more = font_of("漢", tmp_path / "a.ttf"), font_of("漢字", tmp_path / "b.ttf")
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    monkeypatch.setattr(fonts, "_installed", lambda: (broken, some, more))
    found = Fonts()
    assert found.path_for("A dog, кот") == found.fallback
    assert found.path_for("漢") == some
    assert found.path_for("漢 字\u200d") == more
    assert found.path_for("A 漢字 dog") == found.fallback
    assert found.font_for("漢字", 20).getlength("漢") == 18


def test_reports_of_whole_sets_are_short() -> None:
    told: dict[str, Any] = {
        **{"samples": 5, "kind": "latents", "shards": 1, "bytes": 1e6, "looked_at": 5, "labels": 0},
        **{"with_caption": 0.5, "with_label": 0.0, "broken": {}, "left_out_when_made": 2, "quantities": {}},
        "facts": {"latent_space": "f", "model": "m", "statistics": {"mean": [0.0, 1.0], "std": [1.0, 2.0]}},
    }
    lines = Report("set", "out", told).lines()
    assert "latents of m, latent space f; 2 channels, mean 0 to 1 and std 1 to 2" in lines
    assert len(lines) == 5
