"""The conformance test of all communicators."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distplb.comm.base import Comm
from distplb.migrate.messages import rounds

__all__ = ["conforms", "message"]


def conforms(comm: Comm, pairs: Sequence[tuple[int, int]] | None = None) -> None:
    """Check every method, with results that only the right ranks in the right order give.

    Args:
        comm: the communicator; all its ranks must call this.
        pairs: (source rank, target rank) of the messages that it carries; None for messages between any two ranks.
    """
    ones = torch.arange(4, dtype=torch.int64, device=comm.device) + 10**12 * comm.rank
    comm.all_reduce_sum(ones)
    assert ones.tolist() == [i * comm.size + 10**12 * sum(range(comm.size)) for i in range(4)]
    least = torch.tensor([comm.rank, -comm.rank, 2**62 + comm.rank], device=comm.device)
    comm.all_reduce_min(least)
    assert least.tolist() == [0, 1 - comm.size, 2**62]
    for root in range(comm.size):
        told = torch.full((3,), comm.rank, device=comm.device)
        comm.broadcast(told, root)
        assert told.tolist() == [root] * 3
        text = torch.full((2048,), 200 + comm.rank, dtype=torch.uint8, device=comm.device)
        comm.broadcast(text, root)
        assert text.unique().tolist() == [200 + root]
    # Every rank sends a different number of bytes to every other rank, in rounds of two operations per rank.
    everyone = range(comm.size)
    if pairs is None:
        pairs = [(source, target) for source in everyone for target in everyone if source != target]
    comm.connect(sorted({one + other - comm.rank for one, other in pairs if comm.rank in (one, other)}))
    received, own = {}, []
    for some in rounds(dict.fromkeys(pairs, 1), 2):
        sends = [(message(s, t, comm), t) for s, t in some if s == comm.rank]
        receives = [(torch.zeros_like(message(s, t, comm)), s) for s, t in some if t == comm.rank]
        own.append((sends, receives))
        received |= {source: buffer for buffer, source in receives}
    if pairs:
        comm.exchange(own[:1])
        comm.exchange([one for one in own[1:] if any(one)])  # several rounds at once; each rank passes only its own
    for source, buffer in received.items():
        assert torch.equal(buffer, message(source, comm.rank, comm))
    assert sorted(received) == sorted(source for source, target in pairs if target == comm.rank)


def message(source: int, target: int, comm: Comm) -> torch.Tensor:
    return torch.full((1 + source + 10 * target,), 16 * source + target, dtype=torch.uint8, device=comm.device)
