"""What FP8 asks of shapes, and which layers get it.

In FP8 run the four linear layers of a block: qkv, the attention's output, and both of the MLP. In bfloat16 stay

- attention itself: FP8 kernels do not take heads of 72 channels;
- the patch and latent embeddings and the output layer to patches: they read and write pixels;
- the pooling head and the posterior layer: their outputs are compared and sampled, and they are 1% of the work;
- norms, rotations and the residual stream;
- the first and last blocks of each stack, if `num_layers_at_start_in_bf16` / `..._end_in_bf16` say so.

Transformer Engine takes a matrix if its last axis and the product of its other axes are multiples of 16, forward and
backward. So packed token counts are padded (`tokenizer.megatron.packing`), and widths are checked here. so400m is legal
undivided; split over 2 tensor ranks its MLP has 2152 = 134.5 x 16 channels and is not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokenizer.errors import InputError
from tokenizer.model.config import ATokenConfig, TransformerConfig

if TYPE_CHECKING:
    from tokenizer.megatron.config import ParallelConfig

FP8_MULTIPLE = 16


def block_linears(stack: TransformerConfig, ranks: int) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linear layers of a block on one of `ranks` tensor ranks, by Megatron's names."""
    width, hidden = stack.width, stack.mlp_width
    return {
        "self_attention.linear_qkv": (3 * width // ranks, width),
        "self_attention.linear_proj": (width, width // ranks),
        "mlp.linear_fc1": (hidden // ranks, width),
        "mlp.linear_fc2": (width, hidden // ranks),
    }


def check_fp8_shapes(part: str, stack: TransformerConfig, ranks: int) -> None:
    """Refuse a stack whose weights FP8 does not take.

    Raises:
        InputError: naming the first such layer and its shape on one tensor rank.
    """
    for name, shape in block_linears(stack, ranks).items():
        if any(size % FP8_MULTIPLE for size in shape):
            raise InputError(
                f"FP8 needs multiples of {FP8_MULTIPLE}, but {name} of the {part} is {shape[0]} x {shape[1]} "
                f"at tensor_model_parallel_size {ranks}; use a smaller one or no fp8_format"
            )


def fp8_layers(config: ATokenConfig, parallel: ParallelConfig) -> list[str]:
    """Names, in the Megatron model, of all layers that run in FP8; empty without `fp8_format`."""
    if parallel.fp8_format is None:
        return []
    names = []
    for part, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        if stack is not None:
            first, past = parallel.num_layers_at_start_in_bf16, stack.depth - parallel.num_layers_at_end_in_bf16
            for number in range(first, past):
                names += [f"{part}.block.layers.{number}.{name}" for name in block_linears(stack, 1)]
    return names


def fp8_recipe(parallel: ParallelConfig, *, power_of_two_scales: bool = False) -> Any:
    """Transformer Engine's recipe object for these options, to be given to `te.autocast(recipe=...)`.

    Inside a TransformerBlock Megatron enters the autocast by itself, from the same options; this is for Transformer
    Engine layers used without Megatron.

    Args:
        power_of_two_scales: of the tensorwise recipe; Megatron has no option for it.

    Raises:
        InputError: no `fp8_format`, or Transformer Engine is missing or broken.
    """
    if parallel.fp8_format is None:
        raise InputError("there is no FP8 recipe without an fp8_format; choose 'hybrid' or 'e4m3'")
    try:
        recipes = importlib.import_module("transformer_engine.common.recipe")
    except Exception as error:  # a broken build fails with anything from OSError to AssertionError
        raise InputError(
            f"FP8 needs a working Transformer Engine (pip install transformer-engine[pytorch], CUDA only): "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from None
    number_format = recipes.Format.HYBRID if parallel.fp8_format == "hybrid" else recipes.Format.E4M3
    if parallel.fp8_recipe == "tensorwise":
        recipe = recipes.Float8CurrentScaling(fp8_format=number_format)
        if power_of_two_scales:
            recipe.use_power_2_scales = True
            rounded = recipes.QParams(power_2_scale=True, amax_epsilon=0.0)
            recipe.fp8_quant_fwd_inp = recipe.fp8_quant_fwd_weight = recipe.fp8_quant_bwd_grad = rounded
        return recipe
    return recipes.DelayedScaling(
        fp8_format=number_format,
        margin=parallel.fp8_margin,
        amax_history_len=parallel.fp8_amax_history_len,
        amax_compute_algo=parallel.fp8_amax_compute_algo,
    )
