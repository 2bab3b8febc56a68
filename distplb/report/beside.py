"""Other runs beside a run: read, named apart, and checked to be runs of the same job."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distplb.errors import DistplbError
from distplb.report.formatting import printable
from distplb.report.run import Run
from distplb.report.step_checks import num_gpus

__all__ = ["with_beside"]

_STEPS = "steps.jsonl"


def with_beside(run: Run, paths: Sequence[str | os.PathLike[str]]) -> Run:
    """Put other runs of the same job beside a run, to compare the time of their steps.

    Args:
        run: a run with sampled steps that were timed.
        paths: for each other run, its folder or its `steps.jsonl`. A run is named after its folder, with as many of
            the folders above it as tell the runs apart; a path that is given twice counts once.

    Raises:
        DistplbError: if a run cannot be read, has no steps that were timed, or has other layers, slots or GPUs.
    """
    if not paths:
        return run
    folders = list(dict.fromkeys(_folder(Path(path)) for path in paths))
    others = [replace(Run.read(path), name=name) for path, name in zip(folders, _names(folders), strict=True)]
    for one in (run, *others):
        if one.step_time is None:
            raise DistplbError(
                f"{printable(one.name)} has no sampled steps that were timed, which --beside compares; pass "
                'on_event=EventLog("run/steps.jsonl") to StepBalancer'
            )
    for other in others:
        if _job(run) != _job(other):
            raise DistplbError(
                f"{printable(other.name)} has {_job(other)}, but {printable(run.name)} has {_job(run)}; put runs of "
                "one job beside each other"
            )
    return replace(run, beside=tuple(others))


def _folder(path: Path) -> Path:
    path = path.resolve()
    return path.parent if path.name == _STEPS and path.is_file() else path


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other.

    >>> _names([Path("/a/run"), Path("/b/run"), Path("/b/static")])
    ['a/run', 'b/run', 'b/static']
    """
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _job(run: Run) -> str:
    assert run.sampled is not None, "only steps have times"
    last = run.sampled.events[-1]
    return f"layers: {len(run.sampled.layers)}, slots: {last.num_slots}, GPUs: {num_gpus(last) or 0}"
