"""The pages that people read: their Python, their recorded sessions, their links.

`python -m pages` runs the commands of all recorded sessions again and writes what they print into the pages.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from click.testing import CliRunner

from distplb.cli import output
from distplb.cli.main import main

__all__ = ["PAGES", "ROOT", "Session", "anchors", "blocks", "is_as_printed", "links", "printed", "sessions"]

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
_WIDTH = 100  # columns of a recorded session
_SECONDS = r"(?<= )\d+\.\d{3} *$"  # the last column of `compare`, which another run measures anew
_LEFT_OUT = "..."  # a line that stands for any lines


class Session(NamedTuple):
    """A command of a console block, and what stands below it."""

    page: Path
    command: str
    recorded: str


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks of one language."""
    return re.findall(rf" *```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def sessions(page: Path) -> list[Session]:
    """The commands of the page's console blocks, in order."""
    texts = [text for block in blocks(page, "console") for text in re.split(r"\n*^\$ ", block, flags=re.MULTILINE)[1:]]
    return [Session(page, command, recorded) for command, _, recorded in (text.partition("\n") for text in texts)]


def printed(command: str) -> str:
    """What a `distplb` command prints into a pipe, from the repository's root."""
    with patch.object(output, "_PIPE_WIDTH", _WIDTH):
        result = CliRunner().invoke(main, command.split()[1:])
    assert result.exit_code == 0, result.output
    return result.stdout


def is_as_printed(session: Session) -> bool:
    """Whether the command prints this; line breaks, measured seconds and lines that are left out aside."""
    seconds = _SECONDS if " compare " in session.command else r"$^"
    text, recorded = (
        re.sub(seconds, "", part, flags=re.MULTILINE) for part in (printed(session.command), session.recorded)
    )
    parts = [re.escape(_spaced(part)) for part in _parts(recorded)]
    return re.fullmatch(".*?".join(parts), _spaced(text)) is not None


def links(page: Path) -> Iterator[str]:
    """Targets of the page's links and pictures."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """The page's headings, as links within a page name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _spaced(text: str) -> str:
    """Its words with a space before and behind each, so that none is found within another."""
    return "".join(f" {word} " for word in text.split())


def _parts(recorded: str) -> list[str]:
    return re.split(rf"^{re.escape(_LEFT_OUT)}$", recorded, flags=re.MULTILINE)


def _record(session: Session) -> str:
    """What to write below the command; of a session that leaves lines out, what it has already."""
    if len(_parts(session.recorded)) == 1:
        return printed(session.command)
    if not is_as_printed(session):
        print(f"{session.page.name}: edit by hand: $ {session.command}\n{printed(session.command)}", file=sys.stderr)
    return session.recorded


def _record_all() -> None:
    for page in PAGES:
        text = page.read_text()
        for session in sessions(page):
            before = f"$ {session.command}\n{session.recorded}".rstrip("\n")
            assert before in text
            text = text.replace(before, f"$ {session.command}\n{_record(session)}".rstrip("\n"))
        page.write_text(text)


if __name__ == "__main__":
    _record_all()
