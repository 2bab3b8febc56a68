"""The engine `reference`: replicas for one level, and the level that costs least, in plain Python.

The level is the time that no GPU may exceed: in tokens, or in nanoseconds with a time curve. A GPU above it has a
surplus, one below it has room.

(0) The level to begin with: the greatest of ceil(mean), (1 + tolerance) × mean, and ceil(mean) of the busiest node,
    unless replicas may be made in other nodes.
(1) Nodes above the level, where replicas may be made in other nodes: the node's busiest GPU gives what is too much for
    the node to the GPU with the most room in nodes below the level, again and again.
(2) GPUs hand out their surplus in turn, the smallest surplus first: a small surplus fits into many rooms, and a large
    one can fill whatever is left. The rest is inside nodes.
(3) The expert is the one with the most tokens at home; it hands out the surplus, or all its tokens if they are fewer.
(4) One replica, on the GPU with the smallest sufficient room, if that leaves little of the room over.
(5) Else two replicas, on the pair of GPUs with the smallest sufficient rooms, if they leave little over: both rooms
    are used up, where a single large room would leave a rest that takes another replica to fill.
(6) Else one replica: on the GPU of (4), or on the GPU with the most room, and (3) to (6) again for what is left.
(7) Try a plain order at the same level, too: again and again, the GPU with the largest surplus gives to the GPU with
    the most room. Of the two, take the one whose replicas cost less (10), then the one with fewer replicas, then the
    one whose busiest sender sends fewer.
(8) If a surplus finds no room or no free slot in either, start again with relays: the order of (7), but into its last
    free slot a GPU gets all that fits, even more than the giver's surplus, which then has room and free slots itself.
    This takes more replicas, but hardly any level is out of reach. If it fails, try relays into every slot.
(9) If replicas have a price, try to spread them: no GPU sends, or receives, more than 1, then 2 and so on, while that
    is cheaper than what was found. The GPU gives whose surplus is largest for each replica that it may still send, to
    the GPU with the most room, and gives at least that much: a GPU that gets more than its room passes on a surplus of
    its own. Where the replicas that it may still send just suffice, it gives what its next experts have too few
    tokens for.
(10) A level costs its time, and the prices of the replicas that one GPU sends, or receives, whichever GPU pays most.
    Take the level that costs least, up to the one that needs no replica. Costs are known at both ends of an
    interval of levels. A level between them costs at least the lower end's time and the upper end's replicas, because
    a higher level needs no more replicas. So: try the middle of the interval where that is least, while it is less than
    the lowest cost so far and the interval is longer than 1/64 of a replica's price.

"Little" is four times a fair share of the room that is left over once all surpluses are placed. A replica gets at least
`least` tokens, and a multiple of `tile`: a surplus is rounded up to that, a room down, and the giver may end below the
level.

Shapes: E experts, M GPUs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from distplb.splitting.rules import EMPTY, LONGEST, MOST_TOKENS, NEVER, NO_CURVE, Array, Rules

__all__ = ["is_legal", "quotas", "replicas"]

_SHARES = 4  # of the spare room that one GPU's surplus may leave over
_STEPS = 64  # of a replica's price; levels that are nearer to each other are not told apart
_LEVELS = 64  # that are tried; far more than it takes


def replicas(tokens: Array, home: Array, node: Array, rules: Rules, curve: Array = NO_CURVE) -> tuple[Array, Array]:
    """Replicas with which no GPU exceeds the rules' level, or the higher level that costs least (10).

    >>> expert, part = replicas(np.array([10, 2]), np.array([0, 1]), np.array([0, 0]), Rules(slots=1, level=6))
    >>> expert.tolist(), part.tolist()  # GPU 1 computes 4 tokens of expert 0
    ([[-1], [0]], [[0], [4]])

    Args:
        tokens: `[E]`, the tokens of each expert.
        home: `[E]`, the GPU that owns each expert.
        node: `[M]`, the node of each GPU, in ascending order.
        rules: slots, level, sizes and prices.
        curve: `[2, K]`, tokens and nanoseconds of the points of a TimeCurve; K = 0 for none.

    Returns:
        `[M, R]` the expert of each replica slot, -1 for none, and `[M, R]` the tokens that it gets.
    """
    step = _Step(tokens.tolist(), home.tolist(), node.tolist(), rules, curve)
    experts, parts = (np.full((len(node), rules.slots), empty, np.int64) for empty in (EMPTY, 0))
    used = [0] * len(node)
    for expert, gpu, part in step.cheapest():
        experts[gpu, used[gpu]], parts[gpu, used[gpu]] = expert, part
        used[gpu] += 1
    return experts, parts


def quotas(tokens: Array, home: Array, expert: Array, part: Array) -> Array:
    """The quotas `[E, M]` of replicas as `replicas` returns them; what is left of an expert is computed at home.

    >>> quotas(np.array([10, 2]), np.array([0, 1]), np.array([[-1], [0]]), np.array([[0], [4]])).tolist()
    [[6, 4], [0, 2]]
    """
    quota = np.zeros((len(tokens), len(expert)), np.int64)
    gpu, slot = np.nonzero(expert != EMPTY)
    quota[expert[gpu, slot], gpu] = part[gpu, slot]
    quota[np.arange(len(tokens)), home] = tokens - quota.sum(1)
    return quota


def is_legal(counts: Array, home: Array, quota: Array, replica: Array) -> bool:
    """Whether a `Split` of these has nothing to refuse, given that shapes and dtypes are right.

    >>> counts, quota = np.array([[6, 1], [4, 1]]), np.array([[6, 4], [0, 2]])
    >>> is_legal(counts, np.array([0, 1]), quota, np.array([[-1], [0]]))
    True
    >>> is_legal(counts, np.array([0, 1]), quota, np.array([[-1], [-1]]))  # GPU 1 does not hold expert 0
    False
    """
    num_gpus, num_experts = counts.shape
    if home.min() < 0 or home.max() >= num_gpus or counts.min() < 0 or quota.min() < 0:
        return False
    gpu, slot = np.nonzero(replica != EMPTY)
    expert = replica[gpu, slot]
    if len(expert) and (expert.min() < 0 or expert.max() >= num_experts):
        return False
    held = quota[expert, gpu]
    elsewhere = quota.sum(1)
    if (held == 0).any() or (counts.sum(0) != elsewhere).any() or (home[expert] == gpu).any():
        return False
    # Of each expert, the quotas at home and on replicas are all there are; one counted twice would exceed them.
    elsewhere -= quota[np.arange(num_experts), home]
    np.subtract.at(elsewhere, expert, held)
    return not elsewhere.any() and len(set(zip(expert.tolist(), gpu.tolist(), strict=True))) == len(expert)


class _Step:
    """One step: what is known before a level is tried."""

    def __init__(
        self, tokens: Sequence[int], home: Sequence[int], node: Sequence[int], rules: Rules, curve: Array
    ) -> None:
        self.tokens, self.node, self.rules = tokens, node, rules
        self.curve_tokens: list[int] = curve[0].tolist()
        self.curve_times: list[int] = curve[1].tolist()
        self.loads = [0] * len(node)  # times
        self.experts: list[list[int]] = [[] for _ in node]  # of each GPU
        for expert, gpu in enumerate(home):
            self.loads[gpu] += self.time(tokens[expert])
            self.experts[gpu].append(expert)

    def cheapest(self) -> list[tuple[int, int, int]]:
        """(expert, GPU, tokens) of the replicas of the level that costs least (10)."""
        low, high = self.rules.level, max(self.loads)
        if high <= low or self.rules.inside == NEVER:
            return []
        best, cost = list[tuple[int, int, int]](), high  # at `high`, no replica is needed
        inside = low if self.rules.between == NEVER else max(low, self.level_of_nodes())
        for level in sorted({low, inside}):
            first = self.at(level)
            if first is not None and level + first.price < cost:
                best, cost = first.replicas, level + first.price
        shortest = max(1, self.rules.inside // _STEPS)
        intervals = [(low, high, 0)]  # lower end, upper end, price of the replicas at the upper end
        for _ in range(_LEVELS):
            intervals = [one for one in intervals if one[0] + one[2] < cost and one[1] - one[0] > shortest]
            if not intervals:
                break
            low, high, price = min(intervals, key=lambda one: (one[0] + one[2], one[0]))
            intervals.remove((low, high, price))
            middle = (low + high) // 2
            found = self.at(middle)
            intervals.append((middle, high, price))
            if found is not None:
                intervals.append((low, middle, found.price))
                if middle + found.price < cost:
                    best, cost = found.replicas, middle + found.price
        return best

    def level_of_nodes(self) -> int:
        """ceil(mean) of the busiest node: the lowest level without replicas in other nodes."""
        nodes = [[load for load, own in zip(self.loads, self.node, strict=True) if own == node] for node in self.node]
        return max(-(-sum(loads) // len(loads)) for loads in nodes)

    def at(self, level: int) -> _Level | None:
        """Replicas with which no GPU exceeds the level (1 to 9); None if none are found."""
        attempts = [_Level(self, level), _Level(self, level)]
        placed = [
            attempt
            for attempt, is_placed in zip(attempts, (attempts[0].place(), attempts[1].pass_on(0)), strict=True)
            if is_placed
        ]
        if placed:
            found = min(placed, key=lambda attempt: (attempt.price, len(attempt.replicas), max(attempt.sends)))
            return self.spread(found, level)
        for relays in (1, self.rules.slots):
            attempt = _Level(self, level)
            if attempt.pass_on(relays):
                return self.spread(attempt, level)
        return None

    def spread(self, found: _Level, level: int) -> _Level:
        """Step (9): what is cheaper than the replicas found for the level, or these."""
        most = 1
        while most * self.rules.inside < found.price and self.rules.inside:
            attempt = _Level(self, level)
            if attempt.spread(most):
                return min(found, attempt, key=lambda one: one.price)
            most += 1
        return found

    def time(self, tokens: int) -> int:
        """What an expert's tokens take on one GPU; as TimeCurve.time, and in whole tiles, with a curve."""
        points, times = self.curve_tokens, self.curve_times
        if not points:
            return tokens
        tokens = self.up(tokens)
        at = min(bisect_right(points, tokens), len(points) - 1) - 1
        more, longer = points[at + 1] - points[at], times[at + 1] - times[at]
        return min(times[at] + (tokens - points[at]) * longer // more, LONGEST)

    def within(self, time: int) -> int:
        """The most tokens that take at most this time."""
        points, times = self.curve_tokens, self.curve_times
        if not points or time < 0:
            return time
        if time < times[0]:
            return -1
        at = min(bisect_right(times, time), len(times) - 1) - 1
        more, longer = points[at + 1] - points[at], times[at + 1] - times[at]
        most = points[at] + ((time - times[at] + 1) * more - 1) // longer if longer else MOST_TOKENS
        return min(most, MOST_TOKENS)

    def up(self, tokens: int) -> int:
        """Tokens rounded up to whole tiles."""
        return -(-tokens // self.rules.tile) * self.rules.tile

    def down(self, tokens: int) -> int:
        """Tokens rounded down to whole tiles."""
        return tokens // self.rules.tile * self.rules.tile


class _Level:
    """One attempt at one level: the room, tokens and slots that are left."""

    def __init__(self, step: _Step, level: int) -> None:
        self.step, self.replicas = step, list[tuple[int, int, int]]()
        self.room = [level - load for load in step.loads]  # time, of each GPU; a surplus is below 0
        self.left = list(step.tokens)  # of each expert at home
        self.free = [step.rules.slots] * len(step.node)
        self.sends = [0] * len(step.node)
        self.paid = [[0, 0] for _ in step.node]  # prices of the replicas that each GPU sends, and receives

    @property
    def price(self) -> int:
        """The prices of the replicas that one GPU sends, or receives, whichever GPU pays most."""
        return max(map(max, self.paid))

    def place(self) -> bool:
        """Steps (1) to (6): whether every surplus is placed."""
        if not self.leave_nodes():
            return False
        node, gpus = self.step.node, range(len(self.step.node))
        givers = sorted((gpu for gpu in gpus if self.room[gpu] < 0), key=lambda gpu: (-self.room[gpu], gpu))
        waiting = [sum(node[gpu] == number for gpu in givers) for number in range(max(node) + 1)]
        spare = self.room_of_nodes()
        for giver in givers:
            little = self.step.within(_SHARES * max(0, spare[node[giver]]) // waiting[node[giver]])
            while self.room[giver] < 0:
                expert = max(self.step.experts[giver], key=lambda one: (self.left[one], -one))
                need = min(self.needed(expert, -self.room[giver]), self.step.down(self.left[expert]))
                takers = self.takers(expert, self.of_node(node[giver]))
                if not takers or need < self.step.rules.least:
                    return False
                for index in _chosen([self.fits(gpu) for gpu in takers], need, little):
                    part = max(self.step.rules.least, min(need, self.fits(takers[index])))
                    if part > self.left[expert]:
                        return False
                    self.give(expert, giver, takers[index], part)
                    need -= part
            waiting[node[giver]] -= 1
        return True

    def pass_on(self, relays: int) -> bool:
        """Steps (1) and (7), or (8) with relays into the last slots, as many as `relays`: is every surplus placed?"""
        if not self.leave_nodes():
            return False
        while min(self.room) < 0:
            giver = min(range(len(self.room)), key=lambda gpu: (self.room[gpu], gpu))
            for expert in sorted(self.step.experts[giver], key=lambda one: (-self.left[one], one)):
                takers = self.takers(expert, self.of_node(self.step.node[giver]))
                if takers and self.step.down(self.left[expert]) >= self.step.rules.least:
                    part = min(self.step.down(self.left[expert]), self.fits(takers[0]))
                    if self.free[takers[0]] > relays:
                        part = min(part, self.needed(expert, -self.room[giver]))
                    self.give(expert, giver, takers[0], part)
                    break
            else:
                return False
        return True

    def spread(self, most: int) -> bool:
        """Steps (1) and (9): whether every surplus is placed, with at most so many replicas of each GPU."""
        if not self.leave_nodes():
            return False
        slots, num_gpus = self.step.rules.slots, len(self.room)
        while givers := [gpu for gpu in range(num_gpus) if self.room[gpu] < 0]:
            may_send = [most - sent for sent in self.sends]
            if min(may_send[gpu] for gpu in givers) <= 0:
                return False
            giver = min(givers, key=lambda gpu: (-(-self.room[gpu] // may_send[gpu]), gpu))
            may_take = [gpu for gpu in self.of_node(self.step.node[giver]) if slots - self.free[gpu] < most]
            for expert in sorted(self.step.experts[giver], key=lambda one: (-self.left[one], one)):
                takers = self.takers(expert, may_take)
                if takers and self.step.down(self.left[expert]) >= self.step.rules.least:
                    others = sorted((self.left[one] for one in self.step.experts[giver] if one != expert), reverse=True)
                    need, sends = self.needed(expert, -self.room[giver]), may_send[giver]
                    part = max(self.fits(takers[0]), self.needed(expert, -(self.room[giver] // sends)))
                    if sends == 1 or need > self.left[expert] + sum(others[: sends - 2]):
                        part = max(part, self.step.up(need - sum(others[: sends - 1])))
                    self.give(expert, giver, takers[0], min(part, self.step.down(self.left[expert]), need))
                    break
            else:
                return False
        return True

    def leave_nodes(self) -> bool:
        """Step (1): whether no node is above the level."""
        while min(rooms := self.room_of_nodes()) < 0:
            if self.step.rules.between == NEVER:
                return False
            node = rooms.index(min(rooms))
            giver = min(self.of_node(node), key=lambda gpu: (self.room[gpu], gpu))
            for expert in sorted(self.step.experts[giver], key=lambda one: (-self.left[one], one)):
                fits = [self.step.down(self.step.within(room)) for room in rooms]
                others = [gpu for gpu, own in enumerate(self.step.node) if fits[own] >= self.step.rules.least]
                takers = self.takers(expert, others)
                if takers and self.step.down(self.left[expert]) >= self.step.rules.least:
                    part = min(self.fits(takers[0]), fits[self.step.node[takers[0]]])
                    part = min(part, self.step.down(self.left[expert]), self.needed(expert, -rooms[node]))
                    self.give(expert, giver, takers[0], part)
                    break
            else:
                return False
        return True

    def room_of_nodes(self) -> list[int]:
        """The room of each node, less its surpluses."""
        return [sum(self.room[gpu] for gpu in self.of_node(node)) for node in range(max(self.step.node) + 1)]

    def of_node(self, node: int) -> list[int]:
        """The GPUs of a node."""
        return [gpu for gpu, own in enumerate(self.step.node) if own == node]

    def takers(self, expert: int, gpus: list[int]) -> list[int]:
        """Those of the GPUs with room and a slot for a replica, and none of the expert; the most room first."""
        holders = {gpu for one, gpu, _ in self.replicas if one == expert}
        takers = [gpu for gpu in gpus if self.free[gpu] and gpu not in holders]
        takers = [gpu for gpu in takers if self.fits(gpu) >= self.step.rules.least]
        return sorted(takers, key=lambda gpu: (-self.room[gpu], gpu))

    def fits(self, gpu: int) -> int:
        """The tokens of a replica that fit into a GPU's room."""
        return self.step.down(self.step.within(self.room[gpu]))

    def needed(self, expert: int, surplus: int) -> int:
        """The tokens of a replica that shorten the expert's time at home by a surplus."""
        left = self.left[expert]
        keeps = self.step.down(max(0, self.step.within(self.step.time(left) - surplus)))
        part = surplus if not self.step.curve_tokens else left - keeps
        return max(self.step.rules.least, self.step.up(part))

    def give(self, expert: int, giver: int, taker: int, part: int) -> None:
        """Make a replica."""
        time, rules = self.step.time, self.step.rules
        self.room[taker] -= time(part)
        self.room[giver] += time(self.left[expert]) - time(self.left[expert] - part)
        self.left[expert] -= part
        self.free[taker] -= 1
        self.sends[giver] += 1
        price = rules.inside if self.step.node[giver] == self.step.node[taker] else rules.between
        self.paid[giver][0] += price
        self.paid[taker][1] += price
        self.replicas.append((expert, taker, part))


def _chosen(rooms: list[int], need: int, little: int) -> tuple[int, ...]:
    """Which of the rooms, largest first, take what is needed: steps (4) to (6)."""
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
