"""Recorded encodings and reconstructions of images, videos, mixed batches and voxels (FORMAT 2, 4-11)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.errors import InputError
from tokenizer.model.atoken import ATokenNetwork, Encoding
from tokenizer.model.context import Tiling
from tokenizer.model.plan import Plan, tile_plan
from tokenizer.model.precision import at_least_float32
from tokenizer.model.transformer import Transformer
from tokenizer.parity.bench import Bench, Values, explain
from tokenizer.parity.compare import Rule, Value
from tokenizer.parity.recording import RecordedFile
from tokenizer.patches import PatchSize, image_to_tokens, tokens_to_pixels, video_to_tokens
from tokenizer.quantizers import FSQ
from tokenizer.sparse import SparseTokens
from tokenizer.voxels import voxels_to_tokens

_INPUT = re.compile(r"in\.(image|video|voxel_feats)(\d*)(_\w+)?$")
_KEY_VALUE = re.compile(r"rec_kv_s(\d+)_c(\d+)$")
_PIXELS = re.compile(r"rec_(image|frames)(\d*)$")
_FIRST_CHANNELS = re.compile(r"rec(\d+)$")
_FIRST_ROWS = re.compile(r"rec_full_first(\d+)$")


def produce(file: RecordedFile, wanted: set[str], bench: Bench) -> Values:
    """Encode and decode the batch a file is about, if it is about one."""
    sources = _sources(file, bench)
    if not sources or bench.is_gaussian(bench.recording.model_of(file)):
        return
    network = bench.autoencoder(bench.recording.model_of(file))
    tokens = SparseTokens.cat([_item(*source, network.config.patch_size) for source in sources])
    yield "feats", Value(tokens.features, Rule.EXACT)
    yield "coords", Value(_coordinates(tokens), Rule.EXACT)
    tokens = tokens.to(bench.device)
    spy = _Spy("enc", network.encoder.transformer, tile_plan(tokens, network.config.tile_steps))
    encoding = network.encode(tokens, observe=spy.see)
    yield from spy.values()
    yield from _encoding_values(encoding, file, wanted)
    latents = encoding.posterior.mean
    if isinstance(network.quantizer, FSQ):
        latents, found = _quantised(network.quantizer, encoding, file, bench)
        yield from found
    yield from _decoded(network, latents, wanted)


def _sources(file: RecordedFile, bench: Bench) -> list[tuple[RecordedFile, str]]:
    """A file's own inputs in their order, or else the tensors its note refers to: one for each item of the batch."""
    own = sorted((int(m[2] or 0), m[1], name) for name in file.tensors if (m := _INPUT.match(name)))
    return [(file, name) for *_, name in own] or bench.recording.references(file)


def _item(file: RecordedFile, name: str, patch_size: PatchSize) -> SparseTokens:
    """Patches are made in float32 in any precision, as recorded; networks cast them."""
    tensor = file.take(name)
    match = _INPUT.match(name)
    if name == "feats":
        return from_coordinates(tensor, file.take("coords"))
    if match is None:
        raise InputError(f"{file.name}:{name} is no input that tokens can be made of")
    if match[1] == "voxel_feats":
        colours = tensor.float() / 255.0 if tensor.dtype == torch.uint8 else tensor.float()
        return voxels_to_tokens(colours, file.take(f"in.voxel_coords{match[2]}"), patch_size)
    if not tensor.is_floating_point():
        raise InputError(f"{file.name}:{name} must hold floats in [-1, 1], it holds {tensor.dtype}")
    to_tokens = image_to_tokens if tensor.ndim == 3 else video_to_tokens
    return to_tokens(tensor.float(), patch_size, fit="crop")[0]


def from_coordinates(features: Tensor, coordinates: Tensor) -> SparseTokens:
    """Tokens from coordinates [N, 5] (item, t, x, y, z) or [N, 4] (item, x, y, z)."""
    if bool((coordinates[1:, 0] < coordinates[:-1, 0]).any()):
        raise InputError("coordinates are not sorted by batch item")
    positions = coordinates[:, 1:]
    if positions.shape[1] == 3:
        positions = F.pad(positions, (1, 0))
    return SparseTokens(features, positions, torch.bincount(coordinates[:, 0]))


