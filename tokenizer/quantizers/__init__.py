"""Quantisers: latents to integers and back. One protocol, one file each."""

from __future__ import annotations

from tokenizer.model.config import FSQConfig
from tokenizer.quantizers.fsq import FSQ
from tokenizer.quantizers.protocol import Quantized, Quantizer

__all__ = ["FSQ", "Quantized", "Quantizer", "make_quantizer"]


def make_quantizer(config: FSQConfig, latent_channels: int) -> Quantizer:
    """The quantiser that `config` describes, checked against the latent width."""
    return FSQ(config, latent_channels)
