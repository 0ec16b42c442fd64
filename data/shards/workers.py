"""Processes that work through numbered tasks; one that dies is told at once, with the task it died on.

`concurrent.futures` tells neither which task broke a pool nor lets workers tidy up when the run is interrupted. Workers
are forked from a fresh process, not from this one: a fork of a process that has used torch may hang.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, TypeVar

import torch

from tokenizer.errors import InputError

Result = TypeVar("Result")

_PATIENCE = 10.0
"""Seconds that a worker has to tidy up when the run is interrupted."""


def run(
    task: Callable[[int], Result], numbers: Sequence[int], workers: int, name: Callable[[int], str]
) -> Iterator[tuple[int, Result]]:
    """Call `task` with each number and give its results as they come.

    Args:
        task: travels to the processes with pickle, unless there is one worker. Torch uses one thread in it.
        numbers: the tasks, begun in this order.
        workers: processes; 1 works in this one.
        name: what a task is called in errors.

    Yields:
        Number and result of a task.

    Raises:
        InputError: a worker died.
        Exception: whatever a task raised; the other workers are ended.
    """
    if workers == 1 or len(numbers) == 1:
        with _one_thread():
            for number in numbers:
                yield number, task(number)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    waiting = iter(numbers)
    processes: dict[Connection, ForkServerProcess] = {}
    busy: dict[Connection, int] = {}
    try:
        for number in itertools.islice(waiting, workers):
            connection, process = _start(context, task)
            processes[connection] = process
            busy[connection] = _give(connection, number)
        while busy:
            for connection in (ready for ready in wait(list(busy)) if isinstance(ready, Connection)):
                number = busy.pop(connection)
                yield number, _answer(connection, processes[connection], name(number))
                if (following := next(waiting, None)) is not None:
                    busy[connection] = _give(connection, following)
    finally:
        _end(processes)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Results must not depend on the number of workers, and sums in torch depend on its threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _start(context: ForkServerContext, task: Callable[[int], object]) -> tuple[Connection, ForkServerProcess]:
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(task, there), daemon=True)
    process.start()
    there.close()  # so that the end of the worker is the end of the connection
    return here, process


def _give(connection: Connection, number: int) -> int:
    with contextlib.suppress(BrokenPipeError):  # a dead worker shows when its answer is awaited
        connection.send(number)
    return number


def _answer(connection: Connection, process: ForkServerProcess, name: str) -> Any:
    try:
        answer, error = connection.recv()
    except (EOFError, OSError):
        process.join(_PATIENCE)
        code = process.exitcode
        how = f"killed by signal {-code}, perhaps for want of memory" if code and code < 0 else f"exit status {code}"
        raise InputError(
            f"{name}: the worker that made it died ({how}); what is finished stays: run the command again, "
            "with fewer workers where memory is short"
        ) from None
    if error is not None:
        raise error
    return answer


def _end(processes: dict[Connection, ForkServerProcess]) -> None:
    """End all workers; those at work get time to remove what is half-written."""
    for process in processes.values():
        process.terminate()
    for connection, process in processes.items():
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
        connection.close()


def _work(task: Callable[[int], object], connection: Connection) -> None:
    """The life of a worker: a number comes in, (result, None) or (None, error) goes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process ends the others
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that temporary files are removed
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            number = connection.recv()
            try:
                answer: tuple[object, Exception | None] = task(number), None
            except Exception as error:
                answer = None, _travelling(error)
            connection.send(answer)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _travelling(error: Exception) -> Exception:
    """The error in a form that pickle takes, with where it came from as a note."""
    error.add_note("in a worker:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
