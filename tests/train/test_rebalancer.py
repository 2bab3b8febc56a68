"""The object that a training loop holds: when it acts, what it reports, what it refuses.

Shapes: L layers, E experts, G slots on each GPU.
"""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from jobs import DIM, EXPERTS, FREE, LAYERS, SLOT_BYTES, Clock, Job, by_slot, skewed
from ranks import errors_on_ranks, on_ranks
from torch import Tensor, nn

import distplb
from distplb import DistplbError, LoadWindow, MoELayer, MoveModel, Placement, Spread, TimeCurve, Topology
from distplb.comm.torchdist import TorchComm
from distplb.core.counts import marked
from distplb.errors import HalfMovedError
from distplb.migrate import checksum, staging, transfer
from distplb.records.events import RebalanceEvent
from distplb.train import observer, pricing


class Blockwise8bit(torch.optim.Optimizer):
    """Keeps its moment in 8 bits, with one scale per block of 16 elements, as 8-bit optimizers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: None = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            blocks = parameter.grad.flatten().view(-1, 16)  # [blocks, 16]
            scale = blocks.abs().amax(1) / 127
            rounded = (blocks / scale.clamp(min=1e-12)[:, None]).round().to(torch.int8)
            self.state[parameter] = {"state1": rounded.view_as(parameter), "absmax1": scale}


CURVE = TimeCurve((0, 20, 180, 2000), (0, 20, 140, 1240))
CHEAP, DEAR = MoveModel(1.0, 1, 1e12, 1e12), MoveModel(1e-9, 10**9, 1.0, 1.0)
BY_HAND = MoveModel(2.0, bytes_per_slot=1000, bandwidth_inside=100, bandwidth_between=50, trust=0.8)
HOT_SLOTS = torch.tensor([[90, 90, 10, 10, 10, 10, 10, 10]] * LAYERS)  # [L, P], whichever experts they hold


# --- what it refuses -------------------------------------------------------------------------------------------------


def refused(case: str) -> str:
    """The error of one case, on every rank; nothing may have moved in any case."""
    odd = dist.get_rank() == 1
    kinds = {"adafactor": torch.optim.Adafactor, "8-bit": Blockwise8bit}
    job = Job(kinds.get(case, torch.optim.AdamW), experts=7 if case == "experts" else EXPERTS)
    options: dict[str, Any] = {}
    layers = job.layers()
    if odd and case == "every":
        options["every"] = 3
    if odd and case == "candidates":
        options["num_candidates"] = 5
    if odd and case == "curve":
        options["time_curve"] = CURVE
    if odd and case == "model":
        options["model"] = CHEAP
    if odd and case == "names":
        layers = job.layers()[::-1]
    if odd and case == "shapes":
        layers = [replace(layer, router={"weight": torch.zeros(EXPERTS, DIM + 1)}) for layer in job.layers()]
    if odd and case == "unknown":
        job.optimizer = torch.optim.AdamW(job.routers)
    if odd and case == "rows":
        layers = job.layers(experts={"w": torch.zeros(3, DIM)})
    if odd and case == "strides":
        layers = job.layers(experts={"w": torch.zeros(DIM, EXPERTS // 2).T})
    if case == "gpus":
        options["topology"] = Topology(1, 4)
    if case == "undeclared":
        layers = job.layers(router={})
    before = job.values()
    try:
        rebalancer = job.rebalancer(layers, **options)
        if case == "no counts":
            job.window = LoadWindow(LAYERS, EXPERTS, 1)  # not the window that the rebalancer reads
        job.iterate()
        before = job.values()
        if odd and case == "backward":
            job.backward()
        if odd and case == "counts":
            for layer in range(LAYERS):
                job.window.add(layer, torch.zeros(EXPERTS))
            # As on an accelerator, where `add` does not wait to check them.
            job.window._counts[job.window._numbers == 1] = marked(torch.full((EXPERTS,), 0.5))
        if odd and case == "placement":
            rebalancer.apply(scattered(1))
        elif case == "placement":
            rebalancer.apply(scattered(2))
        if case == "replicas":
            rebalancer.apply(Placement(torch.arange(10).expand(LAYERS, -1) % EXPERTS, EXPERTS, 2))
        if case == "other model":
            rebalancer.apply(Placement.contiguous(LAYERS + 1, EXPERTS, 2))
        if case == "loaded":
            rebalancer.load_state_dict(rebalancer.state_dict() | {"version": torch.tensor(2)})
        if odd and case == "iteration":
            rebalancer.enabled = False
            rebalancer.step()
            rebalancer.step()
            rebalancer.enabled = True
        for _ in range(2):
            rebalancer.step()
    except DistplbError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, job.values(), strict=True))
        return str(error)
    return "no error"


CASES = {
    "experts": "7 slots cannot be spread evenly over 2 GPUs (1 node × 2); pass num_nodes and gpus_per_node",
    "every": "ranks disagree on every: 2 on one, 3 on another",
    "candidates": "ranks disagree on num_candidates: 5 on one, 16 on another",
    "curve": "ranks disagree on time_curve (digest)",  # one rank would measure links while the other plans: a deadlock
    "model": "ranks disagree on Moves: model (digest)",
    "names": "ranks disagree on the model (digest)",
    "shapes": "ranks disagree on the model (digest)",
    "unknown": "rank 1: moe.0.experts.w requires a gradient but is in no param_group of the optimizer; pass",
    "rows": "rank 1: moe.0.experts.w has shape (3, 6); its first dim must be 4, one row per slot of this GPU",
    "strides": "rank 1: moe.0.experts.w has strides (1, 4) and is not contiguous; store it contiguously",
    "gpus": "the topology has 4 GPUs, but the communicator has 2 ranks; pass a topology whose GPUs are the ranks",
    "undeclared": "moe.0 has 1 expert tensor, 0 router tensors and no table; declare all expert tensors, and either",
    "no counts": "the window has no step that all layers have counted; have each layer's forward call window.add(index",
    "counts": (
        "rank 1: LoadWindow: layer 'moe.0' has a torch.float32 value that is not an integer from 0 to 16777216 for "
        "expert 0 in step 1 (16 such values); counts must be whole tokens, which torch.float32 represents exactly"
    ),
    "adafactor": "moe.0.experts.w:col_var of Adafactor is torch.float32 of shape (4, 1, 12) for a parameter of shape (",
    "8-bit": "moe.0.experts.w:absmax1 of Blockwise8bit is torch.float32 of shape (18,) for a parameter of shape (4, 6",
    "backward": "rank 1: a backward pass has begun since the optimizer's last step; call rebalancer.step() right after",
    "placement": "ranks disagree on the placement (digest)",
    "replicas": "the placement has 10 slots for 8 experts, and replicas cannot be trained yet",
    "other model": "the placement has num_layers 3, the model 2; pass a placement of this model",
    "loaded": "state has version 2; this distplb reads version 3",
    "iteration": "ranks disagree on the rebalancer's iteration: 2 on one, 4 on another",
}


def scattered(seed: int) -> Placement:
    generator = torch.Generator().manual_seed(seed)
    return Placement(torch.stack([torch.randperm(EXPERTS, generator=generator) for _ in range(LAYERS)]), EXPERTS, 2)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_on_every_rank_with_nothing_moved(case: str) -> None:
    for text in errors_on_ranks(2, refused, case, deadline=60):
        assert CASES[case] in text


def test_state_of_an_optimizer_with_nested_tensors_is_refused_by_name() -> None:
    job = Job(torch.optim.SGD, ranks=1)
    rebalancer = job.rebalancer(every=1)
    job.iterate()
    job.optimizer.state[job.weights[0]]["blocks"] = [torch.zeros(3)]
    with pytest.raises(DistplbError, match=r"moe\.0\.experts\.w:blocks of SGD is a list with tensors whose layout"):
        rebalancer.step()


def test_state_of_a_whole_tensor_travels_even_where_a_shard_of_it_is_declared() -> None:
    """Such state was not searched for once a shard was declared, and would have stayed behind."""
    job = Job(torch.optim.SGD, ranks=1)
    shard = distplb.FlatShard(nn.Parameter(job.weights[0].detach().flatten().clone()), 0)
    job.optimizer.add_param_group({"params": [shard.values]})
    layers = job.layers()
    layers[0] = MoELayer(name="moe.0", experts=layers[0].experts, router=layers[0].router, shards={"w": shard})
    rebalancer = job.rebalancer(layers, every=1)
    job.iterate()
    momentum = torch.rand_like(job.weights[0])
    job.optimizer.state[job.weights[0]]["momentum_buffer"] = momentum.clone()
    table = torch.stack([torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(4)) for _ in range(LAYERS)])
    rebalancer.apply(Placement(table, EXPERTS, 1))
    assert torch.equal(job.optimizer.state[job.weights[0]]["momentum_buffer"], momentum[table[0]])


# --- what it does and reports ----------------------------------------------------------------------------------------


def eventful(dry_run: bool) -> tuple[list[RebalanceEvent], list[list[int]], bool]:
    events: list[RebalanceEvent] = []
    job = Job()
    before = job.values()
    rebalancer = job.rebalancer(every=2, dry_run=dry_run, on_event=events.append)
    job.optimizer.param_groups[0]["lr"] = 0.0
    job.optimizer.param_groups[0]["weight_decay"] = 0.0
    for hot in ((0, 1), (0, 1), (0, 2), (0, 2)):
        job.iterate(by_slot(skewed(hot), rebalancer.placement))
        rebalancer.step()
    unmoved = all(torch.equal(a, b) for a, b in zip(before, job.values(), strict=True))
    return events, rebalancer.placement.expert_of_slot.tolist(), unmoved


def test_events_tell_before_after_bound_and_how_the_plan_fared_on_the_next_window() -> None:
    for events, _, unmoved in on_ranks(2, eventful, False):
        assert not unmoved
        first, completed, second = events
        assert [event.iteration for event in events] == [2, 2, 4]
        assert first.layers == ("moe.0", "moe.1")
        assert first.steps == 2
        # Both ranks count the same: 90 + 90 + 10 + 10 of 240 tokens on one of two GPUs.
        assert first.imbalance_before == pytest.approx((200 / 120,) * 2)
        assert first.imbalance_after == first.imbalance_bound == pytest.approx((1.0,) * 2)
        assert first.imbalance_next is None
        assert 2 * LAYERS <= first.slots_moved <= EXPERTS * LAYERS
        # A moved expert crosses to the other rank: weight, gradient, two moments. Router rows are on all ranks.
        assert first.bytes_inside == first.slots_moved * 4 * (2 * DIM * DIM) * 4
        assert first.bytes_between == 0
        assert set(first.seconds) == {"count", "search", "choose", "polish", "share", "move", "verify"}
        assert first.engine == "cpu"
        # Experts 0 and 1 were separated; 0 and 2 need not have been.
        assert completed.imbalance_next == second.imbalance_before
        assert completed.placement_digest == first.placement_digest


def test_a_dry_run_reports_what_it_would_have_gained_and_moves_nothing() -> None:
    for events, placement, unmoved in on_ranks(2, eventful, True):
        first, completed, second = events
        assert unmoved
        assert placement == [list(range(EXPERTS))] * LAYERS
        assert first.dry_run
        assert first.slots_moved == first.bytes_moved == 0
        assert first.imbalance_after == pytest.approx((1.0,) * 2)
        assert second.imbalance_before == pytest.approx((200 / 120,) * 2)  # still contiguous; 0 and 2 are hot
        assert completed.imbalance_next is not None


def test_a_dry_run_needs_no_optimizer_whose_state_could_be_moved() -> None:
    job = Job(torch.optim.Adafactor, ranks=1)
    told: list[RebalanceEvent] = []
    rebalancer = job.rebalancer(every=1, dry_run=True, on_event=told.append)
    job.iterate()
    rebalancer.step()
    (event,) = told
    assert event.decision == "dry run"
    assert "a move would be refused: moe.0.experts.w:col_var of Adafactor" in event.reason


def test_each_stage_is_a_range_in_a_profile() -> None:
    job = Job(ranks=1)
    rebalancer = job.rebalancer(every=1)
    job.iterate()
    with torch.profiler.profile() as profile:
        rebalancer.step()
    ranges = {event.key for event in profile.key_averages() if event.key.startswith("distplb::")}
    assert ranges == {f"distplb::{stage}" for stage in ("count", "search", "choose", "polish", "share", "move")}


class Counting(TorchComm):
    """Records its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def all_reduce_sum(self, tensor: Tensor) -> None:
        self.calls.append("sum")
        super().all_reduce_sum(tensor)

    def all_reduce_min(self, tensor: Tensor) -> None:
        self.calls.append("min")
        super().all_reduce_min(tensor)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        self.calls.append("broadcast")
        super().broadcast(tensor, root)

    def exchange(self, rounds: Any) -> None:
        self.calls.append("exchange")
        super().exchange(rounds)


