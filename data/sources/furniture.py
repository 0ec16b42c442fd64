"""Rendered views of the furniture of Sweet Home 3D: 820 textured models, for training and measuring the 3D part.

    python -m data.sources.furniture --out datasets/furniture

Each model becomes one safetensors file: `INPUTS` views with depth, which `tokenizer.assets.packing` turns into voxels,
and further views that nothing but a loss or a measure sees. Models whose number in their catalogue
is divisible by 10 are for evaluation only. The build goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from data.sources.packages import FURNITURE, PROGRAM, install_hint
from tokenizer.assets.load import load_mesh_from
from tokenizer.assets.mesh import Mesh
from tokenizer.assets.raycast import render_views
from tokenizer.assets.views import EMPTY, Views
from tokenizer.atomic import atomic_path
from tokenizer.cameras import Cameras, sphere_cameras
from tokenizer.errors import InputError

CATALOGUE = "PluginFurnitureCatalog.properties"
PROGRAM_CATALOGUE = "com/eteks/sweethome3d/io/DefaultFurnitureCatalog.properties"
"""Of the program itself, in its archive."""

MANIFEST = "manifest.json"
FORMAT = 1

INPUTS, EXTRA = 16, 8
"""Views that a model sees, and unseen ones."""

SIZE = 256
EVALUATION_PHASE = 1.0
"""Turn of the unseen cameras of evaluation models, in radians; those of training models turn with their number."""


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of a catalogue.

    number: in its catalogue, from 1. name, category: captions. licence: as the catalogue states it. creator: whom to
    name, where the catalogue knows. held_out: whether every tenth model of the catalogue is for evaluation.
    """

    archive: str
    number: int
    path: str
    name: str
    category: str
    licence: str
    creator: str = ""
    held_out: bool = True

    @property
    def split(self) -> str:
        return "evaluation" if self.held_out and self.number % 10 == 0 else "train"

    @property
    def file(self) -> str:
        """Name in the store."""
        return f"{Path(self.archive).stem}-{self.number:03d}.safetensors"


def catalogue() -> list[Model]:
    """All models of the installed package, catalogue after catalogue.

    Raises:
        InputError: the package is not installed.
    """
    archives = [path for path in FURNITURE.files() or [] if path.suffix == ".sh3f"]
    if not archives:
        raise InputError(f"package {FURNITURE.name} is not installed: {install_hint([FURNITURE])}")
    return [model for archive in archives for model in _read_catalogue(archive)]


def program_catalogue(archive: Path) -> list[Model]:
    """The models that Sweet Home 3D itself brings, all of them for training; each once, whatever colours it comes in.

    Args:
        archive: `sweethome3d.jar`.

    Raises:
        InputError: not such an archive.
    """
    try:
        models = list(_read_catalogue(archive, PROGRAM_CATALOGUE))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{archive}: no archive of Sweet Home 3D with a catalogue ({error})") from None
    first = {model.path: model for model in reversed(models)}
    licence = PROGRAM.licence
    return [replace(model, held_out=False, licence=licence) for model in models if first[model.path] is model]


def _read_catalogue(archive: Path, entry: str = CATALOGUE) -> Iterator[Model]:
    with zipfile.ZipFile(archive) as contents:
        lines = contents.read(entry).decode("latin-1").splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    numbers = sorted(int(key.split("#")[1]) for key in values if key.startswith("model#"))
    for number in numbers:
        yield Model(
            archive=str(archive),
            number=number,
            path=values[f"model#{number}"].lstrip("/"),
            name=_text(values.get(f"name#{number}", "")),
            category=_text(values.get(f"category#{number}", "")),
            licence=_text(values.get("license", "")),
            creator=_text(values.get(f"creator#{number}", "")),
        )


def _text(value: str) -> str:
    """A value of a Java properties file: "50\\u20ac" -> "50€"."""
    return re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), value).strip()


def load(model: Model) -> Mesh:
    """The model as a mesh, normalised."""
    folder = model.path.rsplit("/", 1)[0] + "/"
    with zipfile.ZipFile(model.archive) as contents:
        files = {name: contents.read(name) for name in contents.namelist() if name.startswith(folder)}
    return load_mesh_from(files, model.path).normalised()


