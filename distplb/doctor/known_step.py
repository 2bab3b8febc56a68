"""A training step of a few MoE layers whose outputs and gradients every rank can compute exactly, without replicas.

Rows, weights and the gradients of outputs are -1, 0 or 1, hashed from their places, so that each rank knows those of
all others and nothing has to be sent. What enters a product is a whole number of at most 256, and what leaves it is
one of at most 2^24, if no expert has more than 2^16 tokens. float32 holds them exactly, whatever the order of sums, and
so do products that round their inputs to TF32 or bfloat16. A result that differs from the answer in one bit is wrong.

In each node one GPU has three experts with six times the tokens of others, in the first node eight times. It is the
node's first GPU in layers 0 and 2, and its last one in layer 1. So replicas travel both ways, and those of layer 0 have
been overwritten when the backward needs them again. The last rank has no tokens if there are more than two.

Shapes: N tokens of a rank, K experts of each token, D dim, H hidden, P slots, M GPUs, G slots of each GPU, X rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distplb.core.hashing import hashed
from distplb.core.topology import Topology

__all__ = ["CHOICES", "DIM", "HIDDEN", "LAYERS", "SLOTS_PER_GPU", "TOKENS", "Answer", "KnownStep", "expert", "reach"]

LAYERS, SLOTS_PER_GPU = 3, 4  # the last G
DIM, HIDDEN = 256, 512  # D, H
TOKENS, CHOICES = 128, 2  # N, K
_HOT_EXPERTS, _HOT, _HOTTER = 3, 6, 8  # of the GPU; how much likelier than others, and in the first node
_ROW, _GRADIENT, _IN, _OUT, _CHOICE = range(5)  # what is hashed


@dataclass(frozen=True, eq=False)
class Answer:
    """What a layer has to compute on one rank.

    Args:
        outputs: `[N, D]`.
        rows: `[N, D]`, the gradients of the rows that go into the layer.
        w_in: `[G, D, H]`, the gradients of the rank's own experts.
        w_out: `[G, H, D]`, the same.
    """

    outputs: Tensor
    rows: Tensor
    w_in: Tensor
    w_out: Tensor


@dataclass(frozen=True)
class KnownStep:
    """One rank's part of the step.

    >>> step = KnownStep(Topology(1, 2), rank=0, device=torch.device("cpu"))
    >>> step.slot_of_token(layer=0).flatten().bincount(minlength=8).tolist()  # GPU 0 has the hot ones
    [64, 73, 72, 6, 13, 10, 11, 7]

    Args:
        topology: of the group.
        rank: in the group.
        device: of all tensors, which are float32, except slots, which are int64.
    """

    topology: Topology
    rank: int
    device: torch.device

    @property
    def num_slots(self) -> int:
        """P."""
        return SLOTS_PER_GPU * self.topology.num_gpus

    @property
    def num_tokens(self) -> int:
        """N, which is 0 on the last rank if there are more than two."""
        return TOKENS if self.rank < self._num_senders else 0

    @property
    def own_slots(self) -> range:
        """G numbers, the slots of the rank's own experts."""
        return range(self.rank * SLOTS_PER_GPU, (self.rank + 1) * SLOTS_PER_GPU)

    def slot_of_token(self, layer: int) -> Tensor:
        """`[N, K]` int64, the slots of each token's experts, which differ."""
        mine = slice(self.rank * TOKENS, self.rank * TOKENS + self.num_tokens)
        return self._slot_of_any_token(layer)[mine].to(self.device)

    def rows(self, layer: int) -> Tensor:
        """`[N, D]`, what goes into the layer."""
        return self._of_tokens(_ROW, layer, self._tokens())

    def gradient(self, layer: int) -> Tensor:
        """`[N, D]`, the gradients of the layer's outputs, with which the backward begins."""
        return self._of_tokens(_GRADIENT, layer, self._tokens())

    def own_weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """`[G, D, H]` and `[G, H, D]`, of the rank's own experts."""
        pairs = [self._weights(layer, slot) for slot in self.own_slots]
        return torch.stack([w_in for w_in, _ in pairs]), torch.stack([w_out for _, w_out in pairs])

    def answer(self, layer: int) -> Answer:
        """Compute what the layer has to compute, expert by expert, from what all ranks put into it."""
        slots, rows, gradients = self.slot_of_token(layer), self.rows(layer), self.gradient(layer)
        outputs, of_rows = torch.zeros_like(rows), torch.zeros_like(rows)
        for slot in slots.unique().tolist():
            token = (slots == slot).any(1).nonzero().flatten()
            computed, of_row, _, _ = _passed(rows[token], *self._weights(layer, slot), gradients[token])
            outputs[token] += computed
            of_rows[token] += of_row
        everywhere, of_weights = self._slot_of_any_token(layer), []
        for slot in self.own_slots:
            token = (everywhere == slot).any(1).nonzero().flatten()
            sent, returned = (self._of_tokens(what, layer, token) for what in (_ROW, _GRADIENT))
            of_weights.append(_passed(sent, *self._weights(layer, slot), returned)[2:])
        w_in, w_out = (torch.stack(of_slots) for of_slots in zip(*of_weights, strict=True))
        return Answer(outputs, of_rows, w_in, w_out)

    @property
    def _num_senders(self) -> int:
        return self.topology.num_gpus - (self.topology.num_gpus > 2)

    def _tokens(self) -> Tensor:
        """`[N]`, the numbers of this rank's tokens among those of all ranks."""
        first = self.rank * TOKENS
        return torch.arange(first, first + self.num_tokens, device="cpu")

    def _slot_of_any_token(self, layer: int) -> Tensor:
        """`[M * N, K]` on the host, for the tokens of all ranks."""
        slots = torch.arange(self.num_slots, device="cpu").repeat_interleave(self._popularity(layer))
        token = torch.arange(self._num_senders * TOKENS, device="cpu")[:, None]
        # No expert has half of the list, so those of a token, which lie a K-th of it apart, differ.
        apart = torch.arange(CHOICES, device="cpu") * (len(slots) // CHOICES)
        return slots[(_hash(_CHOICE, layer, token) + apart) % len(slots)]

    def _popularity(self, layer: int) -> Tensor:
        """`[P]` int64: how likely each slot is chosen, as a multiple of the least likely."""
        near = reach(self.topology)
        popularity = torch.ones(self.topology.num_gpus // near, near, SLOTS_PER_GPU, dtype=torch.int64, device="cpu")
        hot_gpu = 0 if layer % 2 == 0 else near - 1
        popularity[:, hot_gpu, :_HOT_EXPERTS] = _HOT
        popularity[0, hot_gpu, :_HOT_EXPERTS] = _HOTTER
        return popularity.flatten()

    def _of_tokens(self, what: int, layer: int, token: Tensor) -> Tensor:
        """`[X, D]`, rows or gradients of tokens of any ranks."""
        return self._values(_hash(what, layer, token), DIM)

    def _weights(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """`[D, H]` and `[H, D]`, of any expert."""
        w_in, w_out = (
            self._values(_hash(what, layer, torch.tensor(slot, device="cpu")), DIM * HIDDEN) for what in (_IN, _OUT)
        )
        return w_in.view(DIM, HIDDEN), w_out.view(HIDDEN, DIM)

    def _values(self, key: Tensor, number: int) -> Tensor:
        """`[..., number]` of -1, 0 or 1, for each of the keys `[...]`."""
        column = torch.arange(number, device=self.device)
        return (hashed(key.to(self.device)[..., None], column) % 3 - 1).float()


def reach(topology: Topology) -> int:
    """How many consecutive GPUs lend each other replicas in the step: those of a node, or all if nodes have one GPU."""
    return topology.gpus_per_node if topology.gpus_per_node > 1 else topology.num_gpus


def expert(rows: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """One expert: `[X, D]`, `[D, H]`, `[H, D]` -> `[X, D]`."""
    return torch.relu(rows @ w_in) @ w_out


def _hash(what: int, layer: int, place: Tensor) -> Tensor:
    return hashed(torch.zeros_like(place), what, layer, place)


def _passed(rows: Tensor, w_in: Tensor, w_out: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An expert's outputs, and the gradients of rows and weights."""
    leaves = [one.requires_grad_() for one in (rows, w_in, w_out)]
    outputs = expert(*leaves)
    of_rows, of_in, of_out = torch.autograd.grad(outputs, leaves, gradient)
    return outputs.detach(), of_rows, of_in, of_out
