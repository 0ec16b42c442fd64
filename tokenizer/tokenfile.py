"""`.atok`: encoded visuals on disk, decodable with nothing else but the model that made them.

A safetensors file with
    features  [N, C] floating latents, or  indices  [N, codebooks] integers
    positions [N, 4] int16 (t, x, y, z)
    lengths   [B] int64, tokens of each item
and one metadata entry "atoken", JSON: format version, model name and fingerprint of its latent space, and for each item
its kind, frames, height, width and frame rate.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError
from tokenizer.patches import VisualSize
from tokenizer.sparse import SparseTokens

SUFFIX = ".atok"
VERSION = 1
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where tokens come from: the model's name, the fingerprint of its latent space, and each item's size.

    frame_rates: frames a second of each item; 0 for stills.
    """

    model: str
    fingerprint: str
    sizes: tuple[VisualSize, ...]
    frame_rates: tuple[float, ...]

    def to_json(self) -> str:
        items = [
            {"kind": s.kind, "frames": s.frames, "height": s.height, "width": s.width, "frame_rate": rate}
            for s, rate in zip(self.sizes, self.frame_rates, strict=True)
        ]
        return json.dumps({"version": VERSION, "model": self.model, "fingerprint": self.fingerprint, "items": items})

    @classmethod
    def from_json(cls, text: str, where: str) -> Origin:
        try:
            values = json.loads(text)
            if values["version"] != VERSION:
                raise InputError(f"{where}: .atok version {values['version']}, this program reads version {VERSION}")
            return cls(
                model=str(values["model"]),
                fingerprint=str(values["fingerprint"]),
                sizes=tuple(VisualSize(i["kind"], i["frames"], i["height"], i["width"]) for i in values["items"]),
                frame_rates=tuple(float(i["frame_rate"]) for i in values["items"]),
            )
        except (KeyError, TypeError, json.JSONDecodeError):
            raise InputError(f"{where}: its metadata is damaged; encode the visual again") from None


@dataclass(frozen=True, slots=True)
class TokenFile:
    """Tokens with their origin. tokens.features are latents (floating) or codebook indices (integer)."""

    tokens: SparseTokens
    origin: Origin

    @property
    def discrete(self) -> bool:
        return not self.tokens.features.is_floating_point()

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all."""
        with TokenWriter(path) as writer:
            writer.append(self.tokens)
            writer.finish(self.origin, self.tokens.lengths)

    @classmethod
    def load(cls, path: str | Path) -> TokenFile:
        """Read a whole file.

        Raises:
            InputError: missing, truncated or foreign file, or contents that contradict each other.
        """
        reader = TokenReader(path)
        tokens = reader.rows(0, reader.num_tokens)
        return cls(SparseTokens(tokens[0], tokens[1], reader.lengths), reader.origin)

    def check_made_by(self, name: str, fingerprint: str) -> None:
        """Raise `InputError` unless the model with this fingerprint can decode the tokens."""
        check_same_space(self.origin, name, fingerprint)


def check_same_space(origin: Origin, name: str, fingerprint: str) -> None:
    """Raise `InputError` unless tokens of `origin` belong to the latent space `fingerprint` of model `name`."""
    if origin.fingerprint != fingerprint:
        raise InputError(
            f"these tokens were made by '{origin.model}' ({origin.fingerprint}), whose latent space differs from "
            f"that of '{name}' ({fingerprint}); decode them with the model that made them"
        )


class TokenWriter:
    """Writes a `.atok` chunk by chunk, so that a long video never lies in memory.

    Features and positions wait in two files beside the target; `finish` joins them. Leaving the context without
    `finish`, or with an error, leaves nothing behind.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix != SUFFIX:
            raise InputError(f"{self.path}: token files end in {SUFFIX}")
        self.num_tokens = 0
        self._dtype: torch.dtype | None = None
        self._channels = 0
        self._parts: list[IO[bytes]] = []

    def __enter__(self) -> TokenWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part_paths = [self.path.with_name(f".{self.path.name}.{os.getpid()}.{i}.part") for i in range(2)]
        self._parts = [part.open("w+b") for part in self._part_paths]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part, path in zip(self._parts, self._part_paths, strict=True):
            try:
                part.close()  # may fail to flush on a full disk; the part goes all the same
            except OSError:
                if kind is None:
                    raise
            finally:
                path.unlink(missing_ok=True)

    def append(self, tokens: SparseTokens) -> None:
        """Add the rows of `tokens`; their lengths do not matter until `finish`."""
        features = _compact(tokens.features)
        if self._dtype is None:
            self._dtype, self._channels = features.dtype, features.shape[1]
        elif (features.dtype, features.shape[1]) != (self._dtype, self._channels):
            raise InputError(f"{self.path}: chunks differ in type or channels")
        self._parts[0].write(_raw(features))
        self._parts[1].write(_raw(tokens.host_positions.to(torch.int16)))
        self.num_tokens += tokens.num_tokens

    def finish(self, origin: Origin, lengths: Tensor | Sequence[int]) -> None:
        """Write the file. `lengths` are the tokens of each item, summing to the rows appended."""
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        if int(lengths.sum()) != self.num_tokens or len(lengths) != len(origin.sizes) or self._dtype is None:
            raise InputError(f"{self.path}: lengths {lengths.tolist()} do not fit {self.num_tokens} tokens")
        tensors: list[tuple[str, str, list[int], int]] = []
        name = "features" if self._dtype.is_floating_point else "indices"
        shape = [self.num_tokens, self._channels]
        tensors.append(
            (name, _DTYPE_NAMES[self._dtype], shape, self.num_tokens * self._channels * self._dtype.itemsize)
        )
        tensors.append(("positions", "I16", [self.num_tokens, 4], self.num_tokens * 8))
        tensors.append(("lengths", "I64", [len(lengths)], len(lengths) * 8))
        header: dict[str, Any] = {"__metadata__": {"atoken": origin.to_json()}}
        offset = 0
        for tensor, dtype, size, count in tensors:
            header[tensor] = {"dtype": dtype, "shape": size, "data_offsets": [offset, offset + count]}
            offset += count
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with atomic_path(self.path) as temporary, temporary.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for part in self._parts:
                part.seek(0)
                while block := part.read(1 << 22):
                    out.write(block)
            out.write(_raw(lengths))


