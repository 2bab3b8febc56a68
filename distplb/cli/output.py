"""Output of all commands: tables for people, JSON for scripts, and a progress bar on a terminal."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich import box
from rich.console import Console, JustifyMethod, OverflowMethod
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

__all__ = [
    "console",
    "forgive_encodings",
    "json_option",
    "one_line",
    "print_hints",
    "print_json",
    "printable",
    "progress",
    "table",
]

_MAX_LETTERS = 600  # of a message: its beginning says what is wrong, its end what to pass
_PIPE_WIDTH = 200  # columns; in a pipe nothing is cut off and lines are not wrapped
Command = TypeVar("Command", bound=Callable[..., Any])


class _Console(Console):
    def render_str(
        self,
        text: str,
        *,
        style: str | Style = "",
        justify: JustifyMethod | None = None,
        overflow: OverflowMethod | None = None,
        **_: Any,
    ) -> Text:
        """Show every string as it is: rich would treat brackets as markup, and names between colons as emoji."""
        return Text(printable(text), style=style, justify=justify, overflow=overflow)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1, which has a meaning here


def json_option(command: Command) -> Command:
    """`--json`, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")(command)


def console() -> Console:
    """Standard output for people; plain and wide in a pipe."""
    watched = sys.stdout.isatty()
    return _Console(highlight=False, width=None if watched else _PIPE_WIDTH, soft_wrap=not watched)


def printable(text: str) -> str:
    """Put a text on one line, without control characters: names come from files."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def one_line(text: str) -> str:
    """`printable`, and short enough to read: the middle is left out."""
    text = printable(text)
    return text if len(text) <= _MAX_LETTERS else f"{text[: _MAX_LETTERS - 205]} ... {text[-200:]}"


def table(first: str, *others: str, title: str | None = None) -> Table:
    """A table with names on the left, which wrap, and numbers on the right, which do not; add rows with `add_row`."""
    lines = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    if title is not None:
        lines.title, lines.title_justify, lines.title_style = title, "left", ""
    lines.add_column(first, overflow="fold")
    for name in others:
        lines.add_column(Text(name.replace(" ", "\n")), justify="right", no_wrap=True, vertical="bottom")
    return lines


def print_json(document: Mapping[str, Any]) -> None:
    """Print one object on standard output, and nothing else."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def print_hints(hints: Sequence[str]) -> None:
    """Print one line per hint on standard error."""
    for hint in hints:
        click.echo(f"Hint: {one_line(hint)}", err=True)


@contextmanager
def progress(activity: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, total); it draws a bar on standard error if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_Console(stderr=True), transient=True) as bar:
        task = bar.add_task(activity, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def forgive_encodings() -> None:
    """Print a question mark for what the terminal's encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
