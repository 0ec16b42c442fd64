"""Streams: equal to the whole-video calls, in memory that does not grow, and one line for streams that are wrong."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tokenizer.networks import random_network
from tokenizer import sparse
from tokenizer.errors import InputError
from tokenizer.media import VideoReader, VideoWriter
from tokenizer.model.atoken import Encoding
from tokenizer.model.context import Tiling
from tokenizer.patches import (
    Fit,
    VisualSize,
    float_to_uint8,
    tokens_to_pixels,
    uint8_to_float,
    video_to_tokens,
)
from tokenizer.sparse import SparseTokens
from tokenizer.streaming import decode_stream, encode_stream

PATCH = (4, 4, 4)
TILINGS = (Tiling(stride=16), Tiling(stride=12, context=4), Tiling(stride=8, context=8), Tiling(stride=4, context=8))


def clip(frames: int, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(frames, height, width, 3, generator=generator, dtype=torch.float64) * 2 - 1


def blocks(frames: Tensor, sizes: Iterable[int]) -> Iterator[Tensor]:
    """Blocks of these sizes, over and over; 0 stands for a single frame without its own axis."""
    pattern = list(sizes)
    start = number = 0
    while start < len(frames):
        size = pattern[number % len(pattern)]
        yield frames[start : start + size] if size else frames[start]
        start += max(1, size)
        number += 1


def joined(parts: Iterable[SparseTokens]) -> SparseTokens:
    """Successive parts of one item."""
    parts = list(parts)
    features = torch.cat([part.features for part in parts])
    return SparseTokens(features, torch.cat([part.positions for part in parts]), [len(features)])


def cut_up(tokens: SparseTokens, rows: int) -> Iterator[SparseTokens]:
    for start in range(0, tokens.num_tokens, rows):
        features, positions = tokens.features[start : start + rows], tokens.positions[start : start + rows]
        yield SparseTokens(features, positions, [len(features)])


CASES = {
    "frames": st.integers(1, 41),
    "side": st.sampled_from([(8, 8), (5, 11), (4, 7)]),
    "discrete": st.booleans(),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(**CASES, fit=st.sampled_from(["pad", "crop"]), sizes=st.lists(st.integers(0, 20), min_size=1, max_size=3))
def test_encoding_equals_the_whole_video(
    frames: int, side: tuple[int, int], sizes: list[int], discrete: bool, fit: Fit
) -> None:
    network = random_network(discrete)
    video = clip(frames, *side)
    tokens, size = video_to_tokens(video, PATCH, fit)
    whole = network.encode(tokens)
    tiles = list(encode_stream(network, blocks(video, sizes), fit))
    assert sum(tile.frames for tile in tiles) == size.frames
    assert all(tile.frames == 16 for tile in tiles[:-1])
    ways: list[Callable[[Encoding], SparseTokens]] = [
        lambda e: e.features,
        lambda e: e.latents,
        lambda e: e.posterior.parameters,
    ]
    for way in ways:
        streamed, expected = joined(way(tile.encoding) for tile in tiles), way(whole)
        assert torch.equal(streamed.positions, expected.positions)
        torch.testing.assert_close(streamed.features, expected.features, rtol=0, atol=1e-12)
    if discrete:
        assert whole.indices is not None
        indices = [tile.encoding.indices for tile in tiles]
        assert torch.equal(joined(part for part in indices if part).features, whole.indices.features)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(**CASES, tiling=st.sampled_from([None, *TILINGS]), rows=st.integers(1, 30), shuffled=st.booleans())
def test_decoding_equals_the_whole_video(
    frames: int,
    side: tuple[int, int],
    discrete: bool,
    tiling: Tiling | None,
    rows: int,
    shuffled: bool,
) -> None:
    network = random_network(discrete)
    tokens, size = video_to_tokens(clip(frames, *side), PATCH)
    encoding = network.encode(tokens)
    latents = encoding.indices if encoding.indices is not None else encoding.latents
    whole = tokens_to_pixels(network.decode(latents, tiling), [size], PATCH)[0]
    if shuffled:  # inside a latent step the order is free
        order = torch.argsort(latents.positions[:, 0] * 1000 + latents.positions[:, 1] * 37 % 5, stable=True)
        latents = SparseTokens(latents.features[order], latents.positions[order], latents.lengths)
    streamed = list(decode_stream(network, cut_up(latents, rows), size, tiling))
    stride = tiling.stride if tiling else 16
    assert [len(part) for part in streamed[:-1]] == [stride] * (len(streamed) - 1)
    torch.testing.assert_close(torch.cat(streamed), whole, rtol=0, atol=1e-12)
    whole_tiles = list(decode_stream(network, cut_up(latents, len(latents.features)), size, tiling))
    assert all(torch.equal(one, other) for one, other in zip(streamed, whole_tiles, strict=True))


def test_a_tile_is_ready_as_soon_as_its_frames_are() -> None:
    given: list[int] = []

    def frames() -> Iterator[Tensor]:
        for number, frame in enumerate(clip(40)):
            given.append(number)
            yield frame

    for number, _ in enumerate(encode_stream(random_network(), frames())):
        assert len(given) == min(40, 16 * (number + 1))


def test_a_file_is_a_stream(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "clip.webm", 25, height=10, width=13) as writer:
        writer.write(float_to_uint8(clip(20, 10, 13)).numpy())
    network = random_network(dtype=torch.float32)
    tiles = list(encode_stream(network, tmp_path / "clip.webm"))
    frames = uint8_to_float(torch.from_numpy(VideoReader(tmp_path / "clip.webm").read()))
    expected = network.encode(video_to_tokens(frames, PATCH)[0]).latents
    assert [tile.frames for tile in tiles] == [16, 4]
    torch.testing.assert_close(joined(tile.encoding.latents for tile in tiles).features, expected.features)
    with pytest.raises(InputError, match="no such file"):
        next(encode_stream(network, str(tmp_path / "none.mp4")))


def test_gradients_of_the_caller_are_left_alone() -> None:
    """A generator that sleeps inside torch.no_grad would switch them off for everyone."""
    network = random_network()
    for tile in encode_stream(network, blocks(clip(40), [7])):
        assert torch.is_grad_enabled()
        assert not tile.encoding.pooled.requires_grad
    for _ in decode_stream(network, [network.encode(video_to_tokens(clip(40), PATCH)[0]).latents], size(40)):
        assert torch.is_grad_enabled()


def size(frames: int, height: int = 8, width: int = 8) -> VisualSize:
    return VisualSize("video", frames, height, width)


# ---------------------------------------------------------------------- memory and length


def held_bytes() -> int:
    """Bytes of all tensors that live in this process, each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) is Tensor
    }
    return sum(storages.values())


