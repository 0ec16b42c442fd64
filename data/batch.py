"""Items to `SparseTokens`: the last step of loading, on the device that trains.

Pixels travel as bytes and become numbers where they are needed: a quarter of the transfer of float32, and no work for
the host. Nothing waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.decode.assets import asset_size
from data.mixture import Task
from data.samples import Item, Seen
from tokenizer.errors import InputError
from tokenizer.patches import (
    PATCH_SIZE,
    PatchSize,
    VisualSize,
    grid_positions,
    patchify,
    uint8_to_float,
)
from tokenizer.sparse import SparseTokens
from tokenizer.voxels import ASSET_TIME, AssetSize


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that are trained on together, all for one task."""

    task: Task
    items: list[Item]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    @property
    def num_tokens(self) -> int:
        return sum(item.tokens for item in self.items)

    @property
    def ids(self) -> list[str]:
        return [item.id for item in self.items]

    @property
    def captions(self) -> list[str | None]:
        return [item.caption for item in self.items]

    def tokens(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        patch_size: PatchSize = PATCH_SIZE,
    ) -> SparseTokens:
        """The items, in order, as `AToken.encode` takes them.

        Args:
            device: where they are wanted; the CPU by default.
            dtype: of the features; conversion is in float32.
            patch_size: of the model.

        Returns:
            [N, 3072] in [-1, 1]; of pictures and voxels frame 0, the other frames zero. Plans made from the positions
            need no device.

        Raises:
            InputError: no items, an item that is neither pixels of whole patches nor voxels, or one whose tokens are
                not as many as it says.
        """
        if not self.items:
            raise InputError("the batch is empty; give at least one item")
        positions = [self._positions(item, patch_size) for item in self.items]
        lengths = [len(rows) for rows in positions]
        channels = patch_size[0] * patch_size[1] * patch_size[2] * 3
        # Positions first, without features: what moves to the device keeps its copy on the host.
        places = torch.cat(positions)
        if device is not None and torch.device(device).type == "cuda":
            places = places.pin_memory()
        tokens = SparseTokens(torch.empty(len(places), 0), places, lengths).to(device)
        parts = [_bytes_of(item, patch_size) for item in self.items]
        features = torch.zeros(len(places), channels, dtype=dtype, device=device)
        start = 0
        # Items of a task are alike: one copy to the device, and a few operations there, whatever their number.
        for (is_asset, width), run in itertools.groupby(zip(self.items, parts, strict=True), _sort_of):
            values = _on_device([part for _, part in run], tokens.device)
            features[start : start + len(values), :width] = (
                _asset_values(values) if is_asset else uint8_to_float(values)
            )
            start += len(values)
        return tokens.with_features(features)

    def split(self) -> tuple[Batch, Batch]:
        """Two batches of these items in their order, cut where their tokens are most alike in number.

        Raises:
            InputError: fewer than two items, none of which can be split.
        """
        if len(self.items) < 2:
            raise InputError(f"a batch of {len(self.items)} items cannot be split")
        before = list(itertools.accumulate(item.tokens for item in self.items))
        cut = min(range(1, len(self.items)), key=lambda place: abs(2 * before[place - 1] - before[-1]))
        return replace(self, items=self.items[:cut]), replace(self, items=self.items[cut:])

    def sizes(self) -> list[VisualSize] | list[AssetSize]:
        """What the items measure, as decoding and `.atok` files need it."""
        if any(item.pixels is None for item in self.items):
            return [asset_size(item.facts, item.id) for item in self.items]
        return [_visual_size(item.pixels) for item in self.items if item.pixels is not None]

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which copies to a device run beside its work; as it is without one."""
        if not torch.cuda.is_available():
            return self
        return replace(self, items=[_pinned(item) for item in self.items])

    def _positions(self, item: Item, patch_size: PatchSize) -> Tensor:
        """[N, 4] int32 on the CPU."""
        if item.pixels is not None:
            size = _visual_size(item.pixels)
            whole = (size.frames if size.kind == "video" else patch_size[0], size.height, size.width)
            if any(side % patch for side, patch in zip(whole, patch_size, strict=True)):
                raise InputError(f"{item.id}: {tuple(item.pixels.shape)} pixels are no whole patches of {patch_size}")
            positions = grid_positions(size.grid(patch_size))
        elif item.features is not None and item.coordinates is not None:
            if item.features.shape[1] != patch_size[1] * patch_size[2] * 3:
                raise InputError(f"{item.id}: voxels of {item.features.shape[1]} numbers do not fit {patch_size}")
            positions = F.pad(item.coordinates.int(), (1, 0), value=ASSET_TIME)
        else:
            raise InputError(f"{item.id}: holds neither pixels nor voxels")
        if len(positions) != item.tokens:
            raise InputError(f"{item.id}: becomes {len(positions)} tokens, but says {item.tokens}")
        return positions


def _bytes_of(item: Item, patch_size: PatchSize) -> Tensor:
    """uint8 [N, C], C as many channels as the item fills."""
    if item.pixels is None:
        assert item.features is not None  # `_positions` has refused anything else
        return item.features
    if item.pixels.ndim == 3:
        return patchify(item.pixels[None], (1, *patch_size[1:]))
    return patchify(item.pixels, patch_size)


def _sort_of(pair: tuple[Item, Tensor]) -> tuple[bool, int]:
    """What items need to have in common to become numbers together."""
    item, part = pair
    return item.pixels is None, part.shape[1]


def _on_device(parts: list[Tensor], device: torch.device) -> Tensor:
    """uint8 [n, C] each -> all of them, one behind the other, on the device; nobody waits for it."""
    if device.type == "cpu":
        return torch.cat(parts)
    rows = sum(len(part) for part in parts)
    together = torch.empty(rows, parts[0].shape[1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    torch.cat(parts, out=together)
    return together.to(device, non_blocking=True)


def _asset_values(values: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as voxels are read (FORMAT 11)."""
    return values.float() / 255 * 2 - 1


def _visual_size(pixels: Tensor) -> VisualSize:
    if pixels.ndim == 3:
        return VisualSize("image", 1, pixels.shape[0], pixels.shape[1])
    return VisualSize("video", pixels.shape[0], pixels.shape[1], pixels.shape[2])


def _pinned(item: Item) -> Item:
    views = item.views
    if views is not None:
        views = Seen(views.pictures.pin_memory(), views.cameras)
    pixels, features, coordinates = (
        None if tensor is None else tensor.pin_memory() for tensor in (item.pixels, item.features, item.coordinates)
    )
    return replace(item, pixels=pixels, features=features, coordinates=coordinates, views=views)
