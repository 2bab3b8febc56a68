"""Records as lines of JSON: one object with a format, a version, and the fields of a dataclass by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar, TypeVar

from distplb.errors import DistplbError

__all__ = ["VERSION", "JsonRecord"]

VERSION = 1
R = TypeVar("R", bound="JsonRecord")


class JsonRecord:
    """What a dataclass inherits to be written as a line and read again.

    Attributes:
        FORMAT: the name of its format.
        TYPES: types of the fields without a default; the others have the type of their default.
        REFUSAL: what an error says of a line that is no such record, with a place for the reason.
    """

    FORMAT: ClassVar[str]
    TYPES: ClassVar[Mapping[str, type]]
    REFUSAL: ClassVar[str]

    def to_json(self) -> str:
        """One line: an object with `"format"`, `"version": 1` and all fields by name."""
        return "".join(self.json_parts())

    def json_parts(self) -> Iterator[str]:
        """`to_json` in small parts, so that a thread can release the interpreter lock between them."""
        yield f'{{"format": "{self.FORMAT}", "version": {VERSION}'
        for one in fields(self):  # type: ignore[arg-type]  # every class that inherits this is a dataclass
            yield f', "{one.name}": '
            yield from _parts(getattr(self, one.name))
        yield "}"

    @classmethod
    def from_json(cls: type[R], line: str) -> R:
        """Read a line that `to_json` wrote, in this or another version; unknown fields are ignored.

        Raises:
            DistplbError: if the line is not such an object, lacks a field that has no default, or has an unknown
                version number.
        """
        try:
            document = json.loads(line)
            found = (document.pop("format"), document.pop("version"))
            if found != (cls.FORMAT, VERSION):
                raise DistplbError(
                    f"it is {found[0]!r:.40}, version {found[1]!r:.40}; this distplb reads {cls.FORMAT!r}, version "
                    f"{VERSION}"
                )
            return cls(**_known(cls, document))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DistplbError(cls.REFUSAL.format(error)) from error


def _parts(value: Any) -> Iterator[str]:
    """Yield a value as JSON, a table row by row."""
    if not isinstance(value, tuple) or not value or not isinstance(value[0], tuple):
        yield json.dumps(value, allow_nan=False)
        return
    for number, row in enumerate(value):
        yield f"{', ' if number else '['}{json.dumps(row, allow_nan=False)}"
    yield "]"


def _known(cls: type[Any], document: dict[str, Any]) -> dict[str, Any]:
    """The fields that this version has, with their types checked."""
    known = {one.name: one for one in fields(cls)}
    lacking = [name for name, one in known.items() if one.default is MISSING and name not in document]
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    values = {name: _frozen(value) for name, value in document.items() if name in known}
    for name, value in values.items():
        expected = cls.TYPES.get(name, type(known[name].default))
        is_number = expected is float and type(value) is int
        if expected is not type(None) and type(value) is not expected and not is_number:
            raise ValueError(f"{name} is {value!r:.40}")
    return values


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
