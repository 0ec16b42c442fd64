"""`python -m benchmarks.evaluation`: time per image of the metrics beside the time of the model they measure.

The model is as large as the released ones (so400m), with random weights; pictures are 256 x 256. A metric may be told
by what it costs beside one encoding and decoding of the same picture: "of the model" is that quotient, and all metrics
together must stay below 1. Features of Fréchet distances count twice, for original and copy, although an evaluation of
several models computes those of the originals once. All calls take turns, and the fastest time of each counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import check_options, describe, find_device, seconds_in_turns
from tokenizer.api import AToken
from tokenizer.atomic import atomic_path
from tokenizer.cli.outcome import run
from tokenizer.errors import InputError
from tokenizer.evaluation.command.baselines import CODERS, best_within
from tokenizer.evaluation.command.samples import Frames
from tokenizer.evaluation.features import load_features
from tokenizer.evaluation.metrics import PairMetrics
from tokenizer.losses.lpips import BACKBONES, LPIPS
from tokenizer.model.config import CONFIGS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDE = 256
MODEL = "encode and decode"


def pictures(count: int, seed: int = 0) -> tuple[list[Frames], list[Frames]]:
    """Smooth random pictures and noisy copies of them, uint8 [1, 256, 256, 3] each."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 16, 16, 3))
    smooth = coarse.repeat(SIDE // 16, axis=1).repeat(SIDE // 16, axis=2)
    noisy = smooth + rng.normal(0, 8, smooth.shape)
    return [[frame[None] for frame in np.clip(each, 0, 255).astype(np.uint8)] for each in (smooth, noisy)]  # type: ignore[return-value]


def calls(
    model: AToken, device: torch.device, originals: Sequence[Frames], copies: Sequence[Frames]
) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each call works on all pictures."""

    def reconstruct() -> None:
        for picture in originals:
            model.decode_visual(model.encode_image(picture[0]))

    found: dict[str, Callable[[], object]] = {MODEL: reconstruct}
    found["PSNR and SSIM"] = lambda: PairMetrics({}, device).measure(originals, copies)
    for backbone in BACKBONES:
        network = LPIPS.from_package(backbone).to(device)
        found[f"LPIPS {backbone}"] = _lpips_alone(network, device, originals, copies)
    lite0 = load_features("lite0", device=device)
    found["features of lite0, both sides"] = lambda: lite0.measure([*originals, *copies])
    try:
        inception = load_features("inception", device=device)
    except InputError:  # its weights are the user's business
        pass
    else:
        found["features of inception, both sides"] = lambda: inception.measure([*originals, *copies])
    bits = model.config.latent_channels * 16.0 * (SIDE // 16) ** 2
    for name in ("jpeg", "webp"):
        found[f"baseline {name}"] = lambda coder=CODERS[name]: [  # type: ignore[misc]
            best_within(coder, picture, bits) for picture in originals
        ]
    return found


def _lpips_alone(
    network: LPIPS, device: torch.device, originals: Sequence[Frames], copies: Sequence[Frames]
) -> Callable[[], object]:
    """LPIPS without the other figures of `PairMetrics`."""
    a, b = (
        torch.from_numpy(np.concatenate(list(frames))).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        for frames in (originals, copies)
    )

    def call() -> None:
        with torch.inference_mode():
            network(a, b)

    return call


def main(arguments: list[str]) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="so400m-c", choices=sorted(CONFIGS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the model; by default bf16 on CUDA, else fp32")
    parser.add_argument("--pictures", type=int, help="by default 8 on CUDA, else 1")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file too")
    options = parser.parse_args(arguments)
    return run(lambda: _run(options, " ".join(["python -m benchmarks.evaluation", *arguments])))


def _run(options: argparse.Namespace, command: str) -> None:
    check_options(options, "pictures", "repeats")
    device = find_device(options.device)
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    count = options.pictures or (8 if device.type == "cuda" else 1)
    with torch.device(device):
        model = AToken(CONFIGS[options.config])
    model.reset_parameters(torch.Generator(device=device).manual_seed(0))
    model = model.to(dtype).eval().requires_grad_(False)
    timed = calls(model, device, *pictures(count))
    taken = seconds_in_turns(list(timed.values()), device, options.repeats)
    each = dict(zip(timed, (time / count for time in taken), strict=True))
    metrics = sum(time for name, time in each.items() if name != MODEL and not name.startswith("baseline"))
    report: dict[str, Any] = {
        "command": command,
        **describe(device),
        "config": options.config,
        "dtype": str(dtype).removeprefix("torch."),
        "pictures": count,
        "seconds an image": {**each, "all metrics": metrics},
        "metrics of the model": metrics / each[MODEL],
    }
    Console().print(_table(report))
    if options.out:
        with atomic_path(options.out) as path:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        Console().print(f"wrote {options.out}")


def _table(report: dict[str, Any]) -> Table:
    title = f"{report['config']}, {report['dtype']} on {report['device']}, torch {report['torch']}"
    table = Table("what", "ms an image", "of the model", title=title)
    model = report["seconds an image"][MODEL]
    for name, time in report["seconds an image"].items():
        table.add_row(name, f"{time * 1000:.1f}", f"{time / model:.3f}")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
