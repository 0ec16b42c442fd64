"""Attention inside segments: against plain softmax, and the path of the CUDA kernels with a stand-in on the CPU."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tokenizer.networks import random_latents, random_network, visuals
from tokenizer.model import attention
from tokenizer.model.attention import attend, attention_backend
from tokenizer.model.context import Tiling
from tokenizer.model.plan import Segments, tile_plan
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
