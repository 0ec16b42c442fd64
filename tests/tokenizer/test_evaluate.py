"""`atoken evaluate`: what is measured, going on after an interruption, several processes, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tokenizer.evaluation_files import (
    Alignment,
    Tower,
    fingerprint,
    options,
    picture_folder,
    scene,
    write_clip,
)
from tokenizer import AToken
from tokenizer.cli import main
from tokenizer.errors import InputError
from tokenizer.evaluation.command.evaluate import Progress, evaluate
from tokenizer.evaluation.command.identity import checksum
from tokenizer.evaluation.command.measurement import chosen_samples
from tokenizer.evaluation.command.presets import PRESETS, find_preset
from tokenizer.evaluation.command.results import COLUMNS
from tokenizer.evaluation.command.systems import ATokenSystem
from tokenizer.evaluation.metrics import psnr
from tokenizer.media import load_image

ADAPTERS = "tests.tokenizer.evaluation_files"
Results = dict[str, Any]


def load(name: str, device: torch.device) -> AToken:
    return AToken.from_pretrained(name, device=device, dtype=torch.float32)


def run(*arguments: Any, **changes: Any) -> Results:
    results = evaluate(options(*arguments, **changes), load)
    assert results is not None
    return results


def measured(results: Results) -> Any:
    """The figures that do not depend on the machine's mood."""
    costs = ("encode_seconds", "decode_seconds", "memory_mb")
    return {
        kind: {
            system: {name: figure for name, figure in row["figures"].items() if name not in costs}
            for system, row in rows.items()
        }
        for kind, rows in results["kinds"].items()
    }


