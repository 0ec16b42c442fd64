"""Fused FP8 blocks in Triton's interpreter, which must be chosen before Triton is imported: a process of its own.

Numbers of 16 bits stand in for FP8, so that what is left beside the exact network is bfloat16's rounding. Prints one
JSON object: relative errors of the output and of all gradients by case.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Literal

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from tests.tokenizer.fp8_networks import tiny_config, tiny_network
from tests.tokenizer.networks import visuals
from tokenizer.fp8 import FP8Config
from tokenizer.fp8.backends import fused_blocks
from tokenizer.fp8.fused import block, scales
from tokenizer.fp8.fused.scales import BLOCK_LAYERS, Scales
from tokenizer.model.atoken import ATokenNetwork

HALF = torch.float16
STEPS = 2


def main() -> int:
    for module, name in ((block, "E4M3"), (scales, "E4M3"), (scales, "E5M2")):
        setattr(module, name, HALF)
    exact = gradients(network())
    found: dict[str, dict[str, float]] = {}
    recipes: tuple[Literal["tensorwise", "delayed"], ...] = ("tensorwise", "delayed")
    for recipe in recipes:
        model = network()
        kept = fuse(model, recipe)
        found[recipe] = errors(gradients(model, kept), exact)
        assert bool(kept.history.any()) == (recipe == "delayed")
        for changed in (model, other := network()):
            with torch.no_grad():
                changed.get_parameter("decoder.transformer.blocks.0.mlp.down.weight").mul_(-1.0)
        found[f"{recipe}, weights changed"] = errors(gradients(model), gradients(other))
    model = network()
    fuse(model, "delayed")
    with torch.no_grad():
        output = run(model)
    # Looking on changes nothing: the first step still finds nothing that is known.
    found["without gradients"] = errors({"output": output}, {"output": exact["output"]})
    print(json.dumps(found))
    return 0


def network() -> ATokenNetwork:
    """Widths that fill no tile, 23 tokens (of 32 padded ones), and learned parameters that are not ones and zeros."""
    model = tiny_network(tiny_config(width=48, mlp_width=80, heads=2))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.shape == (2, 24):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def fuse(model: ATokenNetwork, recipe: Literal["tensorwise", "delayed"]) -> Scales:
    names = [f"{part}.transformer.blocks.0.{layer}" for part in ("encoder", "decoder") for layer in BLOCK_LAYERS]
    # FP8 saturates where a magnitude grows; numbers of 16 bits do not, and need room.
    return fused_blocks(model, names, FP8Config(fp8_recipe=recipe, fp8_margin=2), torch.device("cpu"))


def run(model: ATokenNetwork) -> Tensor:
    tokens = visuals((12, 20), (16, 8), seed=0, dtype=torch.float32)
    return model.decode(model.encode(tokens).latents).features


def gradients(model: ATokenNetwork, kept: Scales | None = None) -> dict[str, Tensor]:
    """Of the last of some steps without an optimizer, and the "output"."""
    for _ in range(STEPS):
        model.zero_grad()
        output = run(model)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        if kept is not None:
            kept.move_on()
    return {"output": output.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == exact.keys()
    return {name: ((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}


if __name__ == "__main__":
    sys.exit(main())
