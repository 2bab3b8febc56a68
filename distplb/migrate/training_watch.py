"""`TrainingWatch`: which declared tensors get gradients and which optimizers step, between two moves.

Hooks record this, without reading anything from the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from distplb.comm.dtensors import local_like
from distplb.comm.fsdp2 import has_pending_gradients, param_groups, sharded_ids
from distplb.errors import DistplbError
from distplb.migrate.row_tensors import RowTensor

__all__ = ["TrainingWatch"]

_IDLE = 2  # iterations without a gradient after which the model is assumed not to use a tensor any more


class TrainingWatch:
    """Tracks whether a backward pass has begun that no step has followed, and whether these tensors are trained.

    Args:
        layers: by layer, the declared tensors.
        optimizers: the optimizers that were passed to the rebalancer.
    """

    def __init__(self, layers: Sequence[Sequence[RowTensor]], optimizers: Sequence[Optimizer]) -> None:
        self._tensors = [
            {id(tensor): tensor for row_tensor in layer for tensor in row_tensor.tensors} for layer in layers
        ]
        self._names = {
            id(tensor): row_tensor.name for layer in layers for row_tensor in layer for tensor in row_tensor.tensors
        }
        self._of_fsdp = sharded_ids(self._all_tensors())
        self._optimizers = list(optimizers)
        self._begun: dict[int, Tensor] = {}
        self._sharded = set[int]()  # tensors whose gradients accumulate in a buffer of the framework
        # Experts and router of each layer apart, because a model may replace only one of them.
        self._parts = [
            [tensor for row_tensor in layer if row_tensor.of_experts is experts for tensor in row_tensor.tensors]
            for layer in layers
            for experts in (True, False)
        ]
        self._idle = [0] * len(self._parts)  # consecutive iterations with optimizer steps but no gradient
        self._reached = set[int]()  # parts that got gradients in this iteration
        self._hooked = set[int]()  # parts whose hooks have ever been called
        self._has_stepped = False  # whether any optimizer stepped in this iteration
        self._stepped_last = False  # the same for the last iteration
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers that stepped but were not passed
        self._handles: list[Any] = []
        watch = weakref.ref(self)  # so that hooks keep neither tensors nor optimizers alive
        for number, layer in enumerate(layers):
            for row_tensor in layer:
                for tensor in row_tensor.tensors:
                    if tensor.requires_grad and tensor.is_leaf:
                        hook = partial(_note_gradient, watch, 2 * number + (not row_tensor.of_experts))
                        self._handles.append(tensor.register_post_accumulate_grad_hook(hook))
                        if not row_tensor.stepped:
                            self._sharded.add(id(tensor))
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(partial(_look_for_gradients, watch)))
            self._handles.append(optimizer.register_step_post_hook(partial(_forget, watch)))
        # For all optimizers of the process. If this watch is never closed, the hook stays and does nothing: if the
        # garbage collector removed it, perhaps in the middle of a step, it would break torch's loop over the hooks.
        self._handles.append(register_optimizer_step_post_hook(partial(_note_step, watch)))

    def refuse_if_begun(self) -> None:
        """Raise if a backward pass has begun since the last step."""
        if self._has_begun():
            raise DistplbError(
                "a backward pass has begun since the optimizer's last step; call rebalancer.step() right after "
                "optimizer.step(), before the next forward"
            )

    def may_have_skipped(self) -> bool:
        """Whether a backward pass has begun, but no optimizer stepped in the iteration that has just ended.

        This happens when a gradient scaler skips the step; the gradients are then dropped, as the next iteration shows.
        """
        return not self._stepped_last and self._has_begun()

    def _has_begun(self) -> bool:
        # If a step was skipped, for example by a gradient scaler, the gradients have been dropped since.
        begun = any(map(self._holds_gradient, self._begun.values()))
        return begun or has_pending_gradients(param_groups(self._all_tensors()))

    def refuse_replaced(self) -> None:
        """Raise if a tensor is no longer the parameter of its FSDP2 module."""
        gone = self._of_fsdp - sharded_ids(self._all_tensors())
        if gone:
            raise DistplbError(
                f"{self._names[min(gone)]} is no longer the parameter of its FSDP2 module, as after "
                "load_state_dict(assign=True); close() this Rebalancer and build a new one"
            )

    def refuse_other_optimizers(self) -> None:
        """Raise if an optimizer that was not passed holds state of these tensors, which would stay behind."""
        for optimizer in self._others:
            for key, tensor in ((key, tensor) for layer in self._tensors for key, tensor in layer.items()):
                state = optimizer.state.get(tensor)
                # Wrappers hold no state, or share that of the optimizer inside.
                if state and not any(known.state.get(tensor) is state for known in self._optimizers):
                    raise DistplbError(
                        f"{self._names[key]} is stepped on by an optimizer ({type(optimizer).__name__}) that was not "
                        "passed to the Rebalancer, and whose state would stay behind when experts move; close() this "
                        "Rebalancer and build a new one with all optimizers in use"
                    )

    def untrained(self) -> list[bool]:
        """By layer, whether it got no gradient in the last iterations, although optimizers stepped.

        This means no gradient for any trained tensor of the layer, or none for its experts or its router if these got
        gradients before. If it is so on all ranks, the model may compute with tensors other than the declared ones.
        """
        idle = [iterations >= _IDLE for iterations in self._idle]
        trained = [any(tensor.requires_grad for tensor in part) for part in self._parts]
        untrained = []
        for number in range(0, len(idle), 2):
            parts = [part for part in (number, number + 1) if trained[part]]
            is_idle = bool(parts) and all(idle[part] for part in parts)
            untrained.append(is_idle or any(idle[part] and part in self._hooked for part in parts))
        return untrained

    def iteration_ends(self) -> None:
        """Update the idle iterations of every part, and begin the next iteration."""
        if self._has_stepped:
            for number, part in enumerate(self._parts):
                # Only parts without a gradient are looked at, because that takes longer than all else in an iteration.
                is_idle = number not in self._reached and any(tensor.requires_grad for tensor in part)
                self._idle[number] = self._idle[number] + 1 if is_idle else 0
        self._has_stepped, self._stepped_last = False, self._has_stepped
        self._reached.clear()

    def close(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _all_tensors(self) -> list[Tensor]:
        return [tensor for layer in self._tensors for tensor in layer.values()]

    def _holds_gradient(self, tensor: Tensor) -> bool:
        """Whether a tensor has a gradient in Megatron-Core's `main_grad` or in `grad`.

        Zeros in `grad` do not count, because a skipped step may leave them.
        """
        if id(tensor) in self._sharded or getattr(tensor, "main_grad", None) is not None:
            return True
        return tensor.grad is not None and bool(local_like("", tensor.grad, tensor.grad).any())


_Watch = weakref.ref[TrainingWatch]


def _note_gradient(watch: _Watch, part: int, tensor: Tensor) -> None:
    if (watching := watch()) is not None:
        watching._begun[id(tensor)] = tensor
        watching._reached.add(part)
        watching._hooked.add(part)


def _look_for_gradients(watch: _Watch, *_: Any) -> None:
    """Detect gradients that were assigned manually, which calls no hook.

    Parts whose hooks are called are skipped: their `grad` may hold old zeros.
    """
    if (watching := watch()) is not None:
        for number, part in enumerate(watching._parts):
            if number not in watching._hooked and any(tensor.grad is not None for tensor in part):
                watching._reached.add(number)


def _forget(watch: _Watch, *_: Any) -> None:
    if (watching := watch()) is not None:
        watching._begun.clear()


def _note_step(watch: _Watch, optimizer: Optimizer, *_: Any) -> None:
    if (watching := watch()) is not None:
        watching._has_stepped = True
        if not any(optimizer is known for known in watching._optimizers):
            watching._others.add(optimizer)