def quiet_steps() -> tuple[list[str], int]:
    def looked_at(*_: Any) -> Any:
        raise AssertionError("waited for the device")

    job, comm, clock = Job(), Counting(), Clock()
    observer.time = clock
    rebalancer = job.rebalancer(every=8, comm=comm, time_curve=CURVE, folder="never written")
    for _ in range(2):
        job.iterate()
        rebalancer.step()  # the first two check that all state can travel
    comm.calls.clear()
    # Nothing that waits for the device may be called, of the window or of torch.
    job.window.load = job.window.steps = torch.cuda.synchronize = looked_at
    LoadWindow.seen = property(looked_at)
    for _ in range(5):
        job.iterate()
        clock.now += 2.0
        with patch.multiple(Tensor, item=looked_at, tolist=looked_at, cpu=looked_at, __bool__=looked_at):
            rebalancer.step()
    return comm.calls, rebalancer._parts.observer.pace().iterations


def test_iterations_that_do_not_rebalance_cost_no_collective_and_no_look_at_the_device() -> None:
    assert on_ranks(2, quiet_steps) == [([], 6)] * 2


def calls_of_a_rebalance() -> list[list[str]]:
    found = []
    for options in ({}, {"dry_run": True}, {"model": DEAR}, {"time_curve": TimeCurve.linear(1e6)}):
        job, comm = Job(), Counting()
        rebalancer = job.rebalancer(every=2, comm=comm, verify="off", engine="reference", **options)
        for _ in range(4):
            comm.calls.clear()
            job.iterate(HOT_SLOTS)
            rebalancer.step()
            found.append(list(comm.calls))
    return found


