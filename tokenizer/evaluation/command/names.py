"""Names of samples and files: told apart where they repeat, and printable where they are written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def told_apart(names: Iterable[str]) -> list[str]:
    """The same names in the same order; where one repeats, the second has ".2" behind it, the third ".3"."""
    wanted = list(names)
    taken, found = set(wanted), []
    given: set[str] = set()
    for name in wanted:
        unique, count = name, 1
        while unique in given or (unique != name and unique in taken):
            count += 1
            unique = f"{name}.{count}"
        given.add(unique)
        found.append(unique)
    return found


def printable(value: Any) -> Any:
    r"""Text, or what JSON can hold, with each half of a character written out: "caf\udce9.png" for a name in Latin-1.

    Python keeps bytes of file names that are not UTF-8 as lone surrogates, which no file in UTF-8 can hold.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {printable(key): printable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [printable(part) for part in value]
    return value