def _coordinates(tokens: SparseTokens) -> Tensor:
    """[N, 5] batch item, t, x, y, z: how the reference writes positions."""
    item = torch.repeat_interleave(torch.arange(tokens.batch_size, dtype=torch.int32), tokens.lengths)
    return torch.cat([item[:, None], tokens.host_positions], dim=1)


@dataclass
class _Spy:
    """Collects the tokens that pass between the blocks of one side, "enc" or "dec", in batch order."""

    side: str
    transformer: Transformer
    plan: Plan
    seen: dict[str, Tensor] = field(default_factory=dict)

    def see(self, number: int, tokens: Tensor) -> None:
        self.seen[f"{self.side}_h{number}"] = self.plan.scatter(tokens)

    def values(self) -> Values:
        for name, hidden in self.seen.items():
            yield name, Value(hidden)
        if self.transformer.positions is not None:
            yield f"{self.side}_pos_embed", Value(self.plan.scatter(self.transformer.positions(self.plan)))


def _encoding_values(encoding: Encoding, file: RecordedFile, wanted: set[str]) -> Values:
    posterior = encoding.posterior
    yield "x_no_proj", Value(encoding.features.features)
    yield "image_feat", Value(encoding.pooled)
    yield "image_feat_normalized", Value(F.normalize(at_least_float32(encoding.pooled), dim=-1))
    yield "latent_params", Value(posterior.parameters.features)
    yield "latent_mean", Value(posterior.mean.features)
    yield "latent_logvar", Value(posterior.logvar.features)
    yield "kl", Value(posterior.kl())
    if "latent_sample" in wanted:
        yield "latent_sample", Value(posterior.sample(noise=file.take("in.noise")).features)


def _quantised(
    quantizer: FSQ, encoding: Encoding, file: RecordedFile, bench: Bench
) -> tuple[SparseTokens, list[tuple[str, Value]]]:
    """What to decode, and the recorded steps of quantisation."""
    quantized = encoding.quantized
    assert quantized is not None
    found = [
        ("fsq_bounded", Value(quantizer.bound(encoding.posterior.mean.features))),
        ("fsq_quantized", Value(quantized.values, Rule.CODES)),
        ("fsq_indices", Value(quantized.indices, Rule.CODES)),
    ]
    values = quantized.values
    if bench.dtype == torch.bfloat16 and "fsq_quantized" in file:
        # A latent on the other side of a rounding boundary changes the picture; that is counted above, not here again.
        values = file.take("fsq_quantized").to(values)
    return encoding.features.with_features(values), found


def _decoded(network: ATokenNetwork, latents: SparseTokens, wanted: set[str]) -> Values:
    if network.decoder is None:
        return
    spy = _Spy("dec", network.decoder.transformer, tile_plan(latents, network.config.tile_steps))
    rec = network.decode(latents, observe=spy.see)
    yield from spy.values()
    yield "rec", Value(rec.features)
    for name in wanted:
        try:
            value = _part_of_rec(name, rec, latents, network)
        except InputError as error:  # a tiling that this project refuses; the rest can still be checked
            yield name, explain(error)
        else:
            if value is not None:
                yield name, Value(value)


def _part_of_rec(name: str, rec: SparseTokens, latents: SparseTokens, network: ATokenNetwork) -> Tensor | None:
    """What a name says of a reconstruction, or None if it says nothing."""
    if match := _KEY_VALUE.match(name):
        return network.decode(latents, Tiling(stride=int(match[1]), context=int(match[2]))).features
    if match := _FIRST_CHANNELS.match(name):
        return rec.features[:, : int(match[1])]
    if match := _FIRST_ROWS.match(name):
        return rec.features[: int(match[1])]
    if match := _PIXELS.match(name):
        frames = tokens_to_pixels(rec[int(match[2] or 0)], patch_size=network.config.patch_size)[0]
        return (frames[:1] if match[1] == "image" else frames).permute(0, 3, 1, 2)
    return None
