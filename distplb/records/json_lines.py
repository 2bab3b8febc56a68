"""Records as lines of JSON: one object with a format, a version, and the fields of a dataclass by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from distplb.errors import DistplbError

__all__ = ["json_parts", "record_from_json"]

VERSION = 1
R = TypeVar("R")


def json_parts(record: Any, kind: str) -> Iterator[str]:
    """A record as JSON in small parts, so that a thread can release the interpreter lock between them."""
    yield f'{{"format": "{kind}", "version": {VERSION}'
    for one in fields(record):
        yield f', "{one.name}": '
        yield from _parts(getattr(record, one.name))
    yield "}"


def record_from_json(cls: type[R], line: str, kind: str, types: Mapping[str, type]) -> R:
    """Read a line that `json_parts` wrote, in this or another version; unknown fields are ignored.

    Args:
        cls: the dataclass.
        line: the line.
        kind: its format.
        types: types of the fields without a default; the others have the type of their default.

    Raises:
        DistplbError: if the line has another format or an unknown version number.
        ValueError: if it is not such an object, or lacks a field that has no default.
    """
    try:
        document = json.loads(line)
        found = (document.pop("format"), document.pop("version"))
        if found != (kind, VERSION):
            raise DistplbError(
                f"it is {found[0]!r:.40}, version {found[1]!r:.40}; this distplb reads {kind!r}, version {VERSION}"
            )
        return cls(**_known(cls, document, types))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def _parts(value: Any) -> Iterator[str]:
    """Yield a value as JSON, a table row by row."""
    if not isinstance(value, tuple) or not value or not isinstance(value[0], tuple):
        yield json.dumps(value, allow_nan=False)
        return
    for number, row in enumerate(value):
        yield f"{', ' if number else '['}{json.dumps(row, allow_nan=False)}"
    yield "]"


def _known(cls: type[Any], document: dict[str, Any], types: Mapping[str, type]) -> dict[str, Any]:
    """The fields that this version has, with their types checked."""
    known = {one.name: one for one in fields(cls)}
    lacking = [name for name, one in known.items() if one.default is MISSING and name not in document]
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    values = {name: _frozen(value) for name, value in document.items() if name in known}
    for name, value in values.items():
        expected = types.get(name, type(known[name].default))
        is_number = expected is float and type(value) is int
        if expected is not type(None) and type(value) is not expected and not is_number:
            raise ValueError(f"{name} is {value!r:.40}")
    return values


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
