"""After any sequence of actions the placement is legal, and every expert has its own rows and state.

The sequences mix training steps with rebalances (at once, spread, within a budget), plans, placements set manually,
saves that are written late, killed and resumed jobs, and evaluations, over all rules, modes (permute, remap), layouts
and numbers of ranks. The actions run on real ranks, which are kept from one sequence to the next (`sequence_world`).

The suite runs 56 sequences. To run more, with another seed:
DISTPLB_SEQUENCES=2000 DISTPLB_SEED=1 pytest tests/train/test_sequences.py
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import fsdp2
import pytest
import sequence_world as ranks
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pool import Pool
from sequence_world import Setup

RULES = list(product(("groups", "blocks", "classes", "plain"), ("permute", "remap")))
SEQUENCES, SEED = int(os.environ.get("DISTPLB_SEQUENCES", "56")) // len(RULES), int(os.environ.get("DISTPLB_SEED", "0"))
# Number of ranks and layout, spread or not, and max_bytes; cases with more to move come up more often.
LAYOUTS = ("plain", *(("dim 0", "dim 1") if fsdp2.RUNS else ()), "flat", "own")
PLACES = [*product((4, 2, 1), LAYOUTS), (2, "plain"), (4, "plain"), (4, "own")]
SETUPS = list(product(PLACES, (True, False), (1600, 800, None, 3200)))
ACTIONS = (
    *("train", "train", "train", "rebalance", "rebalance", "rebalance", "accumulate", "evaluate"),
    *("apply", "apply", "plan", "illegal", "restore", "logical", "hand over"),
    *("save", "save late", "save late", "resume", "resume elsewhere"),
)
SEEDS = st.integers(0, 2**16 - 1)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """A pool of four ranks."""
    made = Pool(4)
    yield made
    made.close()


class Job:
    """The job that a sequence acts on.

    Args:
        pool: the pool of ranks.
        setup: the initial setup.
        met: counts actions and events.
    """

    def __init__(self, pool: Pool, setup: Setup, met: Counter[str]) -> None:
        self.pool, self.met, self.saves = pool, met, 0
        self._build(setup, None)

    def do(self, action: str, number: int) -> None:
        """Run one action; the number chooses among its variants."""
        self.met[action] += 1
        if action == "train":
            self._act("train", 1 + number % 2)
        elif action == "rebalance":
            for _ in range(ranks.EVERY + number % 3):
                self._act("train", 1)
        elif action in ("apply", "plan"):
            self._act("apply", number, action == "plan")
        elif action == "illegal":
            self._act("apply_illegal", number)
        elif action in ("save", "save late"):
            self._act("save", action == "save late")
            self.saves += 1
        elif action in ("resume", "resume elsewhere"):
            self._resume(PLACES[number % len(PLACES)] if action == "resume elsewhere" else None)
        elif action == "accumulate":
            self._act("accumulate", number)
        else:
            self._act(action.replace(" ", "_"))

    def _resume(self, place: tuple[int, str] | None) -> None:
        """Kill the job and resume from its last save; at another place unless slot classes would differ there."""
        if not self.saves:
            return
        saved = self._act("end_saves")
        assert saved is not None
        setup = self.setup
        if place is not None and setup.rule != "classes":
            # A tensor of several experts has one step count for all; with one tensor per expert they may differ.
            layout = "own" if setup.layout == "own" else place[1]
            setup = replace(setup, ranks=place[0], layout=layout)
        self._build(setup, saved)
        self._act("evaluate")
        self.met["resumed"] += 1

    def _build(self, setup: Setup, saved: dict[str, Any] | None) -> None:
        if setup.rule == "classes" and setup.ep == 1:  # each expert would have its own class
            setup = replace(setup, ranks=4)
        self.setup = setup
        self.pool.call(ranks.build, setup, saved)

    def _act(self, action: str, *args: Any) -> dict[str, Any] | None:
        (met, answer), *_ = self.pool.call(ranks.act, action, *args)
        self.met.update(met)
        return answer


@pytest.mark.parametrize(("rule", "mode"), RULES)
def test_no_sequence_of_actions_makes_another_model_of_it(pool: Pool, rule: str, mode: str) -> None:
    met = Counter[str]()

    def sequence(place: Any, actions: list[tuple[str, int]]) -> None:
        (number, layout), spread, max_bytes = place
        job = Job(pool, Setup(number, layout, rule, mode, spread, max_bytes), met)
        # At the end, any job can be saved and can resume at another place.
        for action, which in [*actions, ("save late", 0), ("resume elsewhere", actions[0][1]), ("rebalance", 0)]:
            job.do(action, which)

    options = settings(
        max_examples=SEQUENCES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    actions = st.lists(st.tuples(st.sampled_from(ACTIONS), SEEDS), min_size=8, max_size=12)
    drawn = options(given(place=st.sampled_from(SETUPS), actions=actions)(sequence))
    seed(SEED * len(RULES) + RULES.index((rule, mode)))(drawn)()
    print(f"{SEQUENCES} sequences, {rule}, {mode}, seed {SEED}: {dict(met)}")
    assert not met["layer that stays"], met
    # Enough actions have changed something.
    for what in ("commits", "rebalance", "apply", "resumed", "save late"):
        assert met[what] >= SEQUENCES // 4, (what, met)


def test_a_moment_that_stays_behind_is_noticed(pool: Pool) -> None:
    pool.call(ranks.build, Setup(2, "plain", "plain", "permute", False, None), None)
    pool.call(ranks.forget)
    pool.call(ranks.act, "train", 1)
    with pytest.raises(AssertionError, match=r"experts, exp_avg is off by"):
        pool.call(ranks.act, "apply", 1, False)
