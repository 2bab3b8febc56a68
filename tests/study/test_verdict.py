"""The answer on a trace: when moves have paid off, what decides, and the paragraph that says so."""

from __future__ import annotations

import re
from typing import Any

import pytest

from distplb.study.verdict import Verdict, verdict
from distplb.study.what_if import PRICED, STATIC, STEPS, WhatIf


def outcome(saved: float = 0.2, low: float | None = 0.1, high: float | None = 0.3, **others: Any) -> WhatIf:
    numbers = {"every": 50, "rebalances": 9, "imbalance": 1.1, "imbalance_seen": 1.05, "worst_step": 1.2}
    seconds = {"slots_moved": 40, "compute_seconds": 75.0, "move_seconds": 5.0, "static_seconds": 100.0}
    return WhatIf(**{**numbers, **seconds, "saved": saved, "low": low, "high": high, **others})


def advised(priced: WhatIf, free: WhatIf | None = None, static: float = 1.4, **options: Any) -> Verdict:
    outcomes = {
        STATIC: outcome(imbalance=static, imbalance_seen=static),
        STEPS: free or priced,
        PRICED: priced,
    }
    return verdict(outcomes, **{"bound": 1.01, "experts_per_gpu": 8, "bytes_per_slot": 10**9} | options)


def test_yes_says_what_is_saved_how_surely_and_when_moves_have_repaid_themselves() -> None:
    advice = advised(outcome())
    assert (advice.answer, advice.why) == ("yes", "saves")
    # 25 s are gained by 9 rebalances that took 5 s: a fifth of 50 iterations each.
    assert advice.break_even == pytest.approx(10)
    assert advice.times == pytest.approx(5)
    assert advice.text == (
        "Install it. Rebalancing every 50 iterations would save 20.0 % of the time spent in experts, moves included "
        "(95 % interval 10.0 to 30.0 %, 9 rebalances): imbalance 1.100 instead of 1.400, lower bound 1.010. The moves "
        "of a rebalance pay off within 10 iterations; they would still pay off with up to 5.0 times the bytes (5.0 GB "
        "per expert) or 1/5.0 of the bandwidth. Check it in your job with a dry run before anything moves: "
        'Rebalancer(..., moves=Moves(dry_run=True), record=Record("run")).'
    )


def test_a_share_of_the_iteration_is_told_and_decided_by() -> None:
    advice = advised(outcome(), expert_share=0.3)
    assert advice.answer == "yes"
    assert "save 6.0 % of an iteration, moves included (95 % interval 3.0 to 9.0 %" in advice.text
    assert advised(outcome(), expert_share=0.03).answer == "no"


@pytest.mark.parametrize(
    ("priced", "options", "answer", "why", "words"),
    [
        (outcome(low=None, high=None, rebalances=1), {}, "longer", "too few", "only 1 interval .* at least 4 to tell"),
        (outcome(0.05, -0.02, 0.12), {}, "longer", "chance", "may be chance.*Record 1000 iterations or more"),
        (outcome(-0.05, -0.2, 0.12), {}, "no", "moves", "add 5.0 % to .*interval of the saving -20.0 to 12.0 %"),
        (outcome(0.004, 0.001, 0.008), {}, "no", "moves", "if they were free, rebalancing would save 25.0 %"),
        (outcome(), {"experts_per_gpu": 1}, "no", "one expert", "one expert per GPU, every placement.*takes replicas"),
        (outcome(), {"bound": 1.395, "experts_per_gpu": 2}, "no", "bound", "of 2 experts per GPU can go below 1.4"),
        (outcome(), {"static": 1.015}, "no", "balanced", "router already balances the load: imbalance is 1.01"),
        (outcome(0.001, -0.003, 0.005), {"static": 1.05}, "no", "balanced", "of 1.050 on the .* only 1.100 on the"),
        (outcome(0, 0, 0, slots_moved=0, move_seconds=0.0), {}, "no", "moves", "No expert would move"),
    ],
)
def test_other_answers_have_their_reason(
    priced: WhatIf, options: dict[str, Any], answer: str, why: str, words: str
) -> None:
    advice = advised(priced, **options)
    assert (advice.answer, advice.why) == (answer, why)
    assert re.search(words, advice.text), advice.text
    assert advice.text.startswith({"no": "Do not install it.", "longer": "Do not decide yet."}[answer])


def test_no_where_plans_do_not_last() -> None:
    none = outcome(0, 0, 0, slots_moved=0, compute_seconds=100.0, move_seconds=0.0, imbalance=1.4)
    advice = advised(none, free=outcome(-0.3, -0.4, -0.2, compute_seconds=100.5, imbalance=1.41, imbalance_seen=1.1))
    assert (advice.answer, advice.why, advice.break_even, advice.times) == ("no", "changes", None, None)
    assert "imbalance of 1.100 on the steps they are made from, but only 1.410 on the steps after" in advice.text
