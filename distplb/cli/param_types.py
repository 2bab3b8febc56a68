"""Types of arguments and options that click lacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

__all__ = ["FiniteNumber", "NamedPath", "OutputFile", "WholeNumber", "refuse_overwriting"]


class NamedPath(click.Path):
    """A path that is neither empty nor "-", because no command reads standard input."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse an empty path and "-"."""
        if value == "-":
            self.fail(
                "'-' is not a path, and standard input is not read; pass a file, or ./- for a file of this name",
                param,
                ctx,
            )
        if value == "":
            self.fail("'' is not a path; pass one", param, ctx)
        return super().convert(value, param, ctx)


class OutputFile(NamedPath):
    """A file to write, checked before any work: its folder must exist, and it may replace only a regular file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what cannot be written, or must not be replaced."""
        path: Path = super().convert(value, param, ctx)
        folder = path.parent
        if not folder.is_dir():
            what = f"{folder} is not a folder; " if folder.exists() else f"there is no folder {folder}; create it, or "
            self.fail(f"{what}pass another file", param, ctx)
        if path.is_dir():
            self.fail(f"{path} is a folder; pass the file to write, such as {path / 'name'}", param, ctx)
        if path.exists() and not path.is_file():
            self.fail(f"{path} is not a regular file, and would be replaced by one; pass another file", param, ctx)
        if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            self.fail(f"{path} cannot be written; pass a file that you may write", param, ctx)
        return path


def refuse_overwriting(output: Path | None, read: Path) -> None:
    """Refuse an --output that is the file the command reads, or part of the folder it reads.

    Raises:
        click.BadParameter: if it is.
    """
    if output is None or not output.exists() or not read.exists():
        return
    is_part = output.suffix in (".npz", ".jsonl") and output.parent.samefile(read)
    if output.samefile(read) or is_part:
        raise click.BadParameter(
            f"{output} is the command's input and would be overwritten; pass another file", param_hint="--output"
        )


class WholeNumber(click.IntRange):
    """An integer of at least `minimum`, and at most `maximum` if there is one."""

    name = "integer"

    def __init__(self, minimum: int = 1, maximum: int | None = None) -> None:
        super().__init__(min=minimum, max=maximum)


class FiniteNumber(click.types.FloatParamType):
    """A finite number in a range, by default one that holds any physical quantity."""

    def __init__(self, minimum: float = 1e-6, maximum: float = 1e18) -> None:
        self._minimum, self._maximum = minimum, maximum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse a number outside the range, and a NaN."""
        number = super().convert(value, param, ctx)
        if not self._minimum <= number <= self._maximum:
            self.fail(f"{number} is not in the range {self._minimum:g} to {self._maximum:g}", param, ctx)
        return number