def test_a_rebalance_costs_one_broadcast_more_than_a_plan_and_the_agreements_of_its_moves() -> None:
    told, plan_ = ["broadcast"], ["min", "sum", "min", "broadcast"]
    kept = [*told, *plan_, "min", "min"]  # agreement on the state, and on the placement
    moved = [*kept, "exchange", "min", "min"]  # one commit
    for calls in on_ranks(2, calls_of_a_rebalance):
        assert calls[0::4] == [["min"]] * 4  # the first two steps check that all state can travel
        assert calls[2::4] == [[]] * 4
        free, again, dry, dry_again, dear, dear_again, measured, priced = calls[1::2]
        for first in (free, dry, dear, measured):
            assert first.pop(0) == "min"
        for moving in (free, again, dear, dear_again, measured, priced):
            assert moving.pop(0) == "min"  # whether a step was skipped
        assert free == again == priced == moved
        assert dry == dry_again == [*told, *plan_, "min"]  # whether the state could have moved
        assert dear == dear_again == kept
        # Bandwidths, once: messages sized by the link, and broadcasts of rank 0's decisions and result.
        length = len(measured) - len(moved[1:])
        assert [*measured[:1], *measured[length - 1 :]] == [*told, "broadcast", *moved[1:]]
        assert set(measured[1:length]) == {"exchange", "broadcast", "min"}  # "min": whether all ranks have memory


