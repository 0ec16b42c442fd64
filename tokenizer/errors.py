"""The one error type for mistakes of a user: bad files, bad arguments, bad tensors."""

from __future__ import annotations


class InputError(ValueError):
    """Something given to AToken cannot be used.

    The message is one line that names what is wrong, where (file, key or row) and what to do about it. The command
    line prints it as it is and exits with status 1; nothing half-written stays behind.
    """


def require_package(name: str, purpose: str, extra: str | None = None) -> None:
    """Raise `InputError` unless the package `name` can be imported.

    Args:
        name: import name of the optional package.
        purpose: what it is needed for, as a phrase ("reading videos").
        extra: the extra of this project that installs it; without one it comes with the project itself.
    """
    import importlib.util

    if importlib.util.find_spec(name) is None:
        remedy = f"'.[{extra}]'" if extra else name
        raise InputError(f"{purpose} needs the package '{name}', which is not installed: pip install {remedy}")
