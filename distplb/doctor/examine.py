"""Runs all checks in order, the same on every rank."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import chain

from distplb.comm.base import Comm
from distplb.comm.job import process_group
from distplb.core.topology import Topology
from distplb.doctor import collective_checks, local_checks, replica_check
from distplb.doctor.finding import Finding, Timing, ok, wrong
from distplb.errors import DistplbError

__all__ = ["Examination", "examine", "examine_ranks"]

_ALONE = (
    "collectives, moves and steps with replicas not tested; run torchrun --nproc-per-node 2 -m distplb doctor to test "
    "them"
)


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
            examination = examine_ranks(comm, Topology.from_env(), examination, deadline)
            del comm  # a live reference to the group would keep its threads alive
    except DistplbError as error:
        examination.findings.append(wrong("ranks", str(error)))
    return examination


def examine_ranks(comm: Comm, topology: Topology, own: Examination, deadline: float) -> Examination:
    """Run the checks that involve all ranks of the default group, until one fails, after this rank's own findings.

    Args:
        comm: of the default group.
        topology: of the default group.
        own: this rank's own findings.
        deadline: seconds that ranks may wait for each other.
    """
    examination, found = own, list[Finding]()  # and what this rank has found since
    try:
        examination = Examination(collective_checks.merge_findings(comm, own.findings))
        examination.findings += collective_checks.same_versions(comm, local_checks.versions())
        results = chain(
            collective_checks.collectives(comm),
            collective_checks.small_move(comm, topology),
            replica_check.step_with_replicas(topology, deadline),
        )
        for one in results:
            if isinstance(one, Timing):
                examination.timings.append(one)
            else:
                found.append(one)
        examination.findings += collective_checks.merge_findings(comm, found)
        if not examination.is_wrong:
            examination.findings.append(ok("ranks", f"all {comm.size} exchange, move and lend correctly"))
    except Exception as error:  # the doctor reports any error of network or driver
        examination.findings += found
        examination.findings.append(wrong("ranks", str(error) if isinstance(error, DistplbError) else repr(error)))
    return examination
