"""A small mixture-of-experts language model whose experts are spread over the ranks of a process group.

>>> config = Config(layers=2, experts=8, dim=32, ffn=64, heads=2)
>>> model = Transformer(config, group=None, seed=0)              # one rank holds all experts: no process group
>>> loss = model(torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long))

Attention, norms, embeddings and routers are replicated (data-parallel); experts are not (expert-parallel): each
rank holds G = E / M of them, and tokens travel to their experts and back by `all_to_all_single`. The model is the
same for any number of ranks: weights depend on the seed and on the expert, not on the rank that holds it. With a
`StepBalancer`, ranks also hold replicas of hot experts for one step, and the model is still the same.

Shapes: B batch, S sequence, N = B * S tokens of this rank, X rows received by this rank, K top-k, L layers,
E experts, M GPUs (ranks), G slots per GPU, R replica slots per GPU (0 without a balancer), D dim, H ffn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from distplb.replicas.step_balancer import StepBalancer

VOCAB = 256  # bytes
ROWS = 128  # rows that an expert computes at a time
Group = dist.ProcessGroup | None  # None is a world of one rank


@dataclass(frozen=True)
class Config:
    """Sizes of the model, and how its routers choose experts."""

    layers: int = 4
    experts: int = 16
    top_k: int = 2
    dim: int = 128
    ffn: int = 512
    heads: int = 4
    max_sequence: int = 256
    bias_rate: float = 0.0  # loss-free balancing: how far nudge_biases moves a bias
    forced: bool = False  # route perfectly evenly, whatever the routers' scores
    recompute: bool = False  # each block's forward again in the backward, to hold less in between


class AllToAll(torch.autograd.Function):
    """Sends rows to other ranks; its backward sends the gradients back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.splits, ctx.group = (send, receive), group
        return exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.splits
        return exchange(gradient, receive, send, ctx.group), None, None, None