@pytest.mark.usefixtures("bundled")
class TestRun:
    def test_figures_are_those_of_the_model_and_broken_files_are_named(self, tmp_path: Path) -> None:
        data, out = picture_folder(tmp_path / "data"), tmp_path / "out"
        results = run(data, out, models=["atoken-nano", "atoken-nano-d"], adapters=[f"{ADAPTERS}:Perfect"])
        model = AToken.from_pretrained("atoken-nano", dtype=torch.float32)
        lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        wanted = {}
        for path in sorted(data.rglob("[0-9].png")):
            picture = load_image(path)
            copy = model.decode_visual(model.encode_image(picture))[0]
            wanted[path.relative_to(data).as_posix()] = psnr(picture, copy)
        found = {line["id"]: line["systems"]["atoken-nano"]["psnr"] for line in lines if "systems" in line}
        assert found == pytest.approx(wanted)
        rows = results["kinds"]["image"]
        figures = rows["atoken-nano"]["figures"]
        assert figures["psnr"]["value"] == pytest.approx(np.mean(list(wanted.values())))
        assert figures["psnr"]["low"] < figures["psnr"]["value"] < figures["psnr"]["high"]
        assert rows["perfect"]["figures"]["psnr"]["value"] == 100
        assert rows["perfect"]["figures"]["bits_per_pixel"]["value"] == 24
        tokens = [-(-(40 + 4 * number) // 16) * 4 for number in range(5)]
        assert figures["tokens"]["value"] == np.mean(tokens)
        pixels = sum((40 + 4 * number) * 52 for number in range(5))
        assert figures["bits_per_pixel"]["value"] == pytest.approx(sum(tokens) * 48 * 32 / pixels)
        discrete = rows["atoken-nano-d"]["figures"]["bits_per_pixel"]["value"]
        assert discrete == pytest.approx(sum(tokens) * 96 / pixels)
        assert {row["samples"] for row in rows.values()} == {5}
        assert results["left_out"]["samples"] == 1
        assert "red/broken.png" in results["left_out"]["reasons"]["red/broken.png"]
        assert json.loads((out / "results.json").read_text()) == results
        assert len(results["systems"]["atoken-nano"]["weights_sha256"]) == 64
        assert results["machine"]["versions"]["torch"] == torch.__version__
        assert set(figures) <= set(COLUMNS)

    def test_a_run_that_was_interrupted_goes_on_to_the_same_figures(self, tmp_path: Path) -> None:
        data, out = picture_folder(tmp_path / "data", 9), tmp_path / "out"
        frechet = {"metrics": frozenset({"psnr", "frechet"}), "preset": replace(find_preset("native"), side=48)}
        whole = run(data, tmp_path / "whole", **frechet)
        seen: list[int] = []

        def interrupt(done: int) -> None:
            seen.append(done)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            evaluate(options(data, out, **frechet), load, Progress(done=interrupt))
        assert not (out / "results.json").exists()
        with pytest.raises(InputError, match=r"other arguments \(seed\)"):
            run(data, out, seed=1, **frechet)
        again: list[int] = []
        results = evaluate(options(data, out, **frechet), load, Progress(done=again.append))
        assert results is not None
        assert seen == [8]
        assert again == [8, 10]
        assert measured(results) == measured(whole)
        assert "fd-lite0" in results["kinds"]["image"]["atoken-nano"]["figures"]
        assert "fid" not in json.dumps(results["kinds"])
        assert any("singular" in note for note in results["notes"])
        assert not (out / "state").exists()

    def test_a_finished_run_is_read_again_and_other_arguments_are_refused(self, tmp_path: Path) -> None:
        data, out = picture_folder(tmp_path / "data", 2), tmp_path / "out"
        first = run(data, out)
        before = (out / "results.json").stat().st_mtime_ns
        told: list[str] = []
        assert evaluate(options(data, out), load, Progress(remark=told.append)) == json.loads(json.dumps(first))
        assert "measured before" in told[-1]
        assert (out / "results.json").stat().st_mtime_ns == before
        with pytest.raises(InputError, match=r"other arguments \(limit\)"):
            run(data, out, limit=1)
        # Figures depend on the decoder of Gaussians too, which is no part of the model's own weights.
        changed = load("atoken-nano", torch.device("cpu"))
        assert changed.gaussian_decoder is not None
        with torch.no_grad():
            changed.gaussian_decoder.to_gaussians.bias.add_(1)
        with pytest.raises(InputError, match=r"other arguments \(systems\)"):
            evaluate(options(data, out), lambda *_: changed)

    def test_clips_pass_tile_by_tile_and_the_preset_says_how_much_of_them(self, tmp_path: Path) -> None:
        clip = scene(1, 34, 50, frames=30)
        write_clip(tmp_path / "data" / "clip.mp4", clip)
        preset = replace(find_preset("davis-1080p"), frames=26)
        results = run(tmp_path / "data", tmp_path / "out", preset=preset, baselines=["x264", "jpeg"])
        rows = results["kinds"]["video"]
        assert results["systems"]["atoken-nano"]["tiles"] == {"stride": 12, "context": 4}
        assert rows["atoken-nano"]["figures"]["tokens"]["value"] == 7 * 3 * 4
        x264 = rows["x264 at the bits of atoken-nano"]["figures"]
        assert x264["bits_per_pixel"]["value"] <= rows["atoken-nano"]["figures"]["bits_per_pixel"]["value"]
        assert x264["psnr"]["value"] > 25
        assert set(rows) == {"atoken-nano", "x264 at the bits of atoken-nano"}
        with pytest.raises(InputError, match="preset imagenet-256 measures image"):
            run(tmp_path / "data", tmp_path / "none", preset=find_preset("imagenet-256"))

    def test_two_processes_measure_each_sample_once_and_agree_with_one(self, tmp_path: Path, bundled: Path) -> None:
        data = picture_folder(tmp_path / "data")
        arguments = [
            *("evaluate", "--model", bundled / "atoken-nano", "--data", data, "--preset", "imagenet-256"),
            *("--baselines", "jpeg", "--metrics", "psnr,frechet", "--device", "cpu", "--out"),
        ]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        subprocess.run(
            [*launch, "-m", "tokenizer.cli", *map(str, arguments), str(tmp_path / "two")],
            check=True,
            capture_output=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments), str(tmp_path / "one")])
        assert not stop.value.code
        one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
        assert two["machine"]["processes"] == 2
        assert one["samples"] == two["samples"] == {"image": 5}
        assert one["left_out"] == two["left_out"]
        assert one["data"]["measured_sha256"] == two["data"]["measured_sha256"]
        for (kind, rows), other in zip(measured(one).items(), measured(two).values(), strict=True):
            for system, figures in rows.items():
                distance, again = figures.pop("fd-lite0"), other[system].pop("fd-lite0")
                # Features are float32, and batches of other samples round differently in the last digits.
                assert distance["value"] == pytest.approx(again["value"], rel=1e-5), (kind, system)
                assert figures == other[system], (kind, system)


