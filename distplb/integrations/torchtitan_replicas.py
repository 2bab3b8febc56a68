"""Replicas in torchtitan 0.3: its dispatcher sends tokens to physical slots, its experts compute with replica rows.

Two places of a layer are replaced: the `AllToAllTokenDispatcher`, whose exchange of counts falls away because the split
tells all sizes, and the forward of the experts. Both are torchtitan's own in a step without replicas.

Shapes: T tokens of this rank, D model width, K experts of each token, M GPUs, G own and R replica slots of each GPU,
X rows that arrive here.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

from distplb.core.private_names import is_compiled
from distplb.errors import DistplbError
from distplb.integrations.lending import refuse_experts, with_rows
from distplb.replicas.step_balancer import Dispatch, StepBalancer

__all__ = ["lend", "refuse_schedule", "refuse_what_cannot_lend", "stop_lending"]

_IN_TWO_PARTS = {"BACKWARD_INPUT", "BACKWARD_WEIGHT"}  # torch's names of a backward's passes
_REDISTRIBUTING = "Module.parallelize.<locals>.forward_with_redistribution"  # torchtitan's, around a module's forward


def refuse_schedule(schedule: Any) -> None:
    """Refuse a pipeline schedule that computes the gradients of rows and of weights in passes of their own.

    Args:
        schedule: one of `torch.distributed.pipelining`, or None.

    Raises:
        DistplbError: for such a schedule, also one that was read from a file.
    """
    orders = getattr(schedule, "pipeline_order_with_comms", None) or getattr(schedule, "pipeline_order", None) or {}
    for action in _actions(action for order in orders.values() for action in order):
        if action.computation_type.name in _IN_TWO_PARTS:
            raise DistplbError(
                f"the pipeline schedule, {type(schedule).__name__}, computes the gradients of weights in a pass of its "
                "own, in which replicas are not supported; use 1F1B or Interleaved1F1B, or pass replica_slots=0"
            )


def _actions(actions: Any) -> Iterator[Any]:
    """All actions of a schedule, also those that others consist of."""
    for action in actions:
        if action is not None:
            yield action
            yield from _actions(getattr(action, "sub_actions", None) or ())


def refuse_what_cannot_lend(name: str, moe: MoE, around: list[nn.Module]) -> None:
    """Refuse a layer that cannot have replicas.

    Args:
        name: the layer's name.
        moe: the layer.
        around: the modules that contain it.

    Raises:
        DistplbError: for another dispatcher, a layer that is compiled, and experts that compute with more than the
            parameters of their module, or in another way than by its forward.
    """
    dispatcher = _plain(moe.routed_experts.token_dispatcher)
    if type(dispatcher) is not AllToAllTokenDispatcher:
        raise DistplbError(
            f"{name} dispatches with {type(dispatcher).__qualname__}, which has no place for replicas; use the "
            "dispatcher of moe_comm_backend='standard', or pass replica_slots=0"
        )
    for module in (*around, *moe.modules()):
        if is_compiled(module):
            raise DistplbError(
                f"{name} is compiled (its {type(module).__qualname__}), and a compiled forward cannot wait for the "
                "counts of a step; leave 'model' out of compile.components, or pass replica_slots=0"
            )
    experts = moe.routed_experts.inner_experts
    refuse_experts(name, experts, has_own_forward=_is_own_forward(experts))


def _is_own_forward(experts: nn.Module) -> bool:
    """Whether experts compute by the forward of their class; `Module.parallelize` only redistributes around it."""
    forward = vars(experts).get("forward")
    forward = forward.plain if isinstance(forward, _LendingExperts) else forward
    if inspect.isfunction(forward) and forward.__qualname__ == _REDISTRIBUTING:
        forward = inspect.getclosurevars(forward).nonlocals.get("fn")
    of_class: Any = type(experts).forward
    return forward is None or getattr(forward, "__func__", None) is of_class


def lend(name: str, moe: MoE, balancer: StepBalancer) -> Callable[[], None]:
    """Let a layer take part in a balancer's steps from now on, instead of those of an earlier one.

    Args:
        name: the layer's name.
        moe: the layer.
        balancer: whose steps.

    Returns:
        A function that ends it, unless another balancer has taken over.
    """
    stop_lending(moe)
    routed = moe.routed_experts
    experts, flight = routed.inner_experts, _Flight()
    dispatcher = _LendingDispatcher(routed.token_dispatcher, balancer, name, flight)
    had_forward = "forward" in vars(experts)
    routed.token_dispatcher = dispatcher
    experts.forward = _LendingExperts(experts, experts.forward, had_forward, balancer, flight)

    def end() -> None:
        if routed.token_dispatcher is dispatcher:
            stop_lending(moe)

    return end


def stop_lending(moe: MoE) -> None:
    """Give a layer its own dispatcher and the forward of its experts back."""
    routed = moe.routed_experts
    routed.token_dispatcher = _plain(routed.token_dispatcher)
    lending = vars(routed.inner_experts).get("forward")
    if isinstance(lending, _LendingExperts):
        del routed.inner_experts.forward
        if lending.had_forward:
            routed.inner_experts.forward = lending.plain


def _plain(dispatcher: Any) -> Any:
    return dispatcher.plain if isinstance(dispatcher, _LendingDispatcher) else dispatcher


class _Flight(threading.local):
    """The step that a thread is in, between a layer's dispatch and its experts."""

    step: Dispatch | None = None
    device: torch.device | None = None


