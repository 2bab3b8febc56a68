"""Counting tokens in a window.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import copy
import pickle
import random
import shutil
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from distplb import DistplbError, LoadWindow, MoELayer
from distplb.core.hashing import hashed
from distplb.train.routing import Routing
from distplb.train.window import group_of_steps

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Counting(nn.Module):
    """One layer whose i-th forward counts [i, 10 · i]."""

    def __init__(self, window: LoadWindow, *, says_training: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.window, self.says_training, self.forwards = window, says_training, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        training = self.training if self.says_training else None
        self.window.add(0, torch.tensor([self.forwards, 10 * self.forwards]), training=training)
        return (x * self.weight).sin()


def counting(num_steps: int = 4, *, says_training: bool = False) -> Counting:
    return Counting(LoadWindow(1, 2, num_steps), says_training=says_training)


def counted(window: LoadWindow, layer: int = 0) -> list[int]:
    """The counts of expert 0 in one layer, step by step."""
    return window.load()[:, layer, 0].tolist()


# --- the sample -------------------------------------------------------------------------------------------------


def oracle_hash(*parts: int) -> int:
    """`hashed` from zero, with Python integers."""
    state = 0
    for part in parts:
        state = ((state ^ part % 2**32) + 0x9E3779B9) % 2**32
        state = (state ^ state >> 16) * 0x7FEB352D % 2**32
        state = (state ^ state >> 15) * 0x846CA68B % 2**32
        state ^= state >> 16
    return state


def oracle_rows(num_steps: int, seen: int, seed: int = 0, clears: int = 0, each: int = 2048) -> dict[int, int]:
    """The row of every step below `seen` that is kept at some time.

    Algorithm R, with the hash as its random numbers; from step `each` on, one step is drawn for each block of 2, then
    of 4, and so on.
    """
    found, start, width, until = {}, 0, 1, each
    while start < seen:
        number = start + oracle_hash(seed, seed >> 32, clears, start, 1) % width
        die, end = oracle_hash(seed, seed >> 32, clears, number), start + width
        drawn = die % end if width == 1 else die * end >> 32
        if number < num_steps:
            found[number] = number
        elif drawn < num_steps * width:
            found[number] = drawn // width
        start = end
        if start == until:
            width, until = 2 * width, 2 * until
    return {number: row for number, row in found.items() if number < seen}


def oracle_sample(num_steps: int, seen: int, seed: int = 0, clears: int = 0, each: int = 2048) -> list[int | None]:
    """The step in each row after `seen` steps."""
    rows: list[int | None] = [None] * num_steps
    for number, row in oracle_rows(num_steps, seen, seed, clears, each).items():
        rows[row] = number
    return rows


def in_time(rows: list[int | None]) -> list[int]:
    return sorted(row for row in rows if row is not None)


def test_the_hash_is_that_of_plain_integers() -> None:
    parts = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**40 + 5, 123456789]
    for state in (0, 1, 2**32 - 1):
        found = hashed(torch.full((len(parts),), state), torch.tensor(parts)).tolist()
        assert found == [oracle_hash(part ^ state) for part in parts]
    found = hashed(torch.zeros(len(parts), dtype=torch.int64), -3, torch.tensor(parts), 7).tolist()
    assert found == [oracle_hash(-3, part, 7) for part in parts]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3])
def test_the_sample_is_that_of_the_oracle_after_every_step_and_every_clear(num_steps: int, seed: int) -> None:
    window = LoadWindow(num_layers=2, num_experts=3, num_steps=num_steps, seed=seed)
    assert window.shape == (num_steps, 2, 3)
    for clears in range(3):
        assert window.load().shape == (0, 2, 3)
        assert window.seen == 0
        for step in range(30):
            for layer in range(2):
                window.add(layer, torch.tensor([step, layer, 7]), training=True)
            kept = in_time(oracle_sample(num_steps, step + 1, seed, clears))
            assert len(kept) == min(num_steps, step + 1)
            assert window.seen == step + 1
            assert window.steps().tolist() == kept
            assert window.load().tolist() == [[[number, layer, 7] for layer in range(2)] for number in kept]
            assert window.load().dtype == window.steps().dtype == torch.int64
        window.clear()


def test_a_sample_of_later_steps_is_that_of_the_oracle_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distplb.train.window._EACH_STEP", 16)
    monkeypatch.setattr("distplb.train.window._LAST_STEP", 512)
    for num_steps, each in ((1, 16), (3, 16), (8, 16), (9, 32)):
        window = LoadWindow(1, 2, num_steps, seed=num_steps)
        for clears in range(2):
            for step in range(600):
                window.add(0, torch.tensor([step, 7]), training=True)
                if step % 7 == 0 or step > 500:
                    kept = in_time(oracle_sample(num_steps, min(step + 1, 512), num_steps, clears, each))
                    assert window.steps().tolist() == kept
                    assert window.load()[:, 0, 0].tolist() == kept
            assert window.seen == 600  # no step is kept from step 512 on
            assert max(kept) >= 64
            window.clear()


@pytest.mark.parametrize(("steps", "each"), [(20, 32), (128, 16)])
def test_every_step_has_the_same_chance(monkeypatch: pytest.MonkeyPatch, steps: int, each: int) -> None:
    """1,600 windows of 5 steps: half differ by seed, half by clears. The second case draws blocks of up to 8."""
    monkeypatch.setattr("distplb.train.window._EACH_STEP", each)
    monkeypatch.setattr("distplb.train.window._LAST_STEP", 8 * each)  # drawing rows takes most of the time here
    T, N = 5, steps
    kept = torch.zeros(1600, N)
    cleared = LoadWindow(1, 1, T, seed=10_000)
    for trial in range(1600):
        window = cleared if trial % 2 else LoadWindow(1, 1, T, seed=trial)
        kept[trial, kept_after(window, N)] = 1
        window.clear()
    for half in (kept[::2], kept[1::2]):
        assert deviation(half.sum(0), T / N, 800).abs().max() < 3.7
        pairs = (half.T @ half)[torch.ones(N, N).triu(1) > 0]
        if steps < each:
            assert deviation(pairs, T * (T - 1) / (N * (N - 1)), 800).abs().max() < 4.5


def kept_after(window: LoadWindow, seen: int) -> Tensor:
    """The steps kept after `seen` steps, in order, read from the drawn rows without calling `add`."""
    steps, rows = window._edges[0::2], window._rows[1::2]
    steps, rows = steps[steps < seen], rows[steps < seen]
    last = torch.full((window.shape[0] + 1,), -1).scatter_reduce(0, rows, steps, "amax")[:-1]
    return last[last >= 0].sort().values


def deviation(found: Tensor, chance: float, trials: int) -> Tensor:
    """The deviation in standard deviations of a binomial distribution."""
    return (found - trials * chance) / (trials * chance * (1 - chance)) ** 0.5


def test_of_70_000_steps_the_later_half_has_half_of_what_is_kept() -> None:
    """A window that was never cleared, as in a job that seldom rebalances, kept no step after the 30,000th."""
    window = LoadWindow(1, 1, 1000)
    for number in range(70_000):
        if number == 50_000:
            early = window.steps()
        window.add(0, ONE, training=True)
    kept = window.steps()
    assert (window.seen, len(kept)) == (70_000, 1000)
    assert kept.tolist() == in_time(oracle_sample(1000, 70_000))
    for steps, seen in ((early, 50_000), (kept, 70_000)):
        assert torch.equal(steps, kept_after(window, seen))
        assert abs(float(deviation((steps >= seen // 2).sum(), 0.5, 1000))) < 3.5


ONE = torch.tensor([1])


@pytest.fixture(scope="module")
def windows() -> list[LoadWindow]:
    """Windows of 200 steps, with 43 seeds."""
    return [LoadWindow(1, 1, 200, seed=seed) for seed in (*range(40), -1, 2**32, 2**40 + 7)]


@pytest.mark.parametrize("seen", [2048, 4000, 30_000, 100_000, 1_234_567, 10_000_000, 2_000_000_000])
def test_each_quarter_of_the_steps_has_a_quarter_of_what_is_kept_however_many_there_were(
    windows: list[LoadWindow], seen: int
) -> None:
    kept = torch.stack([kept_after(window, seen) for window in windows])  # [seeds, T]
    for parts in (2, 4, 7):
        share = torch.bincount((kept * parts // seen).flatten(), minlength=parts)
        assert deviation(share, 1 / parts, kept.numel()).abs().max() < 3.5, share
    # The kept step is not always at the same position in its block.
    if seen >= 30_000:
        places = torch.bincount(kept[kept > seen // 2] % 8, minlength=8)
        assert deviation(places, 1 / 8, int(places.sum())).abs().max() < 3.5, places


def test_rows_give_way_alike_to_later_steps(windows: list[LoadWindow]) -> None:
    T = 200
    rows = torch.stack([window._rows[1::2][2048:] for window in windows])
    counts = torch.bincount(rows.flatten(), minlength=T + 1)[:T]
    assert deviation(counts, 1 / T, int(counts.sum())).abs().max() < 3.5


def test_what_is_drawn_ahead_is_too_little_for_torch_to_hand_it_to_several_threads() -> None:
    """Torch does that from 2^15 elements on, which would wake threads in the middle of a job's iteration."""
    for num_steps, is_small in ((1, True), (64, True), (1024, True), (1025, False)):
        assert (len(LoadWindow(1, 1, num_steps)._edges) < 2**16) == is_small


