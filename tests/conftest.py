"""What all tests share: thread counts, system programs, recorded data, small pictures and clips."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

# More threads than this only get in each other's way on tensors as small as the tests'.
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def needs_program() -> Callable[[str], None]:
    """Call with a program's name: where it is missing the test is skipped, but fails under CI, which installs it."""

    def check(name: str) -> None:
        if shutil.which(name) is None:
            reason = f"the program {name} is not installed"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)

    return check


@pytest.fixture(scope="session")
def golden() -> Path:
    """Tensors recorded from the released code; their README.json describes them."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def picture() -> NDArray[np.uint8]:
    """A coloured picture without sharp edges, uint8 [45, 61, 3]; both sides odd."""
    return np.asarray(_scene(1, 45, 61)[0])


@pytest.fixture(scope="session")
def clip() -> NDArray[np.uint8]:
    """A moving version of it, uint8 [10, 45, 61, 3]; frames, height and width fit no patch."""
    return _scene(10, 45, 61)


def _scene(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    t, row, column = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    red = 128 + 100 * np.sin((column + 2 * t) / 9)
    green = 255 * row / height
    blue = 40 + 190 * np.exp(-((row - height / 2) ** 2 + (column - width / 2 - t) ** 2) / 150)
    scene: NDArray[np.uint8] = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    return scene
