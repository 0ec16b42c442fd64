"""Layouts that are refused, FP8's shapes, and the arithmetic of names, shares and rows; needs no Megatron."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.networks import random_network
from tokenizer.config import parse_config
from tokenizer.errors import InputError
from tokenizer.megatron.config import ParallelConfig, check_layout
from tokenizer.megatron.exchange import to_megatron, to_native
from tokenizer.megatron.fp8 import block_linears, fp8_layers, fp8_recipe
from tokenizer.megatron.names import engine_name, from_megatron, from_native
from tokenizer.megatron.rows import from_boundary, pad_rows, padded_count, to_boundary
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import BASE, CONFIGS, NANO, SO400M_C, ATokenConfig

UNIFORM = {"recompute_granularity": "full", "recompute_method": "uniform"}
FP8 = {"transformer_impl": "transformer_engine", "bf16": True, "fp8_format": "hybrid"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size must be at least 1"),
        ({"pipeline_model_parallel_size": 4}, "encoder | decoder"),
        ({"sequence_parallel": True}, "tensor_model_parallel_size must be > 1"),
        ({"overlap_param_gather": True}, "use_distributed_optimizer"),
        ({"fp8_format": "hybrid"}, "transformer_impl 'transformer_engine'"),
        ({**FP8, "bf16": False}, "bf16: true"),
        ({**FP8, "num_layers_at_start_in_bf16": 1}, "'tensorwise'"),
        ({"num_layers_at_end_in_bf16": 1}, "need an fp8_format"),
        ({"recompute_granularity": "full"}, "it needs both"),
        ({**UNIFORM, "recompute_num_layers": 0}, "recompute_num_layers must be at least 1, got 0"),
        ({"fp8_margin": -3000}, "fp8_margin must be from 0 to 14, got -3000"),
        ({"fp8_formatt": "hybrid"}, "did you mean 'fp8_format'"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said.replace("|", r"\|").replace(">", r"\>")) as raised:
        parse_config(ParallelConfig, options, "run.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "options", "world", "said"),
    [
        (SO400M_C, {"tensor_model_parallel_size": 3}, 3, "heads 16 of the encoder is not divisible"),
        (
            replace(BASE, encoder=replace(BASE.encoder, mlp_width=3070)),
            {"tensor_model_parallel_size": 4},
            4,
            "mlp_width",
        ),
        (SO400M_C, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 6, "start a multiple of 4"),
        (NANO, {"pipeline_model_parallel_size": 2}, 2, "linear codes"),
        (replace(BASE, decoder=None), {"pipeline_model_parallel_size": 2}, 2, "no decoder"),
        (SO400M_C, {**FP8, "tensor_model_parallel_size": 2}, 2, "linear_fc1 of the encoder is 2152 x 1152"),
        (
            NANO,
            {**FP8, "fp8_recipe": "tensorwise", "num_layers_at_start_in_bf16": 2},
            1,
            "leave none of the encoder's 2",
        ),
        (replace(BASE, encoder=replace(BASE.encoder, depth=0)), {}, 1, "no blocks"),
        (SO400M_C, {**UNIFORM, "recompute_num_layers": 2}, 1, "27 blocks are not divisible by recompute_num_layers 2"),
    ],
)
def test_impossible_layouts_are_refused(config: ATokenConfig, options: Any, world: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_layout(config, ParallelConfig(**options), world)


def test_all_shapes_of_so400m_are_legal_for_fp8() -> None:
    parallel = ParallelConfig(**FP8)  # type: ignore[arg-type]
    for config in CONFIGS.values():
        check_layout(config, parallel, 256)
    assert block_linears(SO400M_C.encoder, 1) == {
        "self_attention.linear_qkv": (3456, 1152),
        "self_attention.linear_proj": (1152, 1152),
        "mlp.linear_fc1": (4304, 1152),
        "mlp.linear_fc2": (1152, 4304),
    }
    # Every matrix of a block in its three products, forward and both gradients, for a count of tokens that is odd.
    tokens = padded_count(1023, parallel.token_multiple)
    sizes = {size for shape in block_linears(SO400M_C.encoder, 1).values() for size in shape} | {tokens}
    assert not {size % 16 for size in sizes} - {0}
    assert len(fp8_layers(SO400M_C, parallel)) == 4 * 54
    kept = replace(parallel, fp8_recipe="tensorwise", num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=2)
    assert [name.split(".")[3] for name in fp8_layers(NANO, replace(kept, num_layers_at_end_in_bf16=0))] == [
        *"1111", *"1111", *"2222",
    ]  # fmt: skip
    assert len(fp8_layers(SO400M_C, kept)) == 4 * 48
    assert replace(parallel, tensor_model_parallel_size=4, sequence_parallel=True).token_multiple == 64


def test_recipes_are_what_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = ParallelConfig(**FP8, fp8_amax_history_len=16, fp8_margin=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="FP8 needs a working Transformer Engine"):
        fp8_recipe(parallel)
    stand_in = SimpleNamespace(
        Format=SimpleNamespace(HYBRID="E4M3/E5M2", E4M3="E4M3"),
        DelayedScaling=lambda **options: ("delayed", options),
        Float8CurrentScaling=lambda **options: SimpleNamespace(**options),
        QParams=lambda **options: options,
    )
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", stand_in)
    delayed = {"fp8_format": "E4M3/E5M2", "margin": 1, "amax_history_len": 16, "amax_compute_algo": "max"}
    assert fp8_recipe(parallel) == ("delayed", delayed)
    current = replace(parallel, fp8_recipe="tensorwise", fp8_format="e4m3")
    assert fp8_recipe(current) == SimpleNamespace(fp8_format="E4M3")
    rounded = vars(fp8_recipe(current, power_of_two_scales=True))
    assert rounded["use_power_2_scales"]
    assert all(rounded[f"fp8_quant_{name}"]["power_2_scale"] for name in ("fwd_inp", "fwd_weight", "bwd_grad"))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_come_back_from_any_number_of_ranks(discrete: bool, impl: str, ranks: int) -> None:
    network = random_network(discrete)
    weights = network.state_dict()
    shares = [to_megatron(network.config, weights, rank, ranks, impl) for rank in range(ranks)]
    back = to_native(network.config, shares)
    assert list(back) == list(weights)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_share_of_qkv_is_a_share_of_the_heads() -> None:
    network = random_network()
    name, heads = "encoder.transformer.blocks.1.attention.qkv.weight", network.config.encoder.heads
    native = network.state_dict()[name].view(3, heads, -1, 32)
    share = to_megatron(network.config, network.state_dict(), 1, 2)[from_native(name).megatron]
    assert torch.equal(share.view(heads // 2, 3, -1, 32), native[:, heads // 2 :].transpose(0, 1))


@pytest.mark.parametrize("config", [SO400M_C, NANO])
def test_the_table_names_every_weight(config: ATokenConfig) -> None:
    with torch.device("meta"):
        names = list(ATokenNetwork(config).state_dict())
    weights = [from_native(name) for name in names]
    assert len({weight.megatron for weight in weights}) == len(names)
    assert all(from_megatron(weight.megatron) == weight for weight in weights)
    assert all(from_megatron(engine_name(weight.megatron)) == weight for weight in weights)
    fused = engine_name("encoder.block.layers.3.input_layernorm.bias")
    assert fused == "encoder.block.layers.3.self_attention.linear_qkv.layer_norm_bias"
    with pytest.raises(InputError, match=r"no weight is called 'encoder\.transformer\.blocks\.x\.mlp\.up\.weight'"):
        from_native("encoder.transformer.blocks.x.mlp.up.weight")


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 12), st.integers(1, 40))
def test_what_passes_between_stages_arrives(tokens: int, items: int, channels: int, width: int) -> None:
    parameters = torch.arange(tokens * 2 * channels, dtype=torch.float32).view(tokens, -1)
    pooled = -1 - torch.arange(items * width, dtype=torch.float32).view(items, width)
    boundary = to_boundary(parameters, pooled)
    assert boundary.shape == (tokens + padded_count(items * width, 2 * channels) // (2 * channels), 1, 2 * channels)
    arrived = from_boundary(boundary, tokens, items, width)
    assert torch.equal(arrived[0], parameters)
    assert torch.equal(arrived[1], pooled)


@given(st.integers(0, 200), st.sampled_from([1, 2, 16, 64]))
def test_padding_is_zeros_behind(count: int, multiple: int) -> None:
    total = padded_count(count, multiple)
    assert total % multiple == 0
    assert count <= total < count + multiple
    rows = torch.ones(count, 3)
    assert torch.equal(pad_rows(rows, total).sum(dim=1), (torch.arange(total) < count) * 3.0)
    assert pad_rows(rows, count) is rows