def test_early_and_late_steps_of_a_long_window_are_kept_alike() -> None:
    """4,000 steps in 200 rows: a quarter of the rows for each quarter, which needs draws modulo n + 1, not T."""
    window = LoadWindow(1, 1, 200)
    for _ in range(4000):
        window.add(0, ONE, training=True)
    quarters = torch.bincount(window.steps() // 1000, minlength=4)
    assert quarters.sum() == 200
    assert (quarters - 50).abs().max() < 3.5 * (200 * 0.25 * 0.75) ** 0.5


def test_windows_keep_the_same_steps_whatever_they_count_and_others_by_another_seed() -> None:
    def kept(seed: int, layers: list[int], num_experts: int) -> list[list[int]]:
        window, found = LoadWindow(len(layers), num_experts, 4, seed=seed), []
        for _ in range(3):
            for number in range(40):
                for layer in layers:
                    window.add(layer, torch.full((num_experts,), number), training=True)
            found.append(window.steps().tolist())
            window.clear()
        return found

    first = kept(0, [0, 1, 2], 5)
    assert kept(0, [1, 0], 2) == first
    assert first[0] != first[1] != first[2] != first[0]
    for seed in (1, -1, 2**32, 2**40):
        assert all(one != other for one, other in zip(kept(seed, [0], 1), first, strict=True))


def test_layers_that_differ_in_steps_give_only_what_all_of_them_keep() -> None:
    """In any order of forwards, each row of `load` belongs to the same step in every layer."""
    random_ = random.Random(0)
    several = 0
    for trial in range(40):
        window = LoadWindow(num_layers=3, num_experts=1, num_steps=4, seed=trial)
        done = [0, 0, 0]
        for _ in range(random_.randrange(60)):
            layer = random_.choice([0, 1, 2])
            window.add(layer, torch.tensor([10 * done[layer] + layer]), training=True)
            done[layer] += 1
        rows = [oracle_sample(4, seen, trial) for seen in done]
        common = in_time([row[0] if len(set(row)) == 1 else None for row in zip(*rows, strict=True)])
        assert window.seen == min(done)
        assert window.steps().tolist() == common
        assert window.load()[..., 0].tolist() == [[10 * number + layer for layer in range(3)] for number in common]
        several += 1 < len(common) < 4
    assert several > 5


def test_in_the_middle_of_a_forward_at_most_the_step_that_gives_way_is_missing() -> None:
    window = LoadWindow(num_layers=3, num_experts=1, num_steps=4)
    missing = 0
    for number in range(60):
        before = window.steps().tolist()
        for layer in range(3):
            window.add(layer, torch.tensor([number]), training=True)
            if layer < 2:
                assert window.seen == number
                found = window.steps().tolist()
                assert found == [step for step in before if step in found]
                assert len(before) - len(found) <= 1
                assert window.load()[..., 0].tolist() == [[step] * 3 for step in found]
                missing += len(before) - len(found)
    assert missing > 5


def test_clear_forgets_all_steps_wherever_the_layers_stand() -> None:
    window = LoadWindow(num_layers=2, num_experts=1, num_steps=3)
    for number in range(5):
        window.add(0, torch.tensor([number]), training=True)
    window.add(1, torch.tensor([9]), training=True)
    window.clear()
    assert window.load().shape == (0, 2, 1)
    assert (window.seen, window.steps().tolist()) == (0, [])
    for layer in range(2):
        window.add(layer, torch.tensor([7]), training=True)
    assert window.load().tolist() == [[[7], [7]]]
    assert (window.seen, window.steps().tolist()) == (1, [0])


@pytest.mark.parametrize(
    ("max_bytes", "steps"), [(8 * 6, 1), (2 * 8 * 6 - 1, 1), (2 * 8 * 6, 2), (9 * 8 * 6, 9), (2**40, 9)]
)
def test_a_window_holds_no_more_steps_than_its_bytes(max_bytes: int, steps: int) -> None:
    window = LoadWindow(2, 3, 9, max_bytes=max_bytes)
    assert window.shape == (steps, 2, 3)
    for number in range(20):
        for layer in range(2):
            window.add(layer, torch.full((3,), number), training=True)
    assert window.load()[:, 1, 2].tolist() == window.steps().tolist() == in_time(oracle_sample(steps, 20))


def test_64_MiB_are_the_default() -> None:
    assert LoadWindow(64, 2048, 100).shape == (64, 64, 2048)


def test_bytes_for_not_even_one_step_are_refused_with_what_is_needed() -> None:
    with pytest.raises(DistplbError, match=r"max_bytes is 47, but one step takes 48 bytes \(num_layers 2, num_expe"):
        LoadWindow(2, 3, 9, max_bytes=47)


def test_the_window_writes_in_place_and_hands_out_copies() -> None:
    window = LoadWindow(1, 2, 2)
    tensors = [window._counts, window._numbers, window._written, window._edges, window._rows]
    addresses = [tensor.data_ptr() for tensor in tensors]
    counts = torch.tensor([1, 2])
    window.add(0, counts, training=True)
    taken = window.load()
    counts.zero_()
    for number in range(5):
        window.add(0, torch.tensor([number, number]), training=True)
    window.clear()
    assert taken.tolist() == [[[1, 2]]]
    tensors = [window._counts, window._numbers, window._written, window._edges, window._rows]
    assert [tensor.data_ptr() for tensor in tensors] == addresses


def at_once(*calls: Callable[[], object]) -> None:
    """Run each call in its own thread, switching threads as often as Python allows."""
    interval, threads = sys.getswitchinterval(), [threading.Thread(target=call) for call in calls]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_threads_that_add_at_once_lose_no_step() -> None:
    """544 of 4,000 steps were lost, because two threads read the same index and wrote to the same row."""
    window, each = LoadWindow(2, 2, 4000), 2000

    def add(expert: int) -> None:
        counts = torch.eye(2, dtype=torch.int64)[expert]
        for _ in range(each):
            window.add(1, counts, training=True)

    at_once(partial(add, 0), partial(add, 1))
    for _ in range(2 * each):
        window.add(0, torch.tensor([1, 1]), training=True)
    assert window.seen == 2 * each
    assert window.load()[:, 1].sum(0).tolist() == [each, each]


def test_a_clear_beside_an_add_leaves_the_whole_step_or_nothing_of_it() -> None:
    """A step that was added in the middle of a clear was counted, but its row was lost."""
    # Large enough that clearing takes a while.
    window, rounds, both, found = LoadWindow(500, 1, 1000), 200, threading.Barrier(2), []

    def clear() -> None:
        for _ in range(rounds):
            both.wait()
            window.clear()
            both.wait()

    def add() -> None:
        for _ in range(rounds):
            both.wait()
            for _ in range(3):
                window.add(0, torch.tensor([1]), training=True)
            both.wait()
            written = window._numbers[:-1, 0].sort(descending=True).values
            found.append(written[: window._written[0]].flip(0).tolist() == list(range(window._written[0])))

    at_once(clear, add)
    assert found == [True] * rounds


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_negative_count_on_the_host_is_refused_where_it_is_added(dtype: torch.dtype) -> None:
    window = LoadWindow(1, 2, 4)
    with pytest.raises(DistplbError, match=r"LoadWindow.add: layer 0 has -1 for expert 1.*non-negative"):
        window.add(0, torch.tensor([1, -1], dtype=dtype), training=True)
    assert window.seen == 0


def test_the_host_writes_what_the_compilers_operation_writes() -> None:
    """Both ways of one window take turns, and a second window has the operation alone."""
    generator = torch.Generator().manual_seed(0)
    mixed, plain = (LoadWindow(3, 4, 5, seed=1) for _ in range(2))

    def operation(window: LoadWindow, layer: int, counts: Tensor) -> None:
        buffers = (window._counts, window._numbers, window._written, window._edges, window._rows)
        torch.ops.distplb.add(*buffers, layer, counts, True, "")

    for step in range(300):
        counts = torch.randint(100, (3, 4), generator=generator)
        for layer in range(3):
            operation(plain, layer, counts[layer])
            if (step + layer) % 3:
                operation(mixed, layer, counts[layer])
            else:
                mixed.add(layer, counts[layer], training=True)
        if step % 70 == 69:
            order = torch.rand(3, 4, generator=generator).argsort(1)
            for window in (mixed, plain):
                window.rename(order)
        assert mixed.seen == plain.seen == step % 110 + 1
        assert torch.equal(mixed.load(), plain.load())
        assert torch.equal(mixed.steps(), plain.steps())
        if step % 110 == 109:
            mixed.clear()
            plain.clear()


def test_a_window_goes_with_the_model_that_holds_it_when_that_is_copied_or_pickled() -> None:
    """A lock can be neither copied nor pickled."""
    layer = counting()
    layer(torch.ones(3))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other(torch.ones(3))
        assert counted(other.window) == [1, 2]
    assert counted(layer.window) == [1]


@pytest.mark.parametrize("layer", [-2, -1, 2, 7])
def test_counts_of_a_layer_that_is_not_there_are_refused(layer: int) -> None:
    """Layer -2 of two was treated as layer 0; any other index was an error of torch, or no error."""
    window = LoadWindow(2, 3, 4)
    for training in (True, False):
        with pytest.raises(DistplbError, match=rf"LoadWindow.add: layer is {layer}; pass an index in \[0, 2\)"):
            window.add(layer, torch.tensor([1, 2, 3]), training=training)
    assert window._written.tolist() == [0, 0]


@pytest.mark.parametrize("counts", [torch.tensor(5), torch.tensor([1, 2]), torch.ones(2, 3, dtype=torch.int64)])
def test_counts_of_another_number_of_experts_are_refused(counts: Tensor) -> None:
    window = LoadWindow(2, 3, 4)
    with pytest.raises(DistplbError, match=r"LoadWindow.add: counts has shape .*; pass \[3\], one for each of the"):
        window.add(0, counts, training=True)
    assert window._written.tolist() == [0, 0]


def test_a_renaming_that_is_no_permutation_of_every_layer_is_refused() -> None:
    """Output -1 got the counts of the last one, and an output listed twice had its counts twice."""
    window = LoadWindow(2, 3, 4)
    for layer in range(2):
        window.add(layer, torch.tensor([1, 2, 3]), training=True)
    for source in ([[0, 1, 2], [0, 1, -1]], [[0, 1, 2], [0, 0, 1]], [[0, 1, 2], [3, 1, 0]]):
        with pytest.raises(
            DistplbError, match=r"LoadWindow.rename: source of layer 1 is \[.*\]; pass a permutation of"
        ):
            window.rename(torch.tensor(source))
    with pytest.raises(DistplbError, match=r"LoadWindow.rename: source has shape \(1, 3\); pass \[2, 3\]"):
        window.rename(torch.tensor([[0, 1, 2]]))
    assert window.load().tolist() == [[[1, 2, 3], [1, 2, 3]]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.uint8, torch.float32, torch.bfloat16])
