"""Files on a disk to shards and back through the loader's decoder: what is kept, what is left out and said."""

from __future__ import annotations

import inspect
import io
import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.cli import app
from data.decode.decoder import Decoder, DecodeSettings
from data.making.captions import Captions
from data.mixture import Task
from data.samples import DEEPEST_FACTS, Raw
from data.shards.manifest import ShardSet, read_set
from data.shards.reader import read_shard
from data.tap import read_items
from tokenizer.assets.pipeline import VIEWS
from tokenizer.cli import main
from tokenizer.errors import InputError
from tokenizer.media import VideoWriter, load_image

CORNERS = "".join(f"v {x} {y} {z}\n" for x in (0, 1) for y in (0, 1) for z in (0, 1))
CUBE = CORNERS + "f 1 2 4 3\nf 5 7 8 6\nf 1 5 6 2\nf 3 4 8 7\nf 1 3 7 5\nf 2 6 8 4\n"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def samples(shards: ShardSet) -> dict[str, Raw]:
    return {raw.key: raw for shard in shards.shards for raw in read_shard(shard.url)}


def pixels(seed: int, height: int = 40, width: int = 56) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures with every sort of caption, and two files that are none."""
    folder = tmp_path / "pictures"
    (folder / "cats").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    Image.fromarray(pixels(0)).save(folder / "a.png")
    Image.fromarray(pixels(1)).save(folder / "b.v2.jpg", quality=90)
    Image.fromarray(pixels(2)).save(folder / "cats" / "c.webp", lossless=True)
    Image.fromarray(pixels(3)).save(folder / "cats" / "d.bmp")
    Image.fromarray(pixels(4, 8, 8)).save(folder / "tiny.png")
    Image.fromarray(pixels(5)).save(folder / ".hidden" / "e.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / "a.txt").write_text("Eine Straße, 街道, شارع 🚗\n", encoding="utf-8")
    (folder / "b.v2.json").write_text('{"caption": "from facts", "label": "street", "licence": "CC0"}')
    (folder / "metadata.csv").write_text("file_name,text,place\ncats/c.webp,a cat,Rome\n", encoding="utf-8-sig")
    return folder


def test_pictures_keep_their_bytes_and_their_words(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        run("shard", "images", pictures, "--out", out, "--labels-from-folders", "--per-shard", 2, "--workers", 1) == 0
    )
    assert "out: 4 images in" in capsys.readouterr().out
    shards = read_set(str(out))
    found = samples(shards)
    assert sorted(found) == ["a", "b_v2", "cats/c", "cats/d"]
    assert found["a"].files["png"] == (pictures / "a.png").read_bytes()
    assert found["b_v2"].files["jpg"] == (pictures / "b.v2.jpg").read_bytes()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found["cats/d"].files["png"]))), pixels(3))
    assert found["a"].caption() == "Eine Straße, 街道, شارع 🚗"
    assert found["b_v2"].caption() == "from facts"
    assert found["cats/c"].caption() == "a cat"
    assert found["cats/c"].facts() == {
        **{"file": "cats/c.webp", "height": 40, "width": 56, "label": "cats", "place": "Rome"},
    }
    assert found["b_v2"].facts()["label"] == "street"
    reasons = {skipped.name: skipped.reason for skipped in shards.skipped}
    assert reasons.keys() == {"tiny.png", "broken.png"}
    assert "at least 16" in reasons["tiny.png"]
    assert "truncated" in reasons["broken.png"]


def test_the_same_bytes_again_and_larger_pictures_reduced(pictures: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        run("shard", "images", pictures, "--out", tmp_path / name, "--max-side", 28, "--workers", workers)
    one, two = (read_set(str(tmp_path / name)) for name in ("one", "two"))
    assert [shard.sha256 for shard in one.shards] == [shard.sha256 for shard in two.shards]
    for raw in samples(one).values():
        extension = next(name for name in ("png", "jpg") if name in raw.files)
        assert load_image(raw.files[extension]).shape == (20, 28, 3)


def test_videos_whole_and_in_clips(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    frames = np.stack([pixels(seed, 48, 64) for seed in range(25)])
    with VideoWriter(folder / "film.mp4", Fraction(10), 48, 64) as writer:
        writer.write(frames)
    (folder / "film.txt").write_text("a film")
    (folder / "cut.mp4").write_bytes((folder / "film.mp4").read_bytes()[:3000])
    run("shard", "videos", folder, "--out", tmp_path / "whole")
    whole = read_set(str(tmp_path / "whole"))
    (raw,) = samples(whole).values()
    assert raw.files["mp4"] == (folder / "film.mp4").read_bytes()
    assert raw.facts() == {"file": "film.mp4", "frames": 25, "fps": 10.0, "height": 48, "width": 64}
    assert [skipped.name for skipped in whole.skipped] == ["cut.mp4"]
    run("shard", "videos", folder, "--out", tmp_path / "clips", "--clip-seconds", 0.8)
    clips = read_set(str(tmp_path / "clips"))
    facts = {key: raw.facts() for key, raw in samples(clips).items()}
    assert {key: (fact["first_frame"], fact["frames"]) for key, fact in facts.items()} == {
        **{"film-0000": (0, 8), "film-0001": (8, 8), "film-0002": (16, 8)},
    }
    assert {raw.caption() for raw in samples(clips).values()} == {"a film"}
    settings = DecodeSettings(training=False, min_side=16, frames=(8, 8), strides=((1, 1),))
    items = list(read_items(clips, Decoder("clips", Task.VIDEO_RECONSTRUCTION, "videos", settings)))
    for number, item in enumerate(items):
        assert item.pixels is not None
        error = np.abs(item.pixels.numpy().astype(np.float32) - frames[8 * number : 8 * number + 8]).mean()
        assert item.pixels.shape == (8, 48, 64, 3)
        assert error < 12  # half the colour resolution of noise is lost; another frame would be off by 60


def test_assets_are_rendered_once(tmp_path: Path) -> None:
    folder = tmp_path / "assets"
    folder.mkdir()
    (folder / "box.obj").write_text(CUBE)
    (folder / "box.json").write_text('{"label": "container", "caption": "a box"}')
    (folder / "bad.obj").write_text("f 1 2 3\n")
    options = ("--resolution", 12, "--views", 14, "--unseen-views", 2)
    assert run("shard", "assets", folder, "--out", tmp_path / "out", *options) == 0
    shards = read_set(str(tmp_path / "out"))
    assert (shards.facts["views"], shards.facts["unseen"]) == (14, 2)
    assert [skipped.name for skipped in shards.skipped] == ["bad.obj"]
    settings = DecodeSettings(views=99)
    (item,) = read_items(shards, Decoder("boxes", Task.ASSET_RECONSTRUCTION, "assets", settings))
    assert item.features is not None
    assert item.coordinates is not None
    assert item.views is not None
    # The shell of a cube of 12 voxels, all of it.
    assert len(item.coordinates) == 12**3 - 10**3
    assert item.views.pictures.shape == (14 + 2, 256, 256, 4)
    assert item.caption == "a box"
    assert item.facts["label"] == "container"
    # The command, which starts without torch, names the number of views that everything else renders.
    assert inspect.signature(app.assets).parameters["views"].default == VIEWS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images", "{nothing}", "--out", "{out}"], "no images in it"),
        (["images", "{missing}", "--out", "{out}"], "is not a folder"),
        (["images", "{pictures}", "--out", "{pictures}/sub"], "lies inside"),
        (["images", "{pictures}", "--out", "{out}", "--captions", "{pictures}/a.txt"], "captions come as .csv"),
        (["images", "{pictures}", "--out", "{out}", "--captions", "{nothing}/x.csv"], "no such file"),
        (["images", "{pictures}", "--out", "{taken}"], "taken"),
    ],
)
def test_what_cannot_be_sharded_is_said_in_one_line(
    arguments: list[str], message: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "shard-000000.tar").write_bytes(b"mine")
    places = {name: str(tmp_path / name) for name in ("nothing", "missing", "out", "taken")}
    assert run("shard", *[argument.format(pictures=pictures, **places) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken" / "shard-000000.tar").read_bytes() == b"mine"


def test_a_seed_below_zero_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("data", "build", "clips", "--out", tmp_path / "out", "--seed", -1) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Invalid value for '--seed'")
    assert not (tmp_path / "out").exists()


def test_tables_of_captions(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    table.write_text('{"file": "x/a.png", "caption": "first", "score": 0.5}\n\n{"file": "b.png", "label": "dog"}\n')
    found = Captions.of(tmp_path, table)
    assert found.facts(tmp_path / "x" / "a.png") == {"caption": "first", "score": 0.5}
    assert found.facts(tmp_path / "b.png") == {"label": "dog"}
    assert found.facts(tmp_path / "c.png") == {}
    table.write_text('{"file": "a"}\n{"caption": "b"}\n')
    with pytest.raises(InputError, match="row 2 names no file"):
        Captions.of(tmp_path, table)
    table.write_text("[1]\n")
    with pytest.raises(InputError, match="line 1: must be a JSON object"):
        Captions.of(tmp_path, table)


def test_lines_of_a_table_end_where_json_says_so(tmp_path: Path) -> None:
    """Captions from the web hold separators that only Python takes for the end of a line."""
    captions = {f"{number}.png": f"one{mark}two" for number, mark in enumerate("\u2028\u2029\x85\x7f")}
    lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in captions.items()]
    for end in ("\n", "\r\n"):
        (tmp_path / "metadata.jsonl").write_bytes((end.join(lines) + end).encode())
        found = Captions.of(tmp_path)
        assert {name: found.facts(tmp_path / name)["caption"] for name in captions} == captions


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize(
    "rows",
    [
        ['a.png,"first', "b.png,second", "c.png,third"],  # to the end of the table
        ['a.png,"first', "b.png,second", 'c.png,"third"'],  # to the next quotation mark
        ['a.png,"first', *["b.png,second"] * 20_000],  # more than the csv module takes into one field
        ['a.png,"first" she said'],
    ],
)
def test_quotation_marks_take_no_rows(rows: list[str], separator: str, tmp_path: Path) -> None:
    table = tmp_path / ("t.csv" if separator == "," else "t.tsv")
    for before in ([], ['z.png,"two', 'lines"']):
        lines = ["file_name,text", *before, *rows]
        table.write_text("\n".join(lines).replace(",", separator) + "\n")
        with pytest.raises(InputError, match=f"^{table}: the row from line {2 + len(before)} on is no row"):
            Captions.of(tmp_path, table)


def test_quotation_marks_of_a_table_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('file_name,text\na.png,"""Hello"", she said, twice"\nb.png,5" wide\n')
    found = Captions.of(tmp_path, tmp_path / "t.csv")
    assert found.table == {"a.png": {"caption": '"Hello", she said, twice'}, "b.png": {"caption": '5" wide'}}


