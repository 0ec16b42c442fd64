"""Check a whole recording: every tensor in it ends as one row."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

import torch

from tokenizer.parity import multiview, pixels, splats, units, visuals, weights
from tokenizer.parity.bench import F64, Bench
from tokenizer.parity.compare import Row, compare, dtype_name
from tokenizer.parity.recording import RecordedFile, Recording

PRODUCERS = (
    weights.produce,
    visuals.produce,
    splats.produce,
    splats.produce_ply,
    pixels.produce,
    units.produce,
    multiview.produce,
)


@torch.no_grad()
def check(recording: Recording, device: torch.device, dtype: torch.dtype, only: str = "*") -> list[Row]:
    """Recompute the recording and compare.

    Args:
        device, dtype: of the networks for plain tensors; "f64/" tensors are always computed in float64, on the same
            device.
        only: a pattern for FILE or FILE:TENSOR; other tensors are left out of the report.

    Returns:
        A row for each file and each tensor, in order of the files.
    """
    plain = Bench(recording, device, dtype, PRODUCERS)
    double = plain if dtype == torch.float64 else Bench(recording, device, torch.float64, PRODUCERS)
    rows: list[Row] = []
    for name in sorted({*recording.files, *recording.problems}):
        if selected(f"{name}:", only):
            rows.append(_file_row(recording, name))
        if name in recording.files:
            rows += _tensor_rows(recording.files[name], plain, double, only)
    return rows


def selected(name: str, only: str) -> bool:
    """Whether FILE:TENSOR (or "FILE:" for the file itself) is asked for."""
    return fnmatch.fnmatchcase(name, only if ":" in only else f"{only}:*")


def _file_row(recording: Recording, name: str) -> Row:
    problem = recording.problems.get(name)
    agrees = "sha256 agrees" if "sha256" in recording.readme else "no sha256 to compare with"
    return Row(name, "", "", "bad file" if problem else "ok", detail=problem or agrees)


def _tensor_rows(file: RecordedFile, plain: Bench, double: Bench, only: str) -> Iterator[Row]:
    names = sorted({*file.tensors, *(file.listed or {})}, key=_order)
    for name in names:
        if selected(f"{file.name}:{name}", only):
            yield _tensor_row(file, name, double if name.startswith(F64) else plain)


def _tensor_row(file: RecordedFile, name: str, bench: Bench) -> Row:
    if name not in file.tensors:
        return Row(file.name, name, "", "missing", detail="README.json lists it")
    recorded = file.tensors[name]
    kind, shape = dtype_name(recorded.dtype), tuple(recorded.shape)
    if file.listed is not None and file.listed.get(name) != (kind, shape):
        return Row(file.name, name, kind, "not as listed", detail=f"README.json says {file.listed.get(name)}")
    if weights.is_ignored(file, name):
        return Row(file.name, name, kind, "ignored")
    results = bench.results(file)
    value = results.values.get(name.removeprefix(F64))
    if isinstance(value, str):
        return Row(file.name, name, kind, "unchecked", detail=value)
    if value is not None:
        return compare(
            file.name, name, value, recorded, bench.dtype, _is_rounded(bench.recording, name, recorded.dtype)
        )
    if _is_read(file, name, bench):
        return Row(file.name, name, kind, "input")
    detail = "; ".join(results.problems) or "nothing here computes a tensor of this name"
    return Row(file.name, name, kind, "unused input" if name.startswith("in.") else "unchecked", detail=detail)


def _is_read(file: RecordedFile, name: str, bench: Bench) -> bool:
    """Whether any computation of the recording takes this tensor as its input; other files may do so."""
    others = iter(bench.recording.files.values())
    while name not in file.read:
        other = next(others, None)
        if other is None:
            return False
        bench.results(other)
    return True


def _is_rounded(recording: Recording, name: str, dtype: torch.dtype) -> bool:
    if not name.startswith(F64):
        return False
    patterns = recording.rounded_names
    return dtype == torch.float32 or any(fnmatch.fnmatchcase(name.removeprefix(F64), pattern) for pattern in patterns)


def _order(name: str) -> tuple[bool, bool, str]:
    """Inputs first, then float32 results, then float64 ones."""
    return name.startswith(F64), not name.startswith("in."), name
