"""The policy that keeps experts in slots of their class, for layouts that exchange only slots of the same index.

Shapes: X rows, E = P experts and slots, M GPUs, G slots on each, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distplb.packing.engines import Engine
from distplb.packing.noise import noisy_keys
from distplb.packing.settle import Terms
from distplb.planning.legal import class_of_expert

__all__ = ["SlotClasses"]

_ROUNDS = 40


@dataclass(frozen=True)
class SlotClasses:
    """Keeps every expert in slots of its present slot's class; there are no replicas.

    For one class at a time, one slot per GPU is emptied and its experts are dealt again, the heaviest to the GPU that
    is lightest without them; for these slots that is optimal. If a GPU has several slots of a class, they take turns.

    Args:
        engine: the engine that settles; the search itself uses none.
        num_gpus: M.
        slot_class: `[P]` int64.
        start: `[L, P]` int64, the placement in force, which defines each expert's class.
    """

    engine: Engine
    num_gpus: int
    slot_class: Tensor
    start: Tensor

    @property
    def cells(self) -> tuple[int, ...]:
        """GPUs, if all have the same classes in the same order; else no cell may be swapped as a whole."""
        by_gpu = self.slot_class.view(self.num_gpus, -1)
        return (by_gpu.shape[1],) if bool((by_gpu == by_gpu[0]).all()) else ()

    def search(self, weight: Tensor, *, layer: Tensor, candidate: Tensor, seed: int) -> Tensor:
        """See `Policy`; a candidate's noise decides the order of its first round."""
        table = self.start.to(weight.device)[layer]
        key = noisy_keys(weight, layer=layer, candidate=candidate, seed=seed)
        return self._lowered(key, weight, table)

    def polish(self, weight: Tensor, table: Tensor) -> Tensor:
        """See `Policy`."""
        return self._lowered(weight, weight, table)

    @property
    def region(self) -> Tensor:
        """Classes."""
        return torch.as_tensor(self.slot_class, device="cpu").to(torch.int64)

    def settle(self, terms: Terms, table: Tensor, *, layer: Tensor, ceiling: Tensor) -> Tensor:
        """See `Policy`."""
        return self.engine.settle(terms, table, self.num_gpus, layer=layer, ceiling=ceiling)

    @property
    def rule(self) -> str:
        """See `Policy`."""
        return "every expert in a slot of its class"

    def allows(self, table: Tensor, *, layer: Tensor) -> Tensor:
        """See `Policy`.

        The placement in force is always allowed: an expert's class is that of its slot there.
        """
        start, classes = self.start.to(table.device)[layer], self.region.to(table.device)
        return (class_of_expert(start, classes).gather(1, table) == classes).all(1)

    def _lowered(self, key: Tensor, weight: Tensor, table: Tensor) -> Tensor:
        """The best of the tables dealt until several rounds over the classes in a row do not improve on it."""
        best = table.clone()
        lowest = self._loads(weight, table).sort(dim=1, descending=True).values  # [X, M]
        # Rounds without improvement, counted row by row, so that a row does not depend on the others.
        idle = torch.zeros(len(table), dtype=torch.int64, device=table.device)
        patience = 2 * self._most_of_a_class()
        for turn in range(_ROUNDS):
            for number in self.slot_class.unique().tolist():
                table = self._dealt(key if turn == 0 else weight, weight, table, self._taking_part(number, turn))
            loads = self._loads(weight, table).sort(dim=1, descending=True).values
            better = _earlier(loads, lowest) & (idle < patience)
            best[better], lowest[better] = table[better], loads[better]
            idle = torch.where(better, 0, idle + 1)
            if bool((idle >= patience).all()):
                break
        return best

    def _most_of_a_class(self) -> int:
        """The most slots of one class on one GPU: after this many rounds each has taken part once."""
        by_gpu = self.slot_class.to("cpu").view(self.num_gpus, -1).sort(dim=1).values
        return max(int(row.unique(return_counts=True)[1].max()) for row in by_gpu)

    def _taking_part(self, number: int, turn: int) -> Tensor:
        """`[m]`: one slot of class `number` on every GPU that has one, a different one each turn."""
        slots = (self.slot_class.to("cpu") == number).view(self.num_gpus, -1)  # [M, G]
        size = slots.shape[1]
        chosen = []
        for gpu in slots.any(1).nonzero()[:, 0].tolist():
            own = slots[gpu].nonzero()[:, 0].tolist()
            chosen.append(gpu * size + own[(turn + turn // len(own) * gpu) % len(own)])
        return torch.tensor(chosen, device="cpu")

    def _dealt(self, key: Tensor, weight: Tensor, table: Tensor, slots: Tensor) -> Tensor:
        """Deal the experts of `slots [m]` again, the heaviest by `key` to the GPU that is lightest without them."""
        slots = slots.to(table.device)
        gpu = slots // (table.shape[1] // self.num_gpus)
        experts = table[:, slots]  # [X, m]
        rest = self._loads(weight, table)[:, gpu] - weight.gather(1, experts)
        heaviest = experts.gather(1, key.gather(1, experts).sort(dim=1, descending=True, stable=True).indices)
        lightest = rest.sort(dim=1, stable=True).indices  # [X, m]
        table = table.clone()
        table[:, slots] = torch.empty_like(experts).scatter_(1, lightest, heaviest)
        return table

    def _loads(self, weight: Tensor, table: Tensor) -> Tensor:
        return weight.gather(1, table).view(len(table), self.num_gpus, -1).sum(2)  # [X, M]


def _earlier(one: Tensor, other: Tensor) -> Tensor:
    """`[X]` bool: whether one row of loads precedes the other in lexicographic order."""
    differ = one != other
    first = differ.to(torch.int8).argmax(1, keepdim=True)
    return (one.gather(1, first) < other.gather(1, first))[:, 0]
