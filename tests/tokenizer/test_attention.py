"""Attention inside segments: against plain softmax, and the path of the CUDA kernels with a stand-in on the CPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from tests.tokenizer.networks import random_latents, random_network, visuals
from tokenizer.model import attention
from tokenizer.model.attention import attend, attention_backend
from tokenizer.model.context import Tiling
from tokenizer.model.plan import Segments, tile_plan
from tokenizer.model.transformer import Attention
from tokenizer.sparse import SparseTokens

LENGTHS = ([2, 2, 2, 5, 5, 9], [2, 2, 7, 5, 5, 3])


def random(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attention_by_its_definition() -> None:
    segments = Segments.from_lengths(torch.tensor(LENGTHS[0]), torch.tensor(LENGTHS[1]), torch.device("cpu"))
    assert segments.runs == ((2, 2, 2), (1, 2, 7), (2, 5, 5), (1, 9, 3))
    assert (segments.max_queries, segments.max_keys) == (9, 7)
    query, key, value = random(25, 1), random(24, 2), random(24, 3)
    owners = [torch.repeat_interleave(torch.arange(6), torch.tensor(lengths)) for lengths in LENGTHS]
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(8)
    weights = scores.masked_fill(owners[0][:, None] != owners[1][None], float("-inf")).softmax(dim=-1)
    expected = torch.einsum("hqk,khd->qhd", weights, value)
    torch.testing.assert_close(attend(query, key, value, segments), expected, rtol=0, atol=1e-12)


def test_no_segments() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    segments = Segments.from_lengths(nothing, nothing, torch.device("cpu"))
    assert attend(random(0, 1), random(0, 1), random(0, 1), segments).shape == (0, 2, 8)


def test_backend_is_chosen_by_device_and_type() -> None:
    assert attention_backend("cpu", torch.bfloat16) == "torch sdpa"
    assert attention_backend("cuda", torch.float32) == "torch sdpa"
    assert attention_backend("cuda", torch.bfloat16) in ("flash-attn", "torch varlen")


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_a_broken_flash_attn_leaves_torch_its_place(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    asked = []

    def broken(name: str) -> object:
        asked.append(name)
        if name == "flash_attn":
            raise error("undefined symbol")
        return SimpleNamespace(varlen_attn=stand_in)

    monkeypatch.setattr(attention, "_KERNELS", {})
    monkeypatch.setattr("importlib.import_module", broken)
    for _ in range(3):
        assert attention_backend("cuda", torch.float16) == "torch varlen"
    assert asked == ["flash_attn", "torch.nn.attention.varlen"]  # a failed import is not tried in every layer


@torch.library.custom_op("atoken_tests::varlen", mutates_args=())
def stand_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    longest: int,
    longest_key: int,
) -> Tensor:
    """What varlen kernels do, in a loop; like them it is one opaque step to a compiler."""
    assert query_offsets.dtype == key_offsets.dtype == torch.int32
    outputs = []
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(query_offsets.tolist()), itertools.pairwise(key_offsets.tolist()), strict=True
    ):
        assert q1 - q0 <= longest
        assert k1 - k0 <= longest_key
        q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(outputs)


@stand_in.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query)


def use_stand_in(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Attention as on CUDA in half precision, with the stand-in for the kernel."""
    monkeypatch.setattr(attention, "_KERNELS", {kernel: stand_in})
    chosen = torch.compiler.assume_constant_result(lambda _device, _dtype: kernel)
    monkeypatch.setattr(attention, "attention_backend", chosen)


SHAPES = ((8, 12), (33, 8, 4), (16, 8), (8, 12))


@pytest.mark.parametrize("kernel", ["flash-attn", "torch varlen"])
@pytest.mark.parametrize("tiling", [None, Tiling(stride=12, context=4)])
def test_offsets_and_runs_describe_the_same_segments(
    tiling: Tiling | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, tokens = random_network(), visuals(*SHAPES)
    by_runs = network.encode(tokens)
    decoded = network.decode(random_latents(tokens), tiling).features
    use_stand_in(monkeypatch, kernel)
    by_offsets = network.encode(tokens)
    torch.testing.assert_close(by_offsets.features.features, by_runs.features.features, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_offsets.pooled, by_runs.pooled, rtol=0, atol=1e-12)
    again = network.decode(random_latents(tokens), tiling).features
    torch.testing.assert_close(again, decoded, rtol=0, atol=1e-12)


def test_the_kernel_path_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    network, tokens = random_network(), visuals(*SHAPES)
    expected = network.encode(tokens)
    use_stand_in(monkeypatch, "torch varlen")
    torch.compiler.reset()
    fresh = SparseTokens(tokens.features, tokens.positions, tokens.lengths)
    compiled = torch.compile(network.encoder, fullgraph=True, backend="eager")
    features, parameters = compiled(fresh.features, tile_plan(fresh, 4))
    torch.compiler.reset()
    torch.testing.assert_close(features, expected.features.features, rtol=0, atol=1e-12)
    torch.testing.assert_close(parameters, expected.posterior.parameters.features, rtol=0, atol=1e-12)


def test_choosing_the_kernel_does_not_break_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the first use of a kernel, and so its import, happens inside compiled code."""
    monkeypatch.setattr(attention, "_KERNELS", {})
    torch.compiler.reset()
    device, dtype = torch.device("cuda"), torch.bfloat16

    def choose(x: Tensor) -> Tensor:
        return x + 1 if attention_backend(device, dtype) == "torch sdpa" else x + 2

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert float(compiled(torch.zeros(()))) == 2
    torch.compiler.reset()


def test_segments_of_one_length_run_by_cudnn_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network()
    layers = [module for module in network.modules() if isinstance(module, Attention)]
    batches = [visuals(*shapes) for shapes in (((8, 12), (8, 12)), ((8, 8),) * 3, ((16, 8),) * 5, SHAPES, SHAPES[1:])]
    expected = [network.encoder(tokens.features, tile_plan(tokens, 4))[0] for tokens in batches]
    use_stand_in(monkeypatch, "torch varlen")
    monkeypatch.setattr(attention, "_CUDNN", SDPBackend.MATH)  # the CPU's, to see that the choice is obeyed
    batched, compilations = list[int](), 0

    def spy(*arguments: Any) -> Tensor:
        batched.append(arguments[-1].runs[0][0])
        return by_runs(*arguments)

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal compilations
        compilations += 1
        return graph

    by_runs = attention._batched_runs
    for layer in layers:
        layer.cudnn = True
    for name in ("plain", "compiled"):
        encoder: Callable[..., tuple[Tensor, ...]] = network.encoder
        if name == "plain":
            monkeypatch.setattr(attention, "_batched_runs", spy)
        else:
            monkeypatch.setattr(attention, "_batched_runs", by_runs)
            torch.compiler.reset()
            encoder = torch.compile(network.encoder, fullgraph=True, backend=count)
        for tokens, features in zip(batches, expected, strict=True):
            fresh = SparseTokens(tokens.features, tokens.positions, tokens.lengths)
            found = encoder(fresh.features, tile_plan(fresh, 4))[0]
            torch.testing.assert_close(found, features, rtol=0, atol=1e-12)
    known = compilations
    for shapes in (((12, 8),) * 4, ((16, 16),) * 6, ((20, 8),) * 3):
        tokens = visuals(*shapes)
        encoder(tokens.features, tile_plan(tokens, 4))
    torch.compiler.reset()
    assert batched == [count for count in (2, 3, 5) for _ in network.encoder.transformer.blocks]
    assert compilations == known, "once sizes are symbols, one graph has them all"