class TokenReader:
    """Reads a `.atok` row by row from a memory map.

    Raises:
        InputError: missing, truncated or foreign file, or contents that contradict each other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file")
        try:
            self._file = safe_open(str(self.path), framework="pt")  # type: ignore[no-untyped-call]
            metadata = self._file.metadata() or {}
            names = set(self._file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: not a token file, or truncated ({reason})") from None
        if "atoken" not in metadata or not {"positions", "lengths"} <= names or not names & {"features", "indices"}:
            raise InputError(f"{self.path}: a safetensors file, but not one of tokens; make one with 'atoken encode'")
        self.origin = Origin.from_json(metadata["atoken"], str(self.path))
        self.discrete = "indices" in names
        self.lengths: Tensor = self._file.get_tensor("lengths")
        self._values = self._file.get_slice("indices" if self.discrete else "features")
        self._positions = self._file.get_slice("positions")
        shape, places = self._values.get_shape(), self._positions.get_shape()
        fits = len(shape) == 2 and places == [shape[0], 4] and int(self.lengths.sum()) == shape[0]
        if not fits or len(self.lengths) != len(self.origin.sizes) or bool((self.lengths < 0).any()):
            raise InputError(f"{self.path}: its tensors contradict each other; encode the visual again")
        self.num_tokens = int(shape[0])

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Features or indices (as int32) and positions (int32) of rows start..stop."""
        values: Tensor = self._values[start:stop]
        return values.int() if self.discrete else values, self._positions[start:stop].int()

    def items(self) -> Iterator[TokenFile]:
        """One `TokenFile` for each item."""
        start = 0
        for i, length in enumerate(self.lengths.tolist()):
            origin = Origin(
                self.origin.model, self.origin.fingerprint, (self.origin.sizes[i],), (self.origin.frame_rates[i],)
            )
            yield TokenFile(SparseTokens(*self.rows(start, start + length), [length]), origin)
            start += length

    def chunks(self, rows: int) -> Iterator[SparseTokens]:
        """Successive blocks of at most `rows` rows, each as one item; for files of a single item."""
        for start in range(0, self.num_tokens, rows):
            values, positions = self.rows(start, min(start + rows, self.num_tokens))
            yield SparseTokens(values, positions, [len(values)])


def _compact(features: Tensor) -> Tensor:
    """Indices in the narrowest type of 16 or 32 bits; latents unchanged."""
    features = features.detach().cpu()
    if features.is_floating_point():
        return features
    return features.to(torch.int16 if not features.numel() or int(features.max()) < 2**15 else torch.int32)


def _raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
