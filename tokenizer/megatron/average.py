"""The averaged parameters of a run, kept where the optimizer keeps the parameters that it moves.

Imports Megatron: call `tokenizer.megatron.engine.load_megatron` first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tokenizer.megatron.optimizer import Piece
from tokenizer.training.curriculum.optimization import averaging_weight


class ShareAverage:
    """Exponential moving average of the parameters on this process, as `tokenizer.training.curriculum` defines it.

    It follows what the optimizer moves, in float32: a ten-thousandth of a change is lost in bfloat16 parameters. With
    the distributed optimizer each data-parallel rank averages its pieces, and `whole` puts them together; otherwise
    each keeps its own copy of all, 4 bytes a parameter.

    Args:
        parameters: trained ones by their names in a `MegatronTrained`. pieces: of them, on this process.
        decay: how much of the average stays in each step. warmup: steps in which less does.
        group: processes that the pieces are shared out among; None where each has all of them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        pieces: Sequence[Piece],
        decay: float,
        warmup: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.parameters, self.decay, self.warmup, self.group = parameters, decay, warmup, group
        self.pieces = {piece.own: piece for piece in pieces}
        self.values = {name: piece.main.detach().clone() for name, piece in self.pieces.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after step number `step`, from 0."""
        values = list(self.values.values())
        now = [piece.main.detach() for piece in self.pieces.values()]
        torch._foreach_lerp_(values, now, averaging_weight(self.decay, step, self.warmup))

    def whole(self) -> dict[str, Tensor]:
        """Averages of this process's share, float32, by the names of `parameters`; all of the group have to call it."""
        return {name: self._whole(name) for name in self.parameters}

    @torch.no_grad()
    def load(self, whole: Mapping[str, Tensor]) -> None:
        """Go on from what `whole` gave, at any layout."""
        for name, value in self.values.items():
            value.copy_(self.pieces[name].of(whole[name]))

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, the parameters are the averages; afterwards they are as before, bit for bit. As `whole`."""
        kept = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._fill(self._whole)
        try:
            yield
        finally:
            self._fill(kept.__getitem__)

    @torch.no_grad()
    def _fill(self, value_of: Callable[[str], Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(value_of(name))

    def _whole(self, name: str) -> Tensor:
        if self.group is None:
            return self.values[name]
        parameter = self.parameters[name]
        flat = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
        if name in self.values:
            self.pieces[name].of(flat).copy_(self.values[name])
        # Every number is in one process, and all others add zeros to it: nothing is rounded.
        dist.all_reduce(flat, group=self.group)
        return flat.view(parameter.shape)
