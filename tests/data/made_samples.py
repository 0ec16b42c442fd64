"""Samples that tests make themselves: pictures, clips and an asset, as they lie in a shard."""

from __future__ import annotations

import functools
import io
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.decode.assets import encode_asset_files
from data.samples import Raw
from tokenizer.assets.views import Views
from tokenizer.cameras import sphere_cameras
from tokenizer.media import VideoWriter

CAPTION = b"A red chair!"


def scene(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    """Smooth colours that move, uint8 [T, H, W, 3]; every frame differs from every other."""
    t, row, column = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    red = 128 + 100 * np.sin((column + 2 * t) / 9)
    green = 255 * row / height
    blue = 60 + 150 * t / max(1, frames - 1) + 40 * np.cos(column / 5)
    return np.asarray(np.stack([red, green, blue], axis=-1).clip(0, 255), np.uint8)


def picture_file(pixels: NDArray[np.uint8], kind: str, **options: Any) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, kind, **options)
    return encoded.getvalue()


@functools.cache
def clip_file(frames: int, height: int = 96, width: int = 128, ending: str = "mp4", fps: int = 25) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{ending}"
        with VideoWriter(path, fps, height, width) as writer:
            writer.write(scene(frames, height, width))
        return path.read_bytes()


def asset_parts(
    voxels: int = 50, seen: int = 5, unseen: int = 2, size: int = 32
) -> tuple[Tensor, Tensor, Views, Views]:
    """Random features in whole 255ths [N, 768], different coordinates [N, 3], and views that are seen and not."""
    rng = np.random.default_rng(voxels)
    features = torch.from_numpy(rng.integers(0, 256, (voxels, 768)).astype(np.float32)) / 255
    cells = np.sort(rng.choice(64**3, voxels, replace=False))
    coordinates = torch.from_numpy(np.stack([cells // 4096, cells // 64 % 64, cells % 64], axis=1).astype(np.int32))
    views = [
        Views(
            rng.integers(0, 256, (count, size, size, 4), dtype=np.uint8),
            torch.full((count, size, size), -1.0),
            sphere_cameras(count, 0.9, phase=float(count)),
        )
        for count in (seen, unseen)
    ]
    return features, coordinates, views[0], views[1]


@functools.cache
def asset_files() -> tuple[dict[str, bytes], dict[str, Any]]:
    features, coordinates, seen, unseen = asset_parts()
    return encode_asset_files(features, coordinates, 64, "surface", seen, unseen)


def raw(
    files: dict[str, bytes], key: str = "000001", facts: dict[str, Any] | None = None, caption: bytes = CAPTION
) -> Raw:
    """A sample with a caption, if that is not empty, and facts."""
    words = {"txt": caption} if caption else {}
    extra = {} if facts is None else {"json": json.dumps(facts).encode()}
    return Raw("file:/shards/train-000000.tar", 0, key, {**files, **words, **extra})


def raw_asset(key: str = "000001") -> Raw:
    files, facts = asset_files()
    return raw(files, key, facts)


def encoded(pixels: NDArray[np.uint8], container_format: str, codec: str, pixel_format: str) -> bytes:
    """A clip that shows one picture, uint8 [H, W, 3] or with alpha [H, W, 4], three times, as FFmpeg writes it."""
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        # libvpx takes alpha only without hidden frames.
        stream: Any = container.add_stream(codec, rate=25, options={"auto-alt-ref": "0"} if codec == "libvpx" else {})
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = pixel_format
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            container.mux(stream.encode(frame.reformat(format=pixel_format)))
        container.mux(stream.encode())
    return file.getvalue()


def displayed(mp4: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 with another display matrix: (a, b, c, d) takes (x, y), y down, to (a x + c y, b x + d y) (ISO/IEC
    14496-12, 6.2.2)."""
    a, b, c, d = (value << 16 for value in matrix)
    place = mp4.index(b"tkhd") + 4 + 40
    return mp4[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + mp4[place + 36 :]
