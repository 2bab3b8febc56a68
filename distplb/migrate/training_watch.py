"""`TrainingWatch`: which declared tensors get gradients and which optimizers step, between two moves.

Known from hooks, without reading anything from the device.
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

_IDLE = 2  # iterations without a gradient, after which the model is taken not to use a tensor any more


class TrainingWatch:
    """Knows whether a backward pass has begun that no step has followed, and whether these tensors are trained.

    Args:
        layers: by layer, the declared tensors.
        optimizers: those that were passed to the rebalancer.
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
        self._sharded = set[int]()  # whose gradients accumulate in a buffer of the framework
        # Experts and router of each layer: what is replaced may be one of them alone.
        self._parts = [
            [tensor for row_tensor in layer if row_tensor.of_experts is experts for tensor in row_tensor.tensors]
            for layer in layers
            for experts in (True, False)
        ]
        self._idle = [0] * len(self._parts)  # iterations in a row in which optimizers stepped and no gradient came
        self._reached = set[int]()  # parts to which gradients have come in this iteration
        self._hooked = set[int]()  # parts whose hooks were called at any time
        self._has_stepped = False  # any optimizer, in this iteration
        self._stepped_last = False  # likewise, in the last iteration
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # that have stepped and were not passed
        self._handles: list[Any] = []
        watch = weakref.ref(self)  # so that hooks keep neither the tensors nor the optimizers
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
        # Of all optimizers of the process. Where nobody closes this watch the hook stays, and does nothing: taken away
        # by the garbage collector, in the middle of a step perhaps, it would break the loop over the hooks.
        self._handles.append(register_optimizer_step_post_hook(partial(_note_step, watch)))

    def refuse_if_begun(self) -> None:
        """Raise if a backward pass of another step has begun."""
        if self._has_begun():
            raise DistplbError(
                "a backward pass has begun since the optimizer's last step; call rebalancer.step() right after "
                "optimizer.step(), before the next forward"
            )

    def may_have_skipped(self) -> bool:
        """Whether a backward pass has begun, and no optimizer has stepped in the iteration that has ended.

        As where a gradient scaler has skipped the step: its gradients are then dropped, which the next iteration shows.
        """
        return not self._stepped_last and self._has_begun()

    def _has_begun(self) -> bool:
        # Where a step was skipped, as by a gradient scaler, the gradients have been dropped since.
        begun = any(map(self._holds_gradient, self._begun.values()))
        return begun or has_pending_gradients(param_groups(self._all_tensors()))

    def refuse_replaced(self) -> None:
        """Raise if a tensor is not the parameter of its FSDP2 module any more."""
        gone = self._of_fsdp - sharded_ids(self._all_tensors())
        if gone:
            raise DistplbError(
                f"{self._names[min(gone)]} is not the parameter of its FSDP2 module any more, as after "
                "load_state_dict(assign=True); close() this Rebalancer, and make one of the model as it is now"
            )

    def refuse_other_optimizers(self) -> None:
        """Raise if an optimizer that was not passed holds state of these tensors: it would stay behind."""
        for optimizer in self._others:
            for key, tensor in ((key, tensor) for layer in self._tensors for key, tensor in layer.items()):
                state = optimizer.state.get(tensor)
                # Wrappers hold none, or share that of the optimizer inside.
                if state and not any(known.state.get(tensor) is state for known in self._optimizers):
                    raise DistplbError(
                        f"{self._names[key]} is stepped on by an optimizer ({type(optimizer).__name__}) that the "
                        "rebalancer was not given, and whose state would stay behind when experts move; make a new "
                        "Rebalancer with the optimizers that are in use, after close() of this one"
                    )

    def untrained(self) -> list[bool]:
        """By layer, whether it has had no gradient in the last iterations, in which optimizers have stepped.

        That is, none of all that is trained of the layer, or none of its experts or its router where these had some
        before. Where that is so on all ranks, the model may compute with other tensors than the declared ones.
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
        """Count it for every part, and begin the next."""
        if self._has_stepped:
            for number, part in enumerate(self._parts):
                is_trained = any(tensor.requires_grad for tensor in part)
                self._idle[number] = self._idle[number] + 1 if is_trained and number not in self._reached else 0
        self._has_stepped, self._stepped_last = False, self._has_stepped
        self._reached.clear()

    def close(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def _all_tensors(self) -> list[Tensor]:
        return [tensor for layer in self._tensors for tensor in layer.values()]

    def _holds_gradient(self, tensor: Tensor) -> bool:
        """In `grad`, or in Megatron-Core's `main_grad`. Zeros do not count: a skipped step may leave them."""
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
    """Gradients that were assigned by hand have called no hook. Where hooks are called, `grad` may hold old zeros."""
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
