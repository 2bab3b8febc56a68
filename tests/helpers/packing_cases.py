"""The table of cases for the packing engines, all of which must give the same answers.

Shapes: X rows, T steps, L layers, E experts (or items), P slots, M packs, G = P / M slots in each.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distplb.packing import reference
from distplb.packing.settle import Terms

ROWS = 24

# --- steps 0 to 9 -----------------------------------------------------------------------------------------------


def hot(random_: random.Random, row: list[int], weight: int) -> list[int]:
    """Replace one random weight of `row`."""
    row[random_.randrange(len(row))] = weight
    return row


def summing_to(random_: random.Random, n: int, total: int) -> list[int]:
    """Draw `[n]` weights with this total."""
    cuts = sorted(random_.randrange(total + 1) for _ in range(n - 1))
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, total], strict=True)]


def odd(random_: random.Random, n: int) -> list[int]:
    """Draw odd weights: shifted by one bit the total is still above 2^30, but the shifted weights sum to less."""
    row = [2**30 // n * 2 - 15 + 2 * random_.randrange(8) for _ in range(n)]
    row[random_.randrange(n)] += 2**31 + 2 - sum(row)
    return row


# Kinds of `[n]` weights with a total of at most 2^40.
KINDS: dict[str, Callable[[random.Random, int], list[int]]] = {
    "ties": lambda r, n: [r.randrange(3) for _ in range(n)],
    "equal": lambda r, n: [r.choice([1, 7, 2**40 // n])] * n,
    "zeros": lambda r, n: [0] * n,
    "mostly zero": lambda r, n: [r.choice([0, 0, r.randrange(50)]) for _ in range(n)],
    "any": lambda r, n: [r.randrange(1000) for _ in range(n)],
    "even": lambda r, n: [r.randrange(900, 1000) for _ in range(n)],
    "even and large": lambda r, n: [2**38 // n + r.randrange(2**11) for _ in range(n)],
    "skewed": lambda r, n: [int(r.lognormvariate(6, 1.5)) for _ in range(n)],
    "zipf": lambda r, n: [10**9 // (rank + 1) for rank in r.sample(range(n), n)],
    "one hot": lambda r, n: hot(r, [r.randrange(2) for _ in range(n)], 10**6),
    "one alone": lambda r, n: hot(r, [0] * n, 2**40),
    "full": lambda r, n: [2**40 // n - r.randrange(2**11) for _ in range(n)],
    "wide": lambda r, n: [r.randrange(2**40 // n) for _ in range(n)],
    # At the edge of one more bit of shift in the variance phase: a total of 2^30 or another power of two, or one more.
    "shift": lambda r, n: summing_to(r, n, 2 ** r.choice([30, 30, 31, 39]) + r.choice([0, 1])),
    "odd": odd,
}

# No single swap brings the two packs of this row closer than 14 and 12; a swap of pairs makes both 13.
ONLY_PAIRS_HELP = [8, 3, 1, 0, 6, 5, 3, 0]


def rows_of_every_kind(random_: random.Random, n: int) -> list[list[int]]:
    """Draw one row of each kind, `[X][n]`."""
    return [kind(random_, n) for kind in KINDS.values()]


def skewed(seed: int, rows: int, n: int) -> Tensor:
    """Draw log-normal weights `[X, n]`."""
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).mul(1.2).exp().mul(1000).long()


class PackCase(NamedTuple):
    """Arguments of calls on rows with the same E, M and G; without replicas P = E."""

    num_packs: int
    weight: Tensor  # [X, E]
    start: Tensor  # [X, P], random packings
    layer: Tensor  # [X]
    candidate: Tensor  # [X]
    seed: int

    @property
    def calls(self) -> list[str]:
        """The entry points that take this case; the last two are single steps, which not every engine has."""
        num_experts, num_slots = self.weight.shape[1], self.start.shape[1]
        if num_slots < num_experts:
            return ["polish"]
        if num_slots == num_experts:
            return ["pack", "finish", "refine", "polish", "lower_variance", "lower_max"]
        return ["refine", "polish"] + ["refine apart"] * (num_slots <= self.num_packs * num_experts)

    def answer(self, engine: Any, call: str) -> Tensor:
        """Call the engine, and return its answer `[X, P]`."""
        names = {"layer": self.layer, "candidate": self.candidate, "seed": self.seed}
        if call == "pack":
            return engine.pack(self.weight, self.num_packs, **names)
        if call.startswith("refine"):
            num_slots, shared = self.start.shape[1], call == "refine"
            return engine.refine(self.weight, self.num_packs, num_slots, shared=shared, **names)
        return getattr(engine, call)(self.weight, self.start, self.num_packs)

    def part(self, rows: slice) -> PackCase:
        """Select rows."""
        rows_of = [value[rows] for value in (self.weight, self.start, self.layer, self.candidate)]
        return PackCase(self.num_packs, *rows_of, self.seed)

    def on(self, device: str) -> PackCase:
        return PackCase(*(value.to(device) if isinstance(value, Tensor) else value for value in self))


def pack_case(num_experts: int, num_packs: int, size: int, seed: int = 0, rows: int = ROWS) -> PackCase:
    """Draw rows of all kinds.

    With replicas, half of the starts keep them apart where possible; the others may leave experts out.
    """
    random_ = random.Random(f"{seed} {num_experts} {num_packs} {size}")
    num_slots, kinds, first = num_packs * size, list(KINDS.values()), random_.randrange(len(KINDS))

    def start(x: int) -> list[int]:
        if num_slots == num_experts:
            return random_.sample(range(num_slots), num_slots)
        if x % 2 and size <= num_experts:
            return [e for _ in range(num_packs) for e in random_.sample(range(num_experts), size)]
        return [random_.randrange(num_experts) for _ in range(num_slots)]

    return PackCase(
        num_packs,
        torch.tensor([kinds[(first + x) % len(kinds)](random_, num_experts) for x in range(rows)]),
        torch.tensor([start(x) for x in range(rows)]),
        torch.tensor([random_.randrange(100) for _ in range(rows)]),
        torch.tensor([random_.choice([0, 1, random_.randrange(2**22), 2**22 - 1]) for _ in range(rows)]),
        random_.choice([0, random_.randrange(2**62)]),
    )


def few_experts_of_many() -> PackCase:
    """Draw a case of one node: more experts than slots, with and without replicas."""
    random_ = random.Random(3)
    zero = torch.zeros(4, dtype=torch.int64)
    weight = torch.tensor([[random_.randrange(1000) for _ in range(40)] for _ in zero])
    start = torch.tensor([random_.sample(range(40), 12) for _ in zero])
    start[2:, 3] = start[2:, 0]  # a replica in another pack; below, in the same pack
    start[3, 1] = start[3, 0]
    return PackCase(4, weight, start, zero, zero, 0)


def at_the_limit(num_packs: int, row: list[int]) -> PackCase:
    """Make a row that needs more swaps than there are rounds: half of the packs are heavy, and a swap evens out two.

    In packs of two it exhausts the min-max refinement, in packs of three the pair swaps.
    """
    zero = torch.zeros(1, dtype=torch.int64)
    return PackCase(num_packs, torch.tensor([row]), torch.arange(len(row))[None], zero, zero, 0)


def at_the_last_bit() -> PackCase:
    """Make two rows that the variance phase improves only by the last bit, kept by a total of 2^30, not of 2^30 + 4."""
    rows = [[2**28 + 1, 2**27 + 1, third + 2, 2**28, 2**27, third] for third in (2**27 - 2, 2**27)]
    zero = torch.zeros(2, dtype=torch.int64)
    return PackCase(2, torch.tensor(rows), torch.arange(6).repeat(2, 1), zero, zero, 0)


def model_case(num_packs: int, num_slots: int) -> PackCase:
    """Draw three layers of 256 experts, as skewed as a real model's; they start from refined packings."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3, 256, generator=generator).mul(0.9).exp().mul(1e8).long()
    case = PackCase(num_packs, weight, weight.new_zeros(3, num_slots), torch.arange(3), torch.tensor([0, 5, 9]), 1)
    return case._replace(start=case.answer(reference, "refine"))


