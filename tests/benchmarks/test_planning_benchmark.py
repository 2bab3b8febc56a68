"""`bench_planning`: planners of the user's, the front of time and imbalance, and the benchmark on little data.

Shapes: L layers, E experts, P slots.
"""

from __future__ import annotations

import doctest
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_modules import imported
from torch import Tensor

from distplb.planning.eplb import rebalance_experts

bench_planning, user_planners = imported("planning.bench_planning"), imported("shared.user_planners")
planning, loads = imported("figures.planning"), imported("shared.loads")
Layout = loads.Layout

GOOD = "from distplb.planning.eplb import rebalance_experts\n"
SIGNATURE = "def rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus):\n"
OF_GOOD = "from distplb.planning.eplb import rebalance_experts as good\n" + SIGNATURE


def folder_of(folder: Path, **files: str) -> Path:
    """Write a folder of planners."""
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


# --- planners of the user's -------------------------------------------------------------------------------------


def test_files_that_cannot_be_used_are_all_named_at_once(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "planners",
        good=GOOD,
        _helper="raise AssertionError",
        broken="import nothing_of_this_name",
        leaves="raise SystemExit(3)",
        empty="def rebalance(weight): ...",
        torn="def rebalance_experts(",
    )
    with pytest.raises(SystemExit) as stopped:
        user_planners.user_planners(folder)
    text = str(stopped.value)
    assert "good.py" not in text
    assert "_helper.py" not in text
    assert f"{folder / 'broken.py'} does not load: ModuleNotFoundError" in text
    assert f"{folder / 'leaves.py'} does not load: SystemExit(3)" in text
    assert f"{folder / 'torn.py'} does not load: SyntaxError" in text
    assert f"{folder / 'empty.py'} has no function rebalance_experts(weight, num_replicas, " in text


def test_a_folder_without_planners_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no Python files in"):
        user_planners.user_planners(folder_of(tmp_path / "planners", _helper=""))


