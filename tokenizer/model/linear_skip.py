"""A linear code beside the transformers, for small models (not in released ones).

A transformer with a narrow residual stream and normalised tokens learns slowly to pass pixel magnitudes through. A linear
code, initialised with principal components, does that from the first step, so the transformers learn only what is
better than the best linear code. See `tokenizer.training.initialise`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearEncoderSkip(nn.Module):
    """A linear part of the posterior parameters: the mean, and a constant log-variance to start from.

    A token whose later frames are exactly zero carries a single frame (FORMAT 2: stills; FORMAT 11: voxels) and is read
    by a matrix of its own; no linear map could serve both, since most of a clip's components need all its frames.
    """

    def __init__(self, patch_features: int, frame_features: int, latent_channels: int) -> None:
        super().__init__()
        self.frame_features = frame_features
        self.clip = nn.Linear(patch_features, latent_channels)
        self.still = nn.Linear(frame_features, latent_channels)
        self.logvar = nn.Parameter(torch.zeros(latent_channels))

    def forward(self, patches: Tensor) -> Tensor:
        """patches [N, P] -> posterior parameters [N, 2C]."""
        still = (patches[:, self.frame_features :] == 0).all(dim=1, keepdim=True)
        mean = torch.where(still, self.still(patches[:, : self.frame_features]), self.clip(patches))
        return torch.cat([mean, self.logvar.to(mean.dtype).expand_as(mean)], dim=1)


class LinearDecoderSkip(nn.Module):
    """A linear reading of the latent, [N, C] -> [N, P]."""

    def __init__(self, latent_channels: int, patch_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(patch_features, latent_channels))
        self.bias = nn.Parameter(torch.zeros(patch_features))

    def forward(self, latents: Tensor) -> Tensor:
        return F.linear(latents, self.weight, self.bias)
