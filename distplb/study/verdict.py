"""Advise whether to install a rebalancer, from the outcomes of planners on a trace: an answer and a paragraph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from distplb.study.bootstrap import MIN_INTERVALS
from distplb.study.what_if import PRICED, STATIC, STEPS, WhatIf

__all__ = ["Verdict", "percent", "verdict"]

_MIN_SHARE = 0.01  # of the time; a smaller saving is not worth a dependency
_BALANCED = 1.1  # static imbalance / bound; below this, the router counts as balancing
_PLAIN = 0.005  # of imbalance; a smaller difference is not worth mentioning
_MANY = 100  # times; above this, the exact number does not matter
_TRY = 20  # intervals that are worth recording

Answer = Literal["yes", "longer", "no"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The advice whether to install a rebalancer.

    Args:
        answer: "yes", "longer" (only try a dry run, or record for longer) or "no".
        why: "saves", "too few", "chance", "one expert", "bound", "balanced", "moves" or "changes".
        text: the advice as one paragraph.
        break_even: iterations after which the moves of a rebalance have paid off; None if they never do.
        times: how many times as long the same moves could take before nothing is saved; None if nothing moves, or
            the moves never pay off.
    """

    answer: Answer
    why: str
    text: str
    break_even: float | None
    times: float | None


@dataclass(frozen=True)
class _Case:
    """The numbers that decide, as shares of the time that the text refers to."""

    static: WhatIf
    free: WhatIf  # planned without a price
    priced: WhatIf
    bound: float
    experts_per_gpu: int
    share: float  # of an iteration that is spent in experts, or 1

    @property
    def saved(self) -> float:
        return self.priced.saved * self.share

    @property
    def possible(self) -> float:
        """Saved if every step met the bound."""
        return (1 - self.bound / self.static.imbalance) * self.share

    @property
    def carried_over(self) -> float:
        """Saved by plans without a price, on steps that they had not seen, if moves were free."""
        return (1 - self.free.compute_seconds / self.free.static_seconds) * self.share


def verdict(
    outcomes: Mapping[str, WhatIf],
    *,
    bound: float,
    experts_per_gpu: int,
    bytes_per_slot: int,
    expert_share: float | None = None,
) -> Verdict:
    """Answer yes, no, or that the trace is too short to tell.

    Yes if plans that pay for their moves save 1 % or more, and the 95 % interval is above 0. No if each GPU holds one
    expert, if no placement could save 1 %, if plans save nothing, if the interval ends below 1 %, or if they save less
    than 1 % and the router already balances. Otherwise, or with too few intervals, the trace does not tell.

    Args:
        outcomes: outcomes of the planners `STATIC`, `STEPS` and `PRICED` on the trace, at the same interval.
        bound: lower bound of the mean imbalance of any placement.
        experts_per_gpu: experts on each GPU, without replicas.
        bytes_per_slot: bytes of one expert with its state.
        expert_share: share of an iteration that is spent in experts; if None, the text gives shares of that time.
    """
    share = 1.0 if expert_share is None else expert_share
    case = _Case(outcomes[STATIC], outcomes[STEPS], outcomes[PRICED], bound, experts_per_gpu, share)
    answer, why = _decided(case)
    times, break_even = _times(case.priced), _break_even(case.priced)
    of_what = "the time spent in experts" if expert_share is None else "an iteration"
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
    """Iterations until the moves of a rebalance pay off: the time they take over the time an iteration gains."""
    gained = one.static_seconds - one.compute_seconds  # in as many intervals as there were rebalances
    return one.move_seconds / gained * one.every if gained > 0 else None


def _times(one: WhatIf) -> float | None:
    gained = one.static_seconds - one.compute_seconds
    return gained / one.move_seconds if gained > 0 and one.move_seconds > 0 else None


# --- the paragraph ----------------------------------------------------------------------------------------------

_OPENING = {"yes": "Install it.", "longer": "Do not decide yet.", "no": "Do not install it."}
_REPLICAS = "Going lower takes replicas, which distplb does not train yet."


