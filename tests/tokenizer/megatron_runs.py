"""Workers of the Megatron tests, which need processes of their own, and what they leave in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tokenizer.curriculum_data import ROOT, make_sets


def run_worker(folder: Path, module: str) -> Path:
    """Run `tests.tokenizer.MODULE` on smoke data in the folder."""
    make_sets(folder)
    arguments = [sys.executable, "-m", f"tests.tokenizer.{module}", str(folder)]
    subprocess.run(arguments, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


def found(runs: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """What process `rank` of the run `name` wrote down."""
    values: dict[str, Any] = json.loads((runs / f"{name}-{rank}.json").read_text())
    return values