def all_to_all(rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """`exchange`, differentiable."""
    result: Tensor = AllToAll.apply(rows, send, receive, group)  # type: ignore[no-untyped-call]  # in torch's stubs
    return result


def exchange(rows: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Send the first send[0] rows to rank 0, the next send[1] to rank 1, ...; receive[m] rows arrive from rank m."""
    if group is None:
        return rows
    received = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
    return received


def expert(rows: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Compute one expert on its rows, ROWS at a time: [X, D], [D, H], [H, D] -> [X, D].

    All hidden rows of a hot expert at once would not fit the cache, and each of its tokens would cost more.
    """
    return torch.cat([F.gelu(part @ w_in) @ w_out for part in rows.split(ROWS)])


class MoE(nn.Module):
    """A feed-forward layer of E experts, which sends every token to K of them.

    A rebalancer moves rows (dim 0) of w_in and w_out between ranks. Either it permutes the rows of the router and of
    its bias in the same way on all ranks, so that expert i of the router stays on rank i // G and the table does not
    change; or it leaves the router alone and writes each expert's new slot into the table.

    A balancer decides in every step which rank computes which tokens, and lends ranks replicas of hot experts. `name`
    is what it calls this layer.
    """

    expert_bias: Tensor
    slot_of_expert: Tensor

    def __init__(self, config: Config, group: Group, balancer: StepBalancer | None = None, name: str = "moe") -> None:
        super().__init__()
        self.config, self.group, self.balancer, self.name = config, group, balancer, name
        self.num_gpus = 1 if group is None else dist.get_world_size(group)
        if config.experts % self.num_gpus:
            raise ValueError(f"{config.experts} experts cannot be divided evenly over {self.num_gpus} ranks")
        self.num_slots = config.experts // self.num_gpus
        self.router = nn.Linear(config.dim, config.experts, bias=False)
        self.register_buffer("expert_bias", torch.zeros(config.experts, dtype=torch.float32))  # [E]
        self.register_buffer("slot_of_expert", torch.arange(config.experts), persistent=False)  # [E]
        self.w_in = nn.Parameter(torch.empty(self.num_slots, config.dim, config.ffn))  # [G, D, H]
        self.w_out = nn.Parameter(torch.empty(self.num_slots, config.ffn, config.dim))  # [G, H, D]
        self.counts = torch.zeros(config.experts, dtype=torch.int64)  # [E] this rank's tokens in the last forward
        self.on_counts: Callable[[Tensor], None] | None = None
        self.choose: Callable[[Tensor], Tensor] | None = None  # replaces the choice: scores [N, E] -> [N, K]
        # Seconds add up until somebody sets them to 0; tokens and replicas are those of the last forward.
        self.forward_seconds, self.backward_seconds, self.tokens_received, self.num_replicas = 0.0, 0.0, 0, 0

    def forward(self, x: Tensor) -> Tensor:  # [B, S, D] -> [B, S, D]
        K = self.config.top_k
        tokens = x.flatten(0, 1)  # [N, D]
        expert, gate = self.route(tokens)  # [N, K], [N, K]
        self.counts = expert.flatten().bincount(minlength=self.config.experts)  # [E]
        if self.on_counts is not None:
            self.on_counts(self.counts)

        slot = self.slot_of_expert[expert]  # [N, K]
        if self.balancer is None:
            sent, received = self.count(slot)  # [M, G], [M, G]
        else:  # physical slots: each rank has its G own ones, then R for replicas
            step = self.balancer.dispatch(self.name, slot)
            slot, sent, received = step.slot_of_token, step.send, step.receive  # [N, K], [M, G + R], [M, G + R]
            self.num_replicas = 0 if step.split is None else step.split.num_replicas
        # Sorting by slot also sorts by rank, because the slots of a rank are consecutive.
        order = slot.flatten().argsort(stable=True)
        rows = tokens.repeat_interleave(K, dim=0).index_select(0, order)  # [N * K, D]
        send, receive = sent.sum(1).tolist(), received.sum(1).tolist()

        rows = all_to_all(rows, send, receive, self.group)  # [X, D]
        if self.balancer is None:
            rows = self.run_experts(rows, received)  # [X, D]
        else:
            run = partial(self.run_slots, received)
            rows = self.balancer.compute(step, run, rows, self.w_in, self.w_out)  # [X, D]
        rows = all_to_all(rows, receive, send, self.group)  # [N * K, D]

        # Back to the tokens' order, so that sums over K do not depend on where the experts are.
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
        outputs = rows.index_select(0, back).view(-1, K, self.config.dim)  # [N, K, D]
        return (outputs * gate.unsqueeze(-1)).sum(1).view_as(x)

    def count(self, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens that this rank sends to each slot, and receives from each rank for each own slot: [M, G], [M, G]."""
        G, M = self.num_slots, self.num_gpus
        sent = slot.flatten().bincount(minlength=M * G)
        return sent.view(M, G), exchange(sent, [G] * M, [G] * M, self.group).view(M, G)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Choose K experts for each token, and the gates that weight their outputs: [N, D] -> [N, K], [N, K]."""
        scores = self.router(tokens).sigmoid()  # [N, E]
        if self.config.forced:
            turns = torch.arange(tokens.shape[0] * self.config.top_k, device=tokens.device)
            expert = (turns % self.config.experts).view(-1, self.config.top_k)
        elif self.choose is not None:
            expert = self.choose(scores)
        else:  # the bias affects the choice only, not the gates
            expert = (scores.detach() + self.expert_bias).topk(self.config.top_k, dim=1).indices
        gate = scores.gather(1, expert)
        return expert, gate / gate.sum(dim=1, keepdim=True)

    def run_experts(self, rows: Tensor, received: Tensor) -> Tensor:
        """Run this rank's experts on the rows sent to it: [X, D], [M, G] -> [X, D]."""
        return self.run_slots(received, rows, (self.w_in, self.w_out))

    def run_slots(self, received: Tensor, rows: Tensor, *weights: Sequence[Tensor]) -> Tensor:
        """Run the experts of consecutive slots on their rows, and time them.

        Args:
            received: `[M, G + R]`, the rows from each rank for each slot.
            rows: `[X, D]`, by sender, then slot.
            weights: w_in and w_out of own slots, `[G, ...]` each; then those of replica slots, `[R, ...]` each, unless
                no slot of these has rows.
        """
        start = self.clock(rows)
        rows = rows.view_as(rows)  # so that its hook, which takes the time, runs before gradients of replicas travel
        # unbind, not w_in[g]: its backward writes one gradient, where indexing would sum G of full size
        slots = [slot for w_in, w_out in weights for slot in zip(w_in.unbind(), w_out.unbind(), strict=True)]
        received = received[:, : len(slots)]
        pieces = rows.split(received.flatten().tolist())  # by sender, then slot
        outputs = []  # by slot, then sender
        for s, (w_in, w_out) in enumerate(slots):
            outputs.append(expert(torch.cat(pieces[s :: len(slots)]), w_in, w_out).split(received[:, s].tolist()))
        output = torch.cat([of_slot[m] for m in range(len(received)) for of_slot in outputs])
        self.forward_seconds += self.clock(rows) - start
        self.tokens_received = rows.shape[0]
        if output.requires_grad:  # these hooks run just before and just after the experts' backward
            output.register_hook(self.backward_begins)
            rows.register_hook(self.backward_ends)
        return output

    def run_one_expert(self, tokens: int) -> None:
        """Run forward and backward of one expert on this many rows, for its time curve; weights do not change."""
        w_in, w_out = (weight[0].detach().requires_grad_() for weight in (self.w_in, self.w_out))
        rows = w_in.new_ones(tokens, self.config.dim, requires_grad=True)
        expert(rows, w_in, w_out).sum().backward()  # type: ignore[no-untyped-call]  # in torch's stubs

    def backward_begins(self, gradient: Tensor) -> None:
        self.backward_seconds -= self.clock(gradient)

    def backward_ends(self, gradient: Tensor) -> None:
        self.backward_seconds += self.clock(gradient)

    @staticmethod
    def clock(tensor: Tensor) -> float:
        if tensor.is_cuda:  # kernels run asynchronously; measuring them means waiting for them
            torch.cuda.synchronize(tensor.device)
        return time.perf_counter()


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, D] -> [B, S, D]
        B, S, D = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, heads, S, D / heads]
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(B, S, D))
        return mixed