def test_counts_of_any_number_type_become_int64(dtype: torch.dtype) -> None:
    window = LoadWindow(1, 3, 2)
    window.add(0, torch.tensor([0, 7, 128], dtype=dtype), training=True)
    assert window.load().dtype == torch.int64
    assert window.load().tolist() == [[[0, 7, 128]]]


def test_large_counts_of_int32_are_added_up_without_overflow() -> None:
    window = LoadWindow(1, 2, 2)
    for _ in range(2):
        window.add(0, torch.tensor([2**31 - 1, 1], dtype=torch.int32), training=True)
    assert window.load().sum(0).tolist() == [[2**32 - 2, 2]]


@pytest.mark.parametrize("name", ["num_layers", "num_experts", "num_steps"])
def test_an_empty_window_is_refused_by_the_name_of_what_is_missing(name: str) -> None:
    sizes = {"num_layers": 2, "num_experts": 2, "num_steps": 2} | {name: 0}
    with pytest.raises(DistplbError, match=f"LoadWindow: {name} is 0; pass an integer of at least 1"):
        LoadWindow(**sizes)


# --- what is counted --------------------------------------------------------------------------------------------


def test_a_forward_with_gradients_is_counted_once_and_its_backward_not() -> None:
    layer = counting()
    layer(torch.ones(3)).sum().backward()
    assert counted(layer.window) == [1]


