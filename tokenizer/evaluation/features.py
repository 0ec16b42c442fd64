"""Networks whose features Fréchet distances compare: by name, with what is needed to compute the same figure again.

    inception       "fid"               InceptionV3 of FID, still images
    i3d             "fvd"               I3D of FVD, clips
    lite0           "fd-lite0"          EfficientNet-Lite0, still images
    lite0-frames    "fd-lite0-frames"   EfficientNet-Lite0, mean over the frames of a clip

A distance has the name of its network: only Inception features make a FID, and only I3D features an FVD. Their weights
are not redistributed here: they are read from a path, or from where other tools leave them. EfficientNet-Lite0 comes as
a package. Every network sees the whole picture, resized to a square whatever its sides were, as FID does.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tokenizer.errors import InputError
from tokenizer.evaluation.accumulate import gather_statistics
from tokenizer.evaluation.frechet import FeatureStatistics, frechet_distance
from tokenizer.features import inception, lite0
from tokenizer.features.precision import exact_float32

I3D_FILE: Final = "i3d_torchscript.pt"
I3D_SIZE: Final = 224
I3D_WIDTH: Final = 400
I3D_MIN_FRAMES: Final = 10
"""Fewer frames leave nothing to its strides in time."""

PLAIN: Final = "bilinear, not antialiased"
ANTIALIASED: Final = "bilinear, antialiased"

Frames = NDArray[np.uint8]
Samples = Literal["stills", "frames", "clips"]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which network measured, on what.

    Attributes:
        network: its name here.
        distance: the name of Fréchet distances over its features.
        file: name of the weight file.
        sha256: of that file.
        width: number of features.
        input_size: side in pixels that pictures are resized to.
        resize: the filter.
    """

    network: str
    distance: str
    file: str
    sha256: str
    width: int
    input_size: int
    resize: str

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class FeatureNetwork:
    """Features of samples, batched on a device.

    Args:
        provenance: see there.
        compute: frames [B, 3, S, S] in 0..1, resized, to features [B, width]; of a network of clips, one clip
            [T, 3, S, S] to features [1, width].
        device: where it computes.
        samples: "stills", "frames" (a clip has the mean of the features of its frames), or "clips".
        batch: frames that `compute` is given at once, of stills and frames.
    """

    def __init__(
        self,
        provenance: Provenance,
        compute: Callable[[Tensor], Tensor],
        device: torch.device | str = "cpu",
        samples: Samples = "stills",
        batch: int = 16,
    ) -> None:
        self.provenance = provenance
        self._compute = compute
        self._device = torch.device(device)
        self._samples = samples
        self._batch = batch

    def measure(self, visuals: Sequence[Frames]) -> Tensor:
        """Features of each sample.

        Args:
            visuals: uint8 [T, H, W, 3] each, RGB, T = 1 for still images; sizes may differ.

        Returns:
            float32 [len(visuals), width] on the CPU.

        Raises:
            InputError: another shape or type, a clip for a network of still images, a clip too short for I3D.
        """
        for visual in visuals:
            self._check(visual)
        with torch.inference_mode(), exact_float32():
            if self._samples == "clips":
                rows = [self._compute(torch.cat(list(self._resized(visual)))).float().cpu() for visual in visuals]
                return torch.cat([torch.empty(0, self.provenance.width), *rows])
            features = self._of_frames(visuals)
        clips = features.split([len(visual) for visual in visuals])
        means = [clip.double().mean(dim=0, keepdim=True).float() for clip in clips]
        return torch.cat([torch.empty(0, self.provenance.width), *means])

    def _of_frames(self, visuals: Sequence[Frames]) -> Tensor:
        """float32 [sum of T, width]."""
        done = [torch.empty(0, self.provenance.width)]
        waiting: list[Tensor] = []
        for piece in (piece for visual in visuals for piece in self._resized(visual)):
            waiting.append(piece)
            if sum(map(len, waiting)) >= self._batch:
                done.append(self._compute(torch.cat(waiting)).float().cpu())
                waiting = []
        if waiting:
            done.append(self._compute(torch.cat(waiting)).float().cpu())
        return torch.cat(done)

    def _resized(self, visual: Frames) -> Iterator[Tensor]:
        """Frames as [B, 3, S, S] in 0..1, not more at once than a batch."""
        side = self.provenance.input_size
        for frames in torch.from_numpy(visual).split(self._batch):
            pixels = frames.to(self._device).permute(0, 3, 1, 2).float() / 255
            antialias = self.provenance.resize == ANTIALIASED
            yield F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False, antialias=antialias)

    def _check(self, visual: Frames) -> None:
        if visual.ndim != 4 or visual.shape[3] != 3 or visual.dtype != np.uint8 or visual.size == 0:
            raise InputError(f"features are those of frames uint8 [T, H, W, 3], not {visual.dtype} {visual.shape}")
        name, frames = self.provenance.network, len(visual)
        if self._samples == "stills" and frames != 1:
            raise InputError(f"{name} measures still images, not {frames} frames: use 'i3d' or 'lite0-frames'")
        if self._samples == "clips" and frames < I3D_MIN_FRAMES:
            raise InputError(f"{name} needs at least {I3D_MIN_FRAMES} frames, not {frames}: use longer clips")


