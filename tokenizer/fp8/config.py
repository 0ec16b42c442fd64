"""The switch: `fp8: null` in YAML is bfloat16, `fp8: {}` FP8 with these defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tokenizer.errors import InputError
from tokenizer.megatron.config import ParallelConfig

Backend = Literal["transformer_engine", "torchao", "triton", "emulated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8Config:
    """How linear layers compute in FP8. Options that Megatron has are named and checked as its are.

    fp8_format: "hybrid" (E4M3 for activations and weights, E5M2 for gradients) or "e4m3" (for all three).
    fp8_recipe: "tensorwise" scales a tensor by its own largest value; "delayed" by the largest of the last calls, which
        saves a pass over it. Tensorwise is the default because every backend has it; torchao has no delayed scaling,
        and "triton" is made for it: with tensorwise it computes most things twice.
    fp8_margin / fp8_amax_history_len / fp8_amax_compute_algo: of the delayed recipe: powers of two to spare, calls that
        are remembered, and whether their largest or the last one counts.
    power_of_two_scales: round scales down to powers of two. A number that stays the same then is rounded the same way
        from step to step; by other scales every change of the largest value moves all that it is rounded to. It costs
        range, of which there is enough. Transformer Engine has it with tensorwise alone, and inside Megatron by its
        variable NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES=1.
    fast_accumulation: which products Hopper may sum as fast as it can, with about 14 bits: "forward", as Transformer
        Engine and torchao do, or "all", backward too, where sums are as long as a batch and small gradients may be lost
        in them. Of "triton" and "torchao"; emulation sums in float32 whatever it says.
    num_layers_at_start_in_bf16 / num_layers_at_end_in_bf16: blocks of encoder and decoder that stay bfloat16.
    backend: "auto" is Transformer Engine on CUDA where it is installed, torchao where not ("triton" for the delayed
        recipe), and emulation on a CPU. "triton" is our own, fused by blocks and the fastest; torch for CUDA brings all
        it needs.
    keep: names of further layers that stay bfloat16, with * and ?: "decoder.*", "*.mlp.down".
    """

    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    fp8_recipe: Literal["tensorwise", "delayed"] = "tensorwise"
    fp8_margin: int = 0
    fp8_amax_history_len: int = 1024
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    power_of_two_scales: bool = True
    fast_accumulation: Literal["forward", "all"] = "forward"
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0
    backend: Literal["auto", "transformer_engine", "torchao", "triton", "emulated"] = "auto"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.fp8_amax_history_len < 1:
            raise InputError(f"fp8_amax_history_len must be at least 1, got {self.fp8_amax_history_len}")
        if self.backend == "torchao" and self.fp8_recipe == "delayed":
            raise InputError("torchao has no delayed scaling; use fp8_recipe tensorwise or another backend")
        if self.backend == "transformer_engine" and self.fast_accumulation == "all":
            raise InputError("Transformer Engine sums fast forward alone; set fp8.backend to triton or torchao")
        self.megatron()

    def megatron(self) -> ParallelConfig:
        """The same choices as Megatron's options: what is impossible there is refused here too.

        Raises:
            InputError: a margin that leaves no number, negative numbers of blocks, or delayed scaling with some.
        """
        return ParallelConfig(bf16=True, **self._options())

    def megatron_options(self) -> dict[str, Any]:
        """What the section `megatron:` of a run would have to say for the same choices.

        Raises:
            InputError: choices that Megatron does not have.
        """
        if self.backend not in ("auto", "transformer_engine"):
            raise InputError(
                f"fp8.backend is {self.backend}, but Megatron's FP8 is Transformer Engine's; leave it out, or train "
                "with atoken train"
            )
        if self.keep:
            raise InputError(
                "fp8.keep names layers, which Megatron cannot keep one by one; set fp8.num_layers_at_start_in_bf16 or "
                "fp8.num_layers_at_end_in_bf16, or train with atoken train"
            )
        if self.fast_accumulation == "all":
            raise InputError(
                "fp8.fast_accumulation is all, but Transformer Engine, which Megatron uses, sums fast forward alone; "
                "leave it out, or train with atoken train"
            )
        return self._options()

    def _options(self) -> dict[str, Any]:
        ours = ("backend", "keep", "power_of_two_scales", "fast_accumulation")
        shared = {name: getattr(self, name) for name in self.__slots__ if name not in ours}
        return {"transformer_impl": "transformer_engine", **shared}
