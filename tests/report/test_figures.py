"""The figures of a report against the numbers of the run.

Shapes: R rebalances, L layers, M GPUs, E experts, S steps.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from recorded_runs import EXPERTS, HALF, HOSTILE, NOTHING, RUNS, event, steps, trace, with_holes

from distplb import DistplbError, Placement, Topology, Trace, imbalance, lower_bound
from distplb.core.price import MoveModel
from distplb.report import figures
from distplb.report.drawings.base import ReportFigure
from distplb.report.drawings.hottest_experts import HOTTEST_EXPERTS
from distplb.report.drawings.imbalance_over_time import IMBALANCE_OVER_TIME
from distplb.report.drawings.load_by_gpu import LOAD_BY_GPU
from distplb.report.drawings.moves_by_rebalance import MOVES_BY_REBALANCE
from distplb.report.drawings.other_intervals import OTHER_INTERVALS
from distplb.report.drawings.seconds_by_stage import SECONDS_BY_STAGE
from distplb.report.drawings.style import NARROW, WIDE
from distplb.report.interval_trials import with_trials
from distplb.report.run import Run
from distplb.report.summary import Summary


def lines(figure: Figure) -> dict[str, Any]:
    """The lines in the first axes, by their names in the legend."""
    return {line.get_label(): line for line in figure.axes[0].lines}


def bars(axes: Any) -> list[list[float]]:
    return [[bar.get_height() for bar in group] for group in axes.containers]


# --- figures against the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_maps_of_load_show_the_last_move_on_one_scale(width: float) -> None:
    first = event(1, tokens_of_gpu_after=((1, 1, 1, 1),) * 2)
    run = Run("run", (first, event(2), event(3, decision="kept", tokens_of_gpu_before=((1, 1, 1, 1),) * 2)))
    drawn = figures.load_by_gpu(run, width)
    before, after = (axes.images[0] for axes in drawn.axes[:2])
    expected = np.array(event().tokens_of_gpu_before) / np.mean(event().tokens_of_gpu_before[0])
    np.testing.assert_allclose(before.get_array(), expected)
    np.testing.assert_allclose(after.get_array(), 1)
    assert before.norm is after.norm
    assert (before.norm.vmin + before.norm.vmax) / 2 == 1
    assert f"{expected[0, 0]:.2f}" in {text.get_text() for text in drawn.axes[0].texts}
    caption = LOAD_BY_GPU.caption(run)
    assert f"{expected[0, 0]:.2f} times the mean before and 1.00 after" in caption
    assert "iteration 20" in caption


def test_the_maps_of_a_trace_are_of_steps_that_no_plan_had_seen() -> None:
    recorded = trace(moved_at=16)
    drawn = figures.load_by_gpu(Run("run", trace=recorded))
    later = recorded.load[16:].sum(0)
    for axes, placement in zip(drawn.axes[:2], recorded.placements, strict=True):
        assert axes.images[0].get_array().max() == pytest.approx(float(imbalance(later, placement).max()))


def test_a_trace_in_which_nothing_moved_is_planned_on_its_first_half() -> None:
    recorded = trace()
    run = Run("run", trace=recorded)
    before, after = (axes.images[0].get_array().max() for axes in figures.load_by_gpu(run).axes[:2])
    assert before == pytest.approx(float(imbalance(recorded.load[12:].sum(0), recorded.placements[0]).max()))
    bound = float(lower_bound(recorded.load[12:].sum(0), Topology(1, 4), EXPERTS).max())
    assert after == pytest.approx(bound)
    assert after < before
    assert Summary.of(run).headline.startswith("Under a plan made from the first half of the trace")


def test_nodes_are_separated() -> None:
    drawn = figures.load_by_gpu(Run("run", (event(gpus=6, num_nodes=3),)))
    assert [line.get_xdata()[0] for line in drawn.axes[0].lines] == [1.5, 3.5]


def test_the_history_of_events_has_a_level_for_each_window_and_a_mark_for_each_decision() -> None:
    decisions = ("moved", "kept", "dry run", "stopped")
    events = [event(n, decision=name, imbalance_before=(1.5, 1.7 - n / 10)) for n, name in enumerate(decisions, 1)]
    drawn = figures.imbalance_over_time(Run("run", tuple(events)))
    level = lines(drawn)["mean over layers, by window"]
    assert level.get_xdata().tolist() == [0, 10, 10, 20, 20, 30, 30, 40, 40, 50]
    np.testing.assert_allclose(level.get_ydata(), [1.55, 1.55, 1.5, 1.5, 1.45, 1.45, 1.4, 1.4, 1.2, 1.2])
    assert set(lines(drawn)["lower bound"].get_ydata()) == {1.0}
    legend = {text.get_text(): handle for text, handle in zip(*legend_of(drawn), strict=True)}
    marks = [legend[f"rebalance: {name}"] for name in decisions]
    assert len({(mark.get_marker(), mark.get_markerfacecolor()) for mark in marks}) == len(decisions)
    assert len({mark.get_marker() for mark in marks}) == len(decisions), "colour alone must not distinguish them"


def legend_of(figure: Figure) -> tuple[list[Any], list[Any]]:
    (legend,) = figure.legends
    return legend.get_texts(), legend.legend_handles


def test_the_history_of_a_trace_counts_under_the_placement_in_force() -> None:
    recorded = trace(moved_at=16)
    drawn = figures.imbalance_over_time(Run("run", (event(1), event(2)), recorded))
    each = drawn.axes[0].lines[0]
    expected = [float(imbalance(recorded.load[s], recorded.placements[int(s >= 16)]).mean()) for s in range(24)]
    np.testing.assert_allclose(each.get_ydata(), expected)
    begun = lines(drawn)["without moves"]
    assert np.nanmin(begun.get_xdata()) == 17
    np.testing.assert_allclose(
        begun.get_ydata()[:-1].mean(), float(imbalance(recorded.load[16:], recorded.placements[0]).mean())
    )


def test_smoothing_does_not_reach_over_a_rebalance() -> None:
    recorded = replace(trace(steps=1200, moved_at=600), iteration=torch.arange(1, 1201))
    level = lines(figures.imbalance_over_time(Run("run", trace=recorded)))["mean over layers, smoothed"]
    x, y = level.get_xdata(), level.get_ydata()
    before, after = (float(imbalance(recorded.load[:3], one).mean()) for one in recorded.placements)
    assert y[x <= 600][-1] == pytest.approx(before, rel=0.02)
    assert y[x > 600][0] == pytest.approx(after, rel=0.02)
    assert np.isnan(y).any()


def test_bars_are_slots_bytes_and_seconds() -> None:
    run = Run("run", (event(1), event(2, slots_moved=1, seconds={"search": 2.0, "of another version": 3.0})))
    slots, sizes = figures.moves_by_rebalance(run).axes
    assert bars(slots) == [[4, 1]]
    assert bars(sizes) == [[3, 3], [1, 1]]
    assert sizes.get_ylabel() == "MB, all GPUs"
    stages, iterations = figures.seconds_by_stage(run).axes
    assert dict(zip([group.get_label() for group in stages.containers], bars(stages), strict=True)) == {
        "count": [0.25, 0],
        "search": [1.5, 2],
        "move": [0.5, 0],
        "other": [0, 3],
    }
    assert [line.get_ydata().tolist() for line in iterations.lines[-2:]] == [[0.5, 0.5], [0.4, 0.4]]


@pytest.mark.parametrize("recorded", [None, trace()])
def test_hottest_experts_and_whether_they_stay(recorded: Trace | None) -> None:
    hot = (event(1), event(2, hottest_experts=(((3, 800),), ((5, 400),)))) if recorded is None else ()
    run = Run("run", hot, recorded)
    drawn = figures.hottest_experts(run)
    times_mean = drawn.axes[0].images[0].get_array()
    if recorded is None:
        total = sum(event().tokens_of_gpu_before[0])
        np.testing.assert_allclose(times_mean, [[800 * 8 / total] * 2, [800 * 8 / total, 400 * 8 / total]])
        assert {text.get_text() for text in drawn.axes[0].texts} == {"3", "5"}
        assert (
            sum(len(lines.get_segments()) for lines in drawn.axes[0].collections) == 2 * 1
        )  # each with a white line below it
    else:
        np.testing.assert_allclose(times_mean, 5 * 8 / (5 * 2 + 6))


def test_other_intervals_are_tried_on_the_trace() -> None:
    model = MoveModel(seconds_per_token=1.0, bytes_per_slot=1, bandwidth_inside=1.0, bandwidth_between=1.0)
    run = with_trials(Run("run", trace=trace(steps=48)), [4, 8], model)
    assert [one.every for one in run.what_if] == [4, 8]
    saved, moved = figures.other_intervals(run).axes
    dots = [line.get_ydata()[0] for line in saved.lines if line.get_marker() == "o"]
    assert dots == [one.saved for one in run.what_if]
    assert dots[0] > 0.2
    assert bars(moved) == [[one.slots_moved for one in run.what_if]]
    assert "Rebalancing every" in OTHER_INTERVALS.caption(run)


# --- whatever was recorded --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_whatever_was_recorded_can_be_drawn_and_put_in_words(name: str) -> None:
    run = with_trials(RUNS[name])
    for figure in figures.FIGURES:
        if not figure.lacks(run):
            drawn = figure.draw(run, NARROW)
            drawn.set_layout_engine("none")  # takes half of the time, and is not tested here
            drawn.draw_without_rendering()
            assert not re.search(r"\b(nan|inf|None)\b", figure.caption(run))
    assert not re.search(r"\b(nan|inf|None)\b", str(Summary.of(run).facts(run)))


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_is_cut_off(width: float) -> None:
    run = with_trials(RUNS["both"])
    for figure in figures.FIGURES:
        drawn = figure.draw(run, width)
        drawn.draw_without_rendering()
        edges = np.array(drawn.get_tightbbox().extents) / np.tile(drawn.get_size_inches(), 2)
        assert edges.min() >= -0.005
        assert edges.max() <= 1.005


NO_LOAD = ("nothing", "skipped alone", "windows without tokens alone", "trace without tokens")
LACKING = [(figure, name) for figure in (IMBALANCE_OVER_TIME, LOAD_BY_GPU, HOTTEST_EXPERTS) for name in NO_LOAD]
LACKING += [(MOVES_BY_REBALANCE, "trace"), (SECONDS_BY_STAGE, "trace")]


@pytest.mark.parametrize(("figure", "name"), [pytest.param(*one, id=f"{one[0].name} of {one[1]}") for one in LACKING])
def test_a_figure_is_refused_with_what_the_run_lacks(figure: ReportFigure, name: str) -> None:
    """`imbalance_over_time` raised an IndexError for events without a load and without a trace."""
    lack = figure.lacks(RUNS[name])
    assert lack
    with pytest.raises(DistplbError, match=f"^{re.escape(lack)}$"):
        figure.draw(RUNS[name], WIDE)


# --- steps and layers without tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("moved_at", [None, 12])
def test_steps_and_layers_without_tokens_are_in_no_mean(moved_at: int | None) -> None:
    """They counted as even: a trace in which every second step is empty seemed half as uneven."""
    whole = trace(steps=24, moved_at=moved_at)
    holes = with_holes(whole)
    steps = slice(None, None, 2)
    alone = Trace(
        whole.load[steps, 1:],
        tuple(Placement(one.expert_of_slot[1:], EXPERTS, 4) for one in whole.placements),
        whole.placement_of_step[steps],
        whole.iteration[steps],
        whole.layers[1:],
    )
    summary, expected = (Summary.of(Run("run", trace=one)) for one in (holes, alone))
    assert summary.imbalance_before == pytest.approx(expected.imbalance_before)
    assert summary.imbalance_after == pytest.approx(expected.imbalance_after)
    assert summary.imbalance_bound == pytest.approx(expected.imbalance_bound)
    assert (summary.steps_without_tokens, summary.layers_without_tokens) == (12, ("blocks.0.moe",))
    assert json.loads(json.dumps(summary.as_json(), allow_nan=False))["steps_without_tokens"] == 12
    run = Run("run", trace=holes)
    facts = {fact.name: fact for fact in summary.facts(run)}
    assert facts["Left out"][1:] == ("12 of 24 steps", "they have no tokens")
    assert facts["Without tokens"][1:] == ("1 of 2 layers", "blocks.0.moe; means leave them out")
    drawn = lines(figures.imbalance_over_time(run))["mean over layers, smoothed"].get_ydata()
    levels = lines(figures.imbalance_over_time(Run("run", trace=alone)))["mean over layers, smoothed"].get_ydata()
    np.testing.assert_allclose(drawn, levels)
    before = figures.load_by_gpu(run).axes[0].images[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(before), [[True] * 4, [False] * 4])


def test_levels_of_events_are_means_of_the_layers_with_tokens() -> None:
    run = Run("run", (event(**HALF), NOTHING, event(3, **HALF)))
    summary = Summary.of(run)
    assert (summary.imbalance_before, summary.imbalance_after, summary.imbalance_bound) == (1.5, 1.5, 1.5)
    assert summary.layers_without_tokens == ("blocks.0.moe",)
    drawn = lines(figures.imbalance_over_time(run))["mean over layers, by window"].get_ydata()
    np.testing.assert_array_equal(drawn, [1.5, 1.5, np.nan, 1.5, 1.5, 1.5, 1.5])


# --- strings are untrusted --------------------------------------------------------------------------------------


def test_no_string_of_a_run_becomes_part_of_a_drawing() -> None:
    odd = replace(event(layers=len(HOSTILE)), layers=HOSTILE, decision=HOSTILE[0], seconds=dict.fromkeys(HOSTILE, 1.0))
    run = Run(HOSTILE[0], (odd, replace(odd, iteration=20)), steps=steps(2))
    for figure in figures.FIGURES[:-1]:
        drawn = figures.image(figure.draw(run, NARROW))
        assert drawn.media_type == "image/svg+xml"
        for element in ElementTree.fromstring(drawn.content).iter():
            assert element.tag.split("}")[1] not in ("script", "foreignObject", "iframe", "a")
            for attribute, value in element.attrib.items():
                assert not attribute.startswith("on")
                if attribute.endswith("href"):
                    assert value.startswith(("#", "data:image/png;base64,"))


def test_names_that_look_like_formulas_are_shown_as_they_are() -> None:
    run = Run("run", (replace(event(), layers=("$a$.moe", "$b$.moe")),))
    drawn = figures.load_by_gpu(run)
    drawn.draw_without_rendering()
    assert [text.get_text() for text in drawn.axes[0].get_yticklabels()] == [r"\$a\$", r"\$b\$"]


# --- images -----------------------------------------------------------------------------------------------------


def test_a_large_drawing_is_sent_as_pixels() -> None:
    many = Run("run", tuple(event(number) for number in range(1, 270)))
    drawn = figures.image(figures.seconds_by_stage(many))
    assert drawn.media_type == "image/png"
    assert drawn.content.startswith(b"\x89PNG")
    assert drawn.width == round(96 * WIDE)


def test_the_same_run_gives_the_same_bytes() -> None:
    assert len({figures.image(figures.load_by_gpu(RUNS["one event"])).content for _ in range(2)}) == 1
