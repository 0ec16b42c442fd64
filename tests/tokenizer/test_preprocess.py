"""The released preprocessing: its branches by their rules (recorded pixels are compared in test_parity)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.errors import InputError
from tokenizer.patches import float_to_uint8, tokens_to_pixels
from tokenizer.preprocess import (
    Layout,
    Preprocessing,
    batch_to_tokens,
    fixed_area_size,
    process_image,
    scaled_size,
    shown_pixels,
    video_to_frame_tokens,
)
from tokenizer.sparse import SparseTokens

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
SIDE = st.integers(8, 400)


def bytes_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def size_of(tokens: SparseTokens) -> tuple[int, int]:
    _, rows, columns, _ = (tokens.positions.amax(dim=0) + 1).tolist()
    return 16 * rows, 16 * columns


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("size", "low", "high", "expected"),
    [
        ((50, 85), (64, 64), (512, 512), (64, 109)),  # enlarged until both sides reach the minimum
        ((50, 85), (16, 16), (48, 48), (28, 48)),  # shrunk until both fit
        ((50, 85), (32, 16), (32, 48), (32, 54)),  # both would go below the minimum: until one fits
        ((50, 85), (16, 16), (512, 512), (50, 85)),
        ((64, 64), (64, 64), (64, 64), (64, 64)),
        ((100, 500), (64, 64), (200, 200), (200, 1000)),  # as released: 40 rows are too few, so it even grows
    ],
)
def test_scaled_size(
    size: tuple[int, int], low: tuple[int, int], high: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert scaled_size(size, low, high) == expected


@QUICK
@given(SIDE, SIDE, st.integers(16, 100), st.integers(0, 200))
def test_results_lie_between_the_bounds(height: int, width: int, low: int, more: int) -> None:
    bounds = Preprocessing(min_size=(low, low), max_size=(low + more, low + more))
    rows, columns = size_of(process_image(bytes_of(1, height, width), bounds))
    for side in (rows, columns):
        assert low // 16 * 16 <= side <= (low + more) // 16 * 16


def test_a_sequence_may_be_cut_by_its_tokens() -> None:
    frames = bytes_of(9, 32, 48)
    whole, cut = process_image(frames), process_image(frames, Preprocessing(max_tokens=7))
    assert whole.num_tokens == 12
    assert torch.equal(cut.positions, whole.positions[:7])
    assert torch.equal(cut.features, whole.features[:7])
    assert process_image(frames, Preprocessing(max_tokens=13)).num_tokens == 12


def test_the_released_example_truncates() -> None:
    levels = torch.tensor([-3.0, -1.0, -1 + 1.9 / 255, 0.0, 1 - 0.1 / 255, 1.0, 3.0])
    assert shown_pixels(levels).tolist() == [0, 0, 0, 127, 254, 255, 255]
    assert float_to_uint8(levels).tolist() == [0, 0, 1, 128, 255, 255, 255]


@QUICK
@given(SIDE, SIDE, st.integers(32, 256))
def test_fixed_area(height: int, width: int, length: int) -> None:
    rows, columns = fixed_area_size((height, width), length)
    assert rows % 16 == columns % 16 == 0
    assert rows * columns <= length * length * (1 + 1e-9)
    assert (rows + 16) * (columns + 16) > length * length


def test_the_centre_is_cropped_without_resizing() -> None:
    image = bytes_of(1, 50, 85)
    (frames,) = tokens_to_pixels(process_image(image))
    assert torch.equal(frames[:1], image[:, 1:49, 2:82].float() / 127.5 - 1)


# ---------------------------------------------------------------------- frames


def test_missing_frames_are_grey_or_repeated() -> None:
    clip = bytes_of(2, 16, 16)
    (grey,) = tokens_to_pixels(process_image(clip))
    assert not grey[2:].any()
    (released_grey,) = tokens_to_pixels(process_image(clip, Preprocessing(uint8_grey=True)))
    assert released_grey[2:].unique().tolist() == pytest.approx([127 / 127.5 - 1])
    (repeated,) = tokens_to_pixels(process_image(clip, Preprocessing(frame_padding="repeat")))
    assert torch.equal(repeated[2:], repeated[1:2].expand(2, -1, -1, -1))
    (longer,) = tokens_to_pixels(process_image(clip, Preprocessing(pad_frames_to=9)))
    assert len(longer) == 8


def test_trailing_frames_are_dropped() -> None:
    assert process_image(bytes_of(11, 16, 16)).num_tokens == 2


def test_frame_tokens_hold_one_frame_each() -> None:
    video = torch.rand(5, 20, 35, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = video_to_frame_tokens(video)
    assert tokens.positions[:, 0].tolist() == [t for t in range(5) for _ in range(2)]
    assert not tokens.features[:, 768:].any()
    (frames,) = tokens_to_pixels(tokens.with_features(tokens.features[:, :768]), patch_size=(1, 16, 16))
    assert torch.equal(frames, video[:, 2:18, 1:33])


# ---------------------------------------------------------------------- random branch


RANDOM = Preprocessing(min_size=(32, 48), max_size=(200, 200), random_scale=True, random_crop=True)


def test_same_seed_same_result() -> None:
    image = bytes_of(1, 100, 120)
    first, second, other = (process_image(image, RANDOM, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.positions, second.positions)
    assert first.features.shape != other.features.shape or not torch.equal(first.features, other.features)


@QUICK
@given(SIDE, SIDE, st.integers(0, 1000))
def test_random_sizes_lie_between_the_minimum_and_the_picture(height: int, width: int, seed: int) -> None:
    rows, columns = size_of(process_image(bytes_of(1, height, width), RANDOM, torch.Generator().manual_seed(seed)))
    assert 32 <= rows <= 192
    assert 48 <= columns <= 192
    if height >= 32 and width >= 48:
        assert rows <= height
        assert columns <= width


def test_random_crops_reach_every_place() -> None:
    image = torch.arange(40, dtype=torch.uint8)[:, None, None].expand(40, 40, 3)[None]
    options = Preprocessing(random_crop=True)
    generator = torch.Generator().manual_seed(0)
    tops = {round((float(process_image(image, options, generator).features[0, 0]) + 1) * 127.5) for _ in range(200)}
    assert tops == set(range(9))


def test_random_time_is_for_single_steps_only() -> None:
    options = Preprocessing(max_time_offset=3)
    generator = torch.Generator().manual_seed(0)
    seen = {int(process_image(bytes_of(1, 16, 16), options, generator).positions[0, 0]) for _ in range(60)}
    assert seen == {0, 1, 2, 3}
    assert process_image(bytes_of(8, 16, 16), options, generator).positions[:, 0].tolist() == [0, 1]


def test_a_random_subset_keeps_each_patch_at_its_place() -> None:
    image = bytes_of(1, 64, 80)
    whole = process_image(image)
    part = process_image(image, Preprocessing(keep_patches=0.5), torch.Generator().manual_seed(0))
    assert part.num_tokens == 10
    rows = [whole.positions.tolist().index(position) for position in part.positions.tolist()]
    assert len(set(rows)) == 10
    assert rows != sorted(rows)
    assert torch.equal(part.features, whole.features[rows])


# ---------------------------------------------------------------------- dense batches


@pytest.mark.parametrize("layout", ["BCHW", "BHWC", "BCTHW", "BTHWC"])
@pytest.mark.parametrize("value_range", [(-1, 1), (0, 255)])
def test_layouts_and_ranges_mean_the_same(layout: Layout, value_range: tuple[float, float]) -> None:
    frames = 5 if "T" in layout else 1
    clips = torch.stack([bytes_of(frames, 70, 66, seed=i) for i in range(2)]).float()
    expected = SparseTokens.cat(
        [process_image(clip, Preprocessing(min_size=(64, 64), max_size=(512, 512))) for clip in clips]
    )
    batch = clips if "T" in layout else clips[:, 0]
    batch = batch.movedim(-1, 1) if layout[1] == "C" else batch
    tokens = batch_to_tokens(batch if value_range == (0, 255) else batch / 127.5 - 1, layout, value_range)
    assert torch.equal(tokens.positions, expected.positions)
    assert torch.equal(tokens.lengths, expected.lengths)
    torch.testing.assert_close(tokens.features, expected.features, rtol=0, atol=1e-5)


def test_dark_batch_in_0_to_255_is_not_mistaken() -> None:
    """The released code would take values below 1 for [-1, 1]; here the range is said."""
    tokens = batch_to_tokens(torch.full((1, 3, 64, 64), 0.5), "BCHW", (0, 255))
    assert tokens.features[:, :768].unique().tolist() == pytest.approx([0.5 / 127.5 - 1])


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_size": (64, 64)}, "min_size and max_size go together"),
        ({"min_size": (64, 64), "max_size": (32, 80)}, r"min_size \(64, 64\) is larger than max_size \(32, 80\)"),
        ({"min_size": (0, 64), "max_size": (32, 80)}, "min_size must be positive"),
        ({"square_length": 0}, "square_length must be positive"),
        ({"square_length": 64, "random_scale": True}, "square_length fixes the scale"),
        ({"frame_padding": "zero"}, "frame_padding must be 'grey' or 'repeat', got 'zero'"),
        ({"pad_frames_to": 3}, "pad_frames_to must be at least the 4 frames"),
        ({"keep_patches": 0.0}, r"keep_patches must lie in \(0, 1\]"),
        ({"max_time_offset": -1}, "max_time_offset must lie in 0..4095"),
        ({"max_tokens": 0}, "max_tokens must be positive"),
        ({"patch_size": (4, 16)}, "patch_size must be three positive numbers"),
    ],
)
def test_impossible_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessing(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(16, 16, 3), r"frames must be \[T, H, W, 3\]"),
        (torch.zeros(0, 16, 16, 3), "no pixels"),
        (torch.zeros(1, 16, 16, 3, dtype=torch.int64), "uint8 or floating, got int64"),
        (torch.full((1, 16, 16, 3), float("nan")), "nan to nan"),
        (torch.full((1, 16, 16, 3), -100.0), r"must lie in 0\.\.255, got -100 to -100"),
        (torch.zeros(1, 15, 16, 3), "15 x 16 pixels are less than one 16 x 16 patch"),
    ],
)
def test_bad_pixels(frames: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        process_image(frames)


def test_randomness_needs_a_generator() -> None:
    with pytest.raises(InputError, match=r"needs a torch\.Generator"):
        process_image(bytes_of(1, 64, 64), Preprocessing(random_crop=True))


def test_a_picture_too_thin_for_its_area() -> None:
    with pytest.raises(InputError, match="ask for a larger result"):
        process_image(bytes_of(1, 2, 400), Preprocessing(square_length=32))


def test_bad_batches() -> None:
    with pytest.raises(InputError, match="layout must be BCHW"):
        batch_to_tokens(torch.zeros(1, 3, 64, 64), "CHW", (0, 255))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a BHWC batch with 3 colours is needed, got shape \(1, 3, 64, 64\)"):
        batch_to_tokens(torch.zeros(1, 3, 64, 64), "BHWC", (0, 255))
    with pytest.raises(InputError, match=r"value_range must be \(-1, 1\) or \(0, 255\)"):
        batch_to_tokens(torch.zeros(1, 3, 64, 64), "BCHW", (0, 1))
