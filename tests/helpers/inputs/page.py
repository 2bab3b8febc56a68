"""All kinds of inputs, and the page that lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inputs import (
    counts_of_plans,
    dumps,
    empty_parts,
    even_loads,
    megatron_logs,
    odd_loads,
    other_arguments,
    other_commands,
    placements,
    plan_options,
    records,
    tables,
)
from inputs.case import Case

__all__ = ["KINDS", "page"]

KINDS: Mapping[str, Sequence[Case]] = {
    "Types and values of counts": [*counts_of_plans.CASES, *other_arguments.CASES],
    "Steps and layers without tokens, shares of replicas, even loads": [*empty_parts.CASES, *even_loads.CASES],
    "Files of counts and placements": [*tables.CASES, *dumps.CASES, *placements.CASES],
    "Logs and records of jobs": [*megatron_logs.CASES, *records.CASES],
    "Commands and options": [*plan_options.CASES, *other_commands.CASES, *odd_loads.CASES],
}

_HEAD = """# Inputs and answers

The tests run every row (`tests/cli/test_inputs.py`). An answer that begins with "refused" is the text of a
`DistplbError`. One that begins with "exit 2" is the exit code of a command and what it printed to standard error.
Warnings and hints are in brackets.
"""


def page() -> str:
    """Format docs/inputs.md: a table for each kind."""
    parts = [_HEAD]
    for kind, cases in KINDS.items():
        parts.append(f"\n## {kind}\n\n| input | answer |\n| --- | --- |\n")
        parts += [f"| {_cell(case.input)} | {_cell(case.answer)} |\n" for case in cases]
    return "".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
