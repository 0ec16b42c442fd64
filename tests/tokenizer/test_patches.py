"""Pixels <-> tokens: nothing lost with fit="pad", the released cuts with fit="crop", any order of tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.networks import shuffled
from tokenizer.errors import InputError
from tokenizer.patches import (
    VisualSize,
    check_pixels,
    float_to_uint8,
    image_to_tokens,
    tokens_to_pixels,
    uint8_to_float,
    video_to_tokens,
    visuals_to_tokens,
)
from tokenizer.preprocess import process_image
from tokenizer.sparse import SparseTokens
from tokenizer.voxels import voxels_to_tokens

QUICK = settings(max_examples=30, deadline=None, derandomize=True)
SIDE = st.integers(1, 50)
FRAMES = st.integers(1, 9)


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---------------------------------------------------------------------- layout


def test_order_of_tokens_and_features() -> None:
    video = pixels(8, 32, 48)
    tokens, size = video_to_tokens(video)
    assert size == VisualSize("video", 8, 32, 48)
    assert tokens.lengths.tolist() == [2 * 2 * 3]
    for token, (t, x, y, z) in enumerate(tokens.positions.tolist()):
        assert (t, x, y, z) == (token // 6, token // 3 % 2, token % 3, 0)
        for frame, row, column, colour in [(0, 0, 0, 0), (1, 2, 3, 1), (3, 15, 15, 2)]:
            feature = ((frame * 16 + row) * 16 + column) * 3 + colour
            assert tokens.features[token, feature] == video[4 * t + frame, 16 * x + row, 16 * y + column, colour]


def test_an_image_is_frame_0_of_its_patch_and_the_rest_is_zero() -> None:
    image = pixels(16, 16)
    tokens, _ = image_to_tokens(image)
    assert torch.equal(tokens.features[0, :768], image.flatten())
    assert not tokens.features[:, 768:].any()


def test_other_patch_sizes() -> None:
    video = pixels(6, 10, 12)
    tokens, size = video_to_tokens(video, patch_size=(2, 5, 4))
    assert tokens.features.shape == (3 * 2 * 3, 2 * 5 * 4 * 3)
    assert torch.equal(tokens_to_pixels(tokens, [size], (2, 5, 4))[0], video)


# ---------------------------------------------------------------------- fit="pad"


@QUICK
@given(SIDE, SIDE)
def test_images_of_any_size_come_back(height: int, width: int) -> None:
    image = pixels(height, width)
    tokens, size = image_to_tokens(image)
    assert tokens.num_tokens == -(-height // 16) * -(-width // 16)
    (back,) = tokens_to_pixels(tokens, [size])
    assert torch.equal(back, image[None])


@QUICK
@given(FRAMES, SIDE, SIDE)
def test_videos_of_any_size_come_back(frames: int, height: int, width: int) -> None:
    video = pixels(frames, height, width)
    tokens, size = video_to_tokens(video)
    (back,) = tokens_to_pixels(tokens, [size])
    assert torch.equal(back, video)
    (padded,) = tokens_to_pixels(tokens)
    assert torch.equal(padded[frames:, :height, :width], video[-1:].expand(-frames % 4, -1, -1, -1))
    assert torch.equal(padded[:frames, height:, :width], video[:, -1:].expand(-1, -height % 16, -1, -1))
    assert torch.equal(padded[:frames, :height, width:], video[:, :, -1:].expand(-1, -1, -width % 16, -1))


def test_mixed_batch_comes_back() -> None:
    given_pixels = [pixels(20, 33), pixels(5, 17, 16), pixels(16, 16)]
    tokens, sizes = visuals_to_tokens(given_pixels)
    assert [size.kind for size in sizes] == ["image", "video", "image"]
    for back, original in zip(tokens_to_pixels(tokens, sizes), given_pixels, strict=True):
        assert torch.equal(back, original if original.ndim == 4 else original[None])


# ---------------------------------------------------------------------- fit="crop"


@QUICK
@given(FRAMES, st.integers(16, 50), st.integers(16, 50))
def test_crop_takes_the_centre_and_drops_the_last_frames(frames: int, height: int, width: int) -> None:
    video = pixels(frames, height, width)
    tokens, size = video_to_tokens(video, fit="crop")
    top, left, rows, columns = height % 16 // 2, width % 16 // 2, height // 16 * 16, width // 16 * 16
    expected = video[:, top : top + rows, left : left + columns]
    expected = (
        expected[: frames // 4 * 4] if frames >= 4 else torch.cat([expected, torch.zeros(4 - frames, rows, columns, 3)])
    )
    (back,) = tokens_to_pixels(tokens)
    assert torch.equal(back, expected)
    assert (size.height, size.width) == (rows, columns)


@pytest.mark.parametrize(("frames", "steps"), [(1, 1), (4, 1), (7, 1), (8, 2), (11, 2), (16, 4), (33, 8)])
def test_released_number_of_steps(frames: int, steps: int) -> None:
    tokens, _ = video_to_tokens(pixels(frames, 16, 16), fit="crop")
    assert tokens.num_tokens == steps


def test_crop_of_less_than_a_patch_is_refused() -> None:
    with pytest.raises(InputError, match="15 x 40 pixels are less than one 16 x 16 patch; use fit='pad'"):
        image_to_tokens(pixels(15, 40), fit="crop")


# ---------------------------------------------------------------------- order and holes


@QUICK
@given(FRAMES, SIDE, SIDE, st.integers(0, 1000))
def test_order_of_tokens_does_not_matter(frames: int, height: int, width: int, seed: int) -> None:
    video = pixels(frames, height, width)
    tokens, size = video_to_tokens(video)
    mixed, _ = shuffled(tokens, seed)
    assert torch.equal(tokens_to_pixels(mixed, [size])[0], video)


def test_a_hole_is_named() -> None:
    tokens, _ = video_to_tokens(pixels(8, 32, 48))
    keep = [row for row in range(12) if tokens.positions[row].tolist() != [1, 0, 1, 0]]
    broken = SparseTokens(tokens.features[keep], tokens.positions[keep], [11])
    with pytest.raises(InputError, match=r"item 0 has no token at t=1 x=0 y=1 of its grid \(2, 2, 3\)"):
        tokens_to_pixels(broken)


def test_a_doubled_token_is_refused() -> None:
    tokens, _ = image_to_tokens(pixels(32, 32))
    doubled = SparseTokens(tokens.features[[0, 1, 2, 3, 1]], tokens.positions[[0, 1, 2, 3, 1]], [5])
    with pytest.raises(InputError, match=r"item 0 has two tokens at t=0 x=0 y=1 of its grid \(1, 2, 2\)"):
        tokens_to_pixels(doubled)
    last = SparseTokens(tokens.features[[0, 1, 2, 3, 3]], tokens.positions[[0, 1, 2, 3, 3]], [5])
    with pytest.raises(InputError, match="item 0 has two tokens at t=0 x=1 y=1 "):
        tokens_to_pixels(last)
    twins = SparseTokens(tokens.features[[0, 3, 3, 3]], tokens.positions[[0, 3, 3, 3]], [4])
    with pytest.raises(InputError, match="item 0 has no token at t=0 x=0 y=1 "):
        tokens_to_pixels(twins)


def test_a_damaged_position_does_not_cost_a_grid_of_memory() -> None:
    far = SparseTokens(torch.zeros(1, 3072), torch.tensor([[4095, 4095, 4095, 0]]), [1])
    with pytest.raises(InputError, match=r"no token at t=0 x=0 y=0 of its grid \(4096, 4096, 4096\)"):
        tokens_to_pixels(far)


def test_an_empty_item_is_refused() -> None:
    tokens, _ = image_to_tokens(pixels(16, 16))
    with pytest.raises(InputError, match="item 1 has no tokens"):
        tokens_to_pixels(SparseTokens(tokens.features, tokens.positions, [1, 0]))


def test_sizes_must_fit() -> None:
    tokens, _ = image_to_tokens(pixels(32, 32))
    with pytest.raises(InputError, match="2 sizes for 1 items"):
        tokens_to_pixels(tokens, [VisualSize("image", 1, 32, 32)] * 2)
    with pytest.raises(InputError, match=r"grid of \(1, 2, 2\) tokens"):
        tokens_to_pixels(tokens, [VisualSize("image", 1, 48, 32)])
    with pytest.raises(InputError, match="3072 features do not fit patch size"):
        tokens_to_pixels(tokens, patch_size=(2, 16, 16))


# ---------------------------------------------------------------------- bad pixels


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "must be floats"),
        (torch.full((8, 8, 3), float("nan")), "nan to nan"),
        (torch.full((8, 8, 3), 200.0), "200 to 200; scale 0..255"),
        (torch.zeros(3, 8, 8), r"must be \[H, W, 3\], got \(3, 8, 8\)"),
        (torch.zeros(0, 8, 3), "no pixels"),
    ],
)
def test_bad_images(bad: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        image_to_tokens(bad)


def test_bad_videos() -> None:
    with pytest.raises(InputError, match="no frames"):
        video_to_tokens(torch.zeros(0, 8, 8, 3))
    with pytest.raises(InputError, match=r"must be \[T, H, W, 3\]"):
        video_to_tokens(torch.zeros(8, 8, 3))
    with pytest.raises(InputError, match="batch is empty"):
        visuals_to_tokens([])
    with pytest.raises(InputError, match="'pad' or 'crop'"):
        video_to_tokens(torch.zeros(1, 8, 8, 3), fit="stretch")  # type: ignore[arg-type]


def test_longer_than_the_token_grid() -> None:
    strip = torch.zeros(1, 1, 3).expand(1, 4096 * 16, 3)
    assert image_to_tokens(strip)[0].validate().num_tokens == 4096
    with pytest.raises(
        InputError, match="the image has 65537 columns; at most 65536 fit the token grid: scale it down"
    ):
        image_to_tokens(torch.zeros(1, 1, 3).expand(1, 65537, 3))
    with pytest.raises(InputError, match=r"the video has 16385 frames; .* as a stream"):
        video_to_tokens(torch.zeros(1, 1, 1, 3).expand(4096 * 4 + 1, 1, 1, 3))


def test_pixels_a_hair_outside_are_forgiven() -> None:
    check_pixels(torch.tensor([-1.005, 1.005]))
    with pytest.raises(InputError, match="must lie in"):
        check_pixels(torch.tensor([-1.02, 0.0]))


@pytest.mark.parametrize("size", [("image", 2, 8, 8), ("video", 0, 8, 8), ("sound", 1, 8, 8)])
def test_impossible_sizes(size: tuple[str, int, int, int]) -> None:
    with pytest.raises(InputError):
        VisualSize(*size)  # type: ignore[arg-type]


def test_every_byte_survives_floats() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(float_to_uint8(uint8_to_float(values)), values)
    assert float_to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.filterwarnings("error")
def test_pixels_that_are_optimised_are_read_without_a_warning() -> None:
    """torch warns, once a process, of a tensor with a gradient that becomes a number, as ranges of values do."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        picture, voxels, raw = (
            torch.full(shape, 0.5, requires_grad=True) for shape in ((9, 9, 3), (2, 768), (1, 16, 16, 3))
        )
        features = [
            image_to_tokens(picture)[0].validate().features,
            voxels_to_tokens(voxels, torch.arange(6).reshape(2, 3)).features,
            process_image(raw).features,
        ]
        for made, leaf in zip(features, (picture, voxels, raw), strict=True):
            (gradient,) = torch.autograd.grad(made.sum(), leaf)
            assert (gradient != 0).all()
    finally:
        torch.set_warn_always(before)
