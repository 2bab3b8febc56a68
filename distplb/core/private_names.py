"""Private names of torch: what has no public name is read here, and nowhere else.

Beside `comm.private_names` and `comm.fsdp2`, which keep torch.distributed's. Each function is one name and what it
is needed for. Seen in torch 2.6, 2.13 and 2.14; tests/house/test_private_names.py fails where one is gone, and says
what went with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = [
    "break_graph",
    "forward_pre_hooks",
    "is_in_backward",
    "is_of_compiled_graph",
    "leaves",
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
    """A module's, in the order in which they run: `Module._forward_pre_hooks`."""
    return list(module._forward_pre_hooks.values())


def leaves(value: Any) -> list[Any]:
    """All that containers hold, however deep: `torch.utils._pytree.tree_leaves`."""
    return torch.utils._pytree.tree_leaves(value)
