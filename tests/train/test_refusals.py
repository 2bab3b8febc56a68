"""Refusals come early: for wrong arguments on construction, for state that cannot travel at the first step."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import DIM, EXPERTS, FREE, LAYERS, Job, skewed
from ranks import errors_on_ranks, on_ranks
from torch import nn

from distplb import (
    DistplbError,
    FlatShard,
    LoadWindow,
    MoELayer,
    Moves,
    Placement,
    Rebalancer,
    Record,
    Spread,
    Topology,
    Trace,
    TraceWriter,
    plan,
    read_events,
)
from distplb.comm.mpi import MpiComm
from distplb.comm.torchdist import TorchComm
from distplb.records.events import RebalanceEvent

# --- at the first step -----------------------------------------------------------------------------------------------


def at_first(case: str) -> str:
    """The error of the first step, a thousand steps before a rebalance."""
    job = Job(torch.optim.Adafactor if case == "adafactor" else torch.optim.AdamW)
    rebalancer = job.rebalancer(every=1000)
    job.iterate()
    if case == "backward" and dist.get_rank() == 1:
        job.backward()
    if case == "other optimizer" and dist.get_rank() == 1:
        job.backward()
        other = torch.optim.Adam(job.weights)  # held until the end: the rebalancer keeps no optimizer alive
        other.step()
        job.optimizer.step()
    if case == "disabled":
        rebalancer.enabled = False
        job.backward()
    try:
        rebalancer.step()
    except DistplbError as error:
        return str(error)
    return "no error"


AT_FIRST = {
    "adafactor": "rank 0: moe.0.experts.w:col_var of Adafactor is torch.float32 of shape",
    "backward": "rank 1: a backward pass has begun since the optimizer's last step",
    "other optimizer": "rank 1: moe.0.experts.w is stepped on by an optimizer (Adam) that was not passed to the Reb",
    "disabled": "no error",
    "nothing": "no error",
}


@pytest.mark.parametrize("case", AT_FIRST)
def test_what_cannot_travel_is_refused_at_the_first_step(case: str) -> None:
    """It ended the job a thousand iterations later."""
    for text in errors_on_ranks(2, at_first, case, deadline=60):
        assert text.startswith(AT_FIRST[case])


def skipping_steps() -> list[tuple[int, bool]]:
    """By iteration, whether experts have moved; the optimizer skips 1, 2 and 4, as gradient scalers do on overflow."""
    weight = nn.Parameter(torch.randn(EXPERTS, DIM))
    shard = nn.Parameter(weight.detach().flatten().clone())
    router = nn.Parameter(torch.randn(EXPERTS, DIM))
    optimizer = torch.optim.AdamW([shard, router])
    layer = MoELayer(
        name="moe", experts={"w": weight}, router={"weight": router}, shards={"w": FlatShard(shard, start=0)}
    )
    window = LoadWindow(1, EXPERTS, 4)
    events: list[RebalanceEvent] = []
    rebalancer = Rebalancer(
        [layer],
        optimizer,
        topology=Topology(1, 1),
        every=2,
        window=window,
        moves=Moves(model=FREE),
        record=Record(on_event=events.append),
    )
    for iteration in range(1, 7):
        window.add(0, torch.arange(EXPERTS), training=True)
        (weight.square().sum() + router.square().sum()).backward()
        if iteration not in (1, 2, 4):
            shard.grad = weight.grad.flatten().clone()  # type: ignore[union-attr]  # of this backward pass
            optimizer.step()
        weight.grad = None
        optimizer.zero_grad()
        rebalancer.step()
    return [(event.iteration, event.decision != "skipped") for event in events if event.imbalance_next is None]


def test_a_step_that_a_scaler_skips_puts_a_rebalance_off_and_ends_nothing() -> None:
    """Scalers begin with such steps: the first check would have ended every job whose optimizer steps on shards."""
    assert skipping_steps() == [(3, True), (5, True), (6, True)]


# --- skipped instead -------------------------------------------------------------------------------------------------


def skipping(at: int) -> dict[str, Any]:
    """Six iterations; from one on, rank 1 has a backward pass under way when it calls the rebalancer."""
    job = Job()
    told: list[RebalanceEvent] = []
    rebalancer = job.rebalancer(on_refusal="skip", on_event=told.append, stop_loss=0, comm=TorchComm(deadline=60))
    before = [weight.detach().clone() for weight in job.weights]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for iteration in range(1, 7):
            job.iterate(skewed((iteration % 4, 1 + iteration % 4)))
            if iteration >= at and dist.get_rank() == 1:
                job.backward()
            rebalancer.step()
    return {
        "decisions": [(event.iteration, event.decision) for event in told if event.imbalance_next is None],
        "reasons": {event.reason for event in told if event.decision == "skipped"},
        "warned": [str(one.message) for one in caught if "distplb" in str(one.message)],
        "trained": all(not torch.equal(a, b) for a, b in zip(before, job.weights, strict=True)),
        "iteration": rebalancer.iteration,
    }


def test_training_goes_on_where_a_refusal_is_to_be_skipped() -> None:
    for at, wanted in (
        (1, [(1, "skipped"), (2, "skipped"), (4, "skipped"), (6, "skipped")]),
        (4, [(2, "moved"), (4, "skipped"), (6, "skipped")]),
    ):
        for found in on_ranks(2, skipping, at, deadline=60):
            assert found["decisions"] == wanted
            (reason,) = found["reasons"]
            assert reason.startswith("rank 1: a backward pass has begun since the optimizer's last step")
            assert found["warned"] == [f"distplb has skipped a rebalance: {reason}"]  # once
            assert found["trained"]
            assert found["iteration"] == 6


# --- when built ------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Any, str]] = {
    "model": (5, "Moves: model is 5; pass a MoveModel"),
    "slot_class": ([0, 1] * (EXPERTS // 2), "slot_class is a list; pass a tensor of integers, one for each slot"),
    "seed": (1.5, "seed is 1.5; pass an integer"),
    "num_candidates": ("16", "num_candidates is '16'; pass an integer"),
    "engine": (1, "engine is 1; pass the name of an engine, or None for the fastest"),
    "time_curve": (2.5, "time_curve is 2.5; pass a TimeCurve, such as measured_curve returns"),
    "spread": ((2, 4), "Moves: spread is a tuple; pass a Spread"),
    "window": (1.5, "window is 1.5; pass a LoadWindow, or how many steps to keep"),
    "gpu": ("0", "gpu is '0'; pass this rank's index in its EP group"),
    "topology": ((1, 1), "topology is a tuple; pass a Topology, such as Topology.from_env()"),
    "folder": (7, "Record: folder is 7; pass the path of a folder"),
    "dry_run": ("no", "Moves: dry_run is 'no'; pass True or False"),
    "on_event": ("print", "Record: on_event is 'print'; pass a function"),
    "on_refusal": ("ignore", "Moves: on_refusal is 'ignore'; pass 'raise' or 'skip'"),
    "every": (2.0, "every is 2.0; pass iterations, at least 1, or None"),
    "max_bytes": (1e9, "Moves: max_bytes is 1000000000.0; pass an integer of at least 0"),
    "comm": (
        "gloo",
        "comm is 'gloo'; pass a communicator, such as TorchComm(group) from distplb.comm.torchdist, or None for this "
        "process alone",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_of_a_wrong_type_is_refused_when_built(name: str) -> None:
    value, words = WRONG[name]
    with pytest.raises(DistplbError) as refused:
        Job(ranks=1).rebalancer(**{name: value})
    assert str(refused.value) == words


def test_a_communicator_that_only_plans_is_refused_when_built() -> None:
    """A job learned of it at its first move."""
    comm = MpiComm.__new__(MpiComm)  # without MPI
    with pytest.raises(DistplbError, match="MpiComm only plans and cannot move experts; pass a TorchComm to move them"):
        Job(ranks=1).rebalancer(comm=comm)


@pytest.mark.parametrize("name", ["slot_class", "seed", "num_candidates", "engine", "time_curve"])
def test_plan_refuses_it_too(name: str) -> None:
    value, words = WRONG[name]
    with pytest.raises(DistplbError) as refused:
        plan(torch.ones(1, EXPERTS, dtype=torch.int64), Topology(1, 2), **{name: value})
    assert str(refused.value) == words


def test_layers_and_optimizers_are_named_by_their_number() -> None:
    job = Job(ranks=1)
    with pytest.raises(DistplbError, match=r"^layers\[1\] is a Linear; pass a MoELayer$"):
        job.rebalancer([job.layers()[0], nn.Linear(1, 1)])  # type: ignore[list-item]
    job.optimizer = [job.optimizer, torch.optim.lr_scheduler.ConstantLR(job.optimizer)]
    with pytest.raises(DistplbError, match=r"^optimizer\[1\] is a ConstantLR; pass an optimizer$"):
        job.rebalancer()
    job.optimizer = None
    with pytest.raises(DistplbError, match=r"^optimizer is None; pass the optimizer, or a list of all$"):
        job.rebalancer()


def refused(job: Job, **options: Any) -> str:
    try:
        job.rebalancer(**options).close()
    except DistplbError as error:
        return str(error)
    return "no error"


def wrong_on_one(folder: Path) -> list[str]:
    """Errors if one rank refuses an argument (rank 1) or the folder to write (rank 0); a valid build succeeds after."""
    job = Job()
    wrong = refused(job, spread=(1, 2) if dist.get_rank() == 1 else Spread(0, 1))
    return [wrong, refused(job, folder=folder), refused(job, folder=folder / "own")]


def test_what_one_rank_refuses_is_known_to_all(tmp_path: Path) -> None:
    """A folder that held another job's record was noticed only after training, when the trace was read."""
    with TraceWriter(tmp_path) as writer:
        writer.add(torch.ones(1, 1, 2, dtype=torch.int64), Placement.contiguous(1, 2, 2), [5])
    for wrong, record, own in on_ranks(2, wrong_on_one, tmp_path, deadline=60):
        assert wrong == "rank 1: Moves: spread is a tuple; pass a Spread"
        assert record.startswith(
            f"rank 0: record: {tmp_path / '000000000005.npz'} belongs to another job: it has layers: 1"
        )
        assert own == "no error"


