"""What is given on the command line: kinds of values that click lacks, and names of options for messages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

__all__ = ["Amount", "GivenPath", "OutputPath", "Whole", "as_option", "refuse_overwriting"]

# Names of arguments whose options have other names; the others have their own, with dashes.
_OPTIONS: Mapping[str, str] = {
    "num_slots": "slots",
    "num_groups": "groups",
    "num_candidates": "candidates",
    "num_nodes": "nodes",
    "num_gpus": "megatron-ep",  # of Trace.from_megatron
    "expert_tensor_parallel": "megatron-expert-tp",
    "pipeline_parallel": "megatron-pipeline",
}
_WITHOUT = {"max_bytes"}  # what only Python lets one say


def as_option(name: str, value: str) -> str:
    """How the command line passes what `OptionError` names: `--slots`, and `--slots 8` with a value."""
    if name in _WITHOUT:
        return f"{name} in Python"
    option = f"--{_OPTIONS.get(name, name).replace('_', '-')}"
    if value == "None":
        return f"no {option}"
    return f"{option} {value.strip(chr(39))}".strip()


class GivenPath(click.Path):
    """A path; neither an empty one nor "-", because no command reads the standard input."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what is no path."""
        if value == "-":
            self.fail(
                "'-' is no path, and the standard input is not read; pass a file, or ./- for one of this name",
                param,
                ctx,
            )
        if value == "":
            self.fail("'' is no path; pass one", param, ctx)
        return super().convert(value, param, ctx)


class OutputPath(GivenPath):
    """A file to write, looked at before the work: there is its folder, and what it replaces is a file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what cannot be written, or must not be replaced."""
        path: Path = super().convert(value, param, ctx)
        folder = path.parent
        if not folder.is_dir():
            what = f"{folder} is no folder; " if folder.exists() else f"there is no folder {folder}; make it, or "
            self.fail(f"{what}pass another file", param, ctx)
        if path.is_dir():
            self.fail(f"{path} is a folder; pass the file to write, as {path / 'name'}", param, ctx)
        if path.exists() and not path.is_file():
            self.fail(f"{path} is not a regular file, and would be replaced by one; pass another file", param, ctx)
        if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            self.fail(f"{path} cannot be written; pass a file in a folder of yours", param, ctx)
        return path


def refuse_overwriting(output: Path | None, read: Path) -> None:
    """Refuse an --output that is the file which the command reads, or one of the folder that it reads.

    Raises:
        click.BadParameter: naming it.
    """
    if output is None or not output.exists() or not read.exists():
        return
    is_part = output.suffix in (".npz", ".jsonl") and output.parent.samefile(read)
    if output.samefile(read) or is_part:
        raise click.BadParameter(
            f"{output} is what is read, and would be lost; pass another file", param_hint="--output"
        )


class Whole(click.IntRange):
    """A whole number of at least `least`."""

    name = "integer"

    def __init__(self, least: int = 1) -> None:
        super().__init__(min=least)


class Amount(click.types.FloatParamType):
    """A finite number in a range, by default one that no physical quantity leaves."""

    def __init__(self, least: float = 1e-6, most: float = 1e18) -> None:
        self._least, self._most = least, most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what is outside, as a NaN is."""
        found = super().convert(value, param, ctx)
        if not self._least <= found <= self._most:
            self.fail(f"{found} is not in the range {self._least:g} to {self._most:g}", param, ctx)
        return found