def most_held(stream: Iterator[object]) -> int:
    return max(held_bytes() for number, _ in enumerate(stream) if number in (3, 31))


def test_memory_does_not_grow_with_the_length() -> None:
    network = random_network(dtype=torch.float32)
    grid = size(4).grid(PATCH)
    positions = torch.cartesian_prod(*map(torch.arange, grid), torch.arange(1)).int()

    def frames(count: int) -> Iterator[Tensor]:
        for number in range(count):
            yield torch.full((8, 8, 3), (number % 7) / 7)

    def chunks(count: int) -> Iterator[SparseTokens]:
        for step in range(count // 4):
            later = positions.clone()
            later[:, 0] += step
            yield SparseTokens(torch.full((len(positions), 12), step / 100), later, [len(positions)])

    base = held_bytes()
    encode = [most_held(encode_stream(network, frames(count))) - base for count in (64, 512)]
    assert encode[1] <= encode[0]
    for tiling in (Tiling(), Tiling(stride=4, context=12)):
        decode = [most_held(decode_stream(network, chunks(count), size(count), tiling)) - base for count in (64, 512)]
        assert decode[1] <= decode[0]


def test_streams_go_on_beyond_what_a_batch_can_count(monkeypatch: pytest.MonkeyPatch) -> None:
    network, video = random_network(), clip(100)
    tokens, whole_size = video_to_tokens(video, PATCH)
    expected = network.encode(tokens).latents
    pixels = tokens_to_pixels(network.decode(expected), [whole_size], PATCH)[0]
    monkeypatch.setattr(sparse, "MAX_POSITION", 15)  # in truth 4095, more than ten minutes of video
    with pytest.raises(InputError, match=r"coordinate outside 0\.\.15"):
        network.encode(video_to_tokens(video, PATCH)[0])
    latents = [tile.encoding.latents for tile in encode_stream(network, blocks(video, [9]))]
    torch.testing.assert_close(joined(latents).features, expected.features, rtol=0, atol=1e-12)
    streamed = torch.cat(list(decode_stream(network, latents, whole_size)))
    torch.testing.assert_close(streamed, pixels, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- streams that are wrong


def one_line(action: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        action()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "the video has no frames"),
        ([torch.zeros(0, 8, 8, 3)], "the video has no frames"),
        ([torch.zeros(3, 8, 8, 3), torch.zeros(8, 9, 3)], r"frames change size from \(8, 8\) to \(8, 9\)"),
        ([torch.zeros(16, 8, 8, 3), torch.zeros(16, 8, 9, 3)], r"frames change size from \(8, 8\) to \(8, 9\)"),
        ([torch.zeros(8, 8)], r"frames must be \[H, W, 3\] or blocks \[T, H, W, 3\], got \(8, 8\)"),
        ([torch.zeros(2, 8, 8, 4)], r"frames must be \[H, W, 3\] or blocks \[T, H, W, 3\], got \(2, 8, 8, 4\)"),
        ([torch.zeros(2, 8, 0, 3)], "the video has no pixels"),
        ([torch.zeros(2, 8, 8, 3, dtype=torch.uint8)], "pixels must be floats"),
        ([torch.full((2, 8, 8, 3), 2.0)], r"pixel values must lie in \[-1, 1\]"),
        ([torch.full((2, 8, 8, 3), torch.nan)], r"pixel values must lie in \[-1, 1\]"),
    ],
)
def test_bad_frames(frames: list[Tensor], message: str) -> None:
    one_line(lambda: list(encode_stream(random_network(), frames)), message)


