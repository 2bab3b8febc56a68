"""The doctor's step with replicas: right on real ranks, and WRONG for each thing that can arrive wrong."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from ranks import on_ranks

from distplb import Topology
from distplb.cli.main import main
from distplb.comm.torchdist import TorchComm
from distplb.core.private_names import backward_number
from distplb.doctor import collective_checks, known_step, lent_layer, replica_check
from distplb.doctor.examine import Examination, examine_ranks
from distplb.doctor.finding import Finding, Timing
from distplb.doctor.known_step import LAYERS, SLOTS_PER_GPU, KnownStep
from distplb.doctor.replica_check import step_with_replicas
from distplb.replicas.lend import Lender
from distplb.replicas.step_balancer import StepBalancer

CPU = torch.device("cpu")
BUG = "do not lend replicas in this environment, and report this as a bug of distplb"
NETWORK = "experts without replicas are wrong too, so check the GPUs, the network and its driver first"
MIB = 1 << 20


def checked(topology: Topology) -> tuple[list[Finding], list[Timing]]:
    results = list(step_with_replicas(topology, 60.0))
    return [one for one in results if isinstance(one, Finding)], [one for one in results if isinstance(one, Timing)]


# --- the known step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "tokens"),
    [
        (Topology(1, 2), [128, 128]),
        (Topology(1, 3), [128, 128, 0]),
        (Topology(2, 2), [128, 128, 128, 0]),
        (Topology(2, 1), [128, 128]),
    ],
)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_gpu_of_each_node_is_hot_and_a_token_has_different_experts(
    topology: Topology, tokens: list[int], layer: int
) -> None:
    slots = [KnownStep(topology, rank, CPU).slot_of_token(layer) for rank in range(topology.num_gpus)]
    assert [len(one) for one in slots] == tokens
    everywhere = torch.cat(slots)
    assert everywhere[:, 0].ne(everywhere[:, 1]).all()
    load = everywhere.flatten().bincount(minlength=SLOTS_PER_GPU * topology.num_gpus).view(-1, SLOTS_PER_GPU).sum(1)
    near = known_step.reach(topology)
    for node in load.view(-1, near).tolist():
        assert node[-(layer % 2)] > 2 * min(node)


def test_the_answer_is_exact_also_in_float64_and_if_products_round_their_inputs_to_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some containers of NVIDIA switch TF32 on for products in float32; it has more digits than bfloat16."""
    step = KnownStep(Topology(1, 2), 1, CPU)
    answer = step.answer(1)
    values: list[float] = []

    def rounded(rows: Any, w_in: Any, w_out: Any) -> Any:
        hidden = torch.relu(Product.apply(rows.double(), w_in.double()))
        return Product.apply(hidden, w_out.double()).float()

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Any, b: Any) -> Any:
            ctx.save_for_backward(a, b)
            return product(a, b)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            a, b = ctx.saved_tensors
            return product(gradient, b.T), product(a.T, gradient)

    def product(a: Any, b: Any) -> Any:
        values.append(float((a.abs() @ b.abs()).max()))  # no partial sum is greater
        return a.bfloat16().double() @ b.bfloat16().double()

    monkeypatch.setattr(known_step, "expert", rounded)
    other = step.answer(1)
    for name in ("outputs", "rows", "w_in", "w_out"):
        assert torch.equal(getattr(answer, name), getattr(other, name)), name
        assert getattr(answer, name).count_nonzero() > getattr(answer, name).numel() / 2
    assert 0 < max(values) < 1 << 24


# --- on ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "replicas", "before", "after", "end"),
    [
        (Topology(1, 2), 6, "1.74", "1.00", "with them"),
        (Topology(1, 3), 6, "2.34", "1.00", "with them"),
        (Topology(2, 2), 9, "1.97", "1.16", "with them, which even out the GPUs of a node, but not nodes"),
        (
            Topology(2, 1),
            6,
            "1.74",
            "1.00",
            "with them; here between nodes, where StepBalancer lends none unless you pass push_price",
        ),
    ],
)
def test_replicas_are_lent_and_all_results_are_exact(
    topology: Topology, replicas: int, before: str, after: str, end: str
) -> None:
    for findings, timings in on_ranks(topology.num_gpus, checked, topology):
        assert findings == [
            Finding(
                "ok",
                "replicas",
                f"{replicas} lent in 3 layers; imbalance {before} without them, {after} {end}",
            )
        ]
        assert [one.bytes is None for one in timings] == [True, True, False, False, False]
        assert all(one.seconds > 0 for one in timings[:2])


FAULTS: dict[str, Callable[[], Any]] = {}


