"""The cases of the benchmark of splits: loads, and the clusters that they are split for.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.shared.loads import GPUS_PER_NODE
from benchmarks.splitting.baselines import Cluster
from benchmarks.splitting.loads import WORKLOADS, Size, Step, log_normal, power_law, recorded, workload
from distplb import Topology

__all__ = ["IMBALANCES", "LARGE", "MAX_VIOLATIONS", "SIZE", "SMALL", "Case", "all_cases", "law_case"]

SIZE, LARGE, SMALL = Size(), Size(gpus=128, experts=512), Size(gpus=8, experts=16, choices=1024)
IMBALANCES, MAX_VIOLATIONS = (1.1, 1.5, 2.0, 3.0), (0.2, 1.0, 4.0)
RECORDED_GPUS, RECORDED_SIZES, RECORDED_EXPERTS = (8, 16, 32, 64), (8, 32), 64
ON_NODES = ("balanced", "unequal sources", "experts of one GPU hot", "experts and GPUs without tokens")
SLOTS = 2  # R, unless said otherwise


@dataclass(frozen=True)
class Case:
    """Steps and the cluster that they are split for.

    Args:
        name: the load.
        topology: nodes and GPUs.
        num_experts: E.
        slots: R.
        steps: makes the steps.
        imbalance: the imbalance of a power law, for targets; None for other loads.
    """

    name: str
    topology: Topology
    num_experts: int
    slots: int
    steps: Callable[[], Iterator[Step]]
    imbalance: float | None = None

    @property
    def cluster(self) -> Cluster:
        """The cluster with contiguous homes."""
        gpus, experts = self.topology.num_gpus, self.num_experts
        node = np.arange(gpus) // self.topology.gpus_per_node
        return Cluster(np.arange(experts) * gpus // experts, node, self.slots)

    @property
    def is_recorded(self) -> bool:
        """Whether the load was recorded."""
        return self.name.startswith("recorded")

    @property
    def load_text(self) -> str:
        """The load and the cluster, without R."""
        nodes = self.topology.num_nodes
        where = f"{self.topology.num_gpus} GPUs" + (f" on {nodes} nodes" if nodes > 1 else "")
        return f"{self.name}: {where}, {self.num_experts} experts"

    @property
    def text(self) -> str:
        """The heading."""
        return f"{self.load_text}, R = {self.slots}"


def all_cases(loads: Path, steps: int, draws: int, small: bool = False) -> list[Case]:
    """List the loads on one node, then on nodes of eight GPUs.

    Args:
        loads: folder of the recorded loads.
        steps: of each made load.
        draws: of each recorded load, each with all layers.
        small: few GPUs and experts, to try the benchmark.
    """
    size, gpus = SMALL if small else SIZE, RECORDED_GPUS[: 1 if small else None]
    per_node = GPUS_PER_NODE // 2 if small else GPUS_PER_NODE
    made = partial(_made, size=size, steps=steps)
    cases = [_recorded(loads, each, number, draws) for each in gpus for number in RECORDED_SIZES]
    cases += [law_case(each, size, steps, slots=slots) for slots in (2, 1) for each in IMBALANCES]
    cases += [made(f"log-normal, MaxVio {each:g}", partial(log_normal, each)) for each in MAX_VIOLATIONS]
    cases += [made(name, partial(workload, name)) for name in WORKLOADS]
    cases.append(_recorded(loads, gpus[-1], RECORDED_SIZES[-1], draws, per_node))
    cases += [law_case(each, size, steps, per_node=per_node) for each in IMBALANCES]
    return cases + [made(name, partial(workload, name), per_node=per_node) for name in ON_NODES]


def law_case(imbalance: float, size: Size, steps: int, *, slots: int = SLOTS, per_node: int | None = None) -> Case:
    """The case of a power law.

    >>> law_case(1.5, SIZE, steps=1, per_node=8).text
    'power law, imbalance 1.5: 64 GPUs on 8 nodes, 256 experts, R = 2'
    """
    name, steps_of = f"power law, imbalance {imbalance:g}", partial(power_law, imbalance)
    return _made(name, steps_of, size=size, steps=steps, slots=slots, per_node=per_node, imbalance=imbalance)


def _recorded(loads: Path, gpus: int, number: int, draws: int, per_node: int | None = None) -> Case:
    steps = partial(recorded, loads, gpus, number, draws)
    return Case(f"recorded, {number} sequences", _topology(gpus, per_node), RECORDED_EXPERTS, SLOTS, steps)


def _made(
    name: str,
    steps_of: Callable[[Size, int], Iterator[Step]],
    *,
    size: Size,
    steps: int,
    slots: int = SLOTS,
    per_node: int | None = None,
    imbalance: float | None = None,
) -> Case:
    return Case(name, _topology(size.gpus, per_node), size.experts, slots, partial(steps_of, size, steps), imbalance)


def _topology(gpus: int, per_node: int | None) -> Topology:
    return Topology(gpus // (per_node or gpus), per_node or gpus)
