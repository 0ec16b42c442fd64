"""Sets with what an image network sees in them: the network's own features of the right pictures, nothing else lost."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.decode.decoder import Decoder, DecodeSettings
from data.making import teach as module
from data.making.teach import teach
from data.mixture import Task
from data.samples import Raw, SampleError
from data.shards.manifest import read_set
from data.shards.reader import read_shard
from data.shards.writer import Record, write_set
from tests.data.made_samples import asset_files, asset_parts, clip_file, picture_file, raw, scene
from tests.data.shard_files import tar_of
from tokenizer.errors import InputError
from tokenizer.losses.pictures import squares

EVERY = {"images": Task.IMAGE_UNDERSTANDING, "videos": Task.VIDEO_UNDERSTANDING, "assets": Task.ASSET_UNDERSTANDING}


class Corners:
    """An image network of 12 numbers: the corners of the square."""

    name, width, side = "corners", 12, 32

    def __call__(self, images: Tensor) -> Tensor:
        assert images.shape[1:] == (3, 32, 32)
        return images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].flatten(1)


@pytest.fixture(autouse=True)
def corners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_network", lambda *_: Corners())


def picture_record(number: int) -> Iterator[Record]:
    content = picture_file(scene(1, 40 + number, 50)[0], "PNG")
    if number == 4:
        content = content[: len(content) // 2]
    yield Record(f"{number:03d}", {"png": content, "txt": b"a ball"}, {"label": "ball", "number": number})


def clip_record(number: int) -> Iterator[Record]:
    yield Record(f"{number:03d}", {"mp4": clip_file(9 + number), "txt": b"a ball"}, {})


def asset_record(number: int) -> Iterator[Record]:
    files, facts = asset_files()
    yield Record(f"{number:03d}", {**files, "txt": b"a cloud"}, facts)


def samples(folder: Path) -> dict[str, Raw]:
    return {found.key: found for shard in read_set(folder).shards for found in read_shard(shard.url)}


def seen(found: Raw) -> Tensor:
    return torch.from_numpy(np.load(io.BytesIO(found.files["teacher.npy"])).astype(np.float32))


def test_pictures_are_seen_whole_and_broken_ones_are_named(tmp_path: Path) -> None:
    write_set(
        tmp_path / "set", "images", range(7), picture_record, jobs_per_shard=3, workers=1, facts={"licence": "CC0"}
    )
    made = teach(str(tmp_path / "set"), tmp_path / "taught")
    assert made.samples == 6
    assert len(made.shards) == 3
    assert made.facts == {"licence": "CC0", "teacher": "corners", "teacher_pictures": 8}
    assert [skipped.name for skipped in made.skipped] == ["shard-000001.tar/004"]
    before, after = samples(tmp_path / "set"), samples(tmp_path / "taught")
    assert list(after) == [key for key in before if key != "004"]
    for key, found in after.items():
        assert {name: found.files[name] for name in before[key].files} == dict(before[key].files)
        pixels = np.asarray(Image.open(io.BytesIO(found.files["png"])).convert("RGB"))
        expected = Corners()(squares([torch.from_numpy(pixels.copy()).float() / 127.5 - 1], 32))[0]
        torch.testing.assert_close(seen(found), expected, rtol=0, atol=2e-3)
    # The same again is nothing to do, other arguments are another set.
    assert teach(str(tmp_path / "set"), tmp_path / "taught") == made
    with pytest.raises(InputError, match="teacher_pictures: 8 there, 2 now"):
        teach(str(tmp_path / "set"), tmp_path / "taught", pictures=2)


def test_of_a_video_frames_and_of_an_asset_views_on_white_are_averaged(tmp_path: Path) -> None:
    write_set(tmp_path / "clips", "videos", range(2), clip_record, jobs_per_shard=9, workers=1, facts={})
    teach(str(tmp_path / "clips"), tmp_path / "clips taught", pictures=3)
    for number, found in enumerate(samples(tmp_path / "clips taught").values()):
        frames = scene(9 + number, 96, 128)[[0, (9 + number) // 3, 2 * (9 + number) // 3]]
        squared = squares([torch.from_numpy(frame).float() / 127.5 - 1 for frame in frames], 32)
        torch.testing.assert_close(seen(found), Corners()(squared).mean(0), rtol=0, atol=0.1)  # the film was encoded
    write_set(tmp_path / "assets", "assets", range(1), asset_record, jobs_per_shard=1, workers=1, facts={})
    teach(str(tmp_path / "assets"), tmp_path / "assets taught", pictures=99)
    (found,) = samples(tmp_path / "assets taught").values()
    _, _, first, second = asset_parts()
    views = torch.from_numpy(np.concatenate([first.colours, second.colours])).double() / 255
    on_white = views[..., :3] * views[..., 3:] + 1 - views[..., 3:]
    expected = Corners()(squares(list(2 * on_white - 1), 32)).mean(0).float()
    torch.testing.assert_close(seen(found), expected, rtol=0, atol=2e-3)


def test_what_was_seen_comes_with_samples_that_are_understood(tmp_path: Path) -> None:
    write_set(tmp_path / "set", "images", range(2), picture_record, jobs_per_shard=2, workers=1, facts={})
    teach(str(tmp_path / "set"), tmp_path / "taught")
    found = samples(tmp_path / "taught")["001"]
    settings = DecodeSettings(min_side=32, max_side=64)
    item = Decoder("s", Task.IMAGE_UNDERSTANDING, "images", settings)(found, 0)
    assert item.teacher is not None
    assert item.teacher.dtype == torch.float32
    assert torch.equal(item.teacher, seen(found))
    assert Decoder("s", Task.IMAGE_RECONSTRUCTION, "images", settings)(found, 0).teacher is None
    plain = raw({"png": picture_file(scene(1, 64, 64)[0], "PNG")})
    understood = Decoder("s", Task.IMAGE_UNDERSTANDING, "images", settings)
    assert understood(plain, 0).teacher is None
    whole = found.files["teacher.npy"]
    arrays = [np.ones((2, 2), np.float16), np.array([1, 2]), np.array([], np.float16), np.array([1, np.nan])]
    for content in (b"", b"no array", whole[:-3], *map(_npy, arrays)):
        broken = replace(plain, files={**plain.files, "teacher.npy": content})
        with pytest.raises(SampleError, match=r"teacher\.npy: ") as refused:
            understood(broken, 0)
        assert refused.value.cause == "damaged teacher"


def test_large_pictures_do_not_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is given 32 pictures at once; as they were taken, they would be gigabytes."""
    together, shown = [], []

    def watched(pictures: list[Tensor], side: int) -> Tensor:
        together.append(len(pictures))
        return squares(pictures, side)

    def network(_: Corners, images: Tensor) -> Tensor:
        shown.append(len(images))
        return images.mean((2, 3))

    monkeypatch.setattr(module, "squares", watched)
    monkeypatch.setattr(Corners, "__call__", network)
    contents = [picture_file(scene(1, 40 + number, 50)[0], "PNG") for number in range(40)]
    (tmp_path / "0.tar").write_bytes(tar_of({f"{number:02d}.png": content for number, content in enumerate(contents)}))
    assert teach(str(tmp_path / "0.tar"), tmp_path / "out").samples == 40
    assert (max(together), shown) == (1, [32, 8])


