"""Tells training forwards from evaluations and from recomputations under activation checkpointing."""

from __future__ import annotations

import sys
from types import FrameType

from torch.autograd.function import FunctionCtx

from distplb.core.private_names import is_in_backward, is_of_compiled_graph
from distplb.errors import DistplbError

__all__ = ["is_recomputation", "is_step"]


def is_step(has_gradients: bool) -> bool:
    """Whether the current forward of this thread is a training step."""
    return not is_recomputation() and (has_gradients or _is_in_a_recorded_function())


def is_recomputation() -> bool:
    """Whether this thread is inside a backward pass, where a forward routes the same tokens a second time."""
    return is_in_backward()


def _is_in_a_recorded_function() -> bool:
    """Whether this thread is in the forward of a `torch.autograd.Function` that will have a backward.

    Gradients are off there, as in an evaluation. `needs_input_grad` does not distinguish the two: under
    `torch.no_grad()` it is also True for an input that requires a gradient. An edge to an earlier node exists only if
    the function is recorded.

    Raises:
        DistplbError: in a compiled graph that has a backward, where parts without gradients cannot be recognised.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Skip the many frames of modules: reading `f_locals` would keep their tensors alive until they end.
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, FunctionCtx) and getattr(context, "next_functions", None):
                if is_of_compiled_graph(context):
                    raise DistplbError(
                        "LoadWindow.add: a forward without gradients was compiled as a part of one with gradients, so "
                        "distplb cannot tell an evaluation from a reentrant checkpoint; pass training=False for an "
                        "evaluation or use_reentrant=False for a checkpoint, or compile it separately"
                    )
                return True
        frame = frame.f_back
    return False
