"""The benchmarks of steps, moves and replays: their pure parts, and each of them end to end on little data.

Shapes: N sequences, S steps, L layers, E experts.
"""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from benchmark_modules import imported
from torch import Tensor

import distplb
from distplb import Placement, Trace

sequences, tables, traces = (imported(f"shared.{name}") for name in ("sequences", "tables", "traces"))
bench_steps, bench_prices = imported("planning.bench_steps"), imported("planning.bench_prices")
bench_replay, bench_windows = imported("study.bench_replay"), imported("study.bench_windows")
bench_default_price = imported("train.bench_default_price")


def counts(*shape: int, seed: int = 0) -> Tensor:
    """Draw token counts with some hot experts."""
    generator = np.random.default_rng(seed)
    popular = generator.lognormal(0, 1, shape[1:])
    return torch.from_numpy(generator.poisson(20 * popular, shape).astype(np.int64))


@pytest.mark.parametrize("module", [sequences, tables, bench_windows], ids=lambda module: module.__name__)
def test_examples_print_what_they_say(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


# --- sequences and steps ----------------------------------------------------------------------------------------


def test_halves_share_no_sequence_and_lose_none() -> None:
    loads = torch.arange(21).view(21, 1, 1)  # the only count of a sequence identifies it
    first, second = sequences.halves(loads, seed=3)
    assert sorted(torch.cat([first, second]).flatten().tolist()) == list(range(21))
    assert (len(first), len(second)) == (10, 11)
    assert not torch.equal(first, sequences.halves(loads, seed=4)[0])
    assert torch.equal(first, sequences.halves(loads, seed=3)[0])


def test_a_step_holds_no_sequence_twice() -> None:
    loads = (1 << torch.arange(20)).view(20, 1, 1)  # a sum shows which sequences are in it
    steps = sequences.steps_of(loads, 50, 8, seed=0)
    assert steps.shape == (50, 1, 1)
    assert all(bin(total).count("1") == 8 for total in steps.flatten().tolist())
    assert len(set(steps.flatten().tolist())) > 40


def test_more_sequences_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(SystemExit, match="a step of 5 sequences cannot be drawn from a set of 4"):
        sequences.steps_of(counts(4, 1, 2), 1, 5, seed=0)


def test_planned_and_judged_steps_are_of_different_sequences() -> None:
    loads = (1 << torch.arange(40)).view(40, 1, 1)
    seen, unseen = bench_steps.drawn(loads, bench_steps.Setting(8, 8), 30, 30, split=1)

    def used(steps: Tensor) -> int:
        return int(np.bitwise_or.reduce(steps.flatten().numpy()))

    assert used(seen) & used(unseen) == 0
    assert bin(used(seen) | used(unseen)).count("1") > 30


@pytest.mark.parametrize("keep_steps", [False, True])
def test_rescaling_gives_every_expert_the_same_mean_and_keeps_totals(keep_steps: bool) -> None:
    load = counts(30, 3, 8)
    load[:, 1, 5] = 0  # an expert that no token ever chose
    rescaled = sequences.rescaled(load, keep_steps=keep_steps)
    assert rescaled.dtype == torch.int64
    assert int(rescaled.min()) >= 0
    assert torch.equal(rescaled.sum((0, 2)), load.sum((0, 2)))
    totals = rescaled.sum(0)
    assert int((totals.amax(1) - totals.amin(1)).max()) <= 1
    # Fluctuations stay: an expert's busiest steps are still its busiest.
    one, other = (torch.corrcoef(torch.stack([load[:, 0, 3], rescaled[:, 0, 3]]).double())).flatten()[1:3].tolist()
    assert min(one, other) > 0.9


def test_rescaled_steps_keep_their_tokens_where_that_is_asked() -> None:
    load = counts(30, 3, 8) * torch.arange(1, 31)[:, None, None]  # steps of very different size
    rescaled = sequences.rescaled(load, keep_steps=True)
    assert int((rescaled.sum(2) - load.sum(2)).abs().max()) <= 8  # fractions of 8 experts
    assert int((sequences.rescaled(load).sum(2) - load.sum(2)).abs().max()) > 8


# --- windows ----------------------------------------------------------------------------------------------------


def test_weights_halve_with_age() -> None:
    assert bench_windows.weights(7, half_life=2).tolist() == [32, 45, 64, 91, 128, 181, 256]
    load = counts(7, 1, 4)
    weighted = bench_windows.weighted([counts(7, 1, 4, seed=1), load], half_life=2)
    assert torch.equal(weighted[4], 128 * load[4])


def test_several_windows_are_the_last_ones_in_their_order() -> None:
    past = [counts(4, 1, 4, seed=seed) for seed in range(3)]
    assert torch.equal(bench_windows.last_windows(past, 2), torch.cat(past[1:]))
    assert torch.equal(bench_windows.last_windows(past[:1], 2), past[0])


def test_a_line_is_followed_and_what_falls_below_nothing_is_nothing() -> None:
    steps = torch.arange(10).double()
    load = torch.stack([100 + 4 * steps, 50 - 5 * steps], 1)[:, None]  # [S, 1, 2]
    # The mean of steps 10 to 15 is 12.5.
    assert bench_windows.forecast(load, every=6).tolist() == pytest.approx(torch.tensor([[150.0, 0.0]]))


def test_a_forecast_keeps_how_steps_differ() -> None:
    load = torch.tensor([[[10, 90]], [[20, 80]], [[30, 70]], [[40, 60]]])
    forecast = bench_windows.extrapolated([load], number=1, every=4).double() / bench_windows.FINER
    assert forecast.mean(0).tolist() == pytest.approx(torch.tensor([[65.0, 35.0]]))
    assert (forecast[:, 0, 0] / load[:, 0, 0]).tolist() == pytest.approx([2.6] * 4, abs=0.01)


def test_a_planner_that_remembers_gets_what_is_prepared_of_all_windows() -> None:
    planned = []

    def planner(load: Tensor, current: Placement) -> Placement:
        planned.append(load)
        return current

    current = Placement.contiguous(1, 4, 2)
    remembering = bench_windows.Remembering(lambda past: torch.cat(list(past)), planner)
    parts = [counts(2, 1, 4, seed=seed) for seed in range(3)]
    assert all(remembering(part, current) is current for part in parts)
    assert [len(load) for load in planned] == [2, 4, 6]


@pytest.mark.parametrize(
    ("ratio", "sentence"),
    [([0.8, 0.82, 0.81], "last window by more than two standard errors of the mean over all traces: other"),
     ([0.5, 1.4, 0.9], "the last window stays unchanged")],
)  # fmt: skip
def test_a_choice_of_steps_wins_beyond_doubt_or_not(ratio: list[float], sentence: str) -> None:
    excess = {str(nth): {bench_windows.LAST: 2.0, "other": 2 * one} for nth, one in enumerate(ratio)}
    assert sentence in bench_windows.report(excess, dict.fromkeys(excess, "recorded"))


# --- moves, models ----------------------------------------------------------------------------------------------


def test_wobbling_steps_add_up_to_the_load() -> None:
    load = counts(1, 3, 16)[0] * 1000
    steps = bench_prices.wobbling_steps(load, 32, 0.3, seed=0)
    assert steps.shape == (32, 3, 16)
    assert torch.equal(steps.sum(2), (load.sum(1) // 32).expand(32, 3))
    ratio = steps.sum(0).double() / load
    assert float((ratio.log().mean()).abs()) < 0.2
    assert 0.2 < float((32 * steps / load).log().std()) < 0.45


def test_a_disturbed_load_is_as_far_away_as_asked() -> None:
    load = torch.full((20, 256), 100_000)
    logarithm = (bench_prices.disturbed(load, 0.1, seed=0).double() / load).log()
    assert float(logarithm.mean()) == pytest.approx(0, abs=0.005)
    assert float(logarithm.std()) == pytest.approx(0.1, abs=0.005)


def test_a_cluster_is_chosen_by_the_number_of_experts() -> None:
    assert traces.cluster_of(64, 8) == distplb.Topology(2, 4)
    assert traces.cluster_of(16, 8) == distplb.Topology(1, 2)
    with pytest.raises(SystemExit, match="32 experts cannot be divided evenly over 6 GPUs of 2 nodes"):
        traces.cluster_of(32, 5)


def test_a_folder_of_traces_is_several_and_a_folder_of_parts_is_one(tmp_path: Path) -> None:
    trace = traces.as_trace(counts(3, 2, 4))
    trace.save(tmp_path / "one.npz")
    trace.save(tmp_path / "two.npz")
    with distplb.TraceWriter(tmp_path / "parts") as writer:
        writer.add(trace.load, trace.placements[0], [0, 1, 2])
    recorded = list(traces.recorded_traces([tmp_path, tmp_path / "parts", tmp_path / "two.npz"]))
    assert [name for name, _ in recorded] == ["one", "two", "parts", "two"]
    assert all(isinstance(one, Trace) and torch.equal(one.load, trace.load) for _, one in recorded)


# --- end to end -------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    """Write small files under the names of the recorded ones."""
    for nth, text in enumerate(("code", "law", "prose")):
        np.save(tmp_path / f"deepseek-v2-lite_{text}_steps.npy", counts(30, 2, 32, seed=nth).numpy())
    for nth, name in enumerate((bench_prices.BASE, bench_prices.BEFORE, bench_prices.AFTER)):
        np.save(tmp_path / f"deepseek-v3_{name}.npy", 100 * counts(1, 2, 256, seed=nth)[0].numpy())
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call a benchmark's `main` with a command line."""

    def runs(module: ModuleType, *words: object) -> None:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        module.main()

    return runs


def test_steps_end_to_end(loads: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    output = loads / "steps.md"
    run(
        bench_steps, "--loads", loads, "--candidates", 1, "--steps", 4, "--judged", 4, "--splits", 1, "--output", output
    )
    text = output.read_text()
    assert text == capsys.readouterr().out
    assert text.count("\n## ") == 2 + 12
    assert "`python -m benchmarks.planning.bench_steps --loads DIR --candidates 1" in text
    assert str(loads) not in text


def test_moves_end_to_end(loads: Path, run: Callable[..., None]) -> None:
    pytest.importorskip("matplotlib")
    output = loads / "moves.md"
    few = ("--candidates", 2, "--prices", 0, 0.01, "--seeds", 1, "--repeats", 2)
    run(bench_prices, "--loads", loads, *few, "--output", output)
    text = output.read_text()
    assert "# Balance against moves" in text
    assert text.count("ours, priced, K = 2") == 4 * 2
    assert "Load average" in text
    assert str(loads) not in text
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_replay_end_to_end(loads: Path, run: Callable[..., None]) -> None:
    pytest.importorskip("matplotlib")
    traces.as_trace(counts(24, 2, 16)).save(loads / "short.npz")
    output, table = loads / "replay.md", loads / "steps.csv"
    few = ("--traces", loads / "short.npz", "--no-made", "--every", 8, "--candidates", 1)
    run(bench_replay, *few, "--output", output, "--csv", table)
    text = output.read_text()
    assert "## Targets on recorded traces" in text
    assert "short, every expert rescaled to the same mean" in text
    assert str(loads) not in text
    assert output.with_suffix(".png").stat().st_size > 10_000
    lines = table.read_text().splitlines()
    # Two traces under static, greedy, the sum, the steps, and three prices.
    assert len(lines) == 1 + 2 * 7 * 24
    own = [line.split(",") for line in lines if line.startswith("short,greedy,")]
    assert [int(line[2]) for line in own] == list(range(24))
    assert {int(line[2]) for line in own if int(line[4])} <= {8, 16}


def test_default_end_to_end(loads: Path, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "STEPS", 24)
    monkeypatch.setattr(traces, "GENERATED", traces.Size(steps=24, layers=1, experts=16, tokens=1000))
    monkeypatch.setattr(traces, "SHIPPED", loads)
    traces.as_trace(counts(24, 2, 16)).save(loads / "short.npz")
    monkeypatch.setattr(bench_default_price, "SIZES", ((1, 2, 16),))
    monkeypatch.setattr(bench_default_price, "EVEN_STEPS", (4, 16))
    output = loads / "default.md"
    few = ("--loads", loads, "--every", 8, "--candidates", 1, "--windows", 2)
    run(bench_default_price, *few, "--output", output)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.read_text().splitlines()]
    even = [line for line in lines if line and line[0].startswith("2 GPUs on 1")]
    assert len(even) == 4
    for _, slots, static, _, moved, left, none in even:  # the default price alone allows moves, and none is worth it
        assert 0 < int(moved) < int(slots) == 2 * 2 * 16
        assert (left, none) == (static, "0")
    assert len([line for line in lines if line and line[0].startswith("short")]) == 2
    assert str(loads) not in output.read_text()


def test_windows_end_to_end(
    loads: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "STEPS", 24)
    traces.as_trace(counts(24, 2, 16)).save(loads / "short.npz")
    run(bench_windows, "--traces", loads / "short.npz", "--loads", loads, "--no-made", "--every", 8)
    text = capsys.readouterr().out
    assert text.count("mean of the") == 2
    assert "sequences of three texts together" in text
    assert "Lowest mean over all 3 traces" in text
