"""Reading the weights of classifiers: state dicts without pickled code, batch norm folded into convolutions."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.errors import InputError


@dataclass(frozen=True)
class Weights:
    """A state dict that knows where it comes from.

    Attributes:
        tensors: by name.
        network: its name in messages.
        remedy: what to do about weights that do not fit, as an order ("install X again").
    """

    tensors: Mapping[str, Tensor]
    network: str
    remedy: str

    @classmethod
    def read(cls, path: Path, network: str, remedy: str) -> Weights:
        """Weights of a `.pth` file.

        Raises:
            InputError: the file cannot be read, or holds something else.
        """
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: cannot be read ({reason}): {remedy}") from None
        if not isinstance(content, Mapping):
            raise InputError(f"{path}: holds {type(content).__name__}, not weights: {remedy}")
        return cls(content, network, remedy)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor `name` as float32.

        Raises:
            InputError: it is missing or has another shape.
        """
        value = self.tensors.get(name)
        if not isinstance(value, Tensor):
            raise InputError(f"weights of {self.network} lack '{name}': {self.remedy}")
        if value.shape != shape:
            raise InputError(
                f"weight '{name}' of {self.network} has shape {list(value.shape)}, not {list(shape)}: {self.remedy}"
            )
        return value.detach().float()


class FoldedConv(nn.Module):
    """A frozen convolution without bias and the batch norm behind it, folded into one convolution with bias.

    Args:
        weights: where `conv.weight` and `norm.weight`, `.bias`, `.running_mean`, `.running_var` are.
        conv: name of the convolution.
        norm: name of the batch norm.
        shape: of the kernel, [out, in / groups, height, width].
        stride: of both axes.
        padding: zeros on either side of rows and of columns.
        groups: of channels.
        epsilon: of the batch norm.

    Raises:
        InputError: a weight is missing or has another shape.
    """

    def __init__(
        self,
        weights: Weights,
        conv: str,
        norm: str,
        shape: tuple[int, int, int, int],
        *,
        stride: int = 1,
        padding: tuple[int, int] = (0, 0),
        groups: int = 1,
        epsilon: float = 1e-3,
    ) -> None:
        super().__init__()
        kernel = weights.get(f"{conv}.weight", shape).double()
        gain, shift, mean, variance = (
            weights.get(f"{norm}.{key}", shape[:1]).double()
            for key in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / (variance + epsilon).sqrt()
        folded = (kernel * scale[:, None, None, None]).float()
        # Channels last is the layout in which convolutions of few images run fastest, on a CPU and on CUDA.
        self.kernel = nn.Parameter(folded.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = nn.Parameter((shift - mean * scale).float(), requires_grad=False)
        self.stride, self.padding, self.groups = stride, padding, groups

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, self.bias, self.stride, self.padding, groups=self.groups)


def check_images(images: Tensor, network: str, smallest: int) -> None:
    """Raise `InputError` unless `images` is floating [B, 3, H, W] with sides of at least `smallest`."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            f"{network} takes floating images [B, 3, H, W], not {images.dtype} {list(images.shape)}: convert them"
        )
    if min(images.shape[2:]) < smallest:
        raise InputError(
            f"{network} needs sides of at least {smallest} pixels, not {list(images.shape[2:])}: use larger images"
        )
