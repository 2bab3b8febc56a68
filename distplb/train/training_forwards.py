"""Which forwards are steps of the training: no evaluations, and no recomputations under activation checkpointing."""

from __future__ import annotations

import sys
from types import FrameType

from torch.autograd.function import FunctionCtx

from distplb.core.private_names import is_in_backward, is_of_compiled_graph
from distplb.errors import DistplbError

__all__ = ["is_recomputation", "is_step"]


def is_step(has_gradients: bool) -> bool:
    """Whether a forward of this thread is one of the training."""
    return not is_recomputation() and (has_gradients or _is_in_a_recorded_function())


def is_recomputation() -> bool:
    """Whether this thread is inside of a backward pass, where a forward routes the same tokens a second time."""
    return is_in_backward()


def _is_in_a_recorded_function() -> bool:
    """Whether this thread is in the forward of a `torch.autograd.Function` that will have a backward.

    Gradients are off there, as they are in an evaluation. `needs_input_grad` does not tell the two apart: under
    `torch.no_grad()`, too, it is True for an input that asks for a gradient. An edge to an earlier node is there only
    if the function is recorded.

    Raises:
        DistplbError: in a compiled graph that has a backward, as what was without gradients in it is not known then.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Not of modules, whose frames are many: `f_locals` would keep what they hold until they end.
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, FunctionCtx) and getattr(context, "next_functions", None):
                if is_of_compiled_graph(context):
                    raise DistplbError(
                        "LoadWindow.add: a forward without gradients was compiled as a part of one with gradients; "
                        "whether it is an evaluation or a reentrant checkpoint is not known there: pass "
                        "training=False for an evaluation, use_reentrant=False for a checkpoint, or compile it apart"
                    )
                return True
        frame = frame.f_back
    return False
