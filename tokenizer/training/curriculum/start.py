"""Where a run begins: weights drawn, from SigLIP 2, from an earlier stage, or fitted to the data (`StartConfig`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tokenizer.api import AToken
from tokenizer.checkpoints import WEIGHTS_FILE, bundled_models
from tokenizer.config import parse_config, read_mapping
from tokenizer.errors import InputError
from tokenizer.gaussians.checkpoints import SUBFOLDER as GAUSSIANS
from tokenizer.gaussians.checkpoints import load_gaussian_decoder
from tokenizer.gaussians.config import GaussianDecoderConfig
from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.model.atoken import ATokenNetwork, draw_linear
from tokenizer.model.config import ATokenConfig
from tokenizer.text.alignment import SUBFOLDER, AlignmentConfig, TextAlignment, load_text_alignment
from tokenizer.text.protocol import TextTower
from tokenizer.training.curriculum.checkpoint import CHECKPOINTS, newest_good, read_weights, step_of
from tokenizer.training.curriculum.codes import sample_patches
from tokenizer.training.curriculum.config import RunConfig, TextConfig, network_config
from tokenizer.training.curriculum.model import Imitation, TrainedModel
from tokenizer.training.curriculum.siglip2 import start_from_siglip2
from tokenizer.training.curriculum.stages import grown, kept_consistent, quantised, refit_codes
from tokenizer.training.feeding import StepBatch
from tokenizer.training.initialise import start_from_linear_codes

MODEL = "model"
"""Folder in that of a run with what came out: averaged weights."""

STEPS = "steps.json"
"""File in there: after how many steps, {"steps": N}."""

Batches = Callable[[], Iterable[StepBatch]]
"""Opens the training data once more, to fit linear codes to it."""


@dataclass(frozen=True, slots=True)
class Previous:
    """What an earlier run left."""

    network: ATokenNetwork
    alignment: TextAlignment | None
    gaussians: GaussianDecoder | None


def starting_model(config: RunConfig, tower: TextTower | None, batches: Batches | None) -> TrainedModel:
    """The model of a run before its first step, float32 on the CPU; the same in every process.

    Args:
        config: the run.
        tower: its text tower.
        batches: for linear codes that are fitted. None where the weights come later, from a checkpoint of this run:
            nothing is fitted or read, so that where a run started from may be gone.

    Raises:
        InputError: weights that are missing, damaged or of another model, or linear codes for a model without.
    """
    generator = torch.Generator().manual_seed(config.seed)
    sizes = network_config(config)
    if sizes.skip is None and (config.start.kind == "codes" or config.start.refit):
        raise InputError("start.kind=codes and start.refit fit linear codes, which this model has none of; leave them")
    previous = None
    if batches is None:
        network = ATokenNetwork(sizes)
    elif config.start.kind == "model":
        previous = load_previous(str(config.start.source))
        network = _adapted(previous.network, sizes, str(config.start.source), generator)
        if config.start.refit:
            refit_codes(network, *_patches(config, sizes, batches), config.start.iterations, generator)
    else:
        network = ATokenNetwork(sizes)
        network.reset_parameters(generator)
    if batches is not None and config.start.kind == "siglip2":
        start_from_siglip2(network.encoder, sizes.patch_size, str(config.start.source))
    if batches is not None and config.start.kind == "codes":
        stills, clips = _patches(config, sizes, batches)
        start_from_linear_codes(network, stills, clips, config.start.iterations, generator)
    alignment = _alignment(config, tower, sizes.encoder.width, previous, generator)
    gaussians = _gaussians(config, previous, generator, comes_later=batches is None)
    imitation = None
    if config.loss.imitation:
        imitation = Imitation(sizes.encoder.width, config.choices.imitated_width)
        draw_linear(imitation, generator)  # last, so that what is drawn before is the same without it
    model = TrainedModel(network, alignment, gaussians, imitation).requires_grad_(True).train()
    if alignment is not None:
        alignment.scale.requires_grad_(config.choices.sigmoid_trained)
    return model


def _patches(config: RunConfig, sizes: ATokenConfig, batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    return sample_patches(batches(), config.start.patches, sizes.patch_size, config.seed)


def load_previous(source: str) -> Previous:
    """What a run's folder, a model's folder or a bundled name holds.

    Of a run that did not end, or has gone on since, its last checkpoint.

    Raises:
        InputError: nothing there, or unreadable.
    """
    folder = Path(source)
    has_model, has_checkpoints = (folder / MODEL / WEIGHTS_FILE).is_file(), (folder / CHECKPOINTS).is_dir()
    if has_checkpoints and not (has_model and _is_newest(folder)):
        return _from_checkpoint(folder)
    if has_model:
        folder = folder / MODEL
    model = AToken.from_pretrained(source if source in bundled_models() else folder, dtype=torch.float32)
    network = ATokenNetwork(model.config)
    network.load_state_dict(model.state_dict())
    gaussians = model.gaussian_decoder
    aligned = (folder / SUBFOLDER).is_dir()
    return Previous(network, load_text_alignment(folder) if aligned else None, gaussians)


def _is_newest(run: Path) -> bool:
    """Whether no checkpoint of a run is of more steps than its model, where that says how many it is of."""
    path = run / MODEL / STEPS
    newest = newest_good(run / CHECKPOINTS) if path.is_file() else None
    return newest is None or step_of(newest) <= int(read_mapping(path)["steps"])


def _from_checkpoint(run: Path) -> Previous:
    found = newest_good(run / CHECKPOINTS)
    if found is None:
        raise InputError(f"{run}: holds no whole checkpoint to start from")
    weights = read_weights(found)
    settings = parse_config(RunConfig, weights.settings, str(found))
    network = ATokenNetwork(network_config(settings))
    network.load_state_dict(_below("network.", weights.average))
    alignment = gaussians = None
    if weights.alignment is not None:
        alignment = TextAlignment(parse_config(AlignmentConfig, weights.alignment, str(found)))
        alignment.load_state_dict(_below("alignment.", weights.average))
    if settings.gaussians is not None:
        gaussians = GaussianDecoder(settings.gaussians)
        gaussians.load_state_dict(_below("gaussians.", weights.average), strict=False)
    return Previous(network, alignment, gaussians)


def _below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _adapted(network: ATokenNetwork, sizes: ATokenConfig, source: str, generator: torch.Generator) -> ATokenNetwork:
    """The earlier network with the latents of this stage, consistent with them where this stage is."""
    if sizes.skip is not None and sizes.skip.consistent and _can_be_consistent(network.config):
        network = kept_consistent(network)
    theirs = network.config
    if _apart_from_latents(theirs, theirs) != _apart_from_latents(sizes, theirs):
        raise InputError(f"{source}: holds {theirs.name}, whose sizes are not those of this run; set model to them")
    if sizes.latent_channels != theirs.latent_channels:
        network = grown(network, sizes.latent_channels, generator)
    if sizes.quantizer is not None:
        network = quantised(network, sizes.quantizer)
    elif network.quantizer is not None:
        raise InputError(f"{source}: is discrete; set quantizer as it has it, or start from a continuous model")
    result = ATokenNetwork(sizes)
    result.load_state_dict(network.state_dict())
    return result


def _apart_from_latents(config: ATokenConfig, network: ATokenConfig) -> ATokenConfig:
    """Sizes without what latents are: FSQ and linear codes together have limits of their own."""
    skip = config.skip
    if skip is not None and network.quantizer is not None:  # of digits, which nothing is consistent with
        skip = replace(skip, consistent=False)
    return replace(config, name="", latent_channels=1, quantizer=None, skip=skip)


def _can_be_consistent(config: ATokenConfig) -> bool:
    return config.skip is not None and config.quantizer is None


def alignment_config(text: TextConfig, tower: TextTower, width: int, scale_trained: bool) -> AlignmentConfig:
    """What stands between pooled vectors of `width` numbers and a tower's."""
    assert text.tower != "none"
    return AlignmentConfig(
        width=width,
        text_width=tower.width,
        tower=text.tower,
        tower_name=tower.name,
        folder=text.folder,
        projection=text.projection == "linear" or width != tower.width,
        scale_trained=scale_trained,
    )


