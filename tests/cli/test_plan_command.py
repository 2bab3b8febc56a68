"""The output of `distplb plan`.

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from commands import GPUS, TOPOLOGY, document, drawn, printed, saved, traced

import distplb
from distplb import Placement, Topology
from distplb.core.price import moved_slots
from distplb.planning.greedy import contiguous


def test_plan_reports_what_imbalance_bound_and_moves_are(tmp_path: Path) -> None:
    load, placement = drawn(), tmp_path / "placement.json"
    result = document("plan", traced(tmp_path / "trace.npz"), *GPUS, "--output", placement)
    planned, start = Placement.load(placement, ["a", "b", "c"]), Placement.contiguous(3, 8, 2)
    assert planned == distplb.plan(load, TOPOLOGY, current=start)
    rows = result["layers"]
    assert [row["layer"] for row in rows] == ["a", "b", "c"]
    assert [row["before"] for row in rows] == pytest.approx(distplb.imbalance(load, start).mean(0).tolist())
    assert [row["after"] for row in rows] == pytest.approx(distplb.imbalance(load, planned).mean(0).tolist())
    assert [row["bound"] for row in rows] == pytest.approx(distplb.lower_bound(load, TOPOLOGY, 8).tolist())
    assert [row["moved_inside"] for row in rows] == moved_slots(start, planned, TOPOLOGY)[:, 0].tolist()
    assert result["all_layers"]["after"] == pytest.approx(sum(row["after"] for row in rows) / 3)
    assert result["output"] == str(placement)


def test_plan_as_a_table(tmp_path: Path) -> None:
    load, placement = saved(tmp_path / "load.npy"), tmp_path / "placement.json"
    result = document("plan", load, *GPUS)
    lines = printed("plan", load, *GPUS, "--output", placement).splitlines()
    assert lines[1].split() == ["layer", "before", "after", "bound", "moved"]
    for line, row in zip(lines[3:6], result["layers"], strict=True):
        numbers = [f"{row[name]:.4f}" for name in ("before", "after", "bound")]
        assert line.split() == [row["layer"], *numbers, str(row["moved_inside"])]
    total = result["all_layers"]
    assert lines[7].split() == ["all", "3", *(f"{total[name]:.4f}" for name in ("before", "after", "bound")), "12"]
    assert lines[8].startswith("Busiest GPU / mean GPU, mean over 6 steps of the load that was planned on. ")
    assert lines[8].endswith("distplb compare --unseen.")
    assert lines[9:] == [f"Written to {placement}."]


def test_plan_starts_from_the_placement_in_force(tmp_path: Path) -> None:
    load, placement = saved(tmp_path / "load.npy"), tmp_path / "placement.json"
    first = document("plan", load, *GPUS, "--output", placement)
    second = document("plan", load, *GPUS, "--current", placement)
    assert first["all_layers"]["moved_inside"] > 0
    assert second["all_layers"]["before"] == first["all_layers"]["after"]
    priced = document("plan", load, *GPUS, "--move-price", "1e9,1e9")
    assert priced["all_layers"]["moved_inside"] == 0


def test_plan_with_replicas_on_two_nodes_counts_moves_by_link(tmp_path: Path) -> None:
    two = Topology(num_nodes=2, gpus_per_node=2)
    result = document(
        "plan", saved(tmp_path / "load.npy"), "--nodes", 2, *GPUS, "--slots", 12, "--output", tmp_path / "p.json"
    )
    load, planned = drawn(), Placement.load(tmp_path / "p.json")
    start = Placement(contiguous(load[0], two, 12), 8, 4)
    rows = result["layers"]
    assert planned.num_slots == result["slots"] == 12
    assert [row["before"] for row in rows] == pytest.approx(distplb.imbalance(load, start).mean(0).tolist())
    moved = [[row["moved_inside"], row["moved_between"]] for row in rows]
    assert moved == moved_slots(start, planned, two).tolist()


def test_plan_shows_the_most_uneven_of_many_layers(tmp_path: Path) -> None:
    load = saved(tmp_path / "load.npy", drawn(steps=1, layers=30))
    rows = document("plan", load, *GPUS)["layers"]
    assert len(rows) == 30
    uneven = sorted(rows, key=lambda row: -row["before"])
    lines = printed("plan", load, *GPUS).splitlines()
    assert [line.split()[0] for line in lines[3:27]] == [row["layer"] for row in uneven[:24]]
    rest = sum(row["before"] for row in uneven[24:]) / 6
    assert lines[28].split()[:4] == ["6", "more", "(--all)", f"{rest:.4f}"]
    assert [line.split()[0] for line in printed("plan", load, *GPUS, "--all").splitlines()[3:33]] == [
        str(layer) for layer in range(30)
    ]


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ([[0, 0, 0, 0]], "The load has no tokens, so"),
        ([[1, 1, 1, 1]], "already meets the bound: there is nothing to gain"),
        ([[2, 2, 1, 1]], "of the load that was planned on. The plan meets the bound."),
        ([[5, 4, 4, 3, 3, 3, 1, 1]], "GPU of the load that was planned on."),
    ],
)
def test_plan_says_what_there_is_to_gain(load: list[list[int]], words: str, tmp_path: Path) -> None:
    assert words in printed("plan", saved(tmp_path / "load.npy", torch.tensor(load)), *GPUS)


def test_steps_without_tokens_in_some_layer_are_left_out_there(tmp_path: Path) -> None:
    load = drawn(steps=4)
    load[1, 0], load[2:, 1] = 0, 0
    path = saved(tmp_path / "load.npy", load)
    result = document("plan", path, *GPUS)
    means = [
        distplb.imbalance(load[load[:, at].any(1)], Placement.contiguous(3, 8, 2))[:, at].mean() for at in range(3)
    ]
    assert [row["before"] for row in result["layers"]] == pytest.approx([float(mean) for mean in means])
    assert result["all_layers"]["before"] == pytest.approx(float(sum(means)) / 3)
    assert (result["steps"], result["steps_without_tokens"], result["pairs_without_tokens"]) == (4, 0, 3)
    assert "In some steps, a layer had no tokens (3 times) and is left out there." in printed("plan", path, *GPUS)
    padded = saved(tmp_path / "padded.npy", torch.cat([load[:2], load[:1] * 0]))
    sentence = (
        "1 of 3 steps had no tokens and is left out. In other steps, a layer had no tokens (once) and is left out "
        "there."
    )
    assert sentence in printed("plan", padded, *GPUS)


def test_plan_reports_nothing_of_what_has_no_tokens(tmp_path: Path) -> None:
    load = drawn(steps=2)
    load[:, 0] = 0
    path = saved(tmp_path / "load.npy", torch.cat([load, load * 0]))
    result = document("plan", path, *GPUS)
    assert (result["steps"], result["steps_without_tokens"], result["layers_without_tokens"]) == (2, 2, ["0"])
    assert [result["layers"][0][name] for name in ("before", "after", "bound", "moved_inside")] == [None, None, None, 0]
    mean = distplb.imbalance(load[:, 1:], Placement.contiguous(2, 8, 2)).mean()
    assert result["all_layers"]["before"] == pytest.approx(float(mean))
    assert re.search(r"^ ?0 +– +– +– +0", printed("plan", path, *GPUS), re.MULTILINE)
    nothing = document("plan", saved(tmp_path / "nothing.npy", load * 0), *GPUS)
    assert (nothing["steps"], nothing["all_layers"]["before"]) == (0, None)
    assert "nan" not in json.dumps(nothing)
