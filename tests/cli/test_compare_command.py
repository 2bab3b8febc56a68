"""`distplb compare`: its planners, and the steps they are judged on.

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import GPUS, TOPOLOGY, document, drawn, printed, saved

import distplb
from distplb import Placement
from distplb.core.price import moved_slots
from distplb.planning.greedy import greedy_numpy


def test_compare_judges_on_the_half_that_no_planner_saw(tmp_path: Path) -> None:
    load = drawn()
    result = document("compare", saved(tmp_path / "load.npy"), *GPUS)
    by_name = {row["planner"]: row for row in result["planners"]}
    assert list(by_name) == [
        *("contiguous", "greedy (EPLB)", "balanced_packing", "plan on the sum", "plan on the steps"),
        *("plan, 16 candidates", "bound"),
    ]
    start = Placement.contiguous(3, 8, 2)
    expected = {
        "contiguous": start,
        "greedy (EPLB)": Placement(greedy_numpy(load[:3].sum(0), TOPOLOGY, 8), 8, 2),
        "plan on the sum": distplb.plan(load[:3].sum(0), TOPOLOGY, current=start),
        "plan on the steps": distplb.plan(load[:3], TOPOLOGY, current=start),
        "plan, 16 candidates": distplb.plan(load[:3], TOPOLOGY, current=start, num_candidates=16),
    }
    for name, placement in expected.items():
        for part, steps in (("in_sample", load[:3]), ("unseen", load[3:])):
            layers = distplb.imbalance(steps, placement).mean(0)
            assert by_name[name][part] == pytest.approx({"mean": float(layers.mean()), "worst": float(layers.max())})
        assert by_name[name]["moved"] == int(moved_slots(start, placement, TOPOLOGY).sum())
    bound = distplb.lower_bound(load[3:], TOPOLOGY, 8)
    assert by_name["bound"]["unseen"] == pytest.approx({"mean": float(bound.mean()), "worst": float(bound.max())})
    assert all(row["seconds"] >= 0 for name, row in by_name.items() if name != "bound")


def test_compare_on_a_second_file(tmp_path: Path) -> None:
    load, other = saved(tmp_path / "load.npy"), saved(tmp_path / "other.npy", drawn(steps=2).flip(2))
    result = document("compare", load, "--unseen", other, *GPUS)
    assert (result["steps_planned_on"], result["steps_unseen"]) == (6, 2)
    levels = distplb.imbalance(drawn(steps=2).flip(2), Placement.contiguous(3, 8, 2)).mean(0)
    assert result["planners"][0]["unseen"]["mean"] == pytest.approx(float(levels.mean()))
    assert f"planned on 6 steps of {load}, unseen: 2 steps of {other}" in " ".join(
        printed("compare", load, "--unseen", other, *GPUS).split()
    )


def test_compare_on_one_step_says_that_it_is_judged_on_itself(tmp_path: Path) -> None:
    load = saved(tmp_path / "load.npy", drawn(steps=1)[0])
    result = document("compare", load, *GPUS)
    assert [row["planner"] for row in result["planners"]][-3:] == ["plan", "plan, 16 candidates", "bound"]
    assert all(row["unseen"] is None for row in result["planners"])
    shown = " ".join(printed("compare", load, *GPUS).split())
    assert "judged on the one step that was planned on, which says nothing about other steps." in shown
    assert "unseen" not in shown


def test_compare_of_a_buffer_that_is_filled_in_part_is_that_of_what_was_filled(tmp_path: Path) -> None:
    """Empty rows counted as balanced steps: every planner and the bound had almost 1."""
    filled = drawn(steps=6)
    filled[:, 1] = 0
    buffer = torch.cat([torch.zeros(20, 3, 8, dtype=torch.int64), filled[:4], torch.zeros_like(filled), filled[4:]])
    filled_path, whole_path = saved(tmp_path / "given.npy", filled), saved(tmp_path / "whole.npy", buffer)
    result, expected = (document("compare", path, *GPUS) for path in (whole_path, filled_path))
    for one in (result, expected):
        for row in one["planners"]:
            del row["seconds"]
    assert result["planners"] == expected["planners"]
    assert result["judged"] == "planned on the first half (3 steps), unseen: the second half (3 steps)"
    assert (result["steps_planned_on"], result["steps_unseen"], result["steps_without_tokens"]) == (3, 3, 26)
    assert result["layers_without_tokens"] == expected["layers_without_tokens"] == ["1"]
    left_out = (
        "26 of 32 steps had no tokens and are left out. 1 of 3 layers had no tokens: 1; means are over the other 2."
    )
    assert left_out in printed("compare", whole_path, *GPUS)
    shown = printed("compare", filled_path, "--unseen", whole_path, *GPUS)
    assert f"26 of 32 steps of {whole_path} had no tokens and are left out." in shown
    assert f"1 of 3 layers of {filled_path} had no tokens: 1;" in shown
    other = document("compare", filled_path, "--unseen", whole_path, *GPUS)
    assert (other["steps_unseen"], other["unseen_without_tokens"]["steps_without_tokens"]) == (6, 26)


def planners(*words: object) -> list[str]:
    return [row["planner"] for row in document("compare", *words, *GPUS)["planners"]]


def test_compare_has_the_planners_that_go_with_the_options(tmp_path: Path) -> None:
    load = saved(tmp_path / "load.npy", drawn(steps=2))
    document("plan", load, *GPUS, "--output", tmp_path / "p.json")
    assert planners(load, "--current", tmp_path / "p.json")[:3] == ["current", "contiguous", "greedy (EPLB)"]
    assert "balanced_packing" not in planners(load, "--slots", 10)
    assert planners(load, "--groups", 4)[:2] == ["contiguous", "greedy (EPLB)"]
    assert planners(load, "--groups", 4, "--mode", "permute")[:2] == ["contiguous", "plan"]
    assert "plan, 16 candidates" not in planners(load, "--candidates", 16)
