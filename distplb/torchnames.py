"""Private names of torch: what has no public name is read here, and nowhere else.

Beside `migrate.fsdp2`, which keeps those of FSDP2. Each function is one name and what it is needed for. Seen in torch
2.6, 2.13 and 2.14; tests/test_torchnames.py fails where one is gone, and says what went with it. What is not imported
with torch is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import Store

__all__ = [
    "break_graph",
    "default_store",
    "flattened",
    "forward_pre_hooks",
    "is_in_backward",
    "is_of_compiled_graph",
    "leaves",
    "local_shape_and_offset",
]


def is_in_backward() -> bool:
    """Whether this thread is inside of a backward pass: `torch._C._current_graph_task_id`."""
    return torch._C._current_graph_task_id() != -1


def is_of_compiled_graph(context: Any) -> bool:
    """Whether a context is that of the function that runs a graph of AOTAutograd: its class is CompiledFunction."""
    return type(context).__name__ == "CompiledFunctionBackward"


def break_graph() -> None:
    """Where a forward is compiled, run what follows without: `torch._dynamo.graph_break`. Refused in a full graph."""
    torch._dynamo.graph_break()


def forward_pre_hooks(module: nn.Module) -> list[Any]:
    """In the order in which they run: `Module._forward_pre_hooks`."""
    return list(module._forward_pre_hooks.values())


def leaves(value: Any) -> list[Any]:
    """What containers hold, however deep: `torch.utils._pytree.tree_leaves`."""
    return torch.utils._pytree.tree_leaves(value)


def default_store() -> Store:
    """The one that the ranks of the job have met in: `torch.distributed.distributed_c10d._get_default_store`."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def flattened(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """One axis of all of a mesh's, under this name: `DeviceMesh._flatten`."""
    return mesh._flatten(name)


def local_shape_and_offset(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a DTensor's part here: `torch.distributed.tensor._utils.compute_local_shape_and_global_offset`."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)