def disabled_and_enabled() -> list[int]:
    job, seen = Job(), []
    rebalancer = job.rebalancer(every=1, on_event=lambda event: seen.append(event.iteration))
    for iteration in range(4):
        rebalancer.enabled = iteration >= 2
        job.iterate()
        rebalancer.step()
    return list(dict.fromkeys(seen))


def test_a_disabled_rebalancer_counts_iterations_and_does_nothing() -> None:
    assert on_ranks(2, disabled_and_enabled) == [[3, 4]] * 2


def resumed() -> bool:
    job = Job()
    rebalancer = job.rebalancer(every=3)
    for _ in range(4):
        job.iterate(by_slot(skewed((0, 1)), rebalancer.placement))
        rebalancer.step()
    saved = copy.deepcopy([job.values(), job.optimizer.state_dict(), rebalancer.state_dict()])
    other = Job()
    for parameter, value in zip((*other.weights, *other.routers), saved[0], strict=True):
        parameter.data.copy_(value)
    other.optimizer.load_state_dict(saved[1])
    again = other.rebalancer(every=3)
    again.load_state_dict(saved[2])
    for each, of in ((job, rebalancer), (other, again)):
        each.window.clear()
        for _ in range(2):
            each.iterate(by_slot(skewed((2, 3)), of.placement))
            of.step()
    assert again.iteration == rebalancer.iteration == 6
    assert again.placement == rebalancer.placement != Placement.contiguous(LAYERS, EXPERTS, 2)
    again.restore()
    rebalancer.restore()
    assert again.placement == Placement.contiguous(LAYERS, EXPERTS, 2)
    return all(torch.equal(a, b) for a, b in zip(job.values(), other.values(), strict=True))


def test_a_job_resumes_with_the_placement_that_belongs_to_its_weights() -> None:
    assert on_ranks(2, resumed) == [True, True]


def test_state_is_tensors_by_layer_and_of_other_layers_takes_only_its_own() -> None:
    job = Job(ranks=1)
    state = job.rebalancer(every=1).state_dict()
    assert set(state["layers"]) == {"moe.0", "moe.1"}
    for layer in state["layers"].values():
        assert layer["expert_of_slot"].tolist() == layer["first"].tolist() == list(range(EXPERTS))
        assert layer["counters"].tolist() == [0, 0, 1, 0]
    table = torch.arange(EXPERTS).flip(0)
    # As if another pipeline stage had been further ahead, and its rebalancing off.
    state["layers"]["moe.1"] = {"expert_of_slot": table, "first": table, "counters": torch.tensor([9, 2, 0, 1])}
    again = Job(ranks=1).rebalancer(every=1)
    again.load_state_dict(state | {"layers": state["layers"] | {"moe.7": {}}})
    assert again.placement.expert_of_slot.tolist() == [list(range(EXPERTS)), table.tolist()]
    assert (again.iteration, again.enabled) == (9, False)
    found = again.state_dict()["layers"]["moe.0"]["counters"]
    assert found.tolist() == [9, 2, 0, 1]
    del state["layers"]["moe.0"]
    with pytest.raises(DistplbError, match=r"state has no layer 'moe\.0' \(its layers: moe\.1\); load the state of"):
        Job(ranks=1).rebalancer(every=1).load_state_dict(state)
    state["layers"]["moe.0"] = {key: torch.arange(4) for key in ("expert_of_slot", "first", "counters")}
    with pytest.raises(DistplbError, match=r"state has 4 slots in layer 'moe\.0' where the model has 8"):
        Job(ranks=1).rebalancer(every=1).load_state_dict(state)


