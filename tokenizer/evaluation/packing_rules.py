"""Which packing rule serves a model best: each gets the best linear reading of its tokens, and is measured.

    python -m tokenizer.evaluation.packing_rules --config configs/tokenizer/nano-gaussians.yaml

For every rule, voxels go through the frozen autoencoder, the linear start of a Gaussian decoder is fitted to training
assets (`tokenizer.training.gaussian_start`), and what it draws is compared with unseen views of evaluation assets, of
every fifth of the split. No rule gets more training than another, and none is measured with a decoder trained on
another's tokens.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tokenizer.api import AToken
from tokenizer.assets.rules import PACKING_RULES, PackingRule
from tokenizer.config import load_config
from tokenizer.errors import InputError
from tokenizer.evaluation.assets import draw, mean_psnr
from tokenizer.gaussians import GaussianDecoder
from tokenizer.training.asset_store import decode_all, decoded_voxels, read_store
from tokenizer.training.gaussian_trainer import GaussianTrainConfig, fit_start

FITTED, EVERY = 20, 5


def measure_rule(config: GaussianTrainConfig, model: AToken, rule: PackingRule) -> float:
    """Mean PSNR in dB over the assets."""
    settings = replace(config.decoder, packing=rule)
    cache = Path(config.data) / "decoded"
    training = read_store(config.data, "train")
    chosen = training[:: max(1, len(training) // FITTED)][:FITTED]
    usable, _ = decode_all(model, chosen, rule, settings.resolution, cache)
    decoder = GaussianDecoder(settings)
    decoder.reset_parameters(torch.Generator().manual_seed(config.seed))
    fit_start(decoder, model, usable, cache)
    found = []
    for asset in read_store(config.data, "evaluation")[::EVERY]:
        unseen = asset.views("unseen")
        with torch.no_grad():
            gaussians = decoder.gaussians(decoded_voxels(model, asset, rule, settings.resolution, cache))
        found.append(mean_psnr(draw(gaussians, unseen.cameras, unseen.size), unseen.composited()))
    return sum(found) / len(found)


def main(arguments: list[str]) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenizer.evaluation.packing_rules", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="of the decoder's training, see configs/tokenizer/")
    parser.add_argument("overrides", nargs="*", help="settings to change, as key=value")
    options = parser.parse_args(arguments)
    try:
        config = load_config(GaussianTrainConfig, options.config, options.overrides)
        model = AToken.from_pretrained(config.model, dtype=torch.float32)
        results = {rule: measure_rule(config, model, rule) for rule in PACKING_RULES}
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = Table("rule", "PSNR dB", title=f"{config.model}, linear decoder")
    for rule, value in results.items():
        table.add_row(rule, f"{value:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
