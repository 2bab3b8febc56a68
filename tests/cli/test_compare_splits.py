"""`distplb compare --replica-slots`: homes and splits side by side.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import GPUS, TOPOLOGY, assert_refused, document, drawn, printed, run, saved
from torch import Tensor

import distplb
from distplb import DistplbError, Placement, Topology
from distplb.cli import compare_splits
from distplb.cli.compare_splits import Imbalance, Splits
from distplb.cli.compare_tables import Row, comparison_table, sentences_of_splits
from distplb.splitting.bound import step_bound
from distplb.splitting.inputs import checked_slots
from distplb.splitting.rules import MOST_SLOTS
from distplb.splitting.split import split

REPLICAS = ["--replica-slots", 2]


def of_contiguous(load: Tensor, topology: Topology, slots: int) -> dict[str, Any]:
    """The expected fields for contiguous homes, from splits whose tokens come from all GPUs."""
    gpus, experts = topology.num_gpus, load.shape[2]
    home = torch.arange(experts) // (experts // gpus)
    left, bound, replicas = (torch.full(load.shape[:2], torch.nan, dtype=torch.float64) for _ in range(3))
    for step, layer in load.any(2).nonzero().tolist():
        total = load[step, layer]
        counts = torch.stack([total // gpus] * (gpus - 1) + [total - total // gpus * (gpus - 1)])
        found = split(counts, home, topology=topology, replica_slots=slots)
        left[step, layer], replicas[step, layer] = found.imbalance, found.num_replicas
        limit = step_bound(counts, home, topology=topology, replica_slots=slots)
        bound[step, layer] = limit * gpus / int(total.sum())
    alone = distplb.imbalance(load, Placement.contiguous(load.shape[1], experts, gpus))
    fields = {"imbalance": left, "homes_alone": alone, "bound": bound}
    means = {name: values.nanmean(0).nan_to_num(nan=1.0) for name, values in fields.items()}
    counted = load.any(2).any(0)
    return {
        name: pytest.approx({"mean": float(values[counted].mean()), "worst": float(values.max())})
        for name, values in means.items()
    } | {"replicas": pytest.approx(float(replicas.nanmean(0)[counted].mean()))}


def rows_of(*words: object) -> dict[str, Any]:
    return {row["planner"]: row.get("with_replicas") for row in document("compare", *words)["planners"]}


@pytest.mark.parametrize(("nodes", "slots"), [(1, 1), (1, 3), (2, 1)])
def test_every_judged_step_is_split_under_the_homes_of_a_planner(nodes: int, slots: int, tmp_path: Path) -> None:
    load = drawn()
    load[4, 1] = load[:, 2] = 0  # a step without a layer, and a layer without tokens
    topology = Topology(nodes, 4 // nodes)
    rows = rows_of(
        saved(tmp_path / "load.npy", load),
        *("--nodes", nodes, "--gpus-per-node", 4 // nodes, "--engine", "reference", "--replica-slots", slots),
    )
    assert rows["contiguous"] == of_contiguous(load[3:], topology, slots)
    for name, row in rows.items():
        if name != "bound":
            assert row["bound"]["mean"] <= row["imbalance"]["mean"] + 1e-9
            assert rows["bound"]["imbalance"]["mean"] <= row["bound"]["mean"]
            assert rows["bound"]["imbalance"]["worst"] <= row["bound"]["worst"]
            assert row["imbalance"]["mean"] <= row["homes_alone"]["mean"]


def test_the_homes_are_those_that_a_plan_would_leave(tmp_path: Path) -> None:
    """Homes of the plan, not those in force."""
    load = drawn(steps=1)
    rows = rows_of(saved(tmp_path / "load.npy", load[0]), *GPUS, *REPLICAS)
    plan = distplb.plan(load[0], TOPOLOGY, current=Placement.contiguous(3, 8, 2), num_candidates=4, engine="reference")
    found = []
    for layer in range(3):
        home = plan.expert_of_slot[layer].argsort() // 4
        counts = torch.stack([load[0, layer], torch.zeros_like(load[0, layer])])
        found.append(split(counts, home, topology=TOPOLOGY, replica_slots=2))
    assert rows["plan"]["replicas"] == pytest.approx(sum(one.num_replicas for one in found) / 3)
    assert rows["plan"]["imbalance"]["mean"] == pytest.approx(sum(one.imbalance for one in found) / 3)
    assert rows["plan"]["homes_alone"]["mean"] < rows["contiguous"]["homes_alone"]["mean"]


@pytest.mark.parametrize("second", [False, True])
def test_without_replica_slots_nothing_changes(second: bool, tmp_path: Path) -> None:
    load = saved(tmp_path / "load.npy")
    words = (load, *(["--unseen", saved(tmp_path / "other.npy", drawn(4))] if second else []), *GPUS)
    plain = document("compare", *words)
    assert plain.keys() == document("compare", *words, "--replica-slots", 0).keys()
    assert not {"replica_slots", "tolerance", "steps_split"} & plain.keys()
    assert all(row.keys() == {"planner", "in_sample", "unseen", "moved", "seconds"} for row in plain["planners"])
    assert "with replicas" not in " ".join(printed("compare", *words).split())
    split_too = document("compare", *words, *REPLICAS)
    assert (split_too["replica_slots"], split_too["tolerance"]) == (2, 0.005)
    assert split_too["steps_split"] == list(range(plain["steps_unseen"]))
    for row, other in zip(plain["planners"], split_too["planners"], strict=True):
        assert {name: other[name] for name in row if name != "seconds"} == {
            name: value for name, value in row.items() if name != "seconds"
        }


def test_a_sentence_tells_what_replicas_leave_and_how_many_are_sent(tmp_path: Path) -> None:
    words = (saved(tmp_path / "load.npy"), *GPUS, *REPLICAS)
    rows, shown = rows_of(*words), " ".join(printed("compare", *words).split())
    for name in ("contiguous", "plan on the steps"):
        row = rows[name]
        assert (
            f"{row['homes_alone']['mean']:.4f} becomes {row['imbalance']['mean']:.4f} by sending "
            f"{row['replicas']:.1f} replicas per step and layer" in shown
        )
    assert "with the homes in force (contiguous)" in shown
    assert "of homes alone, and with 2 replica slots on each GPU;" in shown
    assert "has no steps" not in shown
    assert not re.search(r"Split: \d+ of", shown)
    one = " ".join(printed("compare", saved(tmp_path / "sum.npy", drawn().sum(0)), *GPUS, "--replica-slots", 1).split())
    assert "with 1 replica slot on each GPU;" in one
    assert "The judged load has no steps. If it is a sum over several, each of them is less even" in one


def test_the_placement_in_force_is_the_first_of_the_sentence(tmp_path: Path) -> None:
    load = saved(tmp_path / "load.npy")
    document("plan", load, *GPUS, "--output", tmp_path / "p.json")
    shown = " ".join(printed("compare", load, *GPUS, *REPLICAS, "--current", tmp_path / "p.json").split())
    assert "with the homes in force (current)" in shown


def test_both_engines_give_the_same_figures(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    words = (saved(tmp_path / "load.npy"), "--gpus-per-node", 4, *REPLICAS, "--engine")
    assert rows_of(*words, "cpu") == rows_of(*words, "reference")


def test_one_gpu_has_nobody_to_lend_to(tmp_path: Path) -> None:
    rows = rows_of(saved(tmp_path / "load.npy"), "--gpus-per-node", 1, "--engine", "reference", *REPLICAS)
    even = {"mean": 1.0, "worst": 1.0}
    assert rows["contiguous"] == {"imbalance": even, "homes_alone": even, "bound": even, "replicas": 0.0}


@pytest.mark.parametrize("options", [[], REPLICAS])
def test_the_progress_bar_ends_full(options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    @contextmanager
    def progress(activity: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: seen.append((done, total))

    monkeypatch.setattr("distplb.cli.compare.progress", progress)
    document("compare", saved(tmp_path / "load.npy"), *GPUS, *options)
    total = 6 * (1 + 3 * bool(options))  # six planners; a plan, and three steps to split
    assert seen == [(done, total) for done in range(total + 1)]


def test_of_a_long_load_a_sample_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Homes alone are judged on the same steps, so that both figures can be compared."""
    monkeypatch.setattr(compare_splits, "_MOST_SPLITS", 9)
    load = drawn(steps=30)
    words = (saved(tmp_path / "load.npy", load), *GPUS, *REPLICAS)
    result = document("compare", *words)
    steps = result["steps_split"]
    assert [step // 5 for step in steps] == [0, 1, 2] == [step // 5 for step in sorted(steps)]
    assert steps == document("compare", *words)["steps_split"]
    assert result["planners"][0]["with_replicas"] == of_contiguous(load[15:][steps], TOPOLOGY, 2)
    which = "one drawn from each of 3 equal parts; the next sentence is about these."
    assert f"Split: 3 of 15 steps, {which}" in printed("compare", *words)
    monkeypatch.setattr(compare_splits, "_MOST_SPLITS", 1)
    (step,) = document("compare", *words)["steps_split"]
    assert f"Split: 1 of 15 steps, number {step};" in printed("compare", *words)


def test_a_sample_has_a_step_of_every_part() -> None:
    for total in (1, 7, 8, 9, 100, 12_345):
        steps = compare_splits._sample(total, 8).tolist()
        assert len(steps) == min(total, 8)
        for part, step in enumerate(steps):
            assert part * total // len(steps) <= step < (part + 1) * total // len(steps)


def test_what_does_not_go_with_replica_slots_is_refused(tmp_path: Path) -> None:
    load = saved(tmp_path / "load.npy")
    assert_refused(
        run("compare", load, *GPUS, "--slots", 10, *REPLICAS),
        "--slots 10 gives some of 8 experts several homes, .* pass --slots 8, or --replica-slots 0",
    )
    for slots in (-1, MOST_SLOTS + 1):
        assert_refused(run("compare", load, *GPUS, "--replica-slots", slots), f"{slots} is not in the range 0<=x<=1024")
    assert "with_replicas" in document("compare", load, *GPUS, "--slots", 8, *REPLICAS)["planners"][0]
    assert len(document("compare", load, *GPUS, "--slots", 10, "--replica-slots", 0)["planners"]) > 1


def test_slots_that_no_expert_needs_change_nothing_up_to_as_many_as_split_accepts(tmp_path: Path) -> None:
    load = saved(tmp_path / "load.npy", drawn()[:4])
    enough, most = (rows_of(load, *GPUS, "--replica-slots", slots) for slots in (8, MOST_SLOTS))
    assert enough == most
    assert checked_slots(MOST_SLOTS) == MOST_SLOTS
    with pytest.raises(DistplbError, match="pass at most 1,024"):
        checked_slots(MOST_SLOTS + 1)


# --- the table --------------------------------------------------------------------------------------------------


def columns(width: int, *, unseen: bool, replicas: bool = True) -> list[str]:
    level = Imbalance(1.5, 2.0)
    splits = Splits(level, level, level, 4.2) if replicas else None
    rows = [
        Row(name, level, level if unseen else None, 123, 0.5, splits) for name in ("contiguous", "plan, 16 candidates")
    ]
    rows.append(Row("bound", level, level if unseen else None, None, None, None, level if replicas else None))
    to_split = compare_splits.StepsToSplit(drawn(), range(6), 6, TOPOLOGY, 2, None) if replicas else None
    drawn_table = comparison_table(rows, "judged", to_split, width)
    assert ("Wider terminals" in str(drawn_table.title)) == (width < (52 if not replicas else 79 + 8 * unseen))
    return [" ".join(str(column.header).split()) for column in drawn_table.columns[1:]]


EVERY = ["in sample", "unseen", "worst layer", "unseen, with replicas", "worst layer, with replicas"]
EVERY += ["replicas per step and layer", "slots moved", "time (s)"]


def test_a_narrower_terminal_shows_fewer_columns_and_says_so() -> None:
    assert columns(200, unseen=True) == columns(87, unseen=True) == EVERY
    assert columns(80, unseen=True) == EVERY[:-1]
    assert columns(79, unseen=True) == EVERY[:-2]
    assert columns(66, unseen=True) == EVERY[1:-2]
    assert columns(40, unseen=True) == ["unseen", "unseen, with replicas", "replicas per step and layer"]
    assert columns(200, unseen=False)[:2] == ["in sample", "worst layer"]
    assert columns(40, unseen=False) == ["in sample", "with replicas", "replicas per step and layer"]
    assert columns(52, unseen=True, replicas=False) == [*EVERY[:3], *EVERY[-2:]]
    assert columns(51, unseen=True, replicas=False) == EVERY[:3]


def test_the_plan_of_a_load_without_steps_is_named() -> None:
    level = Imbalance(1.5, 2.0)
    rows = [Row(name, level, None, 0, 0.1, Splits(level, level, level, 1.0)) for name in ("contiguous", "plan")]
    to_split = compare_splits.StepsToSplit(drawn(steps=1), [0], 1, TOPOLOGY, 2, None)
    (sentence,) = sentences_of_splits(rows, to_split, is_sum=False)
    assert "with those of plan, 1.5000 becomes 1.5000 by sending 1.0 replicas" in sentence
