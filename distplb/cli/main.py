"""`distplb`: the commands, and what becomes of an error.

Exit codes: 0 done, 1 the answer is no (`doctor` found a fault, `replay --exit-code` advises against it), 2 wrong use or
input, 130 interrupted, 141 nobody reads any more.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click
from click.exceptions import Exit, NoArgsIsHelpError

import distplb
from distplb.cli.compare import compare
from distplb.cli.doctor import doctor
from distplb.cli.output import forgive_encodings, printable
from distplb.cli.plan import plan
from distplb.cli.replay import replay
from distplb.cli.report import report
from distplb.errors import DistplbError

__all__ = ["main"]

_INTERRUPTED, _CLOSED_PIPE = 130, 141  # as shells count: 128 + the signal
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Refused(click.ClickException):
    """An error in one line."""

    exit_code = 2

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class _Commands(click.Group):
    def make_context(self, *args: Any, **options: Any) -> click.Context:
        forgive_encodings()
        with _in_one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _in_one_line():
            return super().invoke(ctx)


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Warnings, and errors that somebody can do something about, become one line; the latter with an exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            yield
    except NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        where = f" Try '{error.ctx.command_path} --help'." if error.ctx else ""
        raise _Refused(f"{error.format_message()}{where}") from error
    except DistplbError as error:
        raise _Refused(str(error)) from error
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the end goes there
        raise Exit(_CLOSED_PIPE) from error
    except OSError as error:
        raise _Refused(f"{error.filename or 'the system'}: {error.strerror or error}") from error
    except (KeyboardInterrupt, click.Abort) as stopped:
        click.echo("Interrupted.", err=True)
        raise Exit(_INTERRUPTED) from stopped


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """`warnings.showwarning` without the line of code."""
    click.echo(f"Warning: {printable(str(message))}", err=True)


@click.group("distplb", cls=_Commands, context_settings=_SETTINGS)
@click.version_option(distplb.__version__, prog_name="distplb")
def main() -> None:
    """Keep the GPUs of mixture-of-experts pretraining equally busy."""


main.add_command(plan)
main.add_command(compare)
main.add_command(replay)
main.add_command(report)
main.add_command(doctor)