class _LendingDispatcher(AllToAllTokenDispatcher):  # type: ignore[misc]  # torchtitan has no types here
    """Torchtitan's dispatcher over physical slots, with sizes from the split.

    A copy of the model gets the plain dispatcher: its ranks need not run it together with the model.

    Args:
        plain: the dispatcher that it replaces.
        balancer: counts and splits.
        layer: the layer's name.
        flight: takes the step to the experts.
    """

    def __init__(self, plain: AllToAllTokenDispatcher, balancer: StepBalancer, layer: str, flight: _Flight) -> None:
        self.__dict__.update(vars(plain))
        self.plain, self._balancer, self._layer, self._flight = plain, balancer, layer, flight

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the plain dispatcher."""
        return copy.deepcopy(self.plain, memo)

    def dispatch(
        self,
        x_TD: Tensor,
        topk_scores_TK: Tensor,
        topk_expert_ids_TK: Tensor,
        num_local_tokens_per_expert_E: Tensor,
    ) -> Any:
        """Dispatch to physical slots; to own slots, as torchtitan does, in a step without replicas."""
        if torch.compiler.is_compiling():
            raise DistplbError(
                f"{self._layer} is being compiled, and a compiled forward cannot wait for the counts of a step; leave "
                "'model' out of compile.components, or pass replica_slots=0"
            )
        step = self._flight.step = self._balancer.dispatch(self._layer, topk_expert_ids_TK)
        self._flight.device = x_TD.device
        slots, send = topk_expert_ids_TK, step.send
        if step.is_trivial:
            send = send[:, : num_local_tokens_per_expert_E.numel() // len(send)]
        else:
            slots = step.slot_of_token
        return super().dispatch(x_TD, topk_scores_TK, slots, send.flatten())

    def _token_count_exchange(self, num_local_tokens_per_expert_E: Tensor, pg: Any, ep_size: int) -> Tensor:
        """`[M, G + R]`, or `[M, G]` without replicas: what arrives here. Known, so nothing is exchanged."""
        step = self._flight.step
        assert step is not None
        return step.receive[:, : num_local_tokens_per_expert_E.numel() // ep_size]

    def _sync_token_count_exchange(
        self,
        num_local_tokens_per_expert_E: Tensor,
        num_global_tokens_per_local_expert_EP_e: Tensor,
        ep_size: int,
    ) -> tuple[Tensor, list[int], list[int]]:
        """What arrives, on the device, and the sizes of both sides, which the host has."""
        receive = num_global_tokens_per_local_expert_EP_e
        sizes = num_local_tokens_per_expert_E.view(ep_size, -1).sum(1).tolist(), receive.sum(1).tolist()
        return receive.flatten().to(self._flight.device, non_blocking=True), *sizes


class _LendingExperts:
    """The forward of a layer's experts, with replica rows where the step has some.

    Args:
        experts: the module.
        plain: the forward that it replaces.
        had_forward: whether that is an attribute of the module, not of its class.
        balancer: lends.
        flight: has the step.
    """

    def __init__(
        self, experts: nn.Module, plain: Any, had_forward: bool, balancer: StepBalancer, flight: _Flight
    ) -> None:
        self.plain, self.had_forward = plain, had_forward
        self._experts, self._balancer, self._flight = experts, balancer, flight
        self._names = [key for key, _ in experts.named_parameters(recurse=False)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What a copy of the module would have as its forward without distplb."""
        return copy.deepcopy(self.plain, memo)

    def __call__(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """The rows `[X, D]` of each slot in turn, of which the second argument has `[G + R]` or `[G]`."""
        step, self._flight.step = self._flight.step, None
        assert step is not None, "the dispatcher comes first"
        if step.is_trivial and step.sample is None:
            computed: Tensor = self.plain(x_RD, num_tokens_per_expert_E)
            return computed
        weights = [_local(getattr(self._experts, key)) for key in self._names]

        def compute(rows: Tensor, own: Any, replicas: Any) -> Tensor:
            if step.is_trivial:
                trivial: Tensor = self.plain(rows, num_tokens_per_expert_E)
                return trivial
            num_own = len(own[0])
            at_home = int(step.receive[:, :num_own].sum())
            parts = rows.split([at_home, len(rows) - at_home])
            tokens = num_tokens_per_expert_E.split([num_own, len(num_tokens_per_expert_E) - num_own])
            return torch.cat(
                [
                    with_rows(self._experts, **dict(zip(self._names, tensors, strict=True))).forward(part, counts)
                    for tensors, part, counts in zip((own, replicas), parts, tokens, strict=True)
                ]
            )

        return self._balancer.compute(step, compute, x_RD, *weights)


def _local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, in the graph."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found
