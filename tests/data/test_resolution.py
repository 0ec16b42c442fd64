"""Resolution sampling: views inside their picture and bounds, from draws that need no state."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data.resolution import IMAGE_SIDES, ResolutionSampler, Rule, View, draws, token_count
from tokenizer.errors import InputError

QUICK = settings(max_examples=50, deadline=None, derandomize=True)
SIDE = st.integers(1, 5000)

# Of draws("resolution", 0, 0, "a", 4); other numbers would change what a resumed run sees.
RECORDED = [0.9362351339868009, 0.5825570809247657, 0.24218322800766, 0.32229320688518426]
RULES: tuple[Rule, ...] = ("released", "whole", "native")


def views(sampler: ResolutionSampler, size: tuple[int, int], count: int = 200) -> list[View]:
    return [sampler.draw(size, seed=0, epoch=epoch, sample="a") for epoch in range(count)]


@QUICK
@given(SIDE, SIDE, st.sampled_from(RULES), st.integers(16, 300), st.integers(0, 2000), st.booleans(), st.text())
def test_views_lie_in_the_picture_and_within_bounds(
    height: int, width: int, rule: Rule, low: int, span: int, random_crop: bool, sample: str
) -> None:
    sampler = ResolutionSampler(min_side=low, max_side=low + span, rule=rule, random_crop=random_crop)
    assume(low <= sampler.max_upscale * min(height, width))
    view = sampler.draw((height, width), seed=3, epoch=1, sample=sample)
    for side, resized, corner, cut in zip((height, width), view.resized, view.corner, view.size, strict=True):
        assert cut % 16 == 0
        assert low // 16 * 16 <= cut <= low + span
        assert 0 <= corner <= resized - cut
        assert low <= resized <= max(side, side * low / min(height, width) + 0.5)
    # One factor for both sides: the aspect ratio stays, up to rounding to whole pixels.
    assert abs(view.resized[0] * width - view.resized[1] * height) <= (height + width) / 2 + 1e-6


@QUICK
@given(st.integers(64, 3000), st.integers(64, 3000))
def test_whole_pictures_lose_less_than_a_patch_unless_they_are_strips(height: int, width: int) -> None:
    view = ResolutionSampler(min_side=64, max_side=512, rule="whole").draw((height, width), seed=0, epoch=0, sample="x")
    if max(height, width) * 64 <= min(height, width) * 512:
        assert all(0 <= resized - cut < 16 for resized, cut in zip(view.resized, view.size, strict=True))
        assert max(view.resized) <= 512
    else:
        assert min(view.resized) == 64
        assert max(view.size) == 512


def test_released_factors_are_the_smaller_of_two_unless_too_small() -> None:
    """A square S, minimum m: the smaller of two uniform factors in [m / S, 1], whose mean is a third of the way up."""
    sides = [view.resized[0] for view in views(ResolutionSampler(min_side=100, max_side=4000), (1000, 1000), 2000)]
    assert statistics.mean(sides) == pytest.approx(400, abs=20)  # 900 / sqrt(18 * 2000) = 4.7 is one deviation
    assert min(sides) < 110
    # Here most smaller factors make the short side too small; the larger is at least 100 / 104.
    strips = views(ResolutionSampler(min_side=100, max_side=4000), (104, 1000))
    assert all(view.resized[0] >= 100 and view.resized[1] >= 961 for view in strips)


def test_whole_factors_are_uniform_between_the_bounds() -> None:
    sides = [view.resized[1] for view in views(ResolutionSampler(min_side=64, max_side=512, rule="whole"), (600, 800))]
    assert min(sides) < 105  # 64 * 800 / 600 = 85 is the least
    assert max(sides) > 490
    assert statistics.mean(sides) == pytest.approx((85 + 512) / 2, abs=35)  # 427 / sqrt(12 * 200) = 8.7


def test_native_views_are_as_found_and_differ_in_place_alone() -> None:
    sampler = ResolutionSampler(min_side=64, max_side=128, rule="native")
    found = views(sampler, (200, 300))
    assert {view.resized for view in found} == {(200, 300)}
    assert {view.size for view in found} == {(128, 128)}
    assert len({view.corner for view in found}) > 150
    assert {view.resized for view in views(sampler, (40, 100))} == {(64, 160)}  # a side below the minimum


def test_draws_depend_on_every_argument_and_nothing_else() -> None:
    base = draws("resolution", 0, 0, "a", 4)
    assert base == draws("resolution", 0, 0, "a", 4)
    others = [("time", 0, 0, "a"), ("resolution", 1, 0, "a"), ("resolution", 0, 1, "a"), ("resolution", 0, 0, "b")]
    assert len({tuple(base), *(tuple(draws(*other, 4)) for other in others)}) == 5
    assert draws("p", 1, 10, "s", 2) != draws("p", 11, 0, "s", 2)
    assert base == pytest.approx(RECORDED, abs=1e-12)


def test_draws_are_uniform() -> None:
    values = [u for i in range(500) for u in draws("p", 0, 0, str(i), 4)]
    assert all(0 <= u < 1 for u in values)
    assert statistics.mean(values) == pytest.approx(0.5, abs=0.03)  # 1 / sqrt(12 * 2000) = 0.0065
    assert statistics.variance(values) == pytest.approx(1 / 12, abs=0.01)


def test_centre_and_random_cuts() -> None:
    wide = (64, 1000)
    centre = views(ResolutionSampler(min_side=64, max_side=512, random_crop=False), wide)
    assert all(view.corner[1] == (view.resized[1] - view.size[1]) // 2 for view in centre)
    drawn = {view.corner[1] for view in views(ResolutionSampler(min_side=64, max_side=512), wide)}
    assert len(drawn) > 50


def test_small_pictures_grow_up_to_the_limit_and_no_further() -> None:
    sampler = ResolutionSampler(min_side=64, max_side=512, max_upscale=1.5)
    assert sampler.draw((43, 86), seed=0, epoch=0, sample="emoji").resized == (64, 128)
    with pytest.raises(InputError, match=r"emoji: 42 x 86 pixels would have to grow by 1\.52 .* the limit is 1\.5"):
        sampler.draw((42, 86), seed=0, epoch=0, sample="emoji")


@pytest.mark.parametrize(
    ("size", "frames", "count"), [((256, 256), 1, 256), ((512, 64), 4, 128), ((64, 64), 33, 128), ((79, 80), 7, 20)]
)
def test_tokens_of_a_size(size: tuple[int, int], frames: int, count: int) -> None:
    assert token_count(size, frames) == count


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"min_side": 8}, "a patch"),
        ({"min_side": 600}, "min_side <= max_side"),
        ({"rule": "free"}, "one of released, whole, native"),
        ({"max_upscale": 0.5}, "at least 1"),
        ({"max_upscale": float("nan")}, "at least 1"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(choices: dict[str, object], message: str) -> None:
    low, high = IMAGE_SIDES[1]
    with pytest.raises(InputError, match=message):
        ResolutionSampler(**{"min_side": low, "max_side": high, **choices})  # type: ignore[arg-type]


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(InputError, match="s: a picture of 0 x 9 pixels"):
        ResolutionSampler(min_side=64, max_side=512).draw((0, 9), seed=0, epoch=0, sample="s")
