"""`scripts/gpu_pass.sh` where there is no GPU: its commands are what the programs take, and nothing holds it up."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenizer.config import load_config
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.gaussian_trainer import GaussianTrainConfig

ROOT = Path(__file__).parent.parent
CONFIGS: dict[str, type[RunConfig] | type[GaussianTrainConfig]] = {
    "tokenizer.training.curriculum": RunConfig,
    "tokenizer.training.gaussian_trainer": GaussianTrainConfig,
}
PROGRAMS = ("tokenizer.parity", "tokenizer.cli", "pytest")

RECORDING = """\
import json, sys, time
if sys.argv[1] == "-c":
    print("Nobody's GPU")
    sys.exit()
with open({commands!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if "benchmarks.assets" in sys.argv:
    time.sleep(600)
if "benchmarks.fp8" in sys.argv:
    sys.exit(3)
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What the pass starts, with a `python3` that only writes it down, hangs at one and fails at another."""
    folder = tmp_path_factory.mktemp("pass")
    record, stand_in = folder / "commands.jsonl", folder / "bin" / "python3"
    stand_in.parent.mkdir()
    (folder / "recording.py").write_text(RECORDING.format(commands=str(record)))
    stand_in.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder / "recording.py"}" "$@"\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}", "STEP_SECONDS": "5"}
    done = subprocess.run(
        ["scripts/gpu_pass.sh", str(folder / "results"), "sets", "100", "assets"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    said = done.stdout.splitlines()
    assert f"   ended after 5 s, see {folder}/results/assets.log" in said
    assert f"   failed, see {folder}/results/fp8.log" in said
    assert sum(line.startswith("   ") for line in said) == 3, "assets, fp8 and fp8-compiled"
    started = [json.loads(line) for line in record.read_text().splitlines()]
    assert len(started) == sum(line.startswith("== ") for line in said)
    assert {command[1] for command in started} > {*CONFIGS, *PROGRAMS}
    outputs = [command[command.index("--out") + 1] for command in started if "--out" in command]
    assert len(outputs) == len(set(outputs))
    return started


def test_training_has_the_settings_it_is_given(commands: list[list[str]]) -> None:
    stages = set()
    for _, program, *arguments in commands:
        if program in CONFIGS:
            assert sorted(arguments[0:4:2]) == ["--config", "--device"]
            path = ROOT / arguments[arguments.index("--config") + 1]
            config: RunConfig | GaussianTrainConfig = load_config(CONFIGS[program], path, arguments[4:])
            stages.add(config.stage.number if isinstance(config, RunConfig) else "gaussians")
    assert stages == {1, 2, 3, 4, "gaussians"}


def test_programs_take_the_options(commands: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """What they say of an option more names that one alone: they know the others."""
    for _, program, *arguments in commands:
        if program in CONFIGS or program == "pytest":
            continue
        home = program if program.startswith("benchmarks.") else f"{program}.__main__"
        main = importlib.import_module("tokenizer.cli" if program == "tokenizer.cli" else home).main
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--no-such-option"])
        assert ended.value.code == 2, program
        assert "--no-such-option" in capsys.readouterr().err
