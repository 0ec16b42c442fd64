"""The command `atoken`. This module loads nothing heavy: help and usage errors come at once.

Other rooms add commands of their own through the entry point group "atoken.commands": functions that are given the
application. So the tokenizer knows none of them.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `atoken` with the given arguments, by default those of the process, and exit with its status."""
    from tokenizer.cli.outcome import run

    def command() -> object:
        from typer.main import get_command

        from tokenizer.cli.app import app

        for entry in importlib.metadata.entry_points(group="atoken.commands"):
            entry.load()(app)
        given = sys.argv[1:] if arguments is None else list(arguments)
        return get_command(app).main(args=given or ["--help"], prog_name="atoken", standalone_mode=False)

    sys.exit(run(command))
