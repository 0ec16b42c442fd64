"""`.atok`: encoded visuals on disk, decodable with nothing else but the model that made them.

A safetensors file with
    features  [N, C] floating latents, or  indices  [N, codebooks] integers
    positions [N, 4] int16 (t, x, y, z); int32 where a video is longer than 16 bits can count
    lengths   [B] int64, tokens of each item
and one metadata entry "atoken", JSON: format version, model name and fingerprint of its latent space, and for each item
its kind, frames, height, width and frame rate.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenizer.atomic import atomic_path, temporary_beside
from tokenizer.errors import InputError
from tokenizer.patches import VisualSize
from tokenizer.sparse import MAX_POSITION, SparseTokens
from tokenizer.voxels import AssetSize

SUFFIX = ".atok"
VERSION = 1
_DTYPE_NAMES = {
    torch.float64: "F64",
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

    Raises:
        InputError: not one frame rate for each size, or one that is negative or not finite.
    """

    model: str
    fingerprint: str
    sizes: tuple[VisualSize | AssetSize, ...]
    frame_rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.frame_rates) != len(self.sizes):
            raise InputError(f"{len(self.frame_rates)} frame rates for {len(self.sizes)} visuals; give one for each")
        if not all(math.isfinite(rate) and rate >= 0 for rate in self.frame_rates):
            raise InputError(f"frame rates must be finite and not negative, got {list(self.frame_rates)}")

    def to_json(self) -> str:
        # Rates may be what FFmpeg and numpy say: fractions and numbers of other types, which JSON has not.
        rates = [float(rate) for rate in self.frame_rates]
        items = [_size_to_json(size) | {"frame_rate": r} for size, r in zip(self.sizes, rates, strict=True)]
        return json.dumps({"version": VERSION, "model": self.model, "fingerprint": self.fingerprint, "items": items})

    @classmethod
    def from_json(cls, text: str, where: str) -> Origin:
        try:
            values = json.loads(text)
            version = values["version"]
            if type(version) is int and version == VERSION:  # true and 1.0 are equal to 1
                return cls._parse(values)
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
            raise InputError(f"{where}: its metadata is damaged; encode the visual again") from None
        raise InputError(f"{where}: .atok version {version!r}, this program reads version {VERSION}")

    @classmethod
    def _parse(cls, values: dict[str, Any]) -> Origin:
        items = [cls._parse_item(item) for item in values["items"]]
        return cls(
            model=" ".join(values["model"].split()),
            fingerprint=" ".join(values["fingerprint"].split()),
            sizes=tuple(size for size, _ in items),
            frame_rates=tuple(rate for _, rate in items),
        )

    @staticmethod
    def _parse_item(item: dict[str, Any]) -> tuple[VisualSize | AssetSize, float]:
        return _size_from_json(item), float(item["frame_rate"])


def _size_to_json(size: VisualSize | AssetSize) -> dict[str, Any]:
    if isinstance(size, AssetSize):
        return {"kind": size.kind, "resolution": size.resolution, "to_original": size.to_original}
    measures = {"frames": size.frames, "height": size.height, "width": size.width}
    return {"kind": size.kind} | {name: index(measure) for name, measure in measures.items()}


def _size_from_json(item: dict[str, Any]) -> VisualSize | AssetSize:
    if item["kind"] == "asset":
        matrix = tuple(tuple(float(value) for value in row) for row in item["to_original"])
        return AssetSize(_whole(item["resolution"]), matrix)
    return VisualSize(item["kind"], *(_whole(item[name]) for name in ("frames", "height", "width")))


