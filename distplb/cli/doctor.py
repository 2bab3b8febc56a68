"""`distplb doctor`: check that everything is installed, fits together, and is as fast as it should be."""

from __future__ import annotations

import os
import sys

import click
from rich.table import Table
from rich.text import Text

from distplb.cli.output import console, json_option, print_json, table
from distplb.cli.param_types import FiniteNumber
from distplb.doctor.examine import Examination, examine

__all__ = ["doctor"]

_STYLES = {"ok": "green", "note": "yellow", "WRONG": "bold red"}
_RANKS = ("RANK", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK")  # set by launchers
_EPILOG = """\b
Examples:
  distplb doctor
  torchrun --nproc-per-node 8 -m distplb doctor
"""


@click.command(epilog=_EPILOG)
@click.option(
    "--deadline",
    type=FiniteNumber(minimum=1e-3, maximum=1e6),
    metavar="SECONDS",
    default=60.0,
    show_default=True,
    help="How long ranks may wait for each other.",
)
@json_option
def doctor(deadline: float, as_json: bool) -> None:
    """Check the installation; under torchrun, also time collectives, a small move, and a step with replicas.

    Versions, devices, backends and engines are checked. Each finding is one line: ok, note, or WRONG with what to set.
    Only rank 0 prints. All ranks exit with 0, or with 1 if anything is WRONG.
    """
    examination = examine(deadline)
    if all(os.environ.get(name, "0") == "0" for name in _RANKS):
        _print_json(examination) if as_json else _print(examination)
    sys.exit(int(examination.is_wrong))


def _print_json(examination: Examination) -> None:
    print_json(
        {
            "findings": [one._asdict() for one in examination.findings],
            "timings": [one._asdict() for one in examination.timings],
            "wrong": examination.is_wrong,
        }
    )


def _print(examination: Examination) -> None:
    out = console()
    findings = Table(box=None, show_header=False, pad_edge=False)
    for one in examination.findings:
        findings.add_row(Text(one.level, style=_STYLES[one.level]), one.what, one.text)
    out.print(findings)
    if examination.timings:
        out.print(_timings(examination))


def _timings(examination: Examination) -> Table:
    lines = table("round", "ms", "GB/s", title="Medians of rank 0")
    for one in examination.timings:
        rate = "" if one.rate is None else f"{one.rate / 1e9:.2f}"
        lines.add_row(one.what, f"{one.seconds * 1e3:.1f}", rate)
    return lines
