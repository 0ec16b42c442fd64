"""Exact resumption of Megatron's distributed optimizer over torch's AdamW.

With Transformer Engine's or apex's Adam it resumes. Where neither is installed it uses torch's, which counts the steps
of each parameter in the state, and (0.16 to 0.19) it

- asserts that there are steps, in an optimizer that has not taken any yet;
- looks for a step among the moments it has read, where it did not write one (`KeyError: 'step'`);
- gives all parameters one and the same tensor as their step, so that the next step counts once for each of them.

Each is set right here, around Megatron's own loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


def prepared(optimizer: Any) -> None:
    """Give a fresh optimizer the state of step 0, which loading overwrites."""
    for _, adam in _with_torch_adam(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                adam.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@contextmanager
def repaired(optimizer: Any) -> Iterator[None]:
    """Inside, `optimizer.load_state_dict` works; on leaving, every parameter counts its own steps."""
    distributed = _with_torch_adam(optimizer)
    if not distributed:
        yield
        return
    kind = type(distributed[0][0])
    put = kind._set_main_param_and_optimizer_states

    def put_with_step(self: Any, model_parameter: Any, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        put(self, model_parameter, {"step": state["step"], **tensors})

    with patch.object(kind, "_set_main_param_and_optimizer_states", put_with_step):
        yield
    for _, adam in distributed:
        for state in adam.state.values():
            state["step"] = state["step"].clone()


def _with_torch_adam(optimizer: Any) -> list[tuple[Any, torch.optim.Optimizer]]:
    """The distributed ones among Megatron's (chained) optimizers that stand on torch's Adam."""
    if optimizer is None:
        return []
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        (part, part.optimizer)
        for part in parts
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.Adam)
    ]
