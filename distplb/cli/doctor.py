"""`distplb doctor`: whether everything is there, fits together, and is as fast as it should be."""

from __future__ import annotations

import os
import sys

import click
from rich.table import Table
from rich.text import Text

from distplb.cli.given import Amount
from distplb.cli.output import console, json_option, plain, print_json, table
from distplb.doctor.examine import Examination, examine

__all__ = ["doctor"]

_STYLES = {"ok": "green", "note": "yellow", "WRONG": "bold red"}
_RANKS = ("RANK", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK")  # in which launchers number processes
_EPILOG = """\b
Examples:
  distplb doctor
  torchrun --nproc-per-node 8 -m distplb doctor
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--deadline",
    type=Amount(least=1e-3, most=1e6),
    metavar="SECONDS",
    default=60.0,
    show_default=True,
    help="How long ranks may wait for each other.",
)
@json_option
def doctor(deadline: float, as_json: bool) -> None:
    """Look at versions, devices, backends and engines; under torchrun, time collectives and a small move too.

    Each finding is one line: ok, note, or WRONG with what to set. Rank 0 prints. All ranks exit with 0, or with 1 where
    something is WRONG.
    """
    found = examine(deadline)
    if all(os.environ.get(name, "0") == "0" for name in _RANKS):
        _print_json(found) if as_json else _print(found)
    sys.exit(int(found.is_wrong))


def _print_json(found: Examination) -> None:
    print_json(
        {
            "findings": [one._asdict() for one in found.findings],
            "timings": [one._asdict() for one in found.timings],
            "wrong": found.is_wrong,
        }
    )


def _print(found: Examination) -> None:
    out = console()
    findings = Table(box=None, show_header=False, pad_edge=False)
    for one in found.findings:
        findings.add_row(Text(one.level, style=_STYLES[one.level]), plain(one.what), plain(one.text))
    out.print(findings)
    if found.timings:
        out.print(_timings(found))


def _timings(found: Examination) -> Table:
    lines = table("round", "ms", "GB/s", title="Medians of rank 0")
    for one in found.timings:
        lines.add_row(plain(one.what), f"{one.seconds * 1e3:.1f}", f"{one.rate / 1e9:.2f}")
    return lines
