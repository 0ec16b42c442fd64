"""Whether assets are voxels such as the run says its decoder of 3D Gaussians is of."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizer.errors import InputError
from tokenizer.gaussians.config import GaussianDecoderConfig
from tokenizer.training.curriculum.tasks import is_asset
from tokenizer.training.feeding import StepBatch


def check_voxels(batches: Iterable[StepBatch], decoder: GaussianDecoderConfig) -> None:
    """Compare how assets were packed with what the model will say of itself.

    On another grid Gaussians would lie beside their voxels; with another rule the trained model would be given voxels
    that it has never seen.

    Raises:
        InputError: an asset on another grid, or packed by another rule.
    """
    for item in (item for batch in batches if is_asset(batch.task) for item in batch.items):
        # Sets that others wrote may not say their rule.
        rule, size = item.facts.get("rule", decoder.packing), int(item.facts.get("resolution", decoder.resolution))
        if (rule, size) != (decoder.packing, decoder.resolution):
            raise InputError(
                f"{item.id}: its voxels are packed by the rule '{rule}' on a grid of {size}, but gaussians has packing "
                f"'{decoder.packing}' and resolution {decoder.resolution}: set these two as the shards are, or write "
                "the shards anew"
            )
