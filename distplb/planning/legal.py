"""Check that a placement does not change what the model computes. Pure.

Shapes: X rows, L layers, E experts, P slots, B groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distplb.core.placement import Placement
from distplb.errors import DistplbError

__all__ = ["check_legal", "class_of_expert", "keeps_blocks"]


def keeps_blocks(table: Tensor, num_groups: int) -> Tensor:
    """`[X]` bool: whether each block of P / B slots in a table of `[X, P]` holds the experts of one group.

    >>> keeps_blocks(torch.tensor([[2, 3, 1, 0], [0, 2, 1, 3]]), num_groups=2)
    tensor([ True, False])
    """
    group = table // (table.shape[1] // num_groups)
    return (group.view(len(table), num_groups, -1).diff(dim=2) == 0).flatten(1).all(1)


def class_of_expert(table: Tensor, slot_class: Tensor) -> Tensor:
    """`[X, E]`: the class of each expert's slot in tables `[X, P]` without replicas, from `slot_class [P]`.

    >>> class_of_expert(torch.tensor([[2, 0, 1, 3]]), torch.tensor([5, 6, 5, 6]))
    tensor([[6, 5, 5, 6]])
    """
    return torch.empty_like(table).scatter_(1, table, slot_class.expand_as(table).contiguous())


def check_legal(
    placement: Placement, current: Placement, num_groups: int | None = None, slot_class: Tensor | None = None
) -> None:
    """Refuse a placement that group-limited routing or the layout does not allow.

    Args:
        placement: the next placement, without replicas.
        current: the placement in force, which defines the experts' classes.
        num_groups: number of groups of the router, whose rows move; None for a router without groups.
        slot_class: `[P]`, as in `plan`.

    Raises:
        DistplbError: for the first layer that breaks a rule.
    """
    if num_groups is not None:
        broken = (~keeps_blocks(placement.expert_of_slot, num_groups)).nonzero()
        if len(broken):
            raise DistplbError(
                f"layer {int(broken[0])} of the placement splits a routing group: with {num_groups} groups, each block "
                f"of {placement.num_slots // num_groups} slots must hold the experts of one group, or the router would "
                "choose other experts than before"
            )
    if slot_class is not None:
        classes = torch.as_tensor(slot_class, device="cpu")
        before, after = (class_of_expert(one.expert_of_slot, classes) for one in (current, placement))  # [L, E]
        broken = (before != after).nonzero()
        if len(broken):
            layer, expert = broken[0].tolist()
            raise DistplbError(
                f"layer {layer} of the placement moves expert {expert} from a slot of class "
                f"{int(before[layer, expert])} to one of class {int(after[layer, expert])}; slot_class keeps every "
                "expert in its class"
            )
