"""Building the store of rendered furniture from archives in the layout of Sweet Home 3D."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from data.sources import furniture
from data.sources.packages import FURNITURE, Package
from tokenizer.errors import InputError
from tokenizer.training.asset_store import read_store

CATALOGUE = """\
# a comment
license=CC0
id#9=a
name#9=Board
category#9=Boards
model#9=/things/board/board.obj
name#10=Other board
category#10=Boards
model#10=/things/board/board.obj
name#11=Lost
model#11=/things/nowhere/lost.obj
"""
BOARD = "v 0 0 0\nv 2 0 0\nv 2 0 1\nv 0 0 1\nf 1 2 3 4\n"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue of three models, one of which is not there, in place of the package."""
    path = tmp_path / "Catalogue.sh3f"
    with zipfile.ZipFile(path, "w") as contents:
        contents.writestr("PluginFurnitureCatalog.properties", CATALOGUE)
        contents.writestr("things/board/board.obj", BOARD)
    monkeypatch.setattr(Package, "files", lambda self: [path] if self is FURNITURE else None)
    monkeypatch.setattr(furniture, "SIZE", 24)
    return path


@pytest.mark.usefixtures("archive")
def test_a_store_is_built_and_finished_later(tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert furniture.build(out, workers=1) == {"train": 1, "evaluation": 1, "skipped": 1}
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["skipped"]) == ["Catalogue-011.safetensors"]
    assert [entry["licence"] for entry in manifest["models"]] == ["CC0", "CC0"]
    (kept,) = read_store(out, "evaluation")
    assert (kept.name, kept.category, kept.file.name) == ("Other board", "Boards", "Catalogue-010.safetensors")
    seen, unseen = kept.views("seen"), kept.views("unseen")
    assert (len(seen), len(unseen)) == (furniture.INPUTS, furniture.EXTRA)
    assert bool((seen.depth >= 0).any())
    # No camera of the unseen views stands where one of the seen views does.
    distance = torch.cdist(seen.cameras.centres, unseen.cameras.centres)
    assert float(distance.min()) > 0.05
    (train,) = read_store(out, "train")
    before = kept.file.stat().st_mtime_ns
    train.file.unlink()
    furniture.build(out, workers=1)
    assert train.file.is_file()
    assert kept.file.stat().st_mtime_ns == before


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Package, "files", lambda self: None)  # noqa: ARG005
    with pytest.raises(InputError, match="apt-get install sweethome3d-furniture"):
        furniture.catalogue()
    assert furniture.main(["--out", str(tmp_path / "store")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
