"""`torch.set_default_device`: what the host works out stays on the host, wherever new tensors go by default.

The device "meta" stands for a GPU: nothing can be read from a tensor that went there by mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tokenizer.test_asset_codec import BOX
from tokenizer import AToken, InputError, SparseTokens, TokenFile
from tokenizer.cameras import cameras_from_transforms, sphere_cameras, transforms_from_cameras, turntable_cameras
from tokenizer.gaussians.edit import crop, merge
from tokenizer.gaussians.ply import read_ply, write_ply
from tokenizer.gaussians.rasterize import rasterize
from tokenizer.model.context import Tiling
from tokenizer.patches import tokens_to_pixels, visuals_to_tokens
from tokenizer.preprocess import Preprocessing, process_image
from tokenizer.streaming import decode_stream, encode_stream
from tokenizer.voxels import occupied_voxels, surface_points

TILING = Tiling(stride=8, context=8)


@contextmanager
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def visuals(model: AToken, folder: Path) -> Iterator[Tensor]:
    video = torch.rand(21, 33, 40, 3, generator=seeded(0), device="cpu") * 2 - 1
    tokens, sizes = visuals_to_tokens([video[0], video])
    encoding = model.encode(tokens)
    yield encoding.pooled
    yield encoding.posterior.sample(seeded(1)).features
    for tiling in (None, TILING):
        yield from tokens_to_pixels(model.decode(encoding.latents, tiling), sizes)
    tiles = list(encode_stream(model, video))
    for kept in (encoding.latents, encoding.indices):
        if kept is not None:
            yield from decode_stream(model, [kept[1]], sizes[1], TILING)
    if model.quantizer is not None:
        yield model.quantizer.decode(torch.arange(8, device="cpu")[None])
    yield torch.cat([tile.encoding.latents.features for tile in tiles])
    model.encode_image(video[0]).save(folder / "a.atok")
    yield torch.from_numpy(model.decode_visual(TokenFile.load(folder / "a.atok")))
    with pytest.raises(InputError, match=r"row 1 .* same position"):
        SparseTokens(tokens.features, torch.zeros_like(tokens.positions), tokens.lengths).validate()
    random = Preprocessing(
        min_size=(16, 16), max_size=(33, 40), random_scale=True, random_crop=True, max_time_offset=4, keep_patches=0.5
    )
    yield process_image(video[:1] * 127.5 + 127.5, random, seeded(2)).features


def assets(model: AToken, folder: Path) -> Iterator[Tensor]:
    (folder / "box.mtl").write_text("newmtl orange\nKd 0.9 0.5 0.1\n")
    (folder / "box.obj").write_text(BOX)
    gaussians = model.decode_asset(model.encode_asset(folder / "box.obj"), original=True)
    yield gaussians.means
    yield gaussians.select(slice(0, 5)).lengths
    write_ply(gaussians, folder / "box.ply")
    cut = crop(merge([read_ply(folder / "box.ply"), gaussians]), (8, -2, -4), (12, 3, 4))
    yield cut.means
    cameras = turntable_cameras(2, radius=0.75)
    yield rasterize(cut, cameras, 16).colours
    yield cameras_from_transforms({"frames": transforms_from_cameras(sphere_cameras(3, 1.0))}).world_to_camera
    yield occupied_voxels(surface_points(torch.full((2, 8, 8), 1.7, device="cpu"), cameras), 16)


@pytest.mark.parametrize("what", [visuals, assets])
@pytest.mark.parametrize("name", ["atoken-nano", "atoken-nano-d"])
def test_results_do_not_depend_on_where_new_tensors_go(
    tiny_models: Path, tmp_path: Path, name: str, what: Callable[[AToken, Path], Iterator[Tensor]]
) -> None:
    model = AToken.from_pretrained(tiny_models / name, dtype=torch.float32).requires_grad_(False)
    expected = list(what(model, tmp_path))
    with elsewhere():
        results = list(what(model, tmp_path))
    assert len(results) == len(expected)
    assert all(torch.equal(result, value) for result, value in zip(results, expected, strict=True))
