"""Every plan keeps the rules of its options, whatever is in force and whatever a move costs.

Cases are drawn at random, and judged by a checker that shares no code with the package.
Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU, N nodes, B groups.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_costs import plain_costs
from torch import Tensor

from distplb import Placement, Topology, plan
from distplb.planning.eplb import rebalance_experts
from distplb.planning.greedy import greedy_numpy
from distplb.planning.options import PlanOptions
from distplb.planning.problem import Problem

Row = list[int]  # [P], the expert of each slot of one layer
EXAMPLES = 300  # per property; 20,000 were run once, with other seeds


@dataclass(frozen=True)
class Rules:
    """The rules for one layer's row."""

    experts: int
    gpus: int
    nodes: int = 1
    groups: int | None = None
    mode: str = "remap"
    slot_class: tuple[int, ...] | None = None
    shared: bool = True

    def broken(self, row: Row, start: Row) -> str | None:
        """The first rule that a row breaks; `start` is the previous row, which defines the experts' classes."""
        for expert in range(self.experts):
            if expert not in row:
                return "an expert has no slot"
        for expert in row:
            if expert < 0 or expert >= self.experts:
                return "no such expert"
        per_gpu, per_node = len(row) // self.gpus, len(row) // self.nodes
        if not self.shared:
            for slot, expert in enumerate(row):
                for other in range(slot + 1, len(row)):
                    if row[other] == expert and other // per_gpu == slot // per_gpu:
                        return "replicas share a GPU"
        if self.groups is not None:
            of_group = self.experts // self.groups
            if self.mode == "permute":
                for slot in range(len(row)):
                    if row[slot] // of_group != row[slot // of_group * of_group] // of_group:
                        return "a block holds two groups"
            elif self.nodes > 1:
                on_node = [0] * self.nodes
                for group in range(self.groups):
                    nodes_of_group = {
                        slot // per_node for slot, expert in enumerate(row) if expert // of_group == group
                    }
                    if len(nodes_of_group) > 1:
                        return "a group is on two nodes"
                    on_node[nodes_of_group.pop()] += 1
                if min(on_node) != max(on_node):
                    return "nodes hold different numbers of groups"
        if self.slot_class is not None:
            for slot, expert in enumerate(row):
                if self.slot_class[slot] != self.slot_class[start.index(expert)]:
                    return "an expert left its class"
        return None


@dataclass(frozen=True)
class Case:
    """A call of `plan`; `rules` in the form of its options."""

    topology: Topology
    rules: Rules
    load: Tensor  # [T, L, E]
    slots: int
    current: list[Row] | None
    price: float | tuple[float, float]
    candidates: int | None
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        rules = self.rules
        return {
            "num_slots": self.slots,
            "num_groups": rules.groups,
            "slot_class": None if rules.slot_class is None else torch.tensor(rules.slot_class),
            "mode": rules.mode,
            "allow_shared_replicas": rules.shared,
        }

    @property
    def placed(self) -> Placement | None:
        rules = self.rules
        return None if self.current is None else Placement(torch.tensor(self.current), rules.experts, rules.gpus)

    @property
    def starts(self) -> list[Row]:
        """The rows that define the classes: the placement in force, or else experts in order."""
        return [[*range(self.slots)]] * self.load.shape[1] if self.current is None else self.current

    def planned(self, engine: str) -> list[Row]:
        placement = plan(
            self.load,
            self.topology,
            current=self.placed,
            move_price=self.price,
            num_candidates=self.candidates,
            seed=self.seed,
            engine=engine,
            **self.options,
        )
        return placement.expert_of_slot.tolist()


# --- random cases -----------------------------------------------------------------------------------------------


