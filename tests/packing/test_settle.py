"""Steps 10 and 11: the specification against plain loops over plain lists, and the properties that it promises.

Shapes: X rows, T steps, L layers, E experts, P slots, M packs, G = P / M slots in each.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from packing_cases import SMALL_SETTLED, TINY_SETTLED, SettleCase, model_settle_case, settle_cases, woken

from distplb.packing import cpu, reference, settle
from distplb.packing.settle import Terms

Table = list[int]  # [P], the expert of each slot

SHAPES = [*TINY_SETTLED, *SMALL_SETTLED]  # (E, M, G, T), the first with one pack
LARGER = [*SHAPES, (12, 4, 6, 8), (24, 6, 5, 5), (40, 10, 4, 12)]


class Oracle:
    """One row, as the docstring of `settle` describes it."""

    def __init__(self, case: SettleCase, x: int) -> None:
        layer, terms = int(case.layer[x]), case.terms
        self.table: Table = case.table[x].tolist()
        self.num_packs, self.size = case.num_packs, len(self.table) // case.num_packs
        self.apart, self.region, self.ceiling = terms.apart, terms.region.tolist(), int(case.ceiling[x])
        self.share = [
            [w // max(1, self.table.count(e)) for e, w in enumerate(step)] for step in terms.load[layer].tolist()
        ]
        self.distance = None if terms.distance is None else terms.distance[layer].tolist()
        self.price = None if terms.price is None else terms.price[layer].tolist()

    def packs(self, table: Table) -> list[Table]:
        return [table[begin : begin + self.size] for begin in range(0, len(table), self.size)]

    def loads(self, table: Table) -> list[list[int]]:
        """`[T][M]`."""
        return [[sum(step[expert] for expert in pack) for pack in self.packs(table)] for step in self.share]

    def tolls(self, table: Table) -> int:
        if self.distance is None or self.price is None:
            return 0
        return sum(self.price[self.distance[expert][slot // self.size]] for slot, expert in enumerate(table))

    def cost(self, table: Table) -> int:
        return sum(max(step) for step in self.loads(table)) + self.tolls(table)

    def exchanges(self, table: Table, here: int) -> Iterator[tuple[int, Table]]:
        """Each allowed exchange of pack `here`: the other pack, and the table after it."""
        packs = self.packs(table)
        for slot in range(here * self.size, (here + 1) * self.size):
            for place in range(len(table)):
                there = place // self.size
                if there == here or self.region[slot] != self.region[place] or table[slot] == table[place]:
                    continue
                if self.apart and (table[slot] in packs[there] or table[place] in packs[here]):
                    continue
                after = list(table)
                after[slot], after[place] = after[place], after[slot]
                yield there, after

    def settled(self) -> Table:
        return self.step_11(self.step_10(self.table))

    def step_10(self, table: Table) -> Table:
        best, start = table, self.loads(table)
        means = [sum(step) // self.num_packs for step in start]
        for part in (self.ceiling, self.ceiling // 4):
            limits = [mean + (max(step) - mean) * part // 2**16 for mean, step in zip(means, start, strict=True)]
            tired: set[int] = set()
            for _ in range(64 + 16 * self.num_packs):
                above = self.above(table, limits)
                here = self.first_of_the_most(above, tired)
                if here is None:
                    break
                highest, chosen, partner = 0, table, here
                for there, after in self.exchanges(table, here):
                    then = self.above(after, limits)
                    gain = max(0, above[here] + above[there] - then[here] - then[there])
                    score = gain * 2**30 // (1 + max(0, self.tolls(after) - self.tolls(table)))
                    if score > highest:
                        highest, chosen, partner = score, after, there
                if highest == 0:
                    tired.add(here)
                    continue
                table, tired = chosen, self.still_tired(tired, here, partner)
                if self.cost(table) < self.cost(best):
                    best = table
        return best

    def still_tired(self, tired: set[int], here: int, partner: int) -> set[int]:
        """The tired packs after an exchange of two packs in step 10."""
        return tired - {here, partner}

    def step_11(self, table: Table) -> Table:
        tired: set[int] = set()
        for _ in range(64 + 16 * self.num_packs if self.num_packs > 1 else 0):
            alone = [0] * self.num_packs
            for step in self.loads(table):
                second, first = sorted(step)[-2:]
                alone[step.index(first)] += first - second
            here = self.first_of_the_most(alone, tired)
            if here is None:
                break
            best = min((after for _, after in self.exchanges(table, here)), key=self.cost, default=table)
            if self.cost(best) < self.cost(table):
                table, tired = best, set()
            else:
                tired.add(here)
        return table

    def above(self, table: Table, limits: list[int]) -> list[int]:
        """`[M]`: tokens of each pack above the limits, summed over the steps."""
        loads = self.loads(table)
        return [
            sum(max(0, step[p] - limit) for step, limit in zip(loads, limits, strict=True))
            for p in range(self.num_packs)
        ]

    def first_of_the_most(self, number: list[int], tired: set[int]) -> int | None:
        """The first pack with the largest number that is not tired, if that is above 0."""
        pack = max((p for p in range(self.num_packs) if p not in tired), key=lambda p: number[p], default=None)
        return None if pack is None or number[pack] == 0 else pack


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_settle_is_what_plain_loops_make_of_its_docstring(shape: tuple[int, int, int, int], seed: int) -> None:
    (case,) = settle_cases([shape], rows=8, seed=seed)
    expected = [Oracle(case, x).settled() for x in range(len(case.table))]
    assert case.answer(reference).tolist() == expected


def test_a_pack_that_found_nothing_looks_again_once_another_changed_it() -> None:
    class Forgetful(Oracle):
        def still_tired(self, tired: set[int], here: int, partner: int) -> set[int]:
            return tired - {here}

    for case in woken():
        expected = Oracle(case, 0).settled()
        assert Forgetful(case, 0).settled() != expected  # otherwise this tests nothing
        assert case.answer(reference).tolist() == [expected]


def test_it_stops_after_as_many_scans_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [settle.scans(num_packs) for num_packs in (1, 2, 32)] == [80, 96, 576]
    (case,) = settle_cases([(40, 10, 4, 12)], rows=6)
    whole = case.answer(reference)
    monkeypatch.setattr(settle, "scans", lambda num_packs: 0)
    assert torch.equal(case.answer(reference), case.table)
    monkeypatch.setattr(settle, "scans", lambda num_packs: 1)
    moved = (case.answer(reference) != case.table).sum(1)
    assert ((moved > 0) & (moved <= 6)).any()  # at most three exchanges
    assert (moved <= 6).all()
    assert ((whole != case.table).sum(1) > 6).any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", LARGER)
def test_no_row_costs_more_and_every_region_keeps_its_slots_experts(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    (case,) = settle_cases([shape], rows=16, seed=seed)
    table = case.answer(cpu)
    assert (case.costs(table) <= case.costs(case.table)).all()
    for region in case.terms.region.unique():
        inside = case.terms.region == region
        assert torch.equal(table[:, inside].sort(dim=1).values, case.table[:, inside].sort(dim=1).values)


@pytest.mark.parametrize("num_slots", [256, 288])
def test_every_packing_of_a_model_gets_cheaper(num_slots: int) -> None:
    """Starting from balanced packings: free, and with a price for moves from another packing within nodes."""
    case = model_settle_case(num_slots)
    for one in (case, case.free()):
        assert (one.costs(one.answer(cpu)) < one.costs(one.table)).all()


def sharing(case: SettleCase, table: torch.Tensor) -> torch.Tensor:
    """`[X]`: number of slots whose expert is already in their pack."""
    inside = table.unflatten(1, (case.num_packs, -1)).sort(dim=2).values
    return (inside[..., 1:] == inside[..., :-1]).sum((1, 2))


def test_replicas_apart_stay_apart_and_others_may_come_together() -> None:
    """If replicas may not share a pack, no row ends with more of them sharing one than before."""
    together = 0
    for seed in range(4):
        for case in settle_cases([shape for shape in LARGER if shape[1] * shape[2] > shape[0]], rows=16, seed=seed):
            before = sharing(case, case.table)
            may, may_not = (case._replace(terms=case.terms._replace(apart=apart)) for apart in (False, True))
            assert (sharing(case, may_not.answer(cpu)) <= before).all()
            together += int((sharing(case, may.answer(cpu)) > before).sum())
    assert together > 20


def test_most_rows_are_improved_and_both_steps_do_some_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would also pass if nothing happened."""
    many = [case for seed in range(2) for case in settle_cases(SHAPES[1:], rows=8, seed=seed)]
    whole = [case.answer(reference) for case in many]
    lower = torch.cat([case.costs(table) < case.costs(case.table) for case, table in zip(many, whole, strict=True)])
    assert lower.float().mean() > 0.5
    for step, other in (("_under_ceilings", lambda row, ceiling: row), ("_descend", lambda row: row)):
        with monkeypatch.context() as patch:
            patch.setattr(settle, step, other)
            without = [case.answer(reference) for case in many]
        differ = torch.cat([(one != table).any(1) for one, table in zip(without, whole, strict=True)])
        assert differ.sum() > 20, step


