"""Spread rebalances: the same plan, collectives at the agreed iterations, and a valid job in between."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import DIM, EXPERTS, LAYERS, Job, skewed
from ranks import on_ranks
from torch import Tensor

import distplb.train.rebalance
from distplb import DistplbError, LoadWindow, Placement, RebalanceEvent, Spread
from distplb.comm.torchdist import TorchComm

EVERY, CHOOSE, SHARE = 10, 2, 4


class Heard(TorchComm):
    """Records the iteration and thread of each collective call."""

    def __init__(self) -> None:
        super().__init__(deadline=60)
        self.calls: list[tuple[int, str]] = []
        self.iteration = 0
        self.threads: set[bool] = set()

    def note(self, what: str) -> None:
        self.calls.append((self.iteration, what))
        self.threads.add(threading.current_thread() is threading.main_thread())

    def all_reduce_sum(self, tensor: Tensor) -> None:
        self.note("sum")
        super().all_reduce_sum(tensor)

    def all_reduce_min(self, tensor: Tensor) -> None:
        self.note("min")
        super().all_reduce_min(tensor)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        self.note("broadcast")
        super().broadcast(tensor, root)

    def exchange(self, rounds: Any) -> None:
        self.note("exchange")
        super().exchange(rounds)


class Marked(Job):
    """A job in which every expert's elements and moments equal its id; the learning rate is 0, so they stay so."""

    def __init__(self) -> None:
        super().__init__(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.0))
        super().iterate()
        self.window.clear()
        own = len(self.weights[0])
        for layer, weight in enumerate(self.weights):
            number = torch.arange(self.rank * own, (self.rank + 1) * own) + 100.0 * layer
            state = self.optimizer.state[weight]
            for tensor in (weight.data, state["exp_avg"], state["exp_avg_sq"]):
                tensor.copy_(number[:, None, None].expand_as(tensor))

    def count(self, counts: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for layer in range(LAYERS):
            self.window.add(layer, counts[layer], training=True)

    def is_at(self, placement: Placement) -> bool:
        own = len(self.weights[0])
        for layer, weight in enumerate(self.weights):
            expert = placement.expert_of_slot[layer, self.rank * own : (self.rank + 1) * own] + 100.0 * layer
            wanted = expert[:, None, None].expand(own, DIM, 2 * DIM)
            state = self.optimizer.state[weight]
            if not all(torch.equal(t, wanted) for t in (weight.data, state["exp_avg"], state["exp_avg_sq"])):
                return False
        return True


def one_rebalance(spread: Spread | None) -> dict[str, Any]:
    """Run one rebalance and the iterations after it; record each iteration."""
    distplb.train.rebalance._COMMIT_BYTES = 1  # one swap per commit
    comm, job = Heard(), Marked()
    told: list[RebalanceEvent] = []
    rebalancer = job.rebalancer(comm=comm, every=EVERY, spread=spread, on_event=told.append, num_candidates=4)
    digests, valid = [], []
    comm.calls.clear()
    for iteration in range(1, 2 * EVERY):
        comm.iteration = iteration
        job.count(skewed((0, 1)) if iteration <= EVERY else skewed((2,)))
        rebalancer.step()
        digests.append(rebalancer.placement.digest())
        valid.append(job.is_at(rebalancer.placement) and bool(rebalancer.state_dict()))
    [event] = told
    kinds = {when: [what for at, what in comm.calls if at == when] for when, _ in comm.calls}
    return {
        "placement": rebalancer.placement.digest(),
        "planned": event.placement_digest,
        "digests": digests,
        "valid": all(valid),
        "calls": kinds,
        "main thread alone": comm.threads == {True},
        "event": (event.iteration, event.decision, event.slots_moved, event.bytes_moved, event.last_applied),
        "stages": sorted(event.seconds),
        "counted": job.window.seen,
    }


def test_a_spread_rebalance_makes_the_same_plan_a_few_commits_an_iteration() -> None:
    at_once = on_ranks(2, one_rebalance, None)[0]
    ranks = on_ranks(2, one_rebalance, Spread(CHOOSE, SHARE, move_seconds=0))
    for found in ranks:
        assert found["placement"] == found["planned"] == at_once["placement"]
        assert found["event"] == at_once["event"]
        assert found["valid"]
        assert found["main thread alone"]
        assert set(found["stages"]) == {*at_once["stages"], "wait"}
        # Counts of iterations after the beginning of the rebalance survive its moves.
        assert found["counted"] == EVERY - 1
        before, after = found["digests"][: EVERY + SHARE - 1], found["digests"][EVERY + SHARE - 1 :]
        assert len(set(before)) == 1
        changes = [old != new for old, new in zip([before[-1], *after], after, strict=False)]
        commits = sum(changes)
        assert commits >= 2
        assert changes == [True] * commits + [False] * (len(changes) - commits)  # one per iteration, then none
    assert len(set(at_once["digests"])) == 2


def test_collectives_are_called_at_the_iterations_that_were_agreed() -> None:
    for found in on_ranks(2, one_rebalance, Spread(CHOOSE, SHARE, move_seconds=0)):
        calls = found["calls"]
        assert calls.pop(1) == calls.pop(2) == ["min"]  # the first steps check that all state can travel
        # Whether a step was skipped, rank 0's measurements, the header, the counts; then the keys; then the placement
        # and the first commit.
        assert calls[EVERY] == ["min", "broadcast", "min", "sum"]
        assert calls[EVERY + CHOOSE] == ["min"]
        assert calls[EVERY + SHARE][0] == "broadcast"
        assert calls[EVERY + SHARE].count("exchange") == 1
        last = max(calls)
        assert list(calls) == [EVERY, EVERY + CHOOSE, *range(EVERY + SHARE, last + 1)]


def what_the_next_window_tells() -> list[tuple[float, ...] | None]:
    """Imbalances if experts 2 and 3 are hot in every iteration, even while they move."""
    distplb.train.rebalance._COMMIT_BYTES = 1
    job, told = Marked(), list[RebalanceEvent]()
    spread = Spread(1, 2, move_seconds=0)
    rebalancer = job.rebalancer(comm=TorchComm(), every=EVERY, spread=spread, on_event=told.append, num_candidates=4)
    for _ in range(2 * EVERY):
        job.count(skewed((2, 3)).gather(1, rebalancer.placement.expert_of_slot))
        rebalancer.step()
    return [told[0].imbalance_before, told[0].imbalance_after, told[1].imbalance_next, told[1].imbalance_bound]


def test_counts_go_with_their_experts_while_these_move() -> None:
    for before, after, following, bound in on_ranks(2, what_the_next_window_tells):
        assert before == pytest.approx((200 / 120,) * LAYERS)
        assert after == following == bound == pytest.approx((1.0,) * LAYERS)


def interrupted() -> dict[str, Any]:
    """Interrupt a rebalance in the middle of its moves."""
    distplb.train.rebalance._COMMIT_BYTES = 1
    found: dict[str, Any] = {}
    for what in ("checkpoint", "apply", "disabled", "loaded"):
        job, told = Marked(), list[RebalanceEvent]()
        spread = Spread(1, 2, move_seconds=0)
        rebalancer = job.rebalancer(comm=TorchComm(), every=EVERY, spread=spread, on_event=told.append)
        first = rebalancer.placement
        other = Placement(torch.arange(EXPERTS).flip(0).expand(LAYERS, -1), EXPERTS, 2)
        for iteration in range(1, 2 * EVERY):
            job.count(skewed((0, 1)))
            rebalancer.step()
            if iteration != EVERY + 2:
                continue
            middle = rebalancer.placement
            assert middle != first
            assert not told
            if what == "checkpoint":
                with rebalancer.in_logical_order():
                    assert job.is_at(Placement.contiguous(LAYERS, EXPERTS, 2))
                assert rebalancer.placement == middle
            elif what == "apply":
                rebalancer.apply(other)
            elif what == "disabled":
                rebalancer.enabled = False
            else:
                rebalancer.load_state_dict(rebalancer.state_dict())
        wanted = {"apply": other.digest(), "checkpoint": told[0].placement_digest if told else 0}
        found[what] = (
            job.is_at(rebalancer.placement),
            len(told),
            rebalancer.placement.digest() == wanted.get(what, middle.digest()),
            rebalancer.last_applied,
        )
    return found


def test_what_comes_in_between_drops_it_but_for_a_checkpoint() -> None:
    for found in on_ranks(2, interrupted):
        assert found == {
            "checkpoint": (True, 1, True, EVERY),
            "apply": (True, 0, True, 0),
            "disabled": (True, 0, True, 0),
            "loaded": (True, 0, True, 0),
        }


def failing(stage: str) -> str:
    job = Marked()
    rebalancer = job.rebalancer(comm=TorchComm(deadline=30), every=2, spread=Spread(0, 1), num_candidates=2)
    if dist.get_rank() == 0:

        def fail(*_: object) -> None:
            raise MemoryError("no room")

        setattr(distplb.planning.plan.Problem, {"search": "costs", "polish": "polish"}[stage], fail)
    try:
        for _ in range(4):
            job.count(skewed((0, 1)))
            rebalancer.step()
    except DistplbError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("stage", ["search", "polish"])
def test_what_fails_beside_the_training_is_raised_on_all_ranks_by_the_next_collective(stage: str) -> None:
    assert on_ranks(2, failing, stage) == [f"rank 0: in stage {stage}: MemoryError('no room')"] * 2


def refused() -> list[str]:
    job, texts = Job(), []
    for options in (
        {"spread": Spread(1, 2), "every": 2},
        {"spread": Spread(1, 2 + job.rank), "every": 9},
        {"spread": Spread(1, 2) if job.rank else None, "every": 9},
    ):
        try:
            job.rebalancer(**options)
        except DistplbError as error:
            texts.append(str(error))
    return texts


def test_offsets_that_do_not_fit_or_differ_are_refused() -> None:
    for texts in on_ranks(2, refused):
        assert "spread has share_after 2, but every is 2; pass a share_after below 2, or a larger every" in texts[0]
        assert texts[1].startswith("ranks disagree on spread (digest)")
        assert texts[2].startswith("ranks disagree on spread (digest)")
    for wrong in ((2, 1, 0.1), (-1, 1, 0.1), (0, 0, -1.0)):
        with pytest.raises(DistplbError, match="pass values such as"):
            Spread(*wrong)


def test_counts_of_each_layer_are_renamed_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    window = LoadWindow(3, 5, 4)
    counts = torch.randint(100, (4, 3, 5), generator=generator)
    for step in counts:
        for layer in range(3):
            window.add(layer, step[layer], training=True)
    address = window._counts.data_ptr()
    source = torch.stack([torch.randperm(5, generator=generator), torch.arange(5), torch.randperm(5)])
    window.rename(source)
    assert torch.equal(window.load(), counts.gather(2, source.expand(4, -1, -1)))
    assert window._counts.data_ptr() == address  # captured graphs write there
