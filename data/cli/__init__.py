"""What the data room adds to the command `atoken`: shard, data and tokenize (entry point "atoken.commands")."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this room."""
    from data.cli.app import data, shard, tokenize

    app.add_typer(shard, name="shard")
    app.add_typer(data, name="data")
    app.command()(tokenize)
