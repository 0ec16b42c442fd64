"""A run is given back, or goes on, only where everything it was made from is still the same."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.tokenizer.evaluation_files import options, scene
from tokenizer.errors import InputError
from tokenizer.evaluation.command.baselines import LinearSystem, load_linear
from tokenizer.evaluation.command.datasets import open_source
from tokenizer.evaluation.command.evaluate import Progress, evaluate
from tokenizer.evaluation.command.identity import folder_facts, tower_facts
from tokenizer.evaluation.linear_code import LinearCode, LinearCodes
from tokenizer.media import save_image

COARSE = "tests.tokenizer.evaluation_files:Coarse"


def no_model(*_: object) -> Any:
    raise AssertionError("no model is asked for")


def run(data: Path, out: Path, **changes: Any) -> Any:
    return evaluate(options(data, out, **{"models": [], "adapters": [COARSE], **changes}), no_model)


def change(path: Path, content: bytes) -> None:
    """Other bytes, as many as before; a file system with coarse times would hide that within one tick."""
    assert len(content) == path.stat().st_size
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three pictures, whose sizes do not depend on what they show, and a caption."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        picture(folder / f"{number}.ppm", number)
    (folder / "0.txt").write_text("a cat")
    return folder


def picture(path: Path, number: int) -> None:
    path.write_bytes(b"P6 20 24 255\n" + scene(number, 24, 20).tobytes())


def other_picture(folder: Path) -> None:
    path = folder / "1.ppm"
    change(path, b"P6 20 24 255\n" + scene(7, 24, 20).tobytes())


def other_caption(folder: Path) -> None:
    change(folder / "0.txt", b"a dog")


@pytest.mark.parametrize("alter", [other_picture, other_caption])
@pytest.mark.parametrize("finished", [True, False])
def test_files_that_changed_are_not_taken_for_those_before(
    data: Path, tmp_path: Path, alter: Callable[[Path], None], finished: bool
) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    if finished:
        first = run(data, tmp_path / "out")
        assert run(data, tmp_path / "out") == json.loads(json.dumps(first))
    else:
        with pytest.raises(KeyboardInterrupt):
            evaluate(options(data, tmp_path / "out", models=[], adapters=[COARSE]), no_model, Progress(done=stop))
        assert (tmp_path / "out" / "state").is_dir()
    listing = open_source(str(data)).facts()["listing_sha256"]
    alter(data)
    with pytest.raises(InputError, match=r"other arguments \(data\)"):
        run(data, tmp_path / "out")
    assert open_source(str(data)).facts()["listing_sha256"] == listing, "names and sizes are as they were"


def test_textures_and_pictures_of_views_belong_to_the_data(tmp_path: Path) -> None:
    for name in ("chair.obj", "chair.mtl", "textures/wood.png", "lamp/transforms.json", "lamp/000.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"before")
    for name in ("chair.mtl", "textures/wood.png", "lamp/000.png"):
        before = open_source(str(tmp_path)).facts()
        change(tmp_path / name, b"behind")
        assert open_source(str(tmp_path)).facts() != before, name


def test_an_adapter_is_its_source(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "changing_adapter.py"
    source.write_text(f"from {COARSE.partition(':')[0]} import Coarse\n")
    try:
        first = run(data, tmp_path / "out", adapters=["changing_adapter:Coarse"])
        assert run(data, tmp_path / "out", adapters=["changing_adapter:Coarse"]) == json.loads(json.dumps(first))
        source.write_text(source.read_text() + "# changed\n")
        with pytest.raises(InputError, match=r"other arguments \(systems\)"):
            run(data, tmp_path / "out", adapters=["changing_adapter:Coarse"])
    finally:
        sys.modules.pop("changing_adapter", None)


def codes(seed: int) -> LinearCodes:
    draw = torch.Generator().manual_seed(seed)
    parts = []
    for size in ((1, 16, 16), (4, 16, 16)):
        patches = torch.rand(60, size[0] * 768, generator=draw) * 2 - 1
        parts.append(LinearCode.fit([patches], size, components=8))
    return LinearCodes(*parts)


def test_a_linear_code_is_its_values_and_its_file(tmp_path: Path) -> None:
    path = tmp_path / "code.npz"
    codes(1).save(path)
    system = LinearSystem(load_linear(path, 0), 32, str(path))
    assert system.facts() == LinearSystem(load_linear(path, 0), 32, str(path)).facts()
    first = system.facts()
    codes(2).save(path)
    again = LinearSystem(load_linear(path, 0), 32, str(path)).facts()
    assert again["sha256"] != first["sha256"]
    assert again["digest"] != first["digest"], "a run's configuration is the same file when its data change"


def test_a_text_tower_is_its_weights_and_all_files_of_its_folder(tmp_path: Path) -> None:
    class Tower:
        name, width = "tower", 3

        def __init__(self) -> None:
            self.network = torch.nn.Linear(2, 3)

        def encode(self, texts: object) -> torch.Tensor:
            raise AssertionError(f"facts need no texts, not {texts}")

    tower = Tower()
    before = tower_facts(tower)
    assert before == tower_facts(tower)
    with torch.no_grad():
        tower.network.bias.add_(1)
    assert tower_facts(tower) != before
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "tokenizer.json").write_bytes(b"{}")
    told = folder_facts(tmp_path)
    assert told == folder_facts(tmp_path)
    change(tmp_path / "sub" / "tokenizer.json", b"[]")
    assert folder_facts(tmp_path) != told


def test_text_reaches_the_arguments(data: Path, tmp_path: Path) -> None:
    (tmp_path / "tower").mkdir()
    (tmp_path / "tower" / "weights").write_bytes(b"1")
    run(data, tmp_path / "out", text=tmp_path / "tower")
    change(tmp_path / "tower" / "weights", b"2")
    with pytest.raises(InputError, match=r"other arguments \(text\)"):
        run(data, tmp_path / "out", text=tmp_path / "tower")


def store(folder: Path, value: float, category: str = "food") -> None:
    """A store of one asset, with a file in a folder of its own name."""
    for part in ("a", "b"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.full((4,), value)}, folder / part / "bread.safetensors")
    models = [
        {"file": f"{part}/bread.safetensors", "name": "loaf", "category": category, "split": "evaluation"}
        for part in ("a", "b")
    ]
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "models": models}))


def test_a_store_is_its_files_and_words_and_tells_its_assets_apart(tmp_path: Path) -> None:
    store(tmp_path, 1.0)
    source = open_source(str(tmp_path))
    assert [raw.id for raw in source.read([0, 1])] == ["a/bread.safetensors", "b/bread.safetensors"]
    before = source.facts()
    file = tmp_path / "a" / "bread.safetensors"
    content, times = file.read_bytes(), file.stat().st_mtime_ns
    store(tmp_path, 2.0)
    os.utime(file, ns=(0, times + 1))
    assert len(content) == file.stat().st_size
    changed = open_source(str(tmp_path)).facts()
    assert changed != before
    store(tmp_path, 2.0, "drink")
    assert open_source(str(tmp_path)).facts()["listing_sha256"] != changed["listing_sha256"]


def test_pictures_are_saved_anew_with_the_same_time_only_by_intent(tmp_path: Path) -> None:
    """Copies that keep their times, as `cp -p` makes them, are the same data."""
    save_image(scene(1, 24, 20)[0], tmp_path / "one" / "a.png")
    (tmp_path / "two").mkdir()
    copy, original = tmp_path / "two" / "a.png", tmp_path / "one" / "a.png"
    copy.write_bytes(original.read_bytes())
    os.utime(copy, ns=(0, original.stat().st_mtime_ns))
    one, two = (open_source(str(path.parent)).facts() for path in (original, copy))
    assert {**one, "source": ""} == {**two, "source": ""}
