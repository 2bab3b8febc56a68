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

__all__ = ["refuse_experts", "step_balancer", "with_rows"]

_STEPS = "steps.jsonl"  # in the folder of a `Record`, where `distplb report` looks for it
# Arguments of `StepBalancer` that the adapters pass.
_OWN = ("group_or_mesh", "topology", "num_experts", "replica_slots", "deadline")


def step_balancer(
    group: Any,
    topology: Topology,
    sizes: Mapping[str, int],
    *,
    replica_slots: int,
    replicas: Mapping[str, Any],
    of_rebalancer: Mapping[str, Any],
    is_writer: bool,
    deadline: float,
) -> StepBalancer | None:
    """Make the `StepBalancer` of an EP group, if it has replica slots. Collective, also for ranks without MoE layers.

    Args:
        group: the EP group.
        topology: its nodes and GPUs.
        sizes: P of each MoE layer of this rank, by name; the same for all.
        replica_slots: R; 0 makes none.
        replicas: other options of `StepBalancer`.
        of_rebalancer: options of the `Rebalancer`. If `moves` are a dry run, so is this; the folder and the summary
            writer of `record` also receive sampled steps.
        is_writer: whether this rank writes them.
        deadline: seconds to wait for other ranks.

    Raises:
        DistplbError: for layers of different sizes, or an option that `StepBalancer` refuses or does not have.
    """
    if not replica_slots:
        return None
    for name, size in sizes.items():
        if size != next(iter(sizes.values())):
            raise DistplbError(
                f"{name} has {size} experts and {next(iter(sizes))} has {next(iter(sizes.values()))}; replicas need "
                "layers of one size: pass replica_slots=0"
            )
    known = [name for name in inspect.signature(StepBalancer).parameters if name not in _OWN]
    for name in replicas:
        if name not in known:
            raise DistplbError(f"replicas has {name!r}; pass options of distplb.StepBalancer: {', '.join(known)}")
    given = {"dry_run": of_rebalancer.get("moves", Moves()).dry_run} | dict(replicas)
    record = of_rebalancer.get("record", Record())
    if "on_event" not in given and is_writer and (record.folder is not None or record.summary_writer is not None):
        path = None if record.folder is None else Path(record.folder) / _STEPS
        given["on_event"] = EventLog(path, record.summary_writer)
    return StepBalancer(
        group,
        topology=topology,
        num_experts=next(iter(sizes.values()), topology.num_gpus),
        replica_slots=replica_slots,
        deadline=deadline,
        **given,
    )


def refuse_experts(name: str, experts: nn.Module, *, has_own_forward: bool) -> None:
    """Refuse experts that compute with more than the parameters of their module, or in another way than their class.

    Args:
        name: the layer's name.
        experts: the module of experts.
        has_own_forward: whether its forward is that of its class, as far as the framework has not wrapped it.

    Raises:
        DistplbError: with what to change.
    """
    if not has_own_forward:
        raise DistplbError(
            f"{name}: the forward of its {type(experts).__qualname__} was replaced, and replicas would be computed "
            "without what was added; use a class with a forward of its own, or pass replica_slots=0"
        )
    own = dict(experts.named_parameters(recurse=False))
    others = [key for key in (*dict(experts.named_parameters()), *dict(experts.named_buffers())) if key not in own]
    if others:
        raise DistplbError(
            f"{name}: its {type(experts).__qualname__} has {others[0]}, and only parameters of the module itself are "
            "lent; make it one, or pass replica_slots=0"
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