def test_a_shard_that_cannot_be_reached_now_is_not_left_out_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = picture_file(scene(1, 40, 50)[0], "PNG")
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.tar").write_bytes(tar_of({f"{number}.png": content}))
    lost, kept = tmp_path / "in" / "1.tar", tmp_path / "kept.tar"

    def network(*_: object) -> Corners:  # asked for when the set is known
        if lost.exists():
            lost.rename(kept)
        return Corners()

    with monkeypatch.context() as patch:
        patch.setattr(module, "_network", network)
        with pytest.raises(SampleError, match=r"1\.tar: not found"):
            teach(str(tmp_path / "in"), tmp_path / "out")
    kept.rename(lost)
    made = teach(str(tmp_path / "in"), tmp_path / "out")
    assert (made.samples, made.skipped) == (3, ())


ODD: dict[str, tuple[dict[str, list[str]], str, str]] = {
    "a key that is there twice": ({"a": ["png"], "b": ["png"], "./a": ["png"]}, "0.tar/a", "there is another sample"),
    "a key of the root": ({"/x/c": ["png"], "a": ["png"], "b": ["png"]}, "0.tar//x/c", "keys are relative paths"),
    "a file of another maker": ({"a": ["png", "png~"], "b": ["png"]}, "0.tar/a.png~", "png~: no endings of a shard"),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_samples_of_other_makers_are_left_out_and_the_others_taught(odd: str, tmp_path: Path) -> None:
    members, name, reason = ODD[odd]
    content = picture_file(scene(1, 40, 50)[0], "PNG")
    (tmp_path / "in").mkdir()
    files = [(f"{key}.{ending}", content) for key, endings in members.items() for ending in endings]
    (tmp_path / "in" / "0.tar").write_bytes(tar_of(files))
    (tmp_path / "in" / "1.tar").write_bytes(tar_of({"a.png": content}))
    made = teach(str(tmp_path / "in"), tmp_path / "out")
    assert [shard.samples for shard in made.shards] == [2, 1]
    assert {tuple(found.files) for found in samples(tmp_path / "out").values()} == {("png", "teacher.npy", "json")}
    (skipped,) = made.skipped
    assert skipped.name == name
    assert reason in skipped.reason


def test_what_cannot_be_taught_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing"):
        teach(str(tmp_path / "nothing"), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "other.tar").write_bytes(b"")
    write_set(tmp_path / "set", "images", range(2), picture_record, jobs_per_shard=2, workers=1, facts={})
    with pytest.raises(InputError, match="holds tars that this command did not make"):
        teach(str(tmp_path / "set"), tmp_path / "out")


def _npy(values: NDArray[Any]) -> bytes:
    written = io.BytesIO()
    np.save(written, values, allow_pickle=False)
    return written.getvalue()
