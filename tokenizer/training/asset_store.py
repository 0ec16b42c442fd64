"""Rendered assets from a store (`python -m data.sources.furniture`), and what a frozen model makes of their voxels.

The autoencoder does not change while a Gaussian decoder is trained, so every asset passes through it once: what the
decoder will see is kept beside the views, in half precision, named by the model's latent space and the packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenizer.api import AToken
from tokenizer.assets.packing import pack
from tokenizer.assets.rules import PackingRule
from tokenizer.assets.views import Views
from tokenizer.atomic import atomic_path
from tokenizer.cameras import Cameras
from tokenizer.config import read_mapping
from tokenizer.errors import InputError
from tokenizer.sparse import SparseTokens
from tokenizer.tensorio import write_safetensors
from tokenizer.voxels import voxel_features, voxels_to_tokens

Split = Literal["train", "evaluation"]


@dataclass(frozen=True, slots=True)
class StoredAsset:
    """One asset of a store. name and category are captions."""

    file: Path
    name: str
    category: str

    def views(self, part: Literal["seen", "unseen"]) -> Views:
        """All views that a model sees, or all that it does not (these come without depth).

        Raises:
            InputError: a missing or damaged file.
        """
        with _open(self.file) as stored:
            colours: Tensor = stored.get_tensor(f"{part}.colours")
            cameras = Cameras(stored.get_tensor(f"{part}.world_to_camera"), stored.get_tensor(f"{part}.intrinsics"))
            has_depth = f"{part}.depth" in stored.keys()  # noqa: SIM118  (not a mapping)
            depth = stored.get_tensor(f"{part}.depth").float() if has_depth else torch.full(colours.shape[:3], -1.0)
        return Views(colours.numpy(), depth, cameras)

    def some_views(self, chosen: Sequence[int]) -> tuple[Tensor, Cameras]:
        """Pictures uint8 [V, H, W, 4] and cameras by number, the seen ones first; reads no others."""
        with _open(self.file) as stored:
            slices = {part: stored.get_slice(f"{part}.colours") for part in ("seen", "unseen")}
            seen = slices["seen"].get_shape()[0]
            pictures = [
                slices["seen"][n : n + 1] if n < seen else slices["unseen"][n - seen : n - seen + 1] for n in chosen
            ]
            matrices, intrinsics = (
                torch.cat([stored.get_tensor(f"{part}.{name}") for part in ("seen", "unseen")])[list(chosen)]
                for name in ("world_to_camera", "intrinsics")
            )
        return torch.cat(pictures), Cameras(matrices, intrinsics)


def read_store(folder: str | Path, split: Split) -> list[StoredAsset]:
    """The assets of one split.

    Raises:
        InputError: no store there, or a damaged one.
    """
    root = Path(folder)
    if not (root / "manifest.json").is_file():
        raise InputError(f"{root}: no store of assets; make one with: python -m data.sources.furniture --out {folder}")
    manifest = read_mapping(root / "manifest.json")
    try:
        entries = [entry for entry in manifest["models"] if entry["split"] == split]
        assets = [StoredAsset(root / e["file"], str(e["name"]), str(e["category"])) for e in entries]
    except (KeyError, TypeError) as error:
        raise InputError(f"{root}/manifest.json: damaged ({type(error).__name__}); make the store again") from None
    if not assets:
        raise InputError(f"{root}: holds no assets of the split '{split}'")
    return assets


def decoded_voxels(model: AToken, asset: StoredAsset, rule: PackingRule, resolution: int, cache: Path) -> SparseTokens:
    """What the autoencoder makes of an asset's voxels: [N, 768] float32, nominally in [-1, 1].

    Args:
        model: frozen; its latents are means or quantised values, never samples.
        rule: how views become voxels.
        cache: folder where results are kept and looked for.
    """
    file = cache / f"{model.fingerprint}-{rule}-{resolution}" / asset.file.name
    if file.is_file():
        with _open(file) as stored:
            features, positions = stored.get_tensor("features").float(), stored.get_tensor("positions").int()
        return SparseTokens(features, positions, [len(features)])
    generator = torch.Generator().manual_seed(0)  # used by the released rule on more pixels than it keeps
    voxels = pack(asset.views("seen"), rule, resolution, generator)
    tokens = voxels_to_tokens(voxels.features, voxels.coordinates, model.config.patch_size)
    with torch.no_grad():
        patches = model.decode(model.encode(tokens.to(model.device)).latents)
    decoded = voxel_features(patches, model.config.patch_size)
    features, positions = decoded.features.half().cpu(), decoded.host_positions.short()
    with atomic_path(file) as temporary:
        write_safetensors({"features": features.contiguous(), "positions": positions.contiguous()}, temporary)
    return SparseTokens(features.float(), positions.int(), [len(features)])


def decode_all(
    model: AToken, assets: Sequence[StoredAsset], rule: PackingRule, resolution: int, cache: Path
) -> tuple[list[StoredAsset], dict[str, str]]:
    """Fill the cache of `decoded_voxels`, with a progress bar.

    Returns:
        The assets that can be used, and why others cannot, by file.
    """
    usable, skipped = [], {}
    for asset in track(assets, description=f"{rule} voxels through {model.config.name}"):
        try:
            decoded_voxels(model, asset, rule, resolution, cache)
        except InputError as error:
            skipped[asset.file.name] = str(error)
        else:
            usable.append(asset)
    return usable, skipped


def random_views(rng: np.random.Generator, asset: StoredAsset, count: int) -> tuple[Tensor, Cameras]:
    """`count` different views of an asset, seen or not."""
    with _open(asset.file) as stored:
        total = sum(stored.get_slice(f"{part}.colours").get_shape()[0] for part in ("seen", "unseen"))
    return asset.some_views(rng.choice(total, size=min(count, total), replace=False).tolist())


def _open(file: Path) -> Any:
    opener: Any = safe_open  # safetensors ships no types for what it returns
    try:
        return opener(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable asset of the store ({' '.join(str(error).split())})") from None
