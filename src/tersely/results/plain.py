"""Facts (nested frozen dataclasses) <-> JSON. An infinite number is written as null."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from tersely.errors import DataError

T = TypeVar("T")


def to_plain(fact: Any) -> Any:
    """Dataclasses, tuples and mappings as plain dicts and lists."""
    if dataclasses.is_dataclass(fact) and not isinstance(fact, type):
        return {f.name: to_plain(getattr(fact, f.name)) for f in dataclasses.fields(fact)}
    if isinstance(fact, Mapping):
        return {str(key): to_plain(value) for key, value in fact.items()}
    if isinstance(fact, list | tuple):
        return [to_plain(value) for value in fact]
    if isinstance(fact, float) and math.isinf(fact):
        return None
    return fact


def to_json(fact: Any) -> str:
    """Readable JSON of `to_plain`. Raises ValueError: a NaN."""
    return json.dumps(to_plain(fact), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(kind: type[T], text: str) -> T:
    """The inverse of `to_json`. Raises DataError: not the JSON of such a fact."""
    try:
        made = _read(kind, json.loads(text), "")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"not the JSON of a {kind.__name__} ({error})") from error
    assert isinstance(made, kind)
    return made


class Measurement:
    """A result that is kept, exported and read again as JSON."""

    def to_json(self) -> str:
        """As JSON; an infinite number is written as null."""
        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises DataError: not the JSON of such a result."""
        return from_json(cls, text)


_hints = lru_cache(get_type_hints)


def _read(kind: Any, plain: Any, name: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if plain is None and type(None) in inner:
            return None
        return _read(next(each for each in inner if each is not type(None)), plain, name)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(plain, dict):
            raise TypeError(f"{name or kind.__name__}: expected an object")
        hints = _hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        if unknown := plain.keys() - known:
            raise KeyError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
        return kind(**{field: _read(hints[field], value, field) for field, value in plain.items()})
    if origin is tuple:
        kinds = [inner[0]] * len(plain) if inner[1:] == (...,) else inner
        return tuple(_read(each, value, name) for each, value in zip(kinds, plain, strict=True))
    if origin is dict or origin is Mapping:
        return {key: _read(inner[1], value, name) for key, value in plain.items()}
    if origin is Literal:
        if plain not in inner:
            raise ValueError(f"{name}: {plain!r} is none of {inner}")
        return plain
    if kind is float:
        return (-math.inf if name == "low" else math.inf) if plain is None else float(plain)
    if kind in (int, str, bool) and type(plain) is not kind:
        raise TypeError(f"{name}: expected {kind.__name__}, found {plain!r}")
    return plain
