"""Compares an event's memory, seconds and `left_out` with plain Python.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import random
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distplb import MoveModel, Placement, RebalanceEvent, TimeCurve, Topology, lower_bound
from distplb.migrate.transfer import MoveTotals
from distplb.planning.options import PlanOptions
from distplb.planning.plan import PlanResult
from distplb.train.rebalance_event import Account, completed
from distplb.train.stop_loss import Pace

MODEL = MoveModel(0.25, bytes_per_slot=600, bandwidth_inside=300, bandwidth_between=100, trust=0.8)


def account(load: Tensor, old: Placement, planned: Placement, target: Placement | None = None, **other: Any) -> Account:
    fields: dict[str, Any] = {
        "iteration": 7,
        "layers": tuple(str(layer) for layer in range(old.num_layers)),
        "topology": Topology(1, old.num_gpus),
        "options": PlanOptions(current=old, move_price=2.0, mode="permute"),
        "model": None,
        "pace": Pace(1.5, 0.1, 10),
        "steps_until_next": len(load),
        "left_alone": (False,) * load.shape[1],
        "router_ties": (0.25,) * load.shape[1],
        "last_applied": 7,
    }
    target = planned if target is None else target
    return Account(old=old, planned=PlanResult(planned, load, "reference"), target=target, **fields | other)


def random_case(seed: int, steps: int, gpus: int, layers: int = 2) -> tuple[Tensor, Placement, Placement]:
    random_ = random.Random(seed)
    experts = 2 * gpus
    load = [[[random_.randrange(1000) for _ in range(experts)] for _ in range(layers)] for _ in range(steps)]
    tables = [[random_.sample(range(experts), experts) for _ in range(layers)] for _ in range(2)]
    old, new = (Placement(torch.tensor(table), experts, gpus) for table in tables)
    return torch.tensor(load), old, new


def plain_busiest(load: Tensor, placement: Placement, curve: TimeCurve | None = None) -> int:
    """The busiest GPU of every step and layer, added up."""
    load = load if curve is None else curve.time(load)
    size, found = placement.slots_per_gpu, 0
    for step in load.tolist():
        for row, table in zip(step, placement.expert_of_slot.tolist(), strict=True):
            found += max(sum(row[e] for e in table[at : at + size]) for at in range(0, len(table), size))
    return found


# --- memory ---------------------------------------------------------------------------------------------------------


def plain_tokens(load: Tensor, placement: Placement) -> list[int]:
    """Tokens of every GPU and step, summed over layers, ascending."""
    size, found = placement.slots_per_gpu, []
    for step in load.tolist():
        for gpu in range(placement.num_gpus):
            tables = [table[gpu * size : (gpu + 1) * size] for table in placement.expert_of_slot.tolist()]
            found.append(sum(row[e] for row, table in zip(step, tables, strict=True) for e in table))
    return sorted(found)


@pytest.mark.parametrize(("steps", "gpus"), [(1, 1), (1, 2), (3, 4), (25, 4), (100, 1), (101, 1), (101, 4), (201, 2)])
def test_peak_and_99th_percentile_of_tokens_before_and_after(steps: int, gpus: int) -> None:
    load, old, new = random_case(steps * gpus, steps, gpus)
    event = account(load, old, new).event(MoveTotals(), "kept", "", {})
    for placement, peak, p99 in (
        (old, event.tokens_peak_before, event.tokens_p99_before),
        (new, event.tokens_peak_after, event.tokens_p99_after),
    ):
        tokens = plain_tokens(load, placement)
        assert peak == tokens[-1]
        assert p99 == tokens[-(-99 * (len(tokens) - 1) // 100)]  # no less than 99 in 100 of them
        assert sum(one > p99 for one in tokens) <= len(tokens) / 100


def test_memory_is_that_of_what_is_carried_out() -> None:
    load, old, new = random_case(5, 4, 2)
    event = account(load, old, new, target=old).event(MoveTotals(), "kept", "", {})
    assert event.tokens_peak_after == event.tokens_peak_before == plain_tokens(load, old)[-1]
    assert event.imbalance_after == event.imbalance_before
    assert event.placement_digest == new.digest()


# --- how even -------------------------------------------------------------------------------------------------------


def test_tokens_of_each_gpu_and_the_hottest_experts_by_hand() -> None:
    load = torch.tensor([[[8, 6, 1, 1, 0, 0], [0, 2, 2, 5, 5, 1]], [[6, 8, 1, 1, 0, 0], [0, 2, 2, 5, 5, 1]]])
    old, new = Placement.contiguous(2, 6, 2), Placement(torch.tensor([[0, 4, 5, 1, 2, 3]] * 2), 6, 2)
    event = account(load, old, new).event(MoveTotals(3, 10, 20, 1), "moved", "", {})
    assert event.tokens_of_gpu_before == ((30, 2), (8, 22))
    assert event.tokens_of_gpu_after == ((14, 18), (12, 18))
    assert event.hottest_experts == (((0, 14), (1, 14), (2, 2), (3, 2)), ((3, 10), (4, 10), (1, 4), (2, 4)))
    assert (event.slots_moved, event.bytes_inside, event.bytes_between, event.bytes_moved) == (3, 10, 20, 30)
    assert (event.num_experts, event.num_nodes) == (6, 1)


def test_balancedness_of_others_and_maxvio_against_plain_python() -> None:
    load, old, new = random_case(6, 5, 3)
    event = account(load, old, new).event(MoveTotals(), "", "", {})
    for placement, vllm, sglang in (
        (old, event.balancedness_vllm_before, event.balancedness_sglang_before),
        (new, event.balancedness_vllm_after, event.balancedness_sglang_after),
    ):
        size, means, busiest = placement.slots_per_gpu, [], []
        for step in load.tolist():
            for row, table in zip(step, placement.expert_of_slot.tolist(), strict=True):
                of_gpu = [sum(row[e] for e in table[at : at + size]) for at in range(0, len(table), size)]
                means.append(sum(of_gpu) / len(of_gpu))
                busiest.append(max(of_gpu))
        assert vllm == pytest.approx(sum(means) / sum(busiest))
        assert sglang == pytest.approx(sum(mean / most for mean, most in zip(means, busiest, strict=True)) / len(means))
    rows = [row for step in load.tolist() for row in step]
    assert event.max_violation == pytest.approx(sum(max(row) * len(row) / sum(row) - 1 for row in rows) / len(rows))


def test_of_a_window_without_tokens_nothing_is_known() -> None:
    """It was reported as perfectly even, with a bound of 1."""
    load, old, new = random_case(1, 2, 2)
    event = account(load * 0, old, new, model=MODEL).event(MoveTotals(), "kept", "why", {"count": 1.0})
    unknown = RebalanceEvent(
        iteration=7, layers=("0", "1"), decision="kept", reason="why", seconds={"count": 1.0}, last_applied=7
    )
    following = ("steps", "imbalance", "tokens", "hottest", "balancedness", "max_violation", "saved", "left_out")
    names = [one.name for one in fields(RebalanceEvent) if one.name.startswith(following)]
    assert len(names) == 19
    assert [getattr(event, name) for name in names] == [getattr(unknown, name) for name in names]
    assert (event.decision, event.reason, event.num_experts, event.bytes_per_slot) == ("kept", "why", 4, 600)
    told = completed(event, load * 0, new, Pace(2.5, 0.1, 3), repaid=None)
    assert told.imbalance_next == (None, None)  # not None, which means that the next window has not been counted yet
    assert RebalanceEvent.from_json(told.to_json()) == told


def test_steps_and_layers_without_tokens_are_none() -> None:
    load, old, new = random_case(8, 6, 2, layers=3)
    load[:, 1] = 0
    load[2, 0] = 0
    padded = torch.cat([load[:3], torch.zeros_like(load), load[3:]])
    event, without = (account(one, old, new).event(MoveTotals(), "", "", {}) for one in (padded, load))
    assert event == without
    assert event.steps == 6
    for levels in (event.imbalance_before, event.imbalance_after, event.imbalance_bound):
        assert [level is None for level in levels] == [False, True, False]
    only = account(load[[0, 1, 3, 4, 5], :1], *(Placement(one.expert_of_slot[:1], 4, 2) for one in (old, new)))
    assert event.imbalance_before[0] == only.event(MoveTotals(), "", "", {}).imbalance_before[0]
    assert event.left_out[1] == "the layer had no tokens"
    assert RebalanceEvent.from_json(event.to_json()) == event
    assert "[null, null]" not in event.to_json()
    assert ", null, " in event.to_json()


def test_what_moves_save_does_not_depend_on_steps_without_tokens() -> None:
    """As many of them are expected until the next rebalance as the window had."""
    load, old, new = random_case(9, 5, 3)
    padded = torch.cat([load, torch.zeros_like(load)])
    event, without = (
        account(one, old, new, model=MODEL, steps_until_next=10 * len(one)).event(MoveTotals(), "", "", {})
        for one in (padded, load)
    )
    assert event.saved_seconds == pytest.approx(without.saved_seconds)


def test_shares_of_replicas_are_exact() -> None:
    """They were integer divisions: one token of an expert with two replicas was on no GPU."""
    load = torch.ones(2, 1, 8, dtype=torch.int64)
    old = Placement.contiguous(1, 8, 4)
    halves = Placement(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7] * 2]), 8, 4)
    thirds = Placement(torch.tensor([[0, 0, 1, 0, 2, 3, 4, 5, 6, 7, 7, 7]]), 8, 4)
    options = PlanOptions(num_slots=16, current=halves)
    even = account(load, halves, halves, options=options).event(MoveTotals(), "", "", {})
    assert even.tokens_of_gpu_before == ((4.0,) * 4,)
    assert (even.tokens_peak_before, even.tokens_p99_before) == (2, 2)
    assert even.imbalance_before == even.imbalance_bound == (1.0,)
    assert even.balancedness_vllm_before == even.balancedness_sglang_before == 1.0
    event = account(load, thirds, thirds, options=PlanOptions(num_slots=12, current=thirds)).event(
        MoveTotals(), "", "", {}
    )
    assert event.tokens_of_gpu_before == (pytest.approx((10 / 3, 14 / 3, 6.0, 2.0)),)
    assert event.tokens_peak_before == 3
    assert event.imbalance_before == (1.5,)
    assert type(account(load, old, old).event(MoveTotals(), "", "", {}).tokens_of_gpu_before[0][0]) is int
    assert RebalanceEvent.from_json(event.to_json()) == event
    saved = account(load, thirds, halves, model=MODEL, steps_until_next=2, options=options)
    assert saved.event(MoveTotals(), "", "", {}).saved_seconds == pytest.approx(2 * (3 - 2) * 0.25 * 0.8)
    curved = replace(options, time_curve=TimeCurve((0, 1, 2), (0, 100, 400)))  # half a token takes 50 ns
    saved = account(load, thirds, halves, model=MODEL, steps_until_next=2, options=curved)
    assert saved.event(MoveTotals(), "", "", {}).saved_seconds == pytest.approx(2 * (300 - 200) * 1e-9 * 0.8)


# --- seconds --------------------------------------------------------------------------------------------------------


def test_modelled_seconds_by_hand() -> None:
    load = torch.tensor([[[8, 6, 1, 1]], [[6, 8, 1, 1]]])
    old = Placement.contiguous(1, 4, 2)
    new = Placement(torch.tensor([[0, 2, 1, 3]]), 4, 2)
    event = account(load, old, new, model=MODEL, steps_until_next=20).event(MoveTotals(), "moved", "", {})
    # 14 + 14 tokens become 9 + 9; ten such windows until the next rebalance. Two slots of 600 bytes at 300 B/s.
    assert event.saved_seconds == pytest.approx(10 * 10 * 0.25 * 0.8)
    assert event.move_seconds == pytest.approx(4.0)
    between = account(load, old, new, model=MODEL, topology=Topology(2, 1)).event(MoveTotals(), "moved", "", {})
    assert between.saved_seconds == pytest.approx(10 * 0.25 * 0.8)
    assert between.move_seconds == pytest.approx(12.0)
    assert (event.seconds_per_token, event.bytes_per_slot) == (0.25, 600)
    assert (event.bandwidth_inside, event.bandwidth_between, event.trust) == (300, 100, 0.8)


@pytest.mark.parametrize("curved", [False, True])
def test_modelled_seconds_against_plain_python(curved: bool) -> None:
    load, old, new = random_case(9, 5, 3)
    curve = TimeCurve((0, 100, 1000), (0, 5_000_000, 6_000_000)) if curved else None
    options = PlanOptions(current=old, move_price=2.0, time_curve=curve)
    event = account(load, old, new, model=MODEL, options=options, steps_until_next=12.5).event(MoveTotals(), "", "", {})
    saved = plain_busiest(load, old, curve) - plain_busiest(load, new, curve)
    assert event.saved_seconds == pytest.approx(saved * (1e-9 if curved else 0.25) * 2.5 * 0.8)
    where = [[set(row[at : at + 2]) for at in range(0, 6, 2)] for row in old.expert_of_slot.tolist()]
    crossed = sum(
        expert not in where[layer][slot // 2]
        for layer, row in enumerate(new.expert_of_slot.tolist())
        for slot, expert in enumerate(row)
    )
    assert event.move_seconds == pytest.approx(crossed * 2.0)
    assert event.time_curve == (((0, 0), (100, 5_000_000), (1000, 6_000_000)) if curved else None)


def test_without_a_model_no_seconds_are_told() -> None:
    event = account(*random_case(1, 2, 2)).event(MoveTotals(), "moved", "", {})
    assert event.saved_seconds is event.move_seconds is event.seconds_per_token is event.bytes_per_slot is None
    assert event.trust is None
    assert event.bandwidth_inside is event.bandwidth_between is event.time_curve is None


# --- left out -------------------------------------------------------------------------------------------------------


def test_what_was_left_out_is_told_layer_by_layer() -> None:
    load = torch.tensor([[[8, 8, 1, 1], [8, 8, 1, 1], [2, 2, 2, 2]]])
    old = Placement.contiguous(3, 4, 2)
    plan = Placement(torch.tensor([[0, 2, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]), 4, 2)
    unmoved, repaying = "2 slots are over the budget", "the search found no other move that pays off"
    assert account(load, old, plan, target=old).event(MoveTotals(), "", "", {}).left_out == (unmoved, repaying, "")
    assert account(load, old, plan).event(MoveTotals(), "", "", {}).left_out == ("", repaying, "")
    free = PlanOptions(current=old)
    assert account(load, old, plan, options=free).event(MoveTotals(), "", "", {}).left_out == ("", "", "")


def test_bounds_are_of_the_window() -> None:
    load, old, new = random_case(2, 3, 2)
    event = account(load, old, new).event(MoveTotals(), "", "", {})
    assert event.imbalance_bound == tuple(lower_bound(load, Topology(1, 2), 4).tolist())
    assert (event.iteration, event.steps, event.layers) == (7, 3, ("0", "1"))
    assert (event.iteration_seconds, event.iteration_seconds_next, event.repaid) == (1.5, None, None)
    assert (event.move_price, event.num_candidates, event.seed) == ((2.0, 2.0), 4, 0)


def test_the_next_window_completes_a_record() -> None:
    load, old, new = random_case(3, 3, 2)
    event = account(load, old, new).event(MoveTotals(), "", "", {})
    following, _, _ = random_case(4, 6, 2)
    told = completed(event, following, new, Pace(2.5, 0.1, 3), repaid=False)
    size, wanted = new.slots_per_gpu, []
    for layer, table in enumerate(new.expert_of_slot.tolist()):
        ratios = []
        for row in following[:, layer].tolist():
            busiest = max(sum(row[e] for e in table[at : at + size]) for at in range(0, len(table), size))
            ratios.append(busiest * 2 / sum(row))
        wanted.append(sum(ratios) / len(ratios))
    assert told.imbalance_next == pytest.approx(wanted)
    assert (told.iteration_seconds_next, told.repaid, told.iteration) == (2.5, False, 7)