class Block(nn.Module):
    def __init__(self, config: Config, group: Group, balancer: StepBalancer | None, name: str) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.dim)
        self.moe = MoE(config, group, balancer, f"{name}.moe")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.moe(self.moe_norm(x))
        return y


class Transformer(nn.Module):
    """A byte-level decoder; forward returns the mean next-byte loss of this rank's sequences."""

    def __init__(
        self,
        config: Config,
        group: Group,
        seed: int,
        dtype: torch.dtype = torch.float32,
        balancer: StepBalancer | None = None,
    ) -> None:
        super().__init__()
        self.group, self.recompute = group, config.recompute
        self.embedding = nn.Embedding(VOCAB, config.dim)
        self.position = nn.Parameter(torch.empty(config.max_sequence, config.dim))
        self.blocks = nn.ModuleList(Block(config, group, balancer, f"blocks.{i}") for i in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, VOCAB, bias=False)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)  # not self.to(dtype): expert_bias stays in float32
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw all experts from the seed, in float64 whatever the dtype, and keep this rank's own."""
        generator = torch.Generator().manual_seed(seed)
        rank = 0 if self.group is None else dist.get_rank(self.group)
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue  # ones
            std = 0.02
            if name.endswith(("attention.out.weight", "w_out")):
                std /= math.sqrt(2 * len(self.blocks))  # keeps the residual stream's scale at any depth
            rows = parameter.shape[0]
            is_expert = name.endswith(("w_in", "w_out"))
            first, total = (rank * rows, self.moes[0].config.experts) if is_expert else (0, rows)
            drawn = torch.randn(total, *parameter.shape[1:], generator=generator, dtype=torch.float64)
            parameter.copy_(std * drawn[first : first + rows])

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:  # [B, S], [B, S] -> []
        x = self.embedding(inputs) + self.position[: inputs.shape[1]]  # [B, S, D]
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())

    @property
    def moes(self) -> list[MoE]:
        return [module for module in self.modules() if isinstance(module, MoE)]

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the mean of all ranks' losses."""
        self.accumulate(loss)
        self.reduce_gradients()

    def accumulate(self, loss: Tensor, parts: int = 1) -> None:
        """Add the gradients of this rank's share of that mean, for one of so many micro-batches."""
        (loss / (parts * (1 if self.group is None else dist.get_world_size(self.group)))).backward()

    def reduce_gradients(self) -> None:
        """Sum gradients over ranks.

        An expert's gradient is that sum already, because its rows come from all ranks; all other parameters are
        replicated and take one all-reduce.
        """
        if self.group is None:
            return
        experts = {id(weight) for moe in self.moes for weight in (moe.w_in, moe.w_out)}
        replicated = [p.grad for p in self.parameters() if id(p) not in experts and p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in replicated])  # one call, not dozens of small ones
        dist.all_reduce(flat, group=self.group)
        sums = flat.split([gradient.numel() for gradient in replicated])
        for gradient, total in zip(replicated, sums, strict=True):
            gradient.copy_(total.view_as(gradient))

    @torch.no_grad()
    def nudge_biases(self) -> None:
        """Raise the bias of experts with fewer tokens than the mean, and lower that of the others.

        Source: Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", 2024, algorithm 1.
        """
        counts = torch.stack([moe.counts for moe in self.moes])  # [L, E]
        if self.group is not None:
            dist.all_reduce(counts, group=self.group)
        for moe, count in zip(self.moes, counts.double(), strict=True):
            moe.expert_bias += moe.config.bias_rate * torch.sign(count.mean() - count).float()
