"""3D assets: decoded voxel tokens -> 3D Gaussians (FORMAT 11).

Read in this order: `config` (sizes), `windows` (which voxels attend to each other), `decoder` (the network),
`attributes` (what its output means), `ply` (files), `released` (released configuration keys and weight names).
"""

from __future__ import annotations

from tokenizer.gaussians.attributes import Gaussians
from tokenizer.gaussians.config import GaussianDecoderConfig
from tokenizer.gaussians.decoder import GaussianDecoder

__all__ = ["GaussianDecoder", "GaussianDecoderConfig", "Gaussians"]
