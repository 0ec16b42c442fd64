"""Packed token counts that FP8 takes: rows of zeros behind, cut off again, layer by layer.

The gradient of a weight sums over tokens, and there FP8 wants a multiple of 16. Zeros change no largest value and so no
scale, add nothing to the sum, and are in no result: padded and unpadded results are equal. Padding inside each layer,
rather than once for a stack as Megatron's engine does, is what keeps that exact: tokens that pass through attention and
norms have values of their own, and scales would follow them. Batches that are a multiple of 16 already copy nothing,
as pictures of 64 x 64 pixels and their multiples are.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tokenizer.megatron.fp8 import FP8_MULTIPLE
from tokenizer.megatron.rows import pad_rows, padded_count


def in_padded_rows(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(x) for x [N, C], which the layer sees as [M, C] with M the next multiple of 16."""
    count = x.shape[0]
    padded = pad_rows(x, padded_count(count, FP8_MULTIPLE))
    result = layer(padded)
    return result if padded is x else result[:count]