def load_features(name: str, weights: Path | None = None, device: torch.device | str = "cpu") -> FeatureNetwork:
    """A network by name: "inception", "i3d", "lite0" or "lite0-frames".

    Args:
        name: see above.
        weights: file, or folder that holds it, for Inception and I3D; by default it is looked for in the caches, see
            `cache_folders`.
        device: where it computes.

    Raises:
        InputError: an unknown name, or weights that are missing or damaged.
    """
    if name not in _LOADERS:
        raise InputError(f"there is no feature network '{name}': use one of {', '.join(_LOADERS)}")
    return _LOADERS[name](weights, torch.device(device))


def cache_folders() -> tuple[Path, ...]:
    """Where weights are looked for: `atoken` in the user's cache, then where torch.hub keeps what others loaded."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "atoken", Path(torch.hub.get_dir()) / "checkpoints"


class FrechetMeter:
    """Fréchet distance of reconstructions from their originals, streaming.

    Args:
        provenance: of the network whose features are added.
    """

    def __init__(self, provenance: Provenance) -> None:
        self.provenance = provenance
        self.originals = FeatureStatistics(provenance.width)
        self.copies = FeatureStatistics(provenance.width)

    def add(self, originals: Tensor, copies: Tensor) -> None:
        """Add samples, none of them twice: what `FeatureNetwork.measure` gives of both sides.

        Raises:
            InputError: a feature that is not finite, or shapes that differ; nothing has been added then.
        """
        if originals.shape != copies.shape:
            raise InputError(f"features of {len(originals)} originals and {len(copies)} copies: give both of each")
        if not bool(originals.isfinite().all()):
            raise InputError("a feature of an original is not finite: leave the sample out")
        # Checks its argument before it adds.
        self.copies.update(copies)
        self.originals.update(originals)

    def gather(self) -> FrechetMeter:
        """The samples of all distributed processes together, in every process."""
        together = FrechetMeter(self.provenance)
        together.originals, together.copies = gather_statistics(self.originals), gather_statistics(self.copies)
        return together

    def result(self) -> dict[str, Any]:
        """Ready for JSON: `distance` (its name), what `FrechetDistance` holds, and `network` (`Provenance`).

        Raises:
            InputError: fewer than two samples.
        """
        found = frechet_distance(self.originals, self.copies)
        return {"distance": self.provenance.distance, **found.as_dict(), "network": self.provenance.as_dict()}

    def state(self) -> dict[str, Tensor]:
        """Tensors for a file, from which `restore` goes on."""
        sides = {"originals": self.originals, "copies": self.copies}
        return {f"{side}.{name}": value for side, sums in sides.items() for name, value in sums.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`.

        Raises:
            InputError: a state of another width, or none at all; nothing has changed then.
        """
        sides = [
            FeatureStatistics.from_state(
                {name.removeprefix(side): value for name, value in state.items() if name.startswith(side)}
            )
            for side in ("originals.", "copies.")
        ]
        if any(sums.width != self.provenance.width for sums in sides):
            raise InputError(f"state of another network than {self.provenance.network}: delete it and start anew")
        self.originals, self.copies = sides


def _find(name: str, distance: str, files: Sequence[str], given: Path | None) -> Path:
    folders = cache_folders() if given is None else (given,)
    if given is not None and given.is_file():
        return given
    for path in (folder / file for folder in folders for file in files):
        if path.is_file():
            return path
    where = f"put it into {folders[0]} or give its path" if given is None else f"{given} is not and has no such file"
    raise InputError(f"{distance.upper()} needs the {name} weights {' or '.join(files)}: {where}")


def _inception(weights: Path | None, device: torch.device) -> FeatureNetwork:
    path = _find("inception", "fid", inception.FILES, weights)
    network = inception.load_inception(path, device)
    provenance = Provenance(
        "inception", "fid", path.name, _sha256(path), inception.WIDTH, inception.INPUT_SIZE, resize=PLAIN
    )
    return FeatureNetwork(provenance, network.features, device)


def _lite0(frames: bool) -> Callable[[Path | None, torch.device], FeatureNetwork]:
    name = "lite0-frames" if frames else "lite0"

    def load(weights: Path | None, device: torch.device) -> FeatureNetwork:
        if weights is not None:
            raise InputError(f"the weights of {name} come from the package {lite0.DISTRIBUTION}, not from {weights}")
        network = lite0.load_lite0(device)
        path = lite0.lite0_weights()
        provenance = Provenance(
            name, f"fd-{name}", path.name, _sha256(path), lite0.WIDTH, lite0.INPUT_SIZE, resize=ANTIALIASED
        )
        return FeatureNetwork(provenance, network.features, device, "frames" if frames else "stills")

    return load


def _i3d(weights: Path | None, device: torch.device) -> FeatureNetwork:
    path = _find("i3d", "fvd", (I3D_FILE,), weights)
    try:
        # FVD is that file, so its format has no successor to switch to.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a TorchScript file ({reason}): give {I3D_FILE}") from None

    def compute(clip: Tensor) -> Tensor:
        pixels = (clip * 2 - 1).transpose(0, 1)[None]
        # The file can resize and rescale too, from 0..255; here both are done, as for the other networks.
        features: Tensor = network(pixels, rescale=False, resize=False, return_features=True)
        return features

    provenance = Provenance("i3d", "fvd", path.name, _sha256(path), I3D_WIDTH, I3D_SIZE, resize=PLAIN)
    return FeatureNetwork(provenance, compute, device, "clips")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_LOADERS: Final[dict[str, Callable[[Path | None, torch.device], FeatureNetwork]]] = {
    "inception": _inception,
    "i3d": _i3d,
    "lite0": _lite0(frames=False),
    "lite0-frames": _lite0(frames=True),
}
FEATURE_NETWORKS: Final = tuple(_LOADERS)
"""Names for `load_features`."""
