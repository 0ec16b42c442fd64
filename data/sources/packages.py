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
        install: the command that brings it.
        licence: the licence of the files, in a phrase.
        module: import name of a pip package, or None for a Debian package.
        folder: where in the pip package the files lie.
    """

    name: str
    install: str
    licence: str
    module: str | None = None
    folder: str = "."

    def files(self) -> list[Path] | None:
        """The package's files in sorted order, or None where it is not installed."""
        return _debian_files(self.name) if self.module is None else _pip_files(self.module, self.folder)


def _pip_files(module: str, folder: str) -> list[Path] | None:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))) / folder
    return sorted(path for path in root.iterdir() if path.is_file()) if root.is_dir() else None


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
    """One line of commands that bring all of `packages`."""
    return " && ".join(dict.fromkeys(package.install for package in packages))
