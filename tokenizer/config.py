"""Typed configurations from YAML, JSON and `key=value`: an unknown key is an error that names the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from tokenizer.errors import InputError

_Config = TypeVar("_Config")

_NOT_VALID = (yaml.YAMLError, ValueError, RecursionError)
"""What the parsers raise for texts that are no YAML or JSON: an impossible date is a plain ValueError."""

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; a key that stands twice in a mapping is refused, where PyYAML takes the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not where values are made: there, what `<<` merges has been put beside a mapping's own keys.
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if (key.tag, key.value) in seen:
                raise InputError(f"the key '{key.value}' stands twice, again in line {key.start_mark.line + 1}")
            seen.add((key.tag, key.value))
        return node


def parse_config(kind: type[_Config], values: Mapping[str, Any], where: str) -> _Config:
    """Build the dataclass `kind` (which may nest others) from a mapping.

    Args:
        where: the file or source, for messages.

    Raises:
        InputError: an unknown key, a truth value in place of a number, or all missing keys and values of the wrong
            type, in one line.
    """
    _refuse_odd(kind, values, where, ())
    try:
        return _adapter(kind).validate_python(dict(values))
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            place = _place(kind, values, problem["loc"])
            if place is not None:
                problems.append(": ".join(filter(None, [place, problem["msg"].removeprefix("Value error, ")])))
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
            node[last] = yaml.load(text, _Loader)
        except InputError as error:
            raise InputError(f"'{override}': {error}") from None
        except _NOT_VALID:
            raise InputError(f"'{override}' is not an override; the value is no YAML, try quotes") from None
    return parse_config(kind, values, str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file whose top level is a mapping.

    Raises:
        InputError: an unreadable file, one that holds something else, or a key that stands twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        values = json.loads(text, object_pairs_hook=_json_object) if is_json else yaml.load(text, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
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


def _json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise InputError(f"the key '{twice}' stands twice in a mapping")
    return values


def _refuse_odd(hint: Any, value: Any, where: str, place: tuple[str, ...]) -> None:
    """Refuse what pydantic takes without a word: keys that a dataclass has not, truth values for numbers, and NUL.

    Args:
        hint: the type that `value` shall have. place: keys that lead to it.
    """
    kinds = _kinds(hint)
    # To Python True is 1; to people who write steps=yes it is a mistake.
    if isinstance(value, bool) and {int, float} & {*kinds} and bool not in kinds:
        name, given = ".".join(place), str(value).lower()
        raise InputError(f"{where}: {name}: must be a number, got {given} (yes, no, on and off are truth values too)")
    if isinstance(value, str) and "\0" in value:
        raise InputError(f"{where}: {'.'.join(place)}: holds the character NUL, which no name of a file may")
    inside: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping):
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                _refuse_unknown(get_type_hints(kind), value, where, place)
        inside = iter(value.items())
    elif isinstance(value, list | tuple):
        inside = iter(enumerate(value))
    for key, part in inside:
        for kind in kinds:
            _refuse_odd(_hint_inside(kind, key), part, where, (*place, str(key)))


def _refuse_unknown(known: Mapping[str, Any], values: Mapping[str, Any], where: str, place: tuple[str, ...]) -> None:
    prefix = "".join(f"{part}." for part in place)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean '{prefix}{near[0]}'?" if near else f"; known keys: {', '.join(known)}"
            raise InputError(f"{where}: unknown key '{prefix}{key}'{hint}")


def _place(hint: Any, value: Any, location: Sequence[int | str]) -> str | None:
    """The dotted name of what pydantic found wrong.

    Of a type such as `str | Sizes` pydantic tells for each member why it is not that one, and has the member's name
    among the keys. The names go, and so do mistakes of a name where sizes were given, and the other way round.

    Args:
        hint: the type that `value` shall have. location: keys that lead to the mistake, as pydantic has them.

    Returns:
        None for a mistake of a member that `value` was not meant as.
    """
    keys, left = [], list(location)
    while left:
        kinds = _kinds(hint)
        key = left.pop(0)
        if len(kinds) > 1:
            hint = next((kind for kind in kinds if getattr(kind, "__name__", None) == key), Any)
            grouped = any(dataclasses.is_dataclass(kind) for kind in kinds)
            if grouped and dataclasses.is_dataclass(hint) != isinstance(value, Mapping):
                return None
            continue
        keys.append(str(key))
        hint = _hint_inside(kinds[0], key)
        try:
            value = value[key]
        except (LookupError, TypeError):  # a key that is missing, or one of pydantic's own
            value = None
    return ".".join(keys)


def _kinds(hint: Any) -> list[Any]:
    """The members of a union without None; a type that is no union alone."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [member for member in members if member is not NoneType]


def _hint_inside(kind: Any, key: int | str) -> Any:
    """The type of what stands under a key or number of a dataclass, mapping or sequence; Any where nothing says it."""
    if dataclasses.is_dataclass(kind):
        return get_type_hints(kind).get(str(key), Any)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is dict:
        return inner[1]
    if origin is tuple and Ellipsis not in inner:
        return inner[key] if isinstance(key, int) and key < len(inner) else Any
    return inner[0] if origin in (tuple, list, Sequence) else Any
