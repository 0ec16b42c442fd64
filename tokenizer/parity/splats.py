"""Recorded outputs of the Gaussian decoder: windows, raw parameters, attributes and .ply columns (FORMAT 11)."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.gaussians import Gaussians
from tokenizer.gaussians.attributes import RawParameters, raw_parameters, raw_to_gaussians
from tokenizer.gaussians.ply import ply_columns
from tokenizer.gaussians.windows import window_plan
from tokenizer.parity.bench import Bench, Values
from tokenizer.parity.compare import Rule, Value
from tokenizer.parity.recording import RecordedFile
from tokenizer.parity.visuals import from_coordinates
from tokenizer.sparse import SparseTokens

_ATTRIBUTE = re.compile(r"gs(\d+)\.(\w+)$")
_COLOUR = re.compile(r"sh(\d+)_rgb$")
_WINDOW = re.compile(r"window_(id|len|batch)_shift(\d+)$")

_RAW: dict[str, Callable[[RawParameters], Tensor]] = {
    "_xyz": lambda raw: raw.positions,
    "_features_dc": lambda raw: raw.dc[:, None],
    "_scaling": lambda raw: raw.scales,
    "_rotation": lambda raw: raw.rotations,
    "_opacity": lambda raw: raw.opacities,
}
_ACTIVATED: dict[str, Callable[[Gaussians], Tensor]] = {
    "get_xyz": lambda gaussians: gaussians.means,
    "get_features": lambda gaussians: gaussians.dc[:, None],
    "get_scaling": lambda gaussians: gaussians.scales,
    "get_rotation": lambda gaussians: gaussians.rotations,
    "get_opacity": lambda gaussians: gaussians.opacities,
    "get_covariance": lambda gaussians: gaussians.covariances,
}
"""The reference's name of an attribute -> ours, before and after activation."""


def produce(file: RecordedFile, wanted: set[str], bench: Bench) -> Values:
    """Decode the voxels a file is about into Gaussians, if it is about that."""
    if not any(name == "gs_raw" or _ATTRIBUTE.match(name) or _WINDOW.match(name) for name in wanted):
        return
    decoder = bench.gaussian_decoder(bench.recording.model_of(file))
    voxels = _voxels(file, bench)
    for name in wanted:
        if match := _WINDOW.match(name):
            windows = window_plan(voxels, decoder.config.window, int(match[2]))
            yield (
                name,
                Value({"id": windows.number, "len": windows.lengths, "batch": windows.items}[match[1]], Rule.EXACT),
            )
    seen: dict[int, Tensor] = {}
    raw = decoder(voxels, observe=seen.__setitem__)
    yield "gs_raw", Value(raw.features)
    for number, hidden in seen.items():
        yield f"gs_h{number}", Value(hidden)
    judged = _judged_raw(file, raw, bench)
    perturbation, config = decoder.offset_perturbation, decoder.config
    gaussians = raw_to_gaussians(judged, perturbation, config)
    for name in wanted:
        if match := _ATTRIBUTE.match(name):
            item = int(match[1])
            if match[2] in _RAW:
                parameters = raw_parameters(judged[item], perturbation, config)
                yield name, _first_rows(_RAW[match[2]](parameters), file, name)
            elif match[2] in _ACTIVATED:
                yield name, _first_rows(_ACTIVATED[match[2]](gaussians[item]), file, name)
        elif match := _COLOUR.match(name):
            yield name, _first_rows(gaussians[int(match[1])].colours[:, None], file, name)


def produce_ply(file: RecordedFile, wanted: set[str], bench: Bench) -> Values:
    """The first rows of each column of a .ply file."""
    if not {"x", "y", "z", "opacity"} <= wanted:
        return
    source = _source_of_ply(file, bench)
    decoder = bench.gaussian_decoder(bench.recording.model_of(source))
    raw = _voxels(source, bench).with_features(bench.value(source, "gs_raw"))
    judged = _judged_raw(source, raw, bench)
    gaussians = raw_to_gaussians(judged, decoder.offset_perturbation, decoder.config)[0]
    for name, column in ply_columns(gaussians).items():
        if name in wanted:
            yield name, _first_rows(column, file, name)


def _voxels(file: RecordedFile, bench: Bench) -> SparseTokens:
    """The file's own voxels, or coordinates of its own with features that its note refers to."""
    if "in.feats" in file:
        features = file.take("in.feats")
    else:
        references = bench.recording.references(file)
        if len(references) != 1:
            raise InputError(f"{file.name} has no in.feats, and its note does not name one tensor to use instead")
        features = bench.value(*references[0])
    return from_coordinates(features.cpu(), file.take("in.coords")).to(bench.device)


def _judged_raw(file: RecordedFile, raw: SparseTokens, bench: Bench) -> SparseTokens:
    """What attributes are computed from: the recorded raw output where there is one in this precision.

    Scales are exponentials: rounding noise of the network, which is judged by itself, would be judged a second time,
    magnified.
    """
    if bench.dtype != torch.float64 and "gs_raw" in file:
        return raw.with_features(file.take("gs_raw").to(raw.device))
    return raw


def _source_of_ply(file: RecordedFile, bench: Bench) -> RecordedFile:
    referred = [source for source, _ in bench.recording.references(file)]
    with_attributes = [other for other in bench.recording.files.values() if any(map(_ATTRIBUTE.match, other.tensors))]
    for source in (*referred, *with_attributes):
        return source
    raise InputError(f"{file.name} holds .ply columns, but no file holds the Gaussians they are of")


def _first_rows(tensor: Tensor, file: RecordedFile, name: str) -> Value:
    """A recording may hold the first rows only."""
    recorded = file.tensors.get(name, file.tensors.get(f"f64/{name}"))
    assert recorded is not None
    return Value(tensor[: len(recorded)])
