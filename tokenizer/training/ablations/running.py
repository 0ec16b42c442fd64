"""Training the runs of a study: each in a process of its own, as `atoken train` does it, unless it is done already.

    OUT/STUDY/RUN.yaml      the whole configuration of a run, ready for `atoken train --config`
    OUT/STUDY/RUN/          what the run writes, and machine.json: where it ran

A run that was killed goes on from its last checkpoint. One whose folder holds a run of other settings is refused.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

from tokenizer.atomic import atomic_path
from tokenizer.checkpoints import WEIGHTS_FILE
from tokenizer.config import config_to_dict
from tokenizer.errors import InputError
from tokenizer.training.curriculum.checkpoint import CHECKPOINTS, newest_good, read_loop
from tokenizer.training.curriculum.config import RunConfig
from tokenizer.training.curriculum.launch import choose_device
from tokenizer.training.curriculum.start import MODEL

MACHINE = "machine.json"
"""File of a run: where it ran; it is written last."""

Command = Callable[[Sequence[str]], int]
"""Calls `atoken` with arguments and gives its exit status."""


def atoken(arguments: Sequence[str]) -> int:
    """`atoken` in a process of its own. A signal to this process lets that one write its checkpoint and end first."""
    process = subprocess.Popen([sys.executable, "-m", "tokenizer.cli", *arguments])

    def pass_on(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        while True:
            # Ctrl-C reaches both; the child decides when it has ended.
            with suppress(KeyboardInterrupt):
                status = process.wait()
                return status if status >= 0 else 128 - status
    finally:
        signal.signal(signal.SIGTERM, before)


def is_finished(config: RunConfig) -> bool:
    """Whether a run has ended.

    Raises:
        InputError: its folder holds a run of other settings.
    """
    folder = Path(config.out)
    newest = newest_good(folder / CHECKPOINTS)
    if newest is None:
        return False
    loop = read_loop(newest)
    then, now = _told(loop["settings"]), _told(config_to_dict(config))
    if changed := sorted(key for key in {*then, *now} if then.get(key) != now.get(key)):
        names = ", ".join(changed)
        raise InputError(f"{folder}: holds a run of other settings ({names}); remove it, or name another --out")
    ended = int(loop["progress"]["step"]) == config.steps
    return ended and (folder / MODEL / WEIGHTS_FILE).is_file() and (folder / MACHINE).is_file()


def train_run(config: RunConfig, device: str, command: Command = atoken) -> int:
    """Train a run to its end, from where it stands.

    Args:
        device: as for `atoken train`.

    Returns:
        The exit status of `atoken train`.
    """
    folder = Path(config.out)
    settings = folder.with_name(f"{folder.name}.yaml")
    with atomic_path(settings) as path:
        path.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False, width=120), encoding="utf-8")
    status = command(["train", "--config", str(settings), "--device", device])
    if status == 0:
        with atomic_path(folder / MACHINE) as path:
            path.write_text(json.dumps(describe_machine(device)), encoding="utf-8")
    return status


def describe_machine(device: str) -> dict[str, Any]:
    """Processor or GPU, threads and versions."""
    chosen = choose_device(device)
    cuda = chosen.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(chosen) if cuda else _processor(),
        "threads": None if cuda else torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _told(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without paths that the run itself has been given: a folder has many names."""
    start = {key: value for key, value in settings["start"].items() if key != "source"}
    return {**{key: value for key, value in settings.items() if key != "out"}, "start": start}


def _processor() -> str:
    names: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