def trained(record: Path, iterations: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train a job of one process, from the beginning or resumed; return the state that it would save."""
    job = Job(ranks=1)
    rebalancer = job.rebalancer(folder=record)
    if state is not None:
        rebalancer.load_state_dict(state)
    for _ in range(iterations):
        job.iterate()
        rebalancer.step()
    rebalancer.close()
    return rebalancer.state_dict()


def test_a_resumed_job_goes_on_in_its_folder(tmp_path: Path) -> None:
    """It resumes from iteration 4 after the first run reached 8; the first run's record after 4 is dropped."""
    state = trained(tmp_path, 4)
    trained(tmp_path, 4, state)
    assert Trace.read(tmp_path).iteration.tolist() == list(range(1, 9))
    trained(tmp_path, 2, state)
    assert Trace.read(tmp_path).iteration.tolist() == list(range(1, 7))
    assert [event.iteration for event in read_events(tmp_path / "events.jsonl")] == [2, 4, 6]
    trained(tmp_path, 2)  # from the beginning
    assert Trace.read(tmp_path).iteration.tolist() == [1, 2]
    assert [event.iteration for event in read_events(tmp_path / "events.jsonl")] == [2]


def test_a_folder_of_another_job_is_refused_when_built(tmp_path: Path) -> None:
    trained(tmp_path, 4)
    larger, job = Job(ranks=1, experts=2 * EXPERTS), Job(ranks=1)
    layers = [replace(layer, name=f"other.{nth}") for nth, layer in enumerate(job.layers())]
    alone = tmp_path / "events only"
    alone.mkdir()
    (alone / "events.jsonl").write_text((tmp_path / "events.jsonl").read_text())
    for path in (tmp_path / "000000000001.npz", alone / "events.jsonl"):
        begin = f"record: {path} belongs to another job: it has "
        assert refused(larger, folder=path.parent).startswith(begin)
        assert refused(job, layers=layers, folder=path.parent).startswith(begin)
        assert refused(job, folder=path.parent) == "no error"
    assert refused(Job(ranks=1), folder=tmp_path / "events.jsonl") == (
        f"record: {tmp_path / 'events.jsonl'} is a file; pass the path of a folder"
    )
    (tmp_path / "mine").mkdir()
    for text in ("a,b\n", "[]\n", '{"format": "other"}\n'):
        (tmp_path / "mine" / "events.jsonl").write_text(text)
        assert refused(Job(ranks=1), folder=tmp_path / "mine").startswith(
            f"record: {tmp_path / 'mine' / 'events.jsonl'} is not a log of rebalances; record in another folder, or"
        )
        assert (tmp_path / "mine" / "events.jsonl").read_text() == text
    for text in ("", '{"format": "distplb.ev', (tmp_path / "events.jsonl").read_text()[:100]):
        (tmp_path / "mine" / "events.jsonl").write_text(text)
        assert refused(Job(ranks=1), folder=tmp_path / "mine") == "no error"


# --- no layers anywhere ----------------------------------------------------------------------------------------------


def without_layers(has_some: bool) -> list[str]:
    """Warnings in two steps of a job in which rank 0 has no layers and rank 1 may have some."""
    router, weights = nn.Parameter(torch.zeros(EXPERTS, DIM)), nn.Parameter(torch.zeros(EXPERTS, DIM))
    layers = [MoELayer(name="moe", experts={"w": weights}, router={"weight": router})]
    optimizer = torch.optim.SGD([router, weights], lr=0.1)
    alone = dist.new_group([1])
    has_layers = has_some and dist.get_rank() == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rebalancer = Rebalancer(
            layers if has_layers else [],
            optimizer,
            topology=Topology(1, 1),
            every=9,
            window=LoadWindow(LAYERS - 1, EXPERTS, 1),
            comm=TorchComm(alone) if has_layers else TorchComm(),
        )
        dist.barrier()  # as in a pipeline, where no stage steps before all have arrived
        rebalancer.step()
        rebalancer.step()
    dist.barrier()
    return [str(one.message) for one in caught if "distplb" in str(one.message)]


def test_a_job_without_any_layers_is_told_so_and_a_stage_without_is_not() -> None:
    told, others = on_ranks(2, without_layers, False, deadline=60)
    assert len(told) == 1
    assert told[0].startswith("distplb: the Rebalancer was given no layers on any rank and moves nothing; pass the")
    assert others == []
    assert on_ranks(2, without_layers, True, deadline=60) == [[], []]


def test_a_process_alone_without_layers_is_told_so() -> None:
    rebalancer = Rebalancer([], torch.optim.SGD([nn.Parameter(torch.zeros(1))]), topology=Topology(1, 1), every=1)
    with pytest.warns(RuntimeWarning, match="was given no layers on any rank"):
        rebalancer.step()
