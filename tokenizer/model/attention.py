"""Exact softmax attention inside segments, without padding: the one place where a kernel is chosen.

On CUDA in half precision flash-attn's or torch's varlen kernel runs all segments at once from their offsets, or cuDNN's
where it is asked for and all have one length. Everywhere else segments of equal length, which a plan lays side by side,
run as one batched scaled dot product each.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenizer.model.plan import Segments

_HALF = (torch.float16, torch.bfloat16)
_HOMES = {
    "flash-attn": ("flash_attn", "flash_attn_varlen_func"),
    "torch varlen": ("torch.nn.attention.varlen", "varlen_attn"),
}
"""Varlen kernels, best first: module and function. They take the same arguments."""
_KERNELS: dict[str, Callable[..., Any] | None] = {}
"""Those looked for so far; None for one that is not there. Compiled code finds its kernel here without importing."""
_CUDNN = SDPBackend.CUDNN_ATTENTION
_CUDNN_WIDTH = 128
"""The widest heads of cuDNN's kernel forward and backward; their width is a multiple of 8."""


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, cudnn: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v, each query over the keys of its own segment.

    Args:
        query: [Nq, H, Dh] in segment order.
        key, value: [Nk, H, Dh] in segment order.
        segments: offsets of queries and keys.
        cudnn: on CUDA in half precision, run segments of one length by cuDNN. It plans anew for each number and length
            of segments, which takes longer than many calls: for batches that look alike.

    Returns:
        [Nq, H, Dh], the dtype of `query`.
    """
    backend = attention_backend(query.device, query.dtype)
    if backend == "torch sdpa":
        return _batched_runs(query, key, value, segments)
    if cudnn and segments.alike and query.shape[-1] <= _CUDNN_WIDTH and query.shape[-1] % 8 == 0:
        with sdpa_kernel(_CUDNN):
            return _batched_runs(query, key, value, segments)
    return varlen_attention(backend, query, key, value, segments)


# Compilers take the answer for a constant: following the import of a kernel would break their graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def attention_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The kernel `attend` uses there: "flash-attn", "torch varlen" or "torch sdpa"."""
    if torch.device(device).type == "cuda" and dtype in _HALF:
        for backend in _HOMES:
            if _kernel(backend) is not None:
                return backend
    return "torch sdpa"


def varlen_attention(
    backend: str, query: Tensor, key: Tensor, value: Tensor, segments: Segments, **options: Any
) -> Tensor:
    """All segments in one call of the kernel that `attention_backend` chose; `options` as the kernel knows them."""
    # Kernels take rows that lie apart, as those of a joint projection do.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    kernel = _KERNELS[backend]
    assert kernel is not None
    output: Tensor = kernel(
        query,
        key,
        value,
        segments.query_offsets,
        segments.key_offsets,
        segments.max_queries,
        segments.max_keys,
        **options,
    )
    return output


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
    view: Tensor = x.unflatten(0, (count, x.shape[0] // count)).transpose(1, 2)
    return view


def _kernel(backend: str) -> Callable[..., Any] | None:
    """Import a kernel on first use."""
    if backend not in _KERNELS:
        module, function = _HOMES[backend]
        try:
            _KERNELS[backend] = getattr(importlib.import_module(module), function)
        except (ImportError, OSError, RuntimeError, AttributeError):
            # A broken build of flash-attn fails with OSError or RuntimeError at import; torch's own kernel serves then.
            _KERNELS[backend] = None
    return _KERNELS[backend]
