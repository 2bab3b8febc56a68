"""Replicas in transformers 5.23: its all-to-all sends tokens to physical slots, its experts compute with replica rows.

Its expert parallelism gives each module of experts an `AllToAllEP`, alone or inside an `AutoEP`. Two methods of that
object are replaced: the dispatch, whose exchange of counts falls away because the split tells all sizes, and the call
of the experts. The combine is transformers' own.

Shapes: N tokens of this rank, K experts of each token, D model width, M GPUs, G own and R replica slots of each GPU,
X rows that arrive here.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.distributed.expert_parallel import AllToAllEP, AutoEP

from distplb.comm.rows import exchanged_rows, own_slices
from distplb.core.private_names import is_compiled
from distplb.errors import DistplbError
from distplb.integrations.lending import refuse_experts, with_rows
from distplb.replicas.step_balancer import Dispatch, StepBalancer

__all__ = ["implementation_of", "lend", "refuse_what_cannot_lend", "stop_lending"]

# Implementations of the experts' products whose gradients are tested with replicas.
_TESTED = ("eager", "batched_mm", "grouped_mm")
_LENDING = "distplb_lending"  # attribute of an exchange that takes part in steps


def implementation_of(experts: nn.Module) -> Any:
    """How transformers' expert parallelism brings tokens to experts: its `EPImplementation`, or None.

    Args:
        experts: the module of experts, whose forward keeps it in a variable of its own.
    """
    forward = vars(experts).get("forward")
    return inspect.getclosurevars(forward).nonlocals.get("implementation") if inspect.isfunction(forward) else None


def refuse_what_cannot_lend(name: str, experts: nn.Module, around: list[nn.Module]) -> None:
    """Refuse a layer that cannot have replicas.

    Args:
        name: the layer's name.
        experts: the module of experts.
        around: the modules that contain it.

    Raises:
        DistplbError: if tokens are not sent to their experts, the experts compute with more than the parameters of
            their module or in a way that was not tried, or the layer is compiled.
    """
    implementation = implementation_of(experts)
    exchange = _exchange_of(implementation)
    if implementation is None:
        raise DistplbError(
            f"{name}: its experts have a forward that is not the expert-parallel one of transformers, and replicas "
            "would be computed without what it adds; leave the forward as transformers installs it, or pass "
            "replica_slots=0"
        )
    _refuse_products(name, experts)
    if exchange is None:
        raise DistplbError(
            f"{name}: its tokens reach the experts by {type(implementation).__name__}, and replicas need tokens that "
            "are sent to their experts; use ep_implementation='auto' or 'all_to_all', or pass replica_slots=0"
        )
    plain = _plain_forward(exchange)
    if getattr(plain, "__self__", None) is not experts:
        raise DistplbError(
            f"{name}: its expert-parallel forward computes with the experts of another model, because transformers "
            "does not renew it in a copy; build the model again instead of copying it, or pass replica_slots=0"
        )
    of_class: Any = type(experts).forward
    refuse_experts(name, experts, has_own_forward=plain.__func__ is of_class)
    for module in (*around, *experts.modules()):
        if is_compiled(module):
            raise DistplbError(
                f"{name} is compiled (its {type(module).__qualname__}), and a compiled forward cannot wait for the "
                "counts of a step; compile other parts of the model, or pass replica_slots=0"
            )


def _refuse_products(name: str, experts: Any) -> None:
    products = experts.config._experts_implementation or "eager"
    if products not in _TESTED:
        raise DistplbError(
            f"{name}: its experts are computed by experts_implementation={products!r}, which was never run with "
            f"replicas; use {', '.join(map(repr, _TESTED[:-1]))} or {_TESTED[-1]!r}, or pass replica_slots=0"
        )


def _exchange_of(implementation: Any) -> Any:
    """The `AllToAllEP` of an implementation, None if it has none."""
    if type(implementation) is AutoEP:
        return implementation.all_to_all
    return implementation if type(implementation) is AllToAllEP else None


def _plain_forward(exchange: Any) -> Any:
    """The experts' own forward, also of an exchange that takes part in steps."""
    lending: _Lending | None = vars(exchange).get(_LENDING)
    return exchange.experts_forward if lending is None else lending.plain


def lend(name: str, experts: nn.Module, balancer: StepBalancer) -> Callable[[], None]:
    """Let a layer take part in a balancer's steps from now on, instead of those of an earlier one.

    Args:
        name: the layer's name.
        experts: the module of experts, which `refuse_what_cannot_lend` has let pass.
        balancer: whose steps.

    Returns:
        A function that ends it, unless another balancer has taken over.
    """
    stop_lending(experts)
    return _Lending(name, experts, implementation_of(experts), balancer).end


def stop_lending(experts: nn.Module) -> None:
    """Give a layer back its own dispatch and experts, if it takes part in the steps of a balancer."""
    exchange = _exchange_of(implementation_of(experts))
    lending: _Lending | None = None if exchange is None else vars(exchange).get(_LENDING)
    if lending is not None:
        lending.end()


class _State(NamedTuple):
    """What the combine of transformers reads."""

    top_k_weights: Tensor
    order: Tensor
    send_sizes: list[int]
    recv_sizes: list[int]
    num_tokens: int


