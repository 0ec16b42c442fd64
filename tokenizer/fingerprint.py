"""A short name for a latent space: equal for the same weights in any precision, different for any other model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tokenizer.config import config_to_dict
from tokenizer.model.config import ATokenConfig

_SAMPLES = 64


def fingerprint(config: ATokenConfig, names: Iterable[str], tensor_of: Callable[[str], Tensor]) -> str:
    """16 hexadecimal digits from the configuration (less its name) and up to 64 values of every parameter.

    Values are rounded to bfloat16 first, so a model loaded in half precision keeps the name of its latent space.
    """
    digest = hashlib.sha256()
    settings = config_to_dict(config)
    settings.pop("name")
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(names):
        values = tensor_of(name).detach().flatten()
        step = max(1, values.numel() // _SAMPLES)
        digest.update(name.encode())
        sample = values[::step][:_SAMPLES].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
