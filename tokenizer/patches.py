"""Pixels <-> `SparseTokens` (FORMAT 2, 4).

A token is a block of Pt frames x Ph rows x Pw columns x 3 colours, flattened in this order (slowest first). Tokens of
an item come in raster order t, row, column, at position (t, row, column, 0).

Two fits:
    "pad"   keeps everything: rows and columns are padded at the bottom and right with edge values up to whole patches,
            and the last frame is repeated up to a multiple of Pt. `VisualSize` remembers what to cut off on decode.
    "crop"  the released behaviour: a centre crop to whole patches, trailing frames dropped, and zero frames appended to
            anything shorter than one patch.
In both, a still image is frame 0 of its patch and the other frames are zeros, as released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.sparse import MAX_POSITION, SparseTokens

PatchSize = tuple[int, int, int]
Fit = Literal["pad", "crop"]
Kind = Literal["image", "video"]

PATCH_SIZE: PatchSize = (4, 16, 16)
"""Frames, rows and columns of a released patch."""


@dataclass(frozen=True, slots=True)
class VisualSize:
    """What a picture or clip measures once decoded: kind, frames, height and width in pixels."""

    kind: Kind
    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.kind not in ("image", "video"):
            raise InputError(f"the kind of a visual must be image or video, got '{self.kind}'")
        if min(self.frames, self.height, self.width) < 1:
            raise InputError(f"a visual needs at least one frame, row and column, got {self}")
        if self.kind == "image" and self.frames != 1:
            raise InputError(f"an image has one frame, got {self.frames}")

    def grid(self, patch_size: PatchSize) -> tuple[int, int, int]:
        """Latent steps, rows and columns of tokens."""
        frames, rows, columns = patch_size
        return -(-self.frames // frames), -(-self.height // rows), -(-self.width // columns)


def image_to_tokens(
    image: Tensor, patch_size: PatchSize = PATCH_SIZE, fit: Fit = "pad"
) -> tuple[SparseTokens, VisualSize]:
    """One still image [H, W, 3], values in [-1, 1], to one item; see the module text for `fit`.

    Raises:
        InputError: another shape, not floating, values outside [-1, 1] or not finite, or (crop) smaller than a patch.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"an image must be [H, W, 3], got {tuple(image.shape)}")
    return _to_tokens(image[None], "image", patch_size, fit)


def video_to_tokens(
    frames: Tensor, patch_size: PatchSize = PATCH_SIZE, fit: Fit = "pad"
) -> tuple[SparseTokens, VisualSize]:
    """One clip [T, H, W, 3], values in [-1, 1], to one item; see the module text for `fit`.

    Raises:
        InputError: as `image_to_tokens`, or no frame at all.
    """
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise InputError(f"a video must be [T, H, W, 3], got {tuple(frames.shape)}")
    if frames.shape[0] == 0:
        raise InputError("the video has no frames")
    return _to_tokens(frames, "video", patch_size, fit)


def visuals_to_tokens(
    visuals: Sequence[Tensor], patch_size: PatchSize = PATCH_SIZE, fit: Fit = "pad"
) -> tuple[SparseTokens, list[VisualSize]]:
    """A batch of images [H, W, 3] and videos [T, H, W, 3] of any sizes, mixed as you like."""
    if not visuals:
        raise InputError("the batch is empty; give at least one image or video")
    parts = [(image_to_tokens if visual.ndim == 3 else video_to_tokens)(visual, patch_size, fit) for visual in visuals]
    return SparseTokens.cat([tokens for tokens, _ in parts]), [size for _, size in parts]


def tokens_to_pixels(
    tokens: SparseTokens, sizes: Sequence[VisualSize] | None = None, patch_size: PatchSize = PATCH_SIZE
) -> list[Tensor]:
    """Patches back to pixels, an item at a time.

    Args:
        tokens: [N, P] with a full grid of positions for each item, in any order.
        sizes: what to cut each item to; by default the whole grid, every frame of it, as released for videos.
        patch_size: must give P features.

    Returns:
        For each item [T, H, W, 3], the dtype of the features, not clamped.

    Raises:
        InputError: a hole in a grid, positions outside it, or features that do not fit the patch size.
    """
    if tokens.num_channels != patch_size[0] * patch_size[1] * patch_size[2] * 3:
        raise InputError(f"patches of {tokens.num_channels} features do not fit patch size {patch_size}")
    if sizes is not None and len(sizes) != tokens.batch_size:
        raise InputError(f"{len(sizes)} sizes for {tokens.batch_size} items; give one for each")
    return [_to_pixels(item, sizes[i] if sizes else None, patch_size, i) for i, item in enumerate(tokens)]


def check_pixels(frames: Tensor) -> None:
    """Raise `InputError` unless all values are finite floats in [-1, 1] (a hundredth more is forgiven)."""
    if not frames.is_floating_point():
        raise InputError(
            f"pixels must be floats in [-1, 1], got {str(frames.dtype).removeprefix('torch.')}; use x / 127.5 - 1"
        )
    low, high = (float(value) for value in torch.aminmax(frames.detach()))
    if not (low >= -1.01 and high <= 1.01):  # also false for NaN
        raise InputError(f"pixel values must lie in [-1, 1], got {low:g} to {high:g}; scale 0..255 with x / 127.5 - 1")