# --- what moves are worth --------------------------------------------------------------------------------------------


def priced() -> dict[str, RebalanceEvent]:
    """One rebalance of each kind: six steps since the last one, of which four are kept."""
    cases: dict[str, dict[str, Any]] = {
        "free": {},
        "cheap": {"model": CHEAP},
        "dear": {"model": DEAR},
        "by hand": {"model": BY_HAND, "topology": Topology(2, 1)},
        "dry": {"model": BY_HAND, "time_curve": CURVE, "dry_run": True, "max_bytes": 0},
        "dry and dear": {"model": DEAR, "time_curve": CURVE, "dry_run": True},
        "dry without a model": {"time_curve": CURVE, "dry_run": True},
    }
    found: dict[str, RebalanceEvent] = {}
    for name, options in cases.items():
        told: list[RebalanceEvent] = []
        job = Job()
        rebalancer = job.rebalancer(every=6, on_event=told.append, engine="reference", **options)
        for _ in range(6):
            job.iterate(HOT_SLOTS)
            rebalancer.step()
        [found[name]] = told
        if found[name].decision != "moved":
            assert rebalancer.placement == Placement.contiguous(LAYERS, EXPERTS, 2)
    return found


@pytest.fixture(scope="module")
def events_of_prices() -> list[dict[str, RebalanceEvent]]:
    return on_ranks(2, priced)


def test_what_is_worth_its_price_is_moved_and_nothing_else(
    events_of_prices: list[dict[str, RebalanceEvent]],
) -> None:
    for found in events_of_prices:
        free, cheap, dear = found["free"], found["cheap"], found["dear"]
        assert free.decision == cheap.decision == "moved"
        assert free.imbalance_after == cheap.imbalance_after == cheap.imbalance_bound == pytest.approx((1.0,) * LAYERS)
        assert dear.decision == "kept"
        assert dear.reason == "no layer has a placement that is worth its moves"
        assert dear.left_out == ("the search found no other move that pays off",) * LAYERS
        assert dear.slots_moved == dear.bytes_moved == dear.saved_seconds == dear.move_seconds == 0
        assert dear.imbalance_after == dear.imbalance_before
        assert dear.placement_digest == Placement.contiguous(LAYERS, EXPERTS, 2).digest()
        least = 4 * int(HOT_SLOTS.sum()) / LAYERS * 2**-13  # of what rank 0 counts in the four kept steps
        assert free.move_price == pytest.approx((least, least))
        assert free.saved_seconds is free.move_seconds is None
        assert free.left_out == cheap.left_out == ("",) * LAYERS


