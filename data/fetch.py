"""Chunks read ahead by worker processes: in order, in bounded memory, without a hang.

Each lane of a source belongs to one worker, which reads its tars from front to back. Outcomes come back one at a time,
so it is known at which sample a worker stands. One that dies (most often killed by the system for lack of memory) or
does not answer is replaced by a new one, which goes on at that sample; a sample at which a worker died twice is left
out as a fault. Too many deaths end the run with one line.

Without workers everything happens in the calling process, when it is asked for.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Protocol

from data.samples import Fault
from data.stream import Chunk
from data.window import Job, Outcome, SourceReader, fault_of
from data.wire import Buffer, pickled, receive, send
from tokenizer.errors import InputError

STARTS_OF_A_SAMPLE = 2
"""Workers that may die at one sample before it is left out."""

CLOSED = "the loader is closed"

MAX_SENT = 8
"""Chunks that a worker knows of; the rest waits on our side."""


class Fetcher(Protocol):
    """Reads chunks; outcomes of a source come in the order in which its chunks were submitted."""

    def submit(self, chunk: Chunk, skip: int = 0) -> None:
        """Have a chunk read, but for its first `skip` samples."""

    def next(self, source: str) -> Outcome:
        """The next outcome of a source; waits for it. Only for chunks that were submitted.

        Raises:
            InputError: closed, also by another thread in the meantime, or workers that die.
        """

    def close(self) -> None:
        """Stop reading, for good."""


class InProcess:
    """Reads when asked."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self._readers = {name: SourceReader(job) for name, job in jobs.items()}
        self._chunks: dict[str, deque[tuple[Chunk, int]]] = {name: deque() for name in jobs}
        self._running: dict[str, Iterator[Outcome]] = {name: iter(()) for name in jobs}
        self._closed = False

    def submit(self, chunk: Chunk, skip: int = 0) -> None:
        self._chunks[chunk.source].append((chunk, skip))

    def next(self, source: str) -> Outcome:
        while not self._closed:
            for outcome in self._running[source]:
                return outcome
            chunk, skip = self._chunks[source].popleft()
            self._running[source] = self._readers[source].outcomes(chunk, skip)
        raise InputError(CLOSED)

    def close(self) -> None:
        self._closed = True
        for reader in self._readers.values():
            reader.close()


@dataclass(slots=True, eq=False)
class _Task:
    """A chunk on its way. done: places of it that have an outcome. deaths: of workers, at the place now at work."""

    chunk: Chunk
    done: int
    outcomes: deque[Outcome] = field(default_factory=deque)
    deaths: int = 0

    @property
    def complete(self) -> bool:
        return self.done == self.chunk.size


@dataclass(slots=True, eq=False)
class _Worker:
    """A process and what it is to do, the first task being at work. heard: when it last gave a sign of life."""

    number: int
    process: BaseProcess
    connection: Connection
    tasks: deque[_Task] = field(default_factory=deque)
    sent: int = 0
    heard: float = 0.0
    accused: str = ""


