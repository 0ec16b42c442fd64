"""The house rules that a machine can check: which room may know which, what an import may load, how long a file is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("tokenizer", "data", "mllm", "generation", "benchmarks")
FILES = [path for room in (*ROOMS, "scripts") for path in sorted((ROOT / room).rglob("*.py"))]

# Rooms of the project that each room may import from; more exact rules for parts of the tokenizer follow.
NEIGHBOURS = {
    "tokenizer": {"tokenizer"},
    "data": {"data", "tokenizer"},
    "mllm": {"mllm", "tokenizer", "data"},
    "generation": {"generation", "tokenizer", "data"},
    "benchmarks": set(ROOMS),
}
DATA_MAY_USE = (
    *("tokenizer.assets", "tokenizer.cameras", "tokenizer.media", "tokenizer.patches", "tokenizer.sparse"),
    *("tokenizer.voxels", "tokenizer.text", "tokenizer.config", "tokenizer.errors", "tokenizer.atomic"),
)
# Turning shards into latents needs the whole tokenizer, as its users call it; a teacher is one of its image networks.
DATA_WITH_MODELS = ("data/latents", "data/making/teach.py", "data/cli")
MODEL_MAY_USE = ("torch", "tokenizer.model", "tokenizer.quantizers", "tokenizer.sparse", "tokenizer.errors")

HEAVY = (
    *(
        "av",
        "decord",
        "deepspeed",
        "diffusers",
        "embreex",
        "flash_attn",
        "gsplat",
        "matplotlib",
        "megatron",
        "scipy",
        "skimage",
        "sklearn",
    ),
    *("torchao", "torchmetrics", "transformer_engine", "transformers", "trimesh", "vllm", "webdataset"),
)


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, at any depth: 'tokenizer.media.images', 'torch'."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            yield node.module or ""


def below(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in allowed)


def test_rooms_know_only_their_neighbours() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in FILES
        if (room := path.relative_to(ROOT).parts[0]) in NEIGHBOURS
        for with_models in [path.relative_to(ROOT).as_posix().startswith(DATA_WITH_MODELS)]
        for name in imports(path)
        if (name.split(".")[0] in ROOMS and name.split(".")[0] not in NEIGHBOURS[room])
        or (room == "data" and name.split(".")[0] == "tokenizer" and not below(name, DATA_MAY_USE) and not with_models)
    ]
    assert not wrong


def test_the_model_knows_torch_alone() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "tokenizer" / "model").rglob("*.py"))
        for name in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names and not below(name, MODEL_MAY_USE)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import tokenizer, tokenizer.cli, data, data.cli", ("torch", *HEAVY)),
        ("import data.loader, data.decode.decoder, data.shards.writer, data.show", HEAVY),
        ("from tokenizer import AToken, SparseTokens, TokenFile; import tokenizer.media", HEAVY),
    ],
)
def test_imports_load_nothing_heavy(statement: str, forbidden: tuple[str, ...]) -> None:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert not set(forbidden) & {name.split(".")[0] for name in loaded.split()}


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): lines for path in FILES if (lines := len(path.read_text().splitlines())) > 400}
    assert not long


def test_nothing_is_left_to_write() -> None:
    unfinished = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.dump(node.exc)
    ]
    assert not unfinished
