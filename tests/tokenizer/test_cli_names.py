"""What commands read and where results go: no file of a user, and no other result, is lost on the way."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tokenizer.test_asset_codec import BOX
from tests.tokenizer.test_cli import Atoken, atoken, files_below  # noqa: F401  (a fixture)
from tokenizer import TokenFile
from tokenizer.assets.load import load_mesh
from tokenizer.assets.pipeline import asset_views
from tokenizer.cli import inputs
from tokenizer.cli.codec import FileCodec, reconstructed_files
from tokenizer.cli.jobs import plan_jobs
from tokenizer.cli.outcome import run
from tokenizer.demo import CLIP, PHOTOGRAPH
from tokenizer.media import load_image, save_image

Pixels = NDArray[np.uint8]


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A mesh as `in/box.obj`."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/box.obj").write_text(BOX)
    (tmp_path / "in/box.mtl").write_text("newmtl orange\nKd 0.9 0.5 0.1\n")
    return tmp_path / "in/box.obj"


def refused(atoken: Atoken, *arguments: str | Path) -> str:  # noqa: F811
    """The one line of a command that does nothing."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    outcome = atoken(*arguments)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    return outcome.err


class TestResultsAreNotLost:
    @pytest.mark.parametrize("name", ["box-sheet.jpg", "box-sheet.png"])
    def test_a_picture_named_like_the_sheet_of_an_asset(
        self,
        atoken: Atoken,  # noqa: F811
        box: Path,
        picture: Pixels,
        name: str,
    ) -> None:
        save_image(picture, box.parent / name)
        assert refused(atoken, "reconstruct", "in", "--out", "out") == (
            f"error: in/{name} and in/box.obj would both become out/box-sheet.png; give them to separate commands\n"
        )

    def test_names_that_only_look_alike_are_no_collision(self, box: Path, picture: Pixels) -> None:
        save_image(picture, box.parent / "box-turntable.png")
        (box.parent / "box-sheet.mp4").write_bytes(CLIP.read_bytes())
        (box.parent / "box-side.png").write_bytes(b"")
        jobs = plan_jobs(
            [str(box.parent)],
            Path("out"),
            inputs.find_inputs,
            exact=False,
            results=lambda job: reconstructed_files(job, ".png", ".mp4"),
        )
        assert len(jobs) == 4

    def test_a_video_named_like_the_turntable_of_an_asset(self, atoken: Atoken, box: Path) -> None:  # noqa: F811
        (box.parent / "box-turntable.mp4").write_bytes(CLIP.read_bytes())
        assert "would both become out/box-turntable.mp4" in refused(atoken, "reconstruct", "in", "--out", "out")

    def test_a_result_never_replaces_another_input(self, atoken: Atoken, box: Path, picture: Pixels) -> None:  # noqa: F811
        save_image(picture, "in/other/a.png")
        save_image(picture[::-1].copy(), "a.png")
        wrong = f"in/a.png: the result of a.png would replace the input {Path.cwd()}/in/a.png"
        save_image(picture, "in/a.png")
        assert refused(atoken, "reconstruct", "a.png", "in/other", "in/a.png", "--out", "in") != ""
        assert refused(atoken, "reconstruct", "a.png", "in", "--out", "in") == f"error: {wrong}; choose another --out\n"
        Path("link").symlink_to("in")
        assert "replace the input" in refused(atoken, "reconstruct", "a.png", "in", "--out", "link")
        save_image(picture, "box-sheet.png")
        error = refused(atoken, "reconstruct", box, "box-sheet.png", "--out", ".")
        assert f"the result of {box} would replace the input box-sheet.png" in error

    def test_the_demo_keeps_files_that_are_not_its_own(
        self,
        atoken: Atoken,  # noqa: F811
        picture: Pixels,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        Path("mine").mkdir()
        save_image(picture, f"mine/{PHOTOGRAPH.stem}.png")
        Path(f"mine/{PHOTOGRAPH.stem}.png").rename(f"mine/{PHOTOGRAPH.name}")
        assert refused(atoken, "demo", "--out", "mine") == (
            f"error: mine/{PHOTOGRAPH.name}: exists and is not the demo's own; choose another folder with --out\n"
        )
        Path(f"mine/{PHOTOGRAPH.name}").unlink()
        monkeypatch.setattr(FileCodec, "reconstruct", lambda *_: 1 / 0)  # whose time this test has not
        for _ in range(2):  # its own originals are no obstacle
            assert "3 failed" in atoken("demo", "--out", "mine").err
            assert Path(f"mine/{PHOTOGRAPH.name}").read_bytes() == PHOTOGRAPH.read_bytes()


def mtl(folder: Path) -> None:
    (folder / "box.obj").write_text(BOX)
    (folder / "box.mtl").write_text(
        "# map_Kd photo.png\nnewmtl orange\n\tmap_Kd -s 2 2 1 tex\\Wood Oak.PNG\nmap_Bump -bm 0.5 bump.png\nd 1.0\n"
    )


def gltf(folder: Path) -> None:
    (folder / "box.gltf").write_text(
        '{"images": [{"uri": "tex/wood%20oak.png"}, {"uri": "bump.png"}, {"uri": "data:image/png;base64,AA"}, 3, {}]}'
    )


class TestFolders:
    @pytest.mark.parametrize("mesh", [mtl, gltf])
    def test_of_pictures_beside_a_mesh_only_its_textures_are_left_out(
        self,
        atoken: Atoken,  # noqa: F811
        picture: Pixels,
        tmp_path: Path,
        mesh: Callable[[Path], None],
    ) -> None:
        names = ("photo.png", "oak.jpg", "sub/deep/other.png", "sub/bump.png", "bump.png", "tex/wood oak.png")
        for name in names:
            save_image(picture, tmp_path / "in" / name)
        (tmp_path / "in/sub/clip.mp4").write_bytes(CLIP.read_bytes())
        mesh(tmp_path / "in")
        found = {path.relative_to(tmp_path / "in").as_posix() for path in inputs.find_inputs(tmp_path / "in")}
        kept = {"photo.png", "oak.jpg", "sub/deep/other.png", "sub/bump.png", "sub/clip.mp4"}
        assert {name for name in found if not name.startswith("box.")} == kept
        assert "left out" in atoken("encode", "--help").out

    @pytest.mark.parametrize(
        ("name", "contents"),
        [
            ("a.obj", b""),
            ("a.obj", b"mtllib ../a.mtl\nmtllib none.mtl\nmtllib \xff\nmtllib a.obj\n"),
            ("a.gltf", b"[" * 10**5),
            ("a.gltf", b"\xff"),
            ("a.gltf", b'{"images": 3}'),
            ("a.gltf", b'{"images": [{"uri": "/a.png"}, {"uri": "../in/a.png"}, {"uri": 3}]}'),
        ],
    )
    def test_damaged_meshes_leave_nothing_out(
        self, picture: Pixels, tmp_path: Path, name: str, contents: bytes
    ) -> None:
        save_image(picture, tmp_path / "in/a.png")
        (tmp_path / "in" / name).write_bytes(contents)
        assert tmp_path / "in/a.png" in inputs.find_inputs(tmp_path / "in")

    def test_views_are_one_input_named_after_their_folder(self, atoken: Atoken, box: Path) -> None:  # noqa: F811
        views, _ = asset_views(load_mesh(box))
        views.save(Path("all/v1.2"))
        assert atoken("encode", "all/v1.2", "--out", "exact.atok").status == 0
        assert TokenFile.load("exact.atok").origin.sizes[0].kind == "asset"
        for source in ("all", "all/v1.2", "all/v1.2/", "all/v1.2/transforms.json"):
            for given in ([source], [source, "in/box.obj"]):
                jobs = plan_jobs(given, Path("out"), inputs.find_inputs, exact=False)
                below = Path("out/all") if source == "all" and len(given) > 1 else Path("out")
                assert jobs[0].target_with(".atok") == below / "v1.2.atok"
        assert refused(atoken, "encode", "all", "--out", "x.atok") == (
            "error: --out x.atok: is one file for a folder of inputs; name a folder\n"
        )
        save_image(load_image(PHOTOGRAPH)[:8, :8], "all/v1.2.png")
        assert "would both become out/v1.2" in refused(atoken, "encode", "all", "--out", "out")


class TestPipes:
    @pytest.mark.parametrize(
        "arguments",
        [
            ["encode", "PIPE", "--out", "x.atok"],
            ["encode", "a.png", "PIPE", "--out", "x"],
            ["reconstruct", "PIPE", "--out", "x.png"],
            ["decode", "PIPE", "--out", "x.png"],
            ["view", "PIPE", "--out", "x.html"],
        ],
    )
    def test_are_refused_at_once(self, atoken: Atoken, picture: Pixels, arguments: list[str]) -> None:  # noqa: F811
        save_image(picture, "a.png")
        os.mkfifo("PIPE")
        assert refused(atoken, *arguments) == (
            "error: PIPE: is a pipe or a device; save what comes from it to a file and give that\n"
        )

    def test_a_device_too(self, atoken: Atoken) -> None:  # noqa: F811
        assert "/dev/null: is a pipe or a device" in refused(atoken, "encode", "/dev/null", "--out", "x.atok")


class TestTokenFiles:
    def test_hidden_folders_are_left_out(self, atoken: Atoken, picture: Pixels) -> None:  # noqa: F811
        """As `encode` leaves them out: nobody asks for copies of what a synchroniser keeps."""
        save_image(picture, "a.png")
        for name in ("in/a.atok", "in/.trash/b.atok", "in/sub/.old/deep/c.atok", "in/.d.atok"):
            assert atoken("encode", "a.png", "--out", name).status == 0
        assert atoken("decode", "in", "--out", "out").status == 0
        assert files_below(Path("out")) == ["a.png"]
        assert atoken("decode", "in/.trash", "--out", "asked").status == 0
        assert files_below(Path("asked")) == ["b.png"]

    def test_a_damaged_one_is_a_failure_in_json_whatever_out_is(self, atoken: Atoken) -> None:  # noqa: F811
        Path("a.atok").write_bytes(b"damaged")
        for out in ("out", "out.png", "out/"):
            outcome = atoken("decode", "a.atok", "--out", out, "--json")
            assert outcome.status == 1
            assert [failure["source"] for failure in outcome.json["failures"]] == ["a.atok"]
            assert outcome.json["failures"][0]["error"].startswith("a.atok: not a token file")

    def test_names_that_are_not_utf_8_are_read_as_they_are_written(self, atoken: Atoken, picture: Pixels) -> None:  # noqa: F811
        name = os.fsdecode(b"caf\xe9")
        save_image(picture, "a.png")
        Path("in").mkdir()
        try:
            Path("a.png").rename(f"in/{name}.png")
        except OSError:
            pytest.skip("this file system has no such names")
        assert atoken("encode", "in", "--out", "tokens").status == 0
        assert atoken("decode", "tokens", "--out", "out").status == 0
        assert atoken("decode", f"tokens/{name}.atok", "--out", "one.png").status == 0
        np.testing.assert_array_equal(load_image(f"out/{name}.png"), load_image("one.png"))


@pytest.mark.parametrize(
    ("encoding", "errors", "wanted"),
    [
        ("ascii", "surrogateescape", b"R\\u2192 \\udcff\n"),  # the locale C where UTF-8 mode is off
        ("ascii", "strict", b"R\\u2192 \\udcff\n"),
        ("utf-8", "strict", "R\u2192 \\udcff\n".encode()),
        ("UTF8", "surrogateescape", "R\u2192 ".encode() + b"\xff\n"),
    ],
)
def test_what_the_output_cannot_say_is_escaped(
    monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str, wanted: bytes
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors=errors, newline="\n"))
    assert run(lambda: print("R\u2192 \udcff", flush=True)) == 0
    assert written.getvalue() == wanted
