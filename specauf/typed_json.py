"""JSON values held against types: dataclasses, typed dictionaries, and what they are made of."""

import dataclasses
import functools
import json
import sys
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, Union

from specauf.errors import UserError

_hints = functools.cache(typing.get_type_hints)


def typed(kind: Any, value: Any, where: str, remedy: str, later: Collection[str] = ()) -> Any:
    """A JSON value as a type wants it: objects become dataclasses where it names some, lists become tuples.

    Args:
        kind: the type. A dataclass has all of its fields and no others, a `TypedDict` may have more.
        value: as `json.loads` gives it.
        where: file, and the field in it.
        remedy: what to do about a value that does not fit.
        later: fields of dataclasses that early files lack.

    Raises:
        UserError: naming the field by its path, with what was found and expected.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)

    def part(kind: Any, value: Any, name: str) -> Any:
        return typed(kind, value, where + name, remedy, later)

    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        closed = dataclasses.is_dataclass(kind)
        hints, found = _hints(kind), _expect(value, dict, where, remedy)
        required = hints.keys() - later if closed else kind.__required_keys__
        for name in sorted(required - found.keys()):
            raise UserError(f"{where}: field {name} is missing: {remedy}")
        for name in sorted(found.keys() - hints.keys()) if closed else ():
            raise UserError(f"{where}: field {name} is unknown to this version: upgrade specauf")
        return kind(**{name: part(hints[name], v, f": {name}") for name, v in found.items() if name in hints})
    if origin is dict:
        return {k: part(inner[1], v, f"[{k!r}]") for k, v in _expect(value, dict, where, remedy).items()}
    if origin in (tuple, list):
        found = _expect(value, list, where, remedy)
        if origin is tuple and inner[-1] is not ... and len(found) != len(inner):
            raise UserError(f"{where} has {len(found)} values, expected {len(inner)}: {remedy}")
        return origin(part(inner[0], v, f"[{i}]") for i, v in enumerate(found))
    if origin in (Union, types.UnionType):
        return None if value is None else part(inner[0], value, "")
    if origin is Literal:
        if value not in inner:
            raise UserError(f"{where} is {value!r}, expected one of {', '.join(map(repr, inner))}: upgrade specauf")
        return value
    if kind is float:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:  # NaN is not either
            raise UserError(f"{where} is {short(value)}, expected a finite number: {remedy}")
        return float(value)
    return _expect(value, kind, where, remedy)


def _expect(value: Any, kind: type, where: str, remedy: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} is {short(value)}, expected {kind.__name__}: {remedy}")
    return value


def short(value: object) -> str:
    """A value as it stands in a message."""
    text = json.dumps(value, default=str) if isinstance(value, Mapping | list | tuple) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
