"""Baselines: what a code of the same size could be without a learned tokenizer.

JPEG, WebP and x264 get for every picture or clip as many bits as a model took for the same one, container headers of
pictures included, and use them as well as they can: the best quality that fits. Where even their lowest quality takes
more, that is what is measured, and the bits in the table say so. A picture that is larger than a format allows is
measured without it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from tokenizer.assets.views import Views
from tokenizer.errors import InputError, require_package
from tokenizer.evaluation.command.cost import measured
from tokenizer.evaluation.command.identity import checksum
from tokenizer.evaluation.command.presets import Kind
from tokenizer.evaluation.command.samples import Frames, Sample
from tokenizer.evaluation.command.systems import Copy, NotHandledError, Role
from tokenizer.evaluation.linear_code import LinearCodes, fit_to_training_data
from tokenizer.fingerprint import weights_digest

NAMES: Final = ("jpeg", "webp", "linear", "x264", "flat")
CPU: Final = torch.device("cpu")
X264_PRESET: Final = "medium"

File = tuple[bytes, Callable[[], Frames]]
"""A coded visual, and what decodes it."""


@dataclass(frozen=True, slots=True)
class Coder:
    """A codec with a quality.

    kind: what it codes. qualities: worst and best. settings: variants that are all tried. code: frames, quality and
    setting to a file. largest_side: in pixels, of what the format can hold.
    """

    name: str
    kind: Kind
    qualities: tuple[int, int]
    settings: tuple[Any, ...]
    code: Callable[[Frames, int, Any], File]
    description: str
    largest_side: int


class SameRate:
    """A coder with the bits of a model.

    Args:
        coder: see there.
        model: name of the system whose bits it may spend.
    """

    role: Role = "baseline"

    def __init__(self, coder: Coder, model: str) -> None:
        self.coder, self.budget_of = coder, model
        self.name = f"{coder.name} at the bits of {model}"

    def facts(self) -> dict[str, Any]:
        """See `System`."""
        return {"codec": self.coder.description, "bits_of": self.budget_of}

    def handles(self, sample: Sample) -> bool:
        """See `System`."""
        return sample.kind == self.coder.kind

    def reconstruct(self, sample: Sample, budget: float | None) -> Copy:
        """See `System`. Encoding time is that of the search for the quality."""
        assert budget is not None, "a codec at the bits of a model needs them"
        height, width = sample.frames.shape[1:3]
        if max(height, width) > self.coder.largest_side:
            raise NotHandledError(
                f"{width}x{height} is more than the {self.coder.largest_side} pixels a side of {self.coder.name}"
            )
        (data, decode), coding = measured(partial(best_within, self.coder, sample.frames, budget), CPU)
        frames, decoding = measured(decode, CPU)
        return Copy(frames, 8.0 * len(data), coding.seconds, decoding.seconds, max(coding.memory, decoding.memory))


def best_within(coder: Coder, frames: Frames, bits: float) -> File:
    """The file of least squared error among the largest of each setting that fits into so many bits; the smallest file
    where none fits. File sizes are taken to grow with the quality, and a quality that cannot be coded to be too large.

    Raises:
        NotHandledError: no quality can be coded.
    """
    fitting, smallest, fault = [], None, ""
    for setting in coder.settings:
        low, high = coder.qualities
        best: File | None = None
        while low <= high:
            middle = (low + high) // 2
            try:
                found = coder.code(frames, middle, setting)
            except (OSError, ValueError) as error:  # such as a partition of WebP that gets too long
                fault, high = " ".join(str(error).split()), middle - 1
                continue
            if smallest is None or len(found[0]) < len(smallest[0]):
                smallest = found
            if 8 * len(found[0]) <= bits:
                best, low = found, middle + 1
            else:
                high = middle - 1
        if best is not None:
            fitting.append(best)
    if not fitting:
        if smallest is None:
            raise NotHandledError(f"{coder.name} cannot code it ({fault})")
        return smallest
    errors = [np.square(file[1]().astype(np.float32) - frames).mean() for file in fitting] if fitting[1:] else [0.0]
    return fitting[int(np.argmin(errors))]


def _jpeg(frames: Frames, quality: int, subsampling: int) -> File:
    return _pillow(frames, format="JPEG", quality=quality, subsampling=subsampling, optimize=True)


def _webp(frames: Frames, quality: int, _: None) -> File:
    return _pillow(frames, format="WEBP", quality=quality, method=4)


def _pillow(frames: Frames, **options: Any) -> File:
    coded = io.BytesIO()
    Image.fromarray(frames[0]).save(coded, **options)
    data = coded.getvalue()
    return data, lambda: np.array(Image.open(io.BytesIO(data)).convert("RGB"))[None]


def _x264(frames: Frames, quality: int, _: None) -> File:
    """quality 0 to 51 is the constant rate factor 51 to 0. Bytes are those of the stream, without a container."""
    require_package("av", "coding video with x264")
    import av

    count, height, width, _channels = frames.shape
    padded = np.pad(frames, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)], mode="edge")
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = padded.shape[2], padded.shape[1], "yuv420p"
    encoder.framerate = encoder.rate = 25
    encoder.options = {"crf": str(51 - quality), "preset": X264_PRESET, "threads": "1"}
    packets = []
    try:
        for number, frame in enumerate(padded):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            packets += encoder.encode(picture)
        packets += encoder.encode(None)
    except av.error.FFmpegError as error:
        raise OSError(str(error)) from error
    data = b"".join(bytes(packet) for packet in packets)

    def decode() -> Frames:
        decoder: Any = av.CodecContext.create("h264", "r")
        shown = [picture for packet in decoder.parse(data) for picture in decoder.decode(packet)]
        # The parser holds the last packet back until it is told that nothing follows.
        shown += [picture for packet in decoder.parse(None) for picture in decoder.decode(packet)]
        shown += decoder.decode(None)
        pixels = np.stack([picture.to_ndarray(format="rgb24") for picture in shown])[:, :height, :width]
        if len(pixels) != count:
            raise InputError(f"x264: {len(pixels)} frames came back of {count}")
        return np.asarray(pixels, np.uint8)

    return data, decode


CODERS: Final = {
    coder.name: coder
    for coder in (
        Coder("jpeg", "image", (1, 100), (2, 0), _jpeg, "JPEG of Pillow, optimised tables, 4:2:0 or 4:4:4", 65500),
        Coder("webp", "image", (0, 100), (None,), _webp, "lossy WebP of Pillow, method 4", 16383),
        Coder(
            "x264", "video", (0, 51), (None,), _x264, f"x264 4:2:0, preset {X264_PRESET}, constant rate factor", 16384
        ),
    )
}


class LinearSystem:
    """The best linear code of the size of a model's tokens.

    Args:
        codes: fitted or loaded.
        bits_per_value: as the model beside it stores a latent.
        source: where they came from.
    """

    role: Role = "baseline"
    name = "linear"
    budget_of: str | None = None

    def __init__(self, codes: LinearCodes, bits_per_value: float, source: str) -> None:
        self._codes, self._bits, self._source = codes, bits_per_value, source

    def facts(self) -> dict[str, Any]:
        """See `System`. The file is not enough: that of a run names the data that a code was fitted to."""
        codes, file = {"image": self._codes.image, "video": self._codes.video}, Path(self._source)
        tensors = {f"{kind} {part}": getattr(code, part) for kind, code in codes.items() for part in ("mean", "basis")}
        return {
            "codec": f"{self._codes.image.basis.shape[1]} principal components of each patch",
            "source": self._source,
            "sha256": checksum(file) if file.is_file() else None,
            "digest": weights_digest(tensors),
        }

    def handles(self, sample: Sample) -> bool:
        """See `System`."""
        return sample.kind in ("image", "video")

    def reconstruct(self, sample: Sample, budget: float | None = None) -> Copy:  # noqa: ARG002
        """See `System`. Encoding and decoding are one call here; half of its time is given to each."""
        frames, cost = measured(lambda: self._codes.reconstruct(sample.frames), CPU)
        code = self._codes.image if sample.kind == "image" else self._codes.video
        sides = zip(sample.frames.shape, code.patch_size, strict=False)
        tokens = int(np.prod([-(-side // patch) for side, patch in sides]))
        bits = tokens * code.basis.shape[1] * self._bits
        return Copy(frames, bits, cost.seconds / 2, cost.seconds / 2, cost.memory, tokens)


class FlatSystem:
    """One opaque sphere for each voxel that a model has tokens for, of the mean colour seen in it; all of one size,
    the one that is best for the asset.

    Args:
        resolution: of the grid.
    """

    role: Role = "baseline"
    name = "flat voxels"
    budget_of: str | None = None

    def __init__(self, resolution: int) -> None:
        self._resolution = resolution

    def facts(self) -> dict[str, Any]:
        """See `System`."""
        return {"codec": f"opaque spheres on a grid of {self._resolution}, 24 bits of colour for each voxel"}

    def handles(self, sample: Sample) -> bool:
        """See `System`. Depth is needed, which voxels that were packed before have lost."""
        return sample.asset is not None and isinstance(sample.asset.source, Views)

    def reconstruct(self, sample: Sample, budget: float | None = None) -> Copy:  # noqa: ARG002
        """See `System`."""
        from tokenizer.evaluation.assets import SIZES, draw, flat_gaussians, mean_psnr

        assert sample.asset is not None
        source: Any = sample.asset.source
        wanted = sample.asset.wanted
        spheres, coding = measured(lambda: flat_gaussians(source, self._resolution), CPU)
        target = torch.from_numpy(sample.frames).float() / 255

        def best() -> torch.Tensor:
            scales = torch.ones_like(spheres.scales) / self._resolution
            tried = (draw(replace(spheres, scales=size * scales), wanted.cameras, wanted.size) for size in SIZES)
            return max(tried, key=lambda drawn: mean_psnr(drawn, target))

        drawn, decoding = measured(best, CPU)
        frames: Frames = (drawn * 255).round().byte().numpy()
        memory, tokens = max(coding.memory, decoding.memory), len(spheres)
        return Copy(frames, 24.0 * tokens, coding.seconds, decoding.seconds, memory, tokens)


def load_linear(path: Path, seed: int) -> LinearCodes:
    """A saved linear code (.npz), or one fitted to the training data of a run (its configuration, a YAML file).

    Raises:
        InputError: neither.
    """
    return fit_to_training_data(path, seed) if path.suffix in (".yaml", ".yml") else LinearCodes.load(path)
