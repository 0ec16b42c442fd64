"""Recorded packing of multi-view renders into voxels (FORMAT 13). Always on the CPU, in float32, as recorded."""

from __future__ import annotations

import json
import re

import torch

from tokenizer.cameras import cameras_from_transforms
from tokenizer.errors import InputError
from tokenizer.parity.bench import Bench, Values
from tokenizer.parity.compare import Rule, Value
from tokenizer.parity.recording import RecordedFile
from tokenizer.voxels import RESOLUTION, pack_views, view_patches

_VIEW = re.compile(r"view(\d+)_patch_feats_u8$")


def produce(file: RecordedFile, wanted: set[str], bench: Bench) -> Values:
    """Pack the recorded views again."""
    inputs = {kind: [name for name in file.tensors if name.startswith(f"in.{kind}")] for kind in ("images", "depth")}
    cameras_name = next((name for name in file.tensors if name.startswith("in.transforms_json")), None)
    if cameras_name is None or not all(len(names) == 1 for names in inputs.values()):
        return
    images = list(file.take(inputs["images"][0]).numpy())
    depth = file.take(inputs["depth"][0])
    transforms = json.loads(bytes(file.take(cameras_name).tolist()))
    cameras = cameras_from_transforms(transforms)
    yield "intrinsics", Value(cameras.intrinsics)
    yield "w2c", Value(cameras.world_to_camera)
    features, coordinates = pack_views(images, depth, transforms, _resolution(bench))
    yield "coords", Value(coordinates, Rule.EXACT)
    yield "feats", Value(features)
    yield "feats_u8", Value((features * 255.0).round().to(torch.uint8), Rule.EXACT)
    for name in wanted:
        if match := _VIEW.match(name):
            yield name, Value(view_patches(images[int(match[1])]), Rule.EXACT)


def _resolution(bench: Bench) -> int:
    shapes = bench.recording.readme.get("shapes", {}).get("mv", {})
    if not isinstance(shapes, dict):
        raise InputError("shapes.mv in README.json must say which resolution the voxels have")
    return int(shapes.get("res", RESOLUTION))
