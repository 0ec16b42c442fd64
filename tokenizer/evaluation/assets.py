"""Measure a model's 3D side on assets that no training has seen, beside one flat Gaussian for each voxel.

    python -m tokenizer.evaluation.assets --model atoken-nano --data datasets/furniture --out outputs/assets

Every asset of the evaluation split is seen from 16 sides, encoded, decoded, and drawn from 8 other sides at 256 x 256
on a black ground. The baseline has the same voxels: each is an opaque sphere of the mean colour that the views show in
it, all of one size. Two sizes are tried: the one that is best for all assets together, and, stricter, the best for each
asset alone. PSNR is the mean over the views of an asset, then over assets. Writes `results.json` and contact sheets.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from tokenizer.api import AToken
from tokenizer.assets.packing import octants
from tokenizer.assets.rules import PACKING_RULES, PackingRule
from tokenizer.assets.views import Views
from tokenizer.atomic import atomic_path
from tokenizer.cameras import Cameras
from tokenizer.errors import InputError
from tokenizer.evaluation.metrics import ssim
from tokenizer.gaussians import Gaussians
from tokenizer.gaussians.attributes import SH_DEGREE_0
from tokenizer.gaussians.rasterize import rasterize
from tokenizer.media import save_image
from tokenizer.training.asset_store import StoredAsset, read_store

SIZES = (0.2, 0.24, 0.28, 0.32, 0.37, 0.43)
"""Standard deviations of the flat Gaussians that are tried, in voxels."""

OPAQUE_LOGIT = 7.0
SHEETS = 12
"""How many assets get a contact sheet."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one asset: PSNR in dB and SSIM of the model, PSNR of the baseline by size, tokens and Gaussians."""

    name: str
    psnr: float
    ssim: float
    flat: dict[float, float]
    tokens: int
    gaussians: int


def flat_gaussians(views: Views, resolution: int) -> Gaussians:
    """One opaque sphere for each voxel, of the mean colour that the views show in it; as wide as the voxel."""
    voxels, _, colours, counts = octants(views, resolution)
    mean = (colours * counts[..., None]).sum(dim=1) / counts.sum(dim=1, keepdim=True)
    count = len(mean)
    return Gaussians(
        means=(voxels.coordinates.float() + 0.5) / resolution - 0.5,
        scales=torch.full((count, 3), 1 / resolution),
        quaternions=torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(count, 1),
        dc=(mean - 0.5) / SH_DEGREE_0,
        opacity_logits=torch.full((count, 1), OPAQUE_LOGIT),
        lengths=torch.tensor([count]),
    )


def flat_psnr(seen: Views, cameras: Cameras, wanted: Tensor, resolution: int) -> dict[float, float]:
    """PSNR in dB of flat spheres of each of `SIZES`."""
    spheres, found = flat_gaussians(seen, resolution), {}
    for size in SIZES:
        sized = replace(spheres, scales=torch.full_like(spheres.scales, size / resolution))
        found[size] = mean_psnr(draw(sized, cameras, wanted.shape[1]), wanted)
    return found


def draw(gaussians: Gaussians, cameras: Cameras, size: int) -> Tensor:
    """Pictures on black, rounded to 8 bits: [V, H, W, 3] in 0..1."""
    with torch.no_grad():
        colours = rasterize(gaussians, cameras, size).colours
    return (colours.clamp(0, 1) * 255).round() / 255


def mean_psnr(drawn: Tensor, wanted: Tensor) -> float:
    """Mean over views of the PSNR in dB, for values in 0..1; at most 100 dB, where a view is equal."""
    error = (drawn - wanted).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
    return float((-10 * error.log10()).mean())


