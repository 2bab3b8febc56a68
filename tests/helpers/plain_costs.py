"""The cost of a placement, computed in plain Python with integers, independently of the package's search.

Shapes: T steps, L layers, E experts, P slots, G slots on each GPU.
"""

from __future__ import annotations

from fractions import Fraction

from torch import Tensor

from distplb import Placement

__all__ = ["plain_costs"]

Price = float | tuple[float, float]


def plain_costs(
    load: Tensor,
    table: Tensor,
    num_gpus: int,
    current: Placement | None = None,
    price: Price = 0.0,
    gpus_per_node: int | None = None,
    stays: list[bool] | None = None,
) -> list[int]:
    """Compute the costs `[L]`: the busiest GPU's tokens, summed over steps, plus the price of moved slots; below 2^41.

    Replicas share tokens by integer division. Units are those of the search: a layer's load is halved until its total
    is at most 2^40; with replicas or a price it is doubled while the total stays at most 2^40. A moved slot costs at
    least 1. If `stays [L]` forbids a layer its current placement, its cost is halved until moving all slots at the
    highest price costs at most 2^40.
    """
    prices = price if isinstance(price, tuple) else (price, price)
    costs = []
    for layer, row in enumerate(table.tolist()):
        steps, size, shift = [step[layer] for step in load.tolist()], len(row) // num_gpus, 0
        total = sum(map(sum, steps))
        while total >> -shift > 2**40:
            shift -= 1
        steps = [[tokens >> -shift for tokens in step] for step in steps]
        doubled = 0
        while (len(row) > load.shape[2] or any(prices)) and 0 < sum(map(sum, steps)) << doubled + 1 <= 2**40:
            doubled += 1
        steps = [[tokens << doubled for tokens in step] for step in steps]
        count = {expert: row.count(expert) for expert in row}
        gpus = [row[at : at + size] for at in range(0, len(row), size)]
        cost = sum(max(sum(step[e] // count[e] for e in gpu) for gpu in gpus) for step in steps)
        if current is not None:
            units = [toll_of(each, shift + doubled) for each in prices]
            held = [gpu.tolist() for gpu in current.expert_of_slot[layer].view(num_gpus, -1)]
            for number, experts in enumerate(gpus):
                first = number // (gpus_per_node or num_gpus) * (gpus_per_node or num_gpus)
                beside = {expert for gpu in held[first : first + (gpus_per_node or num_gpus)] for expert in gpu}
                cost += sum(units[expert not in beside] for expert in experts if expert not in held[number])
            dearest = len(row) * max(units)
            while stays is not None and not stays[layer] and dearest > 2**40:
                dearest, cost = dearest >> 1, cost >> 1
        costs.append(min(cost, 2**41 - 1))
    return costs


def toll_of(price: float, shift: int) -> int:
    """Convert a price to units of which a token has 2^shift."""
    if price in (0, float("inf")):
        return 2**41 - 1 if price else 0
    return min(max(round(Fraction(price) * Fraction(2) ** shift), 1), 2**41 - 1)
