"""The command `atoken`. This module loads nothing heavy: help and usage errors come at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `atoken` with the given arguments, by default those of the process, and exit with its status."""
    from tokenizer.cli.outcome import run

    def command() -> object:
        from typer.main import get_command

        from tokenizer.cli.app import app

        given = sys.argv[1:] if arguments is None else list(arguments)
        return get_command(app).main(args=given or ["--help"], prog_name="atoken", standalone_mode=False)

    sys.exit(run(command))
