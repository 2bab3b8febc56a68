"""One layer of the known step on the ranks: dispatch, experts on own and replica rows, combine, all differentiable.

Shapes: N tokens of this rank, K experts of each token, D dim, G own and R replica slots of each GPU, X rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distplb.comm.base import Message
from distplb.comm.steps import StepComm
from distplb.doctor.known_step import expert
from distplb.replicas.step_balancer import Dispatch, StepBalancer

__all__ = ["through_layer"]


def through_layer(
    balancer: StepBalancer, network: StepComm, name: str, slots: Tensor, rows: Tensor, weights: Sequence[Tensor]
) -> tuple[Tensor, Dispatch]:
    """Send rows to their experts and add up what comes back: `[N, D]`, and where the tokens went. Collective.

    Args:
        balancer: lends the replicas.
        network: carries rows, as a framework's dispatcher would.
        name: the layer's.
        slots: `[N, K]`, of each token's experts.
        rows: `[N, D]`.
        weights: `[G, ...]` each, of this GPU's experts.
    """
    step = balancer.dispatch(name, slots)
    order = step.slot_of_token.flatten().argsort(stable=True)  # by GPU, then physical slot
    send, receive = step.exchange.send_sizes, step.exchange.receive_sizes
    leaving = rows.repeat_interleave(slots.shape[1], dim=0)[order]
    arrived = _AllToAll.apply(leaving, send, receive, network)  # type: ignore[no-untyped-call]  # in torch's stubs
    computed = balancer.compute(step, partial(_experts, step), arrived, *weights)
    back = _AllToAll.apply(computed, receive, send, network)  # type: ignore[no-untyped-call]
    by_token = torch.empty_like(back).index_copy(0, order, back).view(*slots.shape, rows.shape[1])
    return by_token.sum(1), step


def _experts(step: Dispatch, rows: Tensor, own: Sequence[Tensor], replicas: Sequence[Tensor]) -> Tensor:
    """`[X, D]`, from rows by source and slot; each physical slot computes its rows in one product."""
    sources, slots = step.receive.shape
    slot_of_row = torch.arange(slots, device="cpu").repeat(sources).repeat_interleave(step.receive.flatten())
    order = slot_of_row.argsort(stable=True).to(rows.device)
    parts = rows[order].split(step.exchange.tokens_of_slot)
    weights = zip(*([*a.unbind(), *b.unbind()] for a, b in zip(own, replicas, strict=True)), strict=True)
    # A step without replicas has no rows for replica slots, and no weights of them.
    computed = torch.cat([expert(part, w_in, w_out) for part, (w_in, w_out) in zip(parts, weights, strict=False)])
    return torch.empty_like(computed).index_copy(0, order, computed)


class _AllToAll(torch.autograd.Function):
    """Rows to all GPUs; in the backward, their gradients the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], network: StepComm) -> Tensor:
        ctx.send, ctx.receive, ctx.network = send, receive, network
        return _exchanged(rows, send, receive, network)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(gradient, ctx.receive, ctx.send, ctx.network), None, None, None


def _exchanged(rows: Tensor, send: list[int], receive: list[int], network: StepComm) -> Tensor:
    """The rows that arrive, by source, from rows by destination.

    Args:
        rows: `[X, D]`.
        send: M numbers, the rows for each GPU.
        receive: M numbers, the rows from each GPU.
        network: of the M GPUs.
    """
    arrived = rows.new_empty(sum(receive), rows.shape[1])
    leaving, arriving = rows.contiguous().split(send), arrived.split(receive)
    arriving[network.rank].copy_(leaving[network.rank])
    transfer = network.start(_messages(leaving, network.rank), _messages(arriving, network.rank))
    transfer.wait()
    return arrived


def _messages(parts: Sequence[Tensor], own: int) -> list[Message]:
    return [(part, peer) for peer, part in enumerate(parts) if peer != own and len(part)]