class _Lending:
    """Replaces an exchange's `_dispatch_tokens`, and its `experts_forward` by `compute`.

    Args:
        layer: the layer's name.
        experts: the module of experts.
        implementation: an `AllToAllEP`, or an `AutoEP` that has one.
        balancer: counts, splits and lends.
    """

    def __init__(self, layer: str, experts: Any, implementation: Any, balancer: StepBalancer) -> None:
        self._layer, self._experts, self._balancer = layer, experts, balancer
        self._implementation, self._exchange = implementation, _exchange_of(implementation)
        self._flight, self._names = _Flight(), self._parameters()
        self.plain = self._exchange.experts_forward
        setattr(self._exchange, _LENDING, self)
        # Neither is traced: a compiled graph would keep what one step has decided.
        self._exchange._dispatch_tokens = torch.compiler.disable(self.dispatch)
        self._exchange.experts_forward = torch.compiler.disable(self.compute)
        self._reduce: Any = getattr(implementation, "all_reduce", None)
        if self._reduce is not None:
            implementation.all_reduce = self._without_gradients

    def end(self) -> None:
        """Give the exchange its own methods back, unless another balancer has replaced them."""
        if vars(self._exchange).get(_LENDING) is self:
            del self._exchange._dispatch_tokens
            delattr(self._exchange, _LENDING)
            self._exchange.experts_forward = self.plain
            if self._reduce is not None:
                self._implementation.all_reduce = self._reduce

    def _without_gradients(self, *arguments: Tensor) -> Any:
        """What `AutoEP` calls without gradients where ranks share a batch: in evaluation, partial outputs are reduced.

        In training this is the first forward of a reentrant checkpoint, whose recomputation sends tokens. So this one
        sends them too, because the recomputation looks for the step that it recomputes.
        """
        implementation = self._exchange if self._experts.training else self._reduce
        return implementation(*arguments)

    def dispatch(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        """Send each token to the physical slots of its experts.

        Returns:
            Rows `[X, D]`, their slots on this GPU `[X, 1]`, weights of 1, and what the combine needs.
        """
        _refuse_products(self._layer, self._experts)
        self._refuse_changed()
        num_tokens, tp = hidden_states.size(0), self._exchange.tp_mesh
        if tp.size() > 1:  # the ranks of a batch send different tokens of it
            hidden_states, top_k_index, top_k_weights = own_slices(tp, hidden_states, top_k_index, top_k_weights)
        step = self._flight.step = self._balancer.dispatch(self._layer, top_k_index)
        slot, sizes = step.slot_of_token.flatten(), step.exchange
        # Without replicas rows are in the order of transformers' own sort, so that sums are the same to the bit.
        order = slot.argsort(stable=not step.is_trivial)
        rows = hidden_states[order // top_k_index.size(-1)]
        rows = exchanged_rows(rows, sizes.receive_sizes, sizes.send_sizes, self._exchange.ep_mesh.get_group())
        receive = step.receive.to(rows.device, non_blocking=True)  # [M, G + R]
        slots = torch.arange(receive.shape[1], device=rows.device).repeat(len(receive))
        slots = slots.repeat_interleave(receive.flatten(), output_size=len(rows)).unsqueeze(-1)
        state = _State(top_k_weights, order, sizes.send_sizes, sizes.receive_sizes, num_tokens)
        return rows, slots, torch.ones_like(slots, dtype=rows.dtype), state

    def _parameters(self) -> list[str]:
        return [key for key, _ in self._experts.named_parameters()]

    def _refuse_changed(self) -> None:
        """Refuse experts that compute with more than what is lent, such as an adapter that was attached to them later.

        Raises:
            DistplbError: on all ranks that changed them.
        """
        now = self._parameters()
        if now != self._names:
            raise DistplbError(
                f"{self._layer}: its experts have the parameters {', '.join(now)}, but had {', '.join(self._names)} "
                "when replicas were set up, and replicas would be computed without what was added; attach adapters "
                "elsewhere, such as to the attention or beside the block"
            )

    def compute(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """The experts `[X, D]` of rows in any order; a single row of slot 0 if there are none."""
        step, self._flight.step = self._flight.step, None
        assert step is not None, "the dispatch comes first"
        if step.is_trivial and step.sample is None:
            whole: Tensor = self.plain(rows, slots, weights)
            return whole
        names = self._names
        tensors = [getattr(self._experts, key) for key in names]  # local ones, inside the expert-parallel forward
        num_own = len(tensors[0])

        def computed(rows: Tensor, own: Any, replicas: Any) -> Tensor:
            if step.is_trivial:
                at_home_all: Tensor = self.plain(rows, slots, weights)
                return at_home_all
            order = (slots >= num_own).flatten().argsort(stable=True)  # own slots first
            away = sum(step.exchange.tokens_of_slot[num_own:])
            back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            at_home, lent = order.split([len(order) - away, away])
            parts = []
            for there, held, first in ((at_home, own, 0), (lent, replicas, num_own)):
                if len(there):
                    seen = with_rows(self._experts, **dict(zip(names, held, strict=True)), num_experts=len(held[0]))
                    parts.append(self.plain.__func__(seen, rows[there], slots[there] - first, weights[there]))
            return torch.cat(parts)[back]

        return self._balancer.compute(step, computed, rows, *tensors)


class _Flight(threading.local):
    """The step that a thread is in, between a layer's dispatch and its experts."""

    step: Dispatch | None = None
