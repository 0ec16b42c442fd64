"""Odd files in `atoken evaluate`: each is left out with its reason, and everything else is measured and written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.tokenizer.evaluation_files import Coarse, options, scene, write_clip
from tokenizer.errors import InputError
from tokenizer.evaluation.accumulate import Records
from tokenizer.evaluation.command import baselines, datasets, runner, samples
from tokenizer.evaluation.command.baselines import CODERS, Coder, SameRate, best_within
from tokenizer.evaluation.command.datasets import FileSource
from tokenizer.evaluation.command.evaluate import evaluate
from tokenizer.evaluation.command.examples import _example, _ranking
from tokenizer.evaluation.command.measurement import Found, Known, Measurement, chosen_samples
from tokenizer.evaluation.command.names import printable, told_apart
from tokenizer.evaluation.command.samples import Sample
from tokenizer.evaluation.command.systems import NotHandledError
from tokenizer.media import VideoReader, save_image

COARSE = "tests.tokenizer.evaluation_files:Coarse"


def run(data: Path, out: Path, **changes: Any) -> Any:
    def no_model(*_: object) -> Any:
        raise AssertionError("no model is asked for")

    return evaluate(options(data, out, **{"models": [], "adapters": [COARSE], **changes}), no_model)


def pictures(folder: Path, count: int = 3) -> Path:
    for number in range(count):
        save_image(scene(number, 24, 20)[0], folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("error", [AttributeError("no codec"), ZeroDivisionError("1/0"), MemoryError()])
def test_whatever_fails_while_a_sample_is_loaded_costs_that_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    data, load = pictures(tmp_path / "data"), samples.load_sample

    def failing(raw: Any, preset: Any) -> Sample:
        if raw.id == "1.png":
            raise error
        return load(raw, preset)

    monkeypatch.setattr(runner, "load_sample", failing)
    results = run(data, tmp_path / "out")
    assert results["samples"] == {"image": 2}
    [(name, reason)] = results["left_out"]["reasons"].items()
    assert name == "1.png"
    assert reason.startswith(type(error).__name__)
    assert run(data, tmp_path / "out") == json.loads(json.dumps(results))


def test_a_system_that_fails_ends_the_run_and_is_named_with_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, encode = pictures(tmp_path / "data"), Coarse.encode

    def failing(self: Coarse, frames: Any) -> Any:
        if np.array_equal(frames, scene(1, 24, 20)):
            raise RuntimeError("a kernel larger than its input")
        return encode(self, frames)

    monkeypatch.setattr(Coarse, "encode", failing)
    with pytest.raises(InputError, match=r"^1\.png: coarse failed: RuntimeError: a kernel larger than its input"):
        run(data, tmp_path / "out")
    monkeypatch.setattr(Coarse, "encode", encode)
    assert run(data, tmp_path / "out")["samples"] == {"image": 3}


def test_a_folder_of_results_takes_one_run_at_a_time(tmp_path: Path) -> None:
    """Another process holds it: nothing is measured; and it goes on from what that one has left."""
    data, out = pictures(tmp_path / "data"), tmp_path / "out"
    hold = """
import pathlib, sys
from tokenizer.lock import only_run
with only_run(pathlib.Path(sys.argv[1])):
    print("in", flush=True)
    input()
"""
    command = [sys.executable, "-c", hold, str(out / "state")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match=rf"another run is writing here \(process {other.pid} on "):
            run(data, out)
        other.communicate("\n")
    assert not (out / "results.json").exists()
    assert run(data, out)["samples"] == {"image": 3}
    assert not (out / "state").exists()


def test_whatever_fails_while_a_file_is_looked_at_costs_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = datasets.file_kind

    def failing(path: Path) -> Any:
        if path.name == "1.png":
            raise RecursionError("too deep")
        return kind(path)

    monkeypatch.setattr(datasets, "file_kind", failing)
    results = run(pictures(tmp_path / "data"), tmp_path / "out")
    assert results["samples"] == {"image": 2}
    assert results["left_out"]["reasons"] == {"1.png": "RecursionError: too deep"}


def test_a_film_of_damaged_times_is_measured_and_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate near zero, as that of frames hours apart, is no rate for the player of the report."""
    write_clip(tmp_path / "data" / "clip.mp4", scene(1, 32, 32, frames=6))
    inside = VideoReader.__init__

    def slow(self: Any, *arguments: Any, **named: Any) -> None:
        inside(self, *arguments, **named)
        self.fps = 1e-7

    monkeypatch.setattr(VideoReader, "__init__", slow)
    assert run(tmp_path / "data", tmp_path / "out")["samples"] == {"video": 1}
    assert "data:video/webm" in (tmp_path / "out" / "report.html").read_text()


