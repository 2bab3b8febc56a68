"""Measures every method's split of every step: imbalance, bound, replicas, traffic, cost at H100's prices, time.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.shared.tables import progress
from benchmarks.splitting import methods, prices
from benchmarks.splitting.cases import Case
from benchmarks.splitting.times import times_of
from distplb import Topology
from distplb.splitting.bound import step_bound
from distplb.splitting.routes import routes
from distplb.splitting.split_value import Split

__all__ = ["Figures", "Result", "figures_of", "measured"]


@dataclass(frozen=True)
class Figures:
    """What is told of one split; all in units of the mean, except for numbers of replicas and the time."""

    imbalance: float
    bound: float
    replicas: int
    sends: int
    receives: int
    leaving: int  # replicas in another node than their home
    between_gpus: float
    between_nodes: float
    cost: float
    full_cost: float  # with every replica at the full price
    microseconds: float | None

    def beats(self, other: Figures) -> bool:
        """Whether it has fewer replicas at equal or lower imbalance."""
        return self.imbalance <= other.imbalance and self.replicas < other.replicas

    def is_more_even(self, other: Figures) -> bool:
        """Whether it has lower imbalance with at most as many replicas."""
        return self.imbalance < other.imbalance and self.replicas <= other.replicas

    def sends_less(self, other: Figures) -> bool:
        """Whether its busiest GPU sends fewer replicas, at most as many replicas in all, at most as unevenly."""
        return self.sends < other.sends and self.imbalance <= other.imbalance and self.replicas <= other.replicas


@dataclass(frozen=True)
class Result:
    """A case, and what was measured step by step.

    Args:
        case: loads and cluster.
        figures: of each method.
        levels: that distplb aims at, in units of the mean.
        prices: of a replica inside a node, in units of the mean.
    """

    case: Case
    figures: dict[str, list[Figures]]
    levels: list[float]
    prices: list[float]


def measured(case: Case) -> Result:
    """Split every step by every method."""
    figures: dict[str, list[Figures]] = {}
    levels, price, one_node = [], [], Topology(1, case.topology.num_gpus)
    for number, step in enumerate(case.steps()):
        progress(f"{case.text}, step {number + 1}")
        tokens, mean = step.counts.sum(0), int(step.counts.sum()) / case.topology.num_gpus
        levels.append(methods.level(case, tokens) / mean)
        price.append(prices.INSIDE / mean)
        microseconds = times_of(case, tokens)
        inside, anywhere = (
            step_bound(step.counts, case.cluster.home, topology=topology, replica_slots=case.slots)
            for topology in (case.topology, one_node)
        )
        for name, found in methods.splits(case, step).items():
            bound = anywhere if name in (methods.LEAVING, methods.PRICED_LEAVING) else inside
            part = prices.GRADIENTS_ONLY if name in methods.PLANNED else 1.0
            told = figures_of(case, found, bound, part, microseconds.get(name))
            figures.setdefault(name, []).append(told)
    return Result(case, figures, levels, price)


def figures_of(case: Case, found: Split, bound: int, part: float, microseconds: float | None) -> Figures:
    """Compute the figures of one split.

    Args:
        case: the cluster.
        found: the split.
        bound: tokens that the busiest GPU has at least.
        part: of its price that a replica costs.
        microseconds: the time of the decision, if it was compiled.
    """
    tokens = found.counts.sum(0).numpy()
    total = max(1, int(tokens.sum()))
    flow = routes(found, case.topology).sum(1)  # [M, M]
    nodes = flow.unflatten(0, (case.topology.num_nodes, -1)).unflatten(2, (case.topology.num_nodes, -1)).sum((1, 3))
    pushes, per_node = found.pushes, case.topology.gpus_per_node
    inside = sum(
        int(pushes[begin : begin + per_node, begin : begin + per_node].sum())
        for begin in range(0, case.topology.num_gpus, per_node)
    )
    return Figures(
        imbalance=found.imbalance,
        bound=bound * case.topology.num_gpus / total,
        replicas=found.num_replicas,
        sends=int(pushes.sum(1).amax()),
        receives=int(pushes.sum(0).amax()),
        leaving=found.num_replicas - inside,
        between_gpus=1 - int(flow.trace()) / total,
        between_nodes=1 - int(nodes.trace()) / total,
        cost=prices.cost_of(found, case.topology, part),
        full_cost=prices.cost_of(found, case.topology),
        microseconds=microseconds,
    )
