"""Typed configurations from YAML, JSON and `key=value`: an unknown key is an error that names the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from tokenizer.errors import InputError

_Config = TypeVar("_Config")

_NOT_VALID = (yaml.YAMLError, ValueError, RecursionError)
"""What the parsers raise for texts that are no YAML or JSON: an impossible date is a plain ValueError."""


def parse_config(kind: type[_Config], values: Mapping[str, Any], where: str) -> _Config:
    """Build the dataclass `kind` (which may nest others) from a mapping.

    Args:
        where: the file or source, for messages.

    Raises:
        InputError: an unknown key, or all missing keys and values of the wrong type, in one line.
    """
    _refuse_unknown(kind, values, where, "")
    try:
        return _adapter(kind).validate_python(dict(values))
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise InputError(f"{where}: {'; '.join(problems)}") from None


def load_config(kind: type[_Config], path: Path, overrides: Sequence[str] = ()) -> _Config:
    """Read a YAML or JSON file into the dataclass `kind`, then apply `key.sub=value` overrides.

    Raises:
        InputError: an unreadable file, an override without "=", or anything `parse_config` refuses.
    """
    values = read_mapping(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"'{override}' is not an override; write key=value, for example steps=100")
        node = values
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InputError(f"{override}: '{parent}' is a value, not a group of settings")
        try:
            node[last] = yaml.safe_load(text)
        except _NOT_VALID:
            raise InputError(f"'{override}' is not an override; the value is no YAML, try quotes") from None
    return parse_config(kind, values, str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file whose top level is a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    except _NOT_VALID as error:
        raise InputError(f"{path}: not valid: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold key: value pairs at the top level")
    return values


def config_to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values; `parse_config` reads it back."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain


def changed_settings(config: Any, then: Mapping[str, Any]) -> list[str]:
    """Dotted names of settings that are not what they were, sorted.

    Args:
        config: a dataclass. then: what `config_to_dict` gave of an earlier one; settings that there were none of yet
            count as having been what they are by default.
    """
    now = config_to_dict(config)
    with suppress(InputError):  # settings that are no more stay as they stand, and count as changed
        then = config_to_dict(parse_config(type(config), then, "then"))
    return sorted(_differences(then, now, ""))


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key in {*then, *now}:
        before, after = then.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}"


def _adapter(kind: type[_Config]) -> TypeAdapter[_Config]:
    # Strict enough that "yes" is no number, lax enough that YAML's 1e-4 (a string to YAML 1.1) is one.
    return TypeAdapter(kind)


def _refuse_unknown(kind: type[Any], values: Mapping[str, Any], where: str, prefix: str) -> None:
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"; did you mean '{prefix}{near[0]}'?" if near else f"; known keys: {', '.join(hints)}"
            raise InputError(f"{where}: unknown key '{prefix}{key}'{hint}")
        nested = [part for part in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(part)]
        if nested and isinstance(value, Mapping):
            _refuse_unknown(nested[0], value, where, f"{prefix}{key}.")  # type: ignore[arg-type]
