"""How a command ends: errors as one line, exit status, and work on many files of which some are broken.

Exit status: 0 done, 1 something could not be done, 2 wrong usage, 130 interrupted, 143 and 129 ended by SIGTERM and
SIGHUP. Results go to stdout; errors, progress and remarks to stderr.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from tokenizer.cli.jobs import Job
from tokenizer.cli.progress import ProgressBars
from tokenizer.cli.signals import Ended
from tokenizer.errors import InputError

Result = dict[str, Any]

INTERRUPTED = 130  # as shells count it; Typer returns it for Ctrl-C


def run(command: Callable[[], object]) -> int:
    """Call a command and turn whatever it raises into one line on stderr and an exit status."""
    from typer.exceptions import TyperException

    # Remarks of libraries about files (Pillow on odd EXIF blocks) are not part of the output.
    if not debugging():
        warnings.filterwarnings("ignore")
    # File names and tables may hold what the terminal's encoding cannot say. In the locale C Python lets the bytes of
    # names pass, but nothing else.
    if isinstance(sys.stdout, io.TextIOWrapper) and (
        sys.stdout.errors == "strict" or codecs.lookup(sys.stdout.encoding).name != "utf-8"
    ):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = command()
    except TyperException as error:
        message = error.format_message()
        if message.startswith("Usage: "):  # a group without a command: its help
            print(message, file=sys.stderr)
        else:
            report_line(message)
        return error.exit_code
    except Ended as error:
        print(f"ended by {error.signal.name}", file=sys.stderr)
        return 128 + error.signal
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
                failures.append({"source": str(job.source), "error": describe_failure(error, job)})
                report_error(error, failures[-1]["error"])
            else:
                result["seconds"] = round(time.perf_counter() - start, 3)
                results.append(result)
                if not as_json:
                    progress.print(line(result))
            progress.file_done()
    if as_json:
        report = _json_ready({"command": command, "results": results, "failures": failures})
        print(json.dumps(report, indent=2, allow_nan=False))
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


def describe_failure(error: Exception, job: Job) -> str:
    """One line for the failure of a job; it always names a file, and of many the one that failed."""
    # A failure of the disk that names no file is one of writing the result.
    text = describe(error, str(job.target))
    return text if str(job.source) in text or str(job.target) in text else f"{job.source}: {text}"


def report_error(error: Exception, message: str = "") -> None:
    """Print an error: one line, by default as `describe` makes it, and before it everything when debugging."""
    if debugging():
        traceback.print_exception(error)
    report_line(message or describe(error))


def _json_ready(value: Any) -> Any:
    """JSON knows no infinity: the PSNR of an exact copy becomes null."""
    if isinstance(value, dict):
        return {key: _json_ready(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_json_ready(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_line(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def debugging() -> bool:
    return os.environ.get("ATOKEN_DEBUG", "") not in ("", "0")
