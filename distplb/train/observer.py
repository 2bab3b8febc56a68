"""Observes a job between two rebalances: the load of its steps, and how long its iterations take.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from distplb.comm.agreement import digest
from distplb.comm.base import Comm
from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.train.stop_loss import Pace
from distplb.train.window import LoadWindow, group_of_steps

__all__ = ["Observer", "steps_digest"]

_MOST_ITERATIONS = 10_000  # keep the seconds of this many: they are not read while rebalancing is off


class Observer:
    """This rank's window and clock. Construction is collective: the ranks exchange which GPU they are.

    If several EP groups hold copies of the same experts, the load of each step is that of one group, and each group is
    chosen equally often: a group waits for the busiest GPU of its own step, not of a sum over groups.

    Args:
        window: the window that the layers' forwards fill.
        comm: the ranks that hold the layers.
        topology: the nodes and GPUs of one EP group.
        gpu: this rank's index in its EP group.
        seed: seed of the choice of groups.

    Attributes:
        peers: `[M]`, the ranks of this rank's EP group, by GPU.
        node_of_rank: the node of each rank within its EP group.
        iterations: iterations that have ended since the last clear.

    Raises:
        DistplbError: on every rank, if the ranks' GPUs do not form whole EP groups.
    """

    def __init__(self, window: LoadWindow, comm: Comm, topology: Topology, gpu: int, seed: int) -> None:
        self._window, self._seed, self.gpu = window, seed, gpu
        self._num_groups = comm.size // topology.num_gpus
        gpus = torch.zeros(comm.size, dtype=torch.int64, device=comm.device)
        gpus[comm.rank] = gpu
        comm.all_reduce_sum(gpus)
        gpu_of_rank = gpus.tolist()
        self.node_of_rank = [gpu // topology.gpus_per_node for gpu in gpu_of_rank]
        # Of the ranks with the same GPU index, the first belongs to group 0, the next to group 1, and so on.
        group = [gpu_of_rank[:rank].count(own) for rank, own in enumerate(gpu_of_rank)]
        self._group = group[comm.rank]
        self.peers = _ranks_of_groups(gpu_of_rank, group, topology.num_gpus)[self._group]
        self.iterations = 0
        self._resumed: float | None = None
        self._seconds: deque[float] = deque(maxlen=_MOST_ITERATIONS)

    # --- the clock -------------------------------------------------------------------------------------------

    def iteration_ends(self) -> None:
        """Record the time since the training loop continued."""
        self.iterations += 1
        if self._resumed is not None:
            self._seconds.append(time.perf_counter() - self._resumed)

    def loop_goes_on(self) -> None:
        """Start the clock: from here on the time belongs to the training loop."""
        self._resumed = time.perf_counter()

    def pace(self) -> Pace:
        """Return the pace of the iterations since the last call, and drop their times."""
        seconds = list(self._seconds)
        self._seconds.clear()
        return Pace.of(seconds) if seconds else Pace(0.0, 0.0, 0)

    def restart_clock(self) -> None:
        """Drop the times so far, and stop the clock until the training loop continues."""
        self._resumed = None
        self._seconds.clear()

    # --- the load --------------------------------------------------------------------------------------------

    def steps(self) -> Tensor:
        """`[T]`: the numbers of the kept steps, counted from the last clear. Waits for the device."""
        return self._window.steps().cpu()

    @property
    def seen(self) -> int:
        """Steps since the last clear, kept or not. Waits for the device."""
        return self._window.seen

    @property
    def tokens(self) -> int:
        """Tokens that this rank routed in the kept steps, per layer that has any. Waits for the device."""
        try:
            counts = self._window.load()
        except DistplbError:
            return 0  # `load` raises it again, where the error reaches all ranks
        return int(counts.sum()) // max(1, int(counts.any(2).any(0).sum()))

    def load(self, placement: Placement | None) -> Tensor:
        """`[T, L, E]`: this rank's load by expert; 0 in steps that belong to other groups. Waits for the device.

        Args:
            placement: the placement in force if the router's outputs are slots; None if they are experts.

        Raises:
            DistplbError: if some layer has counted no step.
        """
        load = self._window.load()  # [T, L, P], by the router's outputs
        if not len(load):
            raise DistplbError(
                "the window has no step that all layers have counted; have each layer's forward call "
                "window.add(index, counts) in training"
            )
        if placement is not None:
            slot = placement.inverse[..., 0].to(load.device)  # [L, E]
            load = load.gather(2, slot.expand(len(load), -1, -1))
        if self._num_groups == 1:
            return load
        mine = group_of_steps(self._window.steps(), self._num_groups, self._seed) == self._group
        return load * mine[:, None, None]

    def iterations_of_steps(self, last: int, seen: int) -> Tensor:
        """`[T]`: the iteration of each kept step, if the window has seen `seen` steps up to iteration `last`."""
        return last + 1 - self.iterations + self.steps() * self.iterations // max(1, seen)

    def follow(self, old: Placement, new: Placement) -> None:
        """Move counts along with experts that have changed slots, because the router's outputs are slots."""
        self._window.rename(old.inverse[..., 0].gather(1, new.expert_of_slot))

    def clear(self) -> None:
        """Begin a new window, and restart the clock."""
        self._window.clear()
        self.iterations = 0
        self.restart_clock()


def steps_digest(steps: Tensor) -> int:
    """Digest of the kept steps: counts of different ranks can only be combined if they belong to the same steps."""
    return digest(steps.tolist())


def _ranks_of_groups(gpu_of_rank: Sequence[int], group: Sequence[int], num_gpus: int) -> list[list[int]]:
    """`[groups][M]`: the ranks of each group, by GPU. Every rank checks all groups, so that all refuse together."""
    gpus = list(range(num_gpus))
    members = [[rank for rank in range(len(group)) if group[rank] == number] for number in range(max(group) + 1)]
    if any(sorted(gpu_of_rank[rank] for rank in ranks) != gpus for ranks in members):
        raise DistplbError(
            f"the ranks are GPUs {list(gpu_of_rank)} of their EP groups, which do not form whole groups of {num_gpus}; "
            "pass gpu=, this rank's index in its EP group"
        )
    return [sorted(ranks, key=lambda rank: gpu_of_rank[rank]) for ranks in members]
