"""Cases for steps 10 and 11, which every engine's `settle` answers alike.

Shapes: X rows, T steps, L layers, E experts, P slots, M packs, G = P / M slots in each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distplb.packing.settling import Terms

Shape = tuple[int, int, int, int]  # E, M, G, T


class Settling(NamedTuple):
    """One call: rows of the same E, M, G and T."""

    num_packs: int
    terms: Terms
    table: Tensor  # [X, P]
    layer: Tensor  # [X]
    ceiling: Tensor  # [X]

    def settled(self, engine: Any) -> Tensor:
        """`[X, P]`: that engine's answer."""
        return engine.settle(self.terms, self.table, self.num_packs, layer=self.layer, ceiling=self.ceiling)

    def row(self, x: int) -> Settling:
        """That row alone."""
        one = slice(x, x + 1)
        return self._replace(table=self.table[one], layer=self.layer[one], ceiling=self.ceiling[one])

    def on(self, device: str) -> Settling:
        terms = Terms(*(value.to(device) if isinstance(value, Tensor) else value for value in self.terms))
        return Settling(self.num_packs, terms, *(value.to(device) for value in self[2:]))

    def costs(self, table: Tensor) -> Tensor:
        """`[X]`: the fullest pack, added up over the steps, and all tolls."""
        size = table.shape[1] // self.num_packs
        pack = torch.arange(table.shape[1]) // size
        costs = []
        for row, layer in zip(table, self.layer.tolist(), strict=True):
            weight = self.terms.load[layer]  # [T, E]
            share = weight // row.bincount(minlength=weight.shape[1]).clamp(min=1)
            cost = share[:, row].unflatten(1, (self.num_packs, size)).sum(2).amax(1).sum()
            if self.terms.distance is not None and self.terms.price is not None:
                cost = cost + self.terms.price[layer][self.terms.distance[layer, row, pack].long()].sum()
            costs.append(cost)
        return torch.stack(costs)


# `[T][E]` each.
LOADS: dict[str, Callable[[random.Random, int, int], list[list[int]]]] = {
    "any": lambda r, t, e: [[r.randrange(1000) for _ in range(e)] for _ in range(t)],
    "ties": lambda r, t, e: [[r.randrange(3) for _ in range(e)] for _ in range(t)],
    "skewed": lambda r, t, e: [[int(r.lognormvariate(5, 1.3)) for _ in range(e)] for _ in range(t)],
    "few values": lambda r, t, e: [[r.choice([0, 6, 12]) for _ in range(e)] for _ in range(t)],
    # Half of the experts are hot in even steps, the others in odd ones.
    "in turn": lambda r, t, e: [[r.randrange(5, 9) * (9 if (x + s) % 2 else 1) for x in range(e)] for s in range(t)],
    "one alone": lambda r, t, e: [[2**20 if x == s % e else r.randrange(2) for x in range(e)] for s in range(t)],
    "equal": lambda r, t, e: [[7] * e for _ in range(t)],
    "to the limit": lambda r, t, e: [[2**30 // (t * e) - r.randrange(1, 2**8) for _ in range(e)] for _ in range(t)],
}
PRICES = [[0, 1, 2], [0, 40, 90], [0, 0, 300], [0, 2**30, 2**30], [0, 7, 7]]
REGIONS: list[Callable[[int, int], Tensor]] = [
    lambda num_packs, size: torch.zeros(num_packs * size, dtype=torch.int64),
    lambda num_packs, size: torch.zeros(num_packs * size, dtype=torch.int64),
    lambda num_packs, size: torch.arange(num_packs * size) * 2 // (num_packs * size),  # two nodes
    lambda num_packs, size: torch.arange(num_packs * size) % size % 2,  # two classes of slots in each pack
]


def settle_cases(shapes: Sequence[Shape], rows: int, seed: int = 0) -> Iterator[Settling]:
    """One case for each (E, M, G, T), of `rows` rows, with three layers of different kinds; two of three pay for moves.

    Two of three keep replicas apart.
    Half of the tables keep replicas apart where that is possible; the others do not, and leave experts out.
    """
    kinds = list(LOADS.values())
    for number, (num_experts, num_packs, size, num_steps) in enumerate(shapes):
        random_ = random.Random(f"{seed} {num_experts} {num_packs} {size} {num_steps}")
        load = torch.tensor(
            [kinds[(3 * number + seed + nth) % len(kinds)](random_, num_steps, num_experts) for nth in range(3)]
        )
        region = REGIONS[(number + seed) % len(REGIONS)](num_packs, size)
        terms = Terms(load, region, apart=bool((number // 2 + seed) % 3))
        if (number + seed) % 3:
            distance = [
                [[random_.randrange(3) for _ in range(num_packs)] for _ in range(num_experts)] for _ in range(3)
            ]
            price = torch.tensor([random_.choice(PRICES) for _ in range(3)])
            terms = terms._replace(distance=torch.tensor(distance, dtype=torch.int8), price=price)
        ceiling = [[0, 2**16, 2**14, 1, 2**15][x % 5] if x % 2 else random_.randrange(2**16 + 1) for x in range(rows)]
        tables = [some_table(random_, num_experts, num_packs, size, apart=x % 2 == 0) for x in range(rows)]
        layer = [random_.randrange(3) if x > 2 else x for x in range(rows)]
        yield Settling(num_packs, terms, torch.tensor(tables), torch.tensor(layer), torch.tensor(ceiling))


def some_table(random_: random.Random, num_experts: int, num_packs: int, size: int, *, apart: bool) -> list[int]:
    """`[P]`: without replicas, where there need be none, any order."""
    num_slots = num_packs * size
    if num_slots <= num_experts:
        return random_.sample(range(num_experts), num_slots)
    if apart and size <= num_experts:
        # Dealt out in turn, an expert comes again after E slots, when its pack is full.
        dealt = [expert % num_experts for expert in range(num_slots)]
        packs = [random_.sample(dealt[p * size : (p + 1) * size], size) for p in range(num_packs)]
        return [expert for pack in random_.sample(packs, num_packs) for expert in pack]
    return [random_.randrange(num_experts) for _ in range(num_slots)]


def woken() -> list[Settling]:
    """Rows in which a pack that found nothing is changed by another one's exchange and then finds something: rare."""
    seeds = {(9, 3, 3, 7): (31, 0), (15, 5, 3, 6): (1, 7)}
    return [next(settle_cases([shape], rows=8, seed=seed)).row(x) for shape, (seed, x) in seeds.items()]
