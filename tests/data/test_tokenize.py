"""Tokenised sets: what is stored decodes like what was encoded, whatever processes wrote it and however they ended."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray
from PIL import Image

from data.batch import Batch
from data.decode.decoder import Decoder, DecodeSettings
from data.latents.format import LatentItem, decode_latents, encode_latents
from data.latents.read import LatentDecoder
from data.latents.tokenize import Settings, tokenize_shards
from data.mixture import Task
from data.samples import Item, Kind, Raw, SampleError
from data.shards.manifest import ShardSet, Skipped, read_set
from data.shards.reader import read_shard
from data.shards.tarwriter import Record, write_shard
from data.shards.writer import write_set
from data.tap import read_items
from tokenizer import AToken
from tokenizer.errors import InputError
from tokenizer.media import VideoWriter
from tokenizer.patches import VisualSize
from tokenizer.voxels import AssetSize

ROOT = Path(__file__).parent.parent.parent
TASKS: dict[Kind, Task] = {
    "images": Task.IMAGE_RECONSTRUCTION,
    "videos": Task.VIDEO_RECONSTRUCTION,
    "assets": Task.ASSET_RECONSTRUCTION,
}
CAPTIONS = ("A red house, at night.", "一座红色的房子", "بيت أحمر", "дом 🏠")


def png(seed: int, height: int, width: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def picture_record(number: int) -> Iterator[Record]:
    contents = png(number, 33 + 7 * number, 90 - 3 * number)
    if number == 4:
        contents = contents[: len(contents) // 2]
    files = {"png": contents}
    if number % 2 == 0:
        files["txt"] = CAPTIONS[number // 2 % len(CAPTIONS)].encode()
    yield Record(f"train/{number:03d}", files, {"label": f"class {number % 3}", "number": number})


def asset_record(number: int) -> Iterator[Record]:
    chance = np.random.default_rng(number)
    cells = chance.choice(8**3, size=20 + number, replace=False)
    arrays: dict[str, NDArray[Any]] = {
        "features": chance.integers(0, 256, (len(cells), 768), dtype=np.uint8),
        "coordinates": np.stack([cells // 64, cells // 8 % 8, cells % 8], axis=1).astype(np.int16),
        "world_to_camera": np.eye(4, dtype=np.float32)[None],
        "intrinsics": np.eye(3, dtype=np.float32)[None],
        "seen": np.ones(1, dtype=bool),
    }
    turned = [[0.0, -1.0, 0.0, 2.5], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    yield Record(
        f"{number}", {"voxels.safetensors": safetensors.numpy.save(arrays)}, {"resolution": 8, "to_original": turned}
    )


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory, clip: NDArray[np.uint8]) -> dict[Kind, Path]:
    """Ten pictures in four shards, one of them broken; two clips; three assets."""
    folder = tmp_path_factory.mktemp("sets")

    def clip_record(number: int) -> Iterator[Record]:
        path = folder / "clip.mp4"
        with VideoWriter(path, 10, *clip.shape[1:3]) as writer:
            writer.write(clip[: 10 - number])
        yield Record(f"{number}", {"mp4": path.read_bytes()}, {"fps": 10.0})

    makers = {"images": (picture_record, 10, 3), "videos": (clip_record, 2, 1), "assets": (asset_record, 3, 2)}
    for kind, (make, count, per_shard) in makers.items():
        jobs = range(count)
        write_set(folder / kind, kind, jobs, make, jobs_per_shard=per_shard, workers=1, facts={})  # type: ignore[arg-type]
    return {kind: folder / kind for kind in TASKS}


@pytest.fixture(scope="module")
def whole(sets: dict[Kind, Path], tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures, tokenised by one process in one run."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    tokenize_shards(str(sets["images"]), out, settings_for(tiny_models))
    return out


def settings_for(models: Path, *, discrete: bool = False, workers: int = 0) -> Settings:
    name = "atoken-nano-d" if discrete else "atoken-nano"
    return Settings(model=str(models / name), device="cpu", discrete=discrete, max_side=64, budget=24, workers=workers)


def latent_items(found: ShardSet, task: Task) -> list[Item]:
    return list(read_items(found, LatentDecoder("latents", task)))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a set but the quarantine, which names paths."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "quarantine.jsonl"}


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("kind", list(TASKS))
def test_what_is_stored_decodes_like_what_was_encoded(
    sets: dict[Kind, Path], tiny_models: Path, tmp_path: Path, kind: Kind, discrete: bool
) -> None:
    settings = settings_for(tiny_models, discrete=discrete)
    report = tokenize_shards(str(sets[kind]), tmp_path / "out", settings)
    assert report.complete
    stored = latent_items(read_set(tmp_path / "out"), TASKS[kind])
    model = AToken.from_pretrained(settings.model)
    how = DecodeSettings(training=False, min_side=16, max_side=64, frames=(4, 32), views=0)
    direct = list(read_items(read_set(sets[kind]), Decoder("direct", TASKS[kind], kind, how)))
    assert [item.id for item in stored] == [item.id for item in direct]
    assert report.encoded_samples == len(stored)
    assert report.encoded_tokens == sum(item.tokens for item in stored)
    for item, original in zip(stored, direct, strict=True):
        batch = Batch(TASKS[kind], [original])
        with torch.no_grad():
            encoding = model.encode(batch.tokens())
            wanted, found = model.decode(encoding.latents), model.decode(latents_of(item).tokens())
        assert latents_of(item).size == batch.sizes()[0]
        assert (item.caption, item.facts) == (original.caption, original.facts)
        assert torch.equal(found.host_positions, wanted.host_positions)
        # float16 keeps 11 bits of a latent.
        torch.testing.assert_close(latents_of(item).pooled.float(), encoding.pooled[0], rtol=2**-10, atol=1e-5)
        if discrete:
            assert encoding.indices is not None
            assert torch.equal(latents_of(item).tokens().features, encoding.indices.features)
            assert torch.equal(found.features, wanted.features)
        else:
            mean, logvar = latents_of(item).mean, latents_of(item).logvar
            assert mean is not None
            assert logvar is not None
            torch.testing.assert_close(mean.float(), encoding.posterior.mean.features, rtol=2**-10, atol=1e-5)
            torch.testing.assert_close(logvar.float(), encoding.posterior.logvar.features, rtol=2**-10, atol=1e-5)
            torch.testing.assert_close(found.features, wanted.features, rtol=0, atol=5e-3)
    assert {latents_of(item).frame_rate for item in stored} == {10.0 if kind == "videos" else 0.0}


def latents_of(item: Item) -> LatentItem:
    assert item.latents is not None
    return item.latents


def test_captions_and_facts_are_carried_as_they_are_and_broken_samples_named(whole: Path) -> None:
    found = read_set(whole)
    raws = {raw.key: raw for shard in found.shards for raw in read_shard(shard.url)}
    assert [*raws] == [f"train/{number:03d}" for number in range(10) if number != 4]
    for number in (0, 1, 2, 6):
        raw = raws[f"train/{number:03d}"]
        assert raw.facts() == {"label": f"class {number % 3}", "number": number}
        assert raw.caption() == (CAPTIONS[number // 2 % len(CAPTIONS)] if number % 2 == 0 else None)
    (skipped,) = found.skipped
    assert skipped.name == "shard-000001.tar/train/004"
    assert "damaged picture" in skipped.reason
    (line,) = (whole / "quarantine.jsonl").read_text().splitlines()
    assert (json.loads(line)["cause"], json.loads(line)["key"]) == ("damaged picture", "train/004")


def test_statistics_are_those_of_all_latents(whole: Path) -> None:
    found = read_set(whole)
    items = [latents_of(item) for item in latent_items(found, Task.IMAGE_RECONSTRUCTION)]
    means = np.concatenate([item.mean.numpy() for item in items if item.mean is not None]).astype(np.float64)
    logvars = np.concatenate([item.logvar.numpy() for item in items if item.logvar is not None]).astype(np.float64)
    told = found.facts["statistics"]
    assert told["tokens"] == len(means)
    np.testing.assert_allclose(told["mean"], means.mean(axis=0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(told["std"], means.std(axis=0), rtol=1e-12)
    np.testing.assert_allclose(told["posterior_variance"], np.exp(logvars).mean(axis=0), rtol=1e-12)


def test_drawn_latents_follow_the_posterior(whole: Path) -> None:
    item = latents_of(latent_items(read_set(whole), Task.IMAGE_RECONSTRUCTION)[0])
    assert item.mean is not None
    assert item.logvar is not None
    drawn = item.tokens(torch.Generator().manual_seed(3)).features
    noise = (drawn - item.mean.float()) / (0.5 * item.logvar.float()).exp()
    wanted = torch.randn(noise.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(noise, wanted, rtol=0, atol=1e-4)


def test_two_processes_write_what_one_writes(
    sets: dict[Kind, Path], tiny_models: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings_for(tiny_models), budget=256)
    options = ["--model", settings.model, "--device", "cpu", "--max-side", "64", "--budget", "256"]
    command = [sys.executable, "-m", "tokenizer.cli", "tokenize", str(sets["images"]), "--out", str(tmp_path / "two")]
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    other = subprocess.Popen([*command, *options], env=environment, cwd=tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert tokenize_shards(str(sets["images"]), tmp_path / "two", settings).written == 2
    assert other.wait(300) == 0
    monkeypatch.undo()
    tokenize_shards(str(sets["images"]), tmp_path / "one", settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    # The budget is not that of `whole`, so batches differ: latents do not depend on what was encoded beside them.
    one, two = (latent_items(read_set(folder), Task.IMAGE_RECONSTRUCTION) for folder in (whole, tmp_path / "two"))
    assert [item.id for item in one] == [item.id for item in two]
    for first, second in zip(one, two, strict=True):
        torch.testing.assert_close(latents_of(first).tokens().features, latents_of(second).tokens().features)


KILLED = """
import sys
from pathlib import Path
import pytest
from data.latents.tokenize import Settings, tokenize_shards
from tests.data.test_tokenize import send_in_the_middle

