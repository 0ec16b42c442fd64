"""What the README says to type works: its Python runs, its commands run, its files and links exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tokenizer.evaluation_files import scene
from tokenizer import AToken
from tokenizer.cli import main
from tokenizer.config import load_config
from tokenizer.demo import ASSET, CLIP, PHOTOGRAPH
from tokenizer.media import save_image
from tokenizer.megatron.pretrain import layout_of
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.gaussian_trainer import GaussianTrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "docs" / "fp8.md"]


def blocks(language: str, page: Path = ROOT / "README.md") -> list[str]:
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in fences if name == language]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the README's examples name."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(PHOTOGRAPH, "photo.jpg")
    shutil.copy(CLIP, "clip.mp4")
    shutil.copy(ASSET, "bread.glb")
    Path("pictures").mkdir()
    shutil.copy(PHOTOGRAPH, "pictures/one.jpg")
    run("shard", "images", "pictures", "--out", "shards")
    return tmp_path


def run(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0, words


def test_python(workplace: Path, tiny_models: Path) -> None:
    # The released files are gigabytes; a small model in the same format stands for them.
    AToken.from_pretrained(tiny_models / "atoken-nano").export_released("atoken-soc.safetensors")
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    assert isinstance(names["model"], AToken)
    assert {"photo.atok", "bread.ply", "atoken-soc", "copy.safetensors"} <= {path.name for path in workplace.iterdir()}
    original, copy = (AToken.from_pretrained(path) for path in ("atoken-soc.safetensors", "copy.safetensors"))
    assert copy.dtype == torch.bfloat16
    for name, tensor in copy.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name].bfloat16()), name


def test_commands(workplace: Path) -> None:
    ran = 0
    for line in "".join(blocks("sh")).splitlines():
        words = shlex.split(line.removeprefix(".venv/bin/"), comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        elif words:
            assert words[0] == "atoken"
            run(*words[1:])
            ran += 1
    assert ran >= 8
    assert (workplace / "pairs" / "one.png").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_modules_and_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, module
    for target in re.findall(r"\]\((.*?)\)", text):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for path in re.findall(r"[\w/.-]+\.yaml", text):
        assert path == ".yaml" or (ROOT / path).exists(), path


def test_the_tree_is_the_real_one() -> None:
    [tree] = [block for block in blocks("") if block.startswith("tokenizer/")]
    room = Path()
    for line in tree.splitlines():
        names = [word for word in line.split() if word.endswith(("/", ".py"))]
        if not line.startswith(" "):
            room = ROOT / names[0]
            assert room.is_dir(), room
            continue
        for name in names if all(word.endswith("/") for word in line.split()) else names[:1]:
            assert (room / name).exists(), room / name


@pytest.mark.parametrize(("page", "count"), [(PAGES[0], 4), (PAGES[1], 3)], ids=["README", "fp8"])
def test_training_commands_are_understood(page: Path, count: int) -> None:
    """They take hours or a cluster: what they say is read, by what would read it."""
    ran = 0
    for line in "".join(blocks("text", page)).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "--config" not in words:
            continue
        at = words.index("--config")
        config = load_config(RunConfig, ROOT / words[at + 1], words[at + 2 :])
        if words[at - 1] == "tokenizer.megatron.pretrain":
            layout_of(config, words[at + 1])
        else:
            assert words[at - 1] == "train"
        ran += 1
    assert ran == count


@pytest.mark.usefixtures("workplace")
def test_a_model_is_trained_on_own_pictures() -> None:
    """All that the README says of it, with two steps: pictures of another kind are better already."""
    for split, numbers in {"train": range(12), "held-out": range(12, 15)}.items():
        for number in numbers:
            save_image(scene(number, 150, 140)[0], f"pictures/{split}/{number}.png")
    short = ["steps=2", "start.patches=2000", "data.budgets.image_reconstruction=256", "perceptual_images=1"]
    for line in blocks("text")[0].splitlines():
        words = shlex.split(line)
        if words[1] == "train":
            words[3] = str(ROOT / words[3])
            words += ["--device", "cpu", *short]
        run(*words[1:])
    first, *_, last = [json.loads(line) for line in Path("runs/own-pictures/metrics.jsonl").read_text().splitlines()]
    bundled = AToken.from_pretrained("atoken-nano")
    assert last["validation/held-out/psnr"] > first["validation/held-out/psnr"] > psnr_of(bundled) + 1


def psnr_of(model: AToken) -> float:
    """Of all held-out pictures together, as validation measures them: mean over pictures."""
    values = []
    for path in sorted(Path("pictures/held-out").iterdir()):
        original, copy = np.asarray(Image.open(path), np.float64), np.asarray(model.reconstruct(path), np.float64)
        values.append(10 * np.log10(255**2 / np.mean((original - copy) ** 2)))
    return float(np.mean(values))


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_a_trial_of_the_nano_way_touches_no_other_run() -> None:
    """Runs go on where they stood: a real training would go on from a trial's few steps."""
    make = ["make", "--dry-run", "--no-print-directory", "nano", "NANO_RUNS=trial", "NANO_ARGS=steps=4"]
    said = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "runs/" not in said
    made: list[str] = []
    for line in said.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if "--config" not in words:
            continue
        at = words.index("--config")
        if "train" in words:
            stage = load_config(RunConfig, ROOT / words[at + 1], words[at + 2 :])
            steps, out, sources = stage.steps, stage.out, [stage.start.source, stage.start.gaussians]
        else:
            decoder = load_config(GaussianTrainConfig, ROOT / words[at + 1], words[at + 2 :])
            steps, out, sources = decoder.steps, decoder.out, [decoder.model, decoder.start_from]
        assert steps == 4
        assert all(source is None or str(source).removesuffix("/model") in made for source in sources)
        made.append(str(out))
    assert len(set(made)) == len(made) == 7
