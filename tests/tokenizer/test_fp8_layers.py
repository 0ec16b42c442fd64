"""Which layers FP8 gets and why not the others, and which backend computes, with stand-ins for those of CUDA."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tokenizer.fp8_networks import step, tiny_config, tiny_network
from tokenizer.errors import InputError
from tokenizer.fp8 import FP8Config, convert, plan
from tokenizer.fp8 import choose as choosing
from tokenizer.fp8.__main__ import main
from tokenizer.fp8.choose import choose_backend
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import CONFIGS, ATokenConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DELAYED = FP8Config(fp8_recipe="delayed", fp8_amax_history_len=4)
FAST = FP8Config(fast_accumulation="all")


def on_meta(name: str) -> ATokenNetwork:
    with torch.device("meta"):
        return ATokenNetwork(CONFIGS[name])


# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_linear_layer_of_every_block_is_legal(name: str) -> None:
    config = CONFIGS[name]
    rows = plan(on_meta(name), FP8Config())
    fp8 = [row for row in rows if row.decision == "fp8"]
    assert config.decoder is not None
    assert len(fp8) == 4 * (config.encoder.depth + config.decoder.depth)
    assert all(size % 16 == 0 for row in fp8 for size in row.shape)
    assert all(row.reason for row in rows)
    kept = {row.name for row in rows if row.decision != "fp8" and row.kind != "attention"}
    skip = {"skip.stills", "skip.clips"} if config.skip else set()
    skip |= {"skip.links.correct"} if config.skip and config.skip.linked else set()
    pool = {f"encoder.pool.{layer}" for layer in ("query", "key_value", "out", "mlp.up", "mlp.down")}
    ends = {"encoder.transformer.embed", "encoder.to_posterior", "decoder.transformer.embed", "decoder.to_patches"}
    assert kept == pool | ends | skip
    assert not [row.name for row in rows if row.reason == "not in a block"]


def test_what_fp8_refuses_or_the_options_keep_stays() -> None:
    def decisions(config: ATokenConfig, fp8: FP8Config) -> dict[str, str]:
        rows = plan(nn.ModuleDict({"network": ATokenNetwork(config), "head": nn.Linear(16, 16)}), fp8)
        return {row.name.removeprefix("network."): row.reason for row in rows if row.decision != "fp8"}

    odd = decisions(tiny_config(mlp_width=40), FP8Config())
    assert odd["encoder.transformer.blocks.0.mlp.up"] == "40 x 32: FP8 needs multiples of 16"
    assert odd["head"] == "outside the autoencoder"
    assert "encoder.transformer.blocks.0.attention.qkv" not in odd
    ends = decisions(tiny_config(depth=3), FP8Config(num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1))
    assert "in_bf16" in ends["decoder.transformer.blocks.0.mlp.up"]
    assert "in_bf16" in ends["decoder.transformer.blocks.2.mlp.up"]
    assert "decoder.transformer.blocks.1.mlp.up" not in ends
    kept = decisions(tiny_config(), FP8Config(keep=("decoder.*",)))
    assert kept["decoder.transformer.blocks.0.attention.out"] == "kept by fp8.keep"


@pytest.mark.parametrize(
    ("config", "fp8", "message"),
    [
        (tiny_config(width=24, mlp_width=40, heads=1), FP8Config(), "would convert no layer of tiny"),
        (tiny_config(), FP8Config(keep=("*",)), "would convert no layer of tiny"),
        (tiny_config(), FP8Config(num_layers_at_start_in_bf16=1), "would convert no layer of tiny"),
        (tiny_config(), FP8Config(keep=("decoder.mlp",)), "no FP8 layer is called 'decoder.mlp'"),
    ],
)
def test_converting_nothing_is_an_error(config: ATokenConfig, fp8: FP8Config, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert(tiny_network(config), fp8, CPU)


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "so400m-c"]) == 0
    printed = capsys.readouterr().out
    assert "encoder.transformer.blocks.0-26.attention.qkv" in printed
    assert "97.3% of the weights" in printed
    assert main(["--keep", "nothing"]) == 1
    assert capsys.readouterr().err.startswith("error: fp8.keep")


# ---------------------------------------------------------------------- backends


@pytest.mark.parametrize(
    ("config", "device", "installed", "capability", "expected"),
    [
        (FP8Config(), CPU, (), (0, 0), "emulated"),
        (FP8Config(), CPU, ("transformer_engine", "torchao"), (9, 0), "emulated"),
        (FP8Config(), CUDA, ("transformer_engine", "torchao"), (9, 0), "transformer_engine"),
        (DELAYED, CUDA, ("transformer_engine",), (8, 9), "transformer_engine"),
        (FP8Config(), CUDA, ("torchao",), (9, 0), "torchao"),
        (FP8Config(backend="torchao"), CUDA, ("transformer_engine", "torchao"), (9, 0), "torchao"),
        (FP8Config(backend="emulated"), CUDA, ("torchao",), (8, 0), "emulated"),
        (DELAYED, CUDA, ("torchao", "triton"), (9, 0), "triton"),
        (FP8Config(), CUDA, ("triton",), (9, 0), "triton"),
        (FP8Config(backend="triton"), CUDA, ("torchao", "triton"), (9, 0), "triton"),
        (FAST, CUDA, ("transformer_engine", "torchao", "triton"), (9, 0), "torchao"),
        (FP8Config(), CUDA, (), (9, 0), "pip install triton"),
        (DELAYED, CUDA, ("torchao",), (9, 0), "pip install triton"),
        (FP8Config(), CUDA, ("torchao",), (8, 0), "compute capability is 8.0, and 8.9 is the first"),
        (FP8Config(backend="torchao"), CUDA, (), (9, 0), "torchao is not installed"),
        (FP8Config(backend="transformer_engine"), CPU, ("transformer_engine",), (9, 0), "needs CUDA"),
    ],
)
def test_backends_are_chosen_or_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    config: FP8Config,
    device: torch.device,
    installed: tuple[str, ...],
    capability: tuple[int, int],
    expected: str,
) -> None:
    monkeypatch.setattr(choosing, "_installed", lambda backend: backend in installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    if " " not in expected:
        assert choose_backend(config, device) == expected
        return
    with pytest.raises(InputError, match=expected) as error:
        choose_backend(config, device)
    assert "\n" not in str(error.value)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(InputError, match="torchao has no delayed"):
        FP8Config(fp8_recipe="delayed", backend="torchao")
    with pytest.raises(InputError, match="delayed fp8_recipe runs all blocks"):
        FP8Config(fp8_recipe="delayed", num_layers_at_end_in_bf16=1)
    with pytest.raises(InputError, match="must be at least 1"):
        FP8Config(fp8_amax_history_len=0)


class EngineLinear(nn.Linear):
    """What Transformer Engine's layer is to us: a linear layer with scales that start with its first call."""

    active = False

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, params_dtype: Any, device: Any, init_method: Any
    ) -> None:
        super().__init__(inputs, outputs, bias=bias, dtype=params_dtype, device=device)
        init_method(self.weight)
        self.fp8_meta: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        assert EngineLinear.active
        assert x.shape[0] % 16 == 0
        if not self.fp8_meta:
            self.init_fp8_meta_tensors(None)
        self.fp8_meta["scaling_fwd"][0] += 1
        return super().forward(x)

    def init_fp8_meta_tensors(self, recipe: Any) -> None:  # noqa: ARG002
        self.fp8_meta["scaling_fwd"] = [torch.zeros(2), torch.zeros(4, 2)]

    def get_fp8_meta_tensors(self) -> dict[str, list[Tensor]] | None:
        found = self.fp8_meta.get("scaling_fwd")
        return None if found is None else {"scaling_fwd": [tensor.clone() for tensor in found]}

    def reset_fp8_meta_tensors(self, state: dict[str, list[Tensor]]) -> None:
        self.fp8_meta["scaling_fwd"] = state["scaling_fwd"]

    def get_extra_state(self) -> Tensor:
        raise AssertionError("this would be a pickle in the state dict")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Modules in the place of Transformer Engine's; the recipes that were asked for."""
    asked: list[Any] = []

    @contextmanager
    def autocast(*, enabled: bool, recipe: Any) -> Iterator[None]:
        assert enabled
        assert not EngineLinear.active
        asked.append(recipe)
        EngineLinear.active = True
        try:
            yield
        finally:
            EngineLinear.active = False

    recipes = SimpleNamespace(
        Format=SimpleNamespace(HYBRID="hybrid", E4M3="e4m3"),
        DelayedScaling=lambda **options: options,
        Float8CurrentScaling=lambda **options: options,
    )
    module = SimpleNamespace(Linear=EngineLinear, autocast=autocast)
    for name, value in (("", ModuleType("engine")), (".pytorch", module), (".common", ModuleType("common"))):
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", value)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipes)
    monkeypatch.setattr("tokenizer.fp8.conversion.choose_backend", lambda *_: "transformer_engine")
    return SimpleNamespace(asked=asked)


