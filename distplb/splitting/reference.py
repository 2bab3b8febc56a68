"""The engine `reference`: replicas for one level, and the lowest level that they reach, in plain Python.

The level is the number of tokens that no GPU may exceed. A GPU above it has a surplus, one below it has room.

(0) The level: the greatest of ceil(mean), (1 + tolerance) × mean, and ceil(mean) of the busiest node.
(1) GPUs hand out their surplus in turn, the smallest surplus first: a small surplus fits into many rooms, and a large
    one can fill whatever is left.
(2) The expert is the one with the most tokens at home; it hands out the surplus, or all its tokens if they are fewer.
(3) One replica, on the GPU with the smallest sufficient room, if that leaves little of the room over.
(4) Else two replicas, on the pair of GPUs with the smallest sufficient rooms, if they leave little over: both rooms
    are used up, where a single large room would leave a rest that takes another replica to fill.
(5) Else one replica: on the GPU of (3), or on the GPU with the most room, and (2) to (5) again for what is left.
(6) Try a plain order at the same level, too: again and again, the GPU with the largest surplus gives to the GPU with
    the most room. Of the two, take the one with fewer replicas, then the one whose busiest sender sends fewer.
(7) If a surplus finds no room or no free slot in either, start again with relays: the order of (6), but into its last
    free slot a GPU gets all that fits, even more than the giver's surplus, which then has room and free slots itself.
    This takes more replicas, but hardly any level is out of reach. If it fails, the same into every slot.
(8) If that fails too, raise the level, by bisection, to the lowest one at which (1) to (7) succeed.

"Little" is four times a fair share of the room that is left over once all surpluses are placed. A replica gets at least
`least` tokens, and a multiple of `tile`: a surplus is rounded up to that, a room down, and the giver may end below the
level.

Shapes: E experts, M GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["EMPTY", "Array", "replicas"]

Array = NDArray[np.int64]
EMPTY = -1  # a replica slot without an expert
_SHARES = 4  # of the spare room that one GPU's surplus may leave over


def replicas(
    tokens: Array, home: Array, node: Array, slots: int, level: int, least: int = 1, tile: int = 1
) -> tuple[Array, Array]:
    """Replicas with which no GPU exceeds `level`, or the lowest higher level that is found (8).

    >>> expert, part = replicas(np.array([10, 2]), np.array([0, 1]), np.array([0, 0]), slots=1, level=6)
    >>> expert.tolist(), part.tolist()  # GPU 1 computes 4 tokens of expert 0
    ([[-1], [0]], [[0], [4]])

    Args:
        tokens: `[E]`, the tokens of each expert.
        home: `[E]`, the GPU that owns each expert.
        node: `[M]`, the node of each GPU; replicas stay inside a node.
        slots: R, the replica slots on each GPU.
        level: tokens that no GPU should exceed.
        least: the fewest tokens of a replica.
        tile: tokens of a replica are a multiple of it.

    Returns:
        `[M, R]` the expert of each replica slot, -1 for none, and `[M, R]` the tokens that it gets.
    """
    step = _Step(tokens.tolist(), home.tolist(), node.tolist(), slots, -(-least // tile) * tile, tile)
    best = step.at(level)
    if best is None:
        below, above, best = level, max(step.loads), []  # at `above`, no replica is needed
        while below + 1 < above:
            middle = (below + above) // 2
            found = step.at(middle)
            if found is None:
                below = middle
            else:
                above, best = middle, found
    experts, parts = (np.full((len(node), slots), empty, np.int64) for empty in (EMPTY, 0))
    used = [0] * len(node)
    for expert, gpu, part in best:
        experts[gpu, used[gpu]], parts[gpu, used[gpu]] = expert, part
        used[gpu] += 1
    return experts, parts


class _Step:
    """One step: what is known before a level is tried."""

    def __init__(
        self, tokens: Sequence[int], home: Sequence[int], node: Sequence[int], slots: int, least: int, tile: int
    ) -> None:
        self.tokens, self.node, self.slots, self.least, self.tile = tokens, node, slots, least, tile
        self.loads = [0] * len(node)
        self.experts: list[list[int]] = [[] for _ in node]  # of each GPU
        for expert, gpu in enumerate(home):
            self.loads[gpu] += tokens[expert]
            self.experts[gpu].append(expert)

    def at(self, level: int) -> list[tuple[int, int, int]] | None:
        """(expert, GPU, tokens) of replicas with which no GPU exceeds the level (1 to 7); None if none are found."""
        attempts = [_Level(self, level), _Level(self, level)]
        placed = [
            attempt
            for attempt, is_placed in zip(attempts, (attempts[0].place(), attempts[1].pass_on(0)), strict=True)
            if is_placed
        ]
        if placed:
            return min(placed, key=lambda attempt: (len(attempt.replicas), max(attempt.sent))).replicas
        for relays in (1, self.slots):
            attempt = _Level(self, level)
            if attempt.pass_on(relays):
                return attempt.replicas
        return None


class _Level:
    """One attempt at one level: the room, tokens and slots that are left."""

    def __init__(self, step: _Step, level: int) -> None:
        self.step, self.replicas = step, list[tuple[int, int, int]]()
        self.room = [level - load for load in step.loads]  # of each GPU; a surplus is below 0
        self.left = list(step.tokens)  # of each expert at home
        self.free = [step.slots] * len(step.node)
        self.sent = [0] * len(step.node)

    def place(self) -> bool:
        """Steps (1) to (5): whether every surplus is placed."""
        node, gpus = self.step.node, range(len(self.step.node))
        givers = sorted((gpu for gpu in gpus if self.room[gpu] < 0), key=lambda gpu: (-self.room[gpu], gpu))
        waiting = [sum(node[gpu] == number for gpu in givers) for number in range(max(node) + 1)]
        spare = [sum(self.room[gpu] for gpu in gpus if node[gpu] == number) for number in range(max(node) + 1)]
        for giver in givers:
            little = _SHARES * max(0, spare[node[giver]]) // waiting[node[giver]]
            while self.room[giver] < 0:
                expert = max(self.step.experts[giver], key=lambda one: (self.left[one], -one))
                need = min(self._up(-self.room[giver]), self._down(self.left[expert]))
                takers = self._takers(expert, giver)
                if not takers or need < self.step.least:
                    return False
                for index in _chosen([self._down(self.room[gpu]) for gpu in takers], need, little):
                    part = max(self.step.least, min(need, self._down(self.room[takers[index]])))
                    if part > self.left[expert]:
                        return False
                    self._give(expert, giver, takers[index], part)
                    need -= part
            waiting[node[giver]] -= 1
        return True

    def pass_on(self, relays: int) -> bool:
        """Step (6), or (7) with relays into the last slots, as many as `relays`: whether every surplus is placed."""
        while min(self.room) < 0:
            giver = min(range(len(self.room)), key=lambda gpu: (self.room[gpu], gpu))
            for expert in sorted(self.step.experts[giver], key=lambda one: (-self.left[one], one)):
                takers = self._takers(expert, giver)
                if takers and self._down(self.left[expert]) >= self.step.least:
                    part = min(self._down(self.left[expert]), self._down(self.room[takers[0]]))
                    if self.free[takers[0]] > relays:
                        part = min(part, self._up(-self.room[giver]))
                    self._give(expert, giver, takers[0], part)
                    break
            else:
                return False
        return True

    def _takers(self, expert: int, giver: int) -> list[int]:
        """GPUs of the giver's node with room and a slot for a replica, and none of the expert; the most room first."""
        holders = {gpu for one, gpu, _ in self.replicas if one == expert}
        node = self.step.node
        takers = [gpu for gpu in range(len(node)) if node[gpu] == node[giver] and self.free[gpu] and gpu not in holders]
        takers = [gpu for gpu in takers if self._down(self.room[gpu]) >= self.step.least]
        return sorted(takers, key=lambda gpu: (-self.room[gpu], gpu))

    def _up(self, surplus: int) -> int:
        return max(self.step.least, -(-surplus // self.step.tile) * self.step.tile)

    def _down(self, tokens: int) -> int:
        return tokens // self.step.tile * self.step.tile

    def _give(self, expert: int, giver: int, taker: int, part: int) -> None:
        self.room[taker] -= part
        self.room[giver] += part
        self.left[expert] -= part
        self.free[taker] -= 1
        self.sent[giver] += 1
        self.replicas.append((expert, taker, part))


def _chosen(rooms: list[int], need: int, little: int) -> tuple[int, ...]:
    """Which of the rooms, largest first, take what is needed: steps (3) to (5)."""
    single = max((index for index, room in enumerate(rooms) if room >= need), default=None)
    if single is not None and rooms[single] - need <= little:
        return (single,)
    pair, rest = None, little + 1
    one, other = 0, len(rooms) - 1
    while one < other:
        over = rooms[one] + rooms[other] - need
        if over < 0:
            other -= 1
        else:
            if over < rest:
                pair, rest = (one, other), over
            one += 1
    if pair is not None:
        return pair
    return (0,) if single is None else (single,)
