"""Steps 10 and 11 in plain torch, row by row: slow and short; every engine's `settle` equals it to the bit.

Steps 1 to 9 pack the load summed over its steps. These two consider each step of the load, and the price of moving
experts from where they are. Both exchange two slots of different packs at a time. Their cost is the planner's: the
heaviest pack of each step, summed over the steps, plus the tolls of all slots.

(10) Ceilings. Each step gets a ceiling between the mean pack and the pack that was heaviest at the start. While packs
     have tokens above the ceilings, the pack that has most makes the exchange that removes most of them for its toll,
     even if the cost does not fall at once: many packs may have to get lighter before the heaviest does. A pack
     without such an exchange is skipped until another pack's exchange changes it. The same follows with a second
     ceiling, at a quarter of the first one's height. The cheapest packing met on the way is kept.
(11) Descent. The pack that leads the second-heaviest by most, summed over the steps in which it is the heaviest, makes
     the exchange that lowers the cost most. A pack without such an exchange is skipped until the next exchange.

Shapes: X rows, T steps, L layers, E experts, P slots, M packs, G = P / M slots in each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MOST_BITS", "Terms", "scans", "settle_row"]

MOST_BITS = 30  # of a layer's total over all steps, and of a toll; engines hold tokens in 32 bits
_CEILING_BITS = 16  # a ceiling's height above the mean is in units of 1 / 2^16 of the heaviest pack's
_SCORE_BITS = 30
_NEVER = torch.iinfo(torch.int64).max


class Terms(NamedTuple):
    """The terms of a packing's cost. All are int64 except `distance`, which is int8.

    `distance` and `price` are both None if moving is free.
    """

    load: Tensor  # [L, T, E], each layer's total at most 2^30
    region: Tensor  # [P]; two slots exchange only within a region
    distance: Tensor | None = None  # [L, E, M]: 0 where the pack held the expert before, else 1 or 2
    price: Tensor | None = None  # [L, 3]: the toll of a slot by its expert's distance, at most 2^30; 0 for distance 0
    apart: bool = True  # whether no exchange may bring two replicas of an expert into one pack


def scans(num_packs: int) -> int:
    """Maximum number of searches for an exchange under each ceiling, and in the descent."""
    return 64 + 16 * num_packs


def settle_row(terms: Terms, table: Tensor, num_packs: int, *, layer: int, ceiling: int) -> Tensor:
    """Settle one row: `table [P]` after steps 10 and 11; its cost is not higher than before."""
    row = _State.of(terms, table, num_packs, layer)
    row = _under_ceilings(row, ceiling)
    return _descend(row).table


@dataclass
class _State:
    """The current packing of a row; `load` always matches `table`."""

    table: Tensor  # [P]
    load: Tensor  # [M, T]
    share: Tensor  # [E, T], of one replica
    toll: Tensor  # [E, M]
    region: Tensor  # [P]
    apart: bool

    @classmethod
    def of(cls, terms: Terms, table: Tensor, num_packs: int, layer: int) -> _State:
        weight = terms.load[layer].T  # [E, T]
        replicas = torch.zeros(len(weight), dtype=torch.int64, device=table.device)
        replicas.scatter_add_(0, table, torch.ones_like(table))
        share = weight // replicas.clamp(min=1)[:, None]
        load = share[table].unflatten(0, (num_packs, -1)).sum(1)
        toll = torch.zeros(len(weight), num_packs, dtype=torch.int64, device=table.device)
        if terms.distance is not None and terms.price is not None:
            toll = terms.price[layer][terms.distance[layer].long()]
        return cls(table.clone(), load, share, toll, terms.region, terms.apart)

    @property
    def pack(self) -> Tensor:
        """`[P]`: the pack of each slot."""
        return torch.arange(len(self.table), device=self.table.device) // (len(self.table) // len(self.load))

    def cost(self) -> int:
        return int(self.load.amax(0).sum() + self.toll[self.table, self.pack].sum())

    def evaluate(self, here: int) -> tuple[Tensor, Tensor, Tensor]:
        """Evaluate each exchange of a slot of pack `here` with any slot.

        Returns the tokens that the pack loses `[G, P, T]`, the toll added `[G, P]`, and whether it is allowed `[G, P]`.
        """
        size, pack = len(self.table) // len(self.load), self.pack
        leaving, coming = self.table[here * size : (here + 1) * size, None], self.table[None, :]  # [G, 1], [1, P]
        lost = self.share[leaving] - self.share[coming]
        paid = self.toll[leaving, pack] + self.toll[coming, here] - self.toll[leaving, here] - self.toll[coming, pack]
        is_allowed = (pack != here) & (leaving != coming)
        if self.apart:
            holds = torch.zeros(self.toll.shape, dtype=torch.bool, device=pack.device)  # [E, M]
            holds[self.table, pack] = True
            is_allowed &= ~holds[leaving, pack] & ~holds[coming, here]
        region = self.region[here * size : (here + 1) * size, None]
        return lost, paid, is_allowed & (region == self.region)

    def exchange(self, here: int, flat: int, lost: Tensor) -> None:
        """Make the exchange of pack `here` that has the index `flat` in `[G, P]`."""
        size, num_slots = len(self.table) // len(self.load), len(self.table)
        one, other = here * size + flat // num_slots, flat % num_slots
        change = lost.view(-1, lost.shape[-1])[flat]
        self.table[[one, other]] = self.table[[other, one]]
        self.load[here] -= change
        self.load[other // size] += change


def _under_ceilings(row: _State, ceiling: int) -> _State:
    """Step 10."""
    best, lowest_cost, size = row.table.clone(), row.cost(), len(row.table) // len(row.load)
    mean = row.load.sum(0) // len(row.load)  # [T]
    height = row.load.amax(0) - mean
    for part in (ceiling, ceiling >> 2):
        limit = mean + ((height * part) >> _CEILING_BITS)
        tired = torch.zeros(len(row.load), dtype=torch.bool, device=row.load.device)
        for _ in range(scans(len(row.load))):
            above = (row.load - limit).clamp(min=0).sum(1)  # [M]
            here = int(above.masked_fill(tired, 0).argmax())
            if above[here] == 0 or tired[here]:
                break
            lost, paid, is_allowed = row.evaluate(here)
            left = (row.load[here] - lost - limit).clamp(min=0) + (row.load[row.pack] + lost - limit).clamp(min=0)
            gain = above[here] + above[row.pack] - left.sum(-1)  # [G, P]
            score = (gain.clamp(min=0) << _SCORE_BITS) // (1 + paid.clamp(min=0))
            score = score.masked_fill(~is_allowed, 0).flatten()
            flat = int(score.argmax())
            if score[flat] == 0:
                tired[here] = True
                continue
            row.exchange(here, flat, lost)
            tired[[here, flat % len(row.table) // size]] = False
            if (cost := row.cost()) < lowest_cost:
                best, lowest_cost = row.table.clone(), cost
    load = row.share[best].unflatten(0, (-1, size)).sum(1)
    return replace(row, table=best, load=load)


def _descend(row: _State) -> _State:
    """Step 11."""
    num_packs = len(row.load)
    tired = torch.zeros(num_packs, dtype=torch.bool, device=row.load.device)
    for _ in range(scans(num_packs) if num_packs > 1 else 0):
        first = row.load.argmax(0)  # [T]
        top = row.load.topk(2, dim=0).values  # [2, T]
        alone = torch.zeros(num_packs, dtype=torch.int64, device=row.load.device)
        alone.scatter_add_(0, first, top[0] - top[1])  # [M]
        here = int(alone.masked_fill(tired, 0).argmax())
        if alone[here] == 0 or tired[here]:
            break
        lost, paid, is_allowed = row.evaluate(here)
        others = row.load.expand(num_packs, -1, -1).clone()  # [M, M, T]
        pack = torch.arange(num_packs, device=row.load.device)
        others[pack, pack] = 0
        others[:, here] = 0
        rest = others.amax(1)  # [M, T], the heaviest pack other than `here` and this one
        busiest = torch.maximum(row.load[here] - lost, row.load[row.pack] + lost)
        after = torch.maximum(busiest, rest[row.pack]).sum(-1) + paid  # [G, P]
        after = after.masked_fill(~is_allowed, _NEVER).flatten()
        flat = int(after.argmin())
        if after[flat] >= top[0].sum():
            tired[here] = True
            continue
        row.exchange(here, flat, lost)
        tired[:] = False
    return row
