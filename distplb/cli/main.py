"""`distplb`: the commands, their errors and their exit codes.

Exit codes: 0 done, 1 the answer is no (`doctor` found something wrong, `replay --exit-code` advises against installing
it), 2 wrong usage or input, or out of memory, 70 a bug in distplb, 130 interrupted, 141 broken pipe.

An exception from torch, NumPy, Numba or Python is a bug in distplb: one line asks the user to report it. In Python's
development mode, `python -X dev -m distplb`, its traceback is shown instead.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
from click.exceptions import Exit, NoArgsIsHelpError

import distplb
from distplb.cli.compare import compare
from distplb.cli.doctor import doctor
from distplb.cli.option_names import as_option
from distplb.cli.output import forgive_encodings, one_line
from distplb.cli.plan import plan
from distplb.cli.replay import replay
from distplb.cli.report import report
from distplb.errors import DistplbError, OptionError, UnforeseenError

__all__ = ["main"]

_PACKAGE = Path(distplb.__file__).parent
_INTERRUPTED, _CLOSED_PIPE = 130, 141  # as shells count: 128 + the signal
_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)  # torch's RuntimeErrors
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Refused(click.ClickException):
    """A one-line error."""

    exit_code = 2

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class _Fault(_Refused):
    """A bug in distplb."""

    exit_code = 70  # EX_SOFTWARE of sysexits.h


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
    """Turn each warning and error into one line, and errors into an exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            yield
    except (NoArgsIsHelpError, Exit):
        raise
    except click.UsageError as error:
        text = error.format_message()
        text += "" if text.endswith((".", "?")) else "."
        raise _Refused(f"{text} Try '{error.ctx.command_path} --help'." if error.ctx else text) from error
    except OptionError as error:
        raise _Refused(error.told(as_option)) from error
    except UnforeseenError as error:
        raise _unforeseen(error.__cause__ or error) from error
    except DistplbError as error:
        raise _Refused(str(error)) from error
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes the final flush
        raise Exit(_CLOSED_PIPE) from error
    except (KeyboardInterrupt, click.Abort) as stopped:
        click.echo("Interrupted.", err=True)
        raise Exit(_INTERRUPTED) from stopped
    except click.ClickException:
        raise
    except Exception as error:
        raise _unforeseen(error) from error


def _unforeseen(error: BaseException) -> _Refused:
    """An unexpected error as one line; in development mode it is raised with its traceback."""
    if isinstance(error, OSError):
        return _Refused(f"{error.filename or 'the system'}: {error.strerror or error}")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return _Refused("not enough memory; pass fewer steps, slots or candidates")
    if sys.flags.dev_mode:
        raise error
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    where = f" at {Path(own[-1].filename).relative_to(_PACKAGE)}:{own[-1].lineno}" if own else ""
    message = str(error).strip().split("\n")[0]
    return _Fault(
        f"bug in distplb: {type(error).__name__}{where}{f' ({message})' if message else ''}; please report this line "
        "with the command and its input. `python -X dev -m distplb` instead of `distplb` shows the traceback"
    )


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """`warnings.showwarning` without the line of code."""
    click.echo(f"Warning: {one_line(str(message))}", err=True)


@click.group("distplb", cls=_Commands, context_settings=_SETTINGS)
@click.version_option(distplb.__version__, prog_name="distplb")
def main() -> None:
    """Keep the GPUs of mixture-of-experts pretraining equally busy."""


main.add_command(plan)
main.add_command(compare)
main.add_command(replay)
main.add_command(report)
main.add_command(doctor)