def render(model: Model, number: int) -> tuple[Views, Views]:
    """The views that are seen, and those that are not.

    Args:
        number: of the model among all, which turns the unseen cameras of a training model.
    """
    mesh = load(model)
    evaluation = model.split == "evaluation"
    phase = EVALUATION_PHASE if evaluation else float(number)
    seen = render_views(mesh, sphere_cameras(INPUTS, mesh.radius), SIZE, samples=2)
    unseen = render_views(mesh, sphere_cameras(EXTRA, mesh.radius, phase=phase), SIZE, samples=4 if evaluation else 2)
    return seen, unseen


def _store(job: tuple[Model, int, Path]) -> str:
    """Write one model; returns the reason where it cannot be used."""
    from safetensors.torch import save_file

    model, number, out = job
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen, unseen = render(model, number)
    except InputError as error:
        return str(error)
    tensors = {
        "seen.colours": torch.from_numpy(seen.colours),
        "seen.depth": seen.depth.half(),
        "seen.world_to_camera": seen.cameras.world_to_camera,
        "seen.intrinsics": seen.cameras.intrinsics,
        "unseen.colours": torch.from_numpy(unseen.colours),
        "unseen.world_to_camera": unseen.cameras.world_to_camera,
        "unseen.intrinsics": unseen.cameras.intrinsics,
    }
    with atomic_path(out / model.file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    return ""


def read_views(file: Path) -> tuple[Views, Views]:
    """The views of one model of a store: those that are seen, and those that are not (these without depth).

    Raises:
        InputError: missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
        seen, unseen = (
            Views(
                (colours := tensors[f"{part}.colours"]).numpy(),
                tensors[f"{part}.depth"].float() if part == "seen" else torch.full(colours.shape[:3], EMPTY),
                Cameras(tensors[f"{part}.world_to_camera"], tensors[f"{part}.intrinsics"]),
            )
            for part in ("seen", "unseen")
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"{file}: cannot be read ({error!r}); build the store again") from None
    return seen, unseen


def stored_models(folder: Path) -> list[Model]:
    """The models that the manifest of a store lists; with creators, as far as the store or the package knows them.

    Raises:
        InputError: no store there.
    """
    installed = catalogue() if FURNITURE.files() else []
    known = {(Path(model.archive).name, model.number): model for model in installed}
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["models"]
        names = [field.name for field in fields(Model)]
        stored = [Model(**{name: entry[name] for name in names if name in entry}) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder}: no store of furniture; python -m data.sources.furniture makes one") from None
    # Stores of earlier versions lack creators and have names as the catalogue escapes them.
    return [
        replace(
            model,
            name=_text(model.name),
            creator=model.creator or (known[key].creator if (key := (model.archive, model.number)) in known else ""),
        )
        for model in stored
    ]


def build(out: Path, workers: int, limit: int | None = None) -> dict[str, int]:
    """Build the store, or what is missing of it.

    Args:
        out: folder; a model that lies there already is not rendered again.
        workers: processes.
        limit: only this many models of each split, for a trial.

    Returns:
        Numbers of models by split, and of skipped ones.
    """
    from rich.progress import Progress

    models = list(enumerate(catalogue()))
    if limit is not None:
        chosen = {s: [pair for pair in models if pair[1].split == s][:limit] for s in ("evaluation", "train")}
        models = sorted(chosen["evaluation"] + chosen["train"])
    # Evaluation models first: they are few, and a run can be measured before all training models are there.
    models.sort(key=lambda pair: (pair[1].split != "evaluation", pair[0]))
    out.mkdir(parents=True, exist_ok=True)
    todo = [(model, number, out) for number, model in models if not (out / model.file).is_file()]
    skipped: dict[str, str] = {}
    with ProcessPoolExecutor(workers) as pool, Progress() as progress:
        results = zip(todo, pool.map(_store, todo, chunksize=1), strict=True)
        for (model, _, _), reason in progress.track(results, total=len(todo), description="models"):
            if reason:
                skipped[model.file] = reason
    entries = [asdict(m) | {"split": m.split, "file": m.file, "archive": Path(m.archive).name} for _, m in models]
    kept = [entry for entry in entries if entry["file"] not in skipped]
    manifest = {"format": FORMAT, "source": FURNITURE.name, "models": kept, "skipped": skipped}
    with atomic_path(out / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    counts = {split: sum(entry["split"] == split for entry in kept) for split in ("train", "evaluation")}
    return counts | {"skipped": len(skipped)}


def main(argv: list[str] | None = None) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data.sources.furniture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make, e.g. datasets/furniture")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, help="only this many models of each split")
    options = parser.parse_args(argv)
    try:
        print(build(options.out, options.workers, options.limit))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