def nearly_even() -> list[tuple[str, int]]:
    """Decisions without a known price, if a swap takes `excess` of five billion tokens from GPU 0, beyond chance."""
    found = []
    for excess in (1_000_000, 10_000_000):
        told: list[RebalanceEvent] = []
        job = Job()
        rebalancer = job.rebalancer(every=1, on_event=told.append)
        counts = torch.full((LAYERS, EXPERTS), 5_000_000_000 // EXPERTS)
        counts[:, :2] += excess // 2  # on both ranks
        job.iterate(counts)
        rebalancer.step()
        found.append((told[0].decision, told[0].slots_moved))
    return found


def test_experts_do_not_move_for_next_to_nothing_where_moves_have_no_known_price() -> None:
    """They did: four fifths of them moved to reduce the imbalance by a thousandth."""
    for (little, none), (more, some) in on_ranks(2, nearly_even):
        assert (little, none) == ("kept", 0)
        assert more == "moved"
        assert some == 2 * LAYERS


def test_seconds_of_an_event_by_hand(events_of_prices: list[dict[str, RebalanceEvent]]) -> None:
    event = events_of_prices[0]["by hand"]
    assert event.steps == 4
    # A slot is 1000 bytes, at 100 a second in a node and at 50 between two. A token is 2 s, but of 6 steps there are 4.
    assert event.move_price == pytest.approx((10 / 2 * 4 / 6 / 0.8, 20 / 2 * 4 / 6 / 0.8))
    assert event.move_seconds == pytest.approx(event.slots_moved * 20)  # each node has one GPU
    # Both ranks count 2 × 90 + 2 × 10 tokens of 240 on GPU 0, and 120 after; in 4 steps of 2 layers.
    assert event.saved_seconds == pytest.approx(2 * (200 - 120) * 4 * LAYERS * 2.0 * 6 / 4 * 0.8)
    assert (event.seconds_per_token, event.bytes_per_slot) == (2.0, 1000)
    assert (event.bandwidth_inside, event.bandwidth_between) == (100, 50)


def test_a_dry_run_with_a_curve_and_a_model_tells_what_would_be_gained_and_paid(
    events_of_prices: list[dict[str, RebalanceEvent]],
) -> None:
    for found in events_of_prices:
        event, dear, free = found["dry"], found["dry and dear"], found["dry without a model"]
        for one in (event, dear, free):
            assert one.decision == "dry run"
            assert one.dry_run
            assert one.slots_moved == one.bytes_moved == 0
            assert one.time_curve == tuple(zip(CURVE.tokens, CURVE.nanoseconds, strict=True))
        # A hot expert has 180 tokens of both ranks and takes 140 ns, another one 20 and 20 ns.
        saved = (2 * 140 + 2 * 20 - (2 * 140 + 6 * 20) / 2) * 6 * LAYERS * 1e-9
        assert event.saved_seconds == pytest.approx(saved * BY_HAND.trust)
        assert event.move_seconds is not None
        assert event.move_seconds > 0
        assert event.imbalance_after == pytest.approx((1.0,) * LAYERS)
        assert dear.imbalance_after == dear.imbalance_before
        assert dear.saved_seconds == dear.move_seconds == 0
        assert free.saved_seconds is None


def test_events_are_equal_on_all_ranks_but_for_the_seconds_of_stages_and_iterations(
    events_of_prices: list[dict[str, RebalanceEvent]],
) -> None:
    first, second = ({name: replace(event, seconds={}) for name, event in found.items()} for found in events_of_prices)
    assert first == second


def measured_once() -> tuple[list[RebalanceEvent], int]:
    told: list[RebalanceEvent] = []
    measuring, calls = pricing.measured_bandwidths, 0

    def counted(*args: Any) -> tuple[int, int]:
        nonlocal calls
        calls += 1
        return measuring(*args)

    pricing.measured_bandwidths = counted
    job = Job()
    rebalancer = job.rebalancer(time_curve=CURVE, on_event=told.append, engine="reference")
    for _ in range(6):
        job.iterate(HOT_SLOTS)
        rebalancer.step()
    return [replace(event, seconds={}) for event in told], calls


def test_with_a_time_curve_alone_the_price_is_measured_once() -> None:
    (events, calls), other = on_ranks(2, measured_once)
    assert (events, calls) == other
    assert calls == 1
    assert len(events) == 5
    assert {event.bytes_per_slot for event in events} == {SLOT_BYTES}
    assert [event.seconds_per_token for event in events] == pytest.approx([1240e-9 / 2000] * 5)
    assert len({(event.bandwidth_inside, event.bandwidth_between) for event in events}) == 1
    assert events[0].bandwidth_inside == events[0].bandwidth_between > 0
    assert all(event.move_price[0] > 0 for event in events)


# --- what it records -------------------------------------------------------------------------------------------------

EVERY, ITERATIONS, APPLIED = 4, 16, 14


def counts_at(iteration: int, rank: int) -> Tensor:
    """`[L, E]`."""
    generator = torch.Generator().manual_seed(10 * iteration + rank)
    return torch.randint(1, 100, (LAYERS, EXPERTS), generator=generator) ** 2


def recorded(folder: str) -> tuple[list[RebalanceEvent], list[list[list[int]]]]:
    """All events, and the placement of each iteration; it is changed manually in the middle of the last window."""
    told: list[RebalanceEvent] = []
    job, rank, tables = Job(), dist.get_rank(), []
    rebalancer = job.rebalancer(
        every=EVERY,
        time_curve=CURVE,
        model=MoveModel(1e-9, 50, 1e9, 1e9),
        seed=5,
        num_candidates=6,
        engine="reference",
        folder=f"{folder}/of rank {rank}",
        on_event=told.append,
    )
    for iteration in range(1, ITERATIONS + 1):
        tables.append(rebalancer.placement.expert_of_slot.tolist())
        job.iterate(by_slot(counts_at(iteration, rank), rebalancer.placement))
        rebalancer.step()
        if iteration == APPLIED:
            rebalancer.apply(scattered(6))
    return [event for event in told if event.imbalance_next is None], tables


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[RebalanceEvent], list[list[list[int]]]]:
    """Rank 0's folder, events and placements; the folder is complete once the process has ended."""
    folder = tmp_path_factory.mktemp("record")
    (events, tables), (_, others) = on_ranks(2, recorded, str(folder))
    assert tables == others
    return folder, events, tables


