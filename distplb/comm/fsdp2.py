"""What FSDP2 keeps besides the sharded parameters: weights gathered for a forward, and gradients not yet reduced.

The only file that uses FSDP2's private names: `_module_state_mapping` of torch.distributed._composable_state;
`_fsdp_param_groups` (`_fsdp_param_group` in torch 2.6) of FSDPState; `fsdp_params`, `wait_for_unshard`, `reshard`,
`_all_gather_result` and `_partial_reduce_output` of FSDPParamGroup; `sharded_param`, `_unsharded_param` and
`unsharded_accumulated_grad` of FSDPParam. All exist in torch 2.6 and 2.13; a test fails if one is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["gathered_ids", "has_pending_gradients", "param_groups", "reshard", "sharded_ids"]


def param_groups(tensors: Iterable[Tensor]) -> list[Any]:
    """FSDP2's parameter groups that shard one of these tensors, from all modules of this process."""
    if "torch.distributed.fsdp" not in sys.modules:  # then no module uses FSDP2
        return []
    ids = {id(tensor) for tensor in tensors}
    return [group for group in _all_groups() if any(id(param.sharded_param) in ids for param in group.fsdp_params)]


def sharded_ids(tensors: Iterable[Tensor]) -> set[int]:
    """The `id` of each tensor that is currently a parameter of an FSDP2 module."""
    if "torch.distributed.fsdp" not in sys.modules:
        return set()
    return {id(tensor) for tensor in tensors} & {
        id(param.sharded_param) for group in _all_groups() for param in group.fsdp_params
    }


def gathered_ids(tensors: Iterable[Tensor]) -> set[int]:
    """The `id` of each tensor that is a whole weight, which replaces a sharded parameter for one forward."""
    if "torch.distributed.fsdp" not in sys.modules:
        return set()
    gathered = {id(getattr(param, "_unsharded_param", None)) for group in _all_groups() for param in group.fsdp_params}
    return {id(tensor) for tensor in tensors} & gathered


def reshard(groups: Iterable[Any]) -> None:
    """Drop weights that a forward left gathered or a prefetch began to gather; the next forward gathers them again.

    After an evaluation with `reshard_after_forward=False`, or of the root module, the next forward would otherwise
    compute with the rows from before a move.
    """
    for group in groups:
        if group._all_gather_result is not None:
            group.wait_for_unshard()
        group.reshard()


def has_pending_gradients(groups: Iterable[Any]) -> bool:
    """Whether a backward pass has left gradients that are not in the tensors' `grad` yet.

    Under `set_requires_gradient_sync(False)` they accumulate in the gathered weights, under
    `set_requires_all_reduce(False)` in a buffer of each group. Both belong to slots, and would stay behind when experts
    move.
    """
    return any(_is_pending(group) for group in groups)


def _all_groups() -> list[Any]:
    """FSDP2's parameter groups of all modules of this process."""
    from torch.distributed._composable_state import _module_state_mapping

    by_id: dict[int, Any] = {}
    for reference in list(_module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        by_id |= {id(group): group for group in groups if group is not None}  # modules may share a state
    return list(by_id.values())


def _is_pending(group: Any) -> bool:
    if group._partial_reduce_output is not None:
        return True
    for param in group.fsdp_params:
        gathered = getattr(param, "_unsharded_param", None)  # exists after the first forward
        if param.unsharded_accumulated_grad is not None or (gathered is not None and gathered.grad is not None):
            return True
    return False
