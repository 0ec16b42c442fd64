"""Batches become the tokens that the tokenizer itself makes of the same pixels, and as many as were counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import Batch
from data.decode.decoder import KINDS, Decoder, DecodeSettings
from data.mixture import Task
from data.samples import Item, Raw
from tests.data.made_samples import clip_file, picture_file, raw, raw_asset, scene
from tokenizer.errors import InputError
from tokenizer.patches import VisualSize, float_to_uint8, tokens_to_pixels, uint8_to_float, visuals_to_tokens
from tokenizer.sparse import SparseTokens
from tokenizer.voxels import AssetSize, voxels_to_tokens

SETTINGS = DecodeSettings(min_side=32, max_side=128, frames=(4, 8))


def batch(task: Task, epochs: int = 3, settings: DecodeSettings = SETTINGS) -> Batch:
    kind = KINDS[task]
    samples: dict[str, Raw] = {
        "images": raw({"png": picture_file(scene(1, 100, 140)[0], "PNG")}),
        "videos": raw({"mp4": clip_file(40)}),
        "assets": raw_asset(),
    }
    decode = Decoder("here", task, kind, settings)
    return Batch(task, [decode(samples[kind], epoch) for epoch in range(epochs)])


@pytest.mark.parametrize("task", [task for task in Task if KINDS[task] != "assets"])
def test_pictures_and_clips_are_the_tokenizers(task: Task) -> None:
    made = batch(task)
    pixels = [item.pixels for item in made.items if item.pixels is not None]
    expected, sizes = visuals_to_tokens([uint8_to_float(one) for one in pixels], fit="crop")
    tokens = made.tokens().validate()
    assert torch.equal(tokens.features, expected.features)
    assert torch.equal(tokens.positions, expected.positions)
    assert torch.equal(tokens.lengths, expected.lengths)
    assert made.sizes() == sizes
    assert made.num_tokens == tokens.num_tokens == sum(item.tokens for item in made)
    for back, item in zip(tokens_to_pixels(tokens, sizes), pixels, strict=True):
        assert torch.equal(float_to_uint8(back), item if item.ndim == 4 else item[None])


@pytest.mark.parametrize("task", [Task.ASSET_UNDERSTANDING, Task.ASSET_RECONSTRUCTION])
def test_voxels_are_the_tokenizers(task: Task) -> None:
    made = batch(task)
    expected = SparseTokens.cat(
        [
            voxels_to_tokens(item.features.float() / 255, item.coordinates.int())
            for item in made.items
            if item.features is not None and item.coordinates is not None
        ]
    )
    tokens = made.tokens().validate()
    assert torch.equal(tokens.features, expected.features)
    assert torch.equal(tokens.positions, expected.positions)
    assert made.sizes() == [AssetSize(64)] * 3
    assert (made.items[0].views is not None) == (task == Task.ASSET_RECONSTRUCTION)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=5),
    st.sampled_from([(4, 16, 16), (2, 8, 16), (1, 4, 4)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=30, deadline=None)
def test_counts_agree(grids: list[tuple[int, int, int]], patch: tuple[int, int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(grids))
    items = []
    for number, (steps, rows, columns) in enumerate(grids):  # no steps: a picture
        shape = [steps * patch[0]] * (steps > 0) + [rows * patch[1], columns * patch[2], 3]
        pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        items.append(Item(str(number), "here", Task.VIDEO_RECONSTRUCTION, max(1, steps) * rows * columns, pixels))
    made = Batch(Task.VIDEO_RECONSTRUCTION, items)
    tokens = made.tokens(dtype=dtype, patch_size=patch)
    assert tokens.lengths.tolist() == [item.tokens for item in items]
    assert tokens.dtype == dtype
    expected, _ = visuals_to_tokens([uint8_to_float(i.pixels) for i in items if i.pixels is not None], patch, "crop")
    assert torch.equal(tokens.features, expected.features.to(dtype))
    with pytest.raises(InputError, match="but says"):
        Batch(made.task, [*items[1:], replace(items[0], tokens=items[0].tokens + 1)]).tokens(patch_size=patch)


@given(st.sampled_from(list(Task)), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_items_count_their_tokens(task: Task, epoch: int) -> None:
    decode = Decoder("here", task, KINDS[task], SETTINGS, seed=epoch)
    sample = {
        "images": raw({"jpg": picture_file(scene(1, 70, 200)[0], "JPEG")}),
        "videos": raw({"mp4": clip_file(40)}),
        "assets": raw_asset(),
    }[KINDS[task]]
    made = Batch(task, [decode(sample, epoch)])
    assert made.tokens().num_tokens == made.items[0].tokens


def test_words_and_order_are_kept() -> None:
    made = batch(Task.IMAGE_UNDERSTANDING)
    other = replace(made.items[0], id="other", caption=None)
    mixed = Batch(made.task, [other, *made.items])
    assert mixed.ids == ["other", *["train-000000.tar/000001"] * 3]
    assert mixed.captions == [None, *["a red chair"] * 3]
    assert len(mixed) == 4
    assert torch.equal(mixed.pin_memory().tokens().features, mixed.tokens().features)


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        Batch(Task.IMAGE_RECONSTRUCTION, []).tokens()
    bare = Item("bare", "here", Task.IMAGE_RECONSTRUCTION, 1)
    with pytest.raises(InputError, match="bare: holds neither"):
        Batch(bare.task, [bare]).tokens()
    odd = replace(bare, pixels=torch.zeros(17, 16, 3, dtype=torch.uint8))
    with pytest.raises(InputError, match="no whole patches"):
        Batch(bare.task, [odd]).tokens()
    assert Batch(bare.task, [replace(bare, pixels=torch.zeros(16, 32, 3, dtype=torch.uint8))]).sizes() == [
        VisualSize("image", 1, 16, 32)
    ]
    coloured = replace(bare, features=torch.zeros(1, 48, dtype=torch.uint8), coordinates=torch.zeros(1, 3).short())
    with pytest.raises(InputError, match="do not fit"):
        Batch(bare.task, [coloured]).tokens()