def test_a_record_is_all_windows_with_the_placement_that_was_in_force(record: Any) -> None:
    folder, events, tables = record
    assert [path.name for path in folder.iterdir()] == ["of rank 0"]  # no other rank writes
    trace = distplb.Trace.read(folder / "of rank 0")
    assert trace.layers == ("moe.0", "moe.1")
    # The manual change drops the counts of the iterations before it.
    wanted = [iteration for iteration in range(1, ITERATIONS + 1) if iteration not in (APPLIED - 1, APPLIED)]
    assert trace.iteration.tolist() == wanted
    for nth, iteration in enumerate(wanted):
        assert torch.equal(trace.load[nth], counts_at(iteration, 0) + counts_at(iteration, 1))
        in_force = trace.placements[int(trace.placement_of_step[nth])]
        assert in_force.expert_of_slot.tolist() == tables[iteration - 1]
    assert [event.iteration for event in events] == [4, 8, 12, 16]
    assert sum(event.decision == "moved" for event in events) >= 2
    assert len(trace.placements) >= 3


def test_an_events_options_plan_its_plan_again(record: Any) -> None:
    folder, events, _ = record
    trace = distplb.Trace.read(folder / "of rank 0")
    for event in events:
        steps = (trace.iteration > event.iteration - EVERY) & (trace.iteration <= event.iteration)
        current = trace.placements[int(trace.placement_of_step[steps][0])]
        tokens, nanoseconds = zip(*event.time_curve, strict=True)
        again = distplb.plan(
            trace.load[steps],
            Topology(1, 2),
            current=current,
            move_price=event.move_price,
            time_curve=TimeCurve(tokens, nanoseconds),
            num_candidates=event.num_candidates,
            seed=event.seed,
            mode="permute",
        )
        assert event.steps == int(steps.sum())
        assert again.digest() == event.placement_digest


def test_a_window_that_was_cut_short_is_priced_for_all_iterations_until_the_next_rebalance(record: Any) -> None:
    """The steps since the manual change were used as those until the next rebalance: half as many."""
    _, events, _ = record
    prices = [event.move_price[0] for event in events]
    # A slot costs 50 ns, a token 1 ns by the curve's last point; `trust` is a half.
    assert prices == pytest.approx([100.0, 100.0, 100.0, 50.0])


def unwritable(folder: str) -> list[str]:
    job = Job()
    rebalancer = job.rebalancer(every=1, folder=f"{folder}/file/record", engine="reference")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(4):
            job.iterate(HOT_SLOTS)
            rebalancer.step()
            end = time.monotonic() + 10
            while dist.get_rank() == 0 and rebalancer._parts.journal.trace.error is None and time.monotonic() < end:
                time.sleep(0.01)
    assert rebalancer.iteration == 4
    return [str(one.message) for one in warned if "trace" in str(one.message)]


def test_a_folder_that_cannot_be_written_is_warned_of_once_and_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    warned, none = on_ranks(2, unwritable, str(tmp_path))
    assert none == []
    assert len(warned) == 1
    assert warned[0].startswith(f"no more parts of the trace are written to {tmp_path}/file/record: ")


# --- when something breaks in the middle -----------------------------------------------------------------------------


def broken(where: str) -> tuple[str, str, bool, bool]:
    """The error or warning, whether the rebalancer is poisoned, and whether nothing has moved."""
    job, kind, text = Job(), "", ""
    rebalancer = job.rebalancer(every=1, verify="digest", comm=TorchComm(deadline=300))  # the test must not wait for it
    job.iterate()
    before = job.values()
    transfer._STAGING_BYTES = 0  # several commits
    if dist.get_rank() == 1:
        break_down(where)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rebalancer.apply(scattered(3))
        kind, text = caught[0].category.__name__, str(caught[0].message)
    except DistplbError as error:
        kind, text = type(error).__name__, str(error)
    poisoned = False
    try:
        rebalancer.state_dict()
    except HalfMovedError:
        poisoned = True
    unmoved = all(torch.equal(a, b) for a, b in zip(before, job.values(), strict=True))
    return kind, text, poisoned, unmoved


def break_down(where: str) -> None:
    """Make this rank fail from now on, at one point of a move."""
    staged, view = staging.CommitStaging._staged, staging.CommitStaging._bytes

    def no_memory(*_: Any) -> Any:
        raise MemoryError("no room")

    def staged_then_fail(move: staging.CommitStaging, step: Any) -> Any:
        found = list(staged(move, step))
        staging.CommitStaging._bytes = no_memory
        return found

    def garbled(move: staging.CommitStaging, tensor: int, *place: int) -> Tensor:
        there = view(move, tensor, *place)
        return there.clone() if tensor == 0 else there  # writes to the first tensor are lost

    sums, calls = checksum._sums, iter(range(2))

    def second_fails(*args: Any) -> Tensor:
        return no_memory() if next(calls) else sums(*args)

    if where == "preparing":
        staging.StagingMemory.room = no_memory
    elif where == "first checksum":
        checksum._sums = no_memory
    elif where == "second checksum":
        checksum._sums = second_fails
    elif where == "writing":
        staging.CommitStaging._staged = staged_then_fail
    else:
        staging.CommitStaging._bytes = garbled