def _alignment(
    config: RunConfig, tower: TextTower | None, width: int, previous: Previous | None, generator: torch.Generator
) -> TextAlignment | None:
    """The earlier run's if it was aligned with the same tower, else a new one."""
    if tower is None:
        return None
    choices = config.choices
    wanted = alignment_config(config.text, tower, width, choices.sigmoid_trained)
    alignment = TextAlignment(wanted, choices.sigmoid_scale, choices.sigmoid_bias)
    earlier = previous.alignment if previous is not None else None
    if earlier is not None and replace(earlier.config, folder=None, scale_trained=False) == replace(
        wanted, folder=None, scale_trained=False
    ):
        alignment.load_state_dict(earlier.state_dict())
    else:
        alignment.reset_parameters(generator)
    return alignment


def _gaussians(
    config: RunConfig, previous: Previous | None, generator: torch.Generator, *, comes_later: bool
) -> GaussianDecoder | None:
    if config.gaussians is None:
        return None
    decoder = GaussianDecoder(config.gaussians)
    if config.start.gaussians is not None and not comes_later:
        decoder.load_state_dict(_trained_gaussians(config.start.gaussians, config.gaussians).state_dict())
    elif (
        previous is not None
        and previous.gaussians is not None
        and replace(previous.gaussians.config, packing=config.gaussians.packing) == config.gaussians
    ):
        decoder.load_state_dict(previous.gaussians.state_dict())
    else:
        decoder.reset_parameters(generator)
    return decoder


def _trained_gaussians(source: str, wanted: GaussianDecoderConfig) -> GaussianDecoder:
    """The decoder of Gaussians of a run, a model's folder or a bundled model."""
    folder = Path(source)
    found: GaussianDecoder | None
    if (folder / GAUSSIANS / WEIGHTS_FILE).is_file():
        found = load_gaussian_decoder(folder / GAUSSIANS)
    else:
        found = load_previous(source).gaussians
    if found is None or found.config != wanted:
        raise InputError(f"start.gaussians: {source} holds no decoder of Gaussians of the sizes in gaussians")
    return found