def uint8_to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def float_to_uint8(pixels: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8, clamped and rounded to nearest."""
    return ((pixels.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def patchify(frames: Tensor, patch_size: PatchSize) -> Tensor:
    """[T, H, W, 3] of whole patches -> [N, P] features in raster order; a pure reshape, any dtype."""
    pt, ph, pw = patch_size
    t, h, w = frames.shape[0] // pt, frames.shape[1] // ph, frames.shape[2] // pw
    blocks = frames.reshape(t, pt, h, ph, w, pw, 3)
    return blocks.permute(0, 2, 4, 1, 3, 5, 6).reshape(t * h * w, pt * ph * pw * 3)


def unpatchify(features: Tensor, grid: tuple[int, int, int], patch_size: PatchSize) -> Tensor:
    """The exact inverse of `patchify`: [N, P] in raster order -> [T, H, W, 3]."""
    (t, h, w), (pt, ph, pw) = grid, patch_size
    blocks = features.reshape(t, h, w, pt, ph, pw, 3)
    return blocks.permute(0, 3, 1, 4, 2, 5, 6).reshape(t * pt, h * ph, w * pw, 3)


def grid_positions(grid: tuple[int, int, int], device: torch.device | None = None) -> Tensor:
    """Positions (t, row, column, 0) of a full grid in raster order, [N, 4] int32."""
    t, x, y = (torch.arange(size, dtype=torch.int32, device=device) for size in grid)
    axes = torch.meshgrid(t, x, y, indexing="ij")
    return torch.stack([*axes, torch.zeros_like(axes[0])], dim=-1).reshape(-1, 4)


def _to_tokens(frames: Tensor, kind: Kind, patch_size: PatchSize, fit: Fit) -> tuple[SparseTokens, VisualSize]:
    if min(frames.shape[1:3]) == 0:
        raise InputError(f"the {kind} has no pixels: {tuple(frames.shape)}")
    check_pixels(frames)
    if fit == "crop":
        frames = _centre_crop(frames, patch_size)
        size = VisualSize(kind, 1 if kind == "image" else frames.shape[0], frames.shape[1], frames.shape[2])
    elif fit == "pad":
        size = VisualSize(kind, frames.shape[0], frames.shape[1], frames.shape[2])
        frames = _pad_frames(_pad_edges(frames, patch_size), patch_size[0], repeat=kind == "video")
    else:
        raise InputError(f"fit must be 'pad' or 'crop', got '{fit}'")
    features = patchify(frames, patch_size)
    _check_grid(size, patch_size)
    positions = grid_positions(size.grid(patch_size), torch.device("cpu")).to(frames.device, non_blocking=True)
    return SparseTokens(features, positions, [len(features)]), size


def _check_grid(size: VisualSize, patch_size: PatchSize) -> None:
    """Raise `InputError` for pictures so long that their positions leave the legal range."""
    measures = (size.frames, size.height, size.width)
    for axis, length, patch in zip(("frames", "rows", "columns"), measures, patch_size, strict=True):
        most = (MAX_POSITION + 1) * patch
        if length > most:
            remedy = "encode it as a stream (tokenizer.streaming)" if axis == "frames" else "scale it down"
            raise InputError(f"the {size.kind} has {length} {axis}; at most {most} fit the token grid: {remedy}")


def _centre_crop(frames: Tensor, patch_size: PatchSize) -> Tensor:
    pt, ph, pw = patch_size
    height, width = frames.shape[1] // ph * ph, frames.shape[2] // pw * pw
    if height == 0 or width == 0:
        raise InputError(
            f"{frames.shape[1]} x {frames.shape[2]} pixels are less than one {ph} x {pw} patch; use fit='pad'"
        )
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    frames = frames[:, top : top + height, left : left + width]
    if frames.shape[0] < pt:
        return _pad_frames(frames, pt, repeat=False)
    return frames[: frames.shape[0] // pt * pt]


def _pad_edges(frames: Tensor, patch_size: PatchSize) -> Tensor:
    down, right = -frames.shape[1] % patch_size[1], -frames.shape[2] % patch_size[2]
    if not down and not right:
        return frames
    return F.pad(frames.permute(0, 3, 1, 2), (0, right, 0, down), mode="replicate").permute(0, 2, 3, 1)


def _pad_frames(frames: Tensor, multiple: int, *, repeat: bool) -> Tensor:
    missing = -frames.shape[0] % multiple
    if not missing:
        return frames
    last = frames[-1:].expand(missing, -1, -1, -1)
    return torch.cat([frames, last if repeat else torch.zeros_like(last)])


def _to_pixels(item: SparseTokens, size: VisualSize | None, patch_size: PatchSize, number: int) -> Tensor:
    if item.num_tokens == 0:
        raise InputError(f"item {number} has no tokens to make a picture of")
    positions = item.host_positions.long()
    grid = cast(tuple[int, int, int], tuple((positions[:, :3].amax(dim=0) + 1).tolist()))
    if size is not None:
        needed = size.grid(patch_size)
        if grid != needed:
            raise InputError(f"item {number} has a grid of {grid} tokens, but {size} needs {needed}")
    t, x, y, _ = positions.unbind(1)
    raster = (t * grid[1] + x) * grid[2] + y
    count = grid[0] * grid[1] * grid[2]
    ordered, order = torch.sort(raster)
    wrong = ordered != torch.arange(len(raster), device="cpu")
    if len(raster) != count or bool(wrong.any()):
        # Nothing as large as the grid is made here: a damaged position can claim a grid of many gigabytes.
        place = int(wrong.int().argmax()) if bool(wrong.any()) else len(raster)
        doubled = place < len(raster) and int(ordered[place]) < place
        place -= doubled
        step, row, column = place // (grid[1] * grid[2]), place // grid[2] % grid[1], place % grid[2]
        what = "two tokens" if doubled else "no token"
        raise InputError(f"item {number} has {what} at t={step} x={row} y={column} of its grid {grid}")
    features = item.features
    if not torch.equal(order, torch.arange(count, device="cpu")):
        features = features[order.to(features.device, non_blocking=True)]
    frames = unpatchify(features, grid, patch_size)
    return frames if size is None else frames[: size.frames, : size.height, : size.width]
