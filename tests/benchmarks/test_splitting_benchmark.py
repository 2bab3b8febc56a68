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
from distplb.splitting.split_value import Split

pytest.importorskip("numba")
NAMES = (
    "baselines",
    "bench_splitting",
    "caps",
    "cases",
    "loads",
    "measurement",
    "methods",
    "prices",
    "tables",
    "times",
)
baselines, bench, caps, cases, loads, measurement, methods, prices, tables, times = (
    imported(f"splitting.{name}") for name in NAMES
)
SIZE = loads.Size(gpus=16, experts=64, choices=4096)


def gpu_imbalance(counts: np.ndarray, gpus: int) -> float:
    load = counts.sum(0).reshape(gpus, -1).sum(1)
    return float(load.max() / load.mean())


@pytest.mark.parametrize("module", [baselines, caps, cases, prices, tables], ids=lambda module: module.__name__)
def test_examples_print_what_they_say(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


# --- loads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imbalance", cases.IMBALANCES)
def test_power_laws_have_the_imbalance_that_they_say(imbalance: float) -> None:
    for step in loads.power_law(imbalance, cases.SIZE, 3):
        assert step.counts.shape == (64, 256)
        assert step.counts.sum() == 64 * 8192 * 8
        assert gpu_imbalance(step.counts, 64) == pytest.approx(imbalance, rel=0.015)


@pytest.mark.parametrize("max_violation", cases.MAX_VIOLATIONS)
def test_log_normal_loads_have_the_violation_that_they_say(max_violation: float) -> None:
    for step in loads.log_normal(max_violation, cases.SIZE, 3):
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


def small_cases() -> list:
    made = []
    for per_node, slots in ((16, 2), (16, 1), (4, 2), (4, 1), (16, 0)):
        topology = Topology(SIZE.gpus // per_node, per_node)
        for name in loads.WORKLOADS:
            steps = list(loads.workload(name, SIZE, 1))
            made.append(cases.Case(name, topology, SIZE.experts, slots, lambda steps=steps: iter(steps)))
    return made


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.text)
def test_every_split_is_legal_and_as_even_as_its_method_says(case) -> None:
    (step,) = case.steps()
    tokens, cluster = step.counts.sum(0), case.cluster
    found = methods.splits(case, step)  # each Split checks itself
    load = {name: each.load.numpy() for name, each in found.items()}
    home = cluster.loads(tokens)
    means = np.array([float(mean) for mean in cluster.node_means(tokens)])[cluster.node]
    assert np.array_equal(load[methods.NO_REPLICAS], home)
    assert (abs(load[methods.WHOLE] - means) < 1).all()
    assert (load[methods.LONGEST] <= np.ceil(1.1 * means) + 1e-6).all()
    within_slots = {*methods.OWN, methods.NO_REPLICAS, methods.THRESHOLD, methods.THRESHOLD_FIRST} & found.keys()
    assert all(found[name].replica.shape[1] == case.slots for name in within_slots)
    node = torch.from_numpy(cluster.node)
    for name, each in found.items():
        source, target = each.pushes.nonzero(as_tuple=True)
        assert torch.equal(node[source], node[target]) or name in (methods.LEAVING, methods.PRICED_LEAVING)
    per_gpu = len(tokens) // cluster.num_gpus + case.slots  # EPLB places homes and replicas alike
    assert all(int(found[name].quota.gt(0).sum(0).amax()) <= per_gpu for name in (methods.EVENLY, methods.FLOW))
    assert load[methods.THRESHOLD].max() <= home.max()
    assert load[methods.FLOW].max() <= load[methods.EVENLY].max() + 4  # the program is optimal up to whole tokens
    if case.slots == 0:
        assert all(np.array_equal(load[name], home) for name in within_slots)


def test_a_receiver_has_experts_of_one_giver() -> None:
    case = small_cases()[4]
    (step,) = case.steps()
    pushes = methods.splits(case, step)[methods.WHOLE].pushes
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


# --- prices and caps --------------------------------------------------------------------------------------------


def test_a_split_costs_its_busiest_gpu_and_the_replicas_of_the_gpu_that_pays_most() -> None:
    counts = torch.tensor([[20_000, 0, 0, 0]] * 4)
    quota = torch.tensor([[20_000, 20_000, 20_000, 20_000], [0] * 4, [0] * 4, [0] * 4])
    found = Split(counts, torch.arange(4), quota, torch.tensor([[-1], [0], [0], [0]]))
    # GPU 0 sends one replica to its own node and two to another one; the mean is 20,000.
    assert prices.cost_of(found, Topology(2, 2)) == pytest.approx(1 + (1905 + 2 * 14_815) / 20_000)
    assert prices.cost_of(found, Topology(1, 4)) == pytest.approx(1 + 3 * 1905 / 20_000)
    assert prices.cost_of(found, Topology(1, 4), prices.GRADIENTS_ONLY) == pytest.approx(1 + 1.5 * 1905 / 20_000)
    home = Split(counts, torch.arange(4), torch.diag(counts.sum(0)), torch.full((4, 1), -1))
    assert prices.cost_of(home, Topology(2, 2)) == 4
    nothing = Split(0 * counts, torch.arange(4), 0 * quota, torch.full((4, 1), -1))
    assert prices.cost_of(nothing, Topology(2, 2)) == 1


@pytest.mark.parametrize("case", small_cases()[::3], ids=lambda case: case.text)
def test_with_prices_distplb_costs_at_most_as_much_as_without_replicas(case) -> None:
    (step,) = case.steps()
    cost = {name: prices.cost_of(found, case.topology) for name, found in methods.splits(case, step).items()}
    assert all(
        cost[name] <= cost[methods.NO_REPLICAS] for name in cost.keys() & {methods.PRICED, methods.PRICED_LEAVING}
    )


def test_the_smallest_cap_by_hand() -> None:
    # GPU 0 has four experts of 10 tokens, and the others of none: one slot on each of three GPUs takes 10 of them.
    tokens = np.array([10] * 4 + [0] * 12)
    step = loads.Step(tokens, np.stack([tokens, *[0 * tokens] * 3]))
    case = cases.Case("load", Topology(1, 4), 16, 2, lambda: iter([step] * 3))
    assert caps.cap_of(case, step, 0) == caps.Cap(smallest=40, bound=40, mean=10.0, is_proven=True, is_kept=True)
    assert caps.cap_of(case, step, 1) == caps.Cap(smallest=10, bound=10, mean=10.0, is_proven=True, is_kept=True)
    found = caps.caps_of(case, steps=2)
    assert [[cap.smallest for cap in found.caps[slots]] for slots in caps.SLOTS] == [[40] * 2, *[[10] * 2] * 4]


# --- text -------------------------------------------------------------------------------------------------------


def figures(imbalance: float, replicas: int, sends: int = 2, cost: float = 1.2, full_cost: float = 1.2) -> object:
    return measurement.Figures(imbalance, 1.0, replicas, sends, 1, 0, 0.5, 0.0, cost, full_cost, None)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_better_methods_are_told() -> None:
    case = cases.Case("load", Topology(1, 2), 4, 1, lambda: iter(()))
    own = [figures(1.004, 5), figures(1.010, 5), figures(1.004, 5), figures(1.004, 5), figures(1.004, 5)]
    other = [figures(1.004, 4), figures(1.009, 5), figures(1.003, 5), figures(1.000, 9), figures(1.004, 5, sends=1)]
    both = {methods.DISTPLB: own, methods.PRICED: own, "other": other}
    result = measurement.Result(case, both, [1.005] * 5, [0.1] * 5)
    assert cells(tables.better([result])) == [[case.text, "other", "5", "1", "2", "1", "1"]]
    assert [line[3] for line in tables.comparison_lines([result])] == ["1 steps", "2 steps", *["0 steps"] * 3]
    alone = measurement.Result(case, {methods.DISTPLB: own, methods.PRICED: own}, [1.005] * 5, [0.1] * 5)
    assert tables.better([alone]) == tables.cheaper([alone]) == "None."


def test_cheaper_methods_are_told() -> None:
    case = cases.Case("load", Topology(1, 2), 4, 1, lambda: iter(()))
    own = [figures(1.0, 5)] * 4
    # As cheap; cheaper by less than 0.1 / 64; by more, but not at full price; at full price, too.
    other = [
        figures(1.0, 5, cost=cost, full_cost=full) for cost, full in ((1.2, 1.2), (1.199, 1.3), (1.1, 1.3), (1.0, 1.1))
    ]
    both = {methods.DISTPLB: own, methods.PRICED: own, "other": other}
    result = measurement.Result(case, both, [1.005] * 4, [0.1] * 4)
    told = [case.text, "other", methods.PRICED, "4", "2", "1", "12.50%", "16.67%"]
    assert cells(tables.cheaper([result])) == [told]
    assert [line[3] for line in tables.comparison_lines([result])][2:] == ["3 steps", "1 steps", "1 steps"]
    moved = {methods.DISTPLB: own, methods.PRICED: own, methods.FLOW: other}
    result = measurement.Result(case, moved, [1.005] * 4, [0.1] * 4)
    assert [line[3] for line in tables.comparison_lines([result])][2:] == ["3 steps", "1 steps", "0 steps"]


def test_caps_above_the_bound_are_told_by_load() -> None:
    case = cases.Case("load", Topology(1, 2), 4, 1, lambda: iter(()))
    exact, unknown = caps.Cap(50, 50, 20.0, True, True), caps.Cap(51, 50, 20.0, False, True)
    found = caps.Caps(case, {slots: [exact, unknown if slots == 1 else exact] for slots in caps.SLOTS})
    told = cells(caps.cap_table([found]))
    assert told[0] == ["all, R = 0", "2", "2", "2", "2", "0.000%", "0.000%"]
    assert told[-1] == [f"{case.load_text}, R = 1", "2", "1", "1", "2", "5.000%", "0.000%"]
    assert len(told) == len(caps.SLOTS) + 1
    assert [line[3] for line in caps.cap_lines([found])] == ["10", "9"]


def test_loads_that_differ_in_slots_alone_are_capped_once() -> None:
    two, one = (cases.law_case(1.5, SIZE, 1, slots=slots) for slots in (2, 1))
    other = cases.law_case(2.0, SIZE, 1)
    assert caps.loads_once([two, one, other]) == [two, other]


def test_tokens_that_cross_gpus_and_nodes() -> None:
    case = cases.Case("load", Topology(2, 1), 2, 1, lambda: iter(()))
    counts = torch.tensor([[6, 1], [4, 1]])
    found = split(counts, [0, 1], topology=Topology(2, 1), engine="cpu")  # nothing can be given to another node
    told = measurement.figures_of(case, found, 10, 1.0, None)
    assert told.between_gpus == told.between_nodes == pytest.approx(5 / 12)
    assert (told.bound, told.imbalance, told.replicas) == (pytest.approx(10 / 6), pytest.approx(10 / 6), 0)
    away = split(counts, [0, 1], topology=Topology(2, 1), push_price=(0.0, 0.0), engine="cpu")
    told = measurement.figures_of(case, away, 6, 1.0, None)
    assert told.between_gpus == told.between_nodes == pytest.approx(1 / 12)
    assert (told.imbalance, told.replicas, told.leaving) == (1, 1, 1)


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sequences = np.random.default_rng(0).integers(1, 50, (40, 2, 64))
    np.save(tmp_path / "deepseek-v2-lite_prose_steps.npy", sequences)
    words = [
        "--loads",
        str(tmp_path),
        "--steps",
        "2",
        "--draws",
        "1",
        "--capped",
        "1",
        "--small",
        "--output",
        str(tmp_path / "out.md"),
    ]
    monkeypatch.setattr(sys, "argv", ["bench_splitting", *words])
    bench.main()
    text = (tmp_path / "out.md").read_text()
    assert text == capsys.readouterr().out
    assert "--loads DIR --steps 2 --draws 1 --capped 1 --small" in text
    assert str(tmp_path) not in text
    for name in (
        methods.DISTPLB,
        methods.WHOLE,
        methods.FLOW,
        methods.LEAVING,
        methods.PRICED_LEAVING,
        times.CHECKED,
        "## Targets",
        "## Where another method is better",
        "1,905 tokens inside a node",
        "## Replicas between nodes",
        "## The smallest cap",
        *loads.WORKLOADS,
    ):
        assert name in text