# --- steps 10 and 11 --------------------------------------------------------------------------------------------


class SettleCase(NamedTuple):
    """Arguments of one call: rows with the same E, M, G and T."""

    num_packs: int
    terms: Terms
    table: Tensor  # [X, P]
    layer: Tensor  # [X]
    ceiling: Tensor  # [X]

    @property
    def calls(self) -> list[str]:
        return ["settle"]

    def answer(self, engine: Any, call: str = "settle") -> Tensor:
        """Call the engine, and return its answer `[X, P]`."""
        return engine.settle(self.terms, self.table, self.num_packs, layer=self.layer, ceiling=self.ceiling)

    def part(self, rows: slice) -> SettleCase:
        """Select rows."""
        return self._replace(table=self.table[rows], layer=self.layer[rows], ceiling=self.ceiling[rows])

    def on(self, device: str) -> SettleCase:
        terms = Terms(*(value.to(device) if isinstance(value, Tensor) else value for value in self.terms))
        return SettleCase(self.num_packs, terms, *(value.to(device) for value in self[2:]))

    def free(self) -> SettleCase:
        """Remove the price of moves, and let every slot exchange with every other."""
        region = torch.zeros_like(self.terms.region)
        return self._replace(terms=self.terms._replace(distance=None, price=None, region=region))

    def costs(self, table: Tensor) -> Tensor:
        """Compute the costs `[X]`: the heaviest pack, summed over the steps, plus all tolls."""
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


