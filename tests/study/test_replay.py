"""Replays equal plain loops, and no plan is judged on a step that it saw.

Shapes: S steps, T steps of a window, L layers, E experts, P slots, M GPUs, R rebalances.
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distplb import DistplbError, Placement, Topology, imbalance, plan
from distplb.core.cost import gpu_tokens, layer_cost, mean_of_known
from distplb.core.price import MoveModel, TimeCurve, moved_slots
from distplb.records.trace import Trace
from distplb.study.replay import Replay, replay

MODEL = MoveModel(seconds_per_token=1e-6, bytes_per_slot=10**6, bandwidth_inside=1e9, bandwidth_between=1e8)
TOPOLOGY = Topology(num_nodes=2, gpus_per_node=2)
CURVE = TimeCurve((0, 10, 50), (30, 100, 150))


def trace_of(load: Tensor) -> Trace:
    steps = torch.arange(len(load))
    return Trace(load, (Placement.contiguous(load.shape[1], load.shape[2], 1),), torch.zeros_like(steps), steps)


def random_load(seed: int, steps: int = 23) -> Tensor:
    return torch.randint(0, 100, (steps, 2, 8), generator=torch.Generator().manual_seed(seed))


def random_placement(random_: random.Random, num_slots: int) -> Placement:
    rows = [random_.sample([*range(8), *random_.choices(range(8), k=num_slots - 8)], num_slots) for _ in range(2)]
    return Placement(torch.tensor(rows), 8, TOPOLOGY.num_gpus)


def stay(load: Tensor, current: Placement) -> Placement:
    return current


def replayed(load: Tensor, planner: Any = stay, **options: Any) -> Replay:
    return replay(trace_of(load), planner, **{"topology": TOPOLOGY, "every": 5, "model": MODEL} | options)


def plain_gpus(tokens: list[int], table: list[int], curve: TimeCurve | None) -> list[Fraction]:
    """`[M]`: the load of each GPU in one step of one layer."""
    share = [Fraction(tokens[expert], table.count(expert)) for expert in table]
    work = share if curve is None else [between(value, curve) for value in share]
    size = len(table) // 4
    return [sum(work[at : at + size]) for at in range(0, len(table), size)]


def between(tokens: Fraction, curve: TimeCurve) -> Fraction:
    """The time of a fraction, interpolated linearly."""
    whole = tokens.numerator // tokens.denominator
    low, high = curve.time(torch.tensor([whole, whole + 1])).tolist()
    return low + (high - low) * (tokens - whole)


@pytest.mark.parametrize("num_slots", [8, 12])
@pytest.mark.parametrize("curve", [None, CURVE])
@pytest.mark.parametrize("every", [1, 5, 23, 40])
def test_a_replay_is_what_plain_loops_find(num_slots: int, curve: TimeCurve | None, every: int) -> None:
    random_, load = random.Random(every), random_load(every)
    plans = [random_placement(random_, num_slots) for _ in range(24)]
    upcoming = iter(plans[1:])
    result = replayed(load, lambda past, current: next(upcoming), every=every, curve=curve, start=plans[0])
    in_force = [plans[step // every] for step in range(23)]
    busiest, ratios = [], []
    for step, placement in enumerate(in_force):
        rows = zip(load[step].tolist(), placement.expert_of_slot.tolist(), strict=True)
        gpus = [plain_gpus(*row, curve) for row in rows]
        busiest.append([max(row) for row in gpus])
        ratios.append([max(row) / (sum(row) / 4) for row in gpus])
    assert result.busiest.dtype == (torch.int64 if num_slots == 8 else torch.float64)
    assert result.busiest.tolist() == [pytest.approx([float(one) for one in row], rel=1e-12) for row in busiest]
    assert result.imbalance.dtype == torch.float64
    assert result.imbalance.tolist() == [pytest.approx([float(one) for one in row], rel=1e-12) for row in ratios]
    assert result.mean_imbalance == pytest.approx(float(sum(map(sum, ratios)) / 46))
    assert result.rebalance_steps == tuple(range(every, 23, every))
    assert result.placements == tuple(plans[: len(result.rebalance_steps) + 1])
    moves = [moved_slots(*plans[at : at + 2], TOPOLOGY).sum(0).tolist() for at in range(len(result.rebalance_steps))]
    assert result.moved.shape == (len(moves), 2)
    assert result.moved.tolist() == moves
    assert result.slots_moved == sum(map(sum, moves))
    inside, between = sum(row[0] for row in moves), sum(row[1] for row in moves)
    assert result.compute_seconds == pytest.approx(float(sum(map(sum, busiest))) * (1e-6 if curve is None else 1e-9))
    assert result.move_seconds == pytest.approx(inside * 1e-3 + between * 1e-2)
    assert result.seconds == result.compute_seconds + result.move_seconds


def test_without_a_curve_it_is_the_cost_and_the_imbalance_of_the_library() -> None:
    load, start = random_load(0), random_placement(random.Random(0), 12)
    result = replayed(load, start=start)
    assert torch.equal(result.busiest, gpu_tokens(load, start.expert_of_slot, 4).amax(2))
    assert torch.equal(result.imbalance, imbalance(load, start))
    scaled = (
        layer_cost(load << 20, start.expert_of_slot, 4).double() / 2**20
    )  # so that integer shares lose almost nothing
    assert torch.allclose(result.busiest.sum(0), scaled, rtol=1e-6)
    straight = replayed(load)
    assert torch.allclose(straight.imbalance, imbalance(load, Placement.contiguous(2, 8, 4)), rtol=1e-12)
    assert torch.equal(replayed(load, curve=TimeCurve.linear(1)).busiest, straight.busiest)


@pytest.mark.parametrize("curve", [None, CURVE])
@pytest.mark.parametrize("num_slots", [8, 12])
def test_steps_without_tokens_take_no_time_and_have_no_imbalance(num_slots: int, curve: TimeCurve | None) -> None:
    """A curve may give time to an idle expert, but a layer without any tokens runs nothing."""
    start, load = random_placement(random.Random(3), num_slots), random_load(3, steps=4)
    load[:, 1] = 0
    padded = torch.cat([load[:2], torch.zeros_like(load), load[2:]])
    result, without = (replayed(one, start=start, curve=curve) for one in (padded, load))
    assert result.busiest[2:6].tolist() == [[0, 0]] * 4
    assert result.imbalance[2:6].isnan().all()
    assert result.busiest[:, 1].tolist() == [0] * 8
    assert result.imbalance[:, 1].isnan().all()
    assert result.compute_seconds == without.compute_seconds
    assert result.mean_imbalance == without.mean_imbalance == float(mean_of_known(result.imbalance))


def test_a_token_of_two_replicas_is_not_lost() -> None:
    """Shares were integer divisions: eight experts of one token and two replicas each had 0 tokens and took 0 s."""
    halves = Placement(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7] * 2] * 2), 8, 4)
    ones = torch.ones(1, 2, 8, dtype=torch.int64)
    result = replayed(ones, start=halves)
    assert (result.busiest.tolist(), result.imbalance.tolist()) == ([[2.0, 2.0]], [[1.0, 1.0]])
    assert result.compute_seconds == pytest.approx(4e-6)
    timed = replayed(ones, start=halves, curve=TimeCurve((0, 1), (0, 10)))
    assert (timed.busiest.tolist(), timed.imbalance.tolist()) == ([[20.0, 20.0]], [[1.0, 1.0]])


def test_a_few_tokens_of_many_experts_are_replayed_as_they_are_judged() -> None:
    """64 steps of decoding, 256 experts in 512 slots."""
    load = torch.poisson(torch.ones(64, 1, 256), generator=torch.Generator().manual_seed(0)).long()
    table = torch.arange(512)[None] * 256 // 512
    start = Placement(table[:, torch.randperm(512, generator=torch.Generator().manual_seed(1))], 256, 4)
    result = replayed(load, start=start, every=64)
    assert torch.equal(result.imbalance, imbalance(load, start))
    assert 1 < result.mean_imbalance < 1.3


# --- the planner's input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "window", "length"), [(5, None, 5), (5, 3, 3), (5, 9, 5), (23, 1, 1), (1, 1, 1)])
def test_the_planner_sees_the_last_steps_and_the_placement_in_force(every: int, window: Any, length: int) -> None:
    load, random_ = random_load(1), random.Random(1)
    windows, in_force, returned = [], [], []

    def planner(steps: Tensor, current: Placement) -> Placement:
        windows.append(steps)
        in_force.append(current)
        returned.append(random_placement(random_, 8))
        return returned[-1]

    replayed(load, planner, every=every, window=window)
    calls = range(every, 23, every)
    assert len(windows) == len(calls)
    for at, steps in zip(calls, windows, strict=True):
        assert torch.equal(steps, load[at - length : at])
    assert in_force == [Placement.contiguous(2, 8, 4), *returned[:-1]][: len(in_force)]


def test_what_comes_later_changes_nothing_before_it() -> None:
    def planner(steps: Tensor, current: Placement) -> Placement:
        return plan(steps, TOPOLOGY, current=current, engine="reference")

    one, other = random_load(2), random_load(3)
    for same in (4, 5, 12):
        other[:same] = one[:same]
        result, changed = replayed(one, planner), replayed(other, planner)
        assert torch.equal(result.busiest[:same], changed.busiest[:same])
        plans = same // 5
        assert result.placements[: plans + 1] == changed.placements[: plans + 1]
    assert not torch.equal(result.busiest, changed.busiest)


def test_a_planner_cannot_change_the_trace() -> None:
    trace = trace_of(random_load(4))

    def planner(steps: Tensor, current: Placement) -> Placement:
        steps.zero_()
        return current

    before = trace.load.clone()
    replay(trace, planner, topology=TOPOLOGY, every=5, model=MODEL)
    assert torch.equal(trace.load, before)


def test_planning_pays_where_the_load_stays() -> None:
    load = torch.tensor([[[90, 90, 10, 10, 10, 10, 10, 10]] * 2] * 20)
    static = replayed(load)
    planned = replayed(load, lambda steps, current: plan(steps, TOPOLOGY, current=current, engine="reference"))
    assert (static.slots_moved, static.move_seconds) == (0, 0)
    assert static.moved.tolist() == [[0, 0]] * 3
    assert planned.busiest[:5].tolist() == [[180, 180]] * 5
    assert planned.busiest[5:].tolist() == [[100, 100]] * 15
    assert 0 < planned.slots_moved <= 16
    assert planned.moved[1:].tolist() == [[0, 0]] * 2


def test_progress_is_told() -> None:
    calls: list[tuple[int, int]] = []
    replayed(random_load(5, steps=12), progress=lambda done, steps: calls.append((done, steps)))
    assert calls == [(5, 12), (10, 12), (12, 12)]


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wording"),
    [
        ({"every": 0}, "replay: every is 0; pass steps, at least 1"),
        ({"every": 2.5}, "replay: every is 2.5; pass steps"),
        ({"window": 0}, "replay: window is 0; pass steps, at least 1"),
        ({"start": Placement.contiguous(2, 8, 2)}, r"start has \(2, 8, 2\) layers, experts and GPUs, .* \(2, 8, 4\)"),
        ({"planner": lambda load, current: Placement.contiguous(1, 8, 4)}, r"the plan for step 5 has \(1, 8, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], wording: str) -> None:
    with pytest.raises(DistplbError, match=wording):
        replayed(random_load(6), **options)


# --- iterations of several steps --------------------------------------------------------------------------------


def iterations_of(lengths: list[int], gap: int = 1) -> list[int]:
    """`[S]`: the iteration of each step; iteration n has `lengths[n]` steps."""
    return [gap * nth for nth, length in enumerate(lengths) for _ in range(length)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(1, 12), st.none() | st.integers(1, 8))
def test_no_iteration_is_on_both_sides_of_a_plan(lengths: list[int], every: int, window: int | None) -> None:
    """A plan once saw some micro-batches of an iteration and was judged on its others."""
    iteration, windows = iterations_of(lengths), list[list[int]]()
    load = torch.arange(1, len(iteration) + 1)[:, None, None] * torch.ones(1, 2, 8, dtype=torch.int64)
    trace = Trace(load, trace_of(load).placements, torch.zeros(len(load)).long(), torch.tensor(iteration))

    def planner(steps: Tensor, current: Placement) -> Placement:
        windows.append((steps[:, 0, 0] - 1).tolist())
        return current

    result = replay(trace, planner, topology=TOPOLOGY, every=every, model=MODEL, window=window)
    begins = {iteration.index(at) for at in iteration}
    plain = [min((at for at in begins if at >= step), default=None) for step in range(every, len(load), every)]
    assert result.rebalance_steps == tuple(dict.fromkeys(at for at in plain if at is not None))
    assert len(result.busiest) == len(load)
    for begin, end, steps in zip([0, *result.rebalance_steps], result.rebalance_steps, windows, strict=False):
        assert steps == list(range(steps[0], end))  # the last ones, up to the plan
        assert iteration[end - 1] != iteration[end]
        if window is None:
            assert steps[0] == begin
        else:
            whole = [at for at in begins if max(begin, end - window) <= at < end]
            assert steps[0] == min(whole, default=max(begin, end - window))


def test_a_planner_is_not_called_within_the_only_iteration() -> None:
    load = random_load(0, steps=6)
    trace = Trace(load, trace_of(load).placements, torch.zeros(6).long(), torch.full((6,), 7))
    result = replay(trace, lambda *_: pytest.fail("called"), topology=TOPOLOGY, every=2, model=MODEL)
    assert (result.rebalance_steps, result.slots_moved, len(result.busiest)) == ((), 0, 6)
