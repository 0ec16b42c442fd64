"""The Gaussian over latents that a continuous encoder gives (FORMAT 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.model.precision import at_least_float32
from tokenizer.sparse import SparseTokens


class Posterior:
    """A diagonal Gaussian for each token, from the encoder's 2C channels: mean first, then log-variance.

    No clamp on the log-variance and no scaling of the mean, as released. Statistics are computed in float32 at least.

    Args:
        parameters: [N, 2C] tokens.
    """

    def __init__(self, parameters: SparseTokens) -> None:
        self.parameters = parameters

    @property
    def mean(self) -> SparseTokens:
        """[N, C], the most probable latents; what `AToken.decode` takes. Dtype of the model."""
        return self.parameters.with_features(self.parameters.features.chunk(2, dim=-1)[0])

    @property
    def logvar(self) -> SparseTokens:
        """[N, C] logarithms of the variances."""
        return self.parameters.with_features(self.parameters.features.chunk(2, dim=-1)[1])

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> SparseTokens:
        """mean + std * noise, [N, C] in the dtype of the model.

        Args:
            generator: draws the noise, in float32 on its own device; needed unless `noise` is given.
            noise: [N, C] standard normal numbers to use instead.

        Raises:
            ValueError: neither or both given. Randomness never comes from a global state.
            InputError: noise of another shape.
        """
        if (generator is None) == (noise is None):
            raise ValueError("sample needs a torch.Generator or the noise itself: sample(generator)")
        mean, logvar = (at_least_float32(x) for x in self.parameters.features.chunk(2, dim=-1))
        if noise is None:
            assert generator is not None
            noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        if noise.shape != mean.shape:
            raise InputError(f"noise must be {list(mean.shape)}, a number for each latent, got {list(noise.shape)}")
        sample = mean + torch.exp(0.5 * logvar) * noise.to(mean.device, mean.dtype)
        return self.parameters.with_features(sample.to(self.parameters.dtype))

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, [N], nats summed over channels: sum(m^2 + v - 1 - log v) / 2."""
        mean, logvar = (at_least_float32(x) for x in self.parameters.features.chunk(2, dim=-1))
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=-1)
