"""The figures of sampled steps against their numbers, for small and large jobs."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from recorded_runs import HOSTILE, RUNS, SECONDS, many_steps, step, steps

from distplb import DistplbError
from distplb.report import figures
from distplb.report.drawings.base import ReportFigure
from distplb.report.drawings.every_sampled_step import EVERY_SAMPLED_STEP
from distplb.report.drawings.replicas_by_expert import REPLICAS_BY_EXPERT
from distplb.report.drawings.style import NARROW, WIDE
from distplb.report.drawings.time_of_a_step import TIME_OF_A_STEP
from distplb.report.run import Run
from distplb.report.step_summary import distances, products_apart
from distplb.report.step_times import StepTime

OF_STEPS = (EVERY_SAMPLED_STEP, REPLICAS_BY_EXPERT, TIME_OF_A_STEP)


def timed(name: str, **seconds: float) -> Run:
    """A run with two steps, the second of which takes these seconds by part."""
    of_step = {part.replace("_", " "): value for part, value in seconds.items()}
    return Run(name, steps=(step(1), step(2, seconds=of_step)))


def dots(figure: Figure, mark: str) -> list[tuple[float, float]]:
    """Step and imbalance of each dot that is drawn with this mark."""
    line = next(one for one in figure.axes[0].lines if one.get_marker() == mark)
    return [(x, 1 + 10**y) for x, y in line.get_xydata().tolist()]


# --- every sampled step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_each_layer_of_each_step_is_a_dot_before_and_after(width: float) -> None:
    events = (
        step(1, imbalance_before=(3.0, 1.5), imbalance_after=(1.004, 1.01)),
        step(2, layers=1, imbalance_before=(2.0,), imbalance_after=(1.0,)),
        step(3, imbalance_before=(None, 1.25), imbalance_after=(None, 1.002)),
    )
    drawn = figures.every_sampled_step(Run("run", steps=events), width)
    np.testing.assert_allclose(dots(drawn, "o"), [(1, 3.0), (1, 1.5), (2, 2.0), (3, 1.25)])
    np.testing.assert_allclose(dots(drawn, "s"), [(1, 1.004), (1, 1.01), (2, 1.001), (3, 1.002)])
    assert [text.get_text() for text in drawn.axes[0].texts] == ["worst 3.000", "worst 1.010"]
    caption = EVERY_SAMPLED_STEP.caption(Run("run", steps=events))
    assert "At home the mean was 1.938 and the worst 3.000 (step 1, layer layers.0)." in caption
    assert "With replicas the mean was 1.004 and the worst 1.010 (step 1, layer layers.1)." in caption
    assert "could beat 1.000" in caption


def test_the_excess_is_as_far_apart_as_it_differs() -> None:
    """From 1.004 to 1.04 is as far on the axis as from 1.04 to 1.4; what is more even than 1.001 is drawn there."""
    levels = (1.004, 1.04, 1.4, 1.0)
    events = [step(number, layers=1, imbalance_before=(one,)) for number, one in enumerate(levels, 1)]
    drawn = figures.every_sampled_step(Run("run", steps=tuple(events)))
    heights = next(one for one in drawn.axes[0].lines if one.get_marker() == "o").get_ydata()
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1])
    names = [text.get_text() for text in drawn.axes[0].get_yticklabels()]
    places = drawn.axes[0].get_yticks()
    assert names[0] == "≤ 1.001"
    assert heights[3] == pytest.approx(places[0])
    for name, place in list(zip(names, places, strict=True))[1:]:
        assert 1 + 10**place == pytest.approx(float(name))


def test_resumed_jobs_go_on_counting_behind_a_line() -> None:
    drawn = figures.every_sampled_step(RUNS["steps of several starts"])
    assert [line.get_xdata()[0] for line in drawn.axes[0].lines if line.get_linewidth() == 0.7] == [110]
    assert max(x for x, _ in dots(drawn, "o")) == 130
    assert "resumed 1 time" in EVERY_SAMPLED_STEP.caption(RUNS["steps of several starts"])


# --- replicas by expert -----------------------------------------------------------------------------------------


def test_cells_are_the_shares_of_steps_in_which_a_gpu_held_a_replica() -> None:
    held = (((0, 1, 200),), ((0, 1, 100), (5, 0, 50)))
    events = (step(1, replicas=held), step(2, replicas=((), held[1])), step(3, layers=1, replicas=((),)))
    drawn = figures.replicas_by_expert(Run("run", steps=events))
    np.testing.assert_allclose(drawn.axes[0].images[0].get_array(), [[0, 1 / 3, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    assert [text.get_text() for text in drawn.axes[0].get_yticklabels()] == ["0 · 0", "1 · 0", "1 · 5"]
    (homes,) = drawn.axes[0].lines
    assert list(homes.get_xdata()) == [0, 0, 2]
    caption = REPLICAS_BY_EXPERT.caption(Run("run", steps=events))
    total = sum(step().tokens_of_gpu_before[0])
    assert (
        f"slot 0 of layer layers.1, whose home is GPU 0: {100 * 200 / (2 * total):.1f} % of the layer's tokens"
        in caption
    )


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_of_many_experts_those_with_most_replicas_are_shown(width: float) -> None:
    events = many_steps(20, layers=8, slots=64, gpus=16, nodes=2)
    run = Run("run", steps=events)
    drawn = figures.replicas_by_expert(run, width)
    share = drawn.axes[0].images[0].get_array()
    assert share.shape == (40, 16)
    assert (np.diff(share.sum(1)) <= 1e-9).all(), "hottest first"
    held: dict[Any, int] = {}
    for one in events:
        for layer, replicas in zip(one.layers, one.replicas, strict=True):
            for slot, _, _ in replicas:
                held[layer, slot] = held.get((layer, slot), 0) + 1
    assert share[0].sum() * 20 == pytest.approx(max(held.values()))
    assert f"the 40 with most replicas, of {len(held)} that had any" in REPLICAS_BY_EXPERT.caption(run)
    assert 7.5 in [line.get_xdata()[0] for line in drawn.axes[0].lines], "nodes are separated"


def test_steps_on_other_gpus_are_left_out() -> None:
    run = Run("run", steps=(step(1, gpus=8), step(2, started=2.0), step(3, started=2.0)))
    assert figures.replicas_by_expert(run).axes[0].images[0].get_array().shape == (4, 4)
    assert "Left out: 1 step on another number of GPUs or slots." in REPLICAS_BY_EXPERT.caption(run)


# --- time of a step ---------------------------------------------------------------------------------------------


def test_a_typical_step_is_the_middle_half_without_the_first() -> None:
    totals = (100.0, 1.0, 4.0, 2.0, 9.0)
    events = [step(number, seconds={"experts": one, "push": one}) for number, one in enumerate(totals, 1)]
    time = Run("run", steps=tuple(events)).step_time
    assert time is not None
    assert time.parts == {"experts": 3.0, "push": 3.0}
    assert time.num_steps == 2
    alone = Run("run", steps=tuple(events[:1])).step_time
    assert alone is not None
    assert alone.total == 200


def test_the_first_step_of_each_start_is_a_warm_up() -> None:
    events = [
        step(1, started=started, seconds={"experts": 50.0}) for started in (1.0, 2.0)
    ] + [step(2, started=started, seconds={"experts": 1.0}) for started in (1.0, 2.0)]  # fmt: skip
    time = Run("run", steps=tuple(events)).step_time
    assert time is not None
    assert time.total == 1


def test_steps_whose_backward_is_not_known_do_not_count_where_others_are() -> None:
    """Their backward would count as zero seconds."""
    forward = {"experts": 1.0}
    events = [step(number, seconds=forward) for number in (1, 2, 3)]
    events.append(step(4, seconds=forward | {"experts backward": 2.0}))
    time = Run("run", steps=tuple(events)).step_time
    assert time is not None
    assert time.parts == {"experts": 1.0, "experts backward": 2.0}


def test_bars_are_this_run_an_even_gpu_and_the_others() -> None:
    drawn = figures.time_of_a_step(RUNS["steps beside others"])
    (axes,) = drawn.axes
    widths: dict[float, dict[str, float]] = {}
    for group in axes.containers:
        (bar,) = group
        widths.setdefault(round(bar.get_y() + bar.get_height() / 2), {})[group.get_label()] = bar.get_width()
    assert widths[0] == pytest.approx({name: 1000 * value for name, value in SECONDS.items()})
    assert widths[1] == pytest.approx({"experts": 40, "experts backward": 80, "dispatch": 10})
    assert widths[3]["experts"] == pytest.approx(30)
    names = [text.get_text() for text in axes.texts]
    assert names[1::2] == ["this run", "an even GPU with the same experts", "forced", "static"]
    assert names[0::2] == ["150 ms", "130 ms", "150 ms", "140 ms"]
    assert [line.get_xdata()[0] for line in axes.lines] == [pytest.approx(130)]


def test_the_caption_tells_the_distance_by_parts() -> None:
    caption = TIME_OF_A_STEP.caption(RUNS["steps beside others"])
    assert "would take 130 ms (dashed): this is the fair ceiling" in caption
    assert "This run takes 150 ms, that is 20.0 ms (15.4 %) longer." in caption
    assert "Beside forced, whose step takes 150 ms, this run takes as long." in caption
    assert "Beside static, whose step takes 140 ms, this run takes 10.0 ms (7.1 %) longer: products +10.0 ms" in caption
    assert "longer: products +10.0 ms (+7.1 %)." in caption
    assert "With static and forced beside it, the products' part has two: skewed experts −10.0 ms, " in caption
    assert "and smaller products, which come with replicas, +10.0 ms." in caption


def test_parts_of_the_distance_add_up_to_it() -> None:
    one, two = (Run("run", steps=many_steps(30, 2, 8, 4, seed=seed)) for seed in (1, 2))
    (distance,) = distances(replace(one, beside=(two,)))
    assert sum(distance.longer.values()) == pytest.approx(distance.seconds - distance.seconds_there)
    assert list(distance.longer) == ["waiting", "push", "split", "products", "the rest"]


def test_only_forwards_are_compared_if_a_backward_is_not_known() -> None:
    whole = timed("whole", experts=1.0, experts_backward=2.0, bring_home=1.0, waiting=0.5)
    forward = timed("forward", experts=1.0, waiting=0.25)
    # The steps of `timed` begin with a warm-up.
    (distance,) = distances(replace(whole, beside=(forward,)))
    assert distance.is_forward
    assert (distance.seconds, distance.seconds_there) == (1.5, 1.25)
    assert distance.longer["push"] == 0
    caption = TIME_OF_A_STEP.caption(replace(whole, beside=(forward,)))
    assert "comparing the forward alone, this run takes 250 ms (20.0 %) longer: waiting +250 ms (+20.0 %)" in caption
    assert "The backward was not measured." in TIME_OF_A_STEP.caption(forward)


def test_other_numbers_of_tokens_are_told() -> None:
    tokens = ((2000, 2000, 2000, 2000),) * 2
    other = Run("long", steps=steps(tokens_of_gpu_before=tokens))
    caption = TIME_OF_A_STEP.caption(Run("run", steps=steps(), beside=(other,)))
    assert re.search(r"a step has \d\d\.\d % of the tokens there, so times do not compare", caption)


def test_products_are_told_apart_only_where_both_runs_are_there() -> None:
    run = RUNS["steps beside others"]
    forced, static = run.beside
    found = products_apart(run)
    assert found is not None
    assert found[1:] == (pytest.approx(-0.01), pytest.approx(0.01))
    for others in ((), (forced,), (static,), (Run("other", steps=steps()), forced)):
        assert products_apart(replace(run, beside=others)) is None


def test_parts_of_another_version_are_summed_as_other() -> None:
    time = StepTime.of(timed("run", experts=1.0, telepathy=0.5, other=0.25).sampled)
    assert time is not None
    assert time.parts == {"experts": 1.0, "other": 0.75}
    assert time.even.total == 1.75


# --- whatever was recorded --------------------------------------------------------------------------------------

LACKING = [(figure, name, "pass on_event=EventLog(") for figure in OF_STEPS for name in ("nothing", "one event")]
LACKING += [(EVERY_SAMPLED_STEP, "steps without tokens", "have no tokens")]
LACKING += [(REPLICAS_BY_EXPERT, "steps without replicas", "had a replica")]
LACKING += [(TIME_OF_A_STEP, "steps without a time", "have no times")]


@pytest.mark.parametrize(("figure", "name", "wording"), LACKING)
def test_a_figure_is_refused_with_what_the_run_lacks(figure: ReportFigure, name: str, wording: str) -> None:
    assert wording in figure.lacks(RUNS[name])
    with pytest.raises(DistplbError, match=f"^{re.escape(figure.lacks(RUNS[name]))}$"):
        figure.draw(RUNS[name], WIDE)


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("size", [(10, 2, 8, 2), (60, 58, 256, 64)])
def test_nothing_is_cut_off_whatever_the_size(size: tuple[int, int, int, int], width: float) -> None:
    run = Run("run", steps=many_steps(*size), beside=(Run("x" * 300, steps=steps()), Run("W " * 100, steps=steps())))
    for figure in OF_STEPS:
        drawn = figure.draw(run, width)
        drawn.draw_without_rendering()
        edges = np.array(drawn.get_tightbbox().extents) / np.tile(drawn.get_size_inches(), 2)
        assert edges.min() >= -0.005, figure.title
        assert edges.max() <= 1.005, figure.title


def test_no_string_of_a_step_becomes_part_of_a_drawing() -> None:
    names = HOSTILE[:2]
    events = [replace(one, layers=names, seconds=dict.fromkeys(HOSTILE, 1.0)) for one in steps(3)]
    run = Run(HOSTILE[0], steps=tuple(events), beside=tuple(Run(name, steps=tuple(events)) for name in HOSTILE))
    for figure in OF_STEPS:
        drawn = figures.image(figure.draw(run, NARROW))
        for element in ElementTree.fromstring(drawn.content).iter():
            assert element.tag.split("}")[1] not in ("script", "foreignObject", "iframe", "a")
            for attribute, value in element.attrib.items():
                assert not attribute.startswith("on")
                if attribute.endswith("href"):
                    assert value.startswith(("#", "data:image/png;base64,"))
