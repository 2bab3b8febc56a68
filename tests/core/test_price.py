"""Time curves, the price of a move and moved slots against plain integers and loops.

Shapes: L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import hashlib
import random
import struct
from itertools import pairwise
from typing import Any

import pytest
import torch

from distplb import DistplbError, Placement, Topology
from distplb.core.price import MoveModel, TimeCurve, moved_slots

MOST = 2**40  # nanoseconds of one expert in one step


def plain_time(curve: TimeCurve, load: int) -> int:
    """The time by unbounded integers."""
    points = list(zip(curve.tokens, curve.nanoseconds, strict=True))
    for (x, y), (x_next, y_next) in pairwise(points):
        if load < x_next or x_next == curve.tokens[-1]:
            return min(MOST, y + (load - x) * (y_next - y) // (x_next - x))
    raise AssertionError


def random_curve(random_: random.Random) -> TimeCurve:
    count, scale = random_.randrange(2, 8), random_.choice([10, 1000, 10**6])
    tokens = [0, *sorted(random_.sample(range(1, scale), count - 1))]
    times = sorted(random_.choices(range(random_.choice([3, 10**4, 10**9])), k=count))
    return TimeCurve(tuple(tokens), tuple(times))


# --- time curves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_times_are_those_of_unbounded_integers(seed: int) -> None:
    random_ = random.Random(seed)
    curve = random_curve(random_)
    loads = [0, *curve.tokens, *(at + 1 for at in curve.tokens), *(1 << power for power in range(63))]
    loads += [random_.randrange(2 * curve.tokens[-1]) for _ in range(50)]
    result = curve.time(torch.tensor(loads))
    assert result.dtype == torch.int64
    assert result.tolist() == [plain_time(curve, load) for load in loads]


def test_the_steepest_and_the_longest_segment_do_not_overflow() -> None:
    loads = [0, 1, 2, 3, 1 << 39, 1 << 40, 1 << 62, (1 << 63) - 1]
    for curve in (
        TimeCurve((0, 1), (0, MOST)),
        TimeCurve((0, 1 << 40), (0, (1 << 23) - 1)),
        TimeCurve((0, 5, 6), (0, 0, 0)),
        TimeCurve((0, 1, 1 << 23), (0, 3, MOST)),
    ):
        assert curve.time(torch.tensor(loads)).tolist() == [plain_time(curve, load) for load in loads]


def test_times_never_fall() -> None:
    for seed in range(20):
        curve = random_curve(random.Random(seed))
        assert bool((curve.time(torch.arange(3000)).diff() >= 0).all())


def test_the_shape_is_kept() -> None:
    load = torch.arange(24).reshape(2, 3, 4)
    curve = TimeCurve((0, 10, 20), (5, 7, 100))
    assert torch.equal(curve.time(load.transpose(0, 2)), curve.time(load).transpose(0, 2))
    assert curve.time(load.int()).dtype == torch.int64


def test_a_linear_curve_of_one_nanosecond_is_the_load_itself() -> None:
    load = torch.tensor([0, 1, 77, 1 << 20, (1 << 20) + 1, (1 << 40) - 1])
    assert torch.equal(TimeCurve.linear(1).time(load), load)
    assert TimeCurve.linear(0.5).time(load).tolist() == [value // 2 for value in load.tolist()]
    assert TimeCurve.linear(123.456).nanoseconds_per_token == pytest.approx(123.456, rel=1e-6)


def test_nanoseconds_per_token_are_of_the_last_point() -> None:
    assert TimeCurve((0, 10, 40), (100, 100, 180)).nanoseconds_per_token == 4.5


@pytest.mark.parametrize("seed", range(20))
def test_measured_points_in_any_order_are_averaged_and_pooled(seed: int) -> None:
    random_ = random.Random(seed)
    tokens = sorted(random_.sample(range(1, 500), 12))
    repeats = [random_.randrange(1, 4) for _ in tokens]
    measured = [
        [max(0.0, at * 1e-7 + random_.gauss(0, 1e-5)) for _ in range(count)]
        for at, count in zip(tokens, repeats, strict=True)
    ]
    points = [(at, value) for at, values in zip(tokens, measured, strict=True) for value in values]
    random_.shuffle(points)
    curve = TimeCurve.through([at for at, _ in points], [value for _, value in points])
    means = [sum(values) / len(values) for values in measured]

    # The largest of the smallest means of the neighbourhoods of each point (Robertson, Wright and Dykstra 1988).
    def mean(first: int, last: int) -> float:
        weights = repeats[first : last + 1]
        return sum(w * m for w, m in zip(weights, means[first : last + 1], strict=True)) / sum(weights)

    points_of = range(len(tokens))
    expected = [max(min(mean(j, k) for k in points_of[i:]) for j in points_of[: i + 1]) for i in points_of]
    assert curve.tokens == (0, *tokens)
    assert curve.nanoseconds[0] == 0
    assert list(curve.nanoseconds[1:]) == pytest.approx([value * 1e9 for value in expected], abs=0.51)


def test_an_idle_expert_has_the_time_that_was_measured() -> None:
    assert TimeCurve.through([8, 0], [5e-6, 2e-6]) == TimeCurve((0, 8), (2000, 5000))


def test_curves_differ_by_their_digests() -> None:
    curves = [TimeCurve((0, 10), (0, 7)), TimeCurve((0, 10), (1, 7)), TimeCurve((0, 11), (0, 7)), TimeCurve.linear(1)]
    digests = {curve.digest() for curve in curves}
    assert len(digests) == 4
    assert all(0 <= digest < 1 << 62 for digest in digests)
    hashed = hashlib.sha256(struct.pack("<4q", 0, 10, 0, 7)).digest()
    assert curves[0].digest() == struct.unpack(">Q", hashed[:8])[0] >> 2


@pytest.mark.parametrize(
    ("tokens", "nanoseconds", "wording"),
    [
        ((0,), (0,), "tokens has length 1, nanoseconds has length 1; pass the same number of both, at least two"),
        ((0, 1, 2), (0, 1), "tokens has length 3, nanoseconds has length 2; pass the same number of both"),
        ((1, 2), (0, 1), "tokens starts with 1; pass a point for 0 tokens first"),
        ((0, 5, 5), (0, 1, 2), r"\(tokens, nanoseconds\) = \(5, 2\) follows \(5, 1\); pass ascending tokens"),
        ((0, 5), (3, 2), r"\(tokens, nanoseconds\) = \(5, 2\) follows \(0, 3\)"),
        ((0, 5), (-3, 2), "nanoseconds has -3; pass integers from 0 to 1099511627776"),
        ((0, 1.5), (0, 2), "tokens has 1.5; pass integers"),
        ((0, True), (0, 2), "tokens has True; pass integers"),
        ((0, 2**41), (0, 2), "tokens has 2199023255552; pass integers"),
        ((0, 2**40), (0, 2**23), "differences multiply to less than 2"),
    ],
)
def test_other_curves_are_refused(tokens: Any, nanoseconds: Any, wording: str) -> None:
    with pytest.raises(DistplbError, match=wording):
        TimeCurve(tokens, nanoseconds)


def test_other_measurements_are_refused() -> None:
    for rate in (0, -1.0, float("nan"), float("inf"), 2**21):
        with pytest.raises(DistplbError, match=r"nanoseconds_per_token is .*; pass a number above 0"):
            TimeCurve.linear(rate)
    with pytest.raises(DistplbError, match="tokens has length 2, seconds has length 1"):
        TimeCurve.through([1, 2], [1e-6])
    with pytest.raises(DistplbError, match="pass finite numbers of at least 0"):
        TimeCurve.through([1, 2], [1e-6, float("nan")])
    with pytest.raises(DistplbError, match="pass the same number of both, at least two"):
        TimeCurve.through([0], [1e-6])


# --- the price --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "until_next"), [(32, 320), (32, 32), (64, 16), (1, 12.5)])
@pytest.mark.parametrize("trust", [1.0, 0.5, 0.2])
def test_a_move_that_saves_its_price_as_far_as_it_is_trusted_repays_itself(
    window: int, until_next: float, trust: float
) -> None:
    model = MoveModel(3e-7, 600 * 10**6, 4e12, 5e10, trust)
    for price, seconds in zip(model.price(window, until_next), (model.seconds(1, 0), model.seconds(0, 1)), strict=True):
        saved_in_a_window = price * model.seconds_per_token
        assert saved_in_a_window * until_next / window * trust == pytest.approx(seconds)


def test_seconds_add_up_over_both_kinds_of_links() -> None:
    model = MoveModel(1e-6, 10**9, 1e12, 1e11)
    assert model.seconds(0, 0) == 0
    assert model.seconds(7, 3) == pytest.approx(7e-3 + 3e-2)


@pytest.mark.parametrize("name", ["seconds_per_token", "bytes_per_slot", "bandwidth_inside", "bandwidth_between"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1", None, True])
def test_a_model_needs_positive_numbers(name: str, value: Any) -> None:
    numbers = {"seconds_per_token": 1e-6, "bytes_per_slot": 1, "bandwidth_inside": 1.0, "bandwidth_between": 1.0}
    with pytest.raises(DistplbError, match=f"MoveModel: {name} is {value!r}; pass a number above 0"):
        MoveModel(**numbers | {name: value})


@pytest.mark.parametrize("trust", [0.0, -0.5, 1.01, float("nan")])
def test_trust_is_a_share(trust: float) -> None:
    with pytest.raises(DistplbError, match=f"MoveModel: trust is {trust!r}; pass a number above 0 and at most 1"):
        MoveModel(1e-6, 1, 1.0, 1.0, trust)


def test_a_price_needs_steps() -> None:
    with pytest.raises(DistplbError, match="price: steps_until_next is 0; pass a number above 0"):
        MoveModel(1e-6, 1, 1.0, 1.0).price(32, 0)


# --- moved slots ------------------------------------------------------------------------------------------------


def plain_moved(old: list[int], new: list[int], num_gpus: int, gpus_per_node: int) -> list[int]:
    """The moved slots of one layer, `[2]`."""
    held = [set(old[gpu * len(old) // num_gpus : (gpu + 1) * len(old) // num_gpus]) for gpu in range(num_gpus)]
    moved = [0, 0]
    for slot, expert in enumerate(new):
        gpu = slot * num_gpus // len(new)
        node = gpu // gpus_per_node * gpus_per_node
        if expert not in held[gpu]:
            moved[not any(expert in experts for experts in held[node : node + gpus_per_node])] += 1
    return moved


@pytest.mark.parametrize(("slots", "new_slots"), [(8, 8), (16, 16), (8, 16), (16, 8)])
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 4), (2, 2), (4, 1), (1, 8), (2, 4)])
def test_moved_slots_are_those_that_a_plain_loop_finds(slots: int, new_slots: int, nodes: int, gpus: int) -> None:
    random_ = random.Random(slots * 100 + new_slots + nodes)

    def table(size: int) -> list[int]:
        return random_.sample([*range(8), *random_.choices(range(8), k=size - 8)], size)

    for _ in range(10):
        old, new = [table(slots) for _ in range(3)], [table(new_slots) for _ in range(3)]
        result = moved_slots(
            Placement(torch.tensor(old), 8, nodes * gpus),
            Placement(torch.tensor(new), 8, nodes * gpus),
            Topology(nodes, gpus),
        )
        assert result.dtype == torch.int64
        assert result.tolist() == [plain_moved(*pair, nodes * gpus, gpus) for pair in zip(old, new, strict=True)]


def test_a_local_copy_does_not_move() -> None:
    old, new = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 0, 0, 1, 3, 2, 2, 2]])
    result = moved_slots(Placement(old, 4, 2), Placement(new, 4, 2), Topology(1, 2))
    assert result.tolist() == [[0, 0]]


def test_placements_of_other_models_or_clusters_are_refused() -> None:
    one = Placement.contiguous(2, 8, 4)
    for other, topology in (
        (Placement.contiguous(3, 8, 4), Topology(1, 4)),
        (Placement.contiguous(2, 8, 2), Topology(1, 4)),
        (one, Topology(2, 4)),
    ):
        with pytest.raises(DistplbError, match="pass placements of the same model and cluster"):
            moved_slots(one, other, topology)
