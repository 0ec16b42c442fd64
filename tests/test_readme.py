"""What the README says to type works: its Python runs, its commands run, its files and links exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tokenizer import AToken
from tokenizer.cli import main
from tokenizer.config import load_config
from tokenizer.demo import ASSET, CLIP, PHOTOGRAPH
from tokenizer.megatron.pretrain import layout_of
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.gaussian_trainer import GaussianTrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
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


def test_modules_and_paths_exist() -> None:
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert importlib.util.find_spec(module) is not None, module
    links = [target for target in re.findall(r"\]\((.*?)\)", README) if not target.startswith("http")]
    configs = re.findall(r"[\w/.-]+\.yaml", README)
    for path in (*links, *configs):
        if path != ".yaml":
            assert (ROOT / path).exists(), path


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


def test_training_commands_are_understood() -> None:
    """They take hours or a cluster: what they say is read, by what would read it."""
    ran = 0
    for line in "".join(blocks("text")).replace("\\\n", " ").splitlines():
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
    assert ran >= 5


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
