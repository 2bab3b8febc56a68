"""How many tokens a router sends by chance, because the K-th and the next score are equal.

Shapes: N tokens, E experts, K experts of each token.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["RouterTies"]


class RouterTies:
    """Counts tokens whose K-th and (K + 1)-th scores tie: after a permutation they may be routed to the other expert.

    Checks one forward after each `take`, so that it costs one top-k per rebalance. Only `take` waits for the device.

    >>> import torch
    >>> ties = RouterTies(top_k=1)
    >>> ties.add(torch.tensor([[0.5, 0.5, 0.1], [0.6, 0.2, 0.2]]))
    >>> ties.take()
    0.5

    Args:
        top_k: K, the experts of each token.
    """

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._counts: tuple[Tensor, int] | None = None  # tokens that tied, and all tokens

    @property
    def is_due(self) -> bool:
        """Whether the next forward will be checked; if not, its scores need not be computed."""
        return self._counts is None

    def add(self, scores: Tensor) -> None:
        """Take the scores `[..., E]` by which a forward chose experts, in the precision of that choice."""
        if self._counts is not None or scores.shape[-1] <= self._top_k:
            return
        edge = scores.detach().topk(self._top_k + 1, dim=-1).values[..., -2:]  # [..., 2]
        # Experts that were masked out tie with each other, but no token is routed to them.
        tied = (edge[..., 0] == edge[..., 1]) & edge[..., 0].isfinite()
        self._counts = tied.sum(), tied.numel()

    def take(self) -> float | None:
        """The share of tokens that tied, None if no forward was checked; the next forward will be checked again."""
        counts, self._counts = self._counts, None
        return None if counts is None or not counts[1] else int(counts[0]) / counts[1]
