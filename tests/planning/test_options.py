"""`plan` accepts or refuses its options; a refusal names the value and what to pass instead.

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from distplb import DistplbError, Placement, Topology, plan
from distplb.core.price import TimeCurve
from distplb.planning.options import PlanOptions
from distplb.planning.problem import Problem

LOAD = torch.tensor([[9, 1, 5, 5, 7, 2, 8, 3, 1, 1, 4, 6]])  # 12 experts


def random_placement(num_layers: int, num_experts: int, num_slots: int, num_gpus: int) -> Placement:
    """Every expert, some of them more than once."""
    random_ = random.Random(num_slots)
    spare = [random_.choices(range(num_experts), k=num_slots - num_experts) for _ in range(num_layers)]
    table = [random_.sample([*range(num_experts), *more], num_slots) for more in spare]
    return Placement(torch.tensor(table), num_experts, num_gpus)


# --- refusals ---------------------------------------------------------------------------------------------------

NO_PRICES = [-1.0, float("nan"), (1.0, -1e-9), (float("nan"), 1.0), (1.0,), (1.0, 2.0, 3.0), (), [1.0, 2.0], "5", None]
NO_PRICES += [True, (1.0, None), 1j, torch.tensor([1.0])]

REFUSED = {
    "fewer slots than experts": (
        (2, 2),
        {"num_slots": 8},
        "num_slots is 8 for 12 experts; it counts the slots of all GPUs, and every expert needs one: "
        "pass at least num_slots=12, "
        "or num_slots=20 (8 for replicas), or num_slots=32 (8 on each of 4 GPUs)",
    ),
    "fewer slots than experts, and not a multiple": (
        (1, 5),
        {"num_slots": 10},
        "num_slots is 10 for 12 experts; it counts the slots of all GPUs, and every expert needs one: "
        "pass at least num_slots=15, "
        "or num_slots=25 (13 for replicas), or num_slots=50 (10 on each of 5 GPUs)",
    ),
    "no slots": (
        (2, 2),
        {"num_slots": 0},
        "num_slots is 0 for 12 experts; it counts the slots of all GPUs, and every expert needs one: "
        "pass at least num_slots=12",
    ),
    "slots of no GPU": (
        (2, 2),
        {"num_slots": 14},
        "14 slots cannot be spread evenly over 4 GPUs (2 nodes × 2); pass num_slots=16 (4 for replicas), "
        "or num_nodes and gpus_per_node whose product divides 14",
    ),
    "experts of no GPU": (
        (1, 5),
        {},
        "12 slots cannot be spread evenly over 5 GPUs (1 node × 5); pass num_slots=15 (3 for replicas), "
        "or num_nodes and gpus_per_node whose product divides 12",
    ),
    "replicas in mode permute": (
        (1, 4),
        {"num_slots": 16, "mode": "permute"},
        "num_slots is 16 for 12 experts, and mode 'permute' does not support replicas; pass mode='remap', or "
        "num_slots=12",
    ),
    "replicas that must share": (
        (1, 2),
        {"num_slots": 26, "allow_shared_replicas": False},
        "13 slots on each GPU for 12 experts: some GPU must hold an expert twice; pass allow_shared_replicas=True "
        "or fewer slots",
    ),
    "replicas that must share on their node": (
        (2, 2),
        {"num_slots": 28, "num_groups": 4, "allow_shared_replicas": False},
        "7 slots on each GPU for 6 experts: some GPU must hold an expert twice; pass allow_shared_replicas=True "
        "or fewer slots",
    ),
    "groups of no expert": (
        (1, 2),
        {"num_groups": 5},
        "num_groups is 5, which does not divide 12 experts; pass the router's number of groups, or leave it out",
    ),
    "no groups": (
        (1, 2),
        {"num_groups": 0},
        "num_groups is 0, which does not divide 12 experts; pass the router's number",
    ),
    "minus a group": (
        (1, 2),
        {"num_groups": -1},
        "num_groups is -1, which does not divide 12 experts; pass the router's number",
    ),
    "groups of no node": (
        (2, 2),
        {"num_groups": 3},
        "num_groups is 3, which 2 nodes cannot share evenly; pass a multiple of 2, or leave it out to plan without",
    ),
    "blocks that end inside a GPU": (
        (2, 2),
        {"num_groups": 6, "mode": "permute"},
        "a block of 2 slots (num_groups is 6) neither fills whole GPUs of 3 slots nor divides them, so no block "
        "permutation balances the GPUs; use a number of GPUs that divides 6 or is a multiple of it",
    ),
    "blocks that end inside another GPU": (
        (2, 2),
        {"num_groups": 3, "mode": "permute"},
        "a block of 4 slots (num_groups is 3) neither fills whole GPUs of 3 slots nor divides them, so no block",
    ),
    "classes of other slots": (
        (1, 2),
        {"slot_class": torch.zeros(10, dtype=torch.int64)},
        "slot_class is torch.int64 of shape (10,); pass an integer for each of 12 slots",
    ),
    "classes of layers": (
        (1, 2),
        {"slot_class": torch.zeros(1, 12, dtype=torch.int64)},
        "slot_class is torch.int64 of shape (1, 12); pass an integer for each of 12 slots",
    ),
    "classes that are no integers": (
        (1, 2),
        {"slot_class": torch.zeros(12)},
        "slot_class is torch.float32 of shape (12,); pass an integer for each of 12 slots",
    ),
    "classes that are true or false": (
        (1, 2),
        {"slot_class": torch.zeros(12, dtype=torch.bool)},
        "slot_class is torch.bool of shape (12,); pass an integer for each of 12 slots",
    ),
    "classes and replicas": (
        (1, 2),
        {"slot_class": torch.zeros(12, dtype=torch.int64), "num_slots": 14},
        "slot_class cannot be combined with replicas or groups; leave out num_slots and num_groups, or slot_class",
    ),
    "classes and groups": (
        (1, 2),
        {"slot_class": torch.zeros(12, dtype=torch.int64), "num_groups": 2},
        "slot_class cannot be combined with replicas or groups; leave out num_slots and num_groups, or slot_class",
    ),
    "another mode": ((1, 2), {"mode": "swap"}, "mode is 'swap'; pass 'permute' or 'remap'"),
    "no candidates": ((1, 2), {"num_candidates": 0}, "num_candidates is 0; pass 1 to 2^22"),
    "candidates beyond their bits": ((1, 2), {"num_candidates": 2**22 + 1}, "is 4194305; pass 1 to 2^22"),
    "a negative seed": ((1, 2), {"seed": -1}, "seed is -1; pass an integer in [0, 2^62)"),
    "a seed that does not fit": (
        (1, 2),
        {"seed": 2**62},
        "seed is 4611686018427387904; pass an integer in [0, 2^62)",
    ),
    "another engine": (
        (1, 2),
        {"engine": "warp"},
        "engine 'warp' is unknown; pass one of reference, cpu, cuda, or engine=None",
    ),
    "a price of nothing": (
        (1, 2),
        {"move_price": 3.5},
        "move_price is 3.5 without current; pass the placement in force, or no price",
    ),
    "a pair of prices of nothing": (
        (1, 2),
        {"move_price": (0.0, 1e30)},
        "move_price is (0.0, 1e+30) without current; pass the placement in force, or no price",
    ),
    **{
        f"the price {price!r}": (
            (1, 2),
            {"move_price": price, "current": random_placement(1, 12, 12, 2)},
            f"move_price is {price!r}; pass tokens of the window per moved slot, at least 0: one number, or a ",
        )
        for price in NO_PRICES
    },
    "current with replicas": (
        (1, 2),
        {"current": random_placement(1, 12, 14, 2)},
        "current has (layers, experts, slots, GPUs) = (1, 12, 14, 2), load and topology have (1, 12, 12, 2); "
        "pass the placement in force for the same model",
    ),
    "current without them": (
        (1, 2),
        {"current": random_placement(1, 12, 12, 2), "num_slots": 14},
        "current has (layers, experts, slots, GPUs) = (1, 12, 12, 2), load and topology have (1, 12, 14, 2)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_with_the_value_and_a_remedy(case: str) -> None:
    topology, options, wording = REFUSED[case]
    with pytest.raises(DistplbError) as refused:
        plan(LOAD, Topology(*topology), **options)
    assert wording in str(refused.value)


@pytest.mark.parametrize(
    ("load", "wording"),
    [
        (
            torch.tensor([[1.0, float("nan")]]),
            "load has nan for expert 1 of layer 0 (1 such value); counts must be finite: check",
        ),
        (
            torch.tensor([[float("inf"), 1.0]]),
            "load has inf for expert 0 of layer 0 (1 such value); counts must be finite: check",
        ),
        (
            torch.tensor([[-float("inf"), 1.0]]),
            "load has -inf for expert 0 of layer 0 (1 such value); counts must be finite: check",
        ),
        (
            torch.tensor([[[4, 1]], [[4, -1]]]),
            "load has -1 for expert 1 of layer 0 in step 1 (1 such value); counts must be non-negative: check",
        ),
        (torch.ones(1, 2, dtype=torch.complex64), "load has dtype torch.complex64; pass counts as integers"),
        (torch.ones(2), "load has shape (2,); pass [layers, experts] or [steps, layers, experts], with no empty dim"),
        (torch.ones(1, 1, 1, 2), "load has shape (1, 1, 1, 2); pass [layers, experts] or [steps, layers, experts]"),
        (
            torch.ones(1, 0),
            "load has shape (1, 0); pass [layers, experts] or [steps, layers, experts], with no empty dim",
        ),
        (
            torch.ones(0, 1, 2),
            "load has shape (0, 1, 2); pass [layers, experts] or [steps, layers, experts], with no empty dim",
        ),
    ],
)
def test_what_is_not_a_load_is_refused_with_the_value_and_a_remedy(load: Tensor, wording: str) -> None:
    for options in ({}, {"num_slots": 4}, {"num_groups": 2, "mode": "permute"}):
        with pytest.raises(DistplbError) as refused:
            plan(load, Topology(1, 2), **options)
        assert wording in str(refused.value)


# --- accepted ---------------------------------------------------------------------------------------------------


def test_the_least_and_the_largest_numbers_are_taken() -> None:
    placed = random_placement(1, 12, 12, 2)
    for options in (
        {"num_slots": 12, "mode": "permute"},
        {"num_slots": 24, "allow_shared_replicas": False},
        {"num_groups": 1},
        {"num_groups": 12},
        {"num_groups": 1, "mode": "permute"},
        {"num_groups": 12, "mode": "permute"},
        {"seed": 2**62 - 1, "num_candidates": 3},
        {"num_slots": 240},
        {"slot_class": torch.tensor([2**63 - 1, -(2**63)] * 6), "num_candidates": 2},
        {"slot_class": torch.tensor([2**63 - 1, -(2**63)] * 6), "current": placed, "move_price": 0.5},
        {"current": placed, "move_price": 0},
        {"current": placed, "move_price": 5e-324},
        {"current": placed, "move_price": float("inf")},
        {"current": placed, "move_price": 10**400},
        {"current": placed, "move_price": (float("inf"), 0), "time_curve": TimeCurve((0, 10), (0, 0))},
        {"time_curve": TimeCurve((0, 2**40), (0, 2**20)), "num_slots": 24},
        {"time_curve": TimeCurve((0, 1), (2**40, 2**40)), "num_candidates": 3},
        {"move_price": 0.0},
    ):
        assert plan(LOAD, Topology(1, 2), **options).num_slots == options.get("num_slots", 12)
    PlanOptions(num_candidates=2**22).check(Topology(1, 2), 1, 12)
    # One GPU accepts any number of groups, and one block per GPU any number that divides the experts.
    PlanOptions(num_groups=4, mode="permute").check(Topology(1, 1), 1, 12)
    PlanOptions(num_groups=3, mode="permute").check(Topology(3, 1), 1, 12)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_classes_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    classes = torch.tensor([3, 1, 1, 2, 2, 3] * 2)
    narrow, expected = (
        plan(LOAD, Topology(1, 2), slot_class=each, current=random_placement(1, 12, 12, 2), num_candidates=4)
        for each in (classes.to(dtype), classes)
    )
    assert narrow == expected
    assert PlanOptions(slot_class=classes.to(dtype)).fields(12) == PlanOptions(slot_class=classes).fields(12)


def all_options() -> list[tuple[Topology, dict[str, Any]]]:
    """Every accepted combination, for 16 experts in 3 layers."""
    choices = itertools.product(
        (Topology(1, 4), Topology(2, 4)),
        (None, 16, 24, 48),
        (None, 4, 8),
        (None, torch.tensor([0, 1] * 8)),
        (True, False),
        ("remap", "permute"),
        (False, True),
    )
    legal = []
    for topology, num_slots, groups, slot_class, shared, mode, current in choices:
        placed = random_placement(3, 16, num_slots or 16, topology.num_gpus) if current else None
        options = {
            "num_slots": num_slots,
            "num_groups": groups,
            "slot_class": slot_class,
            "current": placed,
            "allow_shared_replicas": shared,
            "mode": mode,
        }
        try:
            PlanOptions(**options).check(topology, 3, 16)
        except DistplbError:
            continue
        legal.append((topology, options))
    return legal


def test_no_tokens_at_all_are_planned_under_every_combination_of_options() -> None:
    combinations = all_options()
    assert len(combinations) > 90
    for topology, options in combinations:
        for load, num_candidates in ((torch.zeros(3, 16), 1), (torch.zeros(2, 3, 16, dtype=torch.int64), 2)):
            price = 0.0 if options["current"] is None else num_candidates - 0.75
            placement = plan(load, topology, num_candidates=num_candidates, move_price=price, **options)
            assert placement.num_slots == (options["num_slots"] or 16)  # a Placement has checked the rest itself
            if options["current"] is not None:  # a placement that breaks the rules may not stay
                priced = PlanOptions(move_price=price, **options)
                stays = Problem(torch.zeros(1, 3, 16, dtype=torch.int64), topology, priced)._may_stay
                kept = (placement.expert_of_slot == options["current"].expert_of_slot).all(1)
                assert kept.tolist() == stays.tolist()


def test_some_layers_without_tokens_change_nothing_in_the_others() -> None:
    load = torch.randint(0, 1000, (3, 16), generator=torch.Generator().manual_seed(0))
    without = load.clone()
    without[1] = 0
    for topology, options in all_options():
        options["move_price"] = 0.0 if options["current"] is None else (1.0, 20.0)
        partly_empty, expected = (
            plan(each, topology, num_candidates=2, **options).expert_of_slot for each in (without, load)
        )
        assert torch.equal(partly_empty[[0, 2]], expected[[0, 2]])


# --- equal on all ranks -----------------------------------------------------------------------------------------


def test_every_option_but_the_engine_is_a_field_of_its_own() -> None:
    one = {"num_candidates": 1}  # the default depends on `current`
    plain = PlanOptions(**one).fields(12)
    changed = {
        "num_slots": 14,
        "num_groups": 2,
        "slot_class": torch.tensor([0, 1] * 6),
        "current": random_placement(1, 12, 12, 2),
        "num_candidates": 2,
        "seed": 7,
        "engine": "reference",
        "allow_shared_replicas": False,
        "mode": "permute",
        "time_curve": TimeCurve((0, 10), (0, 20)),
    }
    assert set(changed) | {"move_price"} == {field.name for field in dataclasses.fields(PlanOptions)}
    changed_fields = set()
    for option, value in changed.items():
        fields = PlanOptions(**one | {option: value}).fields(12)
        assert list(fields) == list(plain)
        assert all(isinstance(number, int) and abs(number) < 2**63 for number in fields.values())
        differing = [name for name in fields if fields[name] != plain[name]]
        assert len(differing) == (option != "engine")
        assert option == "engine" or option.replace("current", "the current") in differing[0]
        changed_fields |= set(differing)
    assert changed_fields | {name for name in plain if name.startswith("move_price")} == set(plain)
    # By default, P is E.
    assert PlanOptions(12, **one).fields(12) == plain


def test_prices_are_told_apart_to_the_last_bit_and_mean_nothing_without_a_current_placement() -> None:
    current = random_placement(1, 12, 12, 2)

    def fields(price: float | tuple[float, float]) -> dict[str, int]:
        return PlanOptions(current=current, move_price=price).fields(12)

    prices = [0, 1e-300, 1e-9, 2e-9, 1.0, 1.0 + 2**-52, 2.0**46, 2.0**47, 1e30, (0, 1.0), (1.0, 0), (2.5, 1e9)]
    digests = {fields(price)["move_price (digest)"] for price in prices}
    assert len(digests) == len(prices)
    for price in prices:
        assert all(0 <= number < 2**63 for name, number in fields(price).items() if "price" in name)
    pair = fields((2.5, 1e9))
    assert pair["move_price inside a node (in 2^-16)"] == 2.5 * 2**16
    assert pair["move_price between nodes (in 2^-16)"] == 1e9 * 2**16
    assert fields(3) == fields(3.0) == fields((3.0, 3.0))
    assert fields(float("inf")) == fields(10**400) == fields(1e300)  # all saturate
    assert PlanOptions(move_price=5.0).prices == (0.0, 0.0)


def test_the_default_number_of_candidates_is_1_or_4_with_a_current_placement() -> None:
    current = random_placement(1, 12, 12, 2)
    assert [PlanOptions(current=each).candidates for each in (None, current)] == [1, 4]
    for each, number in ((None, 1), (current, 4)):
        assert plan(LOAD, Topology(1, 2), current=each) == plan(
            LOAD, Topology(1, 2), current=each, num_candidates=number
        )
        assert PlanOptions(current=each).fields(12) == PlanOptions(current=each, num_candidates=number).fields(12)


def test_other_curves_have_another_digest() -> None:
    curves = [None, TimeCurve((0, 10), (0, 20)), TimeCurve((0, 10), (0, 21)), TimeCurve((0, 5, 10), (0, 10, 20))]
    assert len({PlanOptions(time_curve=curve).fields(4)["time_curve (digest)"] for curve in curves}) == 4


def test_other_classes_have_another_digest() -> None:
    digests = {
        PlanOptions(slot_class=torch.tensor(classes)).fields(4)["slot_class (digest)"]
        for classes in ([0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 2])
    }
    assert len(digests) == 4
    assert min(digests) >= 0