def test_a_forward_without_gradients_is_not_counted() -> None:
    layer = counting()
    with torch.no_grad():
        layer(torch.ones(3))
    with torch.inference_mode():
        layer(torch.ones(3))
    layer.eval()
    with torch.no_grad():
        layer(torch.ones(3))
    assert layer.forwards == 3
    assert counted(layer.window) == []


@pytest.mark.parametrize("says_training", [True, False])
@pytest.mark.parametrize("gradients", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_of_a_module_in_training_mode_is_not_counted(gradients: Any, says_training: bool) -> None:
    """A validation under `no_grad` without `model.eval()` was counted as training steps."""
    layer = counting(says_training=says_training)
    layer(torch.ones(3)).sum().backward()
    with gradients():
        layer(torch.ones(3))
    layer(torch.ones(3)).sum().backward()
    assert counted(layer.window) == [1, 3]


def test_a_forward_with_gradients_of_a_module_that_says_that_it_evaluates_is_not_counted() -> None:
    layer = counting(says_training=True).eval()
    layer(torch.ones(3))
    layer.train()
    layer(torch.ones(3))
    assert counted(layer.window) == [2]


def test_evaluation_between_steps_leaves_the_window_as_it_was() -> None:
    layer = counting(num_steps=2)
    layer(torch.ones(3))
    layer.eval()
    with torch.no_grad():
        for _ in range(3):
            layer(torch.ones(3))
    layer.train()
    layer(torch.ones(3))
    assert counted(layer.window) == [1, 5]


@pytest.mark.parametrize("says_training", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_under_activation_checkpointing_is_not_counted(use_reentrant: bool, says_training: bool) -> None:
    layer = counting(says_training=says_training)
    x = torch.ones(3, requires_grad=True)
    for step in range(2):
        out = checkpoint(layer, x, use_reentrant=use_reentrant)
        assert len(counted(layer.window)) == step + 1
        out.sum().backward()
    assert layer.forwards == 4  # forward 2 and forward 4 were recomputations
    assert counted(layer.window) == [1, 3]
    assert layer.weight.grad is not None


class OwnCheckpoint(torch.autograd.Function):
    """A framework's own checkpoint: the context has another name, and an inner function refers to it."""

    @staticmethod
    def forward(context: Any, run: Any, x: Tensor) -> Tensor:
        def remember() -> None:
            context.run = run

        remember()
        context.save_for_backward(x)
        with torch.no_grad():
            found: Tensor = run(x)
        return found

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        x = context.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            context.run(x).backward(gradient)
        return None, x.grad


REENTRANT: dict[str, Callable[..., Tensor]] = {
    "torch's": partial(checkpoint, use_reentrant=True),
    "own": OwnCheckpoint.apply,
    "nested": lambda run, x: checkpoint(partial(OwnCheckpoint.apply, run), x, use_reentrant=True),
    "in another": lambda run, x: checkpoint(partial(OwnCheckpoint.apply, run), x, use_reentrant=False),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("how", REENTRANT)
def test_a_reentrant_checkpoint_is_counted_once_in_training_and_never_in_an_evaluation(how: str) -> None:
    """Its first forward has no gradients, like an evaluation of a module that is still in training mode."""
    layer, x = counting(num_steps=9, says_training=True), torch.ones(3, requires_grad=True)
    wanted = []
    for _ in range(2):
        wanted.append(layer.forwards + 1)
        REENTRANT[how](layer, x).sum().backward()
        for gradients in (torch.no_grad, torch.inference_mode):
            with gradients():
                REENTRANT[how](layer, x)  # x still requires a gradient
                REENTRANT[how](layer, torch.ones(3))
    assert layer.forwards > len(wanted) * 5
    assert counted(layer.window) == wanted


def test_a_checkpoint_through_which_no_gradient_goes_back_is_no_step() -> None:
    layer = counting(says_training=True)
    OwnCheckpoint.apply(layer, torch.ones(3))
    assert counted(layer.window) == []


def test_an_evaluation_beside_a_reentrant_checkpoint_in_another_thread_is_not_counted() -> None:
    layer, other = counting(says_training=True), Counting(LoadWindow(1, 2, 4), says_training=True)

    def evaluate() -> None:
        with torch.no_grad():
            other(torch.ones(3))

    def run(x: Tensor) -> Tensor:
        at_once(evaluate)
        found: Tensor = layer(x)
        return found

    checkpoint(run, torch.ones(3, requires_grad=True), use_reentrant=True).sum().backward()
    assert (other.forwards, counted(other.window), counted(layer.window)) == (2, [], [1])


def test_a_forward_that_is_given_a_context_of_no_graph_is_no_step() -> None:
    layer = counting(says_training=True)
    for context in (torch.autograd.function.FunctionCtx(), SimpleNamespace(save_for_backward=lambda *_: None)):
        context.save_for_backward = lambda *_: None
        OwnCheckpoint.forward(context, layer, torch.ones(3, requires_grad=True))
    assert layer.forwards == 2
    assert counted(layer.window) == []


def test_recomputation_inside_a_nested_checkpoint_is_not_counted() -> None:
    layer = counting(says_training=True)
    inner = partial(checkpoint, layer, use_reentrant=False)
    checkpoint(inner, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()
    assert layer.forwards >= 2
    assert counted(layer.window) == [1]


def test_each_micro_batch_of_an_accumulated_gradient_is_a_step() -> None:
    layer = counting(num_steps=8)
    for _ in range(2):
        for _ in range(3):
            layer(torch.ones(3)).sum().backward()
        layer.zero_grad()
    assert counted(layer.window) == [1, 2, 3, 4, 5, 6]


# --- compiled ---------------------------------------------------------------------------------------------------


class Compiled(nn.Module):
    """Two layers and two micro-batches in one graph; the counts come from the input."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, **options))
        self.window = LoadWindow(2, 2, 99)

    def forward(self, x: Tensor) -> Tensor:  # [2] -> [2]
        for micro_batch in range(2):
            for layer in range(2):
                counts = (x.detach() + 10 * layer + 100 * micro_batch).to(torch.int64)
                self.window.add(layer, counts, training=self.training)
        return (x * self.weight).sin()


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "plain": lambda run, x: run(x),
    "checkpoint": lambda run, x: checkpoint(run, x, use_reentrant=False),
    "reentrant checkpoint": lambda run, x: checkpoint(run, x, use_reentrant=True),
    "own checkpoint": OwnCheckpoint.apply,
}
CASES = [
    ("eager", False),
    pytest.param("eager", True, marks=pytest.mark.long),
    pytest.param("aot_eager", False, marks=pytest.mark.long),
    ("aot_eager", True),
]


def trained(run: Callable[[Tensor], Tensor], layer: nn.Module) -> None:
    """Run three iterations, each followed by evaluations; training forward n has input n."""
    for number in range(3):
        run(torch.full((2,), float(number), requires_grad=True)).sum().backward()
        with torch.no_grad():
            run(torch.full((2,), 7.0, requires_grad=True))
        layer.eval()
        run(torch.full((2,), 8.0, requires_grad=True))
        layer.train()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("part", ["all", "inside"])
@pytest.mark.parametrize(("backend", "fullgraph"), CASES)
def test_a_compiled_forward_is_counted_as_it_is_otherwise(how: str, part: str, backend: str, fullgraph: bool) -> None:
    """A full graph was refused because of an operation unknown to the compiler; other graphs were broken up."""
    torch._dynamo.reset()
    layer, way = Compiled(), WAYS[how]
    whole = part == "all"
    if whole and how == "own checkpoint":
        fullgraph = False  # torch makes no full graph of a user's autograd function
    inner = layer if whole else torch.compile(layer, backend=backend, fullgraph=fullgraph)
    run = partial(way, inner)
    trained(torch.compile(run, backend=backend, fullgraph=fullgraph) if whole else run, layer)
    wanted = [number + 100 * micro_batch for number in range(3) for micro_batch in range(2)]
    assert layer.window.load()[..., 0].tolist() == [[count, count + 10] for count in wanted]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_forward_of_inductor_is_counted_and_the_window_is_not_copied() -> None:
    """The compiler copies the arguments that an operation writes to, unless it finds that it need not."""
    torch._dynamo.reset()
    layer = Compiled()
    layer.window = LoadWindow(2, 2, 20_000)  # 640 kB
    run = torch.compile(partial(WAYS["checkpoint"], layer), fullgraph=True)
    trained(run, layer)
    assert (layer.window.seen, layer.window.load()[:, 0, 0].tolist()) == (6, [0, 100, 1, 101, 2, 102])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run(torch.ones(2, requires_grad=True))
    assert layer.window.seen == 8
    assert sum(max(0, event.self_cpu_memory_usage) for event in profiled.events()) < 100_000


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_evaluation_inside_of_a_compiled_training_step_is_not_counted_or_refused(backend: str) -> None:
    torch._dynamo.reset()
    layer = Compiled()

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = layer(x)
        return (layer.weight * x).sum() + seen.sum()

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    if backend == "eager":
        compiled(torch.ones(2)).backward()
    else:  # the compiler runs the whole graph without gradients, in a function of its own
        with pytest.raises(DistplbError, match="a forward without gradients was compiled as a part of one with gradie"):
            compiled(torch.ones(2)).backward()
    assert layer.window.seen == 0
    layer.eval()
    torch.compile(run, backend=backend, fullgraph=True)(torch.ones(2)).backward()
    assert layer.window.seen == 0


# --- by the layers themselves -----------------------------------------------------------------------------------


class Handle:
    """A handle for `MoELayer.counts` to return; counts its removals."""

    def __init__(self) -> None:
        self.removed = 0

    def remove(self) -> None:
        self.removed += 1


def routing(*returned: Any) -> Routing:
    """A routing with one layer for each value; the layer's `counts` returns or raises it."""

    def subscribe(result: Any, tell: Any) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    rows = {"w": torch.zeros(4, 2)}
    return Routing(
        [
            MoELayer(name=f"moe.{number}", experts=rows, router=rows, counts=partial(subscribe, result))
            for number, result in enumerate(returned)
        ]
    )


@pytest.mark.parametrize("kind", [tuple, list])
def test_all_that_layers_subscribed_with_is_removed_by_close(kind: type) -> None:
    """The handles in a tuple were not removed, so their hooks went on counting."""
    handles = [Handle() for _ in range(4)]
    layers = routing(handles[0], kind(handles[1:]), None, kind())
    for times in (1, 2):
        layers.window(4, 0)
        assert [handle.removed for handle in handles] == [times - 1] * 4
        layers.close()
        layers.close()
        assert [handle.removed for handle in handles] == [times] * 4


@pytest.mark.parametrize("returned", [True, "hook", [None], (Handle(), 3)])
def test_what_cannot_be_removed_is_refused_and_what_was_subscribed_before_is_removed(returned: Any) -> None:
    first = Handle()
    with pytest.raises(DistplbError, match=r"moe\.1: counts returned .*; return a handle with remove\(\), a sequence"):
        routing(first, returned).window(4, 0)
    assert first.removed == 1


def test_of_layers_that_subscribed_before_one_that_fails_nothing_is_left() -> None:
    first = Handle()
    with pytest.raises(RuntimeError, match="no such module"):
        routing(first, RuntimeError("no such module")).window(4, 0)
    assert first.removed == 1


# --- on a device ------------------------------------------------------------------------------------------------


META_COUNTS = torch.ones(2, dtype=torch.int64, device="meta")  # not on the CPU, and without data


@pytest.fixture
def meta_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow counts without values: apart from the CPU, meta is the only device that every machine has."""
    monkeypatch.setattr("distplb.train.window._VALUELESS", ())


BUFFERS = ("_counts", "_numbers", "_written", "_edges", "_rows")


def devices(window: LoadWindow) -> set[str]:
    return {getattr(window, name).device.type for name in BUFFERS}


@pytest.mark.usefixtures("meta_for_a_gpu")
def test_a_window_without_a_device_goes_where_the_first_counts_are() -> None:
    """It stayed on the CPU, so that the first counts on a GPU were an error of torch."""
    window = LoadWindow(1, 2, 4)
    assert (window.seen, window.load().shape, devices(window)) == (0, (0, 1, 2), {"cpu"})
    window.rename(torch.tensor([[1, 0]]))
    window.clear()
    window.add(0, META_COUNTS, training=True)
    assert devices(window) == {"meta"}
    window.clear()
    window.add(0, META_COUNTS, training=True)
    with pytest.raises(DistplbError, match=r"counts are on cpu, the window on meta; pass LoadWindow\(device='cpu'\)"):
        window.add(0, torch.ones(2), training=True)


@pytest.mark.usefixtures("meta_for_a_gpu")
def test_first_counts_of_two_threads_have_the_window_go_along_once() -> None:
    for _ in range(200):
        window, met, refused = LoadWindow(1, 2, 4), threading.Barrier(2), []

        def add(window: LoadWindow = window, met: threading.Barrier = met, refused: list[Any] = refused) -> None:
            met.wait()
            try:
                window.add(0, META_COUNTS, training=True)
            except Exception as error:
                refused.append(error)

        at_once(add, add)
        assert not refused
        assert devices(window) == {"meta"}


@needs_cuda
def test_what_a_window_has_drawn_goes_along_to_its_device() -> None:
    window = LoadWindow(1, 2, 3, seed=5)
    window.clear()
    for number in range(30):
        window.add(0, torch.full((2,), number, device="cuda"), training=True)
    assert window.steps().tolist() == in_time(oracle_sample(3, 30, seed=5, clears=1))
    assert window.load().device.type == "cuda"


@pytest.mark.usefixtures("meta_for_a_gpu")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_elsewhere_than_on_the_device_that_was_passed_are_refused(device: str) -> None:
    window = LoadWindow(1, 2, 4, device=device)
    other = "cpu" if device == "meta" else "meta"
    with pytest.raises(DistplbError, match=rf"counts are on {other}, the window on {device}; pass LoadWindow\(device="):
        window.add(0, META_COUNTS.new_ones(2, device=other), training=True)
    assert devices(window) == {device}


@pytest.mark.usefixtures("meta_for_a_gpu")
def test_a_compiled_forward_has_the_window_go_along_and_a_full_graph_says_what_to_do() -> None:
    torch._dynamo.reset()
    layer, x = Compiled(device="meta"), torch.ones(2, device="meta")
    full = torch.compile(layer, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"pass LoadWindow\(device=\.\.\.\), or run an uncompiled"):
        full(x)
    assert devices(layer.window) == {"cpu"}
    torch.compile(layer, backend="eager")(x)
    assert devices(layer.window) == {"meta"}
    full(x)


@pytest.mark.usefixtures("meta_for_a_gpu")
def test_a_window_of_layers_on_the_host_counts_where_their_forwards_run() -> None:
    """If FSDP2 kept experts on the CPU between forwards, the window was there, but the counts were on a GPU."""
    tellers: list[Any] = []
    rows = {"w": torch.zeros(2, 2)}
    layers = Routing([MoELayer(name="moe", experts=rows, router=rows, counts=tellers.append)])
    window = layers.window(4, 0)
    tellers[0](META_COUNTS, training=True)
    assert devices(window) == {"meta"}


@needs_cuda
def test_a_capture_refuses_a_window_that_would_have_to_go_along() -> None:
    window, graph = LoadWindow(1, 2, 3), torch.cuda.CUDAGraph()
    counts = torch.ones(2, dtype=torch.int64, device="cuda")
    said = []
    with torch.cuda.graph(graph):
        try:
            window.add(0, counts, training=True)
        except DistplbError as error:
            said.append(str(error))
    assert "while a CUDA graph is captured" in said[0]
    window.add(0, counts, training=True)
    assert window.load().tolist() == [[[1, 1]]]


@needs_cuda
def test_what_a_capture_decides_holds_for_every_replay() -> None:
    """A graph captured without gradients never counts, wherever it is replayed; one captured with them always does."""
    window = LoadWindow(1, 2, 9, device="cuda")
    counts = torch.ones(2, dtype=torch.int64, device="cuda")
    window.add(0, counts, training=True)
    graphs = {}
    for gradients in (True, False):
        graphs[gradients] = torch.cuda.CUDAGraph()
        with torch.set_grad_enabled(gradients), torch.cuda.graph(graphs[gradients]):
            window.add(0, counts, training=True)
    window.clear()
    for gradients in (True, False):
        with torch.set_grad_enabled(not gradients):
            graphs[gradients].replay()
    assert window.seen == 1


@needs_cuda
def test_a_compiled_forward_counts_on_a_gpu() -> None:
    torch._dynamo.reset()
    layer = Compiled(device="cuda")
    layer.window = LoadWindow(2, 2, 99, device="cuda")
    run = torch.compile(layer, fullgraph=True)
    for number in range(3):
        run(torch.full((2,), float(number), device="cuda", requires_grad=True)).sum().backward()
    assert layer.window.load()[:, 0, 0].tolist() == [0, 100, 1, 101, 2, 102]


@needs_cuda
def test_adding_and_clearing_never_wait_for_the_device() -> None:
    window = LoadWindow(2, 4, 3, device="cuda")
    counts = torch.arange(4, device="cuda")
    window.add(0, counts, training=True)  # the first call may load kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        window.clear()
        for _ in range(5):
            window.add(0, counts, training=True)
            window.add(1, counts.float(), training=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert window.load().tolist() == [[[0, 1, 2, 3]] * 2] * 3


@needs_cuda
def test_adding_can_be_captured_in_a_cuda_graph_and_goes_on_at_every_replay_and_after_every_clear() -> None:
    window = LoadWindow(1, 2, 3, device="cuda")
    counts = torch.zeros(2, dtype=torch.int64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        window.add(0, counts, training=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        window.add(0, counts, training=True)
    for clears in (1, 2):
        window.clear()
        for number in range(30):
            counts.fill_(number)
            graph.replay()
        kept = in_time(oracle_sample(3, 30, clears=clears))
        assert window.steps().tolist() == kept
        assert window.load()[:, 0].tolist() == [[number, number] for number in kept]


def test_an_evaluation_elsewhere_does_not_take_the_window_along() -> None:
    """Tensors moved in `torch.inference_mode()` could not be written; after another device it did not move back."""
    window, there = LoadWindow(1, 3, 2), torch.ones(3, dtype=torch.int64, device="meta")
    for evaluating in (torch.inference_mode(), torch.no_grad()):
        with evaluating:
            window.add(0, there)
    window.add(0, there, training=False)
    assert window.load().device.type == "cpu"
    window.add(0, torch.tensor([1, 2, 3]), training=True)
    window.clear()
    window.add(0, torch.tensor([4, 5, 6]), training=True)
    assert window.load().tolist() == [[[4, 5, 6]]]


# --- several EP groups ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_groups", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 7, 24, 33])
def test_each_block_of_steps_has_each_group_once(num_groups: int, rows: int) -> None:
    steps = torch.arange(rows) * 5 + 2
    found = group_of_steps(steps, num_groups, seed=4)
    assert found.shape == (rows,)
    assert found.dtype == torch.int64
    assert torch.equal(found, group_of_steps(steps, num_groups, seed=4))
    for block in found.split(num_groups):
        assert len(set(block.tolist())) == len(block)
        assert set(block.tolist()) <= set(range(num_groups))


def test_every_group_stands_for_every_row_alike_over_seeds_and_over_steps() -> None:
    rows, trials = 7, 600
    steps = torch.arange(rows)
    by_seed = torch.stack([group_of_steps(steps, 4, seed) for seed in range(trials)])
    by_step = torch.stack([group_of_steps(steps + rows * trial, 4, 0) for trial in range(trials)])
    for found in (by_seed, by_step):  # [trials, rows]
        counts = torch.stack([(found == group).sum(0) for group in range(4)])
        assert deviation(counts, 1 / 4, trials).abs().max() < 3.5
        assert len({tuple(row[:4].tolist()) for row in found}) == 24  # all orders of a block


def test_large_seeds_differ_in_all_their_bits() -> None:
    orders = {tuple(group_of_steps(torch.arange(32), 8, seed).tolist()) for seed in (0, 1, -1, 2**32, 2**40)}
    assert len(orders) == 5


def test_less_than_one_group_is_refused() -> None:
    with pytest.raises(DistplbError, match="num_groups is 0; pass the number of EP groups, at least 1"):
        group_of_steps(torch.arange(3), 0, seed=0)