def _whole(measure: object) -> int:
    if type(measure) is not int:
        raise TypeError(f"measures must be whole numbers, got {measure!r}")
    return measure


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
            InputError: missing, truncated or foreign file, contents that contradict each other, or a video of more
                steps than a batch can count, which `TokenReader.chunks` reads.
        """
        reader = TokenReader(path)
        return cls(reader.tokens(0, reader.lengths.tolist()), reader.origin)

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
        self._largest = self._largest_position = 0
        self._parts: list[IO[bytes]] = []

    def __enter__(self) -> TokenWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part_paths = [temporary_beside(self.path) for _ in range(2)]
        try:
            for path in self._part_paths:
                self._parts.append(path.open("w+b"))
            return self
        except BaseException as error:  # an interrupt too: nobody calls __exit__ yet
            for part in self._parts:
                part.close()
            for path in self._part_paths:
                path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise

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
        """Add the rows of `tokens`; their lengths do not matter until `finish`.

        Raises:
            InputError: values that are not finite, or the indices of such, chunks that differ in type or channels, or
                positions below 0.
        """
        features, positions = tokens.features.detach().cpu(), tokens.host_positions
        whole = not features.is_floating_point()
        if not bool((features >= 0).all() if whole else features.isfinite().all()):
            raise InputError(
                f"{self.path}: the model gave NaN or infinite values; its weights are damaged or diverged, or too "
                "large for half precision (fp32 would show)"
            )
        if whole:
            features = features.to(torch.int32)
            self._largest = max([self._largest, *features.amax(dim=0).tolist()] if len(features) else [self._largest])
        if self._dtype is None:
            self._dtype, self._channels = features.dtype, features.shape[1]
        if (features.dtype, features.shape[1]) != (self._dtype, self._channels) or self._dtype not in _DTYPE_NAMES:
            raise InputError(f"{self.path}: chunks differ in type or channels, or are {features.dtype}")
        if len(positions):
            if int(positions.min()) < 0:
                raise InputError(f"{self.path}: positions must not be negative to fit a token file")
            self._largest_position = max(self._largest_position, int(positions.max()))
        self._parts[0].write(_raw(features))
        self._parts[1].write(_raw(positions))
        self.num_tokens += tokens.num_tokens

    def finish(self, origin: Origin, lengths: Tensor | Sequence[int]) -> None:
        """Write the file. `lengths` are the tokens of each item, summing to the rows appended."""
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
        if self._dtype is None or int(lengths.sum()) != self.num_tokens or len(lengths) != len(origin.sizes):
            raise InputError(f"{self.path}: lengths {lengths.tolist()} do not fit {self.num_tokens} tokens")
        # Only now is it known whether all indices and positions fit 16 bits.
        narrow = not self._dtype.is_floating_point and self._largest < 2**15
        kept = torch.int16 if narrow else self._dtype
        kept_positions = torch.int16 if self._largest_position < 2**15 else torch.int32
        shape = [self.num_tokens, self._channels]
        tensors = [
            ("features" if kept.is_floating_point else "indices", kept, shape),
            ("positions", kept_positions, [self.num_tokens, 4]),
            ("lengths", torch.int64, [len(lengths)]),
        ]
        with atomic_path(self.path) as temporary, temporary.open("wb") as out:
            out.write(_header(origin, tensors))
            kinds = ((self._dtype, kept), (torch.int32, kept_positions))
            for part, (stored, written) in zip(self._parts, kinds, strict=True):
                part.seek(0)
                while block := part.read(1 << 22):
                    same = stored == written
                    out.write(block if same else _raw(torch.frombuffer(bytearray(block), dtype=stored).to(written)))
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
        opener: Any = safe_open  # safetensors ships no types for what it returns
        try:
            with _readable(self.path) as path:
                self._file = opener(str(path), framework="pt")
            metadata = self._file.metadata() or {}
            names = set(self._file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: not a token file, or truncated ({reason})") from None
        if "atoken" not in metadata or not {"positions", "lengths"} <= names or not names & {"features", "indices"}:
            raise InputError(f"{self.path}: a safetensors file, but not one of tokens; make one with 'atoken encode'")
        self.origin = Origin.from_json(metadata["atoken"], str(self.path))
        self.discrete = "indices" in names
        self._values = self._file.get_slice("indices" if self.discrete else "features")
        self._positions = self._file.get_slice("positions")
        self._check_shapes()
        self.lengths: Tensor = self._file.get_tensor("lengths")
        self.num_tokens = int(self._values.get_shape()[0])
        counts = self.lengths.tolist()
        if len(counts) != len(self.origin.sizes) or sum(counts) != self.num_tokens or min(counts, default=0) < 1:
            raise InputError(f"{self.path}: its tensors contradict each other; encode the visual again")

    def _check_shapes(self) -> None:
        lengths = self._file.get_slice("lengths")
        shape = self._values.get_shape()
        fits = len(shape) == 2 and self._positions.get_shape() == [shape[0], 4] and len(lengths.get_shape()) == 1
        kinds = (self._values.get_dtype(), self._positions.get_dtype(), lengths.get_dtype())
        legal = ({"I16", "I32"} if self.discrete else {"F64", "F32", "F16", "BF16"}, {"I16", "I32"}, {"I64"})
        if not fits or not all(kind in allowed for kind, allowed in zip(kinds, legal, strict=True)):
            raise InputError(f"{self.path}: its tensors have odd types or shapes; encode the visual again")

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Features or indices (as int32) and positions (int32) of rows start..stop."""
        with torch.device("cpu"):  # safetensors puts slices, unlike whole tensors, on the default device
            values: Tensor = self._values[start:stop]
            return values.int() if self.discrete else values, self._positions[start:stop].int()

    def tokens(self, start: int, lengths: list[int]) -> SparseTokens:
        """Whole items from row `start` on, checked.

        Raises:
            InputError: a position out of range or twice in an item, a latent that is not finite, or a video of more
                steps than a batch can count.
        """
        tokens = SparseTokens(*self.rows(start, start + sum(lengths)), lengths)
        try:
            return tokens.validate()
        except InputError as error:
            self._refuse_long_video(tokens)
            raise InputError(f"{self.path}: {error}; encode the visual again") from None

    def _refuse_long_video(self, tokens: SparseTokens) -> None:
        """Raise `InputError` with the way to read it if `tokens` go on for as long as a size says, and too long."""
        last = int(tokens.positions[:, 0].max())
        if MAX_POSITION < last < max((s.frames for s in self.origin.sizes if isinstance(s, VisualSize)), default=0):
            raise InputError(
                f"{self.path}: its video has {last + 1} latent steps, and a batch holds at most {MAX_POSITION + 1}; "
                "decode it with 'atoken decode', or with decode_stream from TokenReader.chunks"
            )

    def items(self) -> Iterator[TokenFile]:
        """One `TokenFile` for each item."""
        start = 0
        for i, length in enumerate(self.lengths.tolist()):
            origin = Origin(
                self.origin.model, self.origin.fingerprint, (self.origin.sizes[i],), (self.origin.frame_rates[i],)
            )
            yield TokenFile(self.tokens(start, [length]), origin)
            start += length

    def chunks(self, rows: int) -> Iterator[SparseTokens]:
        """Successive blocks of at most `rows` rows, each as one item; for files of a single item, however long.

        Their values are not checked; `tokenizer.streaming.decode_stream` does it tile by tile.
        """
        for start in range(0, self.num_tokens, rows):
            values, positions = self.rows(start, min(start + rows, self.num_tokens))
            yield SparseTokens(values, positions, [len(values)])


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """A path by which safetensors opens a file: it takes names in UTF-8 alone, and old archives hold others."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / "tokens"
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def _header(origin: Origin, tensors: Sequence[tuple[str, torch.dtype, list[int]]]) -> bytes:
    """What a safetensors file starts with: names, types, shapes and places of the tensors that follow."""
    header: dict[str, Any] = {"__metadata__": {"atoken": origin.to_json()}}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
