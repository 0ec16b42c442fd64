"""The convolutions behind small models' decoders: packed tokens get what dense convolutions of whole frames give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tokenizer.networks import small_config
from tokenizer.errors import InputError
from tokenizer.model import refiner as module
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import RefinerConfig, SkipConfig
from tokenizer.model.context import Tiling
from tokenizer.model.plan import tile_plan
from tokenizer.model.refiner import Refiner
from tokenizer.patches import grid_positions, unpatchify
from tokenizer.sparse import SparseTokens

PATCH = (4, 4, 4)
FEATURES = 192


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def awake(refiner: Refiner) -> Refiner:
    """With every parameter drawn, so that nothing is silent, in double precision."""
    refiner.reset_parameters(generator())
    for parameter in refiner.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator(parameter.numel()))
    return refiner.double().requires_grad_(False)


def item(grid: tuple[int, int, int], seed: int) -> SparseTokens:
    positions = grid_positions(grid)
    features = torch.rand(len(positions), FEATURES, generator=generator(seed), dtype=torch.float64)
    return SparseTokens(features, positions, [len(positions)])


def dense(refiner: Refiner, frames: Tensor) -> Tensor:
    """[T, H, W, 3] through torch's own convolutions with zeros around the frame."""
    x = F.pixel_unshuffle(frames.permute(0, 3, 1, 2), refiner.fold)
    place = refiner.place.repeat(1, *(x.shape[2 + axis] // refiner.place.shape[1 + axis] for axis in (0, 1)))
    x = F.gelu(F.conv2d(x, refiner.read.weight, refiner.read.bias, padding=1) + place)
    for layer in refiner.layers:
        assert isinstance(layer, nn.Conv2d)
        x = x + F.gelu(F.conv2d(x, layer.weight, layer.bias, padding=1))
    change = F.conv2d(x, refiner.write.weight, refiner.write.bias, padding=1)
    return frames + F.pixel_shuffle(change, refiner.fold).permute(0, 2, 3, 1)


grids = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=25, deadline=None)
@given(st.lists(grids, min_size=1, max_size=4), st.sampled_from((1, 2)), st.booleans())
def test_packed_tokens_get_what_dense_convolutions_give(
    sizes: list[tuple[int, int, int]], fold: int, device_path: bool
) -> None:
    refiner = awake(Refiner(RefinerConfig(width=5, depth=2, fold=fold), PATCH))
    items = [item(grid, seed) for seed, grid in enumerate(sizes)]
    batch = SparseTokens.cat(items)
    shuffled = torch.cat(
        [
            torch.randperm(len(one.features), generator=generator(7)) + int(first)
            for one, first in zip(items, batch.offsets[:-1], strict=True)
        ]
    )  # the order inside an item is free
    mixed = SparseTokens(batch.features[shuffled], batch.positions[shuffled], batch.lengths)
    with pytest.MonkeyPatch.context() as patch:
        if device_path:
            patch.setattr(module, "host_rows", lambda *_, **__: None)
        found = refiner(mixed.features, tile_plan(mixed, 2), None)
    found = found[torch.argsort(shuffled)]
    for one, grid, rows in zip(items, sizes, found.split(batch.lengths.tolist()), strict=True):
        expected = dense(refiner, unpatchify(one.features, grid, PATCH))
        torch.testing.assert_close(unpatchify(rows, grid, PATCH), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device_path", [False, True])
def test_assets_and_later_frames_of_stills_pass_unchanged(device_path: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    refiner = awake(Refiner(RefinerConfig(width=4, depth=1), PATCH))
    still, clip = item((1, 2, 3), 1), item((2, 2, 2), 2)
    voxels = SparseTokens(
        torch.rand(3, FEATURES, generator=generator(3), dtype=torch.float64),
        torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 1, 5]]),
        [3],
    )
    batch = SparseTokens.cat([still, voxels, clip])
    flags = torch.arange(len(batch.features)) < len(still.features)
    if device_path:
        monkeypatch.setattr(module, "host_rows", lambda *_, **__: None)
    found = refiner(batch.features, tile_plan(batch, 2), flags)
    first, asset, last = found.split(batch.lengths.tolist())
    assert torch.equal(asset, voxels.features)
    assert torch.equal(first[:, FEATURES // 4 :], still.features[:, FEATURES // 4 :])
    frames = unpatchify(still.features, (1, 2, 3), PATCH)
    torch.testing.assert_close(unpatchify(first, (1, 2, 3), PATCH)[:1], dense(refiner, frames)[:1], rtol=0, atol=1e-12)
    assert not torch.equal(last, clip.features)
    # A batch of assets alone has nothing to refine.
    assert torch.equal(refiner(voxels.features, tile_plan(voxels, 2), None), voxels.features)


def small_network() -> ATokenNetwork:
    sizes = replace(
        small_config(), skip=SkipConfig(still_codes=3, clip_codes=2), refiner=RefinerConfig(width=6, depth=1)
    )
    network = ATokenNetwork(sizes)
    network.reset_parameters(generator())
    assert network.refiner is not None
    awake(network.refiner)
    return network.double().eval().requires_grad_(False)


def test_an_item_decodes_alone_as_in_a_batch_and_in_tiles_with_context() -> None:
    network = small_network()
    steps = network.config.tile_steps
    patches = SparseTokens.cat([_patches(network, (steps + 1, 3, 2), 1), _patches(network, (1, 2, 2), 2)])
    latents = network.encode(patches).latents
    together = network.decode(latents).split()
    for one, expected in zip(latents.split(), together, strict=True):
        torch.testing.assert_close(network.decode(one).features, expected.features, rtol=0, atol=1e-10)
    frames = network.config.patch_size[0]
    tiled = network.decode(latents, Tiling(stride=frames, context=frames))
    silent = network.refiner
    network.refiner = None
    plain = network.decode(latents, Tiling(stride=frames, context=frames))
    network.refiner = silent
    assert silent is not None
    assert network.skip is not None
    expected = silent(plain.features, tile_plan(plain, steps), network.skip.is_still(latents.features))
    torch.testing.assert_close(tiled.features, expected, rtol=0, atol=1e-10)


def _patches(network: ATokenNetwork, grid: tuple[int, int, int], seed: int) -> SparseTokens:
    positions = grid_positions(grid)
    features = torch.rand(len(positions), network.config.patch_features, generator=generator(seed)).double()
    return SparseTokens(features, positions, [len(positions)])


def test_a_fresh_refiner_adds_nothing_and_learns() -> None:
    refiner = Refiner(RefinerConfig(width=4, depth=1), PATCH)
    refiner.reset_parameters(generator())
    batch = item((1, 2, 2), 0).to(dtype=torch.float32)
    plan = tile_plan(batch, 2)
    assert torch.equal(refiner(batch.features, plan, None), batch.features)
    target = torch.zeros_like(batch.features)
    optimizer = torch.optim.Adam(refiner.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(refiner(batch.features, plan, None), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"width": 0, "depth": 1}, "at least 1"), ({"width": 4, "depth": 1, "fold": 3}, "cannot be cut into cells of 3")],
)
def test_impossible_refiners_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(small_config(), refiner=RefinerConfig(**sizes))