# Kinds of loads `[T][E]`.
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


def settle_cases(
    shapes: Sequence[tuple[int, int, int, int]], rows: int = ROWS, seed: int = 0, first: int = 0
) -> Iterator[SettleCase]:
    """Yield one case for each (E, M, G, T), with `rows` rows and three layers of different kinds.

    Two of three cases have a price of moves, and two of three keep replicas apart. These, kinds and regions cycle,
    starting at case number `first`. Half of the tables keep replicas apart where possible; the others may leave
    experts out.
    """
    kinds = list(LOADS.values())
    for number, (num_experts, num_packs, size, num_steps) in enumerate(shapes, first):
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
        yield SettleCase(num_packs, terms, torch.tensor(tables), torch.tensor(layer), torch.tensor(ceiling))


def model_settle_case(num_slots: int) -> SettleCase:
    """Draw two layers of 256 experts on 32 GPUs of 4 nodes, in 4 steps.

    They start from packings of the sum, with prices of moves from different packings.
    """
    generator = torch.Generator().manual_seed(4)
    skew = torch.randn(2, 1, 256, generator=generator).mul(0.9)
    load = (skew + torch.randn(2, 4, 256, generator=generator).mul(0.4)).exp().mul(1e4).long()
    names = {"layer": torch.arange(2), "candidate": torch.tensor([0, 5])}
    table, current = (reference.refine(load.sum(1), 32, num_slots, seed=seed, **names) for seed in (1, 2))
    distance = torch.full((2, 256, 32), 2, dtype=torch.int8)
    for layer in range(2):
        distance[layer, current[layer], torch.arange(num_slots) // (num_slots // 32)] = 0
    region = torch.arange(num_slots) // (num_slots // 4)
    terms = Terms(load, region, distance=distance, price=torch.tensor([[0, 300, 900], [0, 4000, 4000]]))
    return SettleCase(32, terms, table, torch.arange(2), torch.tensor([2**14, 2**16]))


def some_table(random_: random.Random, num_experts: int, num_packs: int, size: int, *, apart: bool) -> list[int]:
    """Draw a table `[P]` in random order, without replicas unless there are more slots than experts."""
    num_slots = num_packs * size
    if num_slots <= num_experts:
        return random_.sample(range(num_experts), num_slots)
    if apart and size <= num_experts:
        # Dealt cyclically, an expert repeats after E slots, when its pack is full.
        dealt = [expert % num_experts for expert in range(num_slots)]
        packs = [random_.sample(dealt[p * size : (p + 1) * size], size) for p in range(num_packs)]
        return [expert for pack in random_.sample(packs, num_packs) for expert in pack]
    return [random_.randrange(num_experts) for _ in range(num_slots)]


def woken() -> list[SettleCase]:
    """Make rows of a rare kind: a pack without an improving exchange gets one through another pack's exchange."""
    seeds = {(9, 3, 3, 7): (31, 0), (15, 5, 3, 6): (1, 7)}
    return [next(settle_cases([shape], rows=8, seed=seed)).part(slice(x, x + 1)) for shape, (seed, x) in seeds.items()]


# --- the table --------------------------------------------------------------------------------------------------

Case = PackCase | SettleCase


class Entry(NamedTuple):
    """A case by its seed, for the entry points in `calls`; if that is empty, for all that take it."""

    size: str  # "tiny" and "small" also run interpreted; "large" and "longest" run only in compiled kernels
    case: Callable[[int], Case]
    calls: tuple[str, ...] = ()


# (E, M, G). Pair swaps are for 2 ≤ G ≤ 16, so 17 is just beyond; G = 1 is the identity; M = 1 has no pack to swap with.
# With replicas, E < M × G: one pack, one slot per pack, more packs than experts; then full or nearly full packs, where
# a replica finds no pack without its expert and another one must make room.
TINY = [(1, 1, 1), (7, 7, 1), (4, 2, 2), (12, 4, 3), (14, 2, 7)]
TINY += [(5, 7, 1), (3, 2, 4), (4, 2, 3), (2, 3, 1), (4, 5, 2), (3, 3, 3), (6, 3, 4), (5, 3, 3), (5, 4, 4), (6, 4, 4)]
SMALL = [(2, 1, 2), (5, 1, 5), (6, 1, 6), (4, 4, 1), (6, 3, 2), (8, 4, 2), (16, 8, 2), (6, 2, 3), (9, 3, 3), (12, 3, 4)]
SMALL += [(24, 3, 8), (24, 2, 12), (32, 2, 16), (34, 2, 17), (34, 17, 2), (44, 4, 11), (64, 8, 8)]
SMALL += [(3, 1, 5), (4, 1, 7), (6, 4, 2), (3, 4, 2), (6, 3, 5), (5, 5, 3)]
MEDIUM = [(20, 4, 5), (36, 2, 18), (24, 8, 3), (7, 4, 2), (5, 4, 2), (6, 4, 3), (9, 5, 3), (13, 5, 4), (16, 5, 4)]
MEDIUM += [(30, 4, 9), (3, 2, 3), (2, 3, 2), (2, 2, 5), (1, 3, 2), (3, 4, 5), (10, 4, 10), (60, 12, 6), (48, 16, 4)]
MEDIUM += [(8, 2, 5), (6, 2, 7)]
LARGE = [(128, 8, 16), (128, 16, 8), (256, 32, 8), (288, 32, 9), (320, 64, 5), (256, 16, 16), (272, 16, 17)]
LARGE += [(129, 3, 43), (256, 128, 2), (300, 300, 1), (1, 4, 2), (16, 8, 3), (12, 4, 4), (32, 8, 5), (30, 6, 6)]
LARGE += [(20, 16, 2), (8, 16, 7), (64, 8, 9), (60, 4, 17), (256, 32, 9), (100, 3, 40), (9, 64, 2), (64, 72, 1)]
LONGEST = [(4096, 64, 64), (1000, 1, 1000), (3000, 1000, 3)]
# (E, M, G, T) of steps 10 and 11: without replicas, with all experts or some, one step or more; then with replicas.
TINY_SETTLED = [(6, 1, 6, 2), (6, 2, 3, 1), (8, 3, 2, 5), (8, 8, 1, 3), (4, 2, 3, 3), (6, 3, 3, 2)]
SMALL_SETTLED = [(6, 2, 3, 3), (9, 3, 3, 4), (10, 5, 2, 3), (16, 8, 2, 3), (3, 2, 4, 2), (7, 5, 2, 1), (5, 8, 1, 2)]
SMALL_SETTLED += [(12, 8, 2, 2)]
MEDIUM_SETTLED = [(20, 5, 5, 9), (32, 8, 4, 17), (24, 8, 4, 17), (18, 4, 5, 4), (12, 4, 3, 3), (12, 4, 4, 3)]
LARGE_SETTLED = [(12, 4, 3, 6), (16, 8, 3, 9), (64, 8, 9, 8), (30, 6, 6, 5), (60, 4, 17, 3), (256, 32, 9, 4)]
LARGE_SETTLED += [(64, 64, 2, 4), (100, 3, 40, 2), (48, 16, 3, 33), (300, 300, 1, 2), (24, 12, 2, 100)]


def table() -> Iterator[tuple[str, Entry]]:
    """Yield the entries by name."""
    packed = {"tiny": TINY, "small": SMALL, "medium": MEDIUM, "large": LARGE, "longest": LONGEST}
    for size, (num_experts, num_packs, pack_size) in sized(packed):
        case = partial(pack_case, num_experts, num_packs, pack_size)
        yield f"{num_experts} in {num_packs}x{pack_size}", Entry(size, case)
    yield "few experts of many", Entry("tiny", lambda _: few_experts_of_many())
    yield "at the last bit", Entry("tiny", lambda _: at_the_last_bit())
    for num_packs, row in ((104, [5] * 104 + [1] * 104), (44, [3] * 66 + [1] * 66)):
        yield f"at the limit in {num_packs}", Entry("tiny", lambda _, c=(num_packs, row): at_the_limit(*c), ("finish",))
        yield f"at the limit in {num_packs}, all calls", Entry("large", lambda _, c=(num_packs, row): at_the_limit(*c))
    for shape in ((32, 256), (32, 288), (64, 320)):
        yield f"model in {shape[0]} of {shape[1]}", Entry("medium", lambda _, c=shape: model_case(*c))
    for num_slots in (256, 288):
        yield f"model settled in {num_slots}", Entry("medium", lambda _, n=num_slots: model_settle_case(n))
        yield (
            f"model settled freely in {num_slots}",
            Entry("medium", lambda _, n=num_slots: model_settle_case(n).free()),
        )
    settled = {"tiny": TINY_SETTLED, "small": SMALL_SETTLED, "medium": MEDIUM_SETTLED, "large": LARGE_SETTLED}
    for number, (size, shape) in enumerate(sized(settled)):
        name = "{} in {}x{} over {}".format(*shape)
        yield name, Entry(size, lambda seed, n=number, c=shape: next(settle_cases([c], seed=seed, first=n)))
    for number in range(2):
        yield f"woken {number}", Entry("tiny", lambda _, n=number: woken()[n])


def sized(shapes: dict[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    """Yield each shape with its size."""
    return ((size, shape) for size, some in shapes.items() for shape in some)


TABLE = dict(table())


def differences(entry: Entry, engine: Any, *, rows: int = ROWS, seed: int = 0, device: str = "cpu") -> list[str]:
    """Describe where the engine's answers differ from the reference's."""
    case = entry.case(seed).part(slice(rows))
    there = case.on(device)
    before = [value.clone() for value in tensors(there)]
    texts = []
    for call in entry.calls or case.calls:
        if not hasattr(engine, call.split()[0]):
            continue
        expected, answer = case.answer(reference, call), there.answer(engine, call)
        assert answer.device.type == device
        assert len(answer) > 0
        for x in (answer.cpu() != expected).any(1).nonzero()[:, 0].tolist():
            row = case.part(slice(x, x + 1))
            texts.append(f"{call} of {row} gives {answer[x].tolist()} and not {expected[x].tolist()}")
    if not all(map(torch.equal, before, tensors(there))):
        texts.append("an argument was written to")
    return texts


def tensors(case: Case) -> list[Tensor]:
    """List all tensors of a case."""
    return [value for value in (*case, *getattr(case, "terms", ())) if isinstance(value, Tensor)]
