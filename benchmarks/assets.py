"""`python -m benchmarks.assets`: from a 3D asset to tokens stage by stage, and the rasteriser.

The asset is a furniture-like model made here, an upholstered chair of about as many triangles as a median model of the
furniture set has (4,343), or any file given with --asset. The ray caster alone, one bare embree query for
every pixel of every view, is measured in the same run: it is what the views cost without colours. The rasteriser draws
50,000 Gaussians of two sorts at 256 x 256, forward and forward + backward, and prints the peak of its memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import check_options, describe, find_device, seconds
from benchmarks.rasterize import measure_rasterizer
from benchmarks.rasterize import table as rasterizer_table
from tokenizer.api import AToken
from tokenizer.assets.load import load_mesh
from tokenizer.assets.mesh import Mesh
from tokenizer.assets.packing import pack
from tokenizer.assets.pipeline import VIEW_SAMPLES, VIEW_SIZE, VIEWS
from tokenizer.assets.raycast import Scene, render_views
from tokenizer.atomic import atomic_path
from tokenizer.cameras import sphere_cameras
from tokenizer.cli.outcome import run
from tokenizer.errors import InputError
from tokenizer.voxels import voxels_to_tokens

CPU = torch.device("cpu")


def chair(folder: Path) -> Path:
    """A textured chair with rounded cushions, as OBJ, MTL and PNG."""
    from PIL import Image

    rng = np.random.default_rng(0)
    weave = (rng.random((256, 256, 3)) * 60 + np.array([150, 90, 60])).astype(np.uint8)
    Image.fromarray(weave).save(folder / "weave.png")
    (folder / "chair.mtl").write_text("newmtl cloth\nKd 1 1 1\nmap_Kd weave.png\nnewmtl wood\nKd 0.4 0.25 0.12\n")
    lines = ["mtllib chair.mtl"]
    count = 1
    seat, back = ((0.0, 0.5, 0.0), (0.5, 0.12, 0.5)), ((0.0, 1.0, -0.42), (0.5, 0.5, 0.12))
    legs = [((x, 0.2, z), (0.05, 0.22, 0.05)) for x in (-0.4, 0.4) for z in (-0.4, 0.4)]
    parts = [("cloth", *seat, 23), ("cloth", *back, 23), *(("wood", *leg, 6) for leg in legs)]
    for material, centre, size, rings in parts:
        lines.append(f"usemtl {material}")
        around = 2 * rings
        for ring in range(rings + 1):
            up = np.pi * ring / rings - np.pi / 2
            for step in range(around + 1):
                turn = 2 * np.pi * step / around
                direction = np.array([np.cos(up) * np.cos(turn), np.sin(up), np.cos(up) * np.sin(turn)])
                # A power below one turns the sphere into a rounded box.
                x, y, z = np.array(centre) + np.array(size) * np.sign(direction) * np.abs(direction) ** 0.4
                lines.append(f"v {x:.5f} {y:.5f} {z:.5f}\nvt {4 * step / around:.5f} {2 * ring / rings:.5f}")
        for ring in range(rings):
            for step in range(around):
                a = count + ring * (around + 1) + step
                b = a + around + 1
                lines.append(f"f {a}/{a} {a + 1}/{a + 1} {b + 1}/{b + 1} {b}/{b}")
        count += (rings + 1) * (around + 1)
    path = folder / "chair.obj"
    path.write_text("\n".join(lines) + "\n")
    return path


def bare_casting(mesh: Mesh) -> Callable[[], object]:
    """One embree query for the centre of every pixel of all views, and nothing else."""
    scene = Scene(mesh)
    jobs = [scene.pixel_rays(sphere_cameras(VIEWS, mesh.radius)[v : v + 1], VIEW_SIZE) for v in range(VIEWS)]
    return lambda: [scene.first_faces(origins, directions) for origins, directions in jobs]


def measure_asset(path: Path, model: AToken, repeats: int) -> dict[str, Any]:
    """Seconds of each stage for one asset, the fastest of `repeats`."""
    decoder = model.gaussian_decoder
    if decoder is None:
        raise InputError(f"{model.config.name} has no Gaussian decoder, so nothing says how to pack its voxels")
    rule, resolution = decoder.config.packing, decoder.config.resolution
    mesh = load_mesh(path).normalised()
    cameras = sphere_cameras(VIEWS, mesh.radius)
    views = render_views(mesh, cameras, VIEW_SIZE, samples=VIEW_SAMPLES)
    voxels = pack(views, rule, resolution)
    tokens = voxels_to_tokens(voxels.features, voxels.coordinates, model.config.patch_size)
    encoding = model.encode_asset(views)
    with torch.no_grad():
        stages = {
            "load": seconds(lambda: load_mesh(path), CPU, repeats),
            "embree alone": seconds(bare_casting(mesh), CPU, repeats),
            "views": seconds(lambda: render_views(mesh, cameras, VIEW_SIZE, samples=VIEW_SAMPLES), CPU, repeats),
            "pack": seconds(lambda: pack(views, rule, resolution), CPU, repeats),
            "encode": seconds(lambda: model.encode(tokens), CPU, repeats),
            "asset to tokens": seconds(lambda: model.encode_asset(path), CPU, repeats),
            "tokens to Gaussians": seconds(lambda: model.decode_asset(encoding), CPU, repeats),
        }
    return {"asset": path.name, "faces": len(mesh.faces), "tokens": tokens.num_tokens, "seconds": stages}


def main(arguments: list[str]) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.assets", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--asset", type=Path, help="measure this file instead of the made chair")
    parser.add_argument("--model", default="atoken-nano")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the rasteriser")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    options = parser.parse_args(arguments)
    return run(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    check_options(options, "threads", "repeats")
    device = find_device(options.device)
    torch.set_num_threads(options.threads)
    model = AToken.from_pretrained(options.model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        asset = measure_asset(options.asset or chair(Path(folder)), model, options.repeats)
    rasterizer = measure_rasterizer(device, options.repeats)
    results = {"machine": describe(device), "asset": asset, "rasterizer": rasterizer}
    table = Table("stage", "seconds", title=f"{asset['asset']}: {asset['faces']} faces, {asset['tokens']} tokens")
    for name, value in asset["seconds"].items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    Console().print(rasterizer_table(rasterizer, "rasterising"))
    if options.out is not None:
        with atomic_path(options.out) as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
