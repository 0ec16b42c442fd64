"""Short clips of console games played at random, rendered by the emulator in `ale-py`.

For training only: the frames show copyrighted games and are never redistributed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenizer.errors import InputError

GAMES = (
    "asterix", "bank_heist", "battle_zone", "beam_rider", "bowling", "boxing", "centipede", "chopper_command",
    "crazy_climber", "demon_attack", "enduro", "freeway", "frostbite", "hero", "jamesbond", "kung_fu_master",
    "montezuma_revenge", "ms_pacman", "phoenix", "pitfall", "pooyan", "riverraid", "road_runner", "seaquest",
)  # fmt: skip
_WARM_UP = 240
_HOLD = 4


def play(rom: str, seed: int, frames: int) -> NDArray[np.uint8]:
    """Play one game with random held actions and return uint8 [frames, 210, 160, 3] (every second one, 30 a second).

    Run it in a process of its own: the emulator keeps state for the whole process.
    """
    from ale_py import ALEInterface, LoggerMode

    ALEInterface.setLoggerMode(LoggerMode.Error)
    ale = ALEInterface()
    ale.setInt("random_seed", seed)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(rom)
    rng = np.random.default_rng(seed)
    actions = ale.getMinimalActionSet()
    shown: list[NDArray[np.uint8]] = []
    action = actions[0]
    for step in range(_WARM_UP + 2 * frames):
        if ale.game_over():
            ale.reset_game()
        if step % _HOLD == 0:
            action = actions[int(rng.integers(len(actions)))]
        ale.act(action)
        if step >= _WARM_UP and step % 2 == 0:
            shown.append(np.array(ale.getScreenRGB(), dtype=np.uint8))
    return np.stack(shown)


def play_alone(rom: str, seed: int, frames: int) -> NDArray[np.uint8]:
    """`play` in a fresh process, also from a process that may have no children of `multiprocessing`.

    Raises:
        InputError: the emulator does not run this cartridge (it ends its process then).
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "frames.npy"
        command = [sys.executable, "-m", __spec__.name, rom, str(seed), str(frames), str(out)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=False)
        if done.returncode != 0 or not out.is_file():
            lines = done.stderr.decode(errors="replace").split("\n")
            reason = next((line for line in reversed(lines) if line.strip()), f"exit status {done.returncode}")
            raise InputError(f"{rom}: the emulator does not run this cartridge ({reason.strip()})")
        played: NDArray[np.uint8] = np.load(out)
    return played


if __name__ == "__main__":
    np.save(sys.argv[4], play(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