def measure(
    model: AToken, asset: StoredAsset, rule: PackingRule | None, baseline: int | None
) -> tuple[Figures, Tensor]:
    """Figures of one asset, and its contact sheet: [2 H, V W, 3], originals above.

    Args:
        baseline: resolution of the flat voxels; None leaves the baseline out.
    """
    encoding = model.encode_asset(asset.views("seen"), rule)
    gaussians = model.decode_asset(encoding)
    unseen = asset.views("unseen")
    wanted = (unseen.composited() * 255).round() / 255
    drawn = draw(gaussians, unseen.cameras, unseen.size).cpu()
    flat = {} if baseline is None else flat_psnr(asset.views("seen"), unseen.cameras, wanted, baseline)
    pairs = zip(_uint8(wanted), _uint8(drawn), strict=True)
    likeness = float(np.mean([ssim(original, copy) for original, copy in pairs]))
    sheet = torch.stack([wanted, drawn]).permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)
    figures = Figures(asset.name, mean_psnr(drawn, wanted), likeness, flat, encoding.tokens.num_tokens, len(gaussians))
    return figures, sheet


def summary(found: list[Figures]) -> dict[str, Any]:
    """Means over assets."""
    result: dict[str, Any] = {
        "assets": len(found),
        "psnr": _mean([f.psnr for f in found]),
        "ssim": _mean([f.ssim for f in found]),
        "tokens": _mean([float(f.tokens) for f in found]),
        "gaussians": _mean([float(f.gaussians) for f in found]),
    }
    if found[0].flat:
        by_size = {size: _mean([f.flat[size] for f in found]) for size in SIZES}
        best = max(by_size, key=lambda size: by_size[size])
        result["flat psnr, one size"] = by_size[best]
        result["flat size in voxels"] = best
        result["flat psnr, best size of each asset"] = _mean([max(f.flat.values()) for f in found])
    return result


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _uint8(pictures: Tensor) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    return list((pictures * 255).round().byte().numpy())


def main(arguments: list[str]) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.evaluation.assets", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", required=True, help="bundled name or folder")
    parser.add_argument("--gaussians", type=Path, help="Gaussian decoder, if not the model's own")
    parser.add_argument("--data", type=Path, required=True, help="store (python -m data.sources.furniture)")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and contact sheets")
    parser.add_argument("--packing", choices=PACKING_RULES, help="by default what the model was trained on")
    parser.add_argument("--limit", type=int, help="only this many assets")
    parser.add_argument("--baseline", type=int, help="resolution of the flat voxels; by default that of the tokens")
    parser.add_argument("--no-baseline", action="store_true", help="measure the model alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    try:
        model = AToken.from_pretrained(options.model, dtype=torch.float32, device=options.device)
        if options.gaussians is not None:
            model.load_gaussian_decoder(options.gaussians, dtype=torch.float32)
        if model.gaussian_decoder is None:
            raise InputError(f"{options.model}: has no Gaussian decoder; name one with --gaussians")
        resolution = options.baseline or model.gaussian_decoder.config.resolution
        assets = read_store(options.data, "evaluation")[: options.limit]
        found, broken = [], {}
        for number, asset in enumerate(track(assets, description="assets")):
            try:
                figures, sheet = measure(model, asset, options.packing, None if options.no_baseline else resolution)
            except InputError as error:
                broken[asset.file.name] = str(error)
                continue
            found.append(figures)
            if number % max(1, len(assets) // SHEETS) == 0:
                save_image(_uint8(sheet[None])[0], options.out / f"{asset.file.stem}.png")
        if not found:
            raise InputError(f"{options.data}: no asset of the evaluation split can be used")
        means = summary(found)
        _write(options, means, found, broken)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = Table("figure", "value", title=f"{options.model} on {len(found)} assets")
    for name, value in means.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    return 0


def _write(options: argparse.Namespace, means: dict[str, Any], found: list[Figures], broken: dict[str, str]) -> None:
    results = {
        "model": str(options.model),
        "gaussians": str(options.gaussians) if options.gaussians else None,
        "packing": options.packing,
        "mean": means,
        "assets": [{"name": f.name, "psnr": f.psnr, "ssim": f.ssim, "flat": f.flat, "tokens": f.tokens} for f in found],
        "left out": broken,
    }
    with atomic_path(options.out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
