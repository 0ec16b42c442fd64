"""How a network is laid out over processes, in Megatron's own option names, and which layouts are impossible.

Everything is refused here, in one line and before any process group or parameter exists. Megatron's own checks are
assertions deep inside the construction of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenizer.errors import InputError
from tokenizer.megatron.fp8 import check_fp8_shapes
from tokenizer.model.config import ATokenConfig, TransformerConfig

MOST_MARGIN = 14
"""Powers of two between E4M3's largest number, 448, and its smallest normal one, 2^-6: with more, all is subnormal."""

OTHER_MODELS = {
    "context_parallel_size": "no token looks beyond its image, clip or asset, so there is no long context to split",
    "expert_model_parallel_size": "there are no experts",
}
"""Options for layouts that Megatron has for other models, and why they mean nothing here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """The layout of one run. Options are named as Megatron names them.

    tensor_model_parallel_size: processes that share every layer: heads and hidden channels are split.
    pipeline_model_parallel_size: 1, or 2 for encoder | decoder.
    sequence_parallel: between the layers each tensor rank holds its share of the tokens.
    use_distributed_optimizer: gradients and optimizer state are split over data-parallel ranks.
    overlap_grad_reduce / overlap_param_gather: communicate during the backward / forward pass. They need every
        parameter to take part in every step.
    transformer_impl: "local" needs nothing but torch; "transformer_engine" needs CUDA and Transformer Engine.
    bf16: bfloat16 parameters; float32 otherwise.
    fp8_format: "hybrid" (E4M3 forward, E5M2 backward) or "e4m3"; None for no FP8.
    fp8_recipe: "delayed" scales from the history of maxima, "tensorwise" from the tensor itself.
    fp8_margin / fp8_amax_history_len / fp8_amax_compute_algo: of the delayed recipe.
    num_layers_at_start_in_bf16 / num_layers_at_end_in_bf16: blocks of each stack, encoder and decoder, kept from FP8.
    recompute_granularity / recompute_method / recompute_num_layers: activations computed again in the backward pass.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    bf16: bool = False
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    fp8_recipe: Literal["delayed", "tensorwise"] = "delayed"
    fp8_margin: int = 0
    fp8_amax_history_len: int = 1024
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_fp8()
        if (self.recompute_granularity == "full") != (self.recompute_method is not None):
            raise InputError(
                "recompute_method and recompute_num_layers belong to recompute_granularity 'full', and it needs both"
            )
        if (self.recompute_method is None) != (self.recompute_num_layers is None):
            raise InputError("recompute_method and recompute_num_layers are given together or not at all")
        if self.recompute_num_layers is not None and self.recompute_num_layers < 1:
            raise InputError(f"recompute_num_layers must be at least 1, got {self.recompute_num_layers}")

    def _check_sizes(self) -> None:
        if self.tensor_model_parallel_size < 1:
            raise InputError(f"tensor_model_parallel_size must be at least 1, got {self.tensor_model_parallel_size}")
        if self.pipeline_model_parallel_size not in (1, 2):
            raise InputError(
                f"pipeline_model_parallel_size must be 1, or 2 for encoder | decoder, "
                f"got {self.pipeline_model_parallel_size}"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise InputError(
                "sequence_parallel splits tokens over tensor ranks: tensor_model_parallel_size must be > 1"
            )
        if self.overlap_param_gather and not (self.use_distributed_optimizer and self.overlap_grad_reduce):
            raise InputError("overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce")

    def _check_fp8(self) -> None:
        if not 0 <= self.fp8_margin <= MOST_MARGIN:
            raise InputError(
                f"fp8_margin must be from 0 to {MOST_MARGIN}, got {self.fp8_margin}: powers of two to spare"
            )
        kept = self.num_layers_at_start_in_bf16, self.num_layers_at_end_in_bf16
        if min(kept) < 0:
            raise InputError(f"num_layers_at_start_in_bf16 and ..._end_in_bf16 must not be negative, got {kept}")
        if self.fp8_format is None:
            if any(kept):
                raise InputError("num_layers_at_start_in_bf16 and num_layers_at_end_in_bf16 need an fp8_format")
            return
        if self.transformer_impl != "transformer_engine":
            raise InputError("fp8_format needs transformer_impl 'transformer_engine'; the local layers have no FP8")
        if not self.bf16:
            raise InputError("fp8_format needs bf16: true; FP8 layers stand among bfloat16 ones")
        if self.fp8_recipe == "delayed" and any(kept):
            raise InputError("the delayed fp8_recipe runs all blocks in FP8; keep some in bf16 with 'tensorwise'")

    @property
    def model_ranks(self) -> int:
        """Processes that hold one copy of the model together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def token_multiple(self) -> int:
        """What the packed token count is padded to a multiple of (see `tokenizer.megatron.packing`)."""
        share = self.tensor_model_parallel_size if self.sequence_parallel else 1
        return share * (16 if self.fp8_format is not None else 1)


def check_layout(config: ATokenConfig, parallel: ParallelConfig, world_size: int) -> None:
    """Refuse a layout that this model or this many processes cannot have.

    Raises:
        InputError: naming the option, the number it does not fit and what would.
    """
    if world_size % parallel.model_ranks:
        raise InputError(
            f"{world_size} processes cannot hold whole copies of a model over {parallel.model_ranks} "
            f"(tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size}); "
            f"start a multiple of {parallel.model_ranks}"
        )
    for part, stack in stacks(config).items():
        _check_stack(part, stack, parallel)
    if parallel.pipeline_model_parallel_size == 2:
        if config.decoder is None:
            raise InputError(f"{config.name} has no decoder to be the second pipeline stage; use 1 stage")
        if config.skip is not None:
            raise InputError(
                f"{config.name} has linear codes that encoder and decoder share; use pipeline_model_parallel_size 1"
            )


def _check_stack(part: str, stack: TransformerConfig, parallel: ParallelConfig) -> None:
    ranks = parallel.tensor_model_parallel_size
    if stack.depth == 0:
        raise InputError(f"the {part} has no blocks; Megatron needs at least one")
    for name, size in (("heads", stack.heads), ("mlp_width", stack.mlp_width)):
        if size % ranks:
            raise InputError(f"{name} {size} of the {part} is not divisible by tensor_model_parallel_size {ranks}")
    if parallel.recompute_method == "uniform" and stack.depth % (parallel.recompute_num_layers or 1):
        raise InputError(
            f"the {part}'s {stack.depth} blocks are not divisible by recompute_num_layers "
            f"{parallel.recompute_num_layers}, as recompute_method 'uniform' needs it"
        )
    kept = parallel.num_layers_at_start_in_bf16 + parallel.num_layers_at_end_in_bf16
    if parallel.fp8_format is not None:
        if kept >= stack.depth:
            raise InputError(f"{kept} blocks kept in bf16 leave none of the {part}'s {stack.depth} for FP8")
        check_fp8_shapes(part, stack, ranks)


def stacks(config: ATokenConfig) -> dict[str, TransformerConfig]:
    """The transformers of a model by the name of their part."""
    both = {"encoder": config.encoder, "decoder": config.decoder}
    return {part: stack for part, stack in both.items() if stack is not None}