def at(*steps: int, features: float = 0.0, columns: int = 2) -> SparseTokens:
    """Tokens of whole latent steps of a video of 8 x 8 pixels."""
    grid = torch.cartesian_prod(
        torch.tensor(steps).reshape(-1), torch.arange(2), torch.arange(columns), torch.arange(1)
    )
    return SparseTokens(torch.full((len(grid), 12), features, dtype=torch.float64), grid, [len(grid)])


@pytest.mark.parametrize(
    ("chunks", "frames", "message"),
    [
        ([], 8, "the tokens end 8 frames before the 8 frames of the video"),
        ([at(0, 1, 2, 3)], 24, "the tokens end 8 frames before the 24 frames of the video"),
        ([at(0, 1, 2, 3), at(4)], 24, r"grid of \(1, 2, 2\) tokens"),
        ([at(0, 1, 2, 3), at(4)], 16, "there are tokens beyond the 16 frames of the video"),
        ([at(0, 1)], 4, r"grid of \(2, 2, 2\) tokens"),
        ([at(0, 1, 2, 3), at(4, 5), at(2)], 24, "tokens of latent step 2 come too late in the stream"),
        ([at(4), at(0, 1, 2, 3)], 20, "latent steps 0 to 3 have no tokens"),
        ([at(0, 1, 2, 3), at(9)], 40, "latent steps 4 to 8 have no tokens"),
        ([at(-3)], 4, "tokens of latent step -3 come too late in the stream"),
        ([at(0), at(0)], 4, "has the same position as an earlier token"),
        ([at(0, columns=3)], 4, r"grid of \(1, 2, 3\) tokens"),
        ([at(0, features=torch.nan)], 4, "NaN or infinite"),
        ([at(0).with_features(torch.zeros(4, 5))], 4, "takes latents of 12 channels, got 5"),
        ([at(0).with_features(torch.zeros(4, 2, dtype=torch.int32))], 4, "is continuous and has no codebook"),
    ],
)
@pytest.mark.parametrize("tiling", [None, Tiling(stride=8, context=8)])
def test_bad_chunks(chunks: list[SparseTokens], frames: int, message: str, tiling: Tiling | None) -> None:
    if tiling and "steps" in message:  # another stride finds other tiles without tokens
        message = "have no tokens"
    one_line(lambda: list(decode_stream(random_network(), chunks, size(frames), tiling)), message)


def test_indices_outside_the_codebook() -> None:
    network = random_network(discrete=True)
    chunk = at(0).with_features(torch.full((4, 2), 5000, dtype=torch.int32))
    one_line(lambda: list(decode_stream(network, [chunk], size(4))), "outside 0..4095")


def test_illegal_tilings_are_refused() -> None:
    tilings = {Tiling(stride=6): "multiple of 4 frames", Tiling(stride=12, context=8): "more than the 16 frames"}
    for tiling, message in tilings.items():
        one_line(lambda t=tiling: list(decode_stream(random_network(), [at(0)], size(4), t)), message)  # type: ignore[misc]
