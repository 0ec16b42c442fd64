"""Recorded outputs of single parts: rotary and learned positions, sines, QK norm, FSQ, offsets (FORMAT 5, 8, 11)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tokenizer.gaussians.attributes import offset_perturbation
from tokenizer.gaussians.decoder import position_code
from tokenizer.gaussians.released import config_from_released as gaussian_config
from tokenizer.model.config import FSQConfig
from tokenizer.model.positions import token_weights
from tokenizer.model.precision import at_least_float32, full_precision
from tokenizer.model.rope import rotary_frequencies, rotary_table, rotate
from tokenizer.model.transformer import HeadNorm
from tokenizer.parity.bench import UNFIT, Bench, Values, explain
from tokenizer.parity.compare import Rule, Value
from tokenizer.parity.recording import RecordedFile
from tokenizer.quantizers.fsq import FSQ, LEVELS

_UNIT = re.compile(r"(rope|learned_pos|ape|qknorm|fsq|offset_perturbation)(\w*)\.([\w]+)$")

_Parts = Iterator[tuple[str, Value]]


def produce(file: RecordedFile, wanted: set[str], bench: Bench) -> Values:
    """Compute each unit whose inputs the file holds. A unit is named KIND, or KIND and a number."""
    units: dict[tuple[str, str], set[str]] = {}
    for name in wanted:
        if match := _UNIT.match(name):
            units.setdefault((match[1], match[2]), set()).add(match[3])
    for (kind, suffix), parts in sorted(units.items()):
        prefix = f"{kind}{suffix}"
        try:
            for part, value in _KINDS[kind](_Unit(file, prefix, parts, bench)):
                yield f"{prefix}.{part}", value
        except UNFIT as error:  # the other units can still be checked
            yield from ((f"{prefix}.{part}", explain(error)) for part in parts)


class _Unit:
    """The tensors PREFIX.PART of a file, as inputs on the bench."""

    def __init__(self, file: RecordedFile, prefix: str, parts: set[str], bench: Bench) -> None:
        self.file, self.prefix, self.parts, self.bench = file, prefix, parts, bench

    def take(self, part: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self.file.take(f"{self.prefix}.{part}").to(self.bench.device)
        return tensor if dtype is None else tensor.to(dtype)

    def recorded(self, part: str) -> Tensor:
        return self.file.tensors[f"{self.prefix}.{part}"]


def _rope(unit: _Unit) -> _Parts:
    dtype = unit.bench.dtype
    query, key = unit.take("q", dtype), unit.take("k", dtype)
    width = query.shape[-1]
    table = rotary_table(unit.take("pos"), width, full_precision(dtype))
    yield "freqs", Value(rotary_frequencies(width, full_precision(dtype)))
    yield "q_out", Value(rotate(query, table))
    yield "k_out", Value(rotate(key, table))


def _learned_positions(unit: _Unit) -> _Parts:
    """Tables resized to ROWSxCOLUMNS."""
    table = unit.take("weight", unit.bench.dtype)
    kind = full_precision(table.dtype)
    for part in unit.parts:
        if match := re.fullmatch(r"(\d+)x(\d+)", part):
            rows, columns = int(match[1]), int(match[2])
            x, y = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            positions = torch.stack([torch.zeros_like(x), x, y, torch.zeros_like(x)], dim=-1).reshape(-1, 4)
            extent = torch.tensor([rows, columns]).expand(len(positions), 2)
            weights = token_weights(positions.to(table.device), extent.to(table.device), kind)
            yield part, Value((weights @ at_least_float32(table)).to(table.dtype).reshape(rows, columns, -1))


def _sines(unit: _Unit) -> _Parts:
    recorded = unit.recorded("out")
    kind = full_precision(unit.bench.dtype)
    yield "out", Value(position_code(unit.take("pos"), recorded.shape[1], kind).to(unit.bench.dtype))


def _qk_norm(unit: _Unit) -> _Parts:
    gamma = unit.take("gamma")
    norm = HeadNorm(*gamma.shape).to(gamma.device)
    norm.load_state_dict({"scale": gamma})
    norm.to(unit.bench.dtype).requires_grad_(False)
    yield "out", Value(norm(unit.take("in", unit.bench.dtype)))


def _fsq(unit: _Unit) -> _Parts:
    """Quantised in float32 or float64 in any case."""
    latents = at_least_float32(unit.take("in", unit.bench.dtype if unit.bench.dtype == torch.float64 else None))
    quantizer = _quantizer(tuple(unit.recorded("levels").tolist()), latents.shape[1])
    quantized = quantizer.quantize(latents)
    yield "levels", Value(torch.tensor(quantizer.levels), Rule.EXACT)
    yield "basis", Value(torch.tensor(quantizer.basis), Rule.EXACT)
    yield "bounded", Value(quantizer.bound(latents))
    yield "out", Value(quantized.values, Rule.EXACT)
    yield "indices", Value(quantized.indices, Rule.EXACT)
    yield "all_codes_of_one_codebook", Value(quantizer.all_codes(), Rule.EXACT)


def _quantizer(levels: tuple[int, ...], channels: int) -> FSQ:
    size = next((size for size, known in LEVELS.items() if known == levels), -(2 ** len(levels)))
    return FSQ(FSQConfig(codebook_size=size, codebooks=channels // len(levels)), channels)


def _offsets(unit: _Unit) -> _Parts:
    """Parts are numbers of Gaussians."""
    representation: list[Mapping[str, object]] = [
        config for config in unit.bench.recording.configs.values() if "representation_config" in config
    ]
    voxel_size = gaussian_config(representation[0] if representation else {}).voxel_size
    for part in unit.parts:
        if part.isdecimal():
            yield part, Value(offset_perturbation(int(part), voxel_size))


_KINDS: dict[str, Callable[[_Unit], _Parts]] = {
    "rope": _rope,
    "learned_pos": _learned_positions,
    "ape": _sines,
    "qknorm": _qk_norm,
    "fsq": _fsq,
    "offset_perturbation": _offsets,
}
