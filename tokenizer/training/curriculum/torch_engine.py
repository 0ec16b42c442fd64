"""The plain torch engine: one process, data parallel (DDP), or with parameters shared out (FSDP2).

In DDP, gradients are added up once for each optimizer step, in a few flat pieces: the tasks of a step touch different
parameters, which torch's own wrapper, made for one backward pass in each step, would not add up right. In FSDP2 they
are added up after each micro-batch: that no process ever holds a whole gradient is the point of it.

Parameters stay float32. With bf16, matrix products and attention run in bfloat16 (autocast); with fp8, linear layers of
the blocks in FP8 (`tokenizer.fp8`), under the same names of parameters, so that models and checkpoints are the same.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokenizer.errors import InputError
from tokenizer.fp8 import convert
from tokenizer.model.transformer import Attention
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.curriculum.engine import Outcome
from tokenizer.training.curriculum.model import Imitation, Outputs, TrainedModel, save_trained
from tokenizer.training.curriculum.objective import Objective
from tokenizer.training.curriculum.optimization import (
    Average,
    clip_gradients,
    gradient_norms,
    is_shared,
    make_optimizers,
    rate_at,
    set_rates,
)
from tokenizer.training.curriculum.preparation import Prepared
from tokenizer.training.curriculum.processes import Processes

Layout = Literal["single", "ddp", "fsdp2"]

_PIECE = 2**24
"""Numbers that travel together when gradients are added up: 64 MB."""


class TorchEngine:
    """See `tokenizer.training.curriculum.engine.Engine`.

    Args:
        model: float32, the same weights in every process; it is moved to the device.
        objective: what is minimised.
        config: optimizer, steps, precision and FP8.
        processes: all of the run.
        device: of this one.
        layout: "single" for one process alone.

    Raises:
        InputError: several processes and "single", Muon and "fsdp2", cuDNN that is not there, or FP8 that no backend
            here computes.

    Attributes:
        conversion: what computes in FP8, or None.
    """

    def __init__(
        self,
        model: TrainedModel,
        objective: Objective,
        config: RunConfig,
        processes: Processes,
        device: torch.device,
        layout: Layout,
    ) -> None:
        if layout == "single" and processes.many:
            raise InputError(f"engine is single, but there are {processes.world} processes; use ddp or fsdp2")
        if layout == "fsdp2" and config.optimizer.muon_lr is not None:
            raise InputError("optimizer.muon_lr needs whole matrices, which fsdp2 shares out; use ddp or leave it out")
        self.model = model.to(device)
        self.objective, self.config, self.processes, self.layout = objective, config, processes, layout
        self._device = device
        # Before parameters are shared out: backends take whole ones.
        self.conversion = convert(self.model, config.fp8, device) if config.fp8 is not None else None
        if config.attention == "cudnn":
            _attend_by_cudnn(self.model, device)
        if config.recompute:
            for block in self.model.stacks():
                compute_again(block)
        if config.compile:
            for block in self.model.stacks():
                block.compile()
        if layout == "fsdp2":
            share_out(self.model, device)
        self.optimizers = make_optimizers(self.model, config.optimizer, shared=layout == "fsdp2")
        self._owner = {
            parameter: number
            for number, optimizer in enumerate(self.optimizers)
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.average = Average(self.trained, config.optimizer.ema, config.optimizer.ema_warmup)

    @property
    def device(self) -> torch.device:
        return self._device

    # ------------------------------------------------------------------ a step

    def forward_backward(self, prepared: Sequence[Prepared]) -> dict[str, float]:
        names = ["loss", *(n for task in dict.fromkeys(p.task for p in prepared) for n in self.objective.names(task))]
        sums = {name: torch.zeros((), dtype=torch.float64, device=self.device) for name in names}
        # FSDP2 takes the mean over processes where the sum is wanted.
        factor = float(self.processes.world) if self.layout == "fsdp2" else 1.0
        for part in prepared:
            with self._autocast():
                outputs = self.model(part.tokens, part.task, self._generator(part.seed))
                alignment = self.model.alignment
                loss, terms = self.objective(
                    part, outputs, alignment.scale if alignment is not None else None, self.model.gaussians
                )
            if loss.requires_grad:  # where the encoder is frozen, nothing may be left that understanding trains
                (factor * loss).backward()
            sums["loss"] += loss.detach()
            for name, term in terms.items():
                sums[name] += term
        if self.layout == "ddp":
            self._add_up_gradients(self.trained.values())
        elif self.layout == "fsdp2":
            apart = [parameter for parameter in self.trained.values() if not is_shared(parameter)]
            self._add_up_gradients(apart, factor=1.0 / self.processes.world)
        found = torch.stack([sums[name] for name in names]).tolist()
        return dict(zip(names, self.processes.sum(found), strict=True))

    def clip_and_step(self, step: int, loss: float) -> Outcome:
        settings = self.config.optimizer
        rates = set_rates(self.optimizers, rate_at(step, self.config.steps, settings))
        norms = gradient_norms(self.trained.items(), self.processes, shared=self.layout == "fsdp2")
        # Loss and norms are the same numbers in every process, so all of them decide alike.
        done = math.isfinite(loss) and math.isfinite(norms["total"])
        if done:
            clip_gradients(self.trained.values(), norms["total"], settings.max_grad_norm)
            for optimizer in self.optimizers:
                optimizer.step()
            self.average.update(step)
        if self.conversion is not None:
            self.conversion.synchronise()
        self.model.zero_grad(set_to_none=True)
        return Outcome(done, norms, rates)

    def _add_up_gradients(self, parameters: Iterable[nn.Parameter], factor: float = 1.0) -> None:
        """Sum gradients over processes. All of them have gradients of the same parameters: their tasks are the same."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for piece in _pieces(gradients):
            flat = torch.cat([gradient.flatten() for gradient in piece])
            dist.all_reduce(flat)
            flat *= factor
            parts = flat.split([gradient.numel() for gradient in piece])
            torch._foreach_copy_(piece, [part.view_as(g) for part, g in zip(parts, piece, strict=True)])

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(seed)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    # ------------------------------------------------------------------ looking at it

    @contextmanager
    def averaged(self) -> Iterator[None]:
        self.average.swap()
        try:
            yield
        finally:
            self.average.swap()

    @torch.no_grad()
    def infer(self, tokens: SparseTokens, task: str) -> Outputs:
        with self._autocast():
            outputs: Outputs = self.model(tokens, task)
        return outputs

    # ------------------------------------------------------------------ what is kept

    def state_dict(self) -> dict[str, Any]:
        # Gathering is done by all processes, keeping by the first.
        if not (self.processes.first or self.layout == "fsdp2"):
            return {}
        moments = self._moments()
        whole = functools.partial(_whole, keep=self.processes.first)
        buffers = [(name, value) for name, value in self.model.named_buffers() if _is_kept(self.model, name)]
        state: dict[str, dict[str, Any]] = {
            "fp8": self.conversion.state_dict() if self.conversion is not None else {},
            "model": {name: whole(parameter) for name, parameter in self.model.named_parameters()},
            "average": {name: whole(value) for name, value in self.average.values.items()},
            "buffers": {name: whole(value) for name, value in buffers},
            "optimizer": {
                name: {kind: whole(value) for kind, value in found.items()} for name, found in moments.items()
            },
        }
        # What is frozen is its own average, so that "average" is a whole model.
        state["average"] = {**state["model"], **state["average"]}
        return state if self.processes.first else {}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        _check_names(dict(self.model.named_parameters()), state["model"])
        for name, parameter in self.model.named_parameters():
            _fill(parameter.detach(), state["model"][name])
        for name, value in self.average.values.items():
            _fill(value, state["average"][name])
        for name, buffer in self.model.named_buffers():
            if name in state["buffers"]:
                buffer.copy_(state["buffers"][name])
        for name, parameter in self.trained.items():
            if name in state["optimizer"]:
                self._optimizer_of(parameter).state[parameter] = {
                    kind: self._count_like(value, parameter) if kind == "step" else _like(value, parameter)
                    for kind, value in state["optimizer"][name].items()
                }
        if self.conversion is not None:
            self.conversion.load_state_dict(state.get("fp8", {}))

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizers remember of each parameter that has been trained, by name."""
        found = {name: self._optimizer_of(parameter).state.get(parameter) for name, parameter in self.trained.items()}
        return {name: dict(state) for name, state in found.items() if state}

    def _count_like(self, count: Tensor, parameter: nn.Parameter) -> Tensor:
        """A count of steps where the optimizer looks for it: the fused one on the device, the others on the host."""
        fused = self._optimizer_of(parameter).defaults.get("fused")
        return count.to(parameter.device if fused else "cpu", copy=True)

    def _optimizer_of(self, parameter: nn.Parameter) -> torch.optim.Optimizer:
        return self.optimizers[self._owner[parameter]]

    def save_model(self, folder: Path) -> None:
        state = self.state_dict()
        if not self.processes.first:
            return
        model = self.model
        if self.layout == "fsdp2":
            model = _plain_copy(self.model)
            model.load_state_dict({**state["buffers"], **state["average"]}, strict=False)
            save_trained(model, folder)
            return
        with self.averaged():
            save_trained(model, folder)


def _attend_by_cudnn(model: TrainedModel, device: torch.device) -> None:
    if device.type == "cuda" and not torch.backends.cudnn.is_available():
        raise InputError("attention is cudnn, but this torch comes without cuDNN; use attention=varlen")
    for module in model.modules():
        if isinstance(module, Attention):
            module.cudnn = True


def compute_again(block: nn.Module) -> None:
    """Keep of the block what goes in alone. Its `forward` is exchanged: a module around it would rename parameters."""
    # Nothing in a block draws random numbers.
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def share_out(model: TrainedModel, device: torch.device) -> None:
    """Shard parameters (FSDP2), a block at a time, and what is left with the whole model.

    Over the processes of a node, where torchrun started several on each of several: every node has a copy then, and
    blocks are gathered over its own fast links. Otherwise over all processes.

    The latter too is given back after each forward pass, which is not FSDP2's default: it would stay gathered, until
    the next way back, after a pass that has none, and checkpoints and averages would be of what was gathered then.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world, of_node = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 1 < of_node < world and world % of_node == 0:
        mesh = init_device_mesh(device.type, (world // of_node, of_node), mesh_dim_names=("nodes", "of node"))
    else:
        mesh = init_device_mesh(device.type, (world,))
    for block in model.stacks():
        fully_shard(block, mesh=mesh)
    # Scalars, the scale of the scores, cannot be shared out.
    scalars = {p for p in model.parameters() if p.ndim == 0}
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)


def _plain_copy(model: TrainedModel) -> TrainedModel:
    """A model of the same sizes with parameters of its own, none of them shared out."""
    from tokenizer.gaussians.decoder import GaussianDecoder
    from tokenizer.model.atoken import ATokenNetwork
    from tokenizer.text.alignment import TextAlignment

    return TrainedModel(
        ATokenNetwork(model.network.config),
        TextAlignment(model.alignment.config) if model.alignment is not None else None,
        GaussianDecoder(model.gaussians.config) if model.gaussians is not None else None,
        Imitation(model.imitation.in_features, model.imitation.out_features) if model.imitation is not None else None,
    )


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of about `_PIECE` numbers."""
    piece: list[Tensor] = []
    size = 0
    for tensor in tensors:
        piece.append(tensor)
        size += tensor.numel()
        if size >= _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _whole(tensor: Tensor, *, keep: bool) -> Tensor:
    """A tensor on the CPU, gathered where it is shared out; a copy, so that training may go on.

    Args:
        keep: otherwise the process only helps to gather: a node has no room for as many copies as it has processes.
    """
    gather: Any = getattr(tensor, "full_tensor", None)
    whole: Tensor = tensor.detach() if gather is None else gather().detach()
    return whole.to("cpu", copy=True) if keep else whole.new_empty(0)


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as `parameter` is: on its device, shared out as it is."""
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return whole.to(parameter.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(whole.to(mesh.device_type, copy=True), mesh, placements, src_data_rank=None)


def _fill(target: Tensor, whole: Tensor) -> None:
    target.copy_(_like(whole, target))


def _is_kept(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf not in model.get_submodule(owner)._non_persistent_buffers_set


def _check_names(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    odd = sorted(own.keys() ^ found.keys())
    odd += sorted(name for name in own.keys() & found.keys() if own[name].shape != found[name].shape)
    if odd:
        raise InputError(
            f"the checkpoint is of another model: {', '.join(odd[:3])} missing, unknown or of another shape"
        )