def test_views_too_wide_for_a_row_of_the_report_are_shown_as_far_as_they_go() -> None:
    views = np.zeros((8, 4, 2100, 3), np.uint8)
    shown = _example("asset", "best", Sample("a", "asset", "", views), {"model": views}, {})
    assert shown.note == "the first 7 of 8 views"
    widths = [Image.open(io.BytesIO(panel.data)).width for panel in shown.panels]
    assert widths == [7 * 2100] * 2
    small = np.zeros((8, 4, 256, 3), np.uint8)
    assert _example("asset", "best", Sample("a", "asset", "", small), {}, {}).note == ""


def test_a_figure_of_fewer_samples_than_the_table_counts_is_noted(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", 2)
    save_image(scene(2, 10, 20)[0], data / "low.png")
    results = run(data, tmp_path / "out", baselines=["jpeg"])
    row = results["kinds"]["image"]["coarse"]
    assert (row["samples"], row["figures"]["psnr"]["n"], row["figures"]["ssim"]["n"]) == (3, 3, 2)
    note = "SSIM (image) is of 2 of 3 samples: the others have a side below 11 pixels"
    assert results["notes"] == [note]
    assert note in (tmp_path / "out" / "results.md").read_text()
    assert note in (tmp_path / "out" / "report.html").read_text()
    assert run(pictures(tmp_path / "large"), tmp_path / "all")["notes"] == []


def test_a_picture_too_wide_for_webp_is_measured_without_webp(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", 2)
    save_image(scene(1, 8, 16_400)[0], data / "wide.png")
    results = run(data, tmp_path / "out", baselines=["jpeg", "webp"])
    rows = results["kinds"]["image"]
    assert {name: row["samples"] for name, row in rows.items()} == {
        "coarse": 3,
        "jpeg at the bits of coarse": 3,
        "webp at the bits of coarse": 2,
    }
    reason = "16400x8 is more than the 16383 pixels a side of webp"
    assert rows["webp at the bits of coarse"]["not_handled"] == {"wide.png": reason}
    [note] = [note for note in results["notes"] if "webp" in note]
    assert note == f"webp at the bits of coarse (image) is measured without what it cannot code: wide.png ({reason})"
    assert note in (tmp_path / "out" / "results.md").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    [wide] = [line for line in lines if line["id"] == "wide.png"]
    assert set(wide["systems"]) == {"coarse", "jpeg at the bits of coarse"}
    assert results["left_out"]["samples"] == 0


@pytest.mark.parametrize(("name", "side"), [("jpeg", 65_500), ("webp", 16_383), ("x264", 16_384)])
def test_codecs_say_how_large_a_picture_may_be(name: str, side: int) -> None:
    for width, fits in ((side, True), (side + 2, False)):
        frames = np.zeros((1, 2, width, 3), np.uint8)
        sample = Sample("a", CODERS[name].kind, "", frames)
        system = SameRate(CODERS[name], "model")
        if fits:
            assert system.reconstruct(sample, 1e9).frames.shape == frames.shape
            continue
        with pytest.raises(NotHandledError, match=f"{width}x2 is more than the {side} pixels"):
            system.reconstruct(sample, 1e9)
        with pytest.raises(NotHandledError, match=f"{name} cannot code it"):
            best_within(CODERS[name], frames, 1e9)


def test_a_quality_that_cannot_be_coded_is_passed_over() -> None:
    frames = np.zeros((1, 2, 2, 3), np.uint8)

    def code(_: Any, quality: int, __: Any) -> baselines.File:
        if quality > 40:
            raise ValueError("partition 0 overflow")
        return bytes(quality), lambda: frames

    coder = Coder("odd", "image", (1, 100), (None,), code, "a coder", 100)
    assert len(best_within(coder, frames, 1e9)[0]) == 40
    assert len(best_within(coder, frames, 8 * 7)[0]) == 7


def test_what_was_not_handled_outlives_an_interruption() -> None:
    measurement = Measurement({})
    known = Known("image", 0, "00")
    measurement.add("a", known, {"x": Found({"psnr": 1.0}), "webp": Found(not_handled="too wide")})
    again = Measurement({})
    again.restore(*measurement.state())
    assert again.not_handled == {("image", "webp"): {"a": "too wide"}}
    assert again.gathered().not_handled == again.not_handled


def rename(path: Path, name: bytes) -> None:
    path.rename(path.with_name(os.fsdecode(name)))


@pytest.mark.parametrize("broken", [True, False])
def test_names_that_are_not_utf_8_are_written_as_they_can_be(tmp_path: Path, broken: bool) -> None:
    data = pictures(tmp_path / "data")
    if broken:
        (data / "1.png").write_bytes(b"x")
    rename(data / "1.png", b"caf\xe9.png")
    results = run(data, tmp_path / "out")
    name = r"caf\udce9.png"
    lines = (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert name in {json.loads(line)["id"] for line in lines}
    if broken:
        assert list(results["left_out"]["reasons"]) == [name]
        assert name in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
        assert name in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    json.dumps(results, ensure_ascii=False).encode("utf-8")
    before = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    assert run(data, tmp_path / "out") == json.loads(json.dumps(results))
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == before


def test_a_folder_that_is_not_utf_8_can_be_measured_and_is_its_own_class(tmp_path: Path) -> None:
    pictures(tmp_path / "data" / "class")
    rename(tmp_path / "data" / "class", b"\xe9t\xe9")
    rename(tmp_path / "data", b"donn\xe9es")
    data = next(path for path in tmp_path.iterdir() if path.name.startswith("donn"))
    results = run(data, tmp_path / "out")
    assert results["data"]["source"].endswith(r"donn\udce9es")
    lines = (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["label"] for line in lines} == {r"\udce9t\udce9"}
    assert run(data, tmp_path / "out") == json.loads(json.dumps(results))


def test_printable_text_is_the_same_text() -> None:
    given = {"größe": ["日本", 1, None, 2.5], "caf\udce9": ("a\ud800b",)}
    assert printable(given) == {"größe": ["日本", 1, None, 2.5], r"caf\udce9": [r"a\ud800b"]}


def test_names_are_told_apart_and_others_stay() -> None:
    assert told_apart(["a", "b", "a", "a.2", "a"]) == ["a", "b", "a.3", "a.2", "a.4"]
    assert told_apart(["b", "a"]) == ["b", "a"]


class Repeating(FileSource):
    """Gives every sample one name."""

    def read(self, numbers: Any) -> Any:
        for sample in super().read(numbers):
            yield type(sample)("same", sample.kind, sample.content)


def test_a_source_that_repeats_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pictures(tmp_path / "data")
    files = [(path.name, path) for path in sorted(data.iterdir())]
    monkeypatch.setattr("tokenizer.evaluation.command.evaluate.open_source", lambda *_: Repeating(files, "mine"))
    with pytest.raises(InputError, match="two samples are called 'same'"):
        run(data, tmp_path / "out")
    one, two = Measurement({}), Measurement({})
    for number, part in enumerate((one, two)):
        part.add("same", Known("image", number, "00"), {})
    with pytest.raises(InputError, match="two samples are called 'same'"):
        one.merge(two)


def test_a_run_that_lost_samples_writes_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, measure = pictures(tmp_path / "data", 9), runner.Runner._measure

    def forgetful(self: Any, group: Any) -> None:
        measure(self, group[:-1] if len(group) == 8 else group)

    monkeypatch.setattr(runner.Runner, "_measure", forgetful)
    with pytest.raises(InputError, match="8 samples were measured or left out of 9"):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_files_of_one_name_from_several_folders_are_two_samples(tmp_path: Path) -> None:
    for number, part in enumerate(("x", "y")):
        save_image(scene(number, 24, 20)[0], tmp_path / part / "a.png")
    source = FileSource([("a.png", tmp_path / part / "a.png") for part in ("x", "y")], "mine")
    assert [raw.id for raw in source.read([0, 1])] == ["a.png", "a.png.2"]


def test_examples_are_shown_whichever_figure_was_asked_for(tmp_path: Path) -> None:
    data, out = pictures(tmp_path / "data"), tmp_path / "out"
    write_clip(data / "clip.webm", scene(3, 24, 20, 4))
    run(data, out, metrics=frozenset({"ssim"}))
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    found = {line["id"]: line["systems"]["coarse"]["ssim"] for line in lines if line["kind"] == "image"}
    page = (out / "report.html").read_text()
    assert [page.count(tag) for tag in ("<img", "<video")] == [6, 1]
    for rank, place in (("Best", -1), ("Median", 1), ("Worst", 0)):
        assert f"<h3>{rank}: <code>{sorted(found, key=found.__getitem__)[place]}</code>" in page


def test_the_best_example_has_the_least_lpips_where_nothing_else_is_known() -> None:
    records = Records()
    for name, value in {"a": 0.3, "b": 0.1, "c": 0.2}.items():
        records.add(name, {"bits": 8.0, "lpips_alexnet": value})
    assert chosen_samples(_ranking(records)) == {"best": "b", "median": "c", "worst": "a"}
    records.add("d", {"bits": 8.0, "psnr": 30.0})
    assert _ranking(records) == {"d": 30.0}
    assert not _ranking(Records())
