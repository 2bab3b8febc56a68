"""One input and its answer: a right value, or one line that says what to pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner

from distplb import DistplbError
from distplb.cli.main import main

__all__ = ["Case", "answered", "command"]


class Case(NamedTuple):
    """One input.

    Args:
        given: in words, or as the code or command that gives it.
        answer: what `answered` says.
        run: gives it; gets an empty folder, in which it may write.
    """

    given: str
    answer: str
    run: Callable[[Path], object]


def answered(case: Case, folder: Path) -> str:
    """What comes out: the value, or "refused: " and the error; warnings follow in brackets. FOLDER is the folder."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = str(case.run(folder))
        except DistplbError as error:
            found = f"refused: {error}"
    found += "".join(f" [warning: {one.message}]" for one in told)
    return found.replace(f"{folder}/", "").replace(str(folder), "FOLDER")


def command(*words: object, show: Callable[[str], object] = str.strip) -> str:
    """Run `distplb` with these words in this process; what `show` makes of its output, or the exit code and the line.

    Args:
        words: after `distplb`.
        show: of the standard output, where the exit code is 0.
    """
    done = CliRunner().invoke(main, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    told = "".join(f" [{line}]" for line in done.stderr.splitlines())
    return f"{show(done.stdout)}{told}" if not done.exit_code else f"exit {done.exit_code}:{told}"
