"""Recordings that tests make themselves: another configuration than the recorded one, every kind of tensor in it.

They hold what this project computes, so they say nothing about the reference. They show that `tokenizer.parity` takes
no size, count or name for granted, and that it notices whatever is wrong with a recording.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenizer.gaussians import GaussianDecoder
from tokenizer.gaussians import released as released_gaussians
from tokenizer.gaussians.attributes import offset_perturbation
from tokenizer.gaussians.ply import ply_columns
from tokenizer.model.atoken import ATokenNetwork
from tokenizer.model.context import Tiling
from tokenizer.model.positions import token_weights
from tokenizer.model.rope import rotary_frequencies, rotary_table, rotate
from tokenizer.patches import video_to_tokens, visuals_to_tokens
from tokenizer.released import config_from_released, to_released
from tokenizer.sparse import SparseTokens
from tokenizer.voxels import voxel_features, voxels_to_tokens

SOC = {
    "patch_size": [4, 8, 8],
    "in_channels": 768,
    "out_channels": 768,
    "latent_channels": 24,
    **{"encoder_model_channels": 48, "encoder_num_blocks": 1, "encoder_num_heads": 2, "encoder_mlp_channels": 56},
    **{"decoder_model_channels": 32, "decoder_num_blocks": 3, "decoder_num_heads": 1, "decoder_mlp_channels": 40},
    "encoder_pe_mode": "rope",
}
SOD = {
    **SOC,
    "use_quantizer": True,
    "quantizer_codebook_size": 64,
    "quantizer_num_codebooks": 12,
    "quantizer_feature_dim": 24,
}
GS = {
    **{
        "resolution": 32,
        "model_channels": 40,
        "latent_channels": 192,
        "num_blocks": 3,
        "num_heads": 4,
        "mlp_channels": 48,
    },
    "window_size": 4,
    "representation_config": {"num_gaussians": 7, "voxel_size": 1.25, "lr": {"_rotation": 0.2}},
}


def write_recording(folder: Path, files: dict[str, dict[str, Tensor]], notes: dict[str, str], **readme: Any) -> Path:
    """A folder in the layout of FORMAT 16."""
    folder.mkdir(parents=True, exist_ok=True)
    listed, sums = {}, {}
    for name, tensors in files.items():
        path = folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
        sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        kinds = {key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in tensors.items()}
        listed[name] = {"note": notes.get(name, ""), "tensors": kinds}
    content = {"configs": {}, "files": listed, "sha256": sums, **readme}
    (folder / "README.json").write_text(json.dumps(content))
    return folder


def copy_part(source: Path, folder: Path, names: list[str]) -> Path:
    """A recording with some of the files of another."""
    readme = json.loads((source / "README.json").read_text())
    files = {name: load_file(source / f"{name}.safetensors") for name in names}
    notes = {name: readme["files"][name]["note"] for name in names}
    rest = {key: readme[key] for key in ("configs", "conventions", "shapes", "sod_shares_soc_weights")}
    return write_recording(folder, files, notes, **rest)


@torch.no_grad()
def other_recording(folder: Path) -> Path:
    """Another configuration: patches, widths, depths, heads, positions, codebooks, weights of its own for sod."""
    soc, sod, gs = _autoencoder(SOC, 1), _autoencoder(SOD, 2), _gaussian_decoder()
    voxels, rec = _voxels(soc)
    splats = _splats(gs, rec)
    files = {
        "state_soc": to_released(soc.state_dict()),
        "state_sod": to_released(sod.state_dict()),
        "state_gs": released_gaussians.to_released(gs),
        "pictures": _pictures(soc),
        "codes": _codes(sod),
        "clip": _clip(soc),
        "blob": voxels,
        "splats": splats,
        "splats_ply": _ply(gs, rec),
        "parts": _parts(),
    }
    notes = {
        "pictures": "model soc. two sizes",
        "codes": "model sod on pictures:in.image1, pictures:in.image0",
        "clip": "model soc",
        "blob": "model soc. f = u8/255",
        "splats": "model gs; input features = blob:rec192",
        "splats_ply": "columns of the .ply",
    }
    conventions = ["f64/KEY: wholly in float64; rec/gs_raw/gs0.* of these are rounded once to float32"]
    configs = {"soc": SOC, "sod": SOD, "gs": GS}
    return write_recording(folder, files, notes, configs=configs, conventions=conventions, sod_shares_soc_weights=False)


def _randomise(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)


def _autoencoder(config: dict[str, Any], seed: int) -> ATokenNetwork:
    network = ATokenNetwork(config_from_released(config))
    _randomise(network, seed)
    return network


def _gaussian_decoder() -> GaussianDecoder:
    network = GaussianDecoder(released_gaussians.config_from_released(GS))
    _randomise(network, 3)
    return network


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _coordinates(tokens: SparseTokens) -> Tensor:
    item = torch.repeat_interleave(torch.arange(tokens.batch_size), tokens.lengths)
    return torch.cat([item[:, None].int(), tokens.positions], dim=1)


def _pictures(soc: ATokenNetwork) -> dict[str, Tensor]:
    images = [_random(19, 41, 3), _random(32, 16, 3, seed=1)]
    tokens = visuals_to_tokens(images, (4, 8, 8), fit="crop")[0]
    noise = torch.randn(tokens.num_tokens, 24, generator=torch.Generator().manual_seed(2))
    encoding = soc.encode(tokens)
    rec = soc.decode(encoding.posterior.mean)
    double = ATokenNetwork(soc.config).double()
    double.load_state_dict(soc.state_dict())
    exact = double.encode(tokens)
    return {
        "in.image0": images[0],
        "in.image1": images[1],
        "in.noise": noise,
        "feats": tokens.features,
        "coords": _coordinates(tokens),
        "x_no_proj": encoding.features.features,
        "image_feat": encoding.pooled,
        "image_feat_normalized": F.normalize(encoding.pooled, dim=-1),
        "latent_params": encoding.posterior.parameters.features,
        "latent_sample": encoding.posterior.sample(noise=noise).features,
        "kl": encoding.posterior.kl(),
        "rec": rec.features,
        "rec_image0": rec[0].features.reshape(2, 5, 4, 8, 8, 3)[:, :, 0].permute(4, 0, 2, 1, 3).reshape(1, 3, 16, 40),
        "f64/latent_params": exact.posterior.parameters.features,
        "f64/rec": double.decode(exact.posterior.mean).features.float(),
    }


def _codes(sod: ATokenNetwork) -> dict[str, Tensor]:
    pictures = [_random(32, 16, 3, seed=1), _random(19, 41, 3)]
    tokens = visuals_to_tokens(pictures, (4, 8, 8), fit="crop")[0]
    encoding = sod.encode(tokens)
    quantized = encoding.quantized
    assert quantized is not None
    return {
        "coords": _coordinates(tokens),
        "latent_mean": encoding.posterior.mean.features,
        "fsq_quantized": quantized.values,
        "fsq_indices": quantized.indices,
        "rec": sod.decode(encoding.latents).features,
    }


def _clip(soc: ATokenNetwork) -> dict[str, Tensor]:
    video = _random(27, 16, 24, 3, seed=3).half()
    tokens = video_to_tokens(video.float(), (4, 8, 8), fit="crop")[0]
    latents = soc.encode(tokens).posterior.mean
    return {
        "in.video": video,
        "latent_logvar": soc.encode(tokens).posterior.logvar.features,
        "rec_kv_s4_c8": soc.decode(latents, Tiling(stride=4, context=8)).features,
        "rec_kv_s8_c4": soc.decode(latents, Tiling(stride=8, context=4)).features,
    }


def _voxels(soc: ATokenNetwork) -> tuple[dict[str, Tensor], SparseTokens]:
    generator = torch.Generator().manual_seed(4)
    cells = torch.randperm(10**3, generator=generator)[:70]
    coordinates = torch.stack([cells // 100, cells // 10 % 10, cells % 10], dim=1).int()
    colours = torch.randint(0, 256, (70, 192), generator=generator, dtype=torch.uint8)
    tokens = voxels_to_tokens(colours / 255.0, coordinates, (4, 8, 8))
    encoding = soc.encode(tokens)
    rec = soc.decode(encoding.posterior.mean)
    colour_part = voxel_features(rec, (4, 8, 8))
    tensors = {
        "in.voxel_feats_u8": colours,
        "in.voxel_coords": coordinates,
        "coords": _coordinates(tokens),
        "image_feat": encoding.pooled,
        "rec192": colour_part.features,
        "rec_full_first9": rec.features[:9],
    }
    return tensors, colour_part


def _splats(gs: GaussianDecoder, voxels: SparseTokens) -> dict[str, Tensor]:
    gaussians = gs.gaussians(voxels)
    return {
        "in.coords": _coordinates(voxels)[:, [0, 2, 3, 4]],
        "gs_raw": gs(voxels).features,
        "gs0._xyz": gaussians.means[:21] + 0.5,
        "gs0.get_scaling": gaussians.scales[:21],
        "gs0.get_covariance": gaussians.covariances[:21],
        "sh0_rgb": gaussians.colours[:21, None],
    }


def _ply(gs: GaussianDecoder, voxels: SparseTokens) -> dict[str, Tensor]:
    return {name: column[:13] for name, column in ply_columns(gs.gaussians(voxels)).items()}


def _parts() -> dict[str, Tensor]:
    positions = torch.randint(0, 90, (11, 4), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    query = _random(11, 3, 40, seed=6)
    table = _random(256, 3, seed=7)
    x, y = torch.meshgrid(torch.arange(9), torch.arange(2), indexing="ij")
    grid = torch.stack([0 * x, x, y, 0 * x], dim=-1).reshape(-1, 4)
    weights = token_weights(grid, torch.tensor([[9, 2]]).expand(18, 2), torch.float32)
    rotation = rotary_table(positions, 40, torch.float64)
    return {
        "rope40.pos": positions,
        "rope40.q": query,
        "rope40.k": -query,
        "rope40.freqs": rotary_frequencies(40, torch.float32),
        "rope40.q_out": rotate(query.double(), rotation).float(),
        "f64/rope40.k_out": rotate(-query.double(), rotation),
        "learned_pos.weight": table,
        "learned_pos.9x2": (weights @ table).reshape(9, 2, 3),
        "offset_perturbation.5": offset_perturbation(5, 1.25),
    }
