"""One MoE layer on the ranks of a group, with replicas, and the same in one process.

Shapes: N tokens of a rank, K experts of each token, D dim, H ffn, P slots, M ranks, G own and R replica slots, X rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distplb.replicas.step_balancer import Dispatch, StepBalancer

__all__ = ["Step", "draw_step", "expert", "moe", "moe_after", "oracle", "order_by_slot", "received", "run_slots"]

Group = dist.ProcessGroup | None


@dataclass
class Step:
    """What one rank puts into a layer."""

    x: Tensor  # [N, D]
    ids: Tensor  # [N, K]
    gate: Tensor  # [N, K]


def draw_step(seed: int, rank: int, *, experts: int, hot: float, most_tokens: int, dim: int, dtype: Any) -> Step:
    """Tokens of a rank from (seed, rank) alone; `hot` is how much likelier the step's hot expert is than the others."""
    shared = torch.Generator().manual_seed(seed)
    popularity = torch.rand(experts, generator=shared) + 0.05
    popularity[int(torch.randint(experts, (), generator=shared))] *= hot
    own = torch.Generator().manual_seed(1000 * seed + rank + 1)
    tokens = int(torch.randint(most_tokens + 1, (), generator=own))
    k = min(2, experts)
    ids = (popularity.expand(tokens, -1) * torch.rand(tokens, experts, generator=own)).topk(k, 1).indices
    x = torch.randn(tokens, dim, generator=own, dtype=torch.float64).to(dtype)
    return Step(x, ids, torch.rand(tokens, k, generator=own, dtype=torch.float64).to(dtype))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = (receive, send), group
        found = rows.new_empty(sum(receive), *rows.shape[1:])
        dist.all_to_all_single(found, rows.contiguous(), receive, send, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _AllToAll.apply(gradient, *ctx.sizes, ctx.group), None, None, None


def moe(balancer: StepBalancer, layer: str, step: Step, weights: Sequence[Tensor], group: Group = None) -> Tensor:
    """`[N, D]`: dispatch to physical slots, compute, combine; any number of weights, as `expert` takes them."""
    found = balancer.dispatch(layer, step.ids)
    return moe_after(balancer, found, step, weights, group)


def moe_after(balancer: StepBalancer, found: Dispatch, step: Step, weights: Any, group: Group = None) -> Tensor:
    """The same for a step that is dispatched."""
    exchange, order = found.exchange, found.slot_of_token.flatten().argsort(stable=True)
    rows = balancer.compute(
        found,
        lambda rows, own, away: run_slots(rows, own, away, exchange.tokens_of_slot),
        received(found, step.x.repeat_interleave(step.ids.shape[1], 0), group),
        *weights,
    )
    rows = rows[order_by_slot(found.receive).argsort()]
    rows = _AllToAll.apply(rows, exchange.receive_sizes, exchange.send_sizes, group)
    back = torch.empty_like(rows).index_copy(0, order, rows).view(*step.ids.shape, rows.shape[1])
    return (back * step.gate.unsqueeze(-1)).sum(1)


def received(found: Dispatch, rows: Tensor, group: Group = None) -> Tensor:
    """`[X, D]` in the order of slots, from the rows `[N * K, D]` that this rank sends to `slot_of_token`."""
    rows = rows[found.slot_of_token.flatten().argsort(stable=True)]
    rows = _AllToAll.apply(rows, found.exchange.send_sizes, found.exchange.receive_sizes, group)
    return rows[order_by_slot(found.receive)]


def order_by_slot(receive: Tensor) -> Tensor:
    """`[X]`: rows that arrived by (source, slot), in the order of (slot, source)."""
    slots = torch.arange(receive.shape[1]).repeat(len(receive)).repeat_interleave(receive.flatten())
    return slots.argsort(stable=True)


def run_slots(rows: Tensor, own: Sequence[Tensor], replicas: Sequence[Tensor], tokens: list[int]) -> Tensor:
    """Each slot's expert on its rows: own slots, then replicas; a step without replicas has tokens for none."""
    per_slot = zip(*(_unbound(a, b) for a, b in zip(own, replicas, strict=True)), strict=True)
    parts = rows.split(tokens)
    return torch.cat([expert(part, *weights) for part, weights in zip(parts, per_slot, strict=False)])


def _unbound(own: Tensor, replicas: Tensor) -> list[Tensor]:
    return [*own.unbind(), *replicas.unbind()]


def expert(rows: Tensor, w_in: Tensor, *more: Tensor) -> Tensor:
    """[X, D], [D, H] and, if there are more, [H, D], and a bias [D] -> [X, D]; weights of any dtype."""
    found = torch.nn.functional.gelu(rows @ w_in.to(rows.dtype))
    for number, weight in enumerate(more):
        found = found + weight.to(rows.dtype) if number else found @ weight.to(rows.dtype)
    return found


def oracle(step: Step, *weights: Tensor) -> Tensor:
    """`[N, D]`: the same in one process, from all weights `[P, D, H]` and so on."""
    k = step.ids.shape[1]
    rows, ids = step.x.repeat_interleave(k, 0), step.ids.flatten()
    found = rows.new_zeros(rows.shape)
    for one in range(len(weights[0])):
        at = (ids == one).nonzero().flatten()
        found = found.index_add(0, at, expert(rows[at], *(weight[one] for weight in weights)))
    return (found.view(*step.ids.shape, rows.shape[1]) * step.gate.unsqueeze(-1)).sum(1)
