"""What the training does with the declared tensors between two moves: gradients that come, optimizers that step.

Known from hooks, without looking at the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from distplb.errors import DistplbError
from distplb.migrate.fsdp2 import has_pending_gradients, param_groups, sharded
from distplb.migrate.rows import RowTensor

__all__ = ["TrainingWatch"]


class TrainingWatch:
    """Knows whether a step has been begun and not taken, and whether it is these tensors that are trained.

    Args:
        layers: by layer, the declared tensors.
        optimizers: those that the rebalancer was given.
    """

    def __init__(self, layers: Sequence[Sequence[RowTensor]], optimizers: Sequence[Optimizer]) -> None:
        self._tensors = [
            {id(tensor): tensor for row_tensor in layer for tensor in row_tensor.tensors} for layer in layers
        ]
        self._names = {
            id(tensor): row_tensor.name for layer in layers for row_tensor in layer for tensor in row_tensor.tensors
        }
        self._of_fsdp = sharded(self._all_tensors())
        self._optimizers = list(optimizers)
        self._begun: dict[int, Tensor] = {}
        self._sharded = set[int]()  # whose gradients are added up elsewhere, and taken from there
        self._reached = set[int]()  # layers to which gradients have come since the last `restart`
        self._has_stepped = False  # any optimizer, since then
        self._others: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # that have stepped and were not given
        self._handles: list[Any] = []
        watch = weakref.ref(self)  # so that hooks keep neither the tensors nor the optimizers
        for number, layer in enumerate(layers):
            for row_tensor in layer:
                for tensor in row_tensor.tensors:
                    if tensor.requires_grad and tensor.is_leaf:
                        hook = partial(_note_gradient, watch, number)
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
        """Raise if gradients of another step are already on their way."""
        # Where a step was skipped, as by a gradient scaler, they have been dropped since.
        begun = any(map(self._holds_gradient, self._begun.values()))
        if begun or has_pending_gradients(param_groups(self._all_tensors())):
            raise DistplbError(
                "a backward pass has begun since the optimizer's last step; call rebalancer.step() right after "
                "optimizer.step(), before the next forward"
            )

    def refuse_replaced(self) -> None:
        """Raise if a tensor is not the parameter of its FSDP2 module any more."""
        gone = self._of_fsdp - sharded(self._all_tensors())
        if gone:
            raise DistplbError(
                f"{self._names[min(gone)]} is not the parameter of its FSDP2 module any more, as after "
                "load_state_dict(assign=True); close() this Rebalancer, and make one of the model as it is now"
            )

    def refuse_other_optimizers(self) -> None:
        """Raise if an optimizer that was not given holds state of these tensors: it would stay behind."""
        for optimizer in self._others:
            for key, tensor in ((key, tensor) for layer in self._tensors for key, tensor in layer.items()):
                state = optimizer.state.get(tensor)
                # Wrappers hold none, or share that of the optimizer inside.
                if state and not any(known.state.get(tensor) is state for known in self._optimizers):
                    raise DistplbError(
                        f"{self._names[key]} is stepped on by a {type(optimizer).__name__} that the rebalancer was not "
                        "given, and whose state would stay behind when experts move; make a new Rebalancer with the "
                        "optimizers that are in use, after close() of this one"
                    )

    def untrained(self) -> list[bool]:
        """By layer, whether optimizers have stepped since `restart`, and no gradient has come to what is trained of it.

        Where that is so on all ranks, the model computes with other tensors than those that were declared.
        """
        return [
            self._has_stepped and number not in self._reached and any(tensor.requires_grad for tensor in layer.values())
            for number, layer in enumerate(self._tensors)
        ]

    def restart(self) -> None:
        """Begin anew with what `untrained` goes by."""
        self._has_stepped = False
        self._reached.clear()

    def close(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def _all_tensors(self) -> list[Tensor]:
        return [tensor for layer in self._tensors for tensor in layer.values()]

    def _holds_gradient(self, tensor: Tensor) -> bool:
        """Megatron-Core adds gradients up in `main_grad`, and drops `grad`."""
        return tensor.grad is not None or id(tensor) in self._sharded or getattr(tensor, "main_grad", None) is not None


_Watch = weakref.ref[TrainingWatch]


def _note_gradient(watch: _Watch, layer: int, tensor: Tensor) -> None:
    if (watching := watch()) is not None:
        watching._begun[id(tensor)] = tensor
        watching._reached.add(layer)


def _look_for_gradients(watch: _Watch, *_: Any) -> None:
    """Those that were put there by hand have called no hook."""
    if (watching := watch()) is not None:
        for number, layer in enumerate(watching._tensors):
            if number not in watching._reached and any(tensor.grad is not None for tensor in layer.values()):
                watching._reached.add(number)


def _forget(watch: _Watch, *_: Any) -> None:
    if (watching := watch()) is not None:
        watching._begun.clear()


def _note_step(watch: _Watch, optimizer: Optimizer, *_: Any) -> None:
    if (watching := watch()) is not None:
        watching._has_stepped = True
        if not any(optimizer is known for known in watching._optimizers):
            watching._others.add(optimizer)
