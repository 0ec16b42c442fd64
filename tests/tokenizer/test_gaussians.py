"""The Gaussian decoder: windows, soft cap, attributes and files (recorded values are compared in test_parity)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.errors import InputError
from tokenizer.gaussians import GaussianDecoder, GaussianDecoderConfig, Gaussians
from tokenizer.gaussians.attributes import offset_perturbation, raw_to_gaussians
from tokenizer.gaussians.decoder import position_code
from tokenizer.gaussians.ply import ply_columns, write_ply
from tokenizer.gaussians.released import config_from_released, load_released, to_released
from tokenizer.gaussians.windows import SOFT_CAP, attend_windows, window_plan
from tokenizer.sparse import SparseTokens

SMALL = GaussianDecoderConfig(width=16, depth=3, heads=2, mlp_width=24, inputs=10, window=4, resolution=16, gaussians=5)


def decoder(config: GaussianDecoderConfig = SMALL) -> GaussianDecoder:
    """Every parameter random, in float64."""
    network = GaussianDecoder(config).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def asset(count: int, seed: int = 0, size: int = 12) -> SparseTokens:
    """Random voxels of one asset at distinct positions."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(size**3, generator=generator)[:count]
    positions = torch.stack([torch.ones_like(cells), cells // size**2, cells // size % size, cells % size], dim=1)
    features = torch.randn(count, 10, generator=generator, dtype=torch.float64)
    return SparseTokens(features, positions, [count])


# ---------------------------------------------------------------------- windows


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.sampled_from([2, 4, 8]), st.booleans())
def test_windows_by_their_definition(counts: list[int], size: int, shifted: bool) -> None:
    tokens = SparseTokens.cat([asset(count, seed=i) for i, count in enumerate(counts)])
    shift = size // 2 * shifted
    windows = window_plan(tokens, size, shift)
    item = torch.repeat_interleave(torch.arange(len(counts)), tokens.lengths)
    keys = [
        (int(i), *((p + shift) // size for p in xyz))
        for i, (_, *xyz) in zip(item, tokens.positions.tolist(), strict=True)
    ]
    order = sorted(set(keys))
    assert windows.number.tolist() == [order.index(key) for key in keys]
    assert windows.lengths.tolist() == [keys.count(key) for key in order]
    assert windows.items.tolist() == [key[0] for key in order]

    numbers = windows.number[windows.rows].tolist()
    bounds = windows.segments.query_offsets.tolist()
    found = [numbers[a:b] for a, b in itertools.pairwise(bounds)]
    assert sorted(found, key=lambda segment: segment[0]) == [[n] * keys.count(key) for n, key in enumerate(order)]
    assert torch.equal(windows.rows[windows.inverse], torch.arange(tokens.num_tokens))


def test_attention_by_its_definition() -> None:
    tokens = SparseTokens.cat([asset(60), asset(25, seed=1)])
    windows = window_plan(tokens, 4, 2)
    assert windows.soft_cap == SOFT_CAP
    generator = torch.Generator().manual_seed(0)
    query, key, value = (20 * torch.randn(85, 2, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    rows = windows.rows
    mixed = attend_windows(query[rows], key[rows], value[rows], windows)[windows.inverse]
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(8)
    scores = 30 * torch.tanh(scores / 30)
    apart = windows.number[:, None] != windows.number[None]
    weights = scores.masked_fill(apart, float("-inf")).softmax(dim=-1)
    torch.testing.assert_close(mixed, torch.einsum("hqk,khd->qhd", weights, value), rtol=0, atol=1e-12)


def test_windows_of_exactly_the_edge_length_are_not_capped() -> None:
    line = torch.cartesian_prod(*[torch.arange(n) for n in (1, 2, 1, 2)])
    tokens = SparseTokens(torch.zeros(4, 1), line, [4])
    assert window_plan(tokens, 4, 0).soft_cap is None
    assert window_plan(tokens, 2, 0).soft_cap == SOFT_CAP


def test_scores_keep_full_precision_under_autocast() -> None:
    windows = window_plan(asset(200), 4, 0)
    generator = torch.Generator().manual_seed(3)
    query, key, value = (4 * torch.randn(3, 200, 2, 8, generator=generator)).bfloat16().unbind()
    plain = attend_windows(query, key, value, windows)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = attend_windows(query, key, value, windows)
    assert under_autocast.dtype == torch.bfloat16
    assert torch.equal(under_autocast, plain)
    # A device without autocast, on which shapes and costs are counted.
    assert decoder().to("meta")(asset(200).to("meta")).features.shape == (200, SMALL.outputs)


def test_long_runs_of_windows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = asset(300)
    expected = decoder()(tokens).features
    monkeypatch.setattr("tokenizer.gaussians.windows._MAX_SCORES", 1)
    torch.testing.assert_close(decoder()(tokens).features, expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- network


def test_assets_of_a_batch_do_not_see_each_other() -> None:
    items = [asset(70), asset(3, seed=1), asset(40, seed=2)]
    together = decoder()(SparseTokens.cat(items))
    for one, item in zip(together, items, strict=True):
        torch.testing.assert_close(one.features, decoder()(item).features, rtol=0, atol=1e-12)


def test_order_of_voxels_does_not_matter() -> None:
    tokens = asset(50)
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    mixed = SparseTokens(tokens.features[rows], tokens.positions[rows], [50])
    torch.testing.assert_close(decoder()(mixed).features, decoder()(tokens).features[rows], rtol=0, atol=1e-12)


def test_every_second_block_looks_across_window_borders() -> None:
    """Two neighbours in different windows meet in shifted blocks alone; two far apart never."""
    near = torch.tensor([[0, 3, 0, 0], [0, 4, 0, 0], [0, 12, 0, 0]])
    features = torch.randn(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changed = features.clone()
    changed[1] *= -1
    before, after = (decoder()(SparseTokens(f, near, [3])).features for f in (features, changed))
    assert (before[0] - after[0]).abs().max() > 1e-6
    assert torch.equal(before[2], after[2])
    one_block = decoder(replace(SMALL, depth=1))
    before, after = (one_block(SparseTokens(f, near, [3])).features for f in (features, changed))
    assert torch.equal(before[0], after[0])


def test_gradients_flow_to_every_parameter() -> None:
    network = decoder().requires_grad_(True)
    network(asset(40)).features.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("width", [6, 12, 16])
def test_sines_by_their_formula(width: int) -> None:
    positions = torch.tensor([[0, 1, 2], [60, 33, 7]])
    code = position_code(positions, width, torch.float64)
    count = width // 6
    for token in range(2):
        for axis in range(3):
            for i in range(count):
                angle = float(positions[token, axis]) * 10000.0 ** (-i / count)
                assert code[token, 2 * count * axis + i] == pytest.approx(math.sin(angle))
                assert code[token, 2 * count * axis + count + i] == pytest.approx(math.cos(angle))
    assert not code[:, 6 * count :].any()


def test_new_weights_come_from_the_generator_alone() -> None:
    networks = [GaussianDecoder(SMALL) for _ in range(3)]
    for network, seed in zip(networks, (1, 1, 2), strict=True):
        network.reset_parameters(torch.Generator().manual_seed(seed))
    first, same, other = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
    assert not first["to_gaussians.weight"].any()


def test_batches_it_refuses() -> None:
    with pytest.raises(InputError, match="takes voxels of 10 channels, got 7"):
        decoder()(asset(4).with_features(torch.zeros(4, 7)))
    with pytest.raises(InputError, match="holds no voxels"):
        decoder()(SparseTokens(torch.zeros(0, 10), torch.zeros(0, 4, dtype=torch.int32), []))


# ---------------------------------------------------------------------- attributes


def test_a_new_decoder_fills_each_voxel_evenly() -> None:
    gaussians = GaussianDecoder(SMALL).gaussians(asset(6).to(dtype=torch.float32))
    assert len(gaussians) == 30
    inside = (gaussians.means + 0.5).reshape(6, 5, 3) * 16 - asset(6).positions[:, None, 1:] - 0.5
    # The points of a Hammersley set, g / 5 and g mirrored in base 2 and 3, around the centre of the voxel.
    expected = torch.tensor(
        [[0, 0, 0], [1 / 5, 1 / 2, 1 / 3], [2 / 5, 1 / 4, 2 / 3], [3 / 5, 3 / 4, 1 / 9], [4 / 5, 1 / 8, 4 / 9]]
    )
    torch.testing.assert_close(inside, (expected - 0.5).expand(6, -1, -1), rtol=0, atol=2e-5)
    torch.testing.assert_close(gaussians.opacities, torch.full((30, 1), 0.1))
    torch.testing.assert_close(gaussians.scales, torch.full((30, 3), math.hypot(4e-3, 9e-4)))
    torch.testing.assert_close(gaussians.colours, torch.full((30, 3), 0.5))
    assert torch.equal(gaussians.rotations, torch.tensor([1.0, 0, 0, 0]).expand(30, 4))


def random_gaussians(lengths: tuple[int, ...] = (3, 2)) -> Gaussians:
    tokens = SparseTokens.cat([asset(count, seed=i) for i, count in enumerate(lengths)])
    raw = torch.randn(sum(lengths), SMALL.outputs, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return raw_to_gaussians(tokens.with_features(raw), offset_perturbation(5, 1.5), SMALL)


def test_channels_are_where_they_should_be() -> None:
    tokens = asset(2)
    raw = torch.arange(2 * 70, dtype=torch.float64).reshape(2, 70)
    gaussians = raw_to_gaussians(tokens.with_features(raw), offset_perturbation(5, 1.5), SMALL)
    voxel, g = 1, 3
    row = voxel * 5 + g
    assert gaussians.dc[row].tolist() == raw[voxel, 15 + 3 * g : 18 + 3 * g].tolist()
    spread = F.softplus(raw[voxel, 30 + 3 * g : 33 + 3 * g] + math.log(math.expm1(4e-3)))
    assert gaussians.scales[row].tolist() == pytest.approx((spread.square() + 9e-4**2).sqrt().tolist())
    turned = 0.1 * raw[voxel, 45 + 4 * g : 49 + 4 * g] + torch.tensor([1.0, 0, 0, 0])
    assert gaussians.quaternions[row].tolist() == pytest.approx(turned.tolist())
    assert gaussians.opacity_logits[row].tolist() == pytest.approx([float(raw[voxel, 65 + g]) - math.log(9)])


def test_covariances_are_rotated_squares_of_scales() -> None:
    gaussians = random_gaussians()
    full = torch.zeros(len(gaussians), 3, 3, dtype=torch.float64)
    rows, columns = torch.triu_indices(3, 3)
    full[:, rows, columns] = gaussians.covariances
    full = full + full.mT - torch.diag_embed(full.diagonal(dim1=1, dim2=2))
    spread = torch.linalg.eigvalsh(full)
    torch.testing.assert_close(spread, gaussians.scales.square().sort(dim=1).values)
    torch.testing.assert_close(gaussians.rotations.norm(dim=1), torch.ones(25, dtype=torch.float64))


def test_gaussians_stay_near_their_voxel() -> None:
    gaussians = random_gaussians((40,))
    centre = (asset(40).positions[:, None, 1:] + 0.5) / 16
    distance = (gaussians.means.reshape(40, 5, 3) + 0.5 - centre).abs() * 16
    assert distance.max() < 0.75
    assert gaussians.means.abs().max() < 0.55


def test_items_of_a_batch() -> None:
    gaussians = random_gaussians((3, 2))
    assert [len(one) for one in gaussians] == [15, 10]
    assert torch.equal(gaussians[-1].dc, gaussians.dc[15:])
    with pytest.raises(IndexError, match="item 2 of a batch of 2"):
        gaussians[2]


# ---------------------------------------------------------------------- files


def test_ply_holds_the_columns(tmp_path: Path) -> None:
    gaussians = random_gaussians()[0]
    path = tmp_path / "asset.ply"
    write_ply(gaussians, path)
    header, body = path.read_bytes().split(b"end_header\n", 1)
    lines = header.decode().splitlines()
    assert lines[:3] == ["ply", "format binary_little_endian 1.0", "element vertex 15"]
    names = [line.split()[-1] for line in lines if line.startswith("property float")]
    assert names == list(ply_columns(gaussians))
    assert ",".join(names) == (
        "x,y,z,nx,ny,nz,f_dc_0,f_dc_1,f_dc_2,opacity,scale_0,scale_1,scale_2,rot_0,rot_1,rot_2,rot_3"
    )
    table = np.frombuffer(body, dtype="<f4").reshape(15, 17)
    for name, column in ply_columns(gaussians).items():
        np.testing.assert_array_equal(table[:, names.index(name)], column.float().numpy())


def test_ply_of_a_batch_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds one asset, got a batch of 2; write gaussians\[i\]"):
        write_ply(random_gaussians(), tmp_path / "asset.ply")
    assert list(tmp_path.iterdir()) == []


def test_released_weights_load_with_and_without_training_parts() -> None:
    state = to_released(decoder())
    for extra in ({}, {"lpips_loss.net.lin0.weight": torch.zeros(1)}):
        other = GaussianDecoder(SMALL).double()
        load_released(other, {**state, **extra})
        assert all(
            torch.equal(a, b) for a, b in zip(other.state_dict().values(), decoder().state_dict().values(), strict=True)
        )


def test_weights_that_do_not_fit() -> None:
    state = to_released(decoder())
    missing = {name: tensor for name, tensor in state.items() if name != "input_layer.weight"}
    with pytest.raises(InputError, match=r"the weights lack input_layer\.weight"):
        load_released(GaussianDecoder(SMALL), missing)
    with pytest.raises(InputError, match=r"no place for blocks\.3\.odd"):
        load_released(GaussianDecoder(SMALL), {**state, "blocks.3.odd": torch.zeros(1)})
    with pytest.raises(InputError, match=r"out_layer\.bias has shape \(7,\), the decoder \(70,\)"):
        load_released(GaussianDecoder(SMALL), {**state, "out_layer.bias": torch.zeros(7)})


@pytest.mark.parametrize(
    ("released", "message"),
    [
        ({"model_chanels": 64}, "unknown key 'model_chanels' in the configuration .* did you mean 'model_channels'"),
        ({"representation_config": {"voxelsize": 1.5}}, "did you mean 'voxel_size'"),
        ({"representation_config": {"lr": {"_xzy": 1.0}}}, "did you mean '_xyz'"),
        ({"attn_mode": "full"}, "attn_mode 'full' is not supported"),
        ({"representation_config": {"scaling_activation": "exp"}}, "scaling_activation 'exp' is not supported"),
        ({"window_size": 7}, "window must be even"),
        ({"num_heads": 7}, "width 768 is not divisible by heads 7"),
        ({"representation_config": {"voxel_size": 1.0}}, "voxel_size must be more than 1"),
    ],
)
def test_configurations_it_refuses(released: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_from_released(released)
