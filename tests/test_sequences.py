"""Whatever is done to a job, and in whichever order: the placement is legal, every expert's rows and state are its own.

Sequences of training steps with rebalances (at once, spread, within a budget), plans, placements of one's own, saves
that are written late, killed and resumed jobs, evaluations; over every rule, way to follow, layout and number of ranks.
The actions run on real ranks, which are kept from one sequence to the next (`sequence_world`).

The suite runs 56 of them. More, of another seed: DISTPLB_SEQUENCES=2000 DISTPLB_SEED=1 pytest tests/test_sequences.py
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sequence_world as ranks
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from pool import Pool
from sequence_world import Setup

RULES = [(rule_, mode) for rule_ in ("groups", "blocks", "classes", "plain") for mode in ("permute", "remap")]
SEQUENCES, SEED = int(os.environ.get("DISTPLB_SEQUENCES", "56")) // len(RULES), os.environ.get("DISTPLB_SEED")
LAYOUTS = ["plain", "dim 0", "dim 1", "flat"]
SEEDS = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Four ranks."""
    made = Pool(4)
    yield made
    made.close()


class Sequences(RuleBasedStateMachine):
    """One job; the test sets what is common to all of its sequences."""

    pool: Pool
    rule: str
    mode: str
    met: Counter[str]

    @initialize(
        number=st.sampled_from([4, 2, 1]),
        layout=st.sampled_from(LAYOUTS),
        spread=st.booleans(),
        max_bytes=st.sampled_from([None, 800, 1600, 3200]),
    )
    def begin(self, number: int, layout: str, spread: bool, max_bytes: int | None) -> None:
        self.setup, self.saves = Setup(number, layout, self.rule, self.mode, spread, max_bytes), 0
        if self.rule == "classes" and self.setup.ep == 1:  # then each expert has a class of its own
            self.setup = replace(self.setup, ranks=4)
        self.pool.call(ranks.build, self.setup, None)

    def act(self, action: str, *args: Any) -> dict[str, Any] | None:
        (met, answer), *_ = self.pool.call(ranks.act, action, *args)
        self.met.update(met)
        self.met[action] += 1
        return answer

    def train(self, micro_batches: int, iterations: int) -> None:
        for _ in range(iterations):
            self.act("train", micro_batches)

    @rule(micro_batches=st.integers(1, 2), iterations=st.integers(1, 2))
    def train_a_little(self, micro_batches: int, iterations: int) -> None:
        self.train(micro_batches, iterations)

    @rule(seed=SEEDS)
    def accumulate(self, seed: int) -> None:
        self.act("accumulate", seed)

    @rule(iterations=st.integers(ranks.EVERY, 2 * ranks.EVERY))
    def train_and_rebalance(self, iterations: int) -> None:
        self.train(1, iterations)

    @rule(seed=SEEDS, planned=st.booleans())
    def apply(self, seed: int, planned: bool) -> None:
        self.act("apply", seed, planned)

    @rule(seed=SEEDS)
    def apply_illegal(self, seed: int) -> None:
        self.act("apply_illegal", seed)

    @rule(how=st.sampled_from(["restore", "logical", "evaluate"]))
    def look_back(self, how: str) -> None:
        self.act(how)

    @rule(late=st.booleans())
    def save(self, late: bool) -> None:
        self.act("save", late)
        self.saves += 1

    @rule()
    def hand_over(self) -> None:
        self.act("hand_over")

    @precondition(lambda self: self.saves)
    @rule(number=st.sampled_from([1, 2, 4]), layout=st.sampled_from(LAYOUTS))
    def kill_and_resume(self, number: int, layout: str) -> None:
        """On another number of ranks and in another layout, but where classes of slots would be others."""
        saved = self.act("end_saves")
        assert saved is not None
        if self.setup.rule != "classes":
            self.setup = replace(self.setup, ranks=number, layout=layout)
        self.pool.call(ranks.build, self.setup, saved)
        self.act("evaluate")
        self.met["resumed"] += 1


@pytest.mark.parametrize(("rule_", "mode"), RULES)
def test_no_sequence_of_actions_makes_another_model_of_it(pool: Pool, rule_: str, mode: str) -> None:
    met = Counter[str]()
    machine = type("Sequence", (Sequences,), {"pool": pool, "rule": rule_, "mode": mode, "met": met})
    options = settings(
        max_examples=SEQUENCES,
        stateful_step_count=8,
        deadline=None,
        derandomize=SEED is None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(machine if SEED is None else seed(int(SEED))(machine), settings=options)
    print(f"{SEQUENCES} sequences, {rule_}, {mode}, seed {SEED}: {dict(met)}")
    # The sequences were not of things that change nothing.
    for what in ("commits", "train", "apply"):
        assert met[what] >= SEQUENCES / 2, (what, met)


def test_a_moment_that_stays_behind_is_noticed(pool: Pool) -> None:
    pool.call(ranks.build, Setup(2, "plain", "plain", "permute", False, None), None)
    pool.call(ranks.forget)
    pool.call(ranks.act, "train", 1)
    with pytest.raises(AssertionError, match=r"experts, exp_avg is off by"):
        pool.call(ranks.act, "apply", 1, False)
