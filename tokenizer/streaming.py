"""Videos of any length in bounded memory: frames in, tokens out as they are ready, and back (FORMAT 10).

Both directions hold one tile. The results equal those of the whole-video calls: tiles are encoded independently there
too, and decoding with context goes through the same planner.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.model.atoken import ATokenNetwork, Encoding
from tokenizer.model.context import ContextPlanner, Tiling
from tokenizer.model.posterior import Posterior
from tokenizer.model.transformer import BlockCache
from tokenizer.patches import Fit, VisualSize, tokens_to_pixels, uint8_to_float, video_to_tokens
from tokenizer.sparse import SparseTokens


@dataclass(frozen=True, slots=True)
class EncodedTile:
    """A tile of a stream: its encoding, with t counted from the start of the video, and the frames it stands for.

    encoding.pooled describes this tile alone.
    """

    encoding: Encoding
    frames: int


def encode_stream(
    network: ATokenNetwork, frames: Iterable[Tensor] | str | PathLike[str], fit: Fit = "pad"
) -> Iterator[EncodedTile]:
    """Encode a video that arrives in pieces.

    Args:
        frames: blocks [T, H, W, 3] of any T, or single frames [H, W, 3], floats in [-1, 1], all of one size; or the
            path of a video file.
        fit: as in `tokenizer.patches`; "crop" drops trailing frames that fill no patch, as released.

    Yields:
        A tile for every `tile_frames` frames and one for what remains.

    Raises:
        InputError: no frames at all, blocks of another shape or size, values outside [-1, 1], or a file that is no
            intact video.
    """
    patch, tile = network.config.patch_size, network.config.tile_frames
    if isinstance(frames, (str, PathLike)):
        frames = _frames_of_file(frames)
    step = 0
    for block in _tiles(frames, tile):
        if fit == "crop" and step and len(block) < patch[0]:
            return  # the released call drops these frames; at the very start it would pad them instead
        tokens, size = video_to_tokens(block, patch, fit)
        with torch.no_grad():
            encoding = network.encode(tokens.to(network.device))
        yield EncodedTile(_later(encoding, step), size.frames)
        step += tile // patch[0]
    if step == 0:
        raise InputError("the video has no frames")


def decode_stream(
    network: ATokenNetwork, chunks: Iterable[SparseTokens], size: VisualSize, tiling: Tiling | None = None
) -> Iterator[Tensor]:
    """Decode one video whose tokens arrive in order of time.

    Args:
        chunks: latents or indices, one item each, any number of tokens; time never goes back from chunk to chunk.
        size: of the whole video; says where to cut.
        tiling: stride and context in frames; the default is the released one.

    Yields:
        Frames [T, H, W, 3], floats, not clamped, T up to the stride; `size.frames` in all.

    Raises:
        InputError: chunks out of order, tokens that are bad, too few or too many for `size`, or an illegal tiling.
    """
    config = network.config
    tiling = tiling or Tiling(stride=config.tile_frames)
    stride, context = tiling.steps(config.patch_size[0], config.tile_frames)
    decoder = _TileDecoder(network, context)
    left = size.frames
    for number, tile in enumerate(_regroup(chunks, stride)):
        part = _shifted(tile, -number * stride).validate()
        frames = min(left, stride * config.patch_size[0])
        if frames <= 0:
            raise InputError(f"there are tokens beyond the {size.frames} frames of the video; is its size right?")
        with torch.no_grad():
            patches = decoder.decode(part.to(network.device))
        left -= frames
        yield tokens_to_pixels(patches, [VisualSize("video", frames, size.height, size.width)], config.patch_size)[0]
    if left:
        raise InputError(f"the tokens end {left} frames before the {size.frames} frames of the video")


def _frames_of_file(path: str | PathLike[str]) -> Iterator[Tensor]:
    from tokenizer.media import VideoReader

    return (uint8_to_float(torch.from_numpy(block)) for block in VideoReader(path))


class _TileDecoder:
    """Decodes successive tiles, carrying cached keys and values from one to the next."""

    def __init__(self, network: ATokenNetwork, context: int) -> None:
        self.network = network
        self.caches: list[BlockCache] = []
        self.planner = ContextPlanner(context, network.device) if context else None

    def decode(self, tile: SparseTokens) -> SparseTokens:
        """One tile as one item, t from 0."""
        if self.planner is None:
            return self.network.decode(tile)
        latents = self.network.checked_latents(tile)
        plan = self.planner.next(
            latents.host_positions.long(), torch.zeros(latents.num_tokens, dtype=torch.int64, device="cpu")
        )
        return latents.with_features(self.network.decode_tile(latents.features, plan, self.caches))


def _tiles(frames: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Regroup blocks and single frames into blocks of `size` frames; the last may be shorter."""
    held: list[Tensor] = []
    count = 0
    shape: torch.Size | None = None
    for piece in frames:
        block = piece[None] if piece.ndim == 3 else piece
        if block.ndim != 4 or block.shape[3] != 3:
            raise InputError(f"frames must be [H, W, 3] or blocks [T, H, W, 3], got {tuple(piece.shape)}")
        shape = shape or block.shape[1:3]
        if block.shape[1:3] != shape:
            raise InputError(f"frames change size from {tuple(shape)} to {tuple(block.shape[1:3])}")
        while len(block):
            part, block = block[: size - count], block[size - count :]
            held.append(part)
            count += len(part)
            if count == size:
                yield torch.cat(held)
                held, count = [], 0
    if count:
        yield torch.cat(held)


def _regroup(chunks: Iterable[SparseTokens], steps: int) -> Iterator[SparseTokens]:
    """Regroup chunks into tiles of `steps` latent time steps, t kept; nothing is held beyond one tile and a chunk.

    Raises:
        InputError: a chunk that belongs to a tile already given, or a tile without any token.
    """
    held: list[SparseTokens] = []
    tile = 0
    for chunk in chunks:
        while chunk.num_tokens:
            time = chunk.host_positions[:, 0].long()
            if int(time.min()) < tile * steps:
                raise InputError(f"tokens of latent step {int(time.min())} come too late in the stream")
            mine = time < (tile + 1) * steps
            if bool(mine.any()):
                held.append(_take(chunk, mine))
            if bool(mine.all()):
                break
            if not held:
                raise InputError(f"latent steps {tile * steps} to {int(time.min()) - 1} have no tokens")
            yield _join(held)
            chunk = _take(chunk, ~mine)
            held, tile = [], tile + 1
    if held:
        yield _join(held)


def _take(tokens: SparseTokens, chosen: Tensor) -> SparseTokens:
    rows = torch.nonzero(chosen).flatten().to(tokens.device)
    return SparseTokens(tokens.features[rows], tokens.positions[rows], [len(rows)])


def _join(parts: list[SparseTokens]) -> SparseTokens:
    features = torch.cat([part.features for part in parts])
    return SparseTokens(features, torch.cat([part.positions for part in parts]), [len(features)])


def _shifted(tokens: SparseTokens, steps: int) -> SparseTokens:
    """The same tokens `steps` later. Streams may go on for longer than a batch can count (`MAX_POSITION`)."""
    positions = tokens.positions.clone()
    positions[:, 0] += steps
    return SparseTokens(tokens.features, positions, tokens.lengths)


def _later(encoding: Encoding, steps: int) -> Encoding:
    features = _shifted(encoding.features, steps)
    parameters = features.with_features(encoding.posterior.parameters.features)
    return Encoding(features, encoding.pooled, Posterior(parameters), encoding.quantizer)