@pytest.mark.usefixtures("bundled")
class TestUnderstanding:
    def test_accuracy_and_recall_of_a_model_that_is_aligned_with_text(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Vectors by decree: of five pictures four are in the direction of their class; each is near its caption."""
        data = picture_folder(tmp_path / "data")
        model = load("atoken-nano", torch.device("cpu"))
        tower = Tower(["red", "blue", *(f"picture {number}" for number in range(5))])
        vectors = {}
        for path in sorted(data.rglob("[0-9].png")):
            number = int(path.stem)
            word = path.parent.name if number != 3 else "blue"
            vector = tower.encode([f"{word} picture {number}"])[0]
            vectors[fingerprint(model.encode_image(load_image(path)).pooled[0])] = vector
        model.text_alignment = Alignment(tower, vectors)  # type: ignore[assignment]
        chosen = frozenset({"psnr", "zero-shot", "retrieval"})
        results = evaluate(options(data, tmp_path / "out", metrics=chosen), lambda *_: model)
        assert results is not None
        row = results["kinds"]["image"]["atoken-nano"]
        assert row["zero_shot"]["classes"] == 2
        assert row["figures"]["top1"] == {"value": 0.8, "low": 0.4, "high": 1.0, "n": 5}
        assert row["figures"]["v2t_r1"]["value"] == 1
        # The second captions say nothing that the tower knows: they are nearest to no picture.
        assert row["figures"]["t2v_r1"]["value"] == 0.5
        assert row["retrieval"]["captions"] == 10
        assert row["figures"]["t2v_r1"]["n"] == 5, "the interval is over pictures"
        assert results["networks"]["text of atoken-nano"]["tower"] == "words"
        asked = options(data, tmp_path / "asked", metrics=chosen, prompts=["{}", "{} picture 3"])
        named = evaluate(asked, lambda *_: model)
        assert named is not None
        assert named["kinds"]["image"]["atoken-nano"]["zero_shot"]["prompts"] == ["{}", "{} picture 3"]
        # Nothing is decoded for what is understood alone.
        monkeypatch.setattr(ATokenSystem, "reconstruct", None)
        alone = evaluate(options(data, tmp_path / "alone", metrics=frozenset({"zero-shot"})), lambda *_: model)
        assert alone is not None
        assert list(alone["kinds"]) == ["image"]
        only = alone["kinds"]["image"]
        assert list(only) == ["atoken-nano"], "baselines understand nothing"
        assert only["atoken-nano"]["figures"] == {"top1": row["figures"]["top1"]}
        assert "retrieval" not in only["atoken-nano"]
        assert "a photo of a {}" in row["zero_shot"]["prompts"]
        with pytest.raises(InputError, match="'a picture' has no place for the name"):
            evaluate(options(data, tmp_path / "wrong", prompts=["a picture"]), lambda *_: model)
        assert not (tmp_path / "wrong").exists()

    def test_a_model_without_alignment_says_so_in_one_line(self, tmp_path: Path) -> None:
        data = picture_folder(tmp_path / "data", 2)
        silent = load("atoken-nano", torch.device("cpu"))
        silent.text_alignment = None
        results = evaluate(options(data, tmp_path / "out", metrics=None, baselines=[], limit=1), lambda *_: silent)
        assert results is not None
        assert "top1" not in results["kinds"]["image"]["atoken-nano"]["figures"]
        assert sum("no text alignment" in note for note in results["notes"]) == 1
        write_clip(tmp_path / "clips" / "a.mp4", scene(0, 32, 32, frames=4))
        with pytest.raises(InputError, match="needs a model with a text alignment"):
            run(tmp_path / "clips", tmp_path / "none", preset=find_preset("msrvtt-1ka"), metrics=None)

    def test_clips_are_understood_frame_by_frame(self, tmp_path: Path) -> None:
        """The vector of a clip is the mean over its frames, each encoded as a still."""
        for name in ("one", "two"):
            write_clip(tmp_path / "data" / f"{name}.mp4", scene(len(name), 32, 32, frames=12))
            (tmp_path / "data" / f"{name}.txt").write_text(f"clip {name}")
        model = load("atoken-nano", torch.device("cpu"))
        asked: list[int] = []

        words = Tower(["one", "two"])

        class Counting:
            def tower(self, _: object) -> Tower:
                return words

            def encode_pooled(self, pooled: torch.Tensor) -> torch.Tensor:
                asked.append(len(pooled))
                return words.encode(["one" if len(asked) == 1 else "two"] * len(pooled))

        model.text_alignment = Counting()  # type: ignore[assignment]
        preset = replace(find_preset("msrvtt-1ka"), side=32, spread=5)
        results = evaluate(options(tmp_path / "data", tmp_path / "out", preset=preset, metrics=None), lambda *_: model)
        assert results is not None
        assert asked == [5, 5]
        assert results["kinds"]["video"]["atoken-nano"]["figures"]["t2v_r1"]["value"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": frozenset({"fid"})}, "--metrics fid: unknown; choose from psnr"),
        (
            {"metrics": frozenset({"psnr"}), "preset": find_preset("msrvtt-1ka")},
            "--metrics psnr: the preset msrvtt-1ka measures retrieval alone; choose another --preset",
        ),
        ({"baselines": ["png"]}, "--baselines png: unknown"),
        ({"models": []}, "nothing to measure"),
        ({"limit": 0}, "--limit must be at least 1"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"adapters": ["nonsense"]}, "write module:Class"),
        ({"adapters": ["nowhere.at.all:X"]}, "nowhere"),
        ({"adapters": ["pathlib:Path"]}, "has no 'encode'"),
        ({"fid_weights": Path("missing.pth"), "metrics": frozenset({"frechet"})}, "FID needs the inception weights"),
        ({"labels": Path("missing.json")}, "missing.json"),
    ],
)
@pytest.mark.usefixtures("bundled")
def test_options_that_make_no_sense_end_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = picture_folder(tmp_path / "data", 1)
    with pytest.raises(InputError, match=message):
        run(data, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists(), "nothing is measured before that is said"


def test_presets_state_their_protocol_and_keep_it() -> None:
    assert set(PRESETS) >= {"imagenet-256", "coco-256", "davis-1080p", "tokenbench-720p", "msrvtt-1ka", "toys4k"}
    wide = scene(2, 300, 700)[0]
    assert find_preset("imagenet-256").fit(wide).shape == (256, 256, 3)
    assert find_preset("msrvtt-1ka").fit(wide, video=True).shape == (224, 224, 3)
    assert find_preset("nano").fit(wide).shape == (256, 597, 3)
    assert find_preset("nano").fit(wide, video=True).shape == (110, 256, 3)
    assert find_preset("davis-1080p").fit(wide, video=True) is not None
    np.testing.assert_array_equal(find_preset("davis-1080p").fit(wide, video=True), wide)
    square = scene(2, 300, 300)[0]
    np.testing.assert_array_equal(replace(find_preset("coco-256"), side=300).fit(square), square)
    with pytest.raises(InputError, match="--preset imagenet: there is none of that name; use one of native"):
        find_preset("imagenet")


def test_examples_are_the_best_the_middle_and_the_worst() -> None:
    values = {"a": 1.0, "b": 5.0, "c": 3.0, "d": 2.0, "e": 4.0}
    assert chosen_samples(values) == {"best": "b", "median": "c", "worst": "a"}
    assert chosen_samples({"a": 1.0}) == {"best": "a"}
    assert chosen_samples({}) == {}


@pytest.mark.usefixtures("bundled")
def test_the_command_prints_json_and_one_line_of_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = picture_folder(tmp_path / "data", 2)
    (tmp_path / "mine.py").write_text("from tests.tokenizer.evaluation_files import Coarse\n")

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in ("evaluate", "--data", data, *arguments)])
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    quick = ("--metrics", "psnr", "--baselines", "none", "--adapter", "mine:Coarse")
    status, out, err = command("--model", "atoken-nano", "--out", "results", "--json", *quick)
    assert status == 0
    results = json.loads(out)
    assert results["kinds"]["image"]["coarse"]["figures"]["bits_per_pixel"]["value"] == 12
    assert "red/broken.png: is truncated or damaged" in err
    status, out, err = command("--model", "atoken-nano", "--out", "results", "--preset", "coco-256", *quick)
    assert (status, out) == (1, "")
    assert err.startswith("error: --out results: holds an evaluation with other arguments (preset")
    assert err.count("\n") == 1


def test_discrete_results_name_the_model_that_was_measured(
    tmp_path: Path, bundled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = picture_folder(tmp_path / "data", 2)
    command = ["evaluate", "--data", str(data), "--model", "atoken-nano", "--discrete", "--metrics", "psnr"]
    with pytest.raises(SystemExit):
        main([*command, "--baselines", "none", "--out", str(tmp_path / "out"), "--json"])
    results = json.loads(capsys.readouterr().out)
    assert list(results["systems"]) == list(results["kinds"]["image"]) == ["atoken-nano-d"]
    system = results["systems"]["atoken-nano-d"]
    assert (system["source"], system["discrete"]) == ("atoken-nano-d", True)
    assert system["weights_sha256"] == checksum(bundled / "atoken-nano-d" / "model.safetensors")
    assert system["weights_sha256"] != checksum(bundled / "atoken-nano" / "model.safetensors")
    with pytest.raises(SystemExit):
        main([*command, "--model", "atoken-nano-d", "--out", str(tmp_path / "twice")])
    assert "two systems are called 'atoken-nano-d'" in capsys.readouterr().err
