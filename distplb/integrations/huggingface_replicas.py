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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import AllToAllEP, AutoEP

from distplb.core.private_names import is_compiled
from distplb.errors import DistplbError
from distplb.integrations.lending import with_rows
from distplb.replicas.step_balancer import Dispatch, StepBalancer

__all__ = ["exchange_of", "lend"]

# Implementations of the experts' products whose gradients are tested with replicas.
_TESTED = ("eager", "batched_mm", "grouped_mm")


def exchange_of(name: str, experts: nn.Module, around: list[nn.Module]) -> AllToAllEP:
    """The object that sends a layer's tokens to their experts.

    Args:
        name: the layer's name.
        experts: the module of experts.
        around: the modules that contain it.

    Raises:
        DistplbError: if tokens are not sent to their experts, the experts' products are computed in a way that was not
            tried, or the layer is compiled.
    """
    variables = inspect.getclosurevars(experts.forward).nonlocals if inspect.isfunction(experts.forward) else {}
    found: Any = variables.get("implementation")
    exchange = found.all_to_all if type(found) is AutoEP else found
    if type(exchange) is not AllToAllEP:
        how = "in one process" if found is None else f"by {type(found).__name__}"
        raise DistplbError(
            f"{name}: its tokens reach the experts {how}, and replicas need tokens that are sent to their experts; use "
            "ep_implementation='auto' or 'all_to_all', or pass replica_slots=0"
        )
    products = getattr(getattr(experts, "config", None), "_experts_implementation", None) or "eager"
    if products not in _TESTED:
        raise DistplbError(
            f"{name}: its experts are computed by experts_implementation={products!r}, which was never run with "
            f"replicas; use {', '.join(map(repr, _TESTED[:-1]))} or {_TESTED[-1]!r}, or pass replica_slots=0"
        )
    for module in (*around, experts):
        if is_compiled(module):
            raise DistplbError(
                f"{name} is compiled (its {type(module).__qualname__}), and a compiled forward cannot wait for the "
                "counts of a step; compile other parts of the model, or pass replica_slots=0"
            )
    return exchange


def lend(name: str, experts: Any, exchange: AllToAllEP, balancer: StepBalancer | None) -> None:
    """Let a layer take part in a balancer's steps from now on; None ends that.

    Args:
        name: the layer's name.
        experts: the module of experts.
        exchange: its `exchange_of`.
        balancer: whose steps; it replaces an earlier one.
    """
    earlier = vars(exchange).get("_dispatch_tokens")
    if isinstance(earlier, _Dispatching):
        earlier.remove()
    if balancer is not None:
        _Dispatching(name, experts, exchange, balancer)


class _State(NamedTuple):
    """What the combine of transformers reads."""

    top_k_weights: Tensor
    order: Tensor
    send_sizes: list[int]
    recv_sizes: list[int]
    num_tokens: int


class _Dispatching:
    """Replaces an exchange's `_dispatch_tokens`, and its `experts_forward` by `compute`.

    Args:
        layer: the layer's name.
        experts: the module of experts.
        exchange: the object whose methods are replaced.
        balancer: counts, splits and lends.
    """

    def __init__(self, layer: str, experts: Any, exchange: Any, balancer: StepBalancer) -> None:
        self._layer, self._experts, self._exchange, self._balancer = layer, experts, exchange, balancer
        self._flight = _Flight()
        self._plain = exchange.experts_forward
        exchange._dispatch_tokens, exchange.experts_forward = self, self.compute

    def remove(self) -> None:
        """Put the exchange's own methods back."""
        del self._exchange._dispatch_tokens
        self._exchange.experts_forward = self._plain

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        """Send each token to the physical slots of its experts.

        Returns:
            Rows `[X, D]`, their slots on this GPU `[X, 1]`, weights of 1, and what the combine needs.
        """
        if torch.compiler.is_compiling():
            raise DistplbError(
                f"{self._layer} is being compiled, and a compiled forward cannot wait for the counts of a step; "
                "compile other parts of the model, or pass replica_slots=0"
            )
        num_tokens, tp = hidden_states.size(0), self._exchange.tp_mesh
        if tp.size() > 1:  # the ranks of a batch send different tokens of it
            hidden_states, top_k_index, top_k_weights = (
                DTensor.from_local(one, tp, [Replicate()], run_check=False).redistribute(tp, [Shard(0)]).to_local()
                for one in (hidden_states, top_k_index, top_k_weights)
            )
        step = self._flight.step = self._balancer.dispatch(self._layer, top_k_index)
        slot, sizes = step.slot_of_token.flatten(), step.exchange
        order = slot.argsort(stable=True)
        rows = hidden_states[order // top_k_index.size(-1)]
        group = self._exchange.ep_mesh.get_group()
        rows = all_to_all_single_autograd(rows, sizes.receive_sizes, sizes.send_sizes, group)
        rows = _Waited.apply(rows)  # type: ignore[no-untyped-call]  # in torch's stubs
        receive = step.receive.to(rows.device, non_blocking=True)  # [M, G + R]
        slots = torch.arange(receive.shape[1], device=rows.device).repeat(len(receive))
        slots = slots.repeat_interleave(receive.flatten(), output_size=len(rows)).unsqueeze(-1)
        state = _State(top_k_weights, order, sizes.send_sizes, sizes.receive_sizes, num_tokens)
        return rows, slots, torch.ones_like(slots, dtype=rows.dtype), state

    def compute(self, rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """The experts `[X, D]` of rows in any order; a single row of slot 0 if there are none."""
        step, self._flight.step = self._flight.step, None
        assert step is not None, "the dispatch comes first"
        names = [key for key, _ in self._experts.named_parameters(recurse=False)]
        tensors = [getattr(self._experts, key) for key in names]  # local ones, inside the expert-parallel forward
        num_own = len(tensors[0])
        order = (slots >= num_own).flatten().argsort(stable=True)  # own slots first
        away = sum(step.exchange.tokens_of_slot[num_own:])

        def computed(rows: Tensor, own: Any, replicas: Any) -> Tensor:
            if step.is_trivial:
                found: Tensor = self._plain(rows, slots, weights)
                return found
            back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            at_home, lent = order.split([len(order) - away, away])
            parts = []
            for there, held, first in ((at_home, own, 0), (lent, replicas, num_own)):
                if len(there):
                    seen = with_rows(self._experts, **dict(zip(names, held, strict=True)), num_experts=len(held[0]))
                    parts.append(self._plain.__func__(seen, rows[there], slots[there] - first, weights[there]))
            return torch.cat(parts)[back]

        return self._balancer.compute(step, computed, rows, *tensors)


class _Flight(threading.local):
    """The step that a thread is in, between a layer's dispatch and its experts."""

    step: Dispatch | None = None


class _Waited(torch.autograd.Function):
    """Rows that have arrived: a product may read them without waiting."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        found: Tensor = torch.ops._c10d_functional.wait_tensor(rows)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
