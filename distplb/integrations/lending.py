"""Shared by adapters that lend replicas: the `StepBalancer` of a job, and experts that compute with other rows.

Shapes: P slots, R replica slots of each GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.records.event_log import EventLog
from distplb.replicas.step_balancer import StepBalancer
from distplb.train.options import Moves, Record

__all__ = ["step_balancer", "with_rows"]

_STEPS = "steps.jsonl"  # in the folder of a `Record`, where `distplb report` looks for it
# Arguments of `StepBalancer` that the adapters pass.
_OWN = ("group_or_mesh", "topology", "num_experts", "replica_slots", "deadline")


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
    known = [name for name in inspect.signature(StepBalancer).parameters if name not in _OWN]
    for name in given:
        if name not in known:
            raise DistplbError(f"replicas has {name!r}; pass options of distplb.StepBalancer: {', '.join(known)}")
    return StepBalancer(
        group,
        topology=topology,
        num_experts=next(iter(sizes.values()), topology.num_gpus),
        replica_slots=replica_slots,
        deadline=deadline,
        **({"dry_run": moves.dry_run} | given),
    )


def with_rows(module: nn.Module, **replaced: Any) -> Any:
    """The module of experts again, of the same class, with other tensors in place of some of its own.

    Its forward and all methods that this calls compute with those rows, which need not be copied into one tensor.
    Everything else, such as activations and functions, is the module's. Hooks are left out, and it is not registered
    anywhere.

    >>> import torch
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> with_rows(layer, weight=torch.tensor([[3.0, 4.0]])).forward(torch.ones(2))
    tensor([7.])

    Args:
        module: the module.
        **replaced: attributes by name; a parameter may be replaced by any tensor.
    """
    found = object.__new__(type(module))
    found.__dict__.update(vars(module), **replaced)
    for kept_in in ("_parameters", "_buffers"):
        own = vars(module)[kept_in]
        found.__dict__[kept_in] = {name: tensor for name, tensor in own.items() if name not in replaced}
    found.__dict__.pop("forward", None)  # of the module, with the module's own tensors
    return found
