"""Strict reading of JSON into dataclasses, with errors that name the key."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class SchemaError(Exception):
    """A value does not have the declared type; the message names the key, the expected and the found."""


def parse_json(text: str) -> Any:
    """Parse JSON as RFC 8259 has it and as the native library does.

    Raises:
        ValueError: bad syntax, NaN or infinity, a number beyond 64 bits, a name that stands twice in an object, or half
            of a surrogate pair.
    """
    value = json.loads(
        text, object_pairs_hook=_members, parse_constant=_no_number, parse_int=_integer, parse_float=_number
    )
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # takes no half of a surrogate pair
    return value


def from_json(cls: type[T], value: Any, where: str = "") -> T:
    """Build a dataclass from parsed JSON. Keys without a default are required, unknown keys are refused.

    Args:
        cls: a dataclass of str, int, float, bool, None, tuple[X, ...], dict[str, X], dataclasses and unions of these.
        value: the parsed JSON.
        where: key path of `value`, for messages.

    Raises:
        SchemaError: the value does not fit.
    """
    if not isinstance(value, dict):
        raise _mismatch(where, "an object", value)
    hints = _hints(cls)  # type: ignore[arg-type]  # mypy takes no type[T] for hashable
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            raise SchemaError(f"{_join(where, key)}: unknown key; expected one of {', '.join(fields)}")
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _convert(hints[name], value[name], _join(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SchemaError(f"{_join(where, name)}: missing")
    return cls(**arguments)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)  # evaluates every annotation anew


def to_json(value: Any) -> Any:
    """The inverse of `from_json`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the name {next(name for name in names if names.count(name) > 1)!r} stands twice in an object"
        )
    return members


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _integer(text: str) -> int:
    number = int(text)
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"the number {_shortened(text)} does not fit into 64 bits")
    return number


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {_shortened(text)} does not fit into 64 bits")
    return number


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        concrete = [option for option in options if option is not type(None)]
        if len(concrete) == 1:
            return _convert(concrete[0], value, where)
        for option in concrete:
            if type(value) is option:
                return value
        raise _mismatch(where, " or ".join(option.__name__ for option in concrete), value)
    if origin is tuple:
        if not isinstance(value, list):
            raise _mismatch(where, "a list", value)
        item_type = get_args(hint)[0]
        return tuple(_convert(item_type, item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _mismatch(where, "an object", value)
        item_type = get_args(hint)[1]
        return {key: _convert(item_type, item, _join(where, key)) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise _mismatch(where, hint.__name__, value)
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _mismatch(where: str, expected: str, value: Any) -> SchemaError:
    return SchemaError(f"{where or 'top level'}: expected {expected}, found {_shortened(repr(value))}")


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
