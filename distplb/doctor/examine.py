"""Runs all checks in order, the same on every rank."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from distplb.comm.base import Comm
from distplb.comm.job import process_group
from distplb.core.topology import Topology
from distplb.doctor import collective_checks, local_checks
from distplb.doctor.finding import Finding, Timing, ok, wrong
from distplb.errors import DistplbError

__all__ = ["Examination", "examine", "examine_ranks"]

_ALONE = "collectives and moves not tested; run torchrun --nproc-per-node 2 -m distplb doctor to test them"


@dataclass
class Examination:
    """Findings and timings. The levels of the findings are the same on all ranks."""

    findings: list[Finding] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    @property
    def is_wrong(self) -> bool:
        """Whether any finding is WRONG."""
        return any(one.level == "WRONG" for one in self.findings)


def examine(deadline: float) -> Examination:
    """Check this process and, if torchrun has started several, all of them together.

    Args:
        deadline: how many seconds ranks may wait for each other.
    """
    examination = Examination(list(local_checks.findings()))
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        examination.findings.append(ok("ranks", _ALONE))
        return examination
    if any(one.what == "launcher" and one.level == "WRONG" for one in examination.findings):
        return examination  # this rank cannot join the group
    try:
        with process_group(deadline) as comm:
            examination = examine_ranks(comm, Topology.from_env(), examination)
            del comm  # a live reference to the group would keep its threads alive
    except DistplbError as error:
        examination.findings.append(wrong("ranks", str(error)))
    return examination


def examine_ranks(comm: Comm, topology: Topology, own: Examination) -> Examination:
    """Run the checks that involve all ranks, until one fails, after this rank's own findings."""
    examination = own
    try:
        examination = Examination(collective_checks.merge_findings(comm, own.findings))
        examination.findings += collective_checks.same_versions(comm, local_checks.versions())
        results: list[Timing | Finding] = [*collective_checks.collectives(comm)]
        results += collective_checks.small_move(comm, topology)
        mine = [one for one in results if isinstance(one, Finding)]
        examination.timings = [one for one in results if isinstance(one, Timing)]
        examination.findings += collective_checks.merge_findings(comm, mine)
        if not examination.is_wrong:
            examination.findings.append(ok("ranks", f"all {comm.size} exchange and move correctly"))
    except Exception as error:  # the doctor reports any error of network or driver
        examination.findings.append(wrong("ranks", str(error) if isinstance(error, DistplbError) else repr(error)))
    return examination
