"""Exact softmax attention inside segments, without padding: the one place where a kernel is chosen.

On CUDA in half precision flash-attn's or torch's varlen kernel runs all segments at once from their offsets. Everywhere
else segments of equal length, which a plan lays side by side, run as one batched scaled dot product each.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.model.plan import Segments

_HALF = (torch.float16, torch.bfloat16)


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v, each query over the keys of its own segment.

    Args:
        query: [Nq, H, Dh] in segment order.
        key, value: [Nk, H, Dh] in segment order.
        segments: offsets of queries and keys.

    Returns:
        [Nq, H, Dh], the dtype of `query`.
    """
    backend = attention_backend(query.device, query.dtype)
    if backend == "flash-attn":
        return _flash_attn(query, key, value, segments)
    if backend == "torch varlen":
        return _torch_varlen(query, key, value, segments)
    return _batched_runs(query, key, value, segments)


def attention_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The kernel `attend` uses there: "flash-attn", "torch varlen" or "torch sdpa"."""
    if torch.device(device).type == "cuda" and dtype in _HALF:
        if _flash_attn_function() is not None:
            return "flash-attn"
        if _torch_varlen_function() is not None:
            return "torch varlen"
    return "torch sdpa"


def _batched_runs(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """One batched call for each run of equal segments; all slices are views, nothing is gathered or padded."""
    outputs = []
    first_query = first_key = 0
    for count, queries, keys in segments.runs:
        past_query, past_key = first_query + count * queries, first_key + count * keys
        outputs.append(
            F.scaled_dot_product_attention(
                _heads_first(query[first_query:past_query], count),
                _heads_first(key[first_key:past_key], count),
                _heads_first(value[first_key:past_key], count),
            )
            .transpose(1, 2)
            .reshape(count * queries, *query.shape[1:])
        )
        first_query, first_key = past_query, past_key
    if not outputs:
        return torch.zeros_like(query)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _heads_first(x: Tensor, count: int) -> Tensor:
    """[count * L, H, Dh] -> [count, H, L, Dh], a view."""
    return x.unflatten(0, (count, x.shape[0] // count)).transpose(1, 2)


@functools.cache
def _flash_attn_function() -> Callable[..., Any] | None:
    # A broken build of flash-attn fails with OSError or RuntimeError at import; torch's own kernel serves then.
    try:
        function: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_varlen_func
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
    return function


@functools.cache
def _torch_varlen_function() -> Callable[..., Any] | None:
    try:
        function: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return function


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    function = _flash_attn_function()
    assert function is not None
    output: Tensor = function(
        query,
        key,
        value,
        segments.query_offsets,
        segments.key_offsets,
        segments.max_queries,
        segments.max_keys,
    )
    return output


def _torch_varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    function = _torch_varlen_function()
    assert function is not None
    output: Tensor = function(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        segments.query_offsets,
        segments.key_offsets,
        segments.max_queries,
        segments.max_keys,
    )
    return output
