"""Frozen image networks behind one protocol: feature networks of the CLIP loss, teachers of the distillation.

SigLIP 2 vision serves as both where its weights are at hand. EfficientNet-Lite0 is always at hand and serves as the
first; its features are no neighbours of any text tower's, so that it teaches only by being imitated.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.features.lite0 import INPUT_SIZE, WIDTH, Lite0, load_lite0
from tokenizer.losses.weights import LossChoices
from tokenizer.text.folder import load_frozen, read_kind


@runtime_checkable
class ImageNetwork(Protocol):
    """A frozen network over images, differentiable with respect to them."""

    @property
    def name(self) -> str:
        """For logs."""
        ...

    @property
    def width(self) -> int:
        """D, of the pooled features."""
        ...

    @property
    def side(self) -> int:
        """Pixels of the squares that it was trained on."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Pooled features [n, D], not normalised, of floating images [n, 3, H, W] in [-1, 1].

        Raises:
            InputError: another shape, or a size that the network does not take.
        """
        ...


class Lite0Network(nn.Module):
    """EfficientNet-Lite0 as an `ImageNetwork`: 1280 features, images of any size from 32 up.

    Args:
        network: the classifier; by default with the weights of the installed package.
    """

    name = "efficientnet-lite0"
    width = WIDTH
    side = INPUT_SIZE

    def __init__(self, network: Lite0 | None = None) -> None:
        super().__init__()
        self.network = network if network is not None else load_lite0()

    def forward(self, images: Tensor) -> Tensor:
        """See `ImageNetwork`."""
        return self.network.features((images + 1) / 2)


class SiglipVision(nn.Module):
    """The image tower of a SigLIP or SigLIP 2 checkpoint as an `ImageNetwork`.

    Args:
        folder: a local folder as transformers saves it (`config.json`, `model.safetensors`). NaFlex checkpoints take
            images of any sizes that are whole patches, others those of their own size.
        dtype: of the weights; features are at least float32.

    Raises:
        InputError: transformers is not installed, or the folder holds no such checkpoint.
    """

    def __init__(self, folder: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.naflex = read_kind(folder).startswith("siglip2")
        kind = "Siglip2VisionModel" if self.naflex else "SiglipVisionModel"
        self.tower = load_frozen(folder, kind, "comparing images with SigLIP 2", dtype)
        config: Any = self.tower.config
        self.patch, self.width = int(config.patch_size), int(config.hidden_size)
        self.side = round(config.num_patches**0.5) * self.patch if self.naflex else int(config.image_size)
        self.name = f"{'siglip2' if self.naflex else 'siglip'}-{self.width}-patch{self.patch}"

    def forward(self, images: Tensor) -> Tensor:
        """See `ImageNetwork`."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(f"{self.name} takes floating images [n, 3, H, W], got {images.dtype} {list(images.shape)}")
        height, width = images.shape[2:]
        images = images.to(self.tower.dtype)
        if not self.naflex:
            if (height, width) != (self.side, self.side):
                raise InputError(f"{self.name} takes images of {self.side}x{self.side}, got {height}x{width}")
            return self._pooled(pixel_values=images)
        if height % self.patch or width % self.patch:
            raise InputError(f"{self.name} takes whole patches of {self.patch} pixels, got {height}x{width}")
        rows, columns = height // self.patch, width // self.patch
        # A patch is flattened row, column, colour, as ours are.
        patches = images.unflatten(3, (columns, self.patch)).unflatten(2, (rows, self.patch)).permute(0, 2, 4, 3, 5, 1)
        patches = patches.flatten(3).flatten(1, 2)
        return self._pooled(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int64, device=images.device),
            spatial_shapes=torch.tensor([[rows, columns]]).expand(len(images), 2),
        )

    def _pooled(self, **inputs: Tensor) -> Tensor:
        pooled: Tensor = self.tower(**inputs).pooler_output
        return pooled if pooled.dtype == torch.float64 else pooled.float()


def make_image_network(siglip2: str | None = None, device: torch.device | str = "cpu") -> ImageNetwork:
    """SigLIP 2 of a folder, or EfficientNet-Lite0 without one: frozen, in evaluation mode.

    Raises:
        InputError: its package or weights are not there.
    """
    network = Lite0Network() if siglip2 is None else SiglipVision(siglip2)
    return network.to(device).requires_grad_(False).eval()


def make_clip_network(choices: LossChoices, device: torch.device | str = "cpu") -> ImageNetwork:
    """The feature network of the CLIP loss that a configuration asks for; see `make_image_network`."""
    return make_image_network(None if choices.clip_network == "lite0" else choices.siglip2, device)
