"""Clips of console games played at random, labelled with the game. For training only, never redistributed.

The cartridges come with `ale-py`. Each game is played in a process of its own, for as long as its clips need, so that
later clips show later parts of the game.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data.shards.manifest import Skipped
from data.shards.writer import Record
from data.sources.clips import encode_clip
from data.sources.consoles import GAMES, play_alone
from data.sources.packages import CONSOLES, install_hint
from data.sources.sets import OpenSet, Options, Plan, mixed, record
from tokenizer.errors import InputError

CLIPS = 8
"""Of each game."""
CLIP_FRAMES = 64
RATE = Fraction(30)
"""Frames per second: every second one of the console."""
PER_SHARD = 2


def title(game: str) -> str:
    """The game's name in words: "ms_pacman" -> "ms pacman"."""
    return game.replace("_", " ")


@dataclass(frozen=True, slots=True)
class _Job:
    rom: Path
    seed: int
    clips: int


def _make(job: _Job) -> Iterator[Record | Skipped]:
    game = job.rom.stem
    try:
        frames = play_alone(str(job.rom), job.seed, job.clips * CLIP_FRAMES)
    except InputError as error:
        yield Skipped(job.rom.name, str(error))
        return
    facts = {"label": title(game), "fps": float(RATE), "licence": CONSOLES.licence, "source": CONSOLES.name}
    for number in range(job.clips):
        first = number * CLIP_FRAMES
        clip = encode_clip(frames[first : first + CLIP_FRAMES], RATE)
        yield record(f"{game}-{number:03d}", {"mp4": clip}, title(game), **facts, seed=job.seed, first_frame=first)


def _plan(options: Options) -> Plan:
    SET.require()
    roms = {path.stem: path for path in CONSOLES.files() or [] if path.suffix == ".bin"}
    jobs = [_Job(roms[game], options.seed + number, CLIPS) for number, game in enumerate(GAMES) if game in roms]
    if not jobs:
        raise InputError(f"{CONSOLES.name} is installed without cartridges: {install_hint([CONSOLES])}")
    return Plan({"train": mixed(jobs, options)}, _make, PER_SHARD, [title(game) for game in sorted(GAMES)])


SET = OpenSet(
    name="games",
    kind="videos",
    size="192 clips of 64 frames of 160 x 210, 5 MB",
    licence=f"{CONSOLES.licence}; for training only",
    citation="Bellemare et al.: The Arcade Learning Environment (arXiv:1207.4708)",
    packages=(CONSOLES,),
    captions="captions and labels: the name of the game, 24 games",
    split="all for training",
    plan=_plan,
)
