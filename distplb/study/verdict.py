"""Whether to install a rebalancer, from the outcomes of planners on a trace: an answer and a paragraph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from distplb.study.bootstrap import MIN_INTERVALS
from distplb.study.what_if import PRICED, STATIC, STEPS, WhatIf

__all__ = ["Verdict", "percent", "verdict"]

_MIN_SHARE = 0.01  # of the time; what saves less is not worth a dependency
_BALANCED = 1.1  # static's imbalance over the bound, below which the router is said to balance
_PLAIN = 0.005  # of imbalance, below which two have the same
_MANY = 100  # times; beyond it the exact number does not matter
_TRY = 20  # intervals that are worth recording

Answer = Literal["yes", "longer", "no"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether to install it.

    Args:
        answer: "yes", "longer" (only try a dry run, or record for longer) or "no".
        why: in one word or two: "saves", "too few", "chance", "one expert", "bound", "balanced", "moves" or "changes".
        text: one paragraph for people.
        break_even: iterations after which the moves of a rebalance have repaid themselves; None where they never do.
        times: by how much the moves could take longer, at the same plans, until they save nothing; None likewise.
    """

    answer: Answer
    why: str
    text: str
    break_even: float | None
    times: float | None


@dataclass(frozen=True)
class _Case:
    """The numbers that decide, as shares of what the text speaks of."""

    static: WhatIf
    free: WhatIf  # planned without a price
    priced: WhatIf
    bound: float
    experts_per_gpu: int
    share: float  # of an iteration that the experts take, or 1

    @property
    def saved(self) -> float:
        return self.priced.saved * self.share

    @property
    def possible(self) -> float:
        """With the bound in every step."""
        return (1 - self.bound / self.static.imbalance) * self.share

    @property
    def carried_over(self) -> float:
        """By plans without a price, on steps that they had not seen, were moves free."""
        return (1 - self.free.compute_seconds / self.free.static_seconds) * self.share


def verdict(
    outcomes: Mapping[str, WhatIf],
    *,
    bound: float,
    experts_per_gpu: int,
    bytes_per_slot: int,
    expert_share: float | None = None,
) -> Verdict:
    """Say yes, no, or that the trace is too short to tell.

    Yes where plans that pay for their moves save 1 % or more, and the 95 % interval is above 0. No where they save
    nothing, where the interval ends below 1 %, where no placement could save as much, and where less is saved of what
    the router has balanced. Otherwise the trace does not tell.

    Args:
        outcomes: of the planners `STATIC`, `STEPS` and `PRICED` on it, at one interval between rebalances.
        bound: the smallest mean imbalance that any placement could have.
        experts_per_gpu: without replicas.
        bytes_per_slot: of one expert with its state, as assumed.
        expert_share: of an iteration's time that the experts take; where None the text speaks of the time in experts.
    """
    share = 1.0 if expert_share is None else expert_share
    case = _Case(outcomes[STATIC], outcomes[STEPS], outcomes[PRICED], bound, experts_per_gpu, share)
    answer, why = _decided(case)
    times, break_even = _times(case.priced), _break_even(case.priced)
    of_what = "the time that experts take" if expert_share is None else "an iteration"
    parts = [_OPENING[answer], _reason(why, case)]
    if why != "one expert":
        parts += [_saving(case, of_what), _repaid(case.priced, bytes_per_slot)]
    text = " ".join(part for part in (*parts, _advice(answer, case.priced)) if part)
    return Verdict(answer=answer, why=why, text=text, break_even=break_even, times=times)


def _decided(case: _Case) -> tuple[Answer, str]:
    if case.experts_per_gpu == 1:
        return "no", "one expert"
    if case.priced.low is None or case.priced.high is None:
        return "longer", "too few"
    if case.possible < _MIN_SHARE:
        return "no", "bound" if case.bound > _BALANCED else "balanced"
    if case.saved >= _MIN_SHARE and case.priced.low > 0:
        return "yes", "saves"
    if case.saved < _MIN_SHARE and case.static.imbalance < _BALANCED * case.bound:
        return "no", "balanced"
    if case.saved > 0 and case.priced.high * case.share >= _MIN_SHARE:
        return "longer", "chance"
    return "no", "moves" if case.carried_over >= _MIN_SHARE else "changes"


