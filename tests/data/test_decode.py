"""Raw samples become items: the right pixels at the drawn view, and one kind of error for whatever is wrong."""

from __future__ import annotations

import functools
import io
import json
import pickle
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from data.batch import Batch
from data.decode import videos
from data.decode.assets import MAX_SIDE, decode_views, decode_voxels, encode_asset_files
from data.decode.decoder import KINDS, Decoder, DecodeSettings
from data.decode.images import read_picture
from data.decode.variation import recolour
from data.mixture import Task
from data.resolution import Size, View
from data.samples import Item, Kind, Raw, SampleError
from tests.data.made_samples import asset_files, asset_parts, clip_file, picture_file, raw, raw_asset, scene
from tokenizer.assets.views import Views
from tokenizer.errors import InputError
from tokenizer.evaluation.metrics import psnr
from tokenizer.media import VideoReader, load_image
from tokenizer.media.images import MAX_PIXELS
from tokenizer.text.zero_shot import IMAGE_PROMPTS

EVALUATION = DecodeSettings(training=False)
SMALL = DecodeSettings(min_side=32, max_side=96, frames=(4, 8))
EXTENSION = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def decoder(task: Task, settings: DecodeSettings = SMALL, seed: int = 1) -> Decoder:
    return Decoder("here", task, KINDS[task], settings, seed)


def whole(size: Size) -> View:
    return View(resized=size, corner=(0, 0), size=size)


def pixels(item: Item) -> NDArray[np.uint8]:
    assert item.pixels is not None
    return np.asarray(item.pixels.numpy(), np.uint8)


@functools.cache
def raw_of(kind: Kind) -> Raw:
    if kind == "images":
        return raw({"jpg": picture_file(scene(1, 150, 211)[0], "JPEG")})
    return raw({"mp4": clip_file(40)}) if kind == "videos" else raw_asset()


@pytest.mark.parametrize("task", list(Task))
def test_items_are_a_function_of_seed_epoch_and_sample(task: Task) -> None:
    made = decoder(task)
    again = pickle.loads(pickle.dumps(made))
    sample = raw_of(KINDS[task])
    items = [made(sample, epoch) for epoch in (0, 1, 0)] + [again(sample, 0), decoder(task, seed=2)(sample, 0)]
    flat = [
        [b"" if t is None else t.numpy().tobytes() for t in (i.pixels, i.features, i.views and i.views.pictures)]
        for i in items
    ]
    assert flat[0] == flat[2] == flat[3]
    if task is not Task.ASSET_UNDERSTANDING:  # all of it is always seen
        assert flat[0] != flat[1]
        assert flat[0] != flat[4]
    assert {(i.id, i.source, i.task, i.caption) for i in items} == {(sample.id, "here", task, "a red chair")}


@pytest.mark.parametrize("task", list(Task))
def test_evaluation_does_not_depend_on_chance(task: Task) -> None:
    sample = raw_of(KINDS[task])
    first, other = (decoder(task, EVALUATION, seed)(sample, epoch) for seed, epoch in ((1, 0), (2, 5)))
    assert first.tokens == other.tokens
    if first.pixels is not None:
        assert pixels(first).tobytes() == pixels(other).tobytes()
        assert first.pixels.shape[-3:-1] == ((144, 208) if first.pixels.ndim == 3 else (96, 128))


