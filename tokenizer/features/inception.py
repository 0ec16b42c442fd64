"""Inception v3 as FID means it: the network of arXiv 1512.00567, section 6, with the quirks of arXiv 1706.08500.

FID is defined by one network: the TensorFlow graph of 2015-12-05, in the weights that pytorch-fid and torch-fidelity
read (1008 classes, no auxiliary head). It differs from the Inception v3 of the model zoos in three places:

- average pooling does not count the padding at the border;
- the pooling branch of the last block takes the maximum, not the average;
- pixels are scaled to -1..1, after resizing to 299 x 299 bilinearly without antialiasing (pytorch-fid's way).

Names are those of the file. Batch norm is folded into the convolutions when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.features.weights import FoldedConv, Weights, check_images

FILES: Final = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""Names of the weight file, as pytorch-fid and as torch-fidelity call it."""
WIDTH: Final = 2048
"""Channels of the pooled features."""
INPUT_SIZE: Final = 299
MIN_SIDE: Final = 75

_NAME: Final = "Inception"


class ConvShape(NamedTuple):
    """A convolution of the file: `name.conv.weight` [channels_out, channels_in, height, width], no bias."""

    name: str
    channels_in: int
    channels_out: int
    height: int
    width: int
    stride: int = 1
    pad: bool = True  # zeros that keep the size, where the stride is 1

    @property
    def padding(self) -> tuple[int, int]:
        return (self.height // 2, self.width // 2) if self.pad else (0, 0)


def _path(block: str, branch: str, channels: int, *layers: tuple[int, int, int]) -> list[ConvShape]:
    """Convolutions in a row, (channels out, height, width) each; `{}` in `branch` becomes their number."""
    path = []
    for number, (channels_out, height, width) in enumerate(layers, start=1):
        path.append(ConvShape(f"{block}.{branch.format(number)}", channels, channels_out, height, width))
        channels = channels_out
    return path


class _Conv(FoldedConv):
    """A convolution of the file, and ReLU."""

    def __init__(self, weights: Weights, shape: ConvShape) -> None:
        size = (shape.channels_out, shape.channels_in, shape.height, shape.width)
        names = f"{shape.name}.conv", f"{shape.name}.bn"
        super().__init__(weights, *names, size, stride=shape.stride, padding=shape.padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class _Block(nn.Module):
    """Branches side by side, joined along the channels.

    Args:
        paths: convolutions of each branch; the last one starts behind the pooling.
        pool: "average" (3 x 3, border not counted), "max" (3 x 3), "halve" (3 x 3, stride 2, no convolution behind it).
        forks: branches that end in two convolutions side by side, by number.
    """

    def __init__(self, weights: Weights, paths: list[list[ConvShape]], pool: str, forks: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.pool, self.forks = pool, forks
        self.paths = nn.ModuleList(nn.ModuleList(_Conv(weights, shape) for shape in path) for path in paths)

    def forward(self, x: Tensor) -> Tensor:
        pooling = len(self.paths) - (0 if self.pool == "halve" else 1)
        outputs = []
        for number, path in enumerate(self.paths):
            assert isinstance(path, nn.ModuleList)
            y = self._pooled(x) if number == pooling else x
            split = 2 if number in self.forks else 0
            for conv in path[: len(path) - split]:
                y = conv(y)
            outputs += [conv(y) for conv in path[len(path) - split :]] if split else [y]
        if self.pool == "halve":
            outputs.append(self._pooled(x))
        return torch.cat(outputs, dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        return F.max_pool2d(x, 3, stride=2) if self.pool == "halve" else F.max_pool2d(x, 3, stride=1, padding=1)


class _Stem(nn.Module):
    """Five convolutions, with max pooling in front of the fourth and at the end."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_Conv(weights, shape) for shape in STEM)

    def forward(self, x: Tensor) -> Tensor:
        for number, conv in enumerate(self.convs):
            x = conv(F.max_pool2d(x, 3, stride=2) if number == 3 else x)
        return F.max_pool2d(x, 3, stride=2)


STEM: Final = (
    ConvShape("Conv2d_1a_3x3", 3, 32, 3, 3, stride=2, pad=False),
    ConvShape("Conv2d_2a_3x3", 32, 32, 3, 3, pad=False),
    ConvShape("Conv2d_2b_3x3", 32, 64, 3, 3),
    ConvShape("Conv2d_3b_1x1", 64, 80, 1, 1),
    ConvShape("Conv2d_4a_3x3", 80, 192, 3, 3, pad=False),
)


def _fine(block: str, channels: int, pooled: int) -> list[list[ConvShape]]:
    """Figure 5 of the paper, at 35 x 35."""
    return [
        _path(block, "branch1x1", channels, (64, 1, 1)),
        _path(block, "branch5x5_{}", channels, (48, 1, 1), (64, 5, 5)),
        _path(block, "branch3x3dbl_{}", channels, (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        _path(block, "branch_pool", channels, (pooled, 1, 1)),
    ]


def _halving(path: list[ConvShape]) -> list[ConvShape]:
    """The same path with its last convolution halving the size."""
    return [*path[:-1], path[-1]._replace(stride=2, pad=False)]


def _middle(block: str, inner: int) -> list[list[ConvShape]]:
    """Figure 6 of the paper with n = 7, at 17 x 17."""
    double = ((inner, 1, 1), (inner, 7, 1), (inner, 1, 7), (inner, 7, 1), (192, 1, 7))
    return [
        _path(block, "branch1x1", 768, (192, 1, 1)),
        _path(block, "branch7x7_{}", 768, (inner, 1, 1), (inner, 1, 7), (192, 7, 1)),
        _path(block, "branch7x7dbl_{}", 768, *double),
        _path(block, "branch_pool", 768, (192, 1, 1)),
    ]


def _coarse(block: str, channels: int) -> list[list[ConvShape]]:
    """Figure 7 of the paper, at 8 x 8; the second and third branch fork."""
    fork = [("a", 1, 3), ("b", 3, 1)]
    return [
        _path(block, "branch1x1", channels, (320, 1, 1)),
        [
            *_path(block, "branch3x3_{}", channels, (384, 1, 1)),
            *(ConvShape(f"{block}.branch3x3_2{side}", 384, 384, h, w) for side, h, w in fork),
        ],
        [
            *_path(block, "branch3x3dbl_{}", channels, (448, 1, 1), (384, 3, 3)),
            *(ConvShape(f"{block}.branch3x3dbl_3{side}", 384, 384, h, w) for side, h, w in fork),
        ],
        _path(block, "branch_pool", channels, (192, 1, 1)),
    ]


class BlockShape(NamedTuple):
    """A block of branches; the fields are the arguments of `_Block`."""

    paths: list[list[ConvShape]]
    pool: str
    forks: tuple[int, ...] = ()


BLOCKS: Final = (
    BlockShape(_fine("Mixed_5b", 192, 32), "average"),
    BlockShape(_fine("Mixed_5c", 256, 64), "average"),
    BlockShape(_fine("Mixed_5d", 288, 64), "average"),
    BlockShape(
        [
            _halving(_path("Mixed_6a", "branch3x3", 288, (384, 3, 3))),
            _halving(_path("Mixed_6a", "branch3x3dbl_{}", 288, (64, 1, 1), (96, 3, 3), (96, 3, 3))),
        ],
        "halve",
    ),
    BlockShape(_middle("Mixed_6b", 128), "average"),
    BlockShape(_middle("Mixed_6c", 160), "average"),
    BlockShape(_middle("Mixed_6d", 160), "average"),
    BlockShape(_middle("Mixed_6e", 192), "average"),
    BlockShape(
        [
            _halving(_path("Mixed_7a", "branch3x3_{}", 768, (192, 1, 1), (320, 3, 3))),
            _halving(_path("Mixed_7a", "branch7x7x3_{}", 768, (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))),
        ],
        "halve",
    ),
    BlockShape(_coarse("Mixed_7b", 1280), "average", (1, 2)),
    BlockShape(_coarse("Mixed_7c", 2048), "max", (1, 2)),
)


def convolutions() -> Iterator[ConvShape]:
    """Every convolution of the network, 94 in all."""
    yield from STEM
    for block in BLOCKS:
        for path in block.paths:
            yield from path


class Inception(nn.Module):
    """Inception v3 up to its pooled features, frozen.

    Args:
        tensors: state dict with the names of pytorch-fid's file (`Conv2d_1a_3x3.conv.weight`, ...); the classifier's
            are not read.

    Raises:
        InputError: a weight is missing or has another shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        weights = Weights(tensors, _NAME, f"give {FILES[0]}")
        self.stem = _Stem(weights)
        self.blocks = nn.Sequential(*(_Block(weights, *block) for block in BLOCKS))

    def features(self, images: Tensor) -> Tensor:
        """Features averaged over the places.

        Args:
            images: floating [B, 3, H, W] in 0..1, RGB, resized to `INPUT_SIZE` by the caller; sides from 75 up.

        Returns:
            [B, 2048], at least 0, of the type of the images.

        Raises:
            InputError: another shape or type.
        """
        check_images(images, _NAME, MIN_SIDE)
        x = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.blocks(self.stem(x)).mean((2, 3))
        return features


def load_inception(path: Path, device: torch.device | str = "cpu") -> Inception:
    """Inception with the weights of a file of pytorch-fid or torch-fidelity, float32, in evaluation mode.

    Raises:
        InputError: the file cannot be read, or holds other weights.
    """
    weights = Weights.read(path, _NAME, f"give {FILES[0]}")
    return Inception(weights.tensors).eval().to(device)
