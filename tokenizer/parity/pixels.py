"""Recorded preprocessing (FORMAT 2, 3).

    i2s.NAME.*      a list entry packed as it is: HWC, CHW, THWC or TCHW in [-1, 1]
    pi.NAME.*       `process_image` of 0..255 values; the note gives the bounds of each NAME
    bt.*            a dense batch
    padded.*        one token for each frame

Always on the CPU, where pixels are read: copies are compared exactly, resized pictures within 1e-5.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.parity.bench import UNFIT, Bench, Values, explain
from tokenizer.parity.compare import Rule, Value
from tokenizer.parity.recording import RecordedFile
from tokenizer.patches import PATCH_SIZE, PatchSize, image_to_tokens, video_to_tokens
from tokenizer.preprocess import Layout, Preprocessing, batch_to_tokens, process_image, video_to_frame_tokens
from tokenizer.sparse import SparseTokens

_CASE = re.compile(r"(i2s|pi|bt|padded)(?:\.(\w+))?\.(feats\d*|tail_min_max|coords)$")
_BOUNDS = re.compile(r"(\w+) (\d+|\(\d+, ?\d+\))/(\d+|\(\d+, ?\d+\))")
_SQUARE = re.compile(r"square(\d+)")


def produce(file: RecordedFile, wanted: set[str], bench: Bench) -> Values:
    """Preprocess each recorded input again."""
    for name in sorted(wanted):
        match = _CASE.match(name)
        if match is None:
            continue
        try:
            patch_size = _patch_size(bench)
            tokens, rule = _VARIANTS[match[1]](file, match[2] or "", patch_size)
            yield name, _part(match[3], tokens, rule, tokens.num_channels // patch_size[0], file.tensors[name])
        except UNFIT as error:  # the other cases can still be checked
            yield name, explain(error)


def _part(what: str, tokens: SparseTokens, rule: Rule, frame: int, recorded: Tensor) -> Value:
    """The recorded part of a preprocessed input; `frame` features belong to its first frame."""
    if what == "coords":
        return Value(_columns(tokens, recorded.shape[1]), Rule.EXACT)
    if what == "tail_min_max":
        return Value(torch.stack(torch.aminmax(tokens.features[:, frame:])), rule)
    return Value(tokens.features[:, : int(what.removeprefix("feats") or tokens.num_channels)], rule)


def _packed(file: RecordedFile, case: str, patch_size: PatchSize) -> tuple[SparseTokens, Rule]:
    """Channel-first cases may record no input of their own but share that of their channel-last twin."""
    twin = case.replace("chw", "hwc")
    pixels = file.take(f"i2s.{case}.in" if f"i2s.{case}.in" in file else f"i2s.{twin}.in")
    if pixels.shape[-1] != 3:
        pixels = pixels.movedim(-3, -1)
    to_tokens = image_to_tokens if pixels.ndim == 3 else video_to_tokens
    return to_tokens(pixels, patch_size, fit="crop")[0], Rule.EXACT


def _processed(file: RecordedFile, case: str, patch_size: PatchSize) -> tuple[SparseTokens, Rule]:
    pixels = file.take(
        next((name for name in (f"pi.{case}.in", "pi.in", "pi.in_uint8") if name in file), "pi.in_uint8")
    )
    pixels = pixels if pixels.ndim == 4 else pixels[None]
    is_uint8 = case.endswith("uint8")
    bounds = {name: (_size(low), _size(high)) for name, low, high in _BOUNDS.findall(file.note)}
    if case.startswith("none"):
        options = Preprocessing(patch_size=patch_size, uint8_grey=is_uint8)
    elif case in bounds:
        options = Preprocessing(
            patch_size=patch_size, min_size=bounds[case][0], max_size=bounds[case][1], uint8_grey=is_uint8
        )
    elif square := _SQUARE.match(case):
        options = Preprocessing(patch_size=patch_size, square_length=int(square[1]), uint8_grey=is_uint8)
    else:
        raise InputError(f"the note of {file.name} does not say which options pi.{case} was made with")
    rule = Rule.EXACT if case.startswith("none") else Rule.PIXELS
    return process_image(pixels if is_uint8 else pixels.float(), options), rule


def _dense(file: RecordedFile, case: str, patch_size: PatchSize) -> tuple[SparseTokens, Rule]:
    """The layout and range that the reference guessed (FORMAT 3): what an explicit call has to say."""
    batch = file.take(f"bt.{case}.in" if case else "bt.in")
    channels_first = batch.shape[-1] != 3
    layouts: tuple[Layout, Layout] = ("BCHW", "BHWC") if batch.ndim == 4 else ("BCTHW", "BTHWC")
    value_range = (-1.0, 1.0) if bool((batch < 0).any()) else (0.0, 255.0)
    options = Preprocessing(patch_size=patch_size, min_size=(64, 64), max_size=(512, 512))
    return batch_to_tokens(batch, layouts[0 if channels_first else 1], value_range, options), Rule.PIXELS


def _padded(file: RecordedFile, case: str, patch_size: PatchSize) -> tuple[SparseTokens, Rule]:
    return video_to_frame_tokens(file.take(f"padded.{case}.in" if case else "padded.in"), patch_size), Rule.EXACT


_VARIANTS = {"i2s": _packed, "pi": _processed, "bt": _dense, "padded": _padded}


def _patch_size(bench: Bench) -> PatchSize:
    for config in bench.recording.configs.values():
        if "patch_size" in config:
            frames, rows, columns = config["patch_size"]
            return int(frames), int(rows), int(columns)
    return PATCH_SIZE


def _size(text: str) -> tuple[int, int]:
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return numbers[0], numbers[-1]


def _columns(tokens: SparseTokens, count: int) -> Tensor:
    """Positions (t, x, y, z), with the batch item in front where the recording has five columns."""
    if count == 4:
        return tokens.positions
    item = torch.repeat_interleave(torch.arange(tokens.batch_size, dtype=torch.int32), tokens.lengths)
    return torch.cat([item[:, None], tokens.positions], dim=1)
