"""The benchmark of splits: its loads, the methods that distplb is compared with, and a run on little data.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

import doctest
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from benchmark_modules import imported

from distplb import Topology
from distplb.splitting.split import split

pytest.importorskip("numba")
bench, baselines, loads = (imported(f"splitting.{name}") for name in ("bench_splitting", "baselines", "loads"))
SIZE = loads.Size(gpus=16, experts=64, choices=4096)


def gpu_imbalance(counts: np.ndarray, gpus: int) -> float:
    load = counts.sum(0).reshape(gpus, -1).sum(1)
    return float(load.max() / load.mean())


@pytest.mark.parametrize("module", [bench, baselines], ids=lambda module: module.__name__)
def test_examples_print_what_they_say(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


# --- loads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imbalance", bench.IMBALANCES)
def test_power_laws_have_the_imbalance_that_they_say(imbalance: float) -> None:
    for step in loads.power_law(imbalance, bench.SIZE, 3):
        assert step.counts.shape == (64, 256)
        assert step.counts.sum() == 64 * 8192 * 8
        assert gpu_imbalance(step.counts, 64) == pytest.approx(imbalance, rel=0.015)


@pytest.mark.parametrize("max_violation", bench.MAX_VIOLATIONS)
def test_log_normal_loads_have_the_violation_that_they_say(max_violation: float) -> None:
    for step in loads.log_normal(max_violation, bench.SIZE, 3):
        tokens = step.counts.sum(0)
        assert tokens.max() / tokens.mean() - 1 == pytest.approx(max_violation, rel=0.03, abs=0.02)


@pytest.mark.parametrize("name", loads.WORKLOADS)
def test_a_step_of_a_workload_depends_on_name_seed_and_step_alone(name: str) -> None:
    steps = list(loads.workload(name, SIZE, 3, seed=5))
    for number, step in enumerate(steps, start=1):
        assert np.array_equal(step.counts, loads.step_of(name, SIZE, number, seed=5))
        assert np.array_equal(step.before, loads.step_of(name, SIZE, number - 1, seed=5).sum(0))
        assert abs(int(step.counts.sum()) - SIZE.gpus * SIZE.choices) < SIZE.gpus
        assert not np.array_equal(step.counts, loads.step_of(name, SIZE, number, seed=6))


def test_workloads_are_what_their_names_say() -> None:
    def of(name: str, step: int = 1) -> np.ndarray:
        return loads.step_of(name, SIZE, step)

    def hot(name: str, step: int = 1) -> set[int]:
        tokens = of(name, step).sum(0)
        return set(np.flatnonzero(tokens > 3 * np.median(tokens)).tolist())

    assert gpu_imbalance(of("balanced"), 16) < 1.05
    assert len(hot("some experts hot")) == 4
    assert len({expert // 4 for expert in hot("experts of one GPU hot")}) == 1
    assert len({expert // 4 for expert in hot("as many hot, spread")}) == len(hot("as many hot, spread")) == 4
    sources = of("unequal sources").sum(1)
    assert sources.max() > 2 * sources.min()
    empty = of("experts and GPUs without tokens")
    assert (empty.sum(0) == 0).sum() >= 16
    assert (empty.sum(0).reshape(16, 4).sum(1) == 0).sum() >= 2
    assert (empty.sum(1) == 0).sum() == 2
    assert not hot("rotating hot spot", 1) & hot("rotating hot spot", 2)
    assert [len(hot("bursts", step)) > 0 for step in range(3, 9)] == [False, True, False, False, False, True]


def test_recorded_steps_are_sequences_times_16(tmp_path: Path) -> None:
    sequences = np.random.default_rng(0).integers(1, 50, (10, 3, 8))
    np.save(tmp_path / "deepseek-v2-lite_prose_steps.npy", sequences)
    steps = list(loads.recorded(tmp_path, gpus=4, size=10, draws=2))
    assert len(steps) == 2 * 3
    for number, step in enumerate(steps):  # all ten sequences are in each step
        assert step.counts.shape == (4, 8)
        assert np.array_equal(step.counts.sum(0), 16 * sequences.sum(0)[number % 3])
        assert np.array_equal(step.before, step.counts.sum(0))


# --- methods ----------------------------------------------------------------------------------------------------


def cases() -> list:
    made = []
    for per_node, slots in ((16, 2), (16, 1), (4, 2), (4, 1), (16, 0)):
        topology = Topology(SIZE.gpus // per_node, per_node)
        for name in loads.WORKLOADS:
            steps = list(loads.workload(name, SIZE, 1))
            made.append(bench.Case(name, topology, SIZE.experts, slots, lambda steps=steps: iter(steps)))
    return made


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.text)
def test_every_split_is_legal_and_as_even_as_its_method_says(case) -> None:
    (step,) = case.steps()
    tokens, cluster = step.counts.sum(0), case.cluster
    found = bench.splits(case, step)  # each Split checks itself
    load = {name: each.load.numpy() for name, each in found.items()}
    home = cluster.loads(tokens)
    means = np.array([float(mean) for mean in cluster.node_means(tokens)])[cluster.node]
    assert np.array_equal(load[bench.NO_REPLICAS], home)
    assert (abs(load[bench.WHOLE] - means) < 1).all()
    assert (load[bench.LONGEST] <= np.ceil(1.1 * means) + 1e-6).all()
    within_slots = (bench.DISTPLB, bench.NO_REPLICAS, bench.THRESHOLD, bench.THRESHOLD_FIRST)
    assert all(found[name].replica.shape[1] == case.slots for name in within_slots)
    node = torch.from_numpy(cluster.node)
    for each in found.values():
        source, target = each.pushes.nonzero(as_tuple=True)
        assert torch.equal(node[source], node[target])
    per_gpu = len(tokens) // cluster.num_gpus + case.slots  # EPLB places homes and replicas alike
    assert all(int(found[name].quota.gt(0).sum(0).amax()) <= per_gpu for name in (bench.EVENLY, bench.FLOW))
    assert load[bench.THRESHOLD].max() <= home.max()
    assert load[bench.FLOW].max() <= load[bench.EVENLY].max() + 4  # the program is optimal up to whole tokens
    if case.slots == 0:
        assert all(np.array_equal(load[name], home) for name in within_slots)


def test_a_receiver_has_experts_of_one_giver() -> None:
    case = cases()[4]
    (step,) = case.steps()
    pushes = bench.splits(case, step)[bench.WHOLE].pushes
    assert int(pushes.gt(0).sum(0).amax()) == 1


def test_a_step_without_tokens_needs_nothing() -> None:
    cluster, nothing = baselines.Cluster(np.array([0, 0, 1, 1]), np.array([0, 0]), 1), np.zeros(4, np.int64)
    held = baselines.planned_copies(nothing, cluster)
    for quota in (
        baselines.threshold_search(nothing, cluster, lowest=0, gap=1),
        baselines.whole_receivers(nothing, cluster),
        baselines.longest_first(nothing, cluster),
        baselines.shared_evenly(nothing, held),
        baselines.shared_by_flow(nothing, held),
    ):
        assert not quota.any()


def test_the_threshold_search_by_hand() -> None:
    # GPU 0 has 9 too many. GPU 3 has the most room, 5; then GPU 2, 4.
    cluster = baselines.Cluster(np.arange(4), np.zeros(4, np.int64), 1)
    quota = baselines.threshold_search(np.array([19, 10, 6, 5]), cluster, lowest=10, gap=1)
    assert quota[0].tolist() == [10, 0, 4, 5]
    # Without a slot for the second part the threshold rises until one replica suffices.
    two = baselines.Cluster(np.array([0, 1]), np.zeros(2, np.int64), 1)
    assert baselines.threshold_search(np.array([19, 2]), two, lowest=11, gap=1)[0].tolist() == [11, 8]


def test_longest_first_by_hand() -> None:
    # Ceiling 11: the hottest expert first, to the least loaded GPU; the ceiling is that of the node.
    cluster = baselines.Cluster(np.array([0, 0, 1, 2, 3]), np.zeros(4, np.int64), 1)
    quota = baselines.longest_first(np.array([16, 8, 10, 4, 2]), cluster, ceiling=Fraction(11, 10))
    assert quota.tolist() == [[3, 0, 4, 9], [8, 0, 0, 0], [0, 10, 0, 0], [0, 0, 4, 0], [0, 0, 0, 2]]


def test_planned_copies_go_to_the_hottest_share_and_stay_on_their_node() -> None:
    one_node = baselines.Cluster(np.arange(4), np.zeros(4, np.int64), 1)
    held = baselines.planned_copies(np.array([40, 30, 2, 1]), one_node)
    # Four spare slots: 40 becomes 20, 30 becomes 15, then 20 becomes 13.3, and 15 becomes 10.
    assert held.sum(1).tolist() == [3, 3, 1, 1]
    assert (held.sum(0) == 2).all()
    two_nodes = baselines.Cluster(np.arange(4), np.array([0, 0, 1, 1]), 1)
    assert not baselines.planned_copies(np.array([40, 30, 2, 1]), two_nodes)[:2, 2:].any()


# --- text -------------------------------------------------------------------------------------------------------


def figures(imbalance: float, replicas: int, sends: int = 2) -> object:
    return bench.Figures(imbalance, 1.0, replicas, sends, 1, 0.5, 0.0, None)


def test_better_methods_are_told() -> None:
    case = bench.Case("load", Topology(1, 2), 4, 1, lambda: iter(()))
    own = [figures(1.004, 5), figures(1.010, 5), figures(1.004, 5), figures(1.004, 5), figures(1.004, 5)]
    other = [figures(1.004, 4), figures(1.009, 5), figures(1.003, 5), figures(1.000, 9), figures(1.004, 5, sends=1)]
    told = bench.better([bench.Result(case, {bench.DISTPLB: own, "other": other}, [1.005] * 5)])
    assert [cell.strip() for cell in told.splitlines()[2].split("|")[2:-1]] == ["other", "5", "1", "2", "1", "1"]
    assert bench.better([bench.Result(case, {bench.DISTPLB: own}, [1.005] * 5)]) == "None."


def test_tokens_that_cross_gpus_and_nodes() -> None:
    case = bench.Case("load", Topology(2, 1), 2, 1, lambda: iter(()))
    counts = torch.tensor([[6, 1], [4, 1]])
    found = split(counts, [0, 1], topology=Topology(2, 1), engine="cpu")  # nothing can be given to another node
    told = bench.figures_of(case, found, 10, None)
    assert told.between_gpus == told.between_nodes == pytest.approx(5 / 12)
    assert (told.bound, told.imbalance, told.replicas) == (pytest.approx(10 / 6), pytest.approx(10 / 6), 0)


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sequences = np.random.default_rng(0).integers(1, 50, (40, 2, 64))
    np.save(tmp_path / "deepseek-v2-lite_prose_steps.npy", sequences)
    words = ["--loads", str(tmp_path), "--steps", "2", "--draws", "1", "--small", "--output", str(tmp_path / "out.md")]
    monkeypatch.setattr(sys, "argv", ["bench_splitting", *words])
    bench.main()
    text = (tmp_path / "out.md").read_text()
    assert text == capsys.readouterr().out
    assert "--loads DIR --steps 2 --draws 1 --small" in text
    assert str(tmp_path) not in text
    for name in (
        bench.DISTPLB,
        bench.WHOLE,
        bench.FLOW,
        "## Targets",
        "## Where another method is better",
        *loads.WORKLOADS,
    ):
        assert name in text
