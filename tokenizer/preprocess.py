"""The released preprocessing variants, every choice an explicit option (FORMAT 2, 3).

`tokenizer.patches` is the way in for everyday use: values in [-1, 1], nothing lost. This module reproduces what the
released code does with 0..255 pixels on their way to training and dense-batch encoding, where a picture is resized
between bounds and cropped to whole patches:

    process_image           one picture or clip of 0..255 values
    batch_to_tokens         a dense batch, with the released fixed options
    video_to_frame_tokens   one token for each frame instead of each four
    shown_pixels            the way back to bytes, as the released example takes it

Where the released code guesses (the value range from the sign of the minimum, the layout from the last axis), these
functions are told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.patches import PATCH_SIZE, PatchSize, grid_positions, patchify, video_to_tokens
from tokenizer.sparse import MAX_POSITION, SparseTokens

Size = tuple[int, int]
"""Rows and columns in pixels."""

Layout = Literal["BCHW", "BHWC", "BCTHW", "BTHWC"]

GREY = 127.5
"""What missing frames are filled with in 0..255; 0 after normalisation."""

UINT8_GREY = 127.0
"""What `GREY` became in released code when the pixels were uint8; -0.0039 after normalisation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """Choices of `process_image`; the defaults leave the size alone and crop to whole patches.

    patch_size: frames, rows and columns of a token.
    min_size / max_size: bounds (rows, columns) of the result before it is floored to whole patches; None for both
        leaves the size alone.
    square_length: resize to the area of a square with this side, keeping the aspect ratio up to whole patches;
        instead of bounds.
    random_scale: draw the scale between the lower bound and 1 (training) instead of computing it.
    random_crop: draw where to crop instead of the centre.
    pad_frames_to: shorter clips are extended to this many frames.
    frame_padding: "grey" frames (zero after normalisation), or the last frame once more ("repeat").
    uint8_grey: grey frames are 127 instead of 127.5, as the released code made them for uint8 pixels.
    max_time_offset: a single-step item gets a random t of 0..max_time_offset.
    keep_patches: share of the tokens to keep, drawn at random and left in random order; 1 keeps all, in order.
    max_tokens: a longer sequence ends after this many tokens in order of t, row and column, before any are drawn, as
        the released folder loader cuts it; None cuts nothing.
    """

    patch_size: PatchSize = PATCH_SIZE
    min_size: Size | None = None
    max_size: Size | None = None
    square_length: int | None = None
    random_scale: bool = False
    random_crop: bool = False
    pad_frames_to: int = 4
    frame_padding: Literal["grey", "repeat"] = "grey"
    uint8_grey: bool = False
    max_time_offset: int = 0
    keep_patches: float = 1.0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise InputError(f"patch_size must be three positive numbers, got {self.patch_size}")
        for name in ("min_size", "max_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 2 or min(size) < 1):
                raise InputError(f"{name} must be positive rows and columns, got {size}")
        if (self.min_size is None) != (self.max_size is None):
            raise InputError("min_size and max_size go together; give both or neither")
        if self.min_size and self.max_size and any(a > b for a, b in zip(self.min_size, self.max_size, strict=True)):
            raise InputError(f"min_size {self.min_size} is larger than max_size {self.max_size}")
        if self.square_length is not None and self.square_length < 1:
            raise InputError(f"square_length must be positive, got {self.square_length}")
        if self.square_length is not None and (self.random_scale or self.min_size):
            raise InputError("square_length fixes the scale; leave random_scale, min_size and max_size out")
        if self.frame_padding not in ("grey", "repeat"):
            raise InputError(f"frame_padding must be 'grey' or 'repeat', got '{self.frame_padding}'")
        if self.pad_frames_to < self.patch_size[0]:
            raise InputError(f"pad_frames_to must be at least the {self.patch_size[0]} frames of a patch")
        if not 0 <= self.max_time_offset <= MAX_POSITION:
            raise InputError(f"max_time_offset must lie in 0..{MAX_POSITION}, got {self.max_time_offset}")
        if not 0 < self.keep_patches <= 1:
            raise InputError(f"keep_patches must lie in (0, 1], got {self.keep_patches}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens must be positive, got {self.max_tokens}")

    @property
    def is_random(self) -> bool:
        """Whether a generator is needed."""
        return self.random_scale or self.random_crop or self.max_time_offset > 0 or self.keep_patches < 1


DENSE_BATCH = Preprocessing(min_size=(64, 64), max_size=(512, 512))
"""The fixed options of the released dense-batch encode."""


def process_image(
    frames: Tensor, options: Preprocessing | None = None, generator: torch.Generator | None = None
) -> SparseTokens:
    """Pad, resize, crop, normalise and patchify one picture or clip, as released (FORMAT 3).

    Args:
        frames: [T, H, W, 3], values 0..255, uint8 or floating; a picture has T = 1.
        options: see `Preprocessing`.
        generator: a CPU generator for the random options; needed if and only if one of them is on.

    Returns:
        One item, features [N, 3072] float32 (float64 for float64 pixels) nominally in [-1, 1], on the device of
        `frames`.

    Raises:
        InputError: another shape or type, no pixels, values outside 0..255 or not finite, a result smaller than one
            patch, or a generator that is missing.
    """
    options = options or Preprocessing()
    if options.is_random and generator is None:
        raise InputError("random preprocessing needs a torch.Generator: process_image(frames, options, generator)")
    frames = _pad_time(_as_float(frames), options)
    frames = _resize(frames, options, generator)
    frames = _crop(frames, options, generator) / GREY - 1.0
    return _sampled_tokens(frames, options, generator)


def batch_to_tokens(
    batch: Tensor,
    layout: Layout,
    value_range: tuple[float, float],
    options: Preprocessing = DENSE_BATCH,
    generator: torch.Generator | None = None,
) -> SparseTokens:
    """A dense batch of equally sized pictures or clips (FORMAT 3, dense-tensor encode).

    Args:
        batch: as `layout` says, B items.
        layout: the axes: B items, C = 3 colours, T frames, H rows, W columns.
        value_range: (-1, 1) or (0, 255), what black and white are in `batch`. The released code guesses this.
        options, generator: as for `process_image`; by default sides are brought to 64..512 pixels.

    Returns:
        B items.
    """
    if layout not in ("BCHW", "BHWC", "BCTHW", "BTHWC"):
        raise InputError(f"layout must be BCHW, BHWC, BCTHW or BTHWC, got '{layout}'")
    if batch.ndim != len(layout) or batch.shape[layout.index("C")] != 3 or batch.shape[0] == 0:
        raise InputError(f"a {layout} batch with 3 colours is needed, got shape {tuple(batch.shape)}")
    if "T" not in layout:
        batch, layout = batch.unsqueeze(1), "BTCHW" if layout == "BCHW" else "BTHWC"  # type: ignore[assignment]
    batch = batch.permute([layout.index(axis) for axis in "BTHWC"])
    if tuple(value_range) == (-1, 1):
        batch = batch * GREY + GREY
    elif tuple(value_range) != (0, 255):
        raise InputError(f"value_range must be (-1, 1) or (0, 255), got {value_range}")
    return SparseTokens.cat([process_image(frames, options, generator) for frames in batch])


def video_to_frame_tokens(frames: Tensor, patch_size: PatchSize = PATCH_SIZE) -> SparseTokens:
    """One token for each frame and patch (FORMAT 2, padded variant): t is the frame, the rest of a patch is zeros.

    Args:
        frames: [T, H, W, 3], values in [-1, 1]; centre-cropped to whole patches.
        patch_size: the patch of the model, whose frames after the first stay zero.

    Returns:
        One item, features [N, P].
    """
    tokens, _ = video_to_tokens(frames, (1, *patch_size[1:]), fit="crop")
    missing = tokens.num_channels * (patch_size[0] - 1)
    return tokens.with_features(F.pad(tokens.features, (0, missing)))


def shown_pixels(pixels: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8 as the released example shows them: clamped and truncated.

    `tokenizer.patches.float_to_uint8` rounds instead, which halves the error.
    """
    return ((pixels.float() + 1.0) / 2.0 * 255.0).clamp(0, 255).to(torch.uint8)


def scaled_size(size: Size, min_size: Size, max_size: Size) -> Size:
    """The deterministic size that the released code resizes to (FORMAT 3).

    Too small in one direction: enlarge until both reach the minimum. Too large: shrink until both fit if both
    stay above the minimum, else until one fits (which may enlarge the other). Sides are rounded half to even.
    """
    height, width = size
    if height < min_size[0] or width < min_size[1]:
        return _scaled(size, max(min_size[0] / height, min_size[1] / width))
    if height > max_size[0] or width > max_size[1]:
        return _smaller_if_allowed(size, max_size[0] / height, max_size[1] / width, min_size)
    return size


def fixed_area_size(size: Size, length: int, patch_size: PatchSize = PATCH_SIZE) -> Size:
    """Rows and columns of whole patches with about the aspect of `size` and the area of a square of side `length`."""
    height, width = size
    new_width = math.sqrt(width / height) * length
    new_height = new_width * height / width
    return int(new_height // patch_size[1] * patch_size[1]), int(new_width // patch_size[2] * patch_size[2])


def _as_float(frames: Tensor) -> Tensor:
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise InputError(f"frames must be [T, H, W, 3], got {tuple(frames.shape)}")
    if frames.numel() == 0:
        raise InputError(f"the picture has no pixels: {tuple(frames.shape)}")
    if frames.dtype == torch.uint8:
        return frames.float()
    if not frames.is_floating_point():
        raise InputError(f"pixels must be uint8 or floating, got {str(frames.dtype).removeprefix('torch.')}")
    low, high = (float(value) for value in torch.aminmax(frames.detach()))
    if not (low >= -1.5 and high <= 256.5):  # also false for NaN; resampling filters overshoot a little
        raise InputError(
            f"pixel values must lie in 0..255, got {low:g} to {high:g}; from [-1, 1] use x * 127.5 + 127.5"
        )
    return frames if frames.dtype == torch.float64 else frames.float()


def _pad_time(frames: Tensor, options: Preprocessing) -> Tensor:
    missing = options.pad_frames_to - len(frames)
    if missing > 0:
        fill = frames[-1:].expand(missing, -1, -1, -1)
        if options.frame_padding == "grey":
            fill = torch.full_like(fill, UINT8_GREY if options.uint8_grey else GREY)
        frames = torch.cat([frames, fill])
    step = options.patch_size[0]
    return frames[: len(frames) // step * step]


def _bounds(size: Size, options: Preprocessing) -> tuple[Size, Size]:
    return options.min_size or size, options.max_size or size


def _resize(frames: Tensor, options: Preprocessing, generator: torch.Generator | None) -> Tensor:
    size = (frames.shape[1], frames.shape[2])
    if options.square_length is not None:
        target = fixed_area_size(size, options.square_length, options.patch_size)
    elif options.random_scale:
        target = _random_size(size, _bounds(size, options)[0], generator)
    else:
        target = scaled_size(size, *_bounds(size, options))
    if target == size:
        return frames
    if min(target) < 1:
        raise InputError(f"{size[0]} x {size[1]} pixels become {target[0]} x {target[1]}; ask for a larger result")
    resized = F.interpolate(frames.permute(0, 3, 1, 2), size=target, mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def _random_size(size: Size, min_size: Size, generator: torch.Generator | None) -> Size:
    if size[0] < min_size[0] or size[1] < min_size[1]:
        return scaled_size(size, min_size, size)  # nothing to draw: it must grow to the minimum
    low = torch.tensor([min_size[0] / size[0], min_size[1] / size[1]], dtype=torch.float64, device="cpu")
    first, second = (low + (1 - low) * torch.rand(2, generator=generator, dtype=torch.float64, device="cpu")).tolist()
    return _smaller_if_allowed(size, first, second, min_size)


def _smaller_if_allowed(size: Size, first: float, second: float, min_size: Size) -> Size:
    """Scale by the smaller factor if both sides stay above the minimum, else by the larger."""
    small = _scaled(size, min(first, second))
    if small[0] > min_size[0] and small[1] > min_size[1]:
        return small
    return _scaled(size, max(first, second))


def _scaled(size: Size, scale: float) -> Size:
    return round(size[0] * scale), round(size[1] * scale)


def _crop(frames: Tensor, options: Preprocessing, generator: torch.Generator | None) -> Tensor:
    size = (frames.shape[1], frames.shape[2])
    target = []
    for axis, side in enumerate(size):
        if options.square_length is None:
            low, high = (options.min_size or size)[axis], (options.max_size or size)[axis]
            side = min(max(side, low), high)
        patch = options.patch_size[axis + 1]
        target.append(min(side, size[axis]) // patch * patch)
    if min(target) == 0:
        raise InputError(
            f"{size[0]} x {size[1]} pixels are less than one {options.patch_size[1]} x {options.patch_size[2]} patch"
        )
    spare = [side - kept for side, kept in zip(size, target, strict=True)]
    if options.random_crop:
        top, left = (int(torch.randint(excess + 1, (), generator=generator, device="cpu")) for excess in spare)
    else:
        top, left = (excess // 2 for excess in spare)
    return frames[:, top : top + target[0], left : left + target[1]]


def _sampled_tokens(frames: Tensor, options: Preprocessing, generator: torch.Generator | None) -> SparseTokens:
    features = patchify(frames, options.patch_size)
    steps, rows, columns = (side // patch for side, patch in zip(frames.shape, options.patch_size, strict=False))
    positions = grid_positions((steps, rows, columns), torch.device("cpu"))
    features, positions = features[: options.max_tokens], positions[: options.max_tokens]
    if steps == 1 and options.max_time_offset:
        positions[:, 0] += int(torch.randint(options.max_time_offset + 1, (), generator=generator, device="cpu"))
    if options.keep_patches < 1:
        kept = torch.randperm(len(features), generator=generator, device="cpu")[
            : max(1, int(len(features) * options.keep_patches))
        ]
        features, positions = features[kept.to(features.device)], positions[kept]
    return SparseTokens(features, positions.to(features.device), [len(features)])
