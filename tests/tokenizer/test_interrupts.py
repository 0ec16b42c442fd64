"""Signals end a command in one line, with the status that shells expect and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tokenizer.test_cli import Atoken, atoken, files_below, write_video  # noqa: F401  (a fixture)
from tokenizer.cli import main

Pixels = NDArray[np.uint8]

TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""Where a test runner in the background ignores Ctrl-C, its children would too."""

STAYS = """
import time
from tokenizer.cli import main
from tokenizer.tokenfile import TokenWriter
append = TokenWriter.append
def append_and_stay(self, tokens):
    append(self, tokens)
    time.sleep(120)
TokenWriter.append = append_and_stay
main()
"""
"""`atoken` that does not get beyond the first tokens it writes, so that a signal meets it there on any machine."""


def start(program: str, folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TERMINAL + textwrap.dedent(program), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("number", "times", "status", "line"),
    [
        (signal.SIGTERM, 2, 143, "ended by SIGTERM\n"),  # supervisors send several
        (signal.SIGHUP, 2, 129, "ended by SIGHUP\n"),
        (signal.SIGINT, 1, 130, "interrupted\n"),
    ],
)
def test_nothing_half_written_stays(
    clip: Pixels, tiny_models: Path, tmp_path: Path, number: signal.Signals, times: int, status: int, line: str
) -> None:
    write_video(tmp_path / "long.mp4", np.concatenate([clip] * 60))
    arguments = ("encode", "long.mp4", "--out", "out/long.atok", "--model", str(tiny_models / "atoken-nano"))
    process = start(STAYS, tmp_path, *arguments)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/.*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # until the first tokens are being written
    for _ in range(times):
        process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (status, "", line)
    assert files_below(tmp_path) == ["long.mp4"]


@pytest.mark.parametrize(
    "module", ["tokenizer.cli.outcome", "tokenizer.cli.signals", "typer.main", "tokenizer.cli.app"]
)
def test_ctrl_c_while_the_command_is_imported(tmp_path: Path, module: str) -> None:
    """The interrupt comes at the very import, as it does for whoever types fast."""
    program = f"""
    import sys
    class Interrupting:
        def find_spec(self, name, path=None, target=None):
            if name == {module!r}:
                signal.raise_signal(signal.SIGINT)
    sys.meta_path.insert(0, Interrupting())
    from tokenizer.cli import main
    main(["models"])
    """
    process = start(program, tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


RUN = """
import os, sys
from tokenizer.cli import outcome
def command():
    {body}
outcome_run = outcome.run
outcome.run = lambda _: outcome_run(command)
from tokenizer.cli import main
main(["models"])
"""


def test_handlers_of_others_stay(tmp_path: Path) -> None:
    """`nohup` ignores SIGHUP, and a command that was started so goes on."""
    program = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + RUN.format(
        body="os.kill(os.getpid(), signal.SIGHUP); print('goes on')"
    )
    process = start(program, tmp_path)
    assert process.communicate(timeout=120) == ("goes on\n", "")
    assert process.returncode == 0


def test_forked_children_die_as_ever(tmp_path: Path) -> None:
    body = """
    child = os.fork()
    if child == 0:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            print("cleaned up what is the parent's", flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    process = start(RUN.format(body=textwrap.indent(textwrap.dedent(body), " " * 4).strip()), tmp_path)
    assert process.communicate(timeout=120) == (f"{-signal.SIGTERM}\n", "")


def test_training_has_the_signals_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def launch(*_: object) -> int:
        seen.extend(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP))
        return 0

    monkeypatch.setattr("tokenizer.training.curriculum.launch.launch", launch)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(tmp_path / "x.yaml")])
    assert stop.value.code == 0
    assert seen == before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize("group", ["data", "shard"])
def test_a_group_without_a_command_prints_its_help(atoken: Atoken, group: str) -> None:  # noqa: F811
    outcome, asked = atoken(group), atoken(group, "--help")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.strip() == asked.out.strip()
    assert outcome.err.count("\n") > 5
