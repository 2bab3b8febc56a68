"""How layers follow a placement: legal ones only, by rows or by tables; and what a training loop holds for it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import DIM, EXPERTS, LAYERS, Job, skewed
from ranks import on_ranks
from stagers import AsyncSaveResponse, needs_stagers
from torch import Tensor, nn

from distplb import DistplbError, LoadWindow, MoELayer, Placement, Rebalancer, Record, Topology
from distplb.comm.torchdist import TorchComm
from distplb.core.ties import RouterTies
from distplb.records.events import RebalanceEvent
from distplb.train.routing import Routing


def placed(*rows: list[int], gpus: int = 1) -> Placement:
    return Placement(torch.tensor(rows), EXPERTS, gpus)


REVERSED = [7, 6, 5, 4, 3, 2, 1, 0]
MIXED = [0, 4, 2, 3, 1, 5, 6, 7]


# --- what is legal -----------------------------------------------------------------------------------------------


def test_group_limited_routing_lets_only_whole_groups_change_places() -> None:
    job = Job(ranks=1)
    rebalancer = job.rebalancer(job.layers(num_groups=4), every=1)
    before = job.values()
    with pytest.raises(DistplbError, match="layer 1 of the placement splits a routing group: with 4"):
        rebalancer.apply(placed(REVERSED, MIXED))
    assert all(torch.equal(a, b) for a, b in zip(before, job.values(), strict=True))
    rebalancer.apply(placed(REVERSED, REVERSED))
    assert torch.equal(job.routers[0], before[LAYERS].flip(0))


def test_a_rebalance_keeps_to_groups_and_to_classes_of_slots() -> None:
    counts = torch.tensor([[9, 1, 8, 2, 1, 1, 1, 1]] * LAYERS)
    for layer, slot_class in (({"num_groups": 4}, None), ({}, torch.arange(EXPERTS) % 2)):
        job = Job(ranks=1)
        rebalancer = job.rebalancer(
            job.layers(**layer), every=1, topology=Topology(1, 1), slot_class=slot_class, num_candidates=4
        )
        job.iterate(counts)
        rebalancer.step()  # with one GPU nothing is worth moving; the options are accepted
        assert rebalancer.placement == Placement.contiguous(LAYERS, EXPERTS, 1)


def grouped_and_classed() -> dict[str, list[list[int]]]:
    found = {}
    counts = torch.tensor([[90, 10, 80, 20, 1, 1, 1, 1]] * LAYERS)
    for name, layer, slot_class in (
        ("groups", {"num_groups": 4}, None),
        ("classes", {}, torch.arange(EXPERTS) % 2),
        ("free", {}, None),
    ):
        job = Job()
        rebalancer = job.rebalancer(job.layers(**layer), every=1, slot_class=slot_class)
        job.iterate(counts)
        rebalancer.step()
        found[name] = rebalancer.placement.expert_of_slot.tolist()
    return found


def test_over_two_gpus_groups_stay_together_and_classes_in_their_slots() -> None:
    for found in on_ranks(2, grouped_and_classed, deadline=60):
        assert found["groups"][0] != list(range(EXPERTS))
        assert all(row[slot] // 2 == row[slot + 1] // 2 for row in found["groups"] for slot in range(0, EXPERTS, 2))
        assert found["classes"][0] != list(range(EXPERTS))
        assert all(expert % 2 == slot % 2 for row in found["classes"] for slot, expert in enumerate(row))
        assert any(expert % 2 != slot % 2 for row in found["free"] for slot, expert in enumerate(row))


def test_an_expert_does_not_leave_its_class_of_slots() -> None:
    job = Job(ranks=1)
    rebalancer = job.rebalancer(every=1, slot_class=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    with pytest.raises(DistplbError, match="layer 0 of the placement moves expert 0 from a slot of class 0 to one of"):
        rebalancer.apply(placed(REVERSED, REVERSED))
    rebalancer.apply(placed([3, 2, 1, 0, 4, 5, 6, 7], [0, 1, 2, 3, 7, 4, 5, 6]))


# --- tables ------------------------------------------------------------------------------------------------------


def remapped() -> dict[str, Any]:
    job = Job()
    tables = [torch.zeros(EXPERTS, dtype=torch.int64) for _ in range(LAYERS)]
    told: list[int] = []
    layers = [
        MoELayer(
            name=f"moe.{index}",
            experts={"w": weight},
            slot_of_expert=tables[index],
            num_groups=4,  # no effect if the router's rows stay
            invalidate=lambda index=index: told.append(index),
        )
        for index, weight in enumerate(job.weights)
    ]
    events: list[RebalanceEvent] = []
    rebalancer = job.rebalancer(layers, every=1, on_event=events.append)
    at_first = [table.tolist() for table in tables]
    told.clear()
    whole, second = _gathered(job.weights[0]), _gathered(job.weights[1])
    rebalancer.apply(Placement(torch.tensor([list(range(EXPERTS)), MIXED]), EXPERTS, 2))
    changed = told[:]
    same = torch.equal(whole, _gathered(job.weights[0]))  # layer 0 stays as it is
    moved = torch.equal(second[MIXED], _gathered(job.weights[1]))
    job.iterate(skewed((0, 1)))  # by expert, not by slot
    rebalancer.step()
    placement = rebalancer.placement
    return {
        "at first": at_first,
        "changed": changed,
        "same": same,
        "tables": [table.tolist() for table in tables] == placement.inverse[..., 0].tolist(),
        "apart": [[int(placement.inverse[layer, expert, 0]) // 4 for expert in (0, 1)] for layer in range(LAYERS)],
        "imbalance": events[0].imbalance_before,
        "moved": moved,
    }


def _gathered(weight: Tensor) -> Tensor:
    parts = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, weight.detach().contiguous())
    return torch.cat(parts)


def test_tables_follow_the_experts_and_counts_are_of_experts() -> None:
    for found in on_ranks(2, remapped, deadline=60):
        assert found["at first"] == [list(range(EXPERTS))] * LAYERS
        assert found["changed"] == [1]  # layer 0 did not change and was not invalidated
        assert found["same"]
        assert found["moved"]
        assert found["tables"]
        # Both hot experts (90 of 240 tokens each) were on GPU 0 in layer 0: (90 + 90 + 20) / 120.
        assert found["imbalance"][0] == pytest.approx(200 / 120)
        assert all(sorted(gpus) == [0, 1] for gpus in found["apart"])


# --- windows that the layers fill --------------------------------------------------------------------------------


class Router(nn.Linear):
    """A module whose forward gives counts."""


def by_itself() -> tuple[Rebalancer, Router, torch.optim.Optimizer, list[RebalanceEvent]]:
    router, weight = Router(DIM, EXPERTS, bias=False), nn.Parameter(torch.randn(EXPERTS, DIM))
    ties = RouterTies(top_k=1)

    def subscribe(tell: Any) -> Any:
        def hook(module: nn.Module, _: Any, scores: Tensor) -> None:
            ties.add(scores)
            tell(scores.argmax(1).bincount(minlength=EXPERTS), training=module.training)

        return router.register_forward_hook(hook)

    layer = MoELayer(name="moe", experts={"w": weight}, router={"weight": router.weight}, counts=subscribe, ties=ties)
    optimizer = torch.optim.AdamW([weight, router.weight])
    events: list[RebalanceEvent] = []
    rebalancer = Rebalancer([layer], optimizer, topology=Topology(1, 1), every=2, record=Record(on_event=events.append))
    return rebalancer, router, optimizer, events


def test_layers_fill_the_window_by_themselves_until_it_is_closed() -> None:
    rebalancer, router, _, events = by_itself()
    router(torch.randn(5, DIM))
    router.eval()
    router(torch.randn(5, DIM))
    router.train()
    router(torch.randn(7, DIM))
    rebalancer.step()
    rebalancer.step()
    assert events[0].steps == 2  # the evaluation is not counted
    rebalancer.close()
    router(torch.randn(5, DIM))
    assert not len(rebalancer._parts.agreed.window.load())
    with pytest.raises(DistplbError, match="this Rebalancer has been closed; make a new one"):
        rebalancer.step()


def test_the_event_tells_how_many_tokens_were_routed_by_chance() -> None:
    rebalancer, router, _, events = by_itself()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[0, 0] = 1.0
    tokens = torch.zeros(8, DIM)
    tokens[:6, 0] = 1.0  # these choose expert 0; for the others all experts tie
    router(tokens)
    rebalancer.step()
    rebalancer.step()
    assert events[0].router_ties == (0.25,)
    for _ in range(2):
        router(tokens[:6])
        rebalancer.step()
    assert events[-1].router_ties == (0.0,)


def test_ties_of_experts_that_were_masked_out_are_none() -> None:
    ties = RouterTies(top_k=2)
    assert ties.take() is None
    ties.add(torch.tensor([[0.5, 0.4, float("-inf"), float("-inf")], [0.5, 0.5, 0.5, 0.1]]))
    ties.add(torch.zeros(9, 4))  # only the first forward counts
    assert ties.take() == 0.5
    ties.add(torch.zeros(3, 2))  # all are chosen
    assert ties.take() is None


def test_steps_are_taken_by_the_optimizers_once_all_have_stepped() -> None:
    job = Job(ranks=1)
    first, second = torch.optim.AdamW(job.weights), torch.optim.AdamW(job.routers)
    rebalancer = Rebalancer(job.layers(), [first, second], topology=Topology(1, 1), window=job.window, every=100)
    attached = rebalancer.attach()
    job.backward()
    for expected in (1, 2):
        first.step()
        assert rebalancer.iteration == expected - 1
        second.step()
        assert rebalancer.iteration == expected
    attached.remove()
    first.step()
    second.step()
    assert rebalancer.iteration == 2


# --- ranks without layers ----------------------------------------------------------------------------------------


def stages() -> tuple[int, int, set[str]]:
    """Two stages of a pipeline, the second without MoE layers."""
    own = dist.new_group([0, 1]), dist.new_group([2, 3])
    rank = dist.get_rank()
    if rank < 2:
        from distplb.comm.torchdist import TorchComm

        job = Job(ranks=2)
        window = LoadWindow(LAYERS, EXPERTS, 4)
        comm = TorchComm(own[0])
        rebalancer = Rebalancer(job.layers(), job.optimizer, topology=Topology(1, 2), every=2, window=window, comm=comm)
        for _ in range(2):
            for layer in range(LAYERS):
                window.add(layer, skewed((0, 1))[layer])
            rebalancer.step()
    else:
        rebalancer = Rebalancer([], [], topology=Topology(1, 2), every=2)
        for _ in range(2):
            rebalancer.step()
        rebalancer.apply(rebalancer.placement)
        rebalancer.restore()
        with rebalancer.in_logical_order():
            rebalancer.load_state_dict(rebalancer.state_dict())
        rebalancer.saving(None)
        rebalancer.attach().remove()
    rebalancer.close()
    moved = int((rebalancer.placement.expert_of_slot != torch.arange(rebalancer.placement.num_slots)).sum())
    return rebalancer.iteration, moved, set(rebalancer.state_dict()["layers"])


def test_a_stage_without_layers_takes_part_without_any() -> None:
    found = on_ranks(4, stages, deadline=60)
    assert [iteration for iteration, _, _ in found] == [2] * 4
    assert found[0][1] > 0
    assert [layers for _, _, layers in found] == [{"moe.0", "moe.1"}] * 2 + [set()] * 2


# --- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "is_staged", [pytest.param(False, marks=needs_stagers), pytest.param(True, marks=needs_stagers), None]
)
def test_applying_waits_until_what_is_being_saved_is_written(is_staged: bool | None) -> None:
    """Even if it has been staged, or staging is not reported: the staged tensors may be the originals.

    torch 2.6 passes on tensors that are on the CPU: a checkpoint then had one placement and the rows of another.
    """
    job = Job(ranks=1)
    rebalancer = job.rebalancer(every=1)
    written, staged = Future[None](), Future[None]()
    if is_staged:
        staged.set_result(None)
    rebalancer.saving(written if is_staged is None else AsyncSaveResponse(staged, written))
    before, seen = job.values(), []

    def stage() -> None:
        time.sleep(0.3)
        seen.append(all(torch.equal(a, b) for a, b in zip(before, job.values(), strict=True)))
        if not staged.done():
            staged.set_result(None)
        written.set_exception(RuntimeError("no space left"))  # not the rebalancer's to report

    thread = threading.Thread(target=stage)
    thread.start()
    rebalancer.apply(placed(REVERSED, REVERSED))
    thread.join()
    assert seen == [True]
    assert not torch.equal(job.weights[0], before[0])


def test_a_save_that_is_never_written_is_an_error_and_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distplb.train.placement_in_force._SAVE_SECONDS", 0.1)
    job = Job(ranks=1)
    rebalancer = job.rebalancer(every=1)
    rebalancer.saving(Future[None]())
    with pytest.raises(DistplbError, match="an asynchronous save has not ended in 0 s"):
        rebalancer.apply(placed(REVERSED, REVERSED))
    assert rebalancer.placement == Placement.contiguous(LAYERS, EXPERTS, 1)


def postponed() -> tuple[list[bool], list[int]]:
    """By iteration, whether experts have moved; a rebalance is due while only rank 1 is still writing."""
    job = Job()
    events: list[Any] = []
    rebalancer = job.rebalancer(every=2, on_event=events.append)
    written, moved = Future[None](), []
    if dist.get_rank() == 1:
        rebalancer.saving(written)
    for iteration in range(1, 6):
        if iteration == 4:
            written.set_result(None)
        job.iterate(skewed((0, 1)))
        job.optimizer.zero_grad()
        rebalancer.step()
        moved.append(rebalancer.placement != Placement.contiguous(LAYERS, EXPERTS, 2))
    return moved, [event.iteration for event in events if event.decision == "moved"]


def test_a_rebalance_that_is_due_goes_on_training_until_the_save_is_written() -> None:
    for moved, began in on_ranks(2, postponed, deadline=60):
        assert moved == [False, False, False, True, True]
        assert began[0] == 2


def test_the_end_of_a_save_is_one_of_two() -> None:
    with pytest.raises(DistplbError, match=r"until is 'uploaded'; pass 'written', or 'staged' if the stager copies"):
        Job(ranks=1).rebalancer(every=1).saving(Future[None](), until="uploaded")  # type: ignore[arg-type]


def late_on_one_rank() -> str:
    """The error of a save that does not end, if one rank starts to wait a second later."""
    import distplb.train.placement_in_force as module

    module._SAVE_SECONDS, module._SAVE_PAUSE_SECONDS = 1.0, 0.2
    rebalancer = Job().rebalancer(every=1)
    if dist.get_rank() == 1:
        rebalancer.saving(Future[None]())
        time.sleep(1)
    try:
        rebalancer.apply(placed(REVERSED, REVERSED, gpus=2))
    except DistplbError as error:
        return str(error)
    return "no error"


def test_all_ranks_give_up_waiting_for_a_save_when_the_first_one_does() -> None:
    for text in on_ranks(2, late_on_one_rank, deadline=60):
        assert "an asynchronous save has not ended in 1 s" in text


def waited_for() -> bool:
    """Whether a placement is applied if a save of one rank takes longer than the communicator's deadline."""
    rebalancer = Job().rebalancer(every=1, comm=TorchComm(deadline=8))
    written = Future[None]()
    if dist.get_rank() == 1:
        rebalancer.saving(written)
        threading.Timer(10, written.set_result, [None]).start()
    rebalancer.apply(placed(REVERSED, REVERSED, gpus=2))
    return rebalancer.placement == placed(REVERSED, REVERSED, gpus=2)


