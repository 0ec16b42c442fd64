"""Short clips of console games played at random, rendered by the emulator in `ale-py`.

For training only: the frames show copyrighted games and are never redistributed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

GAMES = (
    "asterix", "bank_heist", "battle_zone", "beam_rider", "bowling", "boxing", "centipede", "chopper_command",
    "crazy_climber", "demon_attack", "enduro", "freeway", "frostbite", "hero", "jamesbond", "kung_fu_master",
    "montezuma_revenge", "ms_pacman", "phoenix", "pitfall", "pooyan", "riverraid", "road_runner", "seaquest",
)  # fmt: skip
FRAMES = 32
_WARM_UP = 240
_HOLD = 4


def play(rom: str, seed: int) -> NDArray[np.uint8]:
    """Play one game with random held actions and return uint8 [32, 210, 160, 3] (every second frame).

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
    frames: list[NDArray[np.uint8]] = []
    action = actions[0]
    for step in range(_WARM_UP + 2 * FRAMES):
        if ale.game_over():
            ale.reset_game()
        if step % _HOLD == 0:
            action = actions[int(rng.integers(len(actions)))]
        ale.act(action)
        if step >= _WARM_UP and step % 2 == 0:
            frames.append(np.array(ale.getScreenRGB(), dtype=np.uint8))
    return np.stack(frames)


def play_all(roms: dict[str, Path], seed: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield (game, clip) for every game of `roms`, each played in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        jobs = {game: pool.submit(play, str(path), seed + number) for number, (game, path) in enumerate(roms.items())}
        for game, job in jobs.items():
            yield game, job.result()