class Workers:
    """Reads in `count` processes.

    Args:
        jobs: what to do for each source.
        count: processes, at least 1.
        timeout: seconds without an outcome after which a worker that has work is taken for dead.
        max_deaths: how many workers may die among 1,000 outcomes.
    """

    def __init__(self, jobs: Mapping[str, Job], count: int, *, timeout: float = 300.0, max_deaths: int = 8) -> None:
        if count < 1:
            raise InputError(f"workers must be at least 1 here, got {count}")
        # A fork of this process could inherit a lock that another of its threads holds; a server forks clean ones.
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["data.window"])
        self._jobs, self._timeout, self._max_deaths = dict(jobs), timeout, max_deaths
        # Lanes of all sources in one row, so that no worker has two as long as another has none.
        ends = itertools.accumulate(job.reading.lanes for job in self._jobs.values())
        self._first_lanes = {name: end - self._jobs[name].reading.lanes for name, end in zip(jobs, ends, strict=True)}
        self._queues: dict[str, deque[_Task]] = {name: deque() for name in jobs}
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._failure: InputError | None = None
        self._deaths = self._outcomes_since = 0
        self._workers = [self._start(number) for number in range(count)]
        # Workers do not heed the signal by which multiprocessing ends its children at exit, and are ended before it.
        Finalize(self, _end, (self._workers, self._closed), exitpriority=10)
        self._listener = threading.Thread(target=self._listen, name="data listener", daemon=True)
        self._listener.start()

    def submit(self, chunk: Chunk, skip: int = 0) -> None:
        task = _Task(chunk, skip)
        with self._changed:
            if self._closed.is_set():
                raise InputError(CLOSED)
            worker = self._workers[(self._first_lanes[chunk.source] + chunk.lane) % len(self._workers)]
            self._queues[chunk.source].append(task)
            if not worker.tasks:
                worker.heard = time.monotonic()
            worker.tasks.append(task)
            self._feed(worker)

    def next(self, source: str) -> Outcome:
        queue = self._queues[source]
        with self._changed:
            while not (self._closed.is_set() or self._failure or queue[0].outcomes):
                self._changed.wait(1.0)
                self._accuse_the_silent()
            if self._closed.is_set():
                raise InputError(CLOSED)
            if self._failure:
                raise self._failure
            task = queue[0]
            outcome = task.outcomes.popleft()
            if task.complete and not task.outcomes:
                queue.popleft()
        return outcome

    def close(self) -> None:
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
        self._listener.join()
        with self._changed:  # another thread may be about to send
            for worker in self._workers:
                worker.connection.close()

    # ------------------------------------------------------------------ the thread that listens

    def _listen(self) -> None:
        while not self._closed.is_set() and self._failure is None:
            by_connection = {worker.connection: worker for worker in self._workers}
            for ready in wait(list(by_connection), timeout=0.5):
                worker = by_connection[ready]  # type: ignore[index]
                try:
                    outcome = receive(worker.connection)
                except (EOFError, OSError):
                    self._replace(worker)
                except Exception as error:  # without this thread nothing would ever come
                    self._fail(f"a data worker sent what cannot be read: {type(error).__name__}: {error}")
                    return
                else:
                    self._add(worker, outcome)

    def _fail(self, why: str) -> None:
        with self._changed:
            self._failure = InputError(why)
            self._changed.notify_all()

    def _add(self, worker: _Worker, outcome: Outcome) -> None:
        with self._changed:
            self._outcomes_since += 1
            if self._outcomes_since >= 1000:
                self._deaths = self._outcomes_since = 0
            worker.heard = time.monotonic()
            if self._finish_place(worker, outcome):
                worker.sent -= 1
            self._feed(worker)
            self._changed.notify_all()

    def _finish_place(self, worker: _Worker, outcome: Outcome) -> bool:
        """Give the place at work its outcome; true if that was the last of its chunk."""
        task = worker.tasks[0]
        task.outcomes.append(outcome)
        task.done += 1
        task.deaths = 0
        if task.complete:
            worker.tasks.popleft()
        return task.complete

    def _feed(self, worker: _Worker) -> None:
        """Send tasks, but never so many that writing to the pipe could wait for a worker that waits for us."""
        tasks = list(worker.tasks)
        while worker.sent < min(len(tasks), MAX_SENT):
            task = tasks[worker.sent]
            try:
                worker.connection.send((task.chunk, task.done))
            except OSError:  # it died; the listener finds out and sends everything again
                return
            worker.sent += 1

    def _replace(self, dead: _Worker) -> None:
        """A new worker for a dead one, which goes on where that stood."""
        dead.process.join()
        with self._changed:
            if self._closed.is_set():
                return
            reason = dead.accused or _reason(dead.process.exitcode)
            self._deaths += 1
            if self._deaths > self._max_deaths:
                self._fail(
                    f"data workers died {self._deaths} times, the last one {reason}: "
                    "give the run fewer workers or smaller windows, or look at the quarantine file"
                )
                return
            fresh = self._start(dead.number)
            fresh.tasks = dead.tasks
            self._workers[dead.number] = fresh
            if fresh.tasks:
                self._blame(fresh, reason, certain=bool(dead.accused))
            self._feed(fresh)
            self._changed.notify_all()
        dead.connection.close()

    def _blame(self, worker: _Worker, reason: str, *, certain: bool) -> None:
        """Leave the sample out at which workers died before."""
        task = worker.tasks[0]
        task.deaths += 1
        if not certain and task.deaths < STARTS_OF_A_SAMPLE:
            return
        chunk, job = task.chunk, self._jobs[task.chunk.source]
        url, index = job.shards[chunk.shard].url, job.index_of(chunk, task.done)
        detail = f"{url}: sample {index}: the worker that read it {reason}"
        self._finish_place(worker, Fault("lost worker", url, index, detail))

    # ------------------------------------------------------------------ processes

    def _start(self, number: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=work, args=(theirs, self._jobs), name=f"data worker {number}", daemon=True
        )
        process.start()
        theirs.close()  # so that its end of the pipe closes when it dies
        return _Worker(number, process, ours, heard=time.monotonic())

    def _accuse_the_silent(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            if worker.tasks and now - worker.heard > self._timeout and not worker.accused:
                worker.accused = f"gave no answer for {self._timeout:g} s"
                worker.process.kill()


def _end(workers: Sequence[_Worker], closed: threading.Event) -> None:
    closed.set()
    for worker in workers:
        worker.process.kill()


def work(connection: Connection, jobs: Mapping[str, Job]) -> None:
    """What a worker process does until the other side closes."""
    import torch

    for number in (signal.SIGINT, signal.SIGTERM):  # for the process that asks, which saves before it closes the pipe
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    readers = {name: SourceReader(job) for name, job in jobs.items()}
    try:
        while True:
            chunk, skip = connection.recv()
            for place, outcome in enumerate(readers[chunk.source].outcomes(chunk, skip), start=skip):
                send(connection, _messages(outcome, jobs[chunk.source], chunk, place))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the process that asked is gone; nothing of ours is worth tidying up


def _messages(outcome: Outcome, job: Job, chunk: Chunk, place: int) -> Sequence[Buffer]:
    """An outcome, ready to be sent; a fault in its place where it cannot travel."""
    try:
        return pickled(outcome)
    except Exception as error:
        url, index = job.shards[chunk.shard].url, job.index_of(chunk, place)
        return pickled(fault_of(error, url, index, f"{url}: sample {index} cannot be sent"))


def _reason(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = ", as the system does for lack of memory" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"ended with status {exitcode}"
