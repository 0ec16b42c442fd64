"""The processes of a run find each other before anything is read, and say only once what is wrong.

torchrun and Slurm start a process for every GPU, and an error in settings or data is one in all of them. So they meet
at a store first, torchrun's or one of the first process, and count there what they have to say:

    wrong settings, data or weights    said by the process that comes upon it first, by no other in the same words
    anything else                      said where nothing has gone wrong before: connections that are lost when a
                                       process has ended with an error are no news

No process waits for another to say it, so an error of one alone ends the run as soon as its launcher sees that it has
gone. Every process exits with status 1.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tokenizer.errors import InputError

PATIENCE = timedelta(minutes=30)
"""How long processes wait for each other: the first of them writes and checks checkpoints alone."""

LINGER = 10.0
"""Seconds for which the process that keeps the store waits for the others to come and say what is wrong."""

_ERRORS = "errors"


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where this process met the others.

    store: what they share. rank, world: of this process, and how many there are. keeper: whether the store ends with
    this process.
    """

    store: dist.Store  # type: ignore[name-defined]
    rank: int
    world: int
    keeper: bool

    def is_news(self, error: Exception) -> bool:
        """Count an error; whether this process is the one to say it."""
        try:
            first = bool(self.store.add(_ERRORS, 1) == 1)
            return bool(self.store.add(f"error: {error}", 1) == 1) if isinstance(error, InputError) else first
        except (RuntimeError, OSError):  # the store has gone with its keeper, who had something to say
            return False

    def linger(self) -> None:
        """Keep the store until the others have counted their errors too."""
        given_up = time.monotonic() + LINGER
        while self.keeper and self.store.add(_ERRORS, 0) < self.world and time.monotonic() < given_up:
            time.sleep(0.05)


@contextmanager
def one_voice() -> Iterator[Meeting | None]:
    """Meet the other processes that were started for this run; None where this one is alone.

    Where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, as torchrun does, there are others.

    Raises:
        SystemExit: with status 1, in place of an error that another process says.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield None
        return
    store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))  # type: ignore[attr-defined]
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.PrefixStore("meeting", store)  # type: ignore[attr-defined]
    meeting = Meeting(store, rank, world, keeper=rank == 0 and not of_launcher)
    try:
        yield meeting
    except Exception as error:
        news = meeting.is_news(error)
        meeting.linger()
        if not news:
            raise SystemExit(1) from None
        if not _is_lost_connection(error):
            raise
        raise InputError("lost another process of this run, which may have been killed; start the run again") from error


@contextmanager
def process_group(meeting: Meeting | None, device: torch.device, *, also_alone: bool = False) -> Iterator[None]:
    """Inside, `torch.distributed` connects the processes that have met.

    Args:
        also_alone: make a group of a process that is alone, too.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if meeting is not None:
        store: Any = dist.PrefixStore("group", meeting.store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=meeting.rank, world_size=meeting.world, timeout=PATIENCE)
    elif also_alone and not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    else:
        yield
        return
    done = False
    try:
        yield
        done = True
    finally:
        # After an error in one of several, NCCL would wait here for others, which do something else.
        if done or meeting is None:
            dist.destroy_process_group()


def _is_lost_connection(error: Exception) -> bool:
    """NCCL's errors have a class, gloo's a path in their text."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
