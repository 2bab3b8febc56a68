"""One input and its answer: a value, or one line that says what to pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner

from distplb import DistplbError
from distplb.cli.main import main

__all__ = ["Case", "answer_to", "command"]


class Case(NamedTuple):
    """One input.

    Args:
        input: a description of the input, or the code or command that passes it.
        answer: the expected result of `answer_to`.
        run: passes the input and returns the result; called with an empty folder, which it may write to.
    """

    input: str
    answer: str
    run: Callable[[Path], object]


def answer_to(case: Case, folder: Path) -> str:
    """Return the result, or "refused: " and the error; warnings follow in brackets. The folder's path reads FOLDER."""
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        try:
            value = str(case.run(folder))
        except DistplbError as error:
            value = f"refused: {error}"
    value += "".join(f" [warning: {one.message}]" for one in issued)
    return value.replace(f"{folder}/", "").replace(str(folder), "FOLDER")


def command(*words: object, show: Callable[[str], object] = str.strip) -> str:
    """Run `distplb` in this process; return what `show` makes of its output, or the exit code and standard error.

    Args:
        words: the words of the command after `distplb`.
        show: summarises the standard output if the exit code is 0.
    """
    done = CliRunner().invoke(main, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    messages = "".join(f" [{line}]" for line in done.stderr.splitlines())
    return f"{show(done.stdout)}{messages}" if not done.exit_code else f"exit {done.exit_code}:{messages}"
