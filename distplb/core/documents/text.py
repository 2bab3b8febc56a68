"""Untrusted text, JSON and YAML: duplicate keys and aliases are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from distplb.errors import DistplbError

__all__ = ["parse_json", "read_json", "read_text", "read_yaml"]

_GROWTH = 32  # bytes in memory, at most, for each byte of text with numbers
_YAML_GROWTH = 256  # PyYAML makes a node and two marks for each number
_MOST_YAML = 1 << 24  # bytes
_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")  # YAML 1.1 also reads 010 as 8 and 1:30 as 90

# First bytes of files that are not text.
_BINARY = {
    b"PK\x03\x04": "a zip archive, such as an Excel workbook or a .npz: export it as CSV, or rename it with its suffix",
    b"\x93NUMPY": "a NumPy array: rename it to .npy",
    b"\x80": "a pickle, which can run code and is not read: save the numbers as .npy or JSON",
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"\x89HDF": "HDF5: save the numbers as .npy",
    b"PAR1": "Parquet: save the numbers as .npy or CSV",
}


def read_text(path: Path, max_bytes: int) -> str:
    """A file's text, without a byte order mark.

    Raises:
        DistplbError: in one line, without the content, if it is not UTF-8 text, or would take more than `max_bytes`
            once its numbers are read.
    """
    size, most = path.stat().st_size, max_bytes // _GROWTH
    if size > most:
        raise DistplbError(f"{path} has {size} bytes of text, more than {most}; pass it as .npy")
    data = path.read_bytes()
    for begin, what in _BINARY.items():
        if data.startswith(begin):
            raise DistplbError(f"{path} is not text but {what}")
    if b"\0" in data:
        raise DistplbError(f"{path} is not text (byte {data.index(0)} is 0); pass text, or rename it with its suffix")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DistplbError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_json(path: Path, max_bytes: int) -> Any:
    """The lists, objects, numbers and strings of a JSON file.

    Raises:
        DistplbError: if it is not JSON, or an object has a name twice.
    """
    text = read_text(path, max_bytes)
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DistplbError(f"{path} cannot be read as JSON ({str(error)[:200]})") from error


def parse_json(text: str | bytes) -> Any:
    """The lists, objects, numbers and strings of a JSON text.

    Raises:
        ValueError: if it is not JSON, or an object has a name twice.
        RecursionError: if it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_different)


def _different(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for name, value in pairs:
        if name in document:
            raise ValueError(f"an object has the name {name[:80]!r} twice")
        document[name] = value
    return document


def read_yaml(path: Path, max_bytes: int) -> Any:
    """The same from YAML, if PyYAML is installed: plain values only, without aliases or tags.

    Raises:
        DistplbError: if it is not such YAML, or PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as missing:
        raise DistplbError(f"{path} needs PyYAML; pip install pyyaml, or pass it as JSON") from missing
    text = read_text(path, min(max_bytes // _YAML_GROWTH, _MOST_YAML) * _GROWTH)
    try:
        return _plain(yaml.compose(text, Loader=yaml.SafeLoader), set())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        why = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise DistplbError(f"{path} cannot be read as YAML ({where}{why[:200]})") from error


def _plain(node: Any, visited: set[int]) -> Any:
    """The value of a PyYAML node. A node that occurs twice is an alias; a few aliases can expand to a huge document."""
    if node is None:
        return None
    line = node.start_mark.line + 1
    if id(node) in visited:
        raise ValueError(f"line {line} is used again by an alias; write it out")
    visited.add(id(node))
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if kind == "seq":
        return [_plain(one, visited) for one in node.value]
    if kind == "map":
        pairs = [(str(_plain(name, visited)), _plain(value, visited)) for name, value in node.value]
        return _different(pairs)
    if kind == "int" and _WHOLE.fullmatch(node.value):
        return int(node.value)
    if kind == "float" and node.value[-1].isdigit():
        return float(node.value)
    if kind == "bool":
        return node.value.lower() in ("true", "yes", "on")
    if kind in ("str", "float"):  # .nan and .inf become text, which is not a count
        return node.value
    if kind == "null":
        return None
    shown = f"{node.value!r:.40}" if isinstance(node.value, str) else "a tag"
    raise ValueError(f"line {line} has {shown}, which is not a plain number, text, list or object")
