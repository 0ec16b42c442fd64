"""The Gaussian decoder: decoded voxel tokens -> raw parameters of Gaussians (FORMAT 11).

It shares norm and MLP with the autoencoder's transformer and differs in three things: positions are added as sines and
cosines instead of being rotated in, attention stays inside shifted windows, and scores are soft-capped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.errors import InputError
from tokenizer.gaussians.attributes import Gaussians, offset_perturbation, raw_to_gaussians
from tokenizer.gaussians.config import GaussianDecoderConfig
from tokenizer.gaussians.windows import Windows, attend_windows, window_plan
from tokenizer.model.precision import full_precision
from tokenizer.model.transformer import MLP, Observer, RMSNorm
from tokenizer.sparse import SparseTokens

FINAL_NORM_EPS = 1e-5


class WindowAttention(nn.Module):
    """Multi-head attention inside windows; no biases, no QK norm, no rotation."""

    def __init__(self, config: GaussianDecoderConfig) -> None:
        super().__init__()
        self.heads, self.head_width = config.heads, config.head_width
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """x [N, D] in batch order -> the same."""
        query, key, value = self.qkv(x[windows.rows]).unflatten(-1, (3, self.heads, self.head_width)).unbind(1)
        mixed = attend_windows(query, key, value, windows).flatten(1)
        output: Tensor = self.out(mixed[windows.inverse])
        return output


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GaussianDecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = WindowAttention(config)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width, bias=False)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        x = x + self.attention(self.attention_norm(x), windows)
        output: Tensor = x + self.mlp(self.mlp_norm(x))
        return output


class GaussianDecoder(nn.Module):
    """Voxel tokens -> Gaussians.

    Args:
        config: sizes and constants.

    The output layer starts at zero, as released, so that every voxel starts as `config.gaussians` small faint spheres
    spread evenly inside it. `reset_parameters(generator)` draws the rest, which is torch's default until then.
    """

    offset_perturbation: Tensor

    def __init__(self, config: GaussianDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.inputs, config.width, bias=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.to_gaussians = nn.Linear(config.width, config.outputs)
        self.skip = nn.Linear(config.inputs, config.outputs) if config.skip else None
        self.register_buffer("offset_perturbation", offset_perturbation(config.gaussians, config.voxel_size))
        self._silence_outputs()

    def _silence_outputs(self) -> None:
        for layer in (self.to_gaussians, self.skip):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw every parameter anew, as `ATokenNetwork.reset_parameters` does; what writes the output stays zero."""
        residual = (2 * max(1, self.config.depth)) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear) and module not in (self.to_gaussians, self.skip):
                into_residual = name.endswith((".attention.out", ".mlp.down"))
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                module.weight.mul_(residual if into_residual else 1.0)
        self._silence_outputs()

    def forward(self, voxels: SparseTokens, observe: Observer | None = None) -> SparseTokens:
        """Raw Gaussian parameters of each voxel.

        Args:
            voxels: [N, inputs] at positions (any t, x, y, z); the frame-0 channels of decoded patches, see
                `tokenizer.voxels.voxel_features`. A batch may hold several assets; they do not see each other.
            observe: called with 0 and the tokens [N, D] after positions were added, then with 1, 2, ... after each
                block.

        Returns:
            [N, 14 G] in the dtype of the model.

        Raises:
            InputError: no voxels, another number of channels, or another device.
        """
        if voxels.num_channels != self.config.inputs:
            raise InputError(
                f"the Gaussian decoder takes voxels of {self.config.inputs} channels, got {voxels.num_channels}"
            )
        if voxels.device != self.embed.weight.device:
            raise InputError(f"the voxels are on {voxels.device}, the model on {self.embed.weight.device}")
        kind, width, window = self.embed.weight.dtype, self.config.width, self.config.window
        # The windows of every second block are shifted by half a window.
        plans = [window_plan(voxels, window, window // 2 * parity) for parity in (0, 1)]
        code = voxels.shared(
            ("sines", width, full_precision(kind), voxels.device),
            lambda: position_code(voxels.positions[:, 1:], width, full_precision(kind)),
        )
        inputs = voxels.features.to(kind)
        x = self.embed(inputs) + code.to(kind)
        if observe is not None:
            observe(0, x)
        for number, block in enumerate(self.blocks):
            x = block(x, plans[number % 2])
            if observe is not None:
                observe(number + 1, x)
        raw = self.to_gaussians(F.layer_norm(x, (width,), eps=FINAL_NORM_EPS))
        return voxels.with_features(raw if self.skip is None else raw + self.skip(inputs))

    def gaussians(self, voxels: SparseTokens) -> Gaussians:
        """The Gaussians of each voxel, in float32 at least; arguments and errors as for `forward`."""
        return self.interpret(self(voxels))

    def interpret(self, raw: SparseTokens) -> Gaussians:
        """The Gaussians that raw parameters [N, 14 G] of `forward` mean."""
        return raw_to_gaussians(raw, self.offset_perturbation, self.config)


def position_code(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Sines and cosines of voxel indices, [N, width] in `dtype`.

    Args:
        positions: [N, 3] integer x, y, z.
        width: each axis gets width // 6 frequencies 10000^(-i / (width // 6)), sines first; what remains is zero.
    """
    count = width // 6
    frequencies = 10000.0 ** (-torch.arange(count, dtype=dtype, device=positions.device) / count)
    angles = positions.to(dtype)[:, :, None] * frequencies
    code = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(code, (0, width - code.shape[1]))
