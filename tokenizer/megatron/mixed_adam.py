"""Checkpoints of Megatron's bfloat16 optimizer (not the distributed one) where some parameters are float32.

Its groups have parameters of one dtype each. It keeps a list of float32 copies by group, and (0.16 to 0.19)

- looks moments up by the number of their parameter among all, in a list of the bfloat16 ones alone (`Optimizer shape
  does not match model shape`);
- drops groups without copies on the way to a checkpoint and back, and then takes a group's copies for another's
  (`Cannot merge two lists with different lengths`). A pipeline stage may have such groups too.

Each is set right here, around Megatron's own writing and reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_COPIES = "fp32_from_fp16_params"


@contextmanager
def all_numbered(optimizer: Any) -> Iterator[None]:
    """Inside, `optimizer.sharded_state_dict` finds the weights of float32 parameters too."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    mixed = [part for part in parts if hasattr(part, "float16_groups")]
    kept = [part.float16_groups for part in mixed]
    for part in mixed:
        pairs = zip(part.float16_groups, part.fp32_from_fp32_groups, strict=True)
        part.float16_groups = [[*bfloat16, *float32] for bfloat16, float32 in pairs]
    try:
        yield
    finally:
        for part, groups in zip(mixed, kept, strict=True):
            part.float16_groups = groups


def by_number(state: dict[str, Any]) -> dict[str, Any]:
    """A sharded state with the copies of each group under its number; any other state as it is."""
    if _COPIES not in state:
        return state
    return {**state, _COPIES: {number: group for number, group in enumerate(state[_COPIES]) if group}}


def in_order(state: dict[str, Any]) -> dict[str, Any]:
    """What `by_number` was given, of what was read in its place."""
    if _COPIES not in state:
        return state
    groups = range(len(state["optimizer"]["param_groups"]))
    return {**state, _COPIES: [state[_COPIES].get(number, []) for number in groups]}