def _break_even(one: WhatIf) -> float | None:
    """Iterations: what the moves of a rebalance took, over what an iteration gained."""
    gained = one.static_seconds - one.compute_seconds  # in as many intervals as there were rebalances
    return one.move_seconds / gained * one.every if gained > 0 else None


def _times(one: WhatIf) -> float | None:
    gained = one.static_seconds - one.compute_seconds
    return gained / one.move_seconds if gained > 0 and one.move_seconds > 0 else None


# --- the paragraph ----------------------------------------------------------------------------------------------

_OPENING = {"yes": "Install it.", "longer": "Do not decide on this trace.", "no": "Do not install it."}
_REPLICAS = "That takes replicas, which are not trained yet."


def _reason(why: str, case: _Case) -> str:
    static, bound = f"{case.static.imbalance:.2f}", f"{case.bound:.2f}"
    return {
        "saves": "",
        "too few": (
            f"It has {_plural(case.priced.rebalances, 'interval')} between rebalances to judge by, and "
            f"{MIN_INTERVALS} are the fewest that tell a saving from chance."
        ),
        "chance": "What is saved may be chance.",
        "one expert": f"With one expert a GPU every placement has the same imbalance, here {static}. {_REPLICAS}",
        "bound": (
            f"The hottest experts alone set the pace: imbalance is {static}, and no placement of "
            f"{case.experts_per_gpu} experts a GPU has less than {bound}. {_REPLICAS}"
        ),
        "balanced": f"The router already balances: imbalance is {static}, the bound of all placements {bound}."
        + _not_carried_over(case),
        "moves": f"The moves cost more than they save: were they free, {percent(case.carried_over)} would be saved.",
        "changes": f"The load changes faster than it can be planned for.{_not_carried_over(case)}",
    }[why]


def _not_carried_over(case: _Case) -> str:
    before, after, static = case.free.imbalance_seen, case.free.imbalance, case.static.imbalance
    if after - before < _PLAIN:
        return ""
    return (
        f" Plans reach {before:.3f} on the steps that they are made from, but {after:.3f} on the steps after them, "
        f"where static has {static:.3f}."
    )


def _saving(case: _Case, of_what: str) -> str:
    one, interval = case.priced, ""
    does = f"save {percent(case.saved)} of" if case.saved >= 0 else f"add {percent(-case.saved)} to"
    if one.low is not None and one.high is not None:
        low, high = (percent(value * case.share, "") for value in (one.low, one.high))
        whose = "" if case.saved >= 0 else " of what is saved"
        interval = f" (95 % interval{whose} {low} to {high} %, {_plural(one.rebalances, 'rebalance')})"
    often = "iteration" if one.every == 1 else _plural(one.every, "iteration")
    return (
        f"Rebalancing every {often} would {does} {of_what}, moves included{interval}: "
        f"imbalance {one.imbalance:.3f} instead of {case.static.imbalance:.3f}, bound {case.bound:.3f}."
    )


def _repaid(one: WhatIf, bytes_per_slot: int) -> str:
    after, times = _break_even(one), _times(one)
    if not one.slots_moved:
        return "Nothing would be moved."
    if after is None or times is None:
        return "The moves never repay themselves."
    if times <= 1:
        return f"The moves of a rebalance repay themselves after {after:.0f} iterations, which it is not given."
    took = "in the first iteration" if after <= 1 else f"within {math.ceil(after)} iterations"
    limit = "a hundred times the bytes, or at a hundredth of the bandwidth"
    if times < _MANY:
        size, unit = bytes_per_slot * times / 1e6, "MB"
        if size >= 1000:
            size, unit = size / 1000, "GB"
        limit = f"{times:.1f} times the bytes ({size:.1f} {unit} an expert), or at 1/{times:.1f} of the bandwidth"
    return f"The moves of a rebalance repay themselves {took}; the same moves would still do so with {limit}."


_DRY_RUN = 'Rebalancer(..., moves=Moves(dry_run=True), record=Record("run"))'


def _advice(answer: Answer, one: WhatIf) -> str:
    if answer == "yes":
        return f"See it in your job before anything moves: {_DRY_RUN}."
    if answer == "longer":
        iterations = _TRY * one.every
        return f"Record {iterations} iterations or more, {_DRY_RUN}, and ask again."
    return ""


def percent(share: float, unit: str = " %") -> str:
    """With one digit, and no sign before 0."""
    return f"{round(100 * share, 1) + 0.0:.1f}{unit}"


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
