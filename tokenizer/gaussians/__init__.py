"""3D assets: decoded voxel tokens -> 3D Gaussians (FORMAT 11), and what can be done with Gaussians.

Read in this order: `config` (sizes), `windows` (which voxels attend to each other), `decoder` (the network),
`attributes` (what a Gaussian is, and how the output becomes some), `ply` and `plytable` (files), `edit` (merge,
transform, crop), `rasterize` (pictures of Gaussians; `projection` and `tiles`, then `rasterize_torch` or
`rasterize_gsplat`), `released` (released configuration keys and weight names), `checkpoints` (files of decoders).
"""

from __future__ import annotations

from tokenizer.gaussians.attributes import Gaussians
from tokenizer.gaussians.config import GaussianDecoderConfig
from tokenizer.gaussians.decoder import GaussianDecoder
from tokenizer.gaussians.edit import crop, merge, transform
from tokenizer.gaussians.ply import PlyWarning, read_ply, write_ply

__all__ = [
    "GaussianDecoder",
    "GaussianDecoderConfig",
    "Gaussians",
    "PlyWarning",
    "crop",
    "merge",
    "read_ply",
    "transform",
    "write_ply",
]
