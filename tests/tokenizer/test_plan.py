"""Who attends to whom: items never mix, order never matters, tiles are independent, plans are shared."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tokenizer.networks import random_latents, random_network, shuffled, small_config, visuals
from tokenizer.errors import InputError
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.plan import item_segments, tile_plan
from tokenizer.sparse import SparseTokens

# Images and videos of many sizes; 33 frames are three tiles, and two items have equal segments.
MIXED = ((8, 12), (33, 8, 4), (16, 8), (5, 4, 12), (8, 12), (16, 12, 12))


def outputs(tokens: SparseTokens) -> dict[str, Tensor]:
    """Everything the network says about a batch, in float64."""
    network = random_network()
    encoding = network.encode(tokens)
    return {
        "features": encoding.features.features,
        "parameters": encoding.posterior.parameters.features,
        "patches": network.decode(encoding.posterior.mean).features,
        "pooled": encoding.pooled,
    }


def test_a_mixed_batch_equals_one_by_one() -> None:
    tokens = visuals(*MIXED)
    together = outputs(tokens)
    alone = [outputs(item) for item in tokens]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.cat([one[name] for one in alone]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("changed", range(len(MIXED)))
def test_changing_an_item_changes_no_other(changed: int) -> None:
    tokens = visuals(*MIXED)
    other = visuals(*MIXED)
    rows = slice(int(tokens.offsets[changed]), int(tokens.offsets[changed + 1]))
    other.features[rows] = -other.features[rows]
    before, after = outputs(tokens), outputs(other)
    for name in before:
        changes = (before[name] - after[name]).abs().amax(dim=1)
        mine = torch.zeros(len(changes), dtype=torch.bool)
        mine[changed if name == "pooled" else rows] = True
        assert changes[mine].min() > 1e-3
        assert changes[~mine].max() <= 1e-12


def test_order_of_tokens_does_not_matter() -> None:
    tokens = visuals(*MIXED)
    mixed, rows = shuffled(tokens)
    before, after = outputs(tokens), outputs(mixed)
    torch.testing.assert_close(after.pop("pooled"), before.pop("pooled"), rtol=0, atol=1e-12)
    for name in after:
        torch.testing.assert_close(after[name], before[name][rows], rtol=0, atol=1e-12)


def test_a_long_video_equals_its_tiles() -> None:
    tokens = visuals((33, 8, 12))
    step = tokens.positions[:, 0]
    whole = outputs(tokens)
    for first in (0, 4, 8):
        rows = (step >= first) & (step < first + 4)
        tile = SparseTokens(tokens.features[rows], tokens.positions[rows], [int(rows.sum())])
        part = outputs(tile)
        for name in ("features", "parameters", "patches"):
            torch.testing.assert_close(part[name], whole[name][rows], rtol=0, atol=1e-12)


def test_a_gap_in_time_is_legal() -> None:
    tokens = visuals((16, 8, 8))
    late = tokens.positions.clone()
    late[:, 0] += 40 * (late[:, 0] >= 2)
    outputs(SparseTokens(tokens.features, late, tokens.lengths))


def test_moving_an_item_in_time_changes_nothing() -> None:
    tokens = visuals((16, 8, 12))
    later = tokens.positions.clone()
    later[:, 0] += 1000
    before, after = outputs(tokens), outputs(SparseTokens(tokens.features, later, tokens.lengths))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-12)


def test_tokens_in_space_are_items_like_any_other() -> None:
    """Voxels: z counts, and t is constant."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randperm(6**3, generator=generator)[:40]
    positions = torch.stack([torch.ones_like(cells), cells // 36, cells // 6 % 6, cells % 6], dim=1)
    features = torch.rand(40, 192, generator=generator, dtype=torch.float64)
    voxels = SparseTokens(features, positions, [40])
    flat = positions.clone()
    flat[:, 3] = torch.arange(40)
    assert not torch.allclose(
        outputs(voxels)["features"], outputs(SparseTokens(features, flat, [40]))["features"], atol=1e-3
    )
    both = SparseTokens.cat([voxels, visuals((8, 12))])
    torch.testing.assert_close(outputs(both)["features"][:40], outputs(voxels)["features"], rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 5))
def test_plan_of_any_positions(data: st.DataObject, steps: int) -> None:
    """Against the definition: a segment is one item within one window of time, counted from the batch's first step."""
    times = data.draw(st.lists(st.lists(st.integers(0, 14), min_size=1, max_size=6), min_size=1, max_size=5))
    flat = torch.tensor([t for item in times for t in item])
    positions = torch.zeros(len(flat), 4, dtype=torch.int32)
    positions[:, 0] = flat
    positions[:, 1] = torch.arange(len(flat)) % 7
    tokens = SparseTokens(torch.zeros(len(flat), 1), positions, [len(item) for item in times])
    plan = tile_plan(tokens, steps)

    rows = plan.gather(torch.arange(len(flat))[:, None])[:, 0]
    item = torch.repeat_interleave(torch.arange(len(times)), tokens.lengths)
    tile = (flat - flat.min()) // steps
    owner = (item * 100 + tile)[rows]
    bounds = plan.segments.query_offsets.tolist()
    segments = [owner[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    assert all(len(set(segment)) == 1 for segment in segments)
    assert len({segment[0] for segment in segments}) == len(segments) == len(owner.unique())
    runs = [length for count, length, _ in plan.segments.runs for _ in range(count)]
    assert runs == sorted(map(len, segments)) == [len(segment) for segment in segments]

    assert torch.equal(plan.scatter(rows[:, None])[:, 0], torch.arange(len(flat)))
    assert torch.equal(plan.positions[:, 0], ((flat - flat.min()) % steps)[rows].int())
    for a, b in itertools.pairwise(bounds):
        largest = plan.positions[a:b, 1:3].amax(dim=0) + 1
        assert torch.equal(plan.extent[a:b], largest.expand(b - a, 2))


def test_a_plan_is_made_once_for_encode_and_decode() -> None:
    tokens = visuals(*MIXED)
    network = random_network()
    mean = network.encode(tokens).posterior.mean
    plan = tile_plan(tokens, network.config.tile_steps)
    tables = dict(plan._tables)
    network.decode(mean)
    assert tile_plan(mean, network.config.tile_steps) is plan
    assert item_segments(mean) is item_segments(tokens)
    assert all(plan._tables[key] is table for key, table in tables.items())
    assert len(tables) == 2  # rotation and resized positions, shared by both sides and all layers


def test_the_host_reads_as_few_numbers_for_many_items_and_layers_as_for_one() -> None:
    """On a device each read makes the host wait (`.item()`, `int()`, `bool()`), so none may belong to an item, a token
    or a layer. Here they are counted; tests/gpu shows that on a device there are none."""
    reads: list[int] = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            reads[-1] += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    config = small_config()
    assert config.decoder is not None
    deep = replace(config, encoder=replace(config.encoder, depth=4), decoder=replace(config.decoder, depth=5))
    for settings_, shapes in ((config, ((8, 8),)), (deep, MIXED)):
        network, tokens = ATokenNetwork(settings_).requires_grad_(False), visuals(*shapes, dtype=torch.float32)
        reads.append(0)
        with Counter():  # type: ignore[no-untyped-call]
            network.decode(network.encode(tokens).latents)
    assert reads[0] == reads[1] > 0


def test_tokens_seen_in_inference_mode_can_still_be_trained_on() -> None:
    """Tables are shared by all uses of a batch, and training keeps them for the backward pass."""
    network = ATokenNetwork(small_config())
    tokens = visuals((8, 12), (20, 8, 4), dtype=torch.float32)
    with torch.inference_mode():
        network.decode(network.encode(tokens).latents)
    network.decode(network.encode(tokens).latents).features.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.decoder.parameters())  # type: ignore[union-attr]


def test_a_batch_in_order_is_not_gathered() -> None:
    plan = tile_plan(visuals((8, 8), (8, 8), (16, 16)), 4)
    assert plan.rows is None
    assert plan.segments.runs == ((2, 4, 4), (1, 16, 16))


def test_batches_the_network_refuses() -> None:
    network = random_network()
    tokens = visuals((8, 8))
    empty = SparseTokens(tokens.features[:0], tokens.positions[:0], [])
    with pytest.raises(InputError, match="holds no tokens"):
        network.encode(empty)
    with pytest.raises(InputError, match="item 1 of the batch has no tokens"):
        network.encode(SparseTokens(tokens.features, tokens.positions, [4, 0]))
    with pytest.raises(InputError, match="takes patches of 192 channels, got 12"):
        network.encode(random_latents(tokens))
    bad = tokens.features.clone()
    bad[2, 5] = float("nan")
    with pytest.raises(InputError, match=r"row 2 .* NaN"):
        network.encode(tokens.with_features(bad))