def test_a_ceiling_finds_what_descent_alone_does_not() -> None:
    """Two packs are equally heavy, so no single exchange lowers the cost; under a ceiling both get lighter."""
    zero = torch.zeros(1, dtype=torch.int64)
    terms = Terms(torch.tensor([[[9, 5, 9, 5, 2, 4, 2, 4]]]), torch.zeros(8, dtype=torch.int64))
    case = SettleCase(4, terms, torch.arange(8)[None], zero, zero)
    assert case.costs(case.table).tolist() == [14]
    assert Oracle(case, 0).step_11([*range(8)]) == [*range(8)]
    assert case.costs(case.answer(reference)).tolist() == [11]


def test_a_toll_of_nothing_is_none() -> None:
    for case in settle_cases(SHAPES[1:], rows=8, seed=1):
        if case.terms.price is not None:
            free = case._replace(terms=case.terms._replace(distance=None, price=None))
            priced = case._replace(terms=case.terms._replace(price=torch.zeros_like(case.terms.price)))
            assert torch.equal(priced.answer(reference), free.answer(reference))


def test_a_move_is_made_only_where_it_is_worth_its_toll() -> None:
    """An exchange lowers the cost of one step from 12 to 10 and moves two experts."""
    zero = torch.zeros(1, dtype=torch.int64)
    distance = torch.tensor([[[0, 1], [0, 1], [1, 0], [1, 0]]], dtype=torch.int8)
    for toll, is_made in ((0, True), (1, False), (5, False)):
        terms = Terms(
            torch.tensor([[[7, 5, 5, 3]]]),
            torch.zeros(4, dtype=torch.int64),
            distance=distance,
            price=torch.tensor([[0, toll, toll]]),
        )
        case = SettleCase(2, terms, torch.tensor([[0, 1, 2, 3]]), zero, zero)
        assert bool((case.answer(reference) != case.table).any()) == is_made
