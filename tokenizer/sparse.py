"""`SparseTokens`: the one data type. A visual is a sparse set of tokens in a 4D grid (t, x, y, z).

Shape legend used in the whole tokenizer room: N tokens of a batch, B items, C channels, D width, H heads, Dh head
width.

An image is the plane t = z = 0, a video adds t, a 3D asset occupies the voxels of a surface. For pictures x is the
patch row and y the patch column. Items lie one after the other; no padding token exists anywhere.

What depends on positions alone (attention segments, rotary tables, resized position tables) is computed once and kept
in a cache that every `with_features` copy shares, so encoder, decoder and all their layers see the same tables. Those
plans are made from a copy of the positions on the host: tokens that start on the CPU and travel with `.to(device)`
never cause a device synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenizer.errors import InputError

MAX_POSITION = 4095
"""Largest legal coordinate: the released format packs each axis into 12 bits (FORMAT 1)."""

_INTEGER_TYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_Value = TypeVar("_Value")


class SparseTokens:
    """A batch of sparse token sets.

    Args:
        features: [N, C], floating point; integer for codebook indices.
        positions: [N, 4], integer, columns (t, x, y, z), each in 0..4095. Kept as int32. Order inside an item is free.
        lengths: the number of tokens of each item, [B]; their sum is N. Kept as int64 on the CPU, because the host
            needs them to cut the batch and must not wait for a device to get them.

    Raises:
        InputError: shapes, dtypes or lengths that do not fit together. Values are checked by `validate`.
    """

    __slots__ = ("_cache", "_host_positions", "features", "lengths", "positions")

    def __init__(self, features: Tensor, positions: Tensor, lengths: Tensor | Sequence[int]) -> None:
        self.features = features
        self.positions = positions if positions.dtype == torch.int32 else _as_int32(positions)
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
        self._host_positions: Tensor | None = None
        self._cache: dict[Hashable, Any] = {}
        self._check_structure()

    def _check_structure(self) -> None:
        if self.features.ndim != 2:
            raise InputError(f"features must be [N, C], got shape {tuple(self.features.shape)}")
        if self.positions.ndim != 2 or self.positions.shape[1] != 4:
            raise InputError(f"positions must be [N, 4] with columns t, x, y, z, got {tuple(self.positions.shape)}")
        if self.features.shape[0] != self.positions.shape[0]:
            raise InputError(
                f"features have {self.features.shape[0]} rows but positions have {self.positions.shape[0]}; "
                "give one position for each token"
            )
        if self.features.device != self.positions.device:
            raise InputError(f"features are on {self.features.device} but positions on {self.positions.device}")
        if self.lengths.ndim != 1 or bool((self.lengths < 0).any()):
            raise InputError(f"lengths must be one non-negative count for each item, got {self.lengths.tolist()}")
        if int(self.lengths.sum()) != self.features.shape[0]:
            raise InputError(
                f"lengths sum to {int(self.lengths.sum())} but there are {self.features.shape[0]} tokens; "
                "lengths must count the tokens of each item"
            )

    # ------------------------------------------------------------------ what it is

    @property
    def batch_size(self) -> int:
        return int(self.lengths.shape[0])

    @property
    def num_tokens(self) -> int:
        return int(self.features.shape[0])

    @property
    def num_channels(self) -> int:
        return int(self.features.shape[1])

    @property
    def device(self) -> torch.device:
        return self.features.device

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def host_positions(self) -> Tensor:
        """Positions on the CPU, [N, 4] int32. Copied (one synchronisation) only if they were born on a device."""
        if self._host_positions is None:
            self._host_positions = self.positions.detach().cpu()
        return self._host_positions

    @property
    def offsets(self) -> Tensor:
        """First row of each item and N at the end, [B + 1] int64 on the CPU."""
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    def __len__(self) -> int:
        return self.batch_size

    def __repr__(self) -> str:
        return (
            f"SparseTokens(items={self.batch_size}, tokens={self.num_tokens}, channels={self.num_channels}, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, device={self.device})"
        )

    # ------------------------------------------------------------------ same positions, other features

    def with_features(self, features: Tensor) -> SparseTokens:
        """The same positions with other features [N, C']; shares every table computed for the positions."""
        if features.ndim != 2 or features.shape[0] != self.num_tokens:
            raise InputError(
                f"features must be [{self.num_tokens}, C] to fit the positions, got {tuple(features.shape)}"
            )
        return self._sibling(features, self.positions)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = True,
    ) -> SparseTokens:
        """Move features and positions to `device`, and floating features to `dtype`. Tables go on being shared.

        Args:
            non_blocking: do not wait for copies to a device. Copies to the CPU always wait: the host would read them
                before they are there.
        """
        kind = dtype if dtype is not None and self.features.is_floating_point() else None
        non_blocking = non_blocking and device is not None and torch.device(device).type != "cpu"
        features = self.features.to(device=device, dtype=kind, non_blocking=non_blocking)
        positions = self.positions.to(device=device, non_blocking=non_blocking)
        if features is self.features and positions is self.positions:
            return self
        if positions.device != self.positions.device and self.positions.device.type == "cpu":
            self._host_positions = self.positions
        return self._sibling(features, positions)

    def _sibling(self, features: Tensor, positions: Tensor) -> SparseTokens:
        other = object.__new__(SparseTokens)
        other.features, other.positions, other.lengths = features, positions, self.lengths
        other._host_positions, other._cache = self._host_positions, self._cache
        return other

    def shared(self, key: Hashable, build: Callable[[], _Value]) -> _Value:
        """The cached value for `key`, built on first use. For things that depend on positions and lengths alone."""
        if key not in self._cache:
            self._cache[key] = built_for_all(build)
        value: _Value = self._cache[key]
        return value

    # ------------------------------------------------------------------ batching

    @classmethod
    def cat(cls, batches: Sequence[SparseTokens]) -> SparseTokens:
        """One batch holding the items of `batches`, in order.

        Raises:
            InputError: nothing to join, or different channel counts, dtypes or devices.
        """
        if not batches:
            raise InputError("cannot join an empty list of SparseTokens; give at least one")
        for i, tokens in enumerate(batches):
            first = (batches[0].num_channels, batches[0].dtype, batches[0].device)
            if (tokens.num_channels, tokens.dtype, tokens.device) != first:
                raise InputError(f"cannot join SparseTokens: number {i} is {tokens!r}, the first is {batches[0]!r}")
        joined = cls(
            torch.cat([tokens.features for tokens in batches]),
            torch.cat([tokens.positions for tokens in batches]),
            torch.cat([tokens.lengths for tokens in batches]),
        )
        if joined.device.type != "cpu" and all(tokens._host_positions is not None for tokens in batches):
            joined._host_positions = torch.cat([tokens.host_positions for tokens in batches])
        return joined

    def split(self) -> list[SparseTokens]:
        """The items as batches of one."""
        return list(self)

    def __iter__(self) -> Iterator[SparseTokens]:
        return (self[i] for i in range(self.batch_size))

    def __getitem__(self, index: int | slice) -> SparseTokens:
        """Item `index` as a batch of one, or a contiguous slice of items as a batch. Features are views."""
        if isinstance(index, slice):
            start, stop, step = index.indices(self.batch_size)
            if step != 1:
                raise InputError(f"items can be sliced with step 1 only, got step {step}")
            stop = max(start, stop)
        else:
            if not -self.batch_size <= index < self.batch_size:
                raise IndexError(f"item {index} of a batch of {self.batch_size}")
            start = index % self.batch_size
            stop = start + 1
        offsets = self.offsets
        rows = slice(int(offsets[start]), int(offsets[stop]))
        part = SparseTokens(self.features[rows], self.positions[rows], self.lengths[start:stop])
        if self._host_positions is not None:
            part._host_positions = self._host_positions[rows]
        return part

    # ------------------------------------------------------------------ checking

    def validate(self) -> SparseTokens:
        """Check every value and return self.

        Features must be finite, coordinates in 0..4095, and no position may occur twice in one item. Waits for the
        device; `AToken.encode` and `decode` call it for tokens on the CPU, where it costs next to nothing.

        Raises:
            InputError: naming the item and the row of the first bad token.
        """
        if self.num_tokens == 0:
            return self
        self.validate_positions()
        if self.features.is_floating_point():
            # The sum is finite for finite features of sane size; only an odd sum pays for the row by row search.
            finite = torch.isfinite(self.features.sum(dtype=torch.float64 if self.device.type == "cpu" else None))
            if not bool(finite):
                bad = (~torch.isfinite(self.features)).any(dim=1)
                if bool(bad.any()):
                    self._refuse(int(bad.int().argmax()), "has a feature that is NaN or infinite")
        return self

    def validate_positions(self) -> None:
        """The part of `validate` that concerns positions; done once for each set of positions."""
        self.shared("positions are valid", self._check_positions)

    def _check_positions(self) -> bool:
        positions = self.host_positions.long()
        bad = ((positions < 0) | (positions > MAX_POSITION)).any(dim=1)
        if bool(bad.any()):
            self._refuse(int(bad.int().argmax()), f"has a coordinate outside 0..{MAX_POSITION}")
        item = torch.repeat_interleave(torch.arange(self.batch_size, device="cpu"), self.lengths)
        t, x, y, z = positions.unbind(1)
        key = (((item << 12 | t) << 12 | x) << 12 | y) << 12 | z
        ordered, rows = torch.sort(key, stable=True)
        twice = ordered[1:] == ordered[:-1]
        if bool(twice.any()):
            # The stable sort keeps row order inside a tie, so the second of a pair is the later row.
            self._refuse(int(rows[1:][twice].min()), "has the same position as an earlier token of its item")
        return True

    def _refuse(self, row: int, what: str) -> None:
        item = int(torch.searchsorted(self.offsets[1:], torch.tensor(row, device="cpu"), right=True))
        t, x, y, z = self.host_positions[row].tolist()
        raise InputError(f"row {row} (item {item}, position t={t} x={x} y={y} z={z}) {what}")


def built_for_all(build: Callable[[], _Value]) -> _Value:
    """What `build` gives, as tensors that training can use too: those of inference mode could never be."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return build()
    return build()


def _as_int32(positions: Tensor) -> Tensor:
    if positions.dtype not in _INTEGER_TYPES:
        raise InputError(f"positions must be integers, got {str(positions.dtype).removeprefix('torch.')}")
    if positions.dtype == torch.int64 and positions.numel() and positions.device.type == "cpu":
        # Narrowing would wrap a large coordinate into a legal one; clamp it to something that validate refuses.
        positions = positions.clamp(-(2**31), 2**31 - 1)
    return positions.to(torch.int32)
