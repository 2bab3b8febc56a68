"""Training text that every machine has, because it comes with Python: its library's source, and its manual.

Shapes: uint8 [bytes].
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

MAX_BYTES = 32 * 2**20


def code() -> Tensor:
    """Return the standard library's *.py, concatenated, at most MAX_BYTES."""
    return end_to_end(path.read_bytes() for path in library())


def prose() -> Tensor:
    """Return the language reference (the topics of `help`), then the library's docstrings: about 2 MB of English."""
    return end_to_end(without_markup(text).encode() for text in [*topics.values(), *docstrings()] if text)


def files(folder: str) -> Tensor:
    """Return all files below a folder, concatenated, at most MAX_BYTES."""
    text = end_to_end(path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file())
    if not len(text):
        raise SystemExit(f"no text found in {folder}; pass --data FOLDER with files in it")
    return text


def end_to_end(parts: Iterable[bytes]) -> Tensor:
    data = bytearray()
    for part in parts:
        data += part
        if len(data) > MAX_BYTES:
            break
    return torch.frombuffer(data[:MAX_BYTES], dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def library() -> Iterator[Path]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if path.is_file() and not {"site-packages", "dist-packages"} & set(path.parts):
            yield path


def docstrings() -> Iterator[str]:
    for path in library():
        if {"test", "tests"} & set(path.parts):
            continue  # two thirds of the source, with few docstrings, and files that are broken on purpose
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node) or ""


def without_markup(text: str) -> str:
    """Remove underlines, sessions, grammar and the marks around names, which leaves mostly sentences."""
    lines = (line for line in text.splitlines() if not re.match(r"\W+$|\s*(>>>|\.\.\. )|.*::=", line))
    return re.sub(r"[*`\"|]+", "", "\n".join(lines)) + "\n\n"
