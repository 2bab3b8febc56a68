"""All kinds of inputs, and the page about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inputs import counts, empty, files, logs, words
from inputs.case import Case

__all__ = ["KINDS", "page"]

KINDS: Mapping[str, Sequence[Case]] = {
    "Types and values of counts": counts.CASES,
    "Steps and layers without tokens, shares of replicas, even loads": empty.CASES,
    "Files of counts and placements": files.CASES,
    "Logs and records of jobs": logs.CASES,
    "Commands, options and their words": words.CASES,
}

_HEAD = """# What is given, and what is answered

Each row is run by the tests (`tests/cli/test_inputs.py`). An answer that begins with "refused" is a `DistplbError`; one
that begins with "exit 2" is a command's, with what it printed on the standard error.
"""


def page() -> str:
    """Markdown: a table for each kind."""
    parts = [_HEAD]
    for kind, cases in KINDS.items():
        parts.append(f"\n## {kind}\n\n| given | answered |\n| --- | --- |\n")
        parts += [f"| {_cell(case.given)} | {_cell(case.answer)} |\n" for case in cases]
    return "".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
