"""`python -m tokenizer.training --config configs/tokenizer/nano.yaml key=value ...`: train on one machine."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tokenizer.config import load_config
from tokenizer.errors import InputError
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.config import CONFIGS
from tokenizer.training.config import TrainConfig
from tokenizer.training.initialise import start_from_linear_codes, start_from_model
from tokenizer.training.store import TrainingStore
from tokenizer.training.trainer import Trainer


def starting_network(config: TrainConfig) -> ATokenNetwork:
    """The network a run starts from: drawn from the seed and the linear code, or an earlier model."""
    if config.model not in CONFIGS:
        raise InputError(f"unknown model '{config.model}'; known: {', '.join(CONFIGS)}")
    sizes = replace(CONFIGS[config.model], name=config.name, quantizer=config.quantizer)
    network = ATokenNetwork(sizes)
    if config.initialise != "codes":
        start_from_model(network, config.initialise)
        return network
    generator = torch.Generator().manual_seed(config.seed)
    network.reset_parameters(generator)
    store = TrainingStore(config.data, config.batch)
    # A stream of its own: the patches of the codes are not the crops of step 0.
    stills, clips = store.sample_patches(config.code_patches, sizes.patch_size, (config.seed, 1, 0))
    figures = start_from_linear_codes(network, stills, clips, config.code_iterations, generator)
    print("linear codes, PSNR in dB: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    return network


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tokenizer.training", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, see configs/tokenizer/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("overrides", nargs="*", help="settings to change, as key=value")
    options = parser.parse_args(arguments)
    try:
        config = load_config(TrainConfig, options.config, options.overrides)
        perceptual = None
        if config.loss.lpips:
            from tokenizer.losses.lpips import LPIPS

            perceptual = LPIPS.from_package(config.loss.lpips_backbone)
        trainer = Trainer(config, starting_network(config), perceptual, torch.device(options.device))
        network = trainer.run()
        from tokenizer.checkpoints import save_network

        save_network(network, Path(config.out) / "model")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
