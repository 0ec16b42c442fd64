"""The command `atoken`: names, trees, formats, JSON, exit status, and help whose examples work as pasted."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenizer import AToken, TokenFile
from tokenizer.cli import main
from tokenizer.evaluation.metrics import psnr, ssim
from tokenizer.gaussians.ply import read_ply
from tokenizer.media import VideoReader, VideoWriter, load_image, save_image

Pixels = NDArray[np.uint8]
COMMANDS = ("demo", "encode", "decode", "reconstruct", "view", "info", "models")


class Outcome:
    """What a command left behind."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Atoken = Callable[..., Outcome]


@pytest.fixture
def atoken(
    bundled: Path,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Atoken:
    """Runs a command in this process, in an empty folder, with tiny random models in place of the bundled ones."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


def write_video(path: Path, clip: Pixels) -> Path:
    with VideoWriter(path, 25, *clip.shape[1:3]) as writer:
        writer.write(clip)
    return path


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class TestNames:
    def test_a_single_file_goes_exactly_where_out_says(self, atoken: Atoken, picture: Pixels, tmp_path: Path) -> None:
        save_image(picture, tmp_path / "a.png")
        assert atoken("encode", "a.png", "--out", "some/where.atok").status == 0
        assert atoken("decode", "some/where.atok", "--out", "there.webp").status == 0
        assert atoken("decode", "some/where.atok", "--out", "back/here.png").status == 0
        assert files_below(tmp_path) == ["a.png", "back/here.png", "some/where.atok", "there.webp"]
        model = AToken.from_pretrained("atoken-nano")
        np.testing.assert_array_equal(load_image("back/here.png"), np.asarray(model.reconstruct(picture)))

    def test_folders_and_globs_keep_their_tree(
        self, atoken: Atoken, picture: Pixels, clip: Pixels, tmp_path: Path
    ) -> None:
        for name in ("in/a.png", "in/sub/b.JPG", "in/sub/deep/c.webp", "in/.hidden/d.png"):
            save_image(picture, tmp_path / name)
        write_video(tmp_path / "in" / "sub" / "clip.mp4", clip)
        (tmp_path / "in" / "notes.txt").write_text("not a picture")
        assert atoken("encode", "in", "--out", "tokens").status == 0
        assert files_below(tmp_path / "tokens") == ["a.atok", "sub/b.atok", "sub/clip.atok", "sub/deep/c.atok"]
        assert atoken("decode", "tokens", "--out", "back", "--image-format", "jpg", "--video-format", "npy").status == 0
        assert files_below(tmp_path / "back") == ["a.jpg", "sub/b.jpg", "sub/clip.npy", "sub/deep/c.jpg"]
        assert np.load(tmp_path / "back/sub/clip.npy").shape == (10, 46, 62, 3)
        assert atoken("encode", "in/*/**/*.webp", "--out", "glob").status == 0
        assert files_below(tmp_path / "glob") == ["sub/deep/c.atok"]
        assert atoken("encode", "in/sub", "tokens/../in/a.png", "--out", "both").status == 0
        assert files_below(tmp_path / "both") == ["a.atok", "sub/b.atok", "sub/clip.atok", "sub/deep/c.atok"]

    def test_existing_files_are_replaced_and_sources_never(
        self, atoken: Atoken, picture: Pixels, tmp_path: Path
    ) -> None:
        save_image(picture, tmp_path / "a.png")
        (tmp_path / "a.atok").write_text("old")
        assert atoken("encode", "a.png", "--out", "a.atok").status == 0
        TokenFile.load("a.atok")
        for command in (("encode", "a.atok", "--out", "a.atok"), ("reconstruct", "a.png", "--out", "a.png")):
            outcome = atoken(*command)
            assert (outcome.status, outcome.err) == (
                1,
                f"error: {command[1]}: the result would replace its own source; choose another --out\n",
            )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["encode", "a.png", "--out", "x.bin"], "token files end in .atok; for a folder write x.bin/"),
            (["encode", "a.png", "b.png", "--out", "x.atok"], "x.atok: is one file for 2 inputs; name a folder"),
            (["encode", "a.png", "a.jpg", "--out", "x"], "a.png and a.jpg would both become x/a; give them to"),
            (["encode", "none*.png", "--out", "x"], "none*.png: no file matches"),
            (["encode", "empty", "--out", "x"], "empty: no pictures, videos or 3D assets ("),
            (["decode", "empty", "--out", "x"], "empty: no .atok files in it"),
            (["decode", "picture.atok", "--out", "x.mp4"], "pictures are written as .png, .jpg, .jpeg, .webp"),
            (["decode", "clip.atok", "--out", "x.png"], "videos are written as .mp4, .webm, .gif, .npy, or with no"),
            (["decode", "clip.atok", "--out", "."], "beside frames; name a new folder"),
            (["encode", "a.png", "--out", "x", "--device", "cuda:77"], "--device cuda:77: cannot be used here"),
            (["encode", "a.png", "--out", "x", "--device", "meta"], "--device meta: cannot be used here"),
            (["encode", "", "--out", "x"], "an argument after encode is empty; is a variable of the shell not set?"),
            (["encode", "a.png", "--out", ""], "an argument after --out is empty"),
            (["view", "."], ".: is a folder; atoken view shows one .ply file"),
            (["encode", "a.png", "--out", "x", "--model", "nano"], "bundled models are atoken-nano, atoken-nano-d"),
            (["info", "--model", "empty"], "empty: not a model folder, config.json is missing"),
        ],
    )
    def test_refusals(
        self, atoken: Atoken, picture: Pixels, clip: Pixels, tmp_path: Path, arguments: list[str], message: str
    ) -> None:
        for name in ("a.png", "a.jpg", "b.png"):
            save_image(picture, tmp_path / name)
        (tmp_path / "empty").mkdir()
        atoken("encode", "a.png", "--out", "picture.atok")
        atoken("encode", write_video(tmp_path / "c.mp4", clip), "--out", "clip.atok")
        before = files_below(tmp_path)
        outcome = atoken(*arguments)
        assert outcome.status == 1
        assert message in outcome.err
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1
        assert files_below(tmp_path) == before

    @pytest.mark.parametrize(
        "arguments", [["encode"], ["nothing"], ["encode", "a.png", "--out", "x", "--dtype", "int4"]]
    )
    def test_wrong_usage_is_status_2(self, atoken: Atoken, arguments: list[str]) -> None:
        outcome = atoken(*arguments)
        assert outcome.status == 2
        assert outcome.err.startswith("error: ")
        assert outcome.err.count("\n") == 1


class TestVideo:
    @pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.gif", "x.npy", "x", "x/"])
    def test_decode_writes_by_ending(self, atoken: Atoken, clip: Pixels, tmp_path: Path, name: str) -> None:
        write_video(tmp_path / "clip.mp4", clip)
        assert atoken("encode", "clip.mp4", "--out", "clip.atok", "--discrete").status == 0
        assert atoken("decode", "clip.atok", "--out", name).status == 0
        path = tmp_path / name
        model = AToken.from_pretrained("atoken-nano-d")
        expected = model.reconstruct_video(tmp_path / "clip.mp4")
        if path.is_dir():
            np.testing.assert_array_equal([load_image(file) for file in sorted(path.iterdir())], expected)
        elif path.suffix == ".npy":
            np.testing.assert_array_equal(np.load(path), expected)
        else:
            reader = VideoReader(path)
            assert (reader.num_frames, reader.height, reader.width) == expected.shape[:3]
            assert float(reader.fps) == 25

    def test_streams_a_long_one_as_the_library_does_at_once(self, atoken: Atoken, clip: Pixels, tmp_path: Path) -> None:
        long = np.concatenate([clip, clip[::-1], clip, clip[::-1]])[:37]
        write_video(tmp_path / "clip.mp4", long)
        assert atoken("encode", "clip.mp4", "--out", "clip.atok").status == 0
        model = AToken.from_pretrained("atoken-nano")
        stored, expected = TokenFile.load("clip.atok"), model.encode_video(tmp_path / "clip.mp4")
        np.testing.assert_array_equal(stored.tokens.positions, expected.tokens.positions)
        np.testing.assert_allclose(stored.tokens.features, expected.tokens.features, atol=1e-5)
        assert stored.origin == expected.origin
        assert atoken("decode", "clip.atok", "--out", "clip.npy").status == 0
        difference = np.load("clip.npy").astype(int) - model.decode_visual(expected)
        assert abs(difference).max() <= 1


class TestReconstruct:
    def test_measures_what_it_writes(self, atoken: Atoken, picture: Pixels, tmp_path: Path) -> None:
        save_image(picture, tmp_path / "a.png")
        [result] = atoken("reconstruct", "a.png", "--out", "pair.png", "--json").json["results"]
        pair = load_image("pair.png")
        original, copy = pair[:, :61], pair[:, 61:]
        np.testing.assert_array_equal(original, picture)
        tokens = 3 * 4  # 45 x 61 pixels in patches of 16 x 16
        assert result["tokens"] == tokens
        assert result["bits_per_pixel"] == pytest.approx(tokens * 48 * 32 / (45 * 61), abs=1e-4)
        assert result["psnr"] == pytest.approx(psnr(original, copy), abs=1e-3)
        assert result["ssim"] == pytest.approx(ssim(original, copy), abs=1e-5)
        assert result["seconds"] > 0

    def test_video(self, atoken: Atoken, clip: Pixels, tmp_path: Path) -> None:
        write_video(tmp_path / "clip.webm", clip)
        outcome = atoken("reconstruct", "clip.webm", "--out", "pair.npy", "--json", "--discrete")
        [result] = outcome.json["results"]
        original = VideoReader(tmp_path / "clip.webm").read()
        pair = np.load("pair.npy")
        np.testing.assert_array_equal(pair[:, :, :61], original)
        copy = AToken.from_pretrained("atoken-nano-d").reconstruct_video(tmp_path / "clip.webm")
        np.testing.assert_array_equal(pair[:, :, 61:], copy)
        assert result["bits_per_pixel"] == pytest.approx(3 * 3 * 4 * 96 / (10 * 45 * 61), abs=1e-4)
        assert result["psnr"] == pytest.approx(psnr(original, copy), abs=1e-3)
        assert result["ssim"] == pytest.approx(
            np.mean([ssim(a, b) for a, b in zip(original, copy, strict=True)]), abs=1e-5
        )

    def test_an_exact_copy_is_json_too(
        self, atoken: Atoken, picture: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_image(picture, tmp_path / "a.png")
        monkeypatch.setattr(AToken, "decode_visual", lambda *_: picture[None])
        outcome = atoken("reconstruct", "a.png", "--out", "b.png", "--json")
        assert "Infinity" not in outcome.out
        [result] = outcome.json["results"]
        assert (result["psnr"], result["ssim"]) == (None, 1.0)
        assert "PSNR inf dB" in atoken("reconstruct", "a.png", "--out", "b.png").out

    def test_half_precision_halves_the_bits(self, atoken: Atoken, picture: Pixels, tmp_path: Path) -> None:
        save_image(picture, tmp_path / "a.png")
        bits = [
            atoken("reconstruct", "a.png", "--out", "b.png", "--json", "--dtype", dtype).json["results"][0]
            for dtype in ("fp32", "bf16")
        ]
        assert bits[0]["bits_per_pixel"] == pytest.approx(2 * bits[1]["bits_per_pixel"], abs=1e-3)


class TestManyFiles:
    def test_a_broken_one_does_not_stop_the_others(self, atoken: Atoken, picture: Pixels, tmp_path: Path) -> None:
        for name in ("in/a.png", "in/c.png"):
            save_image(picture, tmp_path / name)
        (tmp_path / "in/b.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:200])
        outcome = atoken("encode", "in", "--out", "out", "--json")
        assert outcome.status == 1
        assert files_below(tmp_path / "out") == ["a.atok", "c.atok"]
        assert [result["source"] for result in outcome.json["results"]] == ["in/a.png", "in/c.png"]
        [failure] = outcome.json["failures"]
        assert failure["source"] == "in/b.png"
        error, summary = outcome.err.splitlines()
        assert error == f"error: {failure['error']}"
        assert error.startswith("error: in/b.png: is truncated or damaged")
        assert summary == "2 of 3 done, 1 failed: in/b.png"

    def test_each_failure_names_its_file(self, atoken: Atoken, picture: Pixels, tmp_path: Path) -> None:
        save_image(picture, tmp_path / "in/a.png")
        save_image(np.zeros((1, 65537, 3), np.uint8), tmp_path / "in/b.png")
        outcome = atoken("encode", "in", "--out", "out", "--json")
        [failure] = outcome.json["failures"]
        assert failure["error"].startswith("in/b.png: the image has 65537 columns; at most 65536 fit the token grid")
        assert files_below(tmp_path / "out") == ["a.atok"]

    def test_names_that_the_output_cannot_spell(self, tiny_models: Path, picture: Pixels, tmp_path: Path) -> None:
        """Bytes that are no UTF-8 make legal file names; where stdout refuses them they are escaped."""
        name = os.fsdecode(b"\xff.png")
        save_image(picture, tmp_path / name)
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "PYTHONIOENCODING": "utf-8:strict"}
        command = [sys.executable, "-m", "tokenizer.cli", "encode", name, "--out", "x.atok"]
        command += ["--model", str(tiny_models / "atoken-nano")]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("\\udcff.png -> x.atok: 12 tokens, ")

    def test_without_json_each_result_is_a_line(self, atoken: Atoken, picture: Pixels, tmp_path: Path) -> None:
        save_image(picture, tmp_path / "a.png")
        outcome = atoken("encode", "a.png", "--out", "a.atok")
        size = (tmp_path / "a.atok").stat().st_size
        assert outcome.out.startswith(f"a.png -> a.atok: 12 tokens, {size} bytes, ")
        assert (outcome.out.count("\n"), outcome.err) == (1, "")


class TestInformation:
    def test_info(self, atoken: Atoken) -> None:
        facts = atoken("info", "--model", "atoken-nano-d", "--device", "cpu", "--json").json
        assert facts["attention"] == "torch sdpa"
        assert facts["versions"]["torch"]
        model = AToken.from_pretrained("atoken-nano-d")
        assert facts["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert facts["model"]["latent_space"] == model.fingerprint
        assert "attention: torch sdpa" in atoken("info").out

    def test_models(self, atoken: Atoken) -> None:
        found = {entry["name"]: entry for entry in atoken("models", "--json").json["models"]}
        assert found["atoken-nano"]["latents"] == "48 channels"
        assert found["atoken-nano-d"]["latents"] == "8 x 4096 codes"
        assert atoken("models").out.count("\n") == 2

    def test_decode_takes_the_model_that_the_file_names(
        self, atoken: Atoken, bundled: Path, picture: Pixels, tmp_path: Path
    ) -> None:
        save_image(picture, tmp_path / "a.png")
        atoken("encode", "a.png", "--out", "a.atok", "--discrete")
        assert atoken("decode", "a.atok", "--out", "b.png").status == 0
        wrong = atoken("decode", "a.atok", "--out", "c.png", "--model", "atoken-nano")
        assert wrong.status == 1
        assert "made by 'atoken-nano-d'" in wrong.err
        continuous = atoken("encode", "a.png", "--out", "b.atok", "--discrete", "--model", bundled / "atoken-nano")
        assert "is a continuous model; bundled discrete models: atoken-nano-d" in continuous.err
        assert files_below(tmp_path) == ["a.atok", "a.png", "b.png"]


@pytest.fixture(scope="module")
def kept_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first example that runs the demo leaves its folder for the others: it takes longer than they do."""
    return tmp_path_factory.mktemp("demo") / "atoken-demo"


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_examples_work_as_pasted(self, atoken: Atoken, command: str, kept_demo: Path) -> None:
        lines = atoken(command, "--help").out.splitlines()
        examples = [shlex.split(line) for line in lines if line.startswith("    atoken ")]
        assert any(example[1] == command for example in examples)
        for example in examples:
            is_demo = example == ["atoken", "demo", "--out", "atoken-demo"]
            if is_demo and kept_demo.exists():
                shutil.copytree(kept_demo, "atoken-demo")
                continue
            outcome = atoken(*example[1:])
            assert (outcome.status, outcome.err) == (0, "")
            if is_demo:
                shutil.copytree("atoken-demo", kept_demo)

    def test_demo_ends_by_naming_its_files(self, atoken: Atoken, tmp_path: Path) -> None:
        lines = atoken("demo", "--out", "somewhere").out.splitlines()
        named = [line.removeprefix("wrote somewhere/") for line in lines[-8:]]
        assert sorted(named) == files_below(tmp_path / "somewhere")
        assert VideoReader("somewhere/bunny-side-by-side.mp4").num_frames == 36
        assert load_image("somewhere/coffee-side-by-side.png").shape == (256, 768, 3)
        assert VideoReader("somewhere/bread-side-by-side-turntable.mp4").num_frames == 24
        assert len(read_ply("somewhere/bread-side-by-side.ply")) > 100

    def test_without_arguments(self, atoken: Atoken) -> None:
        outcome = atoken()
        assert outcome.status == 0
        assert all(f"  {command} " in outcome.out for command in COMMANDS)


class TestProcess:
    """What only a process of its own shows."""

    def test_unexpected_errors_are_one_line_unless_debugging(
        self, atoken: Atoken, picture: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_image(picture, tmp_path / "a.png")
        monkeypatch.setattr(AToken, "encode_image", lambda *_: 1 / 0)
        outcome = atoken("encode", "a.png", "--out", "a.atok")
        expected = "error: a.png: unexpected ZeroDivisionError: division by zero (ATOKEN_DEBUG=1 shows where)\n"
        assert outcome.err == expected
        monkeypatch.setenv("ATOKEN_DEBUG", "1")
        assert "Traceback" in atoken("encode", "a.png", "--out", "a.atok").err
