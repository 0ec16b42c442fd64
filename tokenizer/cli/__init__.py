"""The command `atoken`. This module loads nothing heavy: help and usage errors come at once.

Other rooms add commands of their own through the entry point group "atoken.commands": functions that are given the
application. So the tokenizer knows none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `atoken` with the given arguments, by default those of the process, and exit with its status."""
    try:
        status = _run(arguments)
    except KeyboardInterrupt:  # while the little that `run` needs was imported
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def _run(arguments: Sequence[str] | None) -> int:
    from tokenizer.cli.outcome import run
    from tokenizer.cli.signals import signals_raise
    from tokenizer.errors import InputError

    def command() -> object:
        from importlib.metadata import entry_points

        from typer.main import get_command

        from tokenizer.cli.app import app

        for entry in entry_points(group="atoken.commands"):
            entry.load()(app)
        given = sys.argv[1:] if arguments is None else list(arguments)
        if "" in given:  # as a path it would be the current folder
            after = f" after {given[given.index('') - 1]}" if given[0] else ""
            raise InputError(f"an argument{after} is empty; is a variable of the shell not set?")
        return get_command(app).main(args=given or ["--help"], prog_name="atoken", standalone_mode=False)

    with signals_raise():
        return run(command)
