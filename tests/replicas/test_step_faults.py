"""Ranks that are killed, are stopped or raise in each stage of a step: the errors of the others.

Every step has one hot expert, on GPU 0, whose replicas all other GPUs hold. So GPU 0 exchanges messages with everyone,
and the others with GPU 0 only. Each cell has processes of its own; cells mostly wait, so several run at once.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lending import run_slots
from ranks import on_ranks, outcomes_on_ranks

from distplb import DistplbError, Topology
from distplb.core.private_names import backward_number
from distplb.errors import LostRanksError
from distplb.replicas.lend import Lender, Loan
from distplb.replicas.pushes import Pushes
from distplb.replicas.stages import StepStages
from distplb.replicas.step_balancer import StepBalancer

STAGES = ("count", "split", "push", "push again", "bring home")
FAULTS = ("kill", "stop", "raise")
DEADLINE = 5.0
LONG_DEADLINE = 120.0  # longer than a cell may take: who hears of an error only there has not answered
PROCESSES = 20  # side by side
OWN, REPLICAS, TOKENS, DIM = 2, 2, 32, 4

# Where survivors wait for a victim that is the last GPU: the home of the hot expert in the stage on the left, or in the
# first one with a message to it; the others where they next need the home, which has given up, or all ranks.
HOME_WAITS_IN = {"split": "push"}
OTHERS_WAIT_IN = {
    "count": ("count",),
    "split": ("push", "count"),  # the home may give up before or after it has sent to them
    "push": ("push", "count"),
    "push again": ("push again", "bring home"),
    "bring home": ("bring home", "push again"),  # the latter of the layer before
}


class Training:
    """Steps of two layers, so that the buffer of the first is filled again and its replicas are pushed again."""

    def __init__(self, deadline: float) -> None:
        size = dist.get_world_size()
        topology = Topology(1, size)
        self.balancer = StepBalancer(
            topology=topology, num_experts=OWN * size, replica_slots=REPLICAS, deadline=deadline
        )
        self.weights = [torch.ones(OWN, DIM, DIM, requires_grad=True) for _ in range(2)]

    def iterate(self) -> None:
        outputs = [self.forward(layer) for layer in ("first", "second")]
        torch.stack(outputs).sum().backward()

    def forward(self, layer: str) -> torch.Tensor:
        step = self.balancer.dispatch(layer, torch.zeros(TOKENS, 1, dtype=torch.int64))
        assert not step.is_trivial
        rows = torch.ones(int(step.receive.sum()), DIM, requires_grad=True)

        def experts(rows: Any, own: Any, replicas: Any) -> torch.Tensor:
            return run_slots(rows, own, replicas, step.exchange.tokens_of_slot)

        return self.balancer.compute(step, experts, rows, *self.weights).sum()


def broken(stage: str, fault: str, victim: int) -> dict[str, Any]:
    """The outcome on one rank of an iteration in which the victim fails, and of calls after it."""
    rank = dist.get_rank()
    pids = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    pids[rank] = os.getpid()
    dist.all_reduce(pids)
    training = Training(LONG_DEADLINE if fault == "raise" else DEADLINE)
    training.iterate()
    if rank == victim:
        arm(stage, fault)
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {
        "iteration": training.iterate,
        "dispatch": lambda: training.forward("second"),
        "other layer": lambda: training.forward("third"),
    }
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = (type(error).__name__, str(error), isinstance(error, DistplbError))
            found.setdefault("missing", getattr(error, "missing", None))
    if fault == "raise":
        dist.barrier()  # nobody ends before: that would close connections, from which others hear too
    if fault == "stop" and rank == (victim == 0):
        os.kill(int(pids[victim]), signal.SIGKILL)  # a stopped process would stay
    return found


def arm(stage: str, fault: str) -> None:
    """Make this process fail when it next enters the stage."""
    original, entries = StepStages.stage, iter(range(1000))

    @contextmanager
    def entered(self: StepStages, name: str, *sample: Any) -> Iterator[None]:
        with original(self, name, *sample):
            if name == stage and next(entries) == 0:
                if fault == "raise":
                    raise MemoryError("no room")
                os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            yield

    StepStages.stage = entered  # type: ignore[method-assign]


def outcomes(stage: str, fault: str, size: int, victim: int) -> dict[int, dict[str, Any]]:
    """By rank, of those that answered; all but the victim of a kill or stop have to."""
    found = outcomes_on_ranks(size, broken, stage, fault, victim, deadline=DEADLINE + 20)
    lost = [rank for rank, (answered, _) in enumerate(found) if not answered]
    assert lost == ([] if fault == "raise" else [victim]), found
    return {rank: outcome for rank, (answered, outcome) in enumerate(found) if answered}


def check(stage: str, fault: str, victim: int, found: dict[int, dict[str, Any]], where: dict[int, Any]) -> None:
    for rank, outcome in found.items():
        kind, text, is_ours = outcome["iteration"]
        assert is_ours, text
        if rank == victim:
            assert (kind, text) == ("UnforeseenError", f"in stage {stage}: MemoryError('no room')")
            assert outcome["dispatch"] == outcome["other layer"]
            again = f"(an earlier call failed on this rank: in stage {stage}: MemoryError('no room'))"
            assert again in outcome["dispatch"][1]
            continue
        assert kind == "LostRanksError"
        stages = "|".join(where[rank])
        if fault == "raise":
            # On busy cores a rank may wait longer than a look at the store for one that is late, and hear of it there.
            stages = "|".join(STAGES)
            failed = rf"rank {victim} failed: in stage {stage}: MemoryError\('no room'\)"
            assert re.match(rf"in stage ({stages}): a collective failed \(waited .*; {failed}", text), text
            assert outcome["missing"] == ()
        else:
            assert re.match(rf"in stage ({stages}): rank {victim} did not answer \(waited ", text), text
            assert outcome["missing"] == (victim,)
        # The seconds that it waited are in the text: who waited again would tell others.
        assert outcome["dispatch"] == outcome["other layer"] == outcome["iteration"]


Matrix = dict[tuple[str, str], dict[int, dict[str, Any]]]


@pytest.fixture(scope="module", params=[4, 2], ids=["4 ranks", "2 ranks"])
def matrix(request: pytest.FixtureRequest) -> tuple[int, Matrix]:
    """All cells for a number of ranks; the last rank is the victim."""
    size: int = request.param
    cells = [(stage, fault) for fault in ("stop", "kill", "raise") for stage in STAGES]
    with ThreadPoolExecutor(PROCESSES // size) as pool:
        found = pool.map(lambda one: outcomes(*one, size, size - 1), cells)
        return size, dict(zip(cells, found, strict=True))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_all_others_hear_of_it_and_say_where_they_waited(matrix: tuple[int, Matrix], fault: str, stage: str) -> None:
    size, found = matrix
    where: dict[int, Any] = dict.fromkeys(range(size), OTHERS_WAIT_IN[stage])
    where[0] = (HOME_WAITS_IN.get(stage, stage),)
    check(stage, fault, size - 1, found[stage, fault], where)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_victim_may_be_the_home_of_the_hot_expert(fault: str, stage: str) -> None:
    """Then both others have a message with it."""
    where = (HOME_WAITS_IN.get(stage, stage),)
    check(stage, fault, 0, outcomes(stage, fault, 3, 0), dict.fromkeys(range(3), where))


# --- errors that are not losses ---------------------------------------------------------------------------------


def refused_alike() -> list[str]:
    """Rank 1 passes an id that does not exist; later it is late, so that the others look at the store."""
    training = Training(4.0)
    with pytest.raises(DistplbError) as caught:
        training.balancer.dispatch("first", torch.full((3, 1), 99 * dist.get_rank()))
    for _ in range(2):
        if dist.get_rank() == 1:
            time.sleep(1.5)
        training.iterate()
    return [type(caught.value).__name__, str(caught.value)]


def test_what_all_ranks_refuse_alike_is_no_loss() -> None:
    """Each rank reported it as a failure, so the first wait of more than a second was taken for a loss."""
    text = "rank 1 has 3 ids such as 99 in expert_of_token; pass ids in [0, 4)"
    assert on_ranks(2, refused_alike) == [["DistplbError", text]] * 2


def in_the_backward_of_one_rank() -> list[str]:
    """Rank 1 refuses to push again, as with backwards that run side by side; the other one needs its gradients."""
    training = Training(LONG_DEADLINE)
    output = training.forward("first")
    if dist.get_rank() == 1:
        begin = Lender.begin_backward

        def begin_after_another(self: Lender, loan: Loan, runs: Any) -> None:
            self._computing = Loan("layer 'x'", (0, 0), Pushes((), (), 0), REPLICAS)
            self._computing_since = backward_number()
            begin(self, loan, runs)

        Lender.begin_backward = begin_after_another  # type: ignore[method-assign]
    with pytest.raises(DistplbError) as caught:
        output.backward()
    dist.barrier()
    return [type(caught.value).__name__, str(caught.value)]


def test_what_one_rank_refuses_in_its_backward_the_others_hear_at_once() -> None:
    """It was raised outside of any stage, so the others waited until their deadline."""
    (kind, heard), (_, refused) = on_ranks(2, in_the_backward_of_one_rank, deadline=25)
    assert refused.startswith("the replicas of layer 'first' are needed while those of layer 'x' are in use, because ")
    assert kind == LostRanksError.__name__
    assert f"rank 1 failed: {refused}" in heard