def test_planners_may_import_their_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = folder_of(tmp_path / "planners", _shared_steps=GOOD, mine="from _shared_steps import rebalance_experts")
    functions = user_planners.user_planners(folder)
    assert [path.name for path in functions] == ["mine.py"]
    user_planners.tried(functions, [(16, Layout(1, 16))])


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "two results": (lambda *found: found[:2], "returned no three results"),
    "a list": (lambda table, *rest: (table.tolist(), *rest), "physical_to_logical is no tensor of integers"),
    "floats": (lambda table, *rest: (table.double(), *rest), "physical_to_logical is no tensor of integers"),
    "too few slots": (lambda table, *rest: (table[:, 1:], *rest), "has shape [2, 23], not [2, 24]"),
    "no such expert": (lambda table, *rest: (table + 1, *rest), "experts 1 to 16, not in [0, 16)"),
    "a lost expert": (lambda table, *rest: (table.clamp(min=1), *rest), "expert 0 of layer 0 has no slot"),
    "another count": (
        lambda table, slots, count: (table, slots, count.roll(1, 1)),
        "logical_count of expert",
    ),
    "other slots": (
        lambda table, slots, count: (table.flip(1), slots, count),
        "logical_to_physical of expert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_a_placement_that_is_not_legal_is_refused_before_anything_is_measured(kind: str) -> None:
    spoil, text = FAULTS[kind]
    functions = {Path("mine.py"): lambda *arguments: spoil(*rebalance_experts(*arguments))}
    with pytest.raises(SystemExit) as stopped:
        user_planners.tried(functions, [(16, Layout(1, 24))])
    assert "mine.py: " in str(stopped.value)
    assert text in str(stopped.value)
    assert "on 16 experts, 24 slots, 8 GPUs (1 node)" in str(stopped.value)


def test_groups_that_are_not_whole_on_a_node_are_refused() -> None:
    def ignores_groups(weight: Tensor, slots: int, groups: int, nodes: int, gpus: int) -> Any:
        return rebalance_experts(weight, slots, 1, 1, gpus)

    layouts = [(32, Layout(2, 32)), (32, Layout(2, 32, 8))]
    user_planners.tried({Path("good.py"): rebalance_experts}, layouts)
    user_planners.tried({Path("mine.py"): ignores_groups}, layouts[:1])
    with pytest.raises(SystemExit, match=r"mine.py: group \d of layer \d is on 2 nodes \(--flat leaves such"):
        user_planners.tried({Path("mine.py"): ignores_groups}, layouts)


def test_a_planner_that_raises_or_changes_its_argument_is_refused() -> None:
    def raises(*_: Any) -> Any:
        raise ZeroDivisionError("no tokens")

    def changes(weight: Tensor, *sizes: int) -> Any:
        weight += 1
        return rebalance_experts(weight, *sizes)

    functions = {Path("raises.py"): raises, Path("changes.py"): changes, Path("good.py"): rebalance_experts}
    with pytest.raises(SystemExit) as stopped:
        user_planners.tried(functions, [(16, Layout(1, 16)), (16, Layout(1, 24))])
    lines = str(stopped.value).splitlines()
    assert len(lines) == 3  # one line for each, although there are two layouts
    assert lines[1].startswith("raises.py: rebalance_experts raised ZeroDivisionError('no tokens') on 16 experts")
    assert lines[2].startswith("changes.py: rebalance_experts has changed its argument weight")


# --- time and imbalance together --------------------------------------------------------------------------------


def case_of(**planners: tuple[float, float]) -> Any:
    """A case whose planners have these seconds and imbalances."""
    results = {
        name.replace("_K", ", K = ").replace("plan,", "distplb.plan,"): bench_planning.Result(
            seen=[torch.tensor([uneven])], seconds=[seconds]
        )
        for name, (seconds, uneven) in planners.items()
    }
    data = loads.Data("model", "recorded", ((torch.ones(1, 16, dtype=torch.int64), []),))
    return bench_planning.Case(data, Layout(1, 16), results, torch.ones(1))


def test_planners_that_are_both_faster_and_more_even_are_listed() -> None:
    ours = {"plan_K1": (0.004, 1.2), "plan_K8": (0.03, 1.1), "balanced_packing_K1": (0.001, 1.0)}
    case = case_of(**ours, fast=(0.001, 1.3), better=(0.02, 1.05))
    text = bench_planning.ahead([case])
    assert "Missed." in text
    rows = [line for line in text.splitlines() if line.startswith("| model")]
    assert len(rows) == 1
    assert "|  better |" in rows[0]
    assert "| distplb.plan, K = 8" in rows[0]
    assert "20.00 ms, 1.05000" in rows[0]


def test_as_even_or_as_fast_is_not_ahead() -> None:
    case = case_of(plan_K1=(0.004, 1.2), as_even=(0.001, 1.2), as_fast=(0.004, 1.1))
    assert "Met." in bench_planning.ahead([case])


def test_the_front_has_only_what_nobody_beats() -> None:
    assert doctest.testmod(planning).failed == 0
    point = planning.Point
    points = [point("slow", None, 9, 1.2), point("both", 1, 3, 1.2), point("even", 8, 5, 1.1), point("tie", 2, 5, 1.1)]
    assert [one.planner for one in planning.front(points)] == ["both", "even"]


def test_a_figure_is_drawn_where_all_are_alike_and_at_the_bound(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [planning.Point("one", None, 1, 1.0), planning.Point("plan", 1, 2, 1.0), planning.Point("plan", 8, 3, 1.0)]
    for name in ("figure.png", "figure.svg"):
        planning.draw([planning.Panel("a panel", 1.0, points)] * 4, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000


# --- end to end -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the benchmark on little data with these planners; returns the report."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "loads"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("one", "two"):
        counts = generator.poisson(1000 * generator.lognormal(0, 1, (3, 16)))
        np.save(folder / f"small_{name}.npy", counts.astype(np.int64))

    def runs(*words: str, **files: str) -> str:
        output = tmp_path / "report.md"
        planners = folder_of(tmp_path / "planners", **files)
        given = ["--loads", folder, "--planners", planners, "--candidates", 1, 2, "--output", output, *words]
        monkeypatch.setattr(sys, "argv", ["bench_planning", *map(str, given)])
        bench_planning.main()
        return output.read_text()

    return runs


def test_planners_go_into_the_same_tables_and_figure(run: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = run(mine=GOOD)
    assert text.count("\n| mine.py ") == text.count("\n| greedy_numpy ") == 2  # layouts
    assert "--planners FOLDER" in text
    assert str(tmp_path) not in text
    assert "## Both faster and more even" in text
    assert "](report.png)" in text
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_a_planner_that_fails_only_on_a_real_load_is_left_out_there(run: Callable[..., str]) -> None:
    pytest.importorskip("matplotlib")
    fails = OF_GOOD + "    assert len(weight) == 2 or num_replicas == 16, 'three layers'\n"
    text = run(fails=f"{fails}    return good(weight, num_replicas, num_groups, num_nodes, num_gpus)\n", mine=GOOD)
    assert text.count("\n| fails.py ") == 1
    assert text.count("\n| mine.py ") == 2
    assert "Left out: " in text
    assert "fails.py: rebalance_experts raised AssertionError('three layers') on 16 experts, 24 slots" in text


def test_planners_are_not_asked_to_keep_replicas_apart(run: Callable[..., str]) -> None:
    pytest.importorskip("matplotlib")
    assert run("--apart", mine=GOOD).count("\n| mine.py ") == 1  # without replicas
