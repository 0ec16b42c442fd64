"""How a command ends: errors as one line, exit status, and work on many files of which some are broken.

Exit status: 0 done, 1 something could not be done, 2 wrong usage, 130 interrupted. Results go to stdout; errors,
progress and remarks to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from tokenizer.cli.jobs import Job
from tokenizer.cli.progress import ProgressBars
from tokenizer.errors import InputError

Result = dict[str, Any]

INTERRUPTED = 130  # as shells count it; Typer returns it for Ctrl-C


def run(command: Callable[[], object]) -> int:
    """Call a command and turn whatever it raises into one line on stderr and an exit status."""
    from typer.exceptions import TyperException

    # Remarks of libraries about files (Pillow on odd EXIF blocks) are not part of the output.
    if not debugging():
        warnings.filterwarnings("ignore")
    try:
        status = command()
    except TyperException as error:
        report_line(error.format_message())
        return error.exit_code
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout went away (`atoken ... | head`). Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        report_error(error)
        return 1
    if status == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    return status if isinstance(status, int) else 0


def run_jobs(
    command: str,
    jobs: Sequence[Job],
    work: Callable[[Job, ProgressBars], Result],
    line: Callable[[Result], str],
    *,
    as_json: bool,
) -> int:
    """Work on each job; a broken one is reported and the others are done.

    Args:
        command: its name, for the JSON output.
        work: does one job and returns what to report. "source" and "seconds" are added.
        line: the report of one result for people.
        as_json: print one JSON object at the end instead of a line for each result.

    Returns:
        The exit status.
    """
    results: list[Result] = []
    failures: list[Result] = []
    with ProgressBars(len(jobs)) as progress:
        for job in jobs:
            start = time.perf_counter()
            try:
                result = {"source": str(job.source), **work(job, progress)}
            except Exception as error:
                # A failure of the disk that names no file is one of writing the result.
                failures.append({"source": str(job.source), "error": describe(error, str(job.target))})
                report_error(error, str(job.target))
            else:
                result["seconds"] = round(time.perf_counter() - start, 3)
                results.append(result)
                if not as_json:
                    progress.print(line(result))
            progress.file_done()
    if as_json:
        print(json.dumps({"command": command, "results": results, "failures": failures}, indent=2))
    if failures and len(jobs) > 1:
        names = ", ".join(failure["source"] for failure in failures)
        print(f"{len(results)} of {len(jobs)} done, {len(failures)} failed: {names}", file=sys.stderr)
    return 1 if failures else 0


def describe(error: Exception, file: str = "") -> str:
    """One line for any error; `file` is named where a failure of the system names none itself."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(filter(None, [str(error.filename or file), error.strerror]))
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out of memory; use a smaller picture, a lower --dtype or another --device"
    return f"unexpected {type(error).__name__}: {text} (ATOKEN_DEBUG=1 shows where)"


def report_error(error: Exception, file: str = "") -> None:
    """Print an error: one line, as `describe` makes it, and before it everything when debugging."""
    if debugging():
        traceback.print_exception(error)
    report_line(describe(error, file))


def report_line(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def debugging() -> bool:
    return os.environ.get("ATOKEN_DEBUG", "") not in ("", "0")