def test_a_save_may_take_longer_than_the_deadline_of_the_communicator() -> None:
    assert on_ranks(2, waited_for, deadline=60) == [True, True]


def wrong_on_one_rank() -> str:
    rebalancer = Job().rebalancer(every=1)
    try:
        rebalancer.apply(None if dist.get_rank() == 1 else placed(REVERSED, REVERSED, gpus=2))  # type: ignore[arg-type]
    except DistplbError as error:
        return str(error)
    return "no error"


def test_what_nobody_foresaw_on_one_rank_is_an_error_on_all() -> None:
    for text in on_ranks(2, wrong_on_one_rank, deadline=60):
        assert "rank 1: in stage move: AttributeError" in text


@pytest.mark.parametrize("response", [None, "a folder", {"writes": "at once"}])
def test_what_is_no_save_is_not_taken_for_one_that_has_ended(response: Any) -> None:
    with pytest.raises(DistplbError, match=r"saving got a (NoneType|str|dict); pass the return value of .*async_save"):
        Job(ranks=1).rebalancer(every=1).saving(response)


def test_logical_order_lasts_as_long_as_the_block() -> None:
    job = Job(ranks=1)
    rebalancer = job.rebalancer(every=1)
    logical = job.values()
    rebalancer.apply(placed(REVERSED, MIXED))
    slots = job.values()
    with rebalancer.in_logical_order():
        assert all(torch.equal(a, b) for a, b in zip(logical, job.values(), strict=True))
        assert rebalancer.placement == Placement.contiguous(LAYERS, EXPERTS, 1)
    assert all(torch.equal(a, b) for a, b in zip(slots, job.values(), strict=True))
    with pytest.raises(RuntimeError, match="disk full"), rebalancer.in_logical_order():
        raise RuntimeError("disk full")
    assert rebalancer.placement == Placement.contiguous(LAYERS, EXPERTS, 1)


