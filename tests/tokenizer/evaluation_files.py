"""Small data sets, adapters and an aligned model for tests of `atoken evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.evaluation.command.evaluate import Options
from tokenizer.evaluation.command.presets import find_preset
from tokenizer.media import VideoWriter, save_image

Pixels = NDArray[np.uint8]


def scene(number: int, height: int, width: int, frames: int = 1) -> Pixels:
    """A smooth picture that differs with `number` and moves, uint8 [T, H, W, 3]."""
    t, row, column = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    channels = [
        128 + 90 * np.sin((column + 3 * t) / (4 + number) + number),
        255 * row / height,
        60 + 40 * number + 30 * np.cos((row + column) / (5 + number)),
    ]
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def picture_folder(folder: Path, count: int = 5) -> Path:
    """PNGs of different sizes in two classes, with captions, and a truncated one."""
    for number in range(count):
        path = folder / ("red" if number % 2 else "blue") / f"{number}.png"
        save_image(scene(number, 40 + 4 * number, 52)[0], path)
        path.with_suffix(".txt").write_text(f"picture {number}\nanother of {number}\n")
    broken = folder / "red" / "broken.png"
    broken.parent.mkdir(exist_ok=True)
    broken.write_bytes((folder / "blue" / "0.png").read_bytes()[:200])
    return folder


def write_clip(path: Path, frames: Pixels) -> Path:
    with VideoWriter(path, 25, *frames.shape[1:3]) as writer:
        writer.write(frames)
    return path


def options(data: Path | str, out: Path, **changes: Any) -> Options:
    """Options of a quick run: PSNR and SSIM of the tiny bundled model on a CPU, without baselines."""
    given = {
        "models": ["atoken-nano"],
        "preset": find_preset("native"),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "metrics": frozenset({"psnr", "ssim"}),
        "baselines": [],
        **changes,
    }
    return Options(data=str(data), out=out, **given)


class Perfect:
    """An adapter that loses nothing."""

    name = "perfect"

    def encode(self, frames: Pixels) -> tuple[Pixels, float]:
        return frames.copy(), 8.0 * frames.size

    def decode(self, code: Pixels) -> Pixels:
        return code


class Coarse:
    """An adapter that keeps four bits of eight."""

    name = "coarse"

    def encode(self, frames: Pixels) -> tuple[Pixels, float]:
        return (frames >> 4).astype(np.uint8), 4.0 * frames.size

    def decode(self, code: Pixels) -> Pixels:
        return ((code << 4) | 8).astype(np.uint8)


class Tower:
    """A text tower that knows a few words, each by a direction of its own."""

    name = "words"

    def __init__(self, words: Sequence[str]) -> None:
        self.words, self.width = list(words), len(words) + 1

    def encode(self, texts: Sequence[str]) -> Tensor:
        rows = torch.zeros(len(texts), self.width)
        for row, text in zip(rows, texts, strict=True):
            found = [number for number, word in enumerate(self.words) if word in text]
            row[found or [-1]] = 1
        return torch.nn.functional.normalize(rows, dim=1)


class Alignment:
    """Gives each pooled vector, told apart by its values, what a table says."""

    def __init__(self, tower: Tower, vectors: dict[float, Tensor]) -> None:
        self._tower, self._vectors = tower, vectors

    def tower(self, _: object) -> Tower:
        return self._tower

    def encode_pooled(self, pooled: Tensor) -> Tensor:
        return torch.stack([self._vectors[fingerprint(row)] for row in pooled])


def fingerprint(pooled: Tensor) -> float:
    """A number that pooled vectors are told apart by."""
    return round(float(pooled.double().sum()), 4)
