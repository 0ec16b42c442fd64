"""What videos written say of their colours; depths of grey, rates and frames that only some formats have."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.made_samples import encoded
from tests.tokenizer.test_media import png16
from tokenizer.errors import InputError
from tokenizer.media import VideoReader, VideoWriter, load_image, media_kind

GREEN = (30, 200, 60)
BT709 = (0.2126, 0.0722)
BT601 = (0.299, 0.114)


def yuv_of(colour: tuple[int, int, int], shares: tuple[float, float]) -> list[float]:
    """Limited-range Y, Cb, Cr of an RGB colour; `shares` are those of red and blue in the luma."""
    red, green, blue = (value / 255 for value in colour)
    luma = shares[0] * red + (1 - sum(shares)) * green + shares[1] * blue
    return [
        16 + 219 * luma,
        128 + 112 * (blue - luma) / (1 - shares[1]),
        128 + 112 * (red - luma) / (1 - shares[0]),
    ]


def write_green(path: Path, height: int, width: int, rate: Fraction | int = 25, frames: int = 2) -> Path:
    with VideoWriter(path, rate, height, width) as writer:
        writer.write(np.full((frames, height, width, 3), GREEN, np.uint8))
    return path


@pytest.mark.parametrize("name", ["x.mp4", "x.webm"])
@pytest.mark.parametrize(
    ("height", "width", "matrix", "shares"), [(719, 65, 6, BT601), (720, 64, 1, BT709), (96, 1280, 6, BT601)]
)
def test_matrix_and_tags_fit_each_other(
    name: str, height: int, width: int, matrix: int, shares: tuple[float, float], tmp_path: Path
) -> None:
    """Players that ignore tags go by the rows; 719 rows become 720 in MP4, which holds even sizes only."""
    import av

    if (height, name) == (719, "x.mp4"):
        matrix, shares = 1, BT709
    path = write_green(tmp_path / name, height, width)
    with av.open(str(path)) as container:
        encoder = container.streams.video[0].codec_context
        tags = (encoder.colorspace, encoder.color_primaries, encoder.color_trc, encoder.color_range)
        frame = next(container.decode(video=0))
        held = [bytes(plane)[0] for plane in frame.planes]
    assert tuple(map(int, tags)) == (matrix, 1, 1, 1)
    np.testing.assert_allclose(held, yuv_of(GREEN, shares), atol=1.6)  # the other matrix is 18 away
    # Values of 8-bit YUV are up to two steps of RGB apart.
    np.testing.assert_allclose(VideoReader(path).read()[0, 5, 5], GREEN, atol=3)


def test_a_gif_of_too_many_frames_a_second_names_other_formats(tmp_path: Path) -> None:
    for rate in (101, Fraction(30000, 1001) * 4, 240):
        with pytest.raises(InputError, match=r"x\.gif: .* frames a second; .gif .* at most 100: write .mp4 or .webm"):
            VideoWriter(tmp_path / "x.gif", rate, 8, 8)
    assert VideoReader(write_green(tmp_path / "x.gif", 8, 8, 100, frames=5)).num_frames == 5
    assert VideoReader(write_green(tmp_path / "x.mp4", 16, 16, 240, frames=5)).fps == 240


def test_16_bits_of_grey_are_rounded_to_the_nearest_of_8() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values / 257)
    np.testing.assert_array_equal(load_image(png16(0, values[..., None])), np.repeat(expected[..., None], 3, axis=2))


@pytest.mark.parametrize(("magic", "most"), [("P5", 65535), ("P5", 1023), ("P2", 65535), ("P2", 1023), ("P5", 256)])
def test_pgm_files_of_more_than_8_bits(magic: str, most: int, tmp_path: Path) -> None:
    values = np.linspace(0, most, 64).round().astype(np.uint16).reshape(4, 16)
    plain = " ".join(map(str, values.ravel())).encode()
    data = values.astype(">u2").tobytes() if magic == "P5" else plain
    (tmp_path / "x.pgm").write_bytes(f"{magic}\n16 4\n{most}\n".encode() + data)
    expected = np.rint(values / most * 255)
    np.testing.assert_array_equal(load_image(tmp_path / "x.pgm"), np.repeat(expected[..., None], 3, axis=2))


def test_what_an_animated_png_holds_for_other_programs_is_no_frame_of_it(tmp_path: Path) -> None:
    other, *shown = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue", "white")]
    other.save(tmp_path / "x.png", save_all=True, append_images=shown, default_image=True, duration=[500, 100, 100])
    reader = VideoReader(tmp_path / "x.png")
    assert media_kind(tmp_path / "x.png") == "video"
    assert reader.num_frames == 3
    np.testing.assert_allclose(reader.timestamps, [0.0, 0.5, 0.6])
    assert reader.read()[:, 0, 0].tolist() == [[0, 255, 0], [0, 0, 255], [255, 255, 255]]
    other.save(tmp_path / "one.png", save_all=True, append_images=shown[:1], default_image=True)
    assert media_kind(tmp_path / "one.png") == "image"
    assert VideoReader(tmp_path / "one.png").read()[:, 0, 0].tolist() == [[0, 255, 0]]


@pytest.mark.parametrize(
    ("ending", "codec", "pixel_format", "has_alpha"),
    [
        ("webm", "libvpx-vp9", "yuva420p", True),
        ("webm", "libvpx", "yuva420p", True),
        ("mov", "prores_ks", "yuva444p10le", True),
        ("mov", "qtrle", "argb", True),
        ("avi", "png", "rgba", True),
        ("avi", "rawvideo", "bgra", False),
        ("webm", "libvpx-vp9", "yuv420p", False),
    ],
)
def test_transparent_videos_are_on_white(
    ending: str, codec: str, pixel_format: str, has_alpha: bool, tmp_path: Path
) -> None:
    """As pictures and animated pictures are. Without that, what lies below shows, which is black in most files."""
    pixels = np.full((64, 96, 4), (200, 100, 0, 255), np.uint8)
    pixels[:, 32:64, 3], pixels[:, 64:, 3] = 51, 0
    path = tmp_path / f"x.{ending}"
    path.write_bytes(encoded(pixels, ending, codec, pixel_format))
    frames = VideoReader(path).read()
    assert len(frames) == 3
    plain, half, clear = (frames[:, 8:-8, column : column + 16].mean(axis=(0, 1, 2)) for column in (8, 40, 72))
    np.testing.assert_allclose(plain, (200, 100, 0), atol=3)
    np.testing.assert_allclose(half, (244, 224, 204) if has_alpha else (200, 100, 0), atol=3)
    np.testing.assert_allclose(clear, (255, 255, 255) if has_alpha else (200, 100, 0), atol=3)