def test_transformer_engine_runs_inside_its_mode_with_padded_rows(stand_in: SimpleNamespace) -> None:
    plain, network = tiny_network(), tiny_network()
    conversion = convert(network, DELAYED, CPU)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert step(network, 0) == pytest.approx(step(plain, 0), rel=1e-5)
    assert len(stand_in.asked) == 2, "once for the encoder's stack, once for the decoder's"
    assert stand_in.asked[0]["amax_history_len"] == 4
    state = conversion.state_dict()
    assert set(state) == set(conversion.layers)
    assert all(torch.equal(layer["scaling_fwd"][0], torch.ones(2)) for layer in state.values())
    another = convert(tiny_network(), DELAYED, CPU)
    assert not any(another.state_dict().values())
    another.load_state_dict(another.state_dict())
    another.load_state_dict(state)
    assert another.state_dict().keys() == state.keys()
    assert all(torch.equal(layer["scaling_fwd"][0], torch.ones(2)) for layer in another.state_dict().values())
    with pytest.raises(InputError, match="do not fit"):
        another.load_state_dict({name: {"scaling_fwd": [torch.ones(2), torch.ones(9, 2)]} for name in state})
    # A call that fails leaves the mode too.
    with pytest.raises(AttributeError):
        network.encoder.transformer(torch.ones(3, 5), None)
    assert not EngineLinear.active


def test_a_broken_installation_is_explained_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, stand_in: SimpleNamespace
) -> None:
    assert stand_in
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('no shared object file\\nfor torch')")
    for name in ("", ".pytorch", ".common", ".common.recipe"):
        monkeypatch.delitem(sys.modules, f"transformer_engine{name}")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(InputError, match=r"fp8\.backend=torchao: no shared object file for torch$"):
        convert(tiny_network(), FP8Config(), CPU)
