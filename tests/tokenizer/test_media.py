"""Pictures and videos in files: every mode, format and oddity comes out as the right uint8 RGB array."""

from __future__ import annotations

import io
import struct
import subprocess
import tracemalloc
import zlib
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tokenizer.errors import InputError
from tokenizer.evaluation.metrics import ReconstructionMeter, psnr, ssim
from tokenizer.media import VideoReader, VideoWriter, find_media, load_image, media_kind, save_image

NeedsProgram = Callable[[str], None]
Pixels = NDArray[np.uint8]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(colour_type: int, pixels: NDArray[np.uint16]) -> bytes:
    """A PNG file with 16 bits in each channel, which Pillow can read and not write. Pixels [H, W, C]."""

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


class TestLoadImage:
    def test_sources_agree(self, picture: Pixels, tmp_path: Path) -> None:
        path = tmp_path / "picture.png"
        Image.fromarray(picture).save(path)
        for source in (path, str(path), path.read_bytes(), Image.open(path)):
            np.testing.assert_array_equal(load_image(source), picture)

    @pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr"])
    def test_modes_match_pillow(self, picture: Pixels, mode: str) -> None:
        image = Image.fromarray(picture).convert(mode)
        kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
        np.testing.assert_array_equal(load_image(encoded(image, kind)), np.asarray(image.convert("RGB")))

    def test_alpha_is_composited_on_white(self) -> None:
        pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], np.uint8)
        on_white = [[[200, 100, 0], [255, 255, 255], [244, 224, 204]]]
        np.testing.assert_array_equal(load_image(encoded(Image.fromarray(pixels), "PNG")), on_white)
        palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
        palette.putpalette([9, 9, 9, 7, 7, 7])
        data = encoded(palette, "PNG", transparency=0)
        np.testing.assert_array_equal(load_image(data), [[[255] * 3, [7] * 3]])

    @pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
    def test_16_bits_are_scaled_and_not_clipped(self, colour_type: int, channels: int) -> None:
        values = np.array([0, 257, 300, 32768, 65535], np.uint16)
        pixels = np.repeat(values[None, :, None], channels, axis=2)
        if channels in (2, 4):
            pixels[:, :, -1] = 65535
        result = load_image(png16(colour_type, pixels))
        # Pillow itself drops the low byte of colour pictures, which differs by at most one from rounding.
        np.testing.assert_allclose(result[0, :, 0], values / 257, atol=1)
        assert result[0, -1, 0] == 255

    def test_exif_rotation(self, picture: Pixels) -> None:
        upright = {
            1: picture,
            2: picture[:, ::-1],
            3: picture[::-1, ::-1],
            4: picture[::-1],
            5: picture.transpose(1, 0, 2),
            6: np.rot90(picture, -1),
            7: picture[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(picture, 1),
        }
        for orientation, expected in upright.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            np.testing.assert_array_equal(load_image(encoded(Image.fromarray(picture), "PNG", exif=exif)), expected)

    def test_animation_gives_the_first_frame_unless_asked(self, clip: Pixels) -> None:
        first, *rest = [Image.fromarray(frame) for frame in clip[:3]]
        data = encoded(first, "WEBP", save_all=True, append_images=rest, lossless=True)
        np.testing.assert_array_equal(load_image(data), clip[0])
        np.testing.assert_array_equal(load_image(data, frame=2), clip[2])
        with pytest.raises(InputError, match="has no frame 3; it holds 3"):
            load_image(data, frame=3)

    def test_unknown_range_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"32-bit pixels .* unknown range"):
            load_image(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))

    @pytest.mark.parametrize(
        ("kind", "options"),
        [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("GIF", {}), ("TIFF", {})],
    )
    def test_a_cut_file_is_an_error_or_whole(self, picture: Pixels, kind: str, options: dict[str, Any]) -> None:
        data = encoded(Image.fromarray(picture), kind, **options)
        whole = load_image(data)
        refused = 0
        for cut in [*range(0, len(data), max(1, len(data) // 60)), len(data) - 1, len(data) - 2]:
            try:
                np.testing.assert_array_equal(load_image(data[:cut]), whole)
            except InputError:
                refused += 1
        assert refused >= 58

    def test_limit_on_pixels_is_an_argument(self, picture: Pixels) -> None:
        data = encoded(Image.fromarray(picture), "PNG")
        assert load_image(data, max_pixels=picture[..., 0].size + 1).shape == picture.shape
        with pytest.raises(InputError, match="61x45 is"):
            load_image(data, max_pixels=picture[..., 0].size)


class TestSaveImage:
    @pytest.mark.parametrize("ending", [".png", ".PNG", ".jpg", ".jpeg", ".webp"])
    def test_round_trip(self, picture: Pixels, ending: str, tmp_path: Path) -> None:
        path = tmp_path / "new" / f"picture{ending}"
        save_image(picture, path)
        result = load_image(path)
        assert psnr(picture, result) > (99 if ending.lower() == ".png" else 30)
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    def test_unknown_ending_lists_the_known(self, picture: Pixels, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"ending '.xyz'; pictures are written as .png, .jpg, .jpeg, .webp"):
            save_image(picture, tmp_path / "a.xyz")

    def test_other_arrays_are_refused(self, picture: Pixels, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"uint8 \[H, W, 3\], this is float64"):
            save_image(picture / 255.0, tmp_path / "a.png")  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())


def ffmpeg(*arguments: str | Path) -> bytes:
    command = ["ffmpeg", "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def write_clip(path: Path, clip: Pixels, rate: Fraction | int = 25) -> Path:
    with VideoWriter(path, rate, *clip.shape[1:3]) as writer:
        for start in range(0, len(clip), 4):
            writer.write(clip[start : start + 4])
    return path


def write_and_stop(path: Path, clip: Pixels) -> None:
    with VideoWriter(path, 25, *clip.shape[1:3]) as writer:
        writer.write(clip)
        raise RuntimeError("stop")


class TestVideoReader:
    @pytest.mark.parametrize("ending", ["mkv", "webm", "avi", "mov", "mpg", "ts", "flv", "wmv", "ogv"])
    def test_equals_ffmpeg(self, clip: Pixels, ending: str, tmp_path: Path, needs_program: NeedsProgram) -> None:
        needs_program("ffmpeg")
        path = tmp_path / f"clip.{ending}"
        ffmpeg("-i", write_clip(tmp_path / "clip.mp4", clip), path)
        expected = ffmpeg("-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
        reader = VideoReader(path)
        frames = reader.read()
        assert (reader.num_frames, reader.height, reader.width) == frames.shape[:3]
        assert float(reader.fps) == pytest.approx(25, rel=0.01)
        assert not reader.variable_frame_rate
        assert frames.tobytes() == expected

    def test_equals_decord(self, clip: Pixels, tmp_path: Path) -> None:
        decord = pytest.importorskip("decord")  # no wheels for every platform
        path = write_clip(tmp_path / "clip.mp4", clip)
        frames = decord.VideoReader(str(path)).get_batch(range(len(clip))).asnumpy()
        np.testing.assert_array_equal(VideoReader(path).read(), frames)

    def test_variable_frame_rate_keeps_all_frames(
        self, clip: Pixels, tmp_path: Path, needs_program: NeedsProgram
    ) -> None:
        needs_program("ffmpeg")
        path = tmp_path / "vfr.mp4"
        keep = "select='not(between(n,3,6))'"
        ffmpeg("-i", write_clip(tmp_path / "clip.mp4", clip), "-vf", keep, "-fps_mode", "vfr", path)
        reader = VideoReader(path)
        assert reader.variable_frame_rate
        assert reader.num_frames == len(reader.read()) == 6
        np.testing.assert_allclose(reader.timestamps, np.array([0, 1, 2, 7, 8, 9]) / 25, atol=1e-3)
        assert float(reader.fps) == pytest.approx(5 / (9 / 25), rel=1e-3)

    def test_counts_only_frames_that_are_shown(self, clip: Pixels, tmp_path: Path, needs_program: NeedsProgram) -> None:
        needs_program("ffmpeg")
        source, hidden, late = write_clip(tmp_path / "a.mp4", clip), tmp_path / "a.webm", tmp_path / "a.ts"
        # VP8 keeps reference frames as packets of their own; a recording may start before its first key frame.
        for step, target in ((1, ("-f", "null", "-")), (2, (hidden,))):
            options = ["-c:v", "libvpx", "-b:v", "100k", "-auto-alt-ref", "1", "-lag-in-frames", "8", "-pass"]
            ffmpeg("-i", source, *options, str(step), "-passlogfile", tmp_path / "log", *target)
        ffmpeg("-i", source, "-c:v", "libx264", "-g", "4", "-bf", "0", late)
        whole = late.read_bytes()
        late.write_bytes(whole[len(whole) // 3 // 188 * 188 :])
        for path, frames in ((hidden, range(10, 11)), (late, range(1, 10))):
            reader = VideoReader(path)
            assert reader.num_frames == len(reader.read())
            assert reader.num_frames in frames

    def test_rotation_is_applied(self, clip: Pixels, tmp_path: Path, needs_program: NeedsProgram) -> None:
        needs_program("ffmpeg")
        source, path = write_clip(tmp_path / "clip.mp4", clip), tmp_path / "rotated.mp4"
        # The header's display matrix alone changes; FFmpeg 5 and 6 spell the option differently.
        try:
            ffmpeg("-display_rotation", "90", "-i", source, "-c", "copy", path)
        except subprocess.CalledProcessError:
            ffmpeg("-i", source, "-c", "copy", "-metadata:s:v", "rotate=270", path)
        expected = ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
        reader = VideoReader(path)
        assert (reader.height, reader.width) == (62, 46)
        assert reader.read().tobytes() == expected

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
    def test_animated_pictures(self, clip: Pixels, kind: str, tmp_path: Path) -> None:
        path = tmp_path / f"clip.{kind.lower()}"
        first, *rest = [Image.fromarray(frame) for frame in clip]
        options = {"lossless": True} if kind == "WEBP" else {}
        first.save(path, kind, save_all=True, append_images=rest, duration=80, **options)
        reader = VideoReader(path)
        assert media_kind(path) == "video"
        assert reader.fps == Fraction(25, 2)
        assert psnr(clip, reader.read()) > (30 if kind == "GIF" else 99)

    def test_one_frame(self, clip: Pixels, tmp_path: Path) -> None:
        for name in ("one.mp4", "one.webm", "one.gif"):
            reader = VideoReader(write_clip(tmp_path / name, clip[:1]))
            assert reader.num_frames == len(reader.read()) == 1
            assert reader.fps > 0

    def test_memory_does_not_grow_with_length(self, clip: Pixels, tmp_path: Path) -> None:
        long = np.concatenate([clip] * 20)
        peaks = []
        for frames in (long[:40], long):
            path = write_clip(tmp_path / "clip.mp4", frames)
            tracemalloc.start()
            with VideoWriter(tmp_path / "copy.npy", 25, 46, 62) as writer:
                for block in VideoReader(path).blocks(8):
                    writer.write(block)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert len(np.load(tmp_path / "copy.npy", mmap_mode="r")) == len(frames)
        assert peaks[1] < peaks[0] + 4 * long[0].nbytes

    def test_reading_stops_early(self, clip: Pixels, tmp_path: Path) -> None:
        import av

        # With logging on, closing a half-read file can wait for a decoder thread that waits for Python: a deadlock.
        assert av.logging.get_level() is None
        reader = VideoReader(write_clip(tmp_path / "clip.mp4", clip))
        first = list(islice(reader.frames(), 3))
        np.testing.assert_array_equal(first, reader.read()[:3])


class TestVideoWriter:
    @pytest.mark.parametrize("rate", [Fraction(30000, 1001), 25, 12.5])
    @pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif"])
    def test_containers(self, clip: Pixels, name: str, rate: Any, tmp_path: Path) -> None:
        reader = VideoReader(write_clip(tmp_path / name, clip, rate))
        frames = reader.read()
        # 4:2:0 has no odd sizes in H.264: the last row and column are there once more.
        assert frames.shape == ((10, 46, 62, 3) if name.endswith("mp4") else clip.shape)
        assert psnr(clip, frames[:, :45, :61]) > 30
        assert float(reader.fps) == pytest.approx(float(rate), rel=0.01 if name.endswith("gif") else 1e-4)

    @pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif"])
    def test_ffmpeg_reads_them(self, clip: Pixels, name: str, tmp_path: Path, needs_program: NeedsProgram) -> None:
        needs_program("ffmpeg")
        path = write_clip(tmp_path / name, clip)
        pixels = ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
        size = (46, 62) if name.endswith("mp4") else (45, 61)
        assert psnr(clip, np.frombuffer(pixels, np.uint8).reshape(10, *size, 3)[:, :45, :61]) > 30

    def test_lossless(self, clip: Pixels, tmp_path: Path) -> None:
        np.testing.assert_array_equal(np.load(write_clip(tmp_path / "clip.npy", clip)), clip)
        folder = write_clip(tmp_path / "frames", clip)
        files = sorted(folder.iterdir())
        assert [file.name for file in files[::9]] == ["frame_000000.png", "frame_000009.png"]
        np.testing.assert_array_equal([load_image(file) for file in files], clip)

    def test_only_a_folder_of_frames_is_replaced(self, clip: Pixels, tmp_path: Path) -> None:
        folder = write_clip(tmp_path / "frames", clip)
        write_clip(folder, clip[:2])
        assert len(list(folder.iterdir())) == 2
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match=r"holds 'notes\.txt' beside frames"):
            write_clip(folder, clip)
        assert (folder / "notes.txt").read_text() == "mine"

    def test_a_failure_leaves_nothing_and_keeps_the_old_file(self, clip: Pixels, tmp_path: Path) -> None:
        for name in ("clip.mp4", "clip.webm", "clip.gif", "clip.npy", "frames"):
            path = write_clip(tmp_path / name, clip)
            before = path.stat().st_mtime_ns
            with pytest.raises(RuntimeError, match="stop"):
                write_and_stop(path, clip)
            with pytest.raises(InputError, match="no frames to write"), VideoWriter(path, 25, 45, 61):
                pass
            assert path.stat().st_mtime_ns == before
        assert len(list(tmp_path.iterdir())) == 5

    def test_wrong_frames_and_endings(self, clip: Pixels, tmp_path: Path) -> None:
        with (
            pytest.raises(InputError, match=r"uint8 \[T, 45, 61, 3\], these are uint8 \[10, 44, 61, 3\]"),
            VideoWriter(tmp_path / "clip.mp4", 25, 45, 61) as writer,
        ):
            writer.write(clip[:, :44])
        with pytest.raises(InputError, match=r"ending '\.xyz'; videos are written as \.mp4, \.webm, \.gif, \.npy"):
            VideoWriter(tmp_path / "clip.xyz", 25, 45, 61)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "limit"), [("x.webp", 16383), ("x.jpg", 65500), ("x.JPEG", 65500)])
def test_sides_a_picture_format_cannot_hold(name: str, limit: int, tmp_path: Path) -> None:
    save_image(np.zeros((1, limit, 3), np.uint8), tmp_path / name)
    with pytest.raises(InputError, match=f"{limit + 1}x1 is more than the {limit} pixels a side .* write .png"):
        save_image(np.zeros((1, limit + 1, 3), np.uint8), tmp_path / name)


@pytest.mark.parametrize(("name", "limit"), [("x.mp4", 16384), ("x.webm", 65536), ("x.gif", 65535)])
def test_sides_a_video_format_cannot_hold(name: str, limit: int, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / name, 25, 2, limit) as writer:
        writer.write(np.zeros((1, 2, limit, 3), np.uint8))
    with pytest.raises(InputError, match=f"is more than the {limit} pixels a side .* write .npy, or a name with no"):
        VideoWriter(tmp_path / name, 25, limit + 1, 2)


def test_find_media(picture: Pixels, tmp_path: Path) -> None:
    for name in ("b.JPG", "sub/a.png", ".hidden/c.png"):
        save_image(picture, tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert find_media(tmp_path) == [tmp_path / "b.JPG", tmp_path / "sub" / "a.png"]
    with pytest.raises(InputError, match="no pictures or videos"):
        find_media(tmp_path / ".hidden" / "..hidden")


def test_media_kind_looks_at_the_content(picture: Pixels, tmp_path: Path) -> None:
    Image.fromarray(picture).save(tmp_path / "picture", "PNG")
    assert media_kind(tmp_path / "picture") == "image"


def test_metrics_equal_those_of_scikit_image(clip: Pixels) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    noise = np.random.default_rng(0).normal(0, 15, clip.shape)
    noisy = np.clip(clip + noise, 0, 255).astype(np.uint8)
    expected = [structural_similarity(a, b, channel_axis=2) for a, b in zip(clip, noisy, strict=True)]
    assert ssim(clip[0], noisy[0]) == pytest.approx(expected[0], abs=1e-10)
    assert psnr(clip, noisy) == pytest.approx(peak_signal_noise_ratio(clip, noisy))
    meter = ReconstructionMeter()
    for start in (0, 4, 8):
        meter.update(clip[start : start + 4], noisy[start : start + 4])
    assert meter.ssim == pytest.approx(np.mean(expected), abs=1e-10)
    assert meter.psnr == pytest.approx(psnr(clip, noisy))
    assert psnr(clip, clip) == float("inf")
    assert ssim(clip[0], clip[0]) == pytest.approx(1)
    small = structural_similarity(clip[0, :4, :6], noisy[0, :4, :6], channel_axis=2, win_size=3)
    assert ssim(clip[0, :4, :6], noisy[0, :4, :6]) == pytest.approx(small, abs=1e-10)