def _reason(why: str, case: _Case) -> str:
    static, bound = f"{case.static.imbalance:.2f}", f"{case.bound:.2f}"
    return {
        "saves": "",
        "too few": (
            f"The trace has only {_plural(case.priced.rebalances, 'interval')} between rebalances; it takes at least "
            f"{MIN_INTERVALS} to tell a saving from chance."
        ),
        "chance": "The saving may be chance.",
        "one expert": f"With one expert per GPU, every placement has the same imbalance, here {static}. {_REPLICAS}",
        "bound": (
            f"The hottest experts set the pace: imbalance is {static}, and no placement of "
            f"{case.experts_per_gpu} experts per GPU can go below {bound}. {_REPLICAS}"
        ),
        "balanced": f"The router already balances the load: imbalance is {static}, and the lower bound is {bound}."
        + _not_carried_over(case),
        "moves": f"The moves cost too much: if they were free, rebalancing would save {percent(case.carried_over)}.",
        "changes": f"The load changes faster than plans can follow.{_not_carried_over(case)}",
    }[why]


def _not_carried_over(case: _Case) -> str:
    before, after, static = case.free.imbalance_seen, case.free.imbalance, case.static.imbalance
    if after - before < _PLAIN:
        return ""
    return (
        f" Plans reach an imbalance of {before:.3f} on the steps they are made from, but only {after:.3f} on the steps "
        f"after them, against {static:.3f} without rebalancing."
    )


def _saving(case: _Case, of_what: str) -> str:
    one, interval = case.priced, ""
    does = f"save {percent(case.saved)} of" if case.saved >= 0 else f"add {percent(-case.saved)} to"
    if one.low is not None and one.high is not None:
        low, high = (percent(value * case.share, "") for value in (one.low, one.high))
        whose = "" if case.saved >= 0 else " of the saving"
        interval = f" (95 % interval{whose} {low} to {high} %, {_plural(one.rebalances, 'rebalance')})"
    often = "iteration" if one.every == 1 else _plural(one.every, "iteration")
    return (
        f"Rebalancing every {often} would {does} {of_what}, moves included{interval}: "
        f"imbalance {one.imbalance:.3f} instead of {case.static.imbalance:.3f}, lower bound {case.bound:.3f}."
    )


def _repaid(one: WhatIf, bytes_per_slot: int) -> str:
    after, times = _break_even(one), _times(one)
    if not one.slots_moved:
        return "No expert would move."
    if after is None or times is None:
        return "The moves never pay off."
    if times <= 1:
        return (
            f"The moves of a rebalance need {after:.0f} iteration{'s' * (round(after) != 1)} to pay off, but "
            f"rebalances are {one.every} apart."
        )
    took = "within the first iteration" if after <= 1 else f"within {math.ceil(after)} iterations"
    limit = "100 times the bytes or 1/100 of the bandwidth"
    if times < _MANY:
        size, unit = bytes_per_slot * times / 1e6, "MB"
        if size >= 1000:
            size, unit = size / 1000, "GB"
        limit = f"up to {times:.1f} times the bytes ({size:.1f} {unit} per expert) or 1/{times:.1f} of the bandwidth"
    return f"The moves of a rebalance pay off {took}; they would still pay off with {limit}."


_DRY_RUN = 'Rebalancer(..., moves=Moves(dry_run=True), record=Record("run"))'


def _advice(answer: Answer, one: WhatIf) -> str:
    if answer == "yes":
        return f"Check it in your job with a dry run before anything moves: {_DRY_RUN}."
    if answer == "longer":
        iterations = _TRY * one.every
        return f"Record {iterations} iterations or more with {_DRY_RUN}, and replay again."
    return ""


def percent(share: float, unit: str = " %") -> str:
    """A share in percent with one decimal, and no sign before 0."""
    return f"{round(100 * share, 1) + 0.0:.1f}{unit}"


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