@st.composite
def rules_and_slots(draw: st.DrawFn) -> tuple[Topology, Rules, int]:
    """Any rules that `plan` does not refuse, with the number of slots."""
    kind = draw(
        st.sampled_from(["free", "apart", "apart", "groups", "groups", "groups on one node", "blocks", "classes"])
    )
    nodes = 1 if kind == "groups on one node" else draw(st.integers(2 if kind == "groups" else 1, 3))
    topology = Topology(nodes, draw(st.integers(2 if nodes == 1 and kind != "free" else 1, 3)))
    gpus, size = topology.num_gpus, draw(st.integers(1, 5))
    slots, shared = gpus * size, kind != "apart" and draw(st.booleans())
    if kind == "classes":
        one_for_all = draw(st.booleans())
        numbers = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size if one_for_all else slots))
        slot_class = tuple(numbers * gpus if one_for_all else [numbers[slot % len(numbers)] for slot in range(slots)])
        return topology, Rules(slots, gpus, nodes, slot_class=slot_class, shared=shared), slots
    if kind == "blocks":
        even = [block for block in range(1, slots + 1) if slots % block == 0 == min(block % size, size % block)]
        block = draw(st.sampled_from(even + 2 * even[1:-1]))  # blocks of one expert or of all experts bind nothing
        return topology, Rules(slots, gpus, nodes, slots // block, "permute", shared=shared), slots
    if kind in ("free", "apart"):
        mode = draw(st.sampled_from(["remap", "permute"])) if kind == "free" else "remap"
        minimum = slots if mode == "permute" else 1 if shared else size
        return topology, Rules(draw(st.integers(minimum, slots)), gpus, nodes, None, mode, shared=shared), slots
    # Groups on nodes: the fewest experts that a node can hold must leave room to keep replicas apart.
    per_node = slots // nodes
    ways = [
        (groups, of_group)
        for groups in range(1, per_node + 1)
        for of_group in range(1, per_node // groups + 1)
        if shared or groups * of_group >= size
    ]
    groups, of_group = draw(st.sampled_from(ways))
    experts = groups * nodes * of_group
    return topology, Rules(experts, gpus, nodes, groups * nodes, shared=shared), slots


def dealt(random_: random.Random, experts: list[int], gpus: int, slots: int, shared: bool) -> Row:
    """Experts with replicas, dealt one after another, which keeps an expert's replicas apart where they must be."""
    experts = random_.sample(experts, len(experts))
    count = dict.fromkeys(experts, 1)
    for _ in range(slots - len(experts)):
        count[random_.choice([expert for expert in experts if shared or count[expert] < gpus])] += 1
    cards = [expert for expert in experts for _ in range(count[expert])]
    hands = [cards[gpu::gpus] for gpu in range(gpus)]
    return [expert for hand in random_.sample(hands, gpus) for expert in random_.sample(hand, len(hand))]


def legal_row(random_: random.Random, rules: Rules, slots: int) -> Row:
    """A layer that keeps the rules."""
    groups = rules.groups or 1
    of_group = rules.experts // groups
    members = [[*range(group * of_group, (group + 1) * of_group)] for group in random_.sample(range(groups), groups)]
    if rules.groups and rules.mode == "permute":
        return [expert for group in members for expert in random_.sample(group, of_group)]
    nodes = rules.nodes if rules.groups else 1
    row = []
    for node in range(nodes):
        experts = [
            expert for group in members[node * groups // nodes : (node + 1) * groups // nodes] for expert in group
        ]
        row += dealt(random_, experts, rules.gpus // nodes, slots // nodes, rules.shared)
    return row


def any_row(random_: random.Random, rules: Rules, slots: int) -> Row:
    """A layer in which every expert is placed; other rules are kept only by chance."""
    return random_.sample(
        [*range(rules.experts), *random_.choices(range(rules.experts), k=slots - rules.experts)], slots
    )


def uneven_row(random_: random.Random, rules: Rules, slots: int) -> Row:
    """For groups on nodes, a layer that keeps them whole but has more on some nodes; for other rules, a legal one."""
    groups, nodes = rules.groups or 1, rules.nodes
    of_group, fewest = rules.experts // groups, 1 if rules.shared else slots // rules.gpus
    room = fewest <= of_group * (groups // nodes - 1) <= slots // nodes - 2 * of_group
    if rules.mode == "permute" or nodes == 1 or not room:
        return legal_row(random_, rules, slots)
    on_node = [groups // nodes] * nodes
    on_node[0], on_node[-1] = on_node[0] + 1, on_node[-1] - 1
    experts, row = iter(range(rules.experts)), []
    for number in random_.sample(on_node, nodes):
        held = [next(experts) for _ in range(number * of_group)]
        row += dealt(random_, held, rules.gpus // nodes, slots // nodes, rules.shared)
    return row


def nearly_legal_row(random_: random.Random, rules: Rules, slots: int) -> Row:
    """A legal layer in which two slots were swapped."""
    row = legal_row(random_, rules, slots)
    one, other = random_.randrange(slots), random_.randrange(slots)
    row[one], row[other] = row[other], row[one]
    return row


MAKERS = {"legal": legal_row, "any": any_row, "nearly legal": nearly_legal_row, "uneven": uneven_row}
TOKENS = {
    "ties": lambda random_: random_.randrange(3),
    "some": lambda random_: random_.choice([0, 0, random_.randrange(50)]),
    "skewed": lambda random_: int(random_.lognormvariate(6, 1.5)),
    "large": lambda random_: random_.randrange(2**40),
    "none": lambda _: 0,
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    topology, rules, slots = draw(rules_and_slots())
    num_steps, num_layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    random_ = random.Random(draw(st.integers(0, 2**32)))
    kinds = draw(st.lists(st.sampled_from([*TOKENS]), min_size=num_layers, max_size=num_layers))
    load = [[[TOKENS[kind](random_) for _ in range(rules.experts)] for kind in kinds] for _ in range(num_steps)]
    current, price = None, 0.0
    if draw(st.integers(0, 5)):
        makers = draw(st.lists(st.sampled_from([*MAKERS]), min_size=num_layers, max_size=num_layers))
        current = [MAKERS[maker](random_, rules, slots) for maker in makers]
        one = st.sampled_from([0.0, 0.4, 3.0, 100.0, 1e6, 1e30, float("inf")])
        price = draw(st.one_of(st.just(0.0), one, st.tuples(one, one)))
    candidates, seed = draw(st.sampled_from([None, 1, 2, 5])), draw(st.integers(0, 3))
    return Case(topology, rules, torch.tensor(load), slots, current, price, candidates, seed)


# --- the properties ---------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=EXAMPLES)
@given(cases())
def test_a_plan_keeps_the_rules_whatever_is_in_force(case: Case) -> None:
    """A placement in force that broke the rules was once returned unchanged if no plan cost less."""
    rows = case.planned("cpu")
    assert [case.rules.broken(row, start) for row, start in zip(rows, case.starts, strict=True)] == [None] * len(rows)
    assert case.planned("reference") == rows
    if case.current is None:
        return
    stays = [case.rules.broken(row, row) is None for row in case.current]
    moves = case.rules.gpus, case.placed, case.price, case.topology.gpus_per_node
    costs, kept = (plain_costs(case.load, torch.tensor(table), *moves) for table in (rows, case.current))
    for layer, may_stay in enumerate(stays):
        if may_stay:
            assert costs[layer] <= kept[layer]
            assert costs[layer] < kept[layer] or rows[layer] == case.current[layer]


@settings(derandomize=True, deadline=None, max_examples=EXAMPLES)
@given(rules_and_slots(), st.sampled_from([*MAKERS]), st.integers(0, 2**32))
def test_the_search_takes_for_legal_what_keeps_the_rules(
    drawn: tuple[Topology, Rules, int], maker: str, seed: int
) -> None:
    """It decides what to start from and keep, and is checked last. For classes, the start defines what is legal."""
    (topology, rules, slots), random_ = drawn, random.Random(seed)
    start, rows = any_row(random_, rules, slots), [MAKERS[maker](random_, rules, slots) for _ in range(3)]
    load = torch.ones(1, 4, rules.experts, dtype=torch.int64)
    case = Case(topology, rules, load, slots, [start] * 4, 0.0, None, 0)
    problem = Problem(load, topology, PlanOptions(current=case.placed, **case.options))
    is_legal = [rules.broken(row, start) is None for row in [start, *rows]]
    assert problem._allows(torch.tensor([start, *rows])).tolist() == is_legal
    assert problem._may_stay.tolist() == is_legal[:1] * 4
    assert is_legal == [True] * 4 or maker != "legal" or rules.slot_class or not is_legal[0]


@settings(derandomize=True, deadline=None, max_examples=EXAMPLES)
@given(rules_and_slots(), st.sampled_from([*TOKENS]), st.integers(0, 2**32))
def test_what_plans_are_compared_with_keeps_the_rules_that_it_takes(
    drawn: tuple[Topology, Rules, int], tokens: str, seed: int
) -> None:
    """Greedy supports groups on nodes and replicas apart, the replacement for EPLB groups on nodes."""
    (topology, rules, slots), random_ = drawn, random.Random(seed)
    if rules.mode == "permute" or rules.slot_class:
        return
    load = torch.tensor([[TOKENS[tokens](random_) for _ in range(rules.experts)] for _ in range(2)])
    apart = {"num_groups": rules.groups, "allow_shared_replicas": rules.shared}
    for row in greedy_numpy(load, topology, slots, **apart).tolist():
        assert rules.broken(row, row) is None
    together = Rules(rules.experts, rules.gpus, rules.nodes, rules.groups)
    for row in rebalance_experts(load, slots, rules.groups or 1, rules.nodes, rules.gpus)[0].tolist():
        assert together.broken(row, row) is None


# --- the checker ------------------------------------------------------------------------------------------------

FOUR = Rules(4, 2)
BROKEN = [
    (FOUR, [0, 1, 2, 2], "an expert has no slot"),
    (FOUR, [0, 1, 2, 3, 4, 0], "no such expert"),
    (Rules(4, 3, shared=False), [0, 0, 1, 1, 2, 3], "replicas share a GPU"),
    (Rules(4, 2, shared=False), [0, 1, 0, 2, 3, 1], "replicas share a GPU"),
    (Rules(8, 2, groups=4, mode="permute"), [0, 3, 4, 7, 1, 2, 5, 6], "a block holds two groups"),
    (Rules(8, 4, groups=2, mode="permute"), [0, 1, 2, 4, 3, 5, 6, 7], "a block holds two groups"),
    (Rules(8, 4, nodes=2, groups=2), [0, 1, 2, 4, 3, 5, 6, 7], "a group is on two nodes"),
    (Rules(4, 2, nodes=2, groups=4), [0, 1, 2, 2, 3, 2], "a group is on two nodes"),
    (Rules(4, 2, nodes=2, groups=4), [0, 1, 2, 3, 3, 3], "nodes hold different numbers of groups"),
    (Rules(4, 2, slot_class=(0, 1, 0, 1)), [1, 0, 2, 3], "an expert left its class"),
]


@pytest.mark.parametrize(("rules", "row", "broken"), BROKEN)
def test_the_checker_sees_what_is_broken(rules: Rules, row: Row, broken: str) -> None:
    assert rules.broken(row, [*range(len(row))]) == broken


@pytest.mark.parametrize(
    ("rules", "row"),
    [
        (FOUR, [3, 1, 2, 0, 0, 0]),
        (Rules(4, 3, shared=False), [0, 1, 2, 1, 0, 3]),
        (Rules(8, 2, groups=4, mode="permute"), [5, 4, 0, 1, 2, 3, 7, 6]),
        (Rules(8, 2, nodes=2, groups=2, mode="permute"), [5, 4, 6, 7, 2, 3, 0, 1]),
        (Rules(8, 4, nodes=2, groups=2), [5, 4, 6, 7, 2, 3, 0, 1]),
        (Rules(8, 4, nodes=1, groups=2), [0, 1, 2, 4, 3, 5, 6, 7]),  # one node holds all groups
        (Rules(4, 2, nodes=2, groups=4), [0, 2, 2, 1, 3, 3]),
        (Rules(4, 2, slot_class=(0, 1, 0, 1)), [2, 3, 0, 1]),
    ],
)
def test_the_checker_passes_what_is_legal(rules: Rules, row: Row) -> None:
    assert rules.broken(row, [*range(len(row))]) is None


def test_random_layers_break_every_rule_and_those_that_were_made_legal_break_none() -> None:
    """Otherwise the properties above would prove nothing."""
    random_, broke = random.Random(0), set()
    for rules, row, _ in BROKEN[2:]:
        start = [*range(len(row))]
        for _ in range(20):
            legal = legal_row(random_, rules, len(row))
            assert rules.slot_class or rules.broken(legal, legal) is None
            broke |= {rules.broken(maker(random_, rules, len(row)), start) for maker in (any_row, uneven_row)}
    assert broke == {None, *(broken for *_, broken in BROKEN[2:])}
