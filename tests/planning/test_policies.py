"""What each policy promises of its placements, and how close they are to the optimum where it can be enumerated.

Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU, N nodes, B groups, W placements.
"""

from __future__ import annotations

import random
from itertools import combinations, combinations_with_replacement, permutations, product

import pytest
import torch
from torch import Tensor

from distplb import Placement, Topology, plan
from distplb.planning.options import PlanOptions
from distplb.planning.problem import Problem


def rows_of_every_kind(seed: int, num_experts: int, repeats: int = 10) -> Tensor:
    """`[L, E]`: lognormal, Zipf, a few hot experts, many zeros, and ties."""
    random_, rows = random.Random(f"{seed} {num_experts}"), []
    for _ in range(repeats):
        skew, hot = random_.uniform(0.5, 2), random_.sample(range(num_experts), max(1, num_experts // 16))
        zipf = [int(10**5 / rank**skew) for rank in range(1, num_experts + 1)]
        rows += [
            [int(random_.lognormvariate(6, 1.2)) for _ in range(num_experts)],
            random_.sample(zipf, num_experts),
            [random_.randrange(50, 150) * (50 if expert in hot else 1) for expert in range(num_experts)],
            [random_.choice([0, 0, 0, random_.randrange(1000)]) for _ in range(num_experts)],
            [random_.randrange(4) for _ in range(num_experts)],
        ]
    return torch.tensor(rows)


def steps_of(load: Tensor, num_steps: int) -> Tensor:
    """`[T, L, E]`: the load `[L, E]`, with experts that fluctuate from step to step."""
    wobble = torch.randn(num_steps, *load.shape, generator=torch.Generator().manual_seed(len(load)))
    return load[None] if num_steps == 1 else (load * wobble.mul(0.5).exp()).long()


def random_placement(seed: int, num_layers: int, num_experts: int, num_slots: int, num_gpus: int) -> Placement:
    """Every expert, some of them more than once."""
    random_ = random.Random(seed)
    spare = [random_.choices(range(num_experts), k=num_slots - num_experts) for _ in range(num_layers)]
    table = [random_.sample([*range(num_experts), *more], num_slots) for more in spare]
    return Placement(torch.tensor(table), num_experts, num_gpus)


def costs(load: Tensor, placement: Placement) -> Tensor:
    """`[L]` float64: the busiest GPU's tokens, added up over the steps; replicas share evenly."""
    share = load.double() / placement.replicas  # [T, L, E]
    slots = placement.expert_of_slot.expand(len(load), -1, -1)
    return share.gather(2, slots).unflatten(2, (placement.num_gpus, -1)).sum(3).amax(2).sum(0)


def assert_no_dearer_than_afresh(load: Tensor, topology: Topology, other: Placement, options: dict) -> Placement:
    """Assert that a plan from `other` costs no more than its candidates that start afresh. Returns the plan."""
    one, fresh = (plan(load, topology, current=each, **options | {"num_candidates": 1}) for each in (other, None))
    assert (costs(load, one) <= costs(load, fresh) * (1 + 1e-9)).all()  # whole cells are renumbered
    planned = plan(load, topology, current=other, **options)
    names = {name: value for name, value in options.items() if name != "num_candidates"}
    minimum = Problem(load, topology, PlanOptions(**names)).costs(torch.arange(0, options["num_candidates"], 2)).amin(0)
    problem = Problem(load, topology, PlanOptions(current=other, **names))
    assert (problem._cost(planned.expert_of_slot) <= minimum).all()
    return planned


def sharing(placement: Placement) -> Tensor:
    """`[L]` bool: whether a GPU holds an expert twice."""
    inside = placement.expert_of_slot.unflatten(1, (placement.num_gpus, -1)).sort(2).values
    return (inside[..., 1:] == inside[..., :-1]).any(2).any(1)


def minimum_costs(load: Tensor, parts: Tensor) -> Tensor:
    """`[L]` float64: the least cost over all placements, given as each GPU's part of each expert `[W, M, E]`."""
    return torch.stack([(parts @ layer.T.double()).amax(1).sum(1).min() for layer in load.unbind(1)])


# --- groups on nodes --------------------------------------------------------------------------------------------

GROUPS = [
    # (N, GPUs on each, E, P, B)
    (2, 2, 16, 16, 4),
    (2, 4, 16, 32, 2),  # one group per node
    (2, 4, 12, 24, 6),
    (4, 2, 32, 48, 8),
    (3, 3, 9, 18, 9),  # one expert per group
    (2, 3, 6, 30, 2),
    (1, 4, 16, 24, 4),  # one node: groups mean nothing
]


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("shape", GROUPS)
def test_a_node_holds_whole_groups_with_all_their_replicas(shape: tuple[int, ...], num_steps: int) -> None:
    nodes, gpus, num_experts, num_slots, groups = shape
    load = steps_of(rows_of_every_kind(0, num_experts), num_steps)
    current = random_placement(1, load.shape[1], num_experts, num_slots, nodes * gpus)
    topology = Topology(nodes, gpus)
    options = {"num_slots": num_slots, "num_groups": groups, "num_candidates": 3}
    fresh = plan(load, topology, **options)
    again = assert_no_dearer_than_afresh(load, topology, plan(load.flip(2), topology, **options), options)
    # A placement in force may break the rule: it is not kept, even if nothing costs less, nor mixed with a new one.
    mended = plan(load, topology, current=current, **options)
    for placement in (fresh, again, mended):
        group = placement.expert_of_slot * groups // num_experts  # [L, P]
        for layer in group.unflatten(1, (nodes, -1)).tolist():
            on_node = [set(node) for node in layer]
            assert sum(len(node) for node in on_node) == len(set.union(*on_node)) == groups
            assert {len(node) for node in on_node} == {groups // nodes}


def test_the_nodes_are_the_best_there_are_where_groups_are_few() -> None:
    """With one expert per group and one GPU per node, packing groups into nodes is the whole problem."""
    load = rows_of_every_kind(2, 8)[None]
    planned = plan(load, Topology(2, 1), num_groups=8, num_candidates=8)
    assert torch.equal(costs(load, planned), minimum_costs(load, parts_of_experts(8, 8, 2, shared=False)))


# --- blocks -----------------------------------------------------------------------------------------------------

BLOCKS = [
    # (E, M, B)
    (16, 8, 4),  # a block over two GPUs
    (16, 8, 2),  # over four
    (16, 4, 4),  # one block per GPU
    (16, 2, 8),  # four blocks per GPU
    (12, 3, 6),
    (24, 2, 2),
    (24, 12, 2),
    (16, 4, 1),  # one group: any permutation
    (12, 4, 12),  # one expert per group: any permutation
    (18, 3, 9),
]


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("shape", BLOCKS)
def test_a_block_holds_the_experts_of_one_group(shape: tuple[int, ...], num_steps: int) -> None:
    num_experts, num_gpus, groups = shape
    load = steps_of(rows_of_every_kind(0, num_experts), num_steps)
    options = {"num_groups": groups, "mode": "permute", "num_candidates": 3}
    fresh, other = (plan(each, Topology(1, num_gpus), **options) for each in (load, load.flip(2)))
    again = assert_no_dearer_than_afresh(load, Topology(1, num_gpus), other, options)
    random_current = random_placement(1, load.shape[1], num_experts, num_experts, num_gpus)
    mended = plan(load, Topology(1, num_gpus), current=random_current, **options)
    for placement in (fresh, again, mended):
        assert not placement.has_replicas
        group = placement.expert_of_slot * groups // num_experts
        assert (group.unflatten(1, (groups, -1)).diff(dim=2) == 0).all()


@pytest.mark.parametrize("shape", [(64, 8, 2), (64, 4, 32), (48, 4, 4), (48, 2, 2), (64, 16, 4)])
def test_polish_evens_out_blocks_and_keeps_them(shape: tuple[int, int, int]) -> None:
    num_experts, num_gpus, groups = shape
    load, random_ = rows_of_every_kind(0, num_experts)[None], random.Random(3)
    size, rows = num_experts // groups, []
    for _ in range(load.shape[1]):
        blocks = [random_.sample(range(group * size, (group + 1) * size), size) for group in range(groups)]
        rows.append([expert for block in random_.sample(blocks, groups) for expert in block])
    start = Placement(torch.tensor(rows), num_experts, num_gpus)
    options = PlanOptions(num_groups=groups, mode="permute")
    polished = Problem(load, Topology(1, num_gpus), options).polish(start.expert_of_slot)
    group = polished * groups // num_experts
    assert (group.unflatten(1, (groups, -1)).diff(dim=2) == 0).all()
    after, before = (costs(load, each) for each in (Placement(polished, num_experts, num_gpus), start))
    assert (after <= before).all()
    assert groups == num_gpus or after.sum() < 0.95 * before.sum()


def ways_to_pack(items: tuple[int, ...], size: int) -> list[list[tuple[int, ...]]]:
    """Every way to split items into sets of `size`, whatever the order of the sets."""
    if not items:
        return [[]]
    first, rest = items[0], items[1:]
    return [
        [(first, *beside), *others]
        for beside in combinations(rest, size - 1)
        for others in ways_to_pack(tuple(item for item in rest if item not in beside), size)
    ]


def block_permutations(num_experts: int, num_gpus: int, groups: int) -> Tensor:
    """`[W, M, E]`: each GPU's part of each expert, for all block permutations up to renumbering."""
    size = num_experts // groups
    members = [tuple(range(group * size, (group + 1) * size)) for group in range(groups)]
    if groups <= num_gpus:
        inside = [ways_to_pack(group, num_experts // num_gpus) for group in members]
        tables = [[e for block in way for gpu in block for e in gpu] for way in product(*inside)]
    else:
        packed = ways_to_pack(tuple(range(groups)), groups // num_gpus)
        tables = [[e for gpu in way for group in gpu for e in members[group]] for way in packed]
    return parts_of(torch.tensor(tables), num_experts, num_gpus)


def parts_of(tables: Tensor, num_experts: int, num_gpus: int) -> Tensor:
    """`[W, M, E]` float64: each GPU's part of each expert, from tables `[W, P]`."""
    slots = tables.unflatten(1, (num_gpus, -1))  # [W, M, G]
    held = torch.zeros(len(tables), num_gpus, num_experts, dtype=torch.float64)
    held.scatter_add_(2, slots, torch.ones(slots.shape, dtype=torch.float64))
    return held / held.sum(1, keepdim=True)


def ratio_to_minimum(load: Tensor, planned: Placement, minimum: Tensor) -> Tensor:
    """`[layers with tokens]`: the cost in units of the minimum, which no placement undercuts."""
    ratio = (costs(load, planned) / minimum)[minimum > 0]
    assert (ratio > 1 - 1e-9).all()
    return ratio


@pytest.mark.parametrize("shape", [(8, 4, 2), (12, 6, 3), (16, 4, 8), (12, 3, 6), (8, 8, 4), (12, 2, 6)])
def test_block_permutations_are_the_best_there_are_where_all_can_be_looked_at(shape: tuple[int, int, int]) -> None:
    """Measured: the minimum cost in all 50 rows."""
    num_experts, num_gpus, groups = shape
    load = rows_of_every_kind(1, num_experts)[None]
    minimum = minimum_costs(load, block_permutations(num_experts, num_gpus, groups))
    for num_candidates in (1, 8):
        planned = plan(load, Topology(1, num_gpus), num_groups=groups, mode="permute", num_candidates=num_candidates)
        assert ratio_to_minimum(load, planned, minimum).mean() < 1.001


# --- classes ----------------------------------------------------------------------------------------------------

CLASSES = [
    # (M, the class of each slot)
    (2, [0, 1, 0, 1]),
    (4, [0, 1, 0, 1, 0, 1, 0, 1]),
    (3, [0, 1, 1, 0, 1, 1, 0, 1, 1]),  # two slots of a class on each GPU
    (2, [7, 7, 7, -3, 7, 7, 7, -3]),
    (3, [0, 1, 1, 0, 0, 1]),  # different classes on each GPU
    (4, [0, 0, 0, 1, 1, 1, 1, 1]),
    (2, [0, 1, 1, 1, 1, 1, 0, 1]),
    (2, [0, 0, 0, 1, 1, 1]),  # nothing can move to another GPU
    (3, [0, 0, 0, 0, 0, 0]),  # anything can
]


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize(("num_gpus", "classes"), CLASSES)
def test_an_expert_stays_in_slots_of_its_class(num_gpus: int, classes: list[int], num_steps: int) -> None:
    slot_class, num_slots = torch.tensor(classes), len(classes)
    load = steps_of(rows_of_every_kind(0, num_slots), num_steps)
    start = random_placement(1, load.shape[1], num_slots, num_slots, num_gpus)
    for current in (None, start):
        planned = plan(load, Topology(1, num_gpus), slot_class=slot_class, current=current, num_candidates=3)
        began = Placement.contiguous(load.shape[1], num_slots, num_gpus) if current is None else current
        assert torch.equal(slot_class[planned.inverse], slot_class[began.inverse])  # [L, E, 1]
        if current is not None or num_steps == 1:
            assert (costs(load, planned) <= costs(load, began)).all()
    kept = (planned.expert_of_slot == start.expert_of_slot).all(1)
    assert torch.equal(kept, costs(load, planned) == costs(load, start))


def class_permutations(start: list[int], classes: list[int]) -> Tensor:
    """`[W, P]`: every table that leaves experts in slots of their class."""
    slots = [[slot for slot, number in enumerate(classes) if number == one] for one in sorted(set(classes))]
    tables = []
    for orders in product(*(permutations([start[slot] for slot in of_class]) for of_class in slots)):
        table = [-1] * len(classes)
        for of_class, order in zip(slots, orders, strict=True):
            for slot, expert in zip(of_class, order, strict=True):
                table[slot] = expert
        tables.append(table)
    return torch.tensor(tables)


@pytest.mark.parametrize(("num_gpus", "classes"), CLASSES)
def test_experts_in_their_classes_are_nearly_as_even_as_can_be(num_gpus: int, classes: list[int]) -> None:
    """Measured: the minimum cost if no GPU has two slots of a class; otherwise 1.013 times that, or 1.041 if all slots
    are of one class; with 8 candidates 1.019."""
    num_slots = len(classes)
    load = rows_of_every_kind(1, num_slots)[None]
    row = random.Random(2).sample(range(num_slots), num_slots)
    start = Placement(torch.tensor(row).expand(load.shape[1], -1), num_slots, num_gpus)
    minimum = minimum_costs(load, parts_of(class_permutations(row, classes), num_slots, num_gpus))
    size = num_slots // num_gpus
    single = all(len(set(classes[at : at + size])) == size for at in range(0, num_slots, size))
    for num_candidates, bound in ((1, 1.05), (8, 1.025)):
        options = {"slot_class": torch.tensor(classes), "current": start, "num_candidates": num_candidates}
        ratio = ratio_to_minimum(load, plan(load, Topology(1, num_gpus), **options), minimum)
        assert ratio.mean() <= (1 + 1e-9 if single else bound)


# --- replicas that may share a GPU, or not ----------------------------------------------------------------------

REPLICAS = [
    # (N, GPUs on each, E, P, B)
    (1, 4, 8, 12, None),
    (1, 4, 8, 28, None),
    (1, 3, 5, 9, None),
    (1, 3, 5, 15, None),  # every expert on every GPU
    (1, 2, 10, 12, None),
    (1, 2, 3, 4, None),
    (2, 2, 7, 24, None),
    (2, 4, 16, 32, 4),
    (2, 3, 10, 30, 2),  # every expert on every GPU of its node
    (2, 3, 12, 30, 4),
]


@pytest.mark.parametrize("shape", REPLICAS)
def test_replicas_that_must_not_share_a_gpu_do_not(shape: tuple) -> None:
    """Also if experts are few, if packs with room already hold the last ones, or if they share in the placement in
    force."""
    nodes, gpus, num_experts, num_slots, groups = shape
    current = random_placement(3, 50, num_experts, num_slots, nodes * gpus)
    assert sharing(current).any()
    for load in (rows_of_every_kind(0, num_experts)[None], steps_of(rows_of_every_kind(1, num_experts), 3)):
        for start, num_candidates in ((None, 1), (None, 4), (current, 4)):
            planned = plan(
                load,
                Topology(nodes, gpus),
                num_slots=num_slots,
                num_groups=groups,
                num_candidates=num_candidates,
                current=start,
                allow_shared_replicas=False,
            )
            assert not sharing(planned).any()


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("shape", [shape for shape in REPLICAS if shape[3] < shape[1] * shape[2]])
def test_a_candidate_lets_replicas_share_a_gpu_only_where_that_costs_less(shape: tuple, num_steps: int) -> None:
    """With several steps, all tables are settled afterwards, which may also join or separate replicas."""
    nodes, gpus, num_experts, num_slots, groups = shape
    load, topology = steps_of(rows_of_every_kind(1, num_experts), num_steps), Topology(nodes, gpus)

    def problems() -> list[Problem]:
        return [
            Problem(load, topology, PlanOptions(num_slots, num_groups=groups, allow_shared_replicas=shared))
            for shared in (True, False)
        ]

    (free, apart), any_share = problems(), False
    for problem in (free, apart):
        assert (problem._terms is None) == (num_steps == 1)
        problem._terms = None  # leaves the searched tables unsettled
    for candidate in range(3):
        cost, cost_apart = (problem.costs(torch.tensor([candidate]))[0] for problem in (free, apart))
        assert num_steps > 1 or (cost <= cost_apart).all()  # the search is on the sum over the steps
        names = torch.full((load.shape[1],), candidate)
        tables = [problem.build(names) for problem in (free, apart)]
        together = sharing(Placement(tables[0], num_experts, topology.num_gpus))
        assert (cost[together] < cost_apart[together]).all()
        any_share |= bool(together.any())
        for settling, before in zip(problems(), (cost, cost_apart), strict=True):
            after = settling.costs(torch.tensor([candidate]))[0]
            assert (after <= before * (1 + 2**-20)).all()  # settled in coarser units
            assert num_steps == 1 or not settling._shares or num_experts == 3 or after.sum() < before.sum()
        assert not sharing(Placement(settling.build(names), num_experts, topology.num_gpus)).any()
    assert any_share


# --- the optimum ------------------------------------------------------------------------------------------------


def parts_of_experts(num_experts: int, num_slots: int, num_gpus: int, *, shared: bool) -> Tensor:
    """`[W, M, E]`: each GPU's part of each expert, for all replica counts and packings up to renumbering GPUs."""
    size = num_slots // num_gpus
    gpus = [g for g in combinations_with_replacement(range(num_experts), size) if shared or len(set(g)) == size]
    ways = combinations_with_replacement(gpus, num_gpus)
    tables = [sum(way, ()) for way in ways if len({e for gpu in way for e in gpu}) == num_experts]
    return parts_of(torch.tensor(tables), num_experts, num_gpus)


SMALL = [
    # (E, P, M), and the measured mean ratio to the minimum cost with one candidate, if replicas may share a GPU, and if
    # not. Some rows are ties or hold few tokens, so that one token makes the ratio 4/3 or 3/2.
    ((8, 8, 2), 1.000, None),
    ((8, 8, 4), 1.000, None),
    ((9, 9, 3), 1.001, None),
    ((3, 4, 2), 1.000, 1.047),
    ((4, 6, 2), 1.011, 1.034),
    ((4, 6, 3), 1.033, 1.057),
    ((4, 8, 4), 1.023, 1.029),
    ((5, 6, 3), 1.000, 1.017),
    ((5, 8, 2), 1.009, 1.021),
    ((5, 8, 4), 1.049, 1.067),
    ((6, 8, 2), 1.007, 1.009),
    ((6, 8, 4), 1.007, 1.019),
    ((6, 9, 3), 1.013, 1.015),
    ((5, 10, 2), 1.000, 1.000),
]
_SLACK = 0.004


@pytest.mark.parametrize(("shape", "together", "apart"), SMALL)
def test_small_plans_are_nearly_the_best_there_are(
    shape: tuple[int, int, int], together: float, apart: float | None
) -> None:
    num_experts, num_slots, num_gpus = shape
    load = rows_of_every_kind(3, num_experts, repeats=20)[None]
    for shared, measured in ((True, together), (False, apart)):
        if measured is None:
            continue
        minimum = minimum_costs(load, parts_of_experts(num_experts, num_slots, num_gpus, shared=shared))
        for num_candidates in (1, 8):
            options = {"num_slots": num_slots, "num_candidates": num_candidates, "allow_shared_replicas": shared}
            ratio = ratio_to_minimum(load, plan(load, Topology(1, num_gpus), **options), minimum)
            assert ratio.mean() <= measured + _SLACK
