"""Shared by adapters that lend replicas: the `StepBalancer` of a job, and experts that compute with other rows.

Shapes: P slots, R replica slots of each GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.records.event_log import EventLog
from distplb.replicas.step_balancer import StepBalancer
from distplb.train.options import Moves, Record

__all__ = ["WithRows", "step_balancer"]

_STEPS = "steps.jsonl"  # in the folder of a `Record`, where `distplb report` looks for it


def step_balancer(
    group: Any,
    topology: Topology,
    sizes: Mapping[str, int],
    *,
    replica_slots: int,
    options: Mapping[str, Any],
    moves: Moves,
    record: Record,
    is_writer: bool,
    deadline: float,
) -> StepBalancer:
    """Make the `StepBalancer` of an EP group. Collective in the group, also for ranks without MoE layers.

    Args:
        group: the EP group.
        topology: its nodes and GPUs.
        sizes: P of each MoE layer of this rank, by name; the same for all.
        replica_slots: R.
        options: other options of `StepBalancer`.
        moves: of the `Rebalancer`: if it is a dry run, so is this.
        record: of the `Rebalancer`: its folder and summary writer also receive sampled steps.
        is_writer: whether this rank writes them.
        deadline: seconds to wait for other ranks.

    Raises:
        DistplbError: for layers of different sizes, or an option that `StepBalancer` refuses or does not have.
    """
    for name, size in sizes.items():
        if size != next(iter(sizes.values())):
            raise DistplbError(
                f"{name} has {size} experts and {next(iter(sizes))} has {next(iter(sizes.values()))}; replicas need "
                "layers of one size: pass replica_slots=0"
            )
    given = dict(options)
    if "on_event" not in given and is_writer and (record.folder is not None or record.summary_writer is not None):
        path = None if record.folder is None else Path(record.folder) / _STEPS
        given["on_event"] = EventLog(path, record.summary_writer)
    try:
        return StepBalancer(
            group,
            topology=topology,
            num_experts=next(iter(sizes.values()), topology.num_gpus),
            replica_slots=replica_slots,
            deadline=deadline,
            **({"dry_run": moves.dry_run} | given),
        )
    except TypeError as unknown:
        raise DistplbError(f"replicas: {unknown}; pass options of distplb.StepBalancer") from unknown


class WithRows:
    """A module of experts, as its own forward sees it, whose tensors are replaced by others.

    A forward that is called with it computes with those rows and needs no copy of them in one tensor. Everything else,
    such as activations and functions, is the module's.

    Args:
        module: the module.
        **replaced: attributes by name.
    """

    def __init__(self, module: nn.Module, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._of = module

    def __getattr__(self, name: str) -> Any:
        """An attribute of the module, because this object has none of that name."""
        return getattr(self._of, name)
