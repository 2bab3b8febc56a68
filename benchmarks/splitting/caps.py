"""The smallest cap on a GPU's tokens that `split` keeps, against what no split can beat.

`split` refuses a cap of one token and names the smallest cap that it could keep; it is then asked to keep that one.

Shapes: R replica slots on each GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice

from benchmarks.shared.tables import markdown, progress, verdict
from benchmarks.splitting.cases import Case
from benchmarks.splitting.loads import Step
from distplb.errors import DistplbError
from distplb.splitting.bound import step_bound
from distplb.splitting.split import split

__all__ = ["Cap", "Caps", "cap_lines", "cap_of", "cap_table", "caps_of", "loads_once", "named_cap"]

SLOTS = range(5)  # R


@dataclass(frozen=True)
class Cap:
    """The smallest cap that `split` names for one step; tokens.

    Args:
        smallest: the cap.
        bound: what no split can beat.
        mean: the mean GPU's tokens.
        is_proven: whether it is known that no split keeps a lower cap.
        is_kept: whether `split` keeps it.
    """

    smallest: int
    bound: int
    mean: float
    is_proven: bool
    is_kept: bool

    @property
    def distance(self) -> float:
        """Of the cap from the bound, in units of the mean."""
        return (self.smallest - self.bound) / self.mean


@dataclass(frozen=True)
class Caps:
    """A case, and its caps by R, step by step."""

    case: Case
    caps: dict[int, list[Cap]]


def loads_once(cases: Iterable[Case]) -> list[Case]:
    """The cases without those that differ in R alone."""
    return list({case.load_text: case for case in reversed(list(cases))}.values())[::-1]


def caps_of(case: Case, steps: int) -> Caps:
    """Find the caps of the first steps for R = 0 to 4."""
    caps: dict[int, list[Cap]] = {slots: [] for slots in SLOTS}
    for number, step in enumerate(islice(case.steps(), steps)):
        progress(f"cap of {case.load_text}, step {number + 1}")
        for slots in SLOTS:
            caps[slots].append(cap_of(case, step, slots))
    return Caps(case, caps)


def cap_of(case: Case, step: Step, slots: int) -> Cap:
    """Find the cap of one step."""
    same = {"topology": case.topology, "replica_slots": slots}
    capped = partial(split, step.counts, case.cluster.home, engine="cpu", **same)
    bound, mean = step_bound(step.counts, case.cluster.home, **same), int(step.counts.sum()) / case.topology.num_gpus
    try:
        capped(max_tokens_per_gpu=1)
    except DistplbError as error:
        smallest, is_proven = named_cap(str(error))
    else:
        raise AssertionError("a step with more tokens than GPUs kept a cap of one token")
    try:
        is_kept = int(capped(max_tokens_per_gpu=smallest).load.amax()) <= smallest
    except DistplbError:
        is_kept = False
    return Cap(smallest, bound, mean, is_proven, is_kept)


def named_cap(message: str) -> tuple[int, bool]:
    """The cap that a refusal names, and whether it says that no split keeps a lower one.

    >>> named_cap("max_tokens_per_gpu is 1, but with 1 replica slots on each GPU this step needs 13; pass ...")
    (13, True)
    """
    named = re.search(r"this step needs (\d+)( \(found)?", message)
    if named is None:
        raise ValueError(f"no cap is named in {message!r}")
    return int(named[1]), named[2] is None


def cap_lines(found: list[Caps]) -> list[list[str]]:
    """Format the targets: every cap that `split` names is kept."""
    every = [cap for caps in found for each in caps.caps.values() for cap in each]
    kept, proven = sum(cap.is_kept for cap in every), sum(cap.is_proven for cap in every)
    return [
        [f"all, {len(every)} caps", measure, "all", f"{number}", verdict(number == len(every))]
        for measure, number in (("cap that is named is kept", kept), ("no split keeps a lower cap, proven", proven))
    ]


def cap_table(found: list[Caps]) -> str:
    """Format a row for each R, then one for each load and R whose caps are not all at the bound and proven."""
    lines = []
    for slots in SLOTS:
        lines.append([f"all, R = {slots}", *_cells([cap for caps in found for cap in caps.caps[slots]])])
    for caps in found:
        for slots, each in caps.caps.items():
            if any(cap.distance > 0 or not (cap.is_proven and cap.is_kept) for cap in each):
                lines.append([f"{caps.case.load_text}, R = {slots}", *_cells(each)])
    head = ["load", "steps", "at the bound", "proven", "kept", "largest distance", "of these proven"]
    return markdown(head, lines)


def _cells(caps: list[Cap]) -> list[str]:
    """Steps, those at the bound, proven, kept; the largest distance, and the largest of those that are proven."""
    numbers = (
        len(caps),
        sum(cap.distance == 0 for cap in caps),
        *(sum(getattr(cap, name) for cap in caps) for name in ("is_proven", "is_kept")),
    )
    unproven = [cap.distance for cap in caps if not cap.is_proven]
    proven = [cap.distance for cap in caps if cap.is_proven]
    return [*map(str, numbers), *(f"{max(each):.3%}" if each else "–" for each in (unproven + proven, proven))]
