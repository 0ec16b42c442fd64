"""What people call from Python: every kind of source means the same, and every size comes back."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tokenizer import AToken, InputError, TokenFile
from tokenizer.api import ImageSource
from tokenizer.media import VideoReader, VideoWriter, save_image
from tokenizer.patches import VisualSize, uint8_to_float

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> AToken:
    return AToken.from_pretrained(tiny_models / "atoken-nano")


@pytest.mark.filterwarnings("error")
def test_sources_of_a_picture_mean_the_same(model: AToken, picture: Pixels, tmp_path: Path) -> None:
    save_image(picture, tmp_path / "a.png")
    expected = model.encode_image(picture).latents.features
    sources: dict[str, ImageSource] = {
        "path": tmp_path / "a.png",
        "text": str(tmp_path / "a.png"),
        "PIL image": Image.fromarray(picture),
        "array that only reads": np.asarray(Image.fromarray(picture)),
        "view with negative strides": picture[::-1].copy()[::-1],
        "bytes in a tensor": torch.from_numpy(picture.copy()),
        "floats in a tensor": uint8_to_float(torch.from_numpy(picture.copy())),
    }
    for name, source in sources.items():
        assert torch.equal(model.encode_image(source).latents.features, expected), name


@pytest.mark.filterwarnings("error")
def test_sources_of_a_video_mean_the_same(model: AToken, clip: Pixels, tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.webm", 12.5, *clip.shape[1:3]) as writer:
        writer.write(clip)
    frames = VideoReader(tmp_path / "a.webm").read()
    expected = model.encode_video(tmp_path / "a.webm")
    assert expected.origin.frame_rates == (12.5,)
    frames.flags.writeable = False
    for source in (frames, uint8_to_float(torch.from_numpy(frames.copy()))):
        encoding = model.encode_video(source, frame_rate=12.5)
        assert torch.equal(encoding.latents.features, expected.latents.features)
        assert encoding.origin == expected.origin


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (16, 16), (45, 61)])
def test_pictures_of_any_size_come_back(model: AToken, shape: tuple[int, int]) -> None:
    encoding = model.encode_image(np.zeros((*shape, 3), np.uint8))
    assert encoding.size == VisualSize("image", 1, *shape)
    assert model.decode_visual(encoding).shape == (1, *shape, 3)
    assert model.reconstruct(np.zeros((*shape, 3), np.uint8)).size == shape[::-1]


@pytest.mark.parametrize("frames", [1, 3, 4, 17])
def test_videos_of_any_length_come_back(model: AToken, frames: int) -> None:
    assert model.reconstruct_video(np.zeros((frames, 9, 20, 3), np.uint8)).shape == (frames, 9, 20, 3)


def test_the_released_crop(model: AToken, clip: Pixels) -> None:
    encoding = model.encode_video(clip, fit="crop")
    assert encoding.size == VisualSize("video", 8, 32, 48)
    inner = np.ascontiguousarray(clip[:8, 6:38, 6:54])
    assert torch.equal(encoding.latents.features, model.encode_video(inner).latents.features)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((8, 8), np.uint8), r"an image must be \[H, W, 3\], got \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"an image must be \[H, W, 3\], got \(8, 8, 4\)"),
        (np.zeros((8, 8, 3), np.int64), r"must be floats in \[-1, 1\], got int64"),
        (torch.full((8, 8, 3), 255.0), r"255 to 255; scale 0\.\.255"),
        (torch.full((8, 8, 3), torch.nan), "nan to nan"),
        (torch.zeros(0, 8, 3), "no pixels"),
        ("nothing.png", r"nothing\.png: no such file"),
    ],
)
def test_what_is_no_picture(model: AToken, source: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.encode_image(source)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), np.float32(12.5), np.int64(24)])
def test_clips_keep_rates_and_sizes_of_any_type_of_number(model: AToken, rate: float, tmp_path: Path) -> None:
    """FFmpeg says rates as fractions, and numpy sizes and rates as numbers of its own."""
    encoding = model.encode_video(np.zeros((4, 16, 16, 3), np.uint8), frame_rate=rate)
    encoding.save(tmp_path / "a.atok")
    sizes = (VisualSize("video", *np.array([4, 16, 16])),)
    TokenFile(encoding.tokens, replace(encoding.origin, sizes=sizes)).save(tmp_path / "b.atok")
    for path in tmp_path.glob("*.atok"):
        assert TokenFile.load(path).origin == replace(encoding.origin, frame_rates=(float(rate),))