def unmeasured(what: str) -> str:
    """The error of a rebalance in which a measurement fails on rank 1."""

    def no_memory(*_: Any, **__: Any) -> Any:
        raise MemoryError("no room")

    job = Job()
    rebalancer = job.rebalancer(every=1, time_curve=CURVE, comm=TorchComm(deadline=300))
    job.iterate(HOT_SLOTS)
    if dist.get_rank() == 1:
        agreed = rebalancer._parts.agreed
        if what == "ties":
            agreed.routing.ties = no_memory
        if what == "budget":
            distplb.train.decision.within_budget = no_memory
            rebalancer._parts.agreed = replace(agreed, moves=replace(agreed.moves, max_bytes=10**9))
    with patch.object(torch, "ones", no_memory if what == "bandwidths" and dist.get_rank() == 1 else torch.ones):
        try:
            rebalancer.step()
        except DistplbError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize(("what", "stage"), [("ties", "count"), ("bandwidths", "count"), ("budget", "move")])
def test_a_rank_that_cannot_measure_leaves_nobody_waiting(what: str, stage: str) -> None:
    for text in on_ranks(2, unmeasured, what, deadline=60):
        assert text == f"rank 1: in stage {stage}: MemoryError('no room')"


def test_a_rank_without_memory_for_staging_is_known_to_all_before_anything_moves() -> None:
    for kind, text, poisoned, unmoved in on_ranks(2, broken, "preparing", deadline=60):
        assert (kind, text) == ("DistplbError", "rank 1: in stage move: MemoryError('no room')")
        assert unmoved
        assert not poisoned


def test_a_rank_without_memory_for_the_first_checksum_is_known_to_all_at_once() -> None:
    """The others waited for the whole deadline."""
    for kind, text, poisoned, unmoved in on_ranks(2, broken, "first checksum", deadline=60):
        assert (kind, text) == ("DistplbError", "rank 1: in stage verify: MemoryError('no room')")
        assert unmoved
        assert not poisoned


def test_experts_that_could_not_be_compared_are_warned_of_and_the_model_is_whole() -> None:
    """It was poisoned, and on one rank only."""
    for kind, text, poisoned, unmoved in on_ranks(2, broken, "second checksum", deadline=60):
        assert kind == "RuntimeWarning"
        assert text.endswith("could not verify them: rank 1: in stage verify: MemoryError('no room')")
        assert not unmoved
        assert not poisoned


def test_a_rank_that_cannot_write_poisons_the_rebalancer_on_all_ranks() -> None:
    for kind, text, poisoned, _ in on_ranks(2, broken, "writing", deadline=60):
        assert kind == "HalfMovedError"
        assert "rank 1: in stage move: commit 0 was not fully written: MemoryError('no room')" in text
        assert poisoned


def test_tensors_that_did_not_arrive_are_noticed_by_their_checksum() -> None:
    for kind, text, poisoned, _ in on_ranks(2, broken, "content", deadline=60):
        assert kind == "HalfMovedError"
        assert "has another checksum after the move (experts affected: " in text
        assert poisoned


def test_public_names_are_there() -> None:
    assert all(hasattr(distplb, name) for name in distplb.__all__)


# --- before a move ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"spread": Spread(0, 1)}, {"dry_run": True}], ids=["at once", "spread", "dry"])
def test_what_is_to_run_before_moves_runs_before_their_state_is_collected(options: dict[str, Any]) -> None:
    job, weights = Job(ranks=1), []

    def gather() -> None:
        """Stand in for a framework that keeps a part of the weights elsewhere until then."""
        job.weights[0].data.add_(1.0)
        weights.append(job.weights[0].detach().clone())

    rebalancer = job.rebalancer(every=2, before=gather, model=FREE, **options)
    for _ in range(4):
        job.iterate()
        rebalancer.step()
    assert len(weights) >= 1
    number = len(weights)
    rebalancer.apply(Placement(torch.arange(EXPERTS).flip(0).expand(LAYERS, -1), EXPERTS, 1))
    assert len(weights) == number + 1
    assert torch.equal(job.weights[0], weights[-1].flip(0))  # the gathered weights have moved


def test_what_fails_before_a_move_is_told_and_nothing_moves() -> None:
    def gather() -> None:
        raise RuntimeError("the other part of the weights is gone")

    job = Job(ranks=1)
    rebalancer = job.rebalancer(every=2, before=gather)
    before = job.values()
    with pytest.raises(DistplbError, match="the other part of the weights is gone"):
        rebalancer.apply(Placement(torch.arange(EXPERTS).flip(0).expand(LAYERS, -1), EXPERTS, 1))
    assert all(torch.equal(one, other) for one, other in zip(before, job.values(), strict=True))
    assert rebalancer.placement == Placement.contiguous(LAYERS, EXPERTS, 1)
