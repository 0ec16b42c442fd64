"""The size at which a training step sees a picture or clip: drawn anew each epoch, at its own aspect ratio.

Three rules share the bounds (sides in pixels, PAPER 3: "64->512"):

    released    the random branch of FORMAT 3: a factor for each side, uniform from what brings that side to the minimum
                up to 1; the smaller one if both sides stay above the minimum with it, else the larger one. What exceeds
                the maximum is cropped away, so a large picture is often seen in part, in full detail.
    whole       one factor, uniform from what brings the shorter side to the minimum up to what brings the longer side
                to the maximum (at most 1). The whole picture is seen, as captions need it, but for strips longer than
                maximum / minimum, whose ends are cropped.
    native      as found, larger only where a side lies below the minimum. What exceeds the maximum is cropped away:
                detail is that of the source, for sets that were stored at the scale that matters.

The sizes are free after resizing and whole patches after cropping. Draws are a function of seed, epoch and sample
alone: no generator, no state, the same on any number of workers and after any resume. They need the size of a picture,
not its pixels, so the number of tokens is known before anything is decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tokenizer.errors import InputError
from tokenizer.patches import PATCH_SIZE, PatchSize

Size = tuple[int, int]
"""Rows and columns in pixels."""

Rule = Literal["released", "whole", "native"]

IMAGE_SIDES: Mapping[int, Size] = {1: (64, 512), 2: (64, 1024), 3: (64, 2048), 4: (64, 2048)}
"""Smallest and largest side of images by stage of the curriculum (PAPER 3, Table 2)."""

VIDEO_SIDES: Mapping[int, Size] = {2: (64, 512), 3: (64, 1024), 4: (64, 1024)}
"""The same for video."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What of a picture is seen: resize it to `resized`, then cut `size` out at `corner`.

    resized: rows and columns after resizing, free.
    corner: row and column of the upper left pixel of the cut.
    size: rows and columns of the cut, whole patches.
    """

    resized: Size
    corner: Size
    size: Size


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolutionSampler:
    """Draws the view of a sample.

    min_side / max_side: bounds of both sides in pixels, at least one patch.
    rule: see the module text.
    random_crop: draw where to cut instead of the centre.
    max_upscale: a picture that must grow to reach the minimum grows at most by this factor; the released code has no
        limit. More is refused, since what training would learn then is the resampling filter.
    patch_size: frames, rows and columns of a token.
    """

    min_side: int
    max_side: int
    rule: Rule = "released"
    random_crop: bool = True
    max_upscale: float = 2.0
    patch_size: PatchSize = PATCH_SIZE

    def __post_init__(self) -> None:
        patch = max(self.patch_size[1:])
        if not patch <= self.min_side <= self.max_side:
            raise InputError(
                f"sides must satisfy {patch} (a patch) <= min_side <= max_side, got {self.min_side} and {self.max_side}"
            )
        if self.rule not in get_args(Rule):
            raise InputError(f"rule must be one of {', '.join(get_args(Rule))}, got '{self.rule}'")
        if not self.max_upscale >= 1:
            raise InputError(f"max_upscale must be at least 1, got {self.max_upscale}")

    def draw(self, size: Size, *, seed: int, epoch: int, sample: str) -> View:
        """The view of one sample in one epoch.

        Args:
            size: rows and columns of the picture or of the frames of a clip, in pixels.
            seed: of the run.
            epoch: how many times the sample has been seen before.
            sample: its identifier, the same in every epoch.

        Raises:
            InputError: no pixels, or a picture so small that it would have to grow by more than `max_upscale`.
        """
        height, width = size
        if min(size) < 1:
            raise InputError(f"{sample}: a picture of {height} x {width} pixels has no view")
        needed = self.min_side / min(size)
        if needed > self.max_upscale:
            raise InputError(
                f"{sample}: {height} x {width} pixels would have to grow by {needed:.3g} to have sides of "
                f"{self.min_side}; the limit is {self.max_upscale:g}: leave it out, or change min_side or max_upscale"
            )
        first, second, down, across = draws("resolution", seed, epoch, sample, 4)
        resized = self._resized(size, first, second)
        target = self._cut(resized)
        spare = (resized[0] - target[0], resized[1] - target[1])
        corner = (spare[0] // 2, spare[1] // 2)
        if self.random_crop:
            corner = (int(down * (spare[0] + 1)), int(across * (spare[1] + 1)))
        return View(resized=resized, corner=corner, size=target)

    def _resized(self, size: Size, first: float, second: float) -> Size:
        if self.rule == "native":
            return self._scaled(size, max(1.0, self.min_side / min(size)))
        return self._released(size, first, second) if self.rule == "released" else self._whole(size, first)

    def _released(self, size: Size, first: float, second: float) -> Size:
        lows = [self.min_side / side for side in size]
        if max(lows) > 1:
            return self._scaled(size, max(lows))  # nothing to draw: it must grow to the minimum
        factors = [low + (1 - low) * u for low, u in zip(lows, (first, second), strict=True)]
        small = self._scaled(size, min(factors))
        return small if min(small) > self.min_side else self._scaled(size, max(factors))

    def _whole(self, size: Size, u: float) -> Size:
        low, high = self.min_side / min(size), min(1.0, self.max_side / max(size))
        return self._scaled(size, max(low, low + (high - low) * u))

    def _scaled(self, size: Size, factor: float) -> Size:
        # Bounded below, lest a factor that reaches the minimum but for the last bit round to less.
        return max(self.min_side, round(size[0] * factor)), max(self.min_side, round(size[1] * factor))

    def _cut(self, resized: Size) -> Size:
        rows, columns = (
            min(side, self.max_side) // patch * patch for side, patch in zip(resized, self.patch_size[1:], strict=True)
        )
        return rows, columns


def token_count(size: Size, frames: int = 1, patch_size: PatchSize = PATCH_SIZE) -> int:
    """Tokens of a picture or clip whose incomplete patches are dropped, as in released training (FORMAT 2).

    Args:
        size: rows and columns in pixels, as in `View.size`.
        frames: 1 for a picture; fewer than a patch has are filled up to one.
        patch_size: frames, rows and columns of a token.
    """
    steps = max(1, frames // patch_size[0])
    return steps * (size[0] // patch_size[1]) * (size[1] // patch_size[2])


def draws(purpose: str, seed: int, epoch: int, sample: str, count: int) -> list[float]:
    """Numbers uniform in [0, 1) that depend on the arguments alone: not on order, workers, platform or version.

    Args:
        purpose: what is drawn; the same sample gets independent numbers for each purpose.
        seed, epoch, sample: as for `ResolutionSampler.draw`.
        count: how many numbers, at most 8.
    """
    key = f"{purpose}\0{seed}\0{epoch}\0{sample}".encode(errors="surrogatepass")
    digest = hashlib.blake2b(key, digest_size=8 * count).digest()
    # 53 bits are what a float holds; more could round up to 1.
    return [(int.from_bytes(digest[8 * i : 8 * i + 8], "big") >> 11) * 2.0**-53 for i in range(count)]
