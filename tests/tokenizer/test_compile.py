"""`torch.compile` takes encoder and decoder whole, and once for many batches; a run trains with compiled blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tokenizer.curriculum_data import lines, make_sets, pictures_alone
from tests.tokenizer.networks import random_latents, random_network, visuals
from tokenizer.model.plan import tile_plan
from tokenizer.sparse import SparseTokens
from tokenizer.training.curriculum import records
from tokenizer.training.curriculum.launch import train
from tokenizer.training.curriculum.start import load_previous


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fresh_plan(tokens: SparseTokens) -> SparseTokens:
    """The same tokens without the tables that other tests left behind."""
    return SparseTokens(tokens.features, tokens.positions, tokens.lengths)


def test_encoder_compiles_without_graph_breaks() -> None:
    network = random_network()
    tokens = visuals((8, 12), (33, 8, 4), (16, 8))
    compiled = torch.compile(network.encoder, fullgraph=True, backend="eager")
    expected = network.encoder(tokens.features, tile_plan(tokens, 4))
    outputs = compiled(tokens.features, tile_plan(fresh_plan(tokens), 4))
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value, rtol=0, atol=1e-12)


def test_decoder_compiles_without_graph_breaks() -> None:
    network = random_network()
    assert network.decoder is not None
    latents = random_latents(visuals((8, 12), (33, 8, 4), (16, 8)))
    compiled = torch.compile(network.decoder, fullgraph=True, backend="eager")
    expected = network.decoder(latents.features, tile_plan(latents, 4))
    output = compiled(latents.features, tile_plan(fresh_plan(latents), 4))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


def test_new_batches_of_known_shapes_do_not_compile_again() -> None:
    network = random_network()
    compilations = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal compilations
        compilations += 1
        return graph

    compiled = torch.compile(network.encoder, fullgraph=True, backend=count)
    for seed in range(3):
        tokens = visuals((8, 12), (20, 8, 4), seed=seed)
        compiled(tokens.features, tile_plan(tokens, 4))
    assert compilations == 1
    for rows in (8, 12, 16, 20, 24, 28):  # sizes become symbols after the first change
        tokens = visuals((rows, 12), (20, 8, 4))
        compiled(tokens.features, tile_plan(tokens, 4))
    assert compilations <= 4


def test_a_run_trains_the_same_with_compiled_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sets(tmp_path, videos=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "has_tensorboard", lambda: False)
    compilations = 0

    def count(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal compilations
        compilations += 1
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    losses = []
    for out in ("plain", "compiled"):
        assert compilations == 0
        config = pictures_alone("steps=3", f"compile={str(out == 'compiled').lower()}", f"out={out}")
        assert train(config, torch.device("cpu")) == 0
        losses.append([line["loss"] for line in lines(tmp_path / out / "metrics.jsonl") if "loss" in line])
    assert compilations >= 2, "encoder and decoder"
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    names = [set(load_previous(out).network.state_dict()) for out in ("plain", "compiled")]
    assert names[0] == names[1]