# --- what does not go together -----------------------------------------------------------------------------------


def test_layers_that_follow_in_different_ways_are_refused() -> None:
    weight, router, table = torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    rows = MoELayer(name="a", experts={"w": weight}, router={"weight": router})
    with_table = MoELayer(name="b", experts={"w": weight}, slot_of_expert=table)
    grouped = MoELayer(name="c", experts={"w": weight}, router={"weight": router}, num_groups=2)
    with pytest.raises(DistplbError, match=r"layers differ in having slot_of_expert: False in a, True in b"):
        Routing([rows, with_table])
    with pytest.raises(DistplbError, match=r"layers differ in num_groups: None in a, 2 in c"):
        Routing([rows, grouped])
    both = MoELayer(name="d", experts={"w": weight}, router={"weight": router}, slot_of_expert=table)
    with pytest.raises(DistplbError, match=r"d has 1 expert tensor, 1 router tensor and a table; declare all"):
        Routing([both])
    with pytest.raises(DistplbError, match=r"a has no counts; pass window=, a LoadWindow that its forward fills"):
        Routing([rows]).window(4, 0)
    with pytest.raises(DistplbError, match=r"slot_of_expert is torch.float32 of shape \(4,\); pass int64"):
        Routing([MoELayer(name="e", experts={"w": weight}, slot_of_expert=weight[:, 0])])
