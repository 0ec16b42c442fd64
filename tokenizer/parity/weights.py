"""Weight files: every tensor must load and come back under its released name, bit for bit."""

from __future__ import annotations

import torch

from tokenizer.gaussians import released as released_gaussians
from tokenizer.parity.bench import Bench, Values
from tokenizer.parity.compare import Rule, Value
from tokenizer.parity.recording import RecordedFile
from tokenizer.released import IGNORED_PREFIXES, to_released

STATE = "state_"


def produce(file: RecordedFile, wanted: set[str], bench: Bench) -> Values:
    """Export what was loaded."""
    if not file.name.startswith(STATE):
        return
    model = file.name.removeprefix(STATE)
    if bench.is_gaussian(model):
        exported = released_gaussians.to_released(bench.gaussian_decoder(model))
    else:
        exported = to_released(bench.autoencoder(model).state_dict())
    rule = Rule.NETWORK if bench.dtype == torch.bfloat16 else Rule.EXACT  # rounded weights are close, not equal
    for name in wanted & exported.keys():
        yield name, Value(exported[name], rule)


def is_ignored(file: RecordedFile, name: str) -> bool:
    """Whether a recorded weight belongs to the reference's training class and to no model (FORMAT 15.11)."""
    return file.name.startswith(STATE) and name.startswith(IGNORED_PREFIXES)