send_in_the_middle(pytest.MonkeyPatch(), "SIGKILL")
tokenize_shards(sys.argv[1], Path(sys.argv[2]), Settings(model=sys.argv[3], device="cpu", max_side=64, budget=24))
"""


def send_in_the_middle(patch: pytest.MonkeyPatch, name: str) -> None:
    """From now on this process gets a signal when it has written two samples of the third shard."""

    def interrupted(path: Path, records: Iterator[Record | Skipped], *, plan: str) -> object:
        def some() -> Iterator[Record | Skipped]:
            for number, record in enumerate(records):
                yield record
                if path.name == "shard-000002.tar" and number == 1:
                    os.kill(os.getpid(), signal.Signals[name])

        return write_shard(path, some(), plan=plan)

    patch.setattr("data.latents.tokenize.write_shard", interrupted)


def tars(folder: Path) -> dict[str, int]:
    """When the shards of a folder were written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix == ".tar"}


def test_a_stopped_run_leaves_whole_shards_only(
    sets: dict[Kind, Path], tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_in_the_middle(monkeypatch, "SIGTERM")
    with pytest.raises(SystemExit) as caught:
        tokenize_shards(str(sets["images"]), tmp_path, settings_for(tiny_models))
    assert caught.value.code == 128 + signal.SIGTERM
    assert sorted(tars(tmp_path)) == ["shard-000000.tar", "shard-000001.tar"]


def test_a_killed_run_is_gone_on_with_and_no_shard_written_twice(
    sets: dict[Kind, Path], tiny_models: Path, whole: Path, tmp_path: Path
) -> None:
    arguments = [str(sets["images"]), str(tmp_path), str(tiny_models / "atoken-nano")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    before = tars(tmp_path)
    (half,) = [name for name in before if name.startswith(".")]
    del before[half]
    assert sorted(before) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(InputError, match="not finished"):
        read_set(tmp_path)
    report = tokenize_shards(str(sets["images"]), tmp_path, settings_for(tiny_models, workers=2))
    assert (report.written, report.complete) == (2, True)
    assert contents(tmp_path) == contents(whole)
    after = tars(tmp_path)
    assert after | before == after
    assert tokenize_shards(str(sets["images"]), tmp_path, settings_for(tiny_models)).written == 0
    assert tars(tmp_path) == after


def test_other_settings_models_and_inputs_are_refused(
    sets: dict[Kind, Path], tiny_models: Path, whole: Path, tmp_path: Path
) -> None:
    settings = settings_for(tiny_models)
    with pytest.raises(InputError, match=r"other arguments \(settings: .*'max_side': 64.*'max_side': 32"):
        tokenize_shards(str(sets["images"]), whole, replace(settings, max_side=32))
    with pytest.raises(InputError, match=r"other arguments \(latent"):
        tokenize_shards(str(sets["images"]), whole, settings_for(tiny_models, discrete=True))
    with pytest.raises(InputError, match=r"other arguments \(inputs"):
        tokenize_shards(str(sets["images"] / "shard-000000.tar"), whole, settings)
    with pytest.raises(InputError, match="holds latents already"):
        tokenize_shards(str(whole), tmp_path / "again", settings)


def test_a_shard_that_vanished_is_not_taken_for_an_empty_one(
    sets: dict[Kind, Path], tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read_set(sets["images"])
    lost = replace(found, shards=(replace(found.shards[0], url=str(tmp_path / "shard-000000.tar")), *found.shards[1:]))
    monkeypatch.setattr("data.latents.tokenize.read_set", lambda *_, **__: lost)
    with pytest.raises(InputError, match=r"1 of 4 shards could not be read .*shard-000000\.tar.*run the command again"):
        tokenize_shards("lost", tmp_path / "out", settings_for(tiny_models))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [f"shard-00000{n}.tar" for n in (1, 2, 3)]
    assert not (tmp_path / "out" / "manifest.json").exists()


def item_of(mean: float, logvar: float = -3.0) -> LatentItem:
    return LatentItem(
        positions=torch.tensor([[0, 4095, 1, 0], [0, 0, 1, 0]], dtype=torch.int32),
        pooled=torch.zeros(3),
        size=VisualSize("image", 1, 32, 16),
        model="m",
        fingerprint="f",
        mean=torch.full((2, 4), mean),
        logvar=torch.full((2, 4), logvar),
    )


def discrete(indices: list[list[int]]) -> LatentItem:
    return replace(item_of(0.0), mean=None, logvar=None, indices=torch.tensor(indices, dtype=torch.int32))


@pytest.mark.parametrize(
    "item",
    [item_of(7e4), item_of(float("nan")), item_of(0.0, 81.0), item_of(0.0, 7e4), discrete([[0, 0], [4095, -1]])],
)
def test_what_a_file_cannot_hold_is_refused(item: LatentItem) -> None:
    with pytest.raises(SampleError, match="a/b: ") as caught:
        encode_latents(item, "a/b")
    assert caught.value.cause == "latents out of range"


def test_files_of_one_sample_keep_everything_and_damage_is_told() -> None:
    matrix = ((0.5, 0.0, 0.0, 1 / 3), (0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    indices = torch.tensor([[65535, 0], [70000, 3]], dtype=torch.int32)
    asset = replace(item_of(0.0), size=AssetSize(64, matrix), mean=None, logvar=None, indices=indices, frame_rate=2.5)
    whole = encode_latents(asset, "a")
    found = decode_latents(Raw("s.tar", 0, "k", {"latents.safetensors": whole}))
    assert (found.size, found.frame_rate, found.model, found.fingerprint) == (asset.size, 2.5, "m", "f")
    assert torch.equal(found.tokens().features, indices)
    assert torch.equal(found.positions, asset.positions)
    foreign = safetensors.numpy.save({"positions": np.zeros((1, 4), np.uint16)})
    one_short = whole.replace(b'"shape":[2,4]', b'"shape":[1,8]')
    assert one_short != whole
    for damaged in (b"", whole[:7], whole[: len(whole) // 2], whole[:-3], foreign, one_short, b"\xff" * 100):
        with pytest.raises(SampleError, match=r"^s\.tar/k\.latents\.safetensors: "):
            decode_latents(Raw("s.tar", 0, "k", {"latents.safetensors": damaged}))
    with pytest.raises(SampleError, match="made by 'm'"):
        LatentDecoder("s", Task.IMAGE_RECONSTRUCTION, "other")(Raw("s.tar", 0, "k", {"latents.safetensors": whole}), 0)