def test_spaces_behind_commas_belong_to_no_column(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('file_name, text, label\na.png, "red, round", ball\nb.png, , cube\n')
    found = Captions.of(tmp_path, tmp_path / "t.csv")
    assert found.table == {"a.png": {"caption": "red, round", "label": "ball"}, "b.png": {"label": "cube"}}


def test_a_table_that_names_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, table, out = tmp_path / "in", tmp_path / "t.csv", tmp_path / "out"
    folder.mkdir()
    for number, name in enumerate(("a.png", "b.png")):
        Image.fromarray(pixels(number)).save(folder / name)
    arguments = ["shard", "images", folder, "--out", out, "--captions", table]
    for rows, message in (
        ("in/a.png,first\nin/b.png,second\n", f"names no file below {folder}: 'in/a.png' is not there"),
        ("", "is empty"),
    ):
        table.write_text("file_name,text\n" + rows)
        assert run(*arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: {table}: {message}; file names are relative to the folder"
        assert not out.exists()
    # One that knows some of them, and more, is what it is; how a path is written makes no difference.
    table.write_text("file_name,text\nin/a.png,first\n./b.png,second\n")
    assert run(*arguments) == 0
    assert {key: raw.caption() for key, raw in samples(read_set(out)).items()} == {"a": None, "b": "second"}


@pytest.mark.parametrize(("one", "other"), [("a.jpg", "a.png"), ("a.b.png", "a_b.png")])
def test_two_files_of_one_key_are_named_before_anything_is_written(
    one: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    for number, name in enumerate(("0.png", one, other)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(folder / name)
    assert run("shard", "images", folder, "--out", out, "--per-shard", 1) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}: {one} and {other} would both be the sample ")
    assert not out.exists()


def test_a_line_break_in_a_name_ends_no_run(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "two\nlines").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b\nc.png", "two\nlines/d\t\x7f.png")):
        Image.fromarray(pixels(number)).save(folder / name)
    (folder / "b\nc.txt").write_text("a caption")
    assert run("shard", "images", folder, "--out", out, "--workers", 1) == 0
    found = samples(read_set(out))
    assert {key: raw.caption() for key, raw in found.items()} == {"a": None, "b_c": "a caption", "two_lines/d__": None}
    assert found["b_c"].facts()["file"] == "b\nc.png"


def test_odd_words_beside_a_file_end_no_run(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    deep = '{"x": ' + "[" * 100 + "]" * 100 + "}"
    beside = {
        "nan": '{"score": NaN, "others": [Infinity, 1e999, 0.5]}',
        "half": '{"caption": "a \\ud800b", "label": "\\udc00"}',
        "list": '{"caption": ["one", "two"]}',
        "number": '{"caption": 7}',
        "none": '{"caption": null}',
        "deep": deep,
    }
    for number, (name, text) in enumerate(beside.items()):
        Image.fromarray(pixels(number)).save(folder / f"{name}.png")
        (folder / f"{name}.json").write_text(text)
    assert run("shard", "images", folder, "--out", out, "--workers", 1) == 0
    found = samples(read_set(out))
    assert {key: raw.caption() for key, raw in found.items()} == {
        **{"nan": None, "half": "a \N{REPLACEMENT CHARACTER}b", "number": "7", "none": None},
    }
    assert found["nan"].facts() == {
        **{"score": None, "others": [None, None, 0.5], "file": "nan.png", "height": 40, "width": 56},
    }
    assert {skipped.name: skipped.reason for skipped in read_set(out).skipped} == {
        "list.png": f"{folder}/list.png: its caption must be text, not ['one', 'two']",
        "deep.png": f"{folder}/deep.json: lists or objects within each other, more than {DEEPEST_FACTS} deep",
    }


def test_a_set_made_without_these_words_is_not_taken_for_one_with_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = tmp_path / "in", tmp_path / "t.csv"
    (folder / "cats").mkdir(parents=True)
    for number, name in enumerate(("a.png", "cats/b.png")):
        Image.fromarray(pixels(number)).save(folder / name)
    words: dict[str, list[object]] = {"none": [], "table": ["--captions", table], "labels": ["--labels-from-folders"]}
    table.write_text("file_name,text\na.png,first\n")
    for name, options in words.items():
        assert run("shard", "images", folder, "--out", tmp_path / name, "--workers", 1, *options) == 0
    # Without words the manifest says what it said before there were any.
    assert read_set(tmp_path / "none").facts == {"licence": "", "max_side": None}
    assert {raw.facts().get("label") for raw in samples(read_set(tmp_path / "labels")).values()} == {None, "cats"}
    for made in words:
        for asked, options in words.items():
            same = made == asked
            assert run("shard", "images", folder, "--out", tmp_path / made, *options) == (0 if same else 1)
            assert ("complete already" if same else "made with other arguments") in capsys.readouterr().err
    table.write_text("file_name,text\na.png,another\n")
    assert run("shard", "images", folder, "--out", tmp_path / "table", *words["table"]) == 1
    assert "(captions: 'table of 1 files" in capsys.readouterr().err


def test_checksums_are_compared(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run("shard", "images", pictures, "--out", out)
    assert run("data", "check", out, "--json") == 0
    shutil.copy(out / "shard-000000.tar", tmp_path / "kept.tar")
    damaged = bytearray((out / "shard-000000.tar").read_bytes())
    damaged[700] ^= 1
    (out / "shard-000000.tar").write_bytes(damaged)
    capsys.readouterr()
    assert run("data", "check", out, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["shards"] == 1
    assert "other checksum" in report["wrong"][0]
