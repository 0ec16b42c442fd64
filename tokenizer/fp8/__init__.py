"""FP8 for the plain torch engine: linear layers swapped from outside; the model knows nothing of it.

    conversion = convert(network, FP8Config(), device)       # before the optimizer or FSDP2 sees the model
    ... train under torch.autocast(bfloat16) as before ...
    checkpoint["fp8"] = conversion.state_dict()              # histories of the delayed recipe; empty for tensorwise

A run does so where its file says `fp8: {}` (`atoken train --config FILE fp8={}`); `tokenizer.megatron.pretrain` takes
the same line for the options of Megatron's own FP8.

Read in this order: `config` (the switch), `layers` (which ones, and why not the others), `choose` (which backend),
`rows` (padding), `emulate` (the arithmetic, in plain torch), `backends` (torchao, Transformer Engine and our own),
`conversion`, which joins them, and `fused`, our own: blocks whose norms, activations and rounding are one pass each.
`python -m tokenizer.fp8 --model so400m-c` prints the plan. The list of layers, the options' rules and recipes are those
of `tokenizer.megatron.fp8`.
"""

from tokenizer.fp8.config import FP8Config
from tokenizer.fp8.conversion import Conversion, convert
from tokenizer.fp8.layers import LayerPlan, plan

__all__ = ["Conversion", "FP8Config", "LayerPlan", "convert", "plan"]
