"""A short name for a latent space: equal for the same weights in any precision, different for any other model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokenizer.config import config_to_dict
from tokenizer.model.config import ATokenConfig

_SAMPLES = 64


def fingerprint(config: ATokenConfig, weights: str) -> str:
    """16 hexadecimal digits from the configuration (less its name) and the digest of the weights."""
    settings = config_to_dict(config)
    settings.pop("name")
    if settings["refiner"] is None:  # models from before there were refiners keep their names
        settings.pop("refiner")
    text = json.dumps(settings, sort_keys=True) + weights
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits from up to 64 values of every tensor, which may be `sample`s already.

    Values are rounded to bfloat16, so float32 weights and their bfloat16 copy agree. float16 rounds to other values:
    whoever makes a float16 copy keeps the digest of the original.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(sample(tensors[name]).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names that files have, whichever parts of the network `torch.compile` was given."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in network.state_dict().items()}


def sample(tensor: Tensor) -> Tensor:
    """Up to 64 values spread over `tensor`, bfloat16 on the CPU."""
    return _spread(tensor).to("cpu", torch.bfloat16).clone()


def look(tensors: Mapping[str, Tensor]) -> Tensor:
    """What `weights_digest` would read, unrounded and in one tensor on the CPU, so that a GPU is asked only once.

    Of weights on the device "meta", which have no values, zeros.
    """
    values = torch.cat([_spread(tensors[name]) for name in sorted(tensors)])
    return torch.zeros_like(values, device="cpu") if values.is_meta else values.cpu()


def same_but_for_precision(before: Tensor, now: Tensor) -> bool:
    """Whether every value of two `look`s is the same, or the earlier one rounded to float16 or bfloat16."""
    if before.shape != now.shape:
        return False
    same = now == before.to(now.dtype)
    for narrow in (torch.float16, torch.bfloat16):
        same |= now == before.to(narrow).to(now.dtype)
    return bool(same.all())


def _spread(tensor: Tensor) -> Tensor:
    values = tensor.detach().flatten()
    return values[:: max(1, values.numel() // _SAMPLES)][:_SAMPLES]