class TestPictures:
    @given(st.integers(1, 8), st.sampled_from(["JPEG", "PNG"]), st.data())
    @settings(max_examples=30, deadline=None)
    def test_a_view_is_cut_from_the_upright_resized_picture(
        self, orientation: int, kind: str, data: st.DataObject
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        encoded = picture_file(scene(1, 90, 130)[0], kind, exif=exif)
        upright = load_image(encoded)
        resized = (data.draw(st.integers(16, 150)), data.draw(st.integers(16, 150)))
        size = (data.draw(st.integers(1, resized[0])), data.draw(st.integers(1, resized[1])))
        corner = (data.draw(st.integers(0, resized[0] - size[0])), data.draw(st.integers(0, resized[1] - size[1])))
        view = View(resized=resized, corner=corner, size=size)
        seen = read_picture(encoded, "x", lambda given: view if given == upright.shape[:2] else whole(given))
        full = np.asarray(Image.fromarray(upright).resize(resized[::-1], Image.Resampling.BICUBIC), np.int16)
        expected = full[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
        # Rounded once more, or reduced while decoding (JPEG): far below what the encoder itself loses.
        np.testing.assert_allclose(seen, expected, atol=2 if kind == "PNG" else 12)
        assert kind == "JPEG" or np.abs(seen - expected).mean() < 0.2

    def test_reduced_decoding_does_not_show(self) -> None:
        photograph = np.asarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3)), np.uint8)
        large = Image.fromarray(photograph).resize((1203, 901), Image.Resampling.BICUBIC)
        encoded = picture_file(np.asarray(large), "JPEG", quality=95)
        for resized in ((150, 200), (112, 150), (77, 160)):
            view = whole(resized)
            seen = read_picture(encoded, "x", lambda _: view)  # noqa: B023  called at once
            full = Image.fromarray(load_image(encoded)).resize(resized[::-1], Image.Resampling.BICUBIC)
            assert psnr(np.asarray(full), seen) > 45

    @pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA"])
    def test_other_modes(self, mode: str) -> None:
        buffer = io.BytesIO()
        Image.fromarray(scene(1, 64, 80)[0]).convert("L" if mode == "LA" else "RGB").convert(mode).save(
            buffer, "JPEG" if mode == "CMYK" else "PNG"
        )
        np.testing.assert_array_equal(read_picture(buffer.getvalue(), "x", whole), load_image(buffer.getvalue()))

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    @given(place=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=6))
    @settings(max_examples=30, deadline=None)
    def test_damage_is_one_error(self, kind: str, place: float, flips: list[tuple[float, int]]) -> None:
        encoded = picture_file(scene(1, 70, 90)[0], kind)
        sample = raw({EXTENSION[kind]: damaged(encoded, place, flips)})
        check_damage(Task.IMAGE_RECONSTRUCTION, sample, ("damaged picture", "too small"))

    def test_truncation_is_noticed(self) -> None:
        for kind, ending in EXTENSION.items():
            encoded = picture_file(scene(1, 70, 90)[0], kind)
            for length in (0, 1, 20, len(encoded) // 2):
                with pytest.raises(SampleError, match="000001") as caught:
                    decoder(Task.IMAGE_RECONSTRUCTION)(raw({ending: encoded[:length]}), 0)
                assert caught.value.cause == "damaged picture"


class TestClips:
    @pytest.mark.parametrize("ending", ["mp4", "webm", "gif"])
    def test_the_frames_asked_for_come(self, ending: str) -> None:
        chosen = [3, 9, 9, 11]
        seen = videos.read_clip(clip_file(12, ending=ending), "x", whole, lambda _: chosen)
        assert seen.shape == (4, 96, 128, 3)
        assert psnr(scene(12, 96, 128)[chosen], seen) > (25 if ending == "gif" else 32)

    @pytest.mark.parametrize("ending", ["mp4", "webm"])
    def test_decord_and_ffmpeg_agree(self, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
        encoded, chosen = clip_file(40, ending=ending), [0, 5, 6, 17, 38]
        times: list[NDArray[np.float64]] = []

        def frames(shown: NDArray[np.float64]) -> list[int]:
            times.append(shown)
            return chosen

        def only(_path: Path, _data: bytes) -> None:
            return None

        def never(*_: object) -> NDArray[np.uint8]:
            raise AssertionError("decord was not used")

        with monkeypatch.context() as patch:
            patch.setattr(videos, "_read_slowly", never)
            fast = videos.read_clip(encoded, "x", whole, frames)
        with monkeypatch.context() as patch:
            patch.setattr(videos, "_read_header", only)
            slow = videos.read_clip(encoded, "x", whole, frames)
        np.testing.assert_array_equal(fast, slow)
        np.testing.assert_allclose(times[0], times[1], atol=2e-3)
        np.testing.assert_allclose(times[0], np.arange(40) / 25, atol=2e-3)

    @pytest.mark.parametrize(("field", "value"), [(8, 0x45), (12, 0x6F000028)])
    def test_a_header_cannot_take_all_memory(self, field: int, value: int) -> None:
        """Of more frames than there are decord aborts the process; the box of times says how many (8.6.1.2)."""
        lying = bytearray(clip_file(40))
        first = lying.find(b"stts") + field  # the number of runs, and of frames in the first one
        lying[first : first + 4] = value.to_bytes(4, "big")
        with pytest.raises(SampleError, match="declares"):
            decoder(Task.VIDEO_RECONSTRUCTION)(raw({"mp4": bytes(lying)}), 0)

    def test_scaling_while_decoding_cuts_the_same_part(self) -> None:
        view = View(resized=(60, 90), corner=(9, 31), size=(48, 32))
        seen = videos.read_clip(clip_file(40), "x", lambda _: view, lambda _: [4, 30])
        for frame, number in zip(seen, (4, 30), strict=True):
            full = Image.fromarray(scene(40, 96, 128)[number]).resize((90, 60), Image.Resampling.BICUBIC)
            assert psnr(np.asarray(full)[9:57, 31:63], frame) > 30

    def test_turned_clips_and_streams(self, needs_program: Callable[[str], None], tmp_path: Path) -> None:
        needs_program("ffmpeg")
        source = tmp_path / "clip.mp4"
        source.write_bytes(clip_file(40))
        turned, stream = tmp_path / "turned.mp4", tmp_path / "clip.mpg"
        try:
            ffmpeg("-display_rotation", "90", "-i", source, "-c", "copy", turned)
        except subprocess.CalledProcessError:  # before FFmpeg 6
            ffmpeg("-i", source, "-c", "copy", "-metadata:s:v", "rotate=270", turned)
        ffmpeg("-i", source, "-c:v", "mpeg2video", "-q:v", "2", stream)
        for path, shape in ((turned, (3, 128, 96, 3)), (stream, (3, 96, 128, 3))):
            seen = videos.read_clip(path.read_bytes(), "x", whole, lambda times: [0, 7, len(times) - 1])
            assert seen.shape == shape
            np.testing.assert_array_equal(seen, VideoReader(path).read()[[0, 7, 39]])

    def test_understanding_sees_a_frame_a_second(self) -> None:
        item = decoder(Task.VIDEO_UNDERSTANDING, EVALUATION)(raw({"mp4": clip_file(40, fps=5)}), 0)
        assert pixels(item).shape == (8, 96, 128, 3)
        assert psnr(scene(40, 96, 128)[2::5], pixels(item)) > 32

    def test_short_clips_fill_a_patch(self) -> None:
        for task in (Task.VIDEO_RECONSTRUCTION, Task.VIDEO_UNDERSTANDING):
            item = decoder(task)(raw({"mp4": clip_file(1)}), 0)
            assert len(pixels(item)) == 4
            assert (pixels(item) == pixels(item)[:1]).all()

    @pytest.mark.parametrize("ending", ["mp4", "webm", "gif"])
    @given(place=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=6))
    @settings(max_examples=30, deadline=None)
    def test_damage_is_one_error(self, ending: str, place: float, flips: list[tuple[float, int]]) -> None:
        sample = raw({ending: damaged(clip_file(12, ending=ending), place, flips)})
        check_damage(Task.VIDEO_RECONSTRUCTION, sample, ("damaged video", "too small"))

    @pytest.mark.parametrize("ending", ["mp4", "webm"])
    def test_truncation_is_noticed(self, ending: str) -> None:
        encoded = clip_file(40, ending=ending)
        for length in (0, 1, 300, len(encoded) // 3):
            with pytest.raises(SampleError) as caught:
                decoder(Task.VIDEO_UNDERSTANDING)(raw({ending: encoded[:length]}), 0)
            assert caught.value.cause == "damaged video"


class TestAssets:
    def test_round_trip_is_exact(self) -> None:
        features, coordinates, seen, unseen = asset_parts()
        original = [[0.0, 2.0, 0.0, 0.5], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
        files, facts = encode_asset_files(features, coordinates, 64, "surface", seen, unseen, to_original=original)
        assert json.loads(json.dumps(facts)) == facts | {
            "resolution": 64,
            "rule": "surface",
            "views": 7,
            "view_size": 32,
        }
        assert facts["to_original"] == original
        stored = decode_voxels(files, facts, "x")
        assert torch.equal(stored.features.float() / 255, features)
        assert torch.equal(stored.coordinates.int(), coordinates)
        assert stored.seen.tolist() == [True] * 5 + [False] * 2
        views = decode_views(files, stored, [6, 0, 4], "x")
        np.testing.assert_array_equal(views.pictures, [unseen.colours[1], seen.colours[0], seen.colours[4]])
        assert torch.equal(views.cameras.world_to_camera[0], unseen.cameras.world_to_camera[1])
        assert torch.equal(views.cameras.intrinsics[2], seen.cameras.intrinsics[4])

    def test_views_are_drawn_and_different(self) -> None:
        made = decoder(Task.ASSET_RECONSTRUCTION, replace(SMALL, views=3))
        _, _, seen, unseen = asset_parts()
        known = [picture.tobytes() for picture in np.concatenate([seen.colours, unseen.colours])]
        found: set[int] = set()
        for epoch in range(20):
            views = made(raw_asset(), epoch).views
            assert views is not None
            chosen = {known.index(picture.tobytes()) for picture in views.pictures.numpy()}
            assert len(chosen) == len(views.cameras) == 3
            found |= chosen
        assert found == set(range(7))
        evaluated = decoder(Task.ASSET_RECONSTRUCTION, replace(EVALUATION, views=3))(raw_asset(), 0).views
        assert evaluated is not None
        assert [known.index(picture.tobytes()) for picture in evaluated.pictures.numpy()] == [5, 6, 0]

    def test_some_voxels_are_kept_in_training(self) -> None:
        made = decoder(Task.ASSET_UNDERSTANDING, replace(SMALL, max_voxels=9, require_caption=False))
        features, coordinates, _, _ = asset_parts()
        known = {tuple(place): row for place, row in zip(coordinates.tolist(), features, strict=True)}
        drawn = set()
        for epoch in range(8):
            item = made(raw_asset(), epoch)
            assert item.features is not None
            assert item.coordinates is not None
            places = [tuple(place) for place in item.coordinates.tolist()]
            assert item.tokens == len(item.features) == len(places) == 9
            assert places == [place for place in known if place in set(places)]  # in their order
            for place, row in zip(places, item.features, strict=True):
                assert torch.equal(row.float() / 255, known[place])
            drawn.add(tuple(places))
        assert len(drawn) > 1
        evaluation = replace(EVALUATION, max_voxels=9, require_caption=False)
        assert decoder(Task.ASSET_UNDERSTANDING, evaluation)(raw_asset(), 0).tokens == len(features)
        with pytest.raises(InputError, match="max_voxels must be at least 1"):
            replace(SMALL, max_voxels=0)

    def test_how_many_voxels_are_kept_is_drawn(self) -> None:
        settings = replace(SMALL, min_voxels=2, max_voxels=9, require_caption=False)
        made = decoder(Task.ASSET_UNDERSTANDING, settings)
        counts = [made(raw_asset(), epoch).tokens for epoch in range(60)]
        assert set(counts) == set(range(2, 10))
        assert sum(count <= 4 for count in counts) > 20  # uniform in the logarithm: half lie below the root of 2 x 9
        for wrong in ({"min_voxels": 10}, {"min_voxels": 0}, {"min_voxels": 1, "max_voxels": None}):
            with pytest.raises(InputError, match=r"min_voxels must lie in 1\.\.max_voxels"):
                replace(settings, **wrong)

    def test_assets_are_turned_about_their_vertical_axis(self) -> None:
        features, coordinates, _, _ = asset_parts()
        made = decoder(Task.ASSET_UNDERSTANDING, replace(SMALL, turned=True, require_caption=False))
        seen = set()
        for epoch in range(60):
            item = made(raw_asset(), epoch)
            assert item.coordinates is not None
            assert item.features is not None
            assert torch.equal(item.features.float() / 255, features)
            turned = item.coordinates.to(coordinates.dtype)
            assert torch.equal(turned[:, 2], coordinates[:, 2])
            distances = [torch.cdist(places.double(), places.double()) for places in (turned, coordinates)]
            torch.testing.assert_close(*distances)
            assert int(turned.min()) >= 0
            seen.add(tuple(map(tuple, turned.tolist())))
        assert len(seen) == 8
        for task, others in (
            (Task.ASSET_UNDERSTANDING, replace(EVALUATION, turned=True, require_caption=False)),
            (Task.ASSET_RECONSTRUCTION, replace(SMALL, turned=True)),
        ):
            unturned = decoder(task, others)(raw_asset(), 3).coordinates
            assert unturned is not None
            assert torch.equal(unturned.to(coordinates.dtype), coordinates)

    def test_assets_are_stretched_and_recoloured(self) -> None:
        features, coordinates, _, _ = asset_parts()
        plain = {tuple(place): row for place, row in zip(coordinates.tolist(), features, strict=True)}
        extent = int((coordinates.amax(0) - coordinates.amin(0)).max())
        settings = replace(SMALL, stretched=0.5, recoloured=0.5, require_caption=False)
        made = decoder(Task.ASSET_UNDERSTANDING, settings)
        proportions, changed = set(), 0
        for epoch in range(60):
            item, again = made(raw_asset(), epoch), made(raw_asset(), epoch)
            assert item.coordinates is not None
            assert item.features is not None
            assert again.coordinates is not None
            assert again.features is not None
            assert torch.equal(item.coordinates, again.coordinates)
            assert torch.equal(item.features, again.features)
            sides = item.coordinates.amax(0) - item.coordinates.amin(0)
            assert abs(int(sides.max()) - extent) <= 1
            assert int(item.coordinates.min()) >= 0
            assert int(item.coordinates.max()) <= int(coordinates.max())
            assert len(item.coordinates.unique(dim=0)) == item.tokens == len(item.features)
            proportions.add(tuple(sides.tolist()))
            rows = torch.stack(list(plain.values()))
            known = (torch.cdist(item.features.double() / 255, rows.double()).amin(1) < 1e-3).all()
            changed += not bool(known)
        assert len(proportions) > 5
        assert 15 < changed < 45  # 30 and four deviations of 3.9
        for task, others in (
            (Task.ASSET_UNDERSTANDING, replace(settings, training=False)),
            (Task.ASSET_RECONSTRUCTION, settings),
        ):
            found = decoder(task, others)(raw_asset(), 3)
            assert found.coordinates is not None
            assert found.features is not None
            assert torch.equal(found.coordinates.to(coordinates.dtype), coordinates)
            assert torch.equal(found.features.float() / 255, features)
        wrongs: list[dict[str, Any]] = [{"stretched": -0.1}, {"stretched": float("nan")}, {"recoloured": 1.5}]
        for wrong in wrongs:
            with pytest.raises(InputError, match=r"must lie in 0\.\.1"):
                replace(settings, **wrong)

    def test_black_stays_black_in_other_colours(self) -> None:
        features = torch.randint(1, 256, (5, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        features[2] = 0
        found = [recolour(features, 1.0, 0, epoch, "x") for epoch in range(8)]
        assert all(bool((one[2] == 0).all()) for one in found)
        assert len({tuple(one.flatten().tolist()) for one in found}) == 8
        assert recolour(features, 0.0, 0, 0, "x") is features

    @pytest.mark.parametrize("extension", ["voxels.safetensors", "views.webp", "json"])
    @given(place=st.floats(0, 1), flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=6))
    @settings(max_examples=30, deadline=None)
    def test_damage_is_one_error(self, extension: str, place: float, flips: list[tuple[float, int]]) -> None:
        files = dict(raw_asset().files)
        # Mostly the header, which is all that can be damaged unnoticed in raw numbers.
        files[extension] = damaged(files[extension], place, [(where * where * where, mask) for where, mask in flips])
        sample = replace(raw_asset(), files=files)
        check_damage(Task.ASSET_RECONSTRUCTION, sample, ("damaged asset", "damaged facts"))

    def test_what_does_not_fit_is_refused(self) -> None:
        features, coordinates, seen, unseen = asset_parts()
        with pytest.raises(InputError, match="features must lie"):
            encode_asset_files(features * 2, coordinates, 64, "surface", seen)
        with pytest.raises(InputError, match="coordinates must lie"):
            encode_asset_files(features, coordinates, 32, "surface", seen)
        small = Views(unseen.colours[:, :16, :16], unseen.depth, unseen.cameras)
        with pytest.raises(InputError, match="one size"):
            encode_asset_files(features, coordinates, 64, "surface", seen, small)
        side = MAX_SIDE // 2 + 1
        large = Views(np.broadcast_to(np.zeros((), np.uint8), (5, side, side, 4)), seen.depth, seen.cameras)
        with pytest.raises(InputError, match="do not fit a WebP"):
            encode_asset_files(features, coordinates, 64, "surface", large)
        files, facts = asset_files()
        with pytest.raises(SampleError, match="does not describe an asset") as caught:
            decode_voxels(files, {**facts, "resolution": "many"}, "x")
        assert caught.value.cause == "damaged facts"
        with pytest.raises(SampleError, match="coordinates outside"):
            decode_voxels(files, {**facts, "resolution": 8}, "x")


class TestWords:
    @pytest.mark.parametrize(
        ("text", "clean"),
        [
            ("Ein Stuhl, rot.", "ein stuhl rot"),
            ("一把红色的椅子。", "一把红色的椅子。"),
            ("كرسي أحمر،", "كرسي أحمر،"),
            ("एक लाल कुर्सी।", "एक लाल कुर्सी।"),
            ("Красный СТУЛ!", "красный стул"),
            ("👩🏽‍🚀 in space", "👩🏽‍🚀 in space"),
        ],
    )
    def test_captions_in_many_scripts(self, text: str, clean: str) -> None:
        picture = {"png": picture_file(scene(1, 64, 64)[0], "PNG")}
        made = decoder(Task.IMAGE_UNDERSTANDING)
        assert made(raw(picture, caption=text.encode()), 0).caption == clean
        assert made(raw(picture, caption=b"", facts={"caption": text}), 0).caption == clean

    def test_labels_are_captions_in_a_share_of_the_epochs(self) -> None:
        sample = raw(
            {"png": picture_file(scene(1, 64, 64)[0], "PNG")}, caption=b"a red chair", facts={"label": "Furniture"}
        )
        made = decoder(Task.IMAGE_UNDERSTANDING, replace(SMALL, label_share=0.25))
        found = [made(sample, epoch).caption for epoch in range(200)]
        assert set(found) == {"a red chair", "furniture"}
        assert 30 < found.count("furniture") < 70  # 50 and three deviations of 6.1
        evaluated = decoder(Task.IMAGE_UNDERSTANDING, replace(EVALUATION, label_share=1.0))
        assert evaluated(sample, 0).caption == "a red chair"
        with pytest.raises(InputError, match="label_share must lie in"):
            replace(SMALL, label_share=1.5)

    def test_labels_stand_in_the_prompts_of_zero_shot_classification(self) -> None:
        sample = raw({"png": picture_file(scene(1, 64, 64)[0], "PNG")}, facts={"label": "Cat"})
        made = decoder(Task.IMAGE_UNDERSTANDING, replace(SMALL, label_share=1.0, prompted=0.5))
        found = [made(sample, epoch).caption for epoch in range(200)]
        assert set(found) == {prompt.replace("{}", "cat") for prompt in IMAGE_PROMPTS}
        # One of the five prompts is the name alone: 0.5 + 0.5 / 5 of the epochs, and three deviations of 6.9.
        assert 100 < found.count("cat") < 140
        with pytest.raises(InputError, match="prompted must lie in"):
            replace(SMALL, prompted=-0.1)

    def test_causes(self) -> None:
        picture = {"png": picture_file(scene(1, 64, 64)[0], "PNG")}
        cases: list[tuple[Task, Raw, str]] = [
            (Task.IMAGE_UNDERSTANDING, raw(picture, caption=b""), "no caption"),
            (Task.IMAGE_UNDERSTANDING, raw(picture, caption=b" \n"), "no caption"),
            (Task.IMAGE_UNDERSTANDING, raw(picture, caption=b"?!"), "no caption"),
            (Task.IMAGE_RECONSTRUCTION, raw(picture, caption=b"\xff\xfe"), "damaged caption"),
            (Task.IMAGE_RECONSTRUCTION, raw({**picture, "json": b"{"}), "damaged facts"),
            (Task.IMAGE_RECONSTRUCTION, raw({**picture, "json": b"[1]"}), "damaged facts"),
            (Task.IMAGE_RECONSTRUCTION, raw({"mp4": b"1"}), "no such content"),
            (Task.IMAGE_RECONSTRUCTION, raw({"png": picture_file(scene(1, 9, 64)[0], "PNG")}), "too small"),
            (Task.VIDEO_RECONSTRUCTION, raw({"mp4": clip_file(1, 8, 8)}), "too small"),
        ]
        for task, sample, cause in cases:
            with pytest.raises(SampleError, match="000001") as caught:
                decoder(task)(sample, 0)
            assert caught.value.cause == cause
        assert decoder(Task.IMAGE_RECONSTRUCTION)(raw(picture, caption=b""), 0).caption is None

    def test_settings_that_make_no_sense(self) -> None:
        for wrong in (
            {"frames": (16, 30)},
            {"frames": (32, 16)},
            {"max_frames": 6},
            {"strides": ((0, 3),)},
            {"fps": 0.0},
            {"min_side": 8},
            {"rule": "some"},
        ):
            with pytest.raises(InputError):
                DecodeSettings(**wrong)
        with pytest.raises(InputError, match="needs images, but its samples are videos"):
            Decoder("here", Task.IMAGE_RECONSTRUCTION, "videos")

    def test_too_many_pixels_are_not_decoded(self) -> None:
        bomb = bytearray(picture_file(scene(1, 16, 16)[0], "PNG"))
        side = int(MAX_PIXELS**0.5) + 1
        bomb[16:24] = side.to_bytes(4, "big") * 2
        bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
        with pytest.raises(SampleError, match="megapixels"):
            decoder(Task.IMAGE_RECONSTRUCTION)(raw({"png": bytes(bomb)}), 0)


def check_damage(task: Task, sample: Raw, causes: tuple[str, ...]) -> None:
    """A damaged sample gives a well-formed item, since some damage cannot be seen, or the error that names it."""
    result: Item | SampleError
    try:
        result = decoder(task)(sample, 0)
    except SampleError as error:
        result = error
    if isinstance(result, SampleError):
        assert result.cause in causes
        assert sample.id in str(result)
        assert "\n" not in str(result)
        assert "/dev/fd" not in str(result)
    else:
        assert Batch(task, [result]).tokens().validate().num_tokens == result.tokens > 0


def damaged(contents: bytes, place: float, flips: list[tuple[float, int]]) -> bytes:
    """Cut off at `place` where no bytes are flipped; flips are places in 0..1 and masks."""
    changed = bytearray(contents)
    for where, mask in flips:
        changed[min(int(where * len(changed)), len(changed) - 1)] ^= mask
    return bytes(changed) if flips else bytes(changed[: int(place * len(changed))])


def ffmpeg(*arguments: object) -> None:
    subprocess.run(["ffmpeg", "-loglevel", "error", "-y", *map(str, arguments)], check=True, capture_output=True)
