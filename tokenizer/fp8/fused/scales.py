"""Scales of all tensors that a model rounds to FP8, kept on the device and moved on once a step.

The delayed recipe scales by the largest magnitudes of the last steps, so that a pass rounds what it computes while it
computes it. The tensorwise recipe runs each pass twice, the first time for the largest magnitude alone; under both
recipes that is also what happens to a tensor of which nothing is known yet. Weights are scaled by their own largest
value always: they are rounded once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.fp8.config import FP8Config
from tokenizer.fp8.emulate import E4M3, E5M2, scale_for

BLOCK_LAYERS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
"""The linear layers of a block. A block has eight tensors: their inputs, then the gradients of their outputs."""

TENSORS = 2 * len(BLOCK_LAYERS)

Launch = Callable[[Tensor, Tensor], object]
"""Runs a pass with (scale, largest): rounds by the first, and raises the second to the largest magnitude it saw."""


class Scales:
    """Scales and histories of all tensors of some blocks.

    Args:
        config: recipe, format, length of histories, margin.
        blocks: names.

    Attributes:
        kinds: the FP8 type of each tensor.
        history: [tensors, length] float32, the largest magnitude of each step, newest first; zeros are unknown.
        step: another number whenever weights may have changed.
        ignored: a scalar for magnitudes that nobody asks for.
    """

    def __init__(self, config: FP8Config, blocks: Sequence[str], device: torch.device) -> None:
        self.config = config
        self.names = [
            f"{block}.{layer}.{role}" for block in blocks for role in ("input", "gradient") for layer in BLOCK_LAYERS
        ]
        gradient = E5M2 if config.fp8_format == "hybrid" else E4M3
        self.kinds = ([E4M3] * len(BLOCK_LAYERS) + [gradient] * len(BLOCK_LAYERS)) * len(blocks)
        self.history = torch.zeros(len(self.kinds), config.fp8_amax_history_len, device=device)
        self.step = 0
        self._limits = torch.tensor([torch.finfo(kind).max for kind in self.kinds], device=device)
        self._newest, self._scale, self._inverse = (aligned_zeros(len(self.kinds), device) for _ in range(3))
        # Single numbers are passed to kernels many times a step; they are views of the tensors above.
        self._numbers = [tensor.unbind() for tensor in (self._newest, self._scale, self._inverse)]
        # Those that have a scale, and those whose history says so too: a first step that was broken, or all zeros, does
        # not count.
        self._known, self._sure = ([False] * len(self.kinds) for _ in range(2))
        self.ignored = torch.zeros((), device=device)

    def rounded(self, number: int, launch: Launch, *, remember: bool) -> Tensor:
        """Round tensor `number` by calling `launch`, once or twice.

        Args:
            remember: the magnitude, for later steps.

        Returns:
            The scalar that the rounded numbers are to be multiplied by. It stays until the step is over.
        """
        newest, scale, inverse = (numbers[number] for numbers in self._numbers)
        delayed = self.config.fp8_recipe == "delayed"
        if delayed and self._known[number]:
            launch(scale, newest if remember else self.ignored)
            return inverse
        largest = torch.zeros_like(newest)
        launch(torch.ones_like(scale), largest)
        own = self.scale_for(largest, self._limits[number])
        launch(own, self.ignored)
        if remember:
            torch.maximum(newest, largest, out=newest)
        if not (delayed and remember):
            return own.reciprocal()
        # All micro-batches of a step share a scale: what the first one found.
        scale.copy_(own)
        inverse.copy_(own.reciprocal())
        self._known[number] = True
        return inverse

    @torch.no_grad()
    def move_on(self) -> None:
        """A step is over: remember its magnitudes, the largest of all processes, and scale the next one by them.

        Tensors that no task of the step had, and ones that were not finite, leave their history as it is.
        """
        self.step += 1
        if self.config.fp8_recipe != "delayed":
            return
        newest = self._newest.contiguous()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(newest, dist.ReduceOp.MAX)
        moved = torch.cat([newest[:, None], self.history[:, :-1]], dim=1)
        seen = newest.isfinite() & (newest > 0)
        self.history.copy_(torch.where(seen[:, None], moved, self.history))
        self._newest.zero_()
        self._from_history()
        if any(known and not sure for known, sure in zip(self._known, self._sure, strict=True)):
            self._look_at_history()

    def scale_for(self, largest: Tensor, limit: Tensor | float, margin: int = 0) -> Tensor:
        """As `tokenizer.fp8.emulate.scale_for`, by this configuration."""
        return scale_for(largest, limit, margin, power_of_two=self.config.power_of_two_scales)

    def forget_weights(self) -> None:
        """Weights were loaded: what was rounded of them is of no use."""
        self.step += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Histories [length] by tensor, on the CPU."""
        return dict(zip(self.names, self.history.to("cpu", copy=True).unbind(), strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            InputError: a state of other layers, of another backend or of another length of history.
        """
        length = self.config.fp8_amax_history_len
        odd = sorted(state.keys() ^ self.names)
        odd += [name for name in self.names if not odd and getattr(state[name], "shape", None) != (length,)]
        if odd:
            raise InputError(
                f"the FP8 histories of the checkpoint do not fit ({odd[0]}); choose its fp8 options: backend, layers "
                "and fp8_amax_history_len"
            )
        self.history.copy_(torch.stack([state[name] for name in self.names]))
        self._look_at_history()
        self._newest.zero_()
        self._from_history()

    def _look_at_history(self) -> None:
        """The one place that waits for the device: after a first step, and no more once all its tensors are known."""
        self._sure = (self.history.amax(1) > 0).tolist()
        self._known = list(self._sure)

    def _from_history(self) -> None:
        before = self.history.amax(1) if self.config.fp8_amax_compute_algo == "max" else self.history[:, 0]
        self._scale.copy_(self.scale_for(before, self._limits, self.config.fp8_margin))
        self._inverse.copy_(self._scale.reciprocal())


def aligned_zeros(count: int, device: torch.device) -> Tensor:
    """[count] float32 zeros, 16 bytes apart: products read a scale from such an address alone."""
    return torch.zeros(count, 4, device=device)[:, 0]