def fault(body: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
    FAULTS[body.__name__] = contextmanager(body)
    return body


@fault
def a_push_of_wrong_rows() -> Iterator[None]:
    finish = Lender.finish

    def wrongly(lender: Any, loan: Any) -> None:
        finish(lender, loan)
        for rows in loan.replica_rows:
            rows += 1

    with patch.object(Lender, "finish", wrongly):
        yield


@fault
def a_push_that_delivers_nan() -> Iterator[None]:
    finish = Lender.finish

    def wrongly(lender: Any, loan: Any) -> None:
        finish(lender, loan)
        for rows in loan.replica_rows:
            rows.fill_(torch.nan)

    with patch.object(Lender, "finish", wrongly):
        yield


@fault
def no_push_again() -> Iterator[None]:
    """Only in name: what the forward of a later layer has left is still there."""
    push = Lender._push

    def without(lender: Any, loan: Any, stage: str) -> None:
        if stage == "push again":
            lender._held, lender._held_since = loan, backward_number()
            with lender.stages.stage(stage):
                return
        push(lender, loan, stage)

    with patch.object(Lender, "_push", without):
        yield


@fault
def a_lost_gradient() -> Iterator[None]:
    bring_home = Lender.bring_home

    def losing(lender: Any, loan: Any, home: Any, lent: Any) -> None:
        if dist.get_rank() == 1 and loan.pushes.receives:
            slot = loan.pushes.receives[0].slot
            lent = [lent[0].index_fill(0, torch.tensor(slot), 0), *lent[1:]]
        bring_home(lender, loan, home, lent)

    with patch.object(Lender, "bring_home", losing):
        yield


@fault
def rows_in_another_order() -> Iterator[None]:
    exchanged = lent_layer._exchanged

    def reversed_(*args: Any) -> Any:
        return exchanged(*args).flip(0)

    with patch.object(lent_layer, "_exchanged", reversed_):
        yield


@fault
def no_replica() -> Iterator[None]:
    def without(**options: Any) -> StepBalancer:
        return StepBalancer(**{**options, "replica_slots": 0})

    with patch.object(replica_check, "StepBalancer", without):
        yield


def with_faults() -> dict[str, list[str]]:
    """What is wrong, by fault."""
    told = {}
    for name, patched in FAULTS.items():
        with patched():
            findings, _ = checked(Topology(1, 2))
        told[name] = [one.text for one in findings if one.level == "WRONG"]
    return told


OUTPUTS, ROWS, EXPERTS = "the outputs of tokens", "the gradients of tokens", "the gradients of experts"


@pytest.fixture(scope="module")
def told_on_ranks() -> list[dict[str, list[str]]]:
    return on_ranks(2, with_faults)


@pytest.mark.parametrize(
    ("name", "on_rank_0", "on_rank_1", "remedy"),
    [
        ("a_push_of_wrong_rows", [OUTPUTS, ROWS, EXPERTS], [OUTPUTS, ROWS, EXPERTS], BUG),
        ("a_push_that_delivers_nan", [OUTPUTS, ROWS, EXPERTS], [OUTPUTS, ROWS, EXPERTS], BUG),
        ("no_push_again", [ROWS, EXPERTS], [ROWS], BUG),
        ("a_lost_gradient", [EXPERTS], [], BUG),
        ("rows_in_another_order", [OUTPUTS, ROWS, EXPERTS], [OUTPUTS, ROWS, EXPERTS], NETWORK),
    ],
)
def test_what_is_wrong_is_told_by_what_it_is_and_whether_replicas_took_part(
    name: str, on_rank_0: list[str], on_rank_1: list[str], remedy: str, told_on_ranks: list[dict[str, list[str]]]
) -> None:
    for expected, told in zip((on_rank_0, on_rank_1), told_on_ranks, strict=True):
        found = []
        for text in told[name]:
            match = re.fullmatch(
                r"(the \w+ of) (\d+) (\w+) are wrong, (\d+) of them (?:computed by|with) replicas; (.*)", text
            )
            assert match is not None, text
            assert (0 < int(match[4]) < int(match[2])) if remedy == NETWORK else (0 < int(match[4]) == int(match[2]))
            assert match[5] == remedy
            found.append(f"{match[1]} {match[3]}")
        assert found == expected


def test_a_step_in_which_nothing_is_lent_proves_nothing(told_on_ranks: list[dict[str, list[str]]]) -> None:
    for told in told_on_ranks:
        assert told["no_replica"] == [f"none was lent in 3 of 3 uneven layers; {BUG}"]


# --- failures ---------------------------------------------------------------------------------------------------


def examined(what: str) -> tuple[Examination, float]:
    """Examine the ranks; rank 1 fails in the way that `what` names."""
    deadline = 4.0 if what == "late" else 60.0
    comm = TorchComm(deadline=deadline)
    collective_checks._SIZES = (MIB,)
    if comm.rank == 1:
        expert = lent_layer.expert

        def failing(*args: Any) -> Any:
            if what == "late":
                time.sleep(8)
                lent_layer.expert = expert
            elif what == "raises":
                raise MemoryError("no memory left")
            return expert(*args) + (what == "wrong")

        lent_layer.expert = failing
    began = time.monotonic()
    found = examine_ranks(comm, Topology(1, comm.size), Examination(), deadline)
    return found, time.monotonic() - began


def wrong_on_ranks(what: str) -> list[list[Finding]]:
    outcomes = on_ranks(2, examined, what)
    for found, _ in outcomes:
        assert found.is_wrong
        assert [one.what for one in found.timings][-1].startswith("- bring home" if what == "wrong" else "move of")
    assert what == "late" or all(seconds < 60 for _, seconds in outcomes)  # nobody waited for the deadline
    return [[one for one in found.findings if one.level != "ok"] for found, _ in outcomes]


def test_what_is_wrong_on_one_rank_is_told_on_all() -> None:
    first, second = wrong_on_ranks("wrong")
    assert first == second
    assert {one.what for one in first} == {"replicas"}
    assert any(one.text.startswith("rank 1: the outputs of ") for one in first)


def test_a_rank_that_does_not_come_to_the_step_is_named() -> None:
    ((_, what, text),), ((_, other, _),) = wrong_on_ranks("late")
    assert what == other == "ranks"
    assert "rank 1 did not answer" in text


def test_an_error_of_one_rank_in_the_step_is_told_on_all() -> None:
    ((_, what, text),), ((_, other, own),) = wrong_on_ranks("raises")
    assert what == other == "ranks"
    assert "rank 1 failed: no memory left" in text
    assert own == "MemoryError('no memory left')"


# --- where it cannot run ----------------------------------------------------------------------------------------


def test_one_process_and_ranks_of_mpi_are_told_that_replicas_are_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """StepBalancer needs torch.distributed, for which mpiexec sets no variables."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "0"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert "collectives, moves and steps with replicas not tested; run torchrun" in result.stdout
