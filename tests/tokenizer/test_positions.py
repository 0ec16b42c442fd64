"""Rotary and learned positions against plain formulas and torch's own resize."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizer.model.plan import tile_plan
from tokenizer.model.positions import GRID, PositionTable, token_weights
from tokenizer.model.rope import rotary_frequencies, rotary_table, rotate
from tokenizer.sparse import SparseTokens

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@QUICK
@given(st.integers(1, 70), st.integers(1, 70))
def test_table_is_resized_as_by_torch(rows: int, columns: int) -> None:
    table = random(GRID * GRID, 5)
    picture = table.T.reshape(1, 5, GRID, GRID)
    if columns > 1:
        resized = F.interpolate(picture, (rows, columns), mode="bilinear", antialias=True, align_corners=False)
    else:
        # torch 2.13's CPU kernel repeats the first row where the result is one column wide; lying down it is right.
        lying = F.interpolate(picture.mT, (1, rows), mode="bilinear", antialias=True, align_corners=False)
        resized = lying.mT
    x, y = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    positions = torch.stack([0 * x, x, y, 0 * x], dim=-1).reshape(-1, 4)
    extent = torch.tensor([[rows, columns]]).expand(len(positions), 2)
    ours = token_weights(positions, extent, torch.float64) @ table
    torch.testing.assert_close(ours, resized[0].flatten(1).T, rtol=0, atol=1e-12)


def test_the_grid_itself_is_not_resized() -> None:
    x, y = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    positions = torch.stack([0 * x, x, y, 0 * x], dim=-1).reshape(-1, 4)
    weights = token_weights(positions, torch.full((GRID * GRID, 2), GRID), torch.float64)
    assert torch.equal(weights, torch.eye(GRID * GRID, dtype=torch.float64))


def test_table_is_resized_in_float32_under_autocast() -> None:
    table = PositionTable(5)
    with torch.no_grad():
        table.weight.copy_(random(GRID * GRID, 5))
    x, y = torch.meshgrid(torch.arange(20), torch.arange(11), indexing="ij")
    positions = torch.stack([0 * x, x, y, 0 * x], dim=-1).reshape(-1, 4)
    plan = tile_plan(SparseTokens(torch.zeros(220, 1), positions, [220]), 4)
    plain = table(plan)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = table(plan)
    assert torch.equal(under_autocast, plain)
    gradients = [torch.autograd.grad(each.square().sum(), table.weight)[0] for each in (plain, under_autocast)]
    assert torch.equal(*gradients)
    # A device without autocast, on which shapes and costs are counted.
    on_meta = tile_plan(SparseTokens(torch.zeros(220, 1), positions, [220]).to("meta"), 4)
    assert table.to("meta")(on_meta).shape == plain.shape


@pytest.mark.parametrize("width", [8, 16, 24, 64, 72])
def test_rotation_by_its_formula(width: int) -> None:
    """Adjacent channels as complex numbers; the exponent of the frequencies divides by the whole head width."""
    positions = torch.tensor([[0, 0, 0, 0], [3, 1, 4, 1], [15, 92, 65, 35]])
    x = random(3, 2, width)
    frequencies = torch.tensor([10000.0 ** (-i / width) for i in range(width // 8)], dtype=torch.float64)
    torch.testing.assert_close(rotary_frequencies(width, torch.float64), frequencies)
    rotated = rotate(x, rotary_table(positions, width, torch.float64))
    for token in range(3):
        for pair in range(width // 2):
            axis, i = divmod(pair, width // 8)
            angle = positions[token, axis] * frequencies[i]
            value = torch.complex(x[token, :, 2 * pair], x[token, :, 2 * pair + 1]) * torch.polar(
                torch.ones((), dtype=torch.float64), angle
            )
            torch.testing.assert_close(rotated[token, :, 2 * pair], value.real)
            torch.testing.assert_close(rotated[token, :, 2 * pair + 1], value.imag)


@QUICK
@given(st.lists(st.integers(0, 2000), min_size=4, max_size=4), st.integers(0, 1000))
def test_scores_depend_on_differences_of_positions_alone(shift: list[int], seed: int) -> None:
    positions = torch.randint(0, 50, (6, 4), generator=torch.Generator().manual_seed(seed))
    query, key = random(6, 1, 24, seed=seed), random(6, 1, 24, seed=seed + 1)

    def scores(at: torch.Tensor) -> torch.Tensor:
        table = rotary_table(at, 24, torch.float64)
        return torch.einsum("qhd,khd->qk", rotate(query, table), rotate(key, table))

    torch.testing.assert_close(scores(positions + torch.tensor(shift)), scores(positions), rtol=0, atol=1e-9)


def test_rotation_keeps_the_type_and_is_computed_in_float32() -> None:
    x = random(4, 2, 16).bfloat16()
    table = rotary_table(torch.arange(16).reshape(4, 4), 16, torch.float32)
    rotated = rotate(x, table)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x.float(), table).bfloat16())


def test_compiled_rotation_is_the_same() -> None:
    """Compilers get real arithmetic, eager kernels a complex product."""
    x = random(5, 2, 24)
    table = rotary_table(torch.arange(20).reshape(5, 4), 24, torch.float64)
    compiled = torch.compile(rotate, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, table), rotate(x, table), rtol=0, atol=1e-14)
