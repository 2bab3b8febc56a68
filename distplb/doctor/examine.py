"""All checks in their order, on every rank alike."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from distplb.comm.base import Comm
from distplb.comm.job import process_group
from distplb.core.topology import Topology
from distplb.doctor import here, together
from distplb.doctor.finding import Finding, Timing, ok, wrong
from distplb.errors import DistplbError

__all__ = ["Examination", "examined", "examined_together"]

_ALONE = "collectives and moves were not tried; torchrun --nproc-per-node 2 -m distplb doctor tries them"


@dataclass
class Examination:
    """What was found and timed; the same levels on all ranks."""

    findings: list[Finding] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    @property
    def is_wrong(self) -> bool:
        """Whether anything is."""
        return any(one.level == "WRONG" for one in self.findings)


def examined(deadline: float) -> Examination:
    """Look at this process and, where torchrun has started several, at all of them together.

    Args:
        deadline: seconds that ranks may wait for each other.
    """
    found = Examination(list(here.findings()))
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        found.findings.append(ok("ranks", _ALONE))
        return found
    if any(one.what == "launcher" and one.level == "WRONG" for one in found.findings):
        return found  # the others would be waited for in vain
    try:
        with process_group(deadline) as comm:
            found = examined_together(comm, Topology.from_env(), found)
            del comm  # so that the group goes with its threads
    except DistplbError as error:
        found.findings.append(wrong("ranks", str(error)))
    return found


def examined_together(comm: Comm, topology: Topology, own: Examination) -> Examination:
    """The same with the others, as far as they come."""
    found = own
    try:
        found = Examination(together.of_all_ranks(comm, own.findings))
        found.findings += together.same_versions(comm, here.versions())
        results: list[Timing | Finding] = [*together.collectives(comm)]
        results += together.small_move(comm, topology)
        mine = [one for one in results if isinstance(one, Finding)]
        found.timings = [one for one in results if isinstance(one, Timing)]
        found.findings += together.of_all_ranks(comm, mine)
        if not found.is_wrong:
            found.findings.append(ok("ranks", f"{comm.size} exchange and move as they should"))
    except Exception as error:  # whatever a network or driver raises is what this looks for
        found.findings.append(wrong("ranks", str(error) if isinstance(error, DistplbError) else repr(error)))
    return found
