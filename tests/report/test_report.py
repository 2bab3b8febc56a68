"""The report shows what was recorded: figures against the numbers, words against the run, and no string runs.

Shapes: R rebalances, L layers, M GPUs, E experts, S steps.
"""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure

from distplb import DistplbError, EventLog, Placement, RebalanceEvent, Topology, Trace, imbalance, lower_bound
from distplb.cli.main import main
from distplb.core.price import MoveModel
from distplb.report import figures
from distplb.report.page import write_report
from distplb.report.run import Run
from distplb.report.style import NARROW, WIDE
from distplb.report.summary import Summary
from distplb.report.trials import with_trials

EXPERTS = 8


def event(number: int = 1, layers: int = 2, gpus: int = 4, **changed: Any) -> RebalanceEvent:
    """A rebalance every 10 iterations, which found GPU 0 the fullest by half and left it a tenth over the mean."""
    names = tuple(f"blocks.{layer}.moe" for layer in range(layers))
    before = ((600, *(400 - 200 // max(1, gpus - 1),) * (gpus - 1)),) * layers
    fields: dict[str, Any] = {
        "iteration": 10 * number,
        "layers": names,
        "decision": "moved",
        "reason": "the moves lower the cost by more than their price",
        "seconds": {"count": 0.25, "search": 1.5, "move": 0.5},
        "last_applied": 10 * number,
        "num_experts": EXPERTS,
        "num_nodes": 1,
        "steps": 10,
        "imbalance_before": (1.5,) * layers,
        "imbalance_after": (1.1,) * layers,
        "imbalance_bound": (1.0,) * layers,
        "imbalance_next": (1.2,) * layers,
        "tokens_of_gpu_before": before,
        "tokens_of_gpu_after": ((440,) * gpus,) * layers,
        "hottest_experts": (((3, 800), (1, 200)),) * layers,
        "slots_moved": 4,
        "bytes_inside": 3_000_000,
        "bytes_between": 1_000_000,
        "iteration_seconds": 0.5,
        "iteration_seconds_next": 0.4,
        "repaid": True,
    }
    return RebalanceEvent(**fields | changed)


def trace(
    steps: int = 24, layers: int = 2, experts: int = EXPERTS, gpus: int = 4, moved_at: int | None = None
) -> Trace:
    """Experts 0 and 1 are hot, and lie together until half of the slots change places."""
    load = torch.full((steps, layers, experts), 10)
    load += torch.arange(steps)[:, None, None] % 3
    load[..., :2] *= 5
    placements = [Placement.contiguous(layers, experts, gpus)]
    if moved_at is not None:
        placements.append(Placement(placements[0].expert_of_slot.roll(1, dims=1), experts, gpus))
    index = torch.zeros(steps, dtype=torch.int64)
    index[moved_at or steps :] = 1
    return Trace(
        load, tuple(placements), index, torch.arange(1, steps + 1), tuple(f"blocks.{i}.moe" for i in range(layers))
    )


def lines(figure: Figure) -> dict[str, Any]:
    """What the first axes draw, by their names in the legend."""
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
    wanted = np.array(event().tokens_of_gpu_before) / np.mean(event().tokens_of_gpu_before[0])
    np.testing.assert_allclose(before.get_array(), wanted)
    np.testing.assert_allclose(after.get_array(), 1)
    assert before.norm is after.norm
    assert (before.norm.vmin + before.norm.vmax) / 2 == 1
    assert f"{wanted[0, 0]:.2f}" in {text.get_text() for text in drawn.axes[0].texts}
    caption = next(panel for panel in figures.PANELS if panel.draw is figures.load_by_gpu).caption(run)
    assert f"{wanted[0, 0]:.2f} times the mean before and 1.00 after" in caption
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
    assert Summary.of(run).headline.startswith("Planned on the first half of the trace")


def test_nodes_are_separated() -> None:
    drawn = figures.load_by_gpu(Run("run", (event(gpus=6, num_nodes=3),)))
    assert [line.get_xdata()[0] for line in drawn.axes[0].lines] == [1.5, 3.5]


def test_the_history_of_events_has_a_level_for_each_window_and_a_mark_for_each_decision() -> None:
    decisions = ("moved", "kept", "dry run", "stopped")
    events = [event(n, decision=name, imbalance_before=(1.5, 1.7 - n / 10)) for n, name in enumerate(decisions, 1)]
    drawn = figures.imbalance_over_time(Run("run", tuple(events)))
    level = lines(drawn)["mean of layers in each window"]
    assert level.get_xdata().tolist() == [0, 10, 10, 20, 20, 30, 30, 40, 40, 50]
    np.testing.assert_allclose(level.get_ydata(), [1.55, 1.55, 1.5, 1.5, 1.45, 1.45, 1.4, 1.4, 1.2, 1.2])
    assert set(lines(drawn)["lower bound"].get_ydata()) == {1.0}
    legend = {text.get_text(): handle for text, handle in zip(*legend_of(drawn), strict=True)}
    marks = [legend[f"rebalance: {name}"] for name in decisions]
    assert len({(mark.get_marker(), mark.get_markerfacecolor()) for mark in marks}) == len(decisions)
    assert len({mark.get_marker() for mark in marks}) == len(decisions), "not told apart by colour alone"


def legend_of(figure: Figure) -> tuple[list[Any], list[Any]]:
    (legend,) = figure.legends
    return legend.get_texts(), legend.legend_handles


def test_the_history_of_a_trace_counts_under_the_placement_in_force() -> None:
    recorded = trace(moved_at=16)
    drawn = figures.imbalance_over_time(Run("run", (event(1), event(2)), recorded))
    each = drawn.axes[0].lines[0]
    wanted = [float(imbalance(recorded.load[s], recorded.placements[int(s >= 16)]).mean()) for s in range(24)]
    np.testing.assert_allclose(each.get_ydata(), wanted)
    begun = lines(drawn)["without any moves"]
    assert np.nanmin(begun.get_xdata()) == 17
    np.testing.assert_allclose(
        begun.get_ydata()[:-1].mean(), float(imbalance(recorded.load[16:], recorded.placements[0]).mean())
    )


def test_smoothing_does_not_reach_over_a_rebalance() -> None:
    recorded = replace(trace(steps=1200, moved_at=600), iteration=torch.arange(1, 1201))
    level = lines(figures.imbalance_over_time(Run("run", trace=recorded)))["mean of layers, smoothed"]
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
    found = drawn.axes[0].images[0].get_array()
    if recorded is None:
        total = sum(event().tokens_of_gpu_before[0])
        np.testing.assert_allclose(found, [[800 * 8 / total] * 2, [800 * 8 / total, 400 * 8 / total]])
        assert {text.get_text() for text in drawn.axes[0].texts} == {"3", "5"}
        assert sum(len(lines.get_segments()) for lines in drawn.axes[0].collections) == 2 * 1  # a white one under it
    else:
        np.testing.assert_allclose(found, 5 * 8 / (5 * 2 + 6))


def test_other_intervals_are_tried_on_the_trace() -> None:
    model = MoveModel(seconds_per_token=1.0, bytes_per_slot=1, bandwidth_inside=1.0, bandwidth_between=1.0)
    run = with_trials(Run("run", trace=trace(steps=48)), [4, 8], model)
    assert [one.every for one in run.what_if] == [4, 8]
    saved, moved = figures.other_intervals(run).axes
    dots = [line.get_ydata()[0] for line in saved.lines if line.get_marker() == "o"]
    assert dots == [one.saved for one in run.what_if]
    assert dots[0] > 0.2
    assert bars(moved) == [[one.slots_moved for one in run.what_if]]
    assert "Rebalancing every" in next(panel for panel in figures.PANELS if panel.title == "Other intervals").caption(
        run
    )


# --- whatever was recorded --------------------------------------------------------------------------------------

SKIPPED = RebalanceEvent(
    iteration=30, layers=("blocks.0.moe", "blocks.1.moe"), decision="skipped", reason="", seconds={}, last_applied=20
)
ZERO = {
    "tokens_of_gpu_before": ((0,) * 4,) * 2,
    "tokens_of_gpu_after": ((0,) * 4,) * 2,
    "hottest_experts": (((0, 0),),) * 2,
}
LEVELS = ("imbalance_before", "imbalance_after", "imbalance_bound")
HALF: dict[str, Any] = dict.fromkeys((*LEVELS, "imbalance_next"), (None, 1.5)) | {
    "tokens_of_gpu_before": ((0,) * 4, (600, 400, 200, 400)),
    "tokens_of_gpu_after": ((0,) * 4, (440.5, 400.5, 359, 400)),
    "hottest_experts": (((0, 0),), ((3, 800), (1, 200))),
}
NOTHING = replace(
    SKIPPED, decision="kept", iteration=20, num_experts=EXPERTS, num_nodes=1
)  # of a window without tokens


def with_holes(given: Trace) -> Trace:
    """Every second step has no tokens, and the first layer none in any."""
    load = given.load.clone()
    load[1::2], load[:, 0] = 0, 0
    return replace(given, load=load)


RUNS = {
    "nothing": Run("nothing"),
    "one event": Run("run", (event(),)),
    "one layer": Run("run", (event(layers=1), event(2, layers=1))),
    "one GPU": Run("run", (event(gpus=1, tokens_of_gpu_before=((9,),) * 2),)),
    "skipped alone": Run("run", (SKIPPED,)),
    "skipped between": Run("run", (event(1), SKIPPED, event(4))),
    "no tokens": Run("run", (event(**ZERO),)),
    "an older version's": Run(
        "run", (event(tokens_of_gpu_before=(), tokens_of_gpu_after=(), hottest_experts=(), num_experts=0),)
    ),
    "dry run": Run(
        "run", tuple(event(n, decision="dry run", slots_moved=0, bytes_inside=0, bytes_between=0) for n in (1, 2))
    ),
    "nothing is known of the next window": Run(
        "run", (event(imbalance_next=None, iteration_seconds_next=None, repaid=None),)
    ),
    "trace": Run("run", trace=trace(steps=6)),
    "trace of one step, layer and GPU": Run("run", trace=trace(steps=1, layers=1, gpus=1)),
    "trace without tokens": Run(
        "run", trace=replace(trace(steps=4), load=torch.zeros(4, 2, EXPERTS, dtype=torch.int64))
    ),
    "trace of steps and layers without tokens": Run("run", trace=with_holes(trace(steps=24))),
    "trace of one step with tokens": Run("run", trace=with_holes(trace(steps=2))),
    "moved, with steps and layers without tokens": Run("run", trace=with_holes(trace(steps=24, moved_at=12))),
    "a layer without tokens": Run("run", (event(**HALF), event(2, **HALF | {"imbalance_next": None}))),
    "a window without tokens follows": Run("run", (event(imbalance_next=(None, None)),)),
    "a window without tokens between": Run("run", (event(), NOTHING, event(3))),
    "windows without tokens alone": Run("run", (NOTHING,)),
    "trace on other GPUs": Run("run", trace=trace(steps=4), topology=Topology(2, 1)),
    "both": Run("run", (event(1), event(2)), trace(steps=20, moved_at=10)),
    "both, all skipped": Run("run", (SKIPPED,), trace(steps=20)),
}


@pytest.mark.parametrize("name", RUNS)
def test_whatever_was_recorded_can_be_drawn_and_put_in_words(name: str) -> None:
    run = with_trials(RUNS[name])
    for panel in figures.PANELS:
        if not panel.lacks(run):
            drawn = panel.draw(run, NARROW)
            drawn.set_layout_engine("none")  # half of the time, and no part of this
            drawn.draw_without_rendering()
            assert not re.search(r"\b(nan|inf|None)\b", panel.caption(run))
    assert not re.search(r"\b(nan|inf|None)\b", str(Summary.of(run).facts(run)))


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_nothing_is_cut_off(width: float) -> None:
    run = with_trials(RUNS["both"])
    for panel in figures.PANELS:
        drawn = panel.draw(run, width)
        drawn.draw_without_rendering()
        edges = np.array(drawn.get_tightbbox().extents) / np.tile(drawn.get_size_inches(), 2)
        assert edges.min() >= -0.005
        assert edges.max() <= 1.005


@pytest.mark.parametrize("name", ["nothing", "skipped between", "both"])
def test_the_page_has_each_figure_for_a_laptop_and_a_phone_or_what_it_lacks(name: str, tmp_path: Path) -> None:
    run = write_report(RUNS[name], tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    for panel in figures.PANELS:
        drawn = [image for image in page.images if image["alt"].startswith(panel.title)]
        assert len(drawn) == (0 if panel.lacks(run) else 1)
        assert (panel.lacks(run) or panel.caption(run)) in page.text
    assert Summary.of(run).headline in page.text
    assert page.rows == (0 if not run.events else len(run.events) + 1)
    pairs = re.findall(
        r'<source media="\(max-width: 640px\)" srcset="(\S+)" width="360".*\n<img src="(\S+)" width="960"', source
    )
    assert len(pairs) == len(page.images)
    for narrow, wide in pairs:
        assert narrow != wide
        for address in (narrow, wide):
            assert ElementTree.fromstring(base64.b64decode(address.split(",")[1])).tag.endswith("svg")


def test_what_is_missing_is_said_with_what_to_switch_on() -> None:
    said = {panel.name: panel.lacks(RUNS["nothing"]) for panel in figures.PANELS}
    assert all("Rebalancer(record=...)" in text for text in said.values()), said
    said = {panel.name: panel.lacks(RUNS["dry run"]) for panel in figures.PANELS}
    assert "leave out dry_run=True" in said["moves-by-rebalance"]
    assert said["load-by-gpu"] == said["imbalance-over-time"] == said["hottest-experts"] == ""


@pytest.mark.parametrize(
    ("run", "wording"),
    [
        ("nothing", "No load was recorded, so that nothing can be said of the imbalance."),
        (
            "one event",
            "Rebalancing lowered the imbalance from 1.50 to 1.20; no placement could beat 1.00. The job's",
        ),
        ("dry run", "Nothing was moved, as asked: plans would have left 1.20 instead of 1.50"),
        ("nothing is known of the next window", "The imbalance is 1.50; no placement could beat 1.00. What a plan"),
        (Run("run", (event(imbalance_next=(1.6, 1.4)),)), "Rebalancing did not lower the imbalance: 1.50 without it"),
        (Run("run", (event(repaid=False), event(2))), "By the job's clock 1 of 2 rebalances certainly did not repay"),
        (Run("run", (event(decision="stopped"),)), "Rebalancing has turned itself off."),
    ],
)
def test_the_headline_is_the_result(run: str | Run, wording: str) -> None:
    assert wording in Summary.of(RUNS[run] if isinstance(run, str) else run).headline


# --- steps and layers without tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("moved_at", [None, 12])
def test_steps_and_layers_without_tokens_are_in_no_mean(moved_at: int | None) -> None:
    """They counted as even: a trace of which every second step is empty seemed half as uneven."""
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
    found, wanted = (Summary.of(Run("run", trace=one)) for one in (holes, alone))
    assert found.imbalance_before == pytest.approx(wanted.imbalance_before)
    assert found.imbalance_after == pytest.approx(wanted.imbalance_after)
    assert found.imbalance_bound == pytest.approx(wanted.imbalance_bound)
    assert (found.steps_without_tokens, found.layers_without_tokens) == (12, ("blocks.0.moe",))
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["steps_without_tokens"] == 12
    run = Run("run", trace=holes)
    facts = {fact.name: fact for fact in found.facts(run)}
    assert facts["Left out"][1:] == ("12 of 24 steps", "they have no tokens")
    assert facts["Without tokens"][1:] == ("1 of 2 layers", "blocks.0.moe; means leave them out")
    drawn = lines(figures.imbalance_over_time(run))["mean of layers, smoothed"].get_ydata()
    levels = lines(figures.imbalance_over_time(Run("run", trace=alone)))["mean of layers, smoothed"].get_ydata()
    np.testing.assert_allclose(drawn, levels)
    before = figures.load_by_gpu(run).axes[0].images[0].get_array()
    np.testing.assert_array_equal(np.ma.getmaskarray(before), [[True] * 4, [False] * 4])


def test_levels_of_events_are_means_of_the_layers_with_tokens() -> None:
    run = Run("run", (event(**HALF), NOTHING, event(3, **HALF)))
    found = Summary.of(run)
    assert (found.imbalance_before, found.imbalance_after, found.imbalance_bound) == (1.5, 1.5, 1.5)
    assert found.layers_without_tokens == ("blocks.0.moe",)
    drawn = lines(figures.imbalance_over_time(run))["mean of layers in each window"].get_ydata()
    np.testing.assert_array_equal(drawn, [1.5, 1.5, np.nan, 1.5, 1.5, 1.5, 1.5])


# --- strings are untrusted --------------------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=http://evil.example/x onerror=alert(1)>',
    "'onload='alert(1)",
    r"$\frac{1}{$ & ]]> --> {{ 7 * 7 }} {% raw %}",
    "</td></table><iframe src=//evil.example>",
    "nul\0 lone\ud800 back‮wards",
)


class Page(HTMLParser):
    """What a browser would make of a page, as far as tests ask."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.images, self.addresses, self.text, self.rows = (
            set[str](),
            list[dict[str, str]](),
            list[str](),
            "",
            0,
        )
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.rows += tag == "tr"
        self.images += [given] * (tag == "img")
        self.addresses += [given[name] for name in ("src", "srcset", "href", "action", "data") if name in given]
        assert not [name for name in given if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def hostile() -> Run:
    names, told = HOSTILE[:2], event(layers=2)
    events = [
        replace(told, iteration=number, layers=names, reason=text, decision=text, seconds={text: 1.0, "move": 1.0})
        for number, text in enumerate(HOSTILE, 1)
    ]
    recorded = replace(trace(), layers=names, note="".join(HOSTILE[:-1]))
    return Run(HOSTILE[0], tuple(events), recorded)


def test_no_string_of_a_run_becomes_markup(hostile: Run, tmp_path: Path) -> None:
    write_report(hostile, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    allowed = "html head meta link title style body header h1 p dl div dt dd main section h2 figure picture source img"
    assert page.tags <= {*allowed.split(), "figcaption", "table", "thead", "tr", "th", "tbody", "td", "footer"}
    assert all(address.startswith("data:") for address in page.addresses)
    assert all(text in page.text for text in HOSTILE[:-1])
    assert "nul� lone� back�wards" in page.text
    assert any(HOSTILE[0] in image["alt"] for image in page.images)
    assert "default-src 'none'" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_string_of_a_run_becomes_part_of_a_drawing() -> None:
    told = replace(event(layers=len(HOSTILE)), layers=HOSTILE, decision=HOSTILE[0], seconds=dict.fromkeys(HOSTILE, 1.0))
    run = Run(HOSTILE[0], (told, replace(told, iteration=20)))
    for panel in figures.PANELS[:-1]:
        drawn = figures.image(panel.draw(run, NARROW))
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


# --- what is read -----------------------------------------------------------------------------------------------


def write_events(path: Path, *events: RebalanceEvent) -> None:
    log = EventLog(path)
    for one in events:
        log(replace(one, imbalance_next=None))
        log(one)
    log.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a `Rebalancer` leaves it."""
    write_events(tmp_path / "run" / "events.jsonl", event(1), event(2))
    trace(steps=20, moved_at=10).save(tmp_path / "run" / "000000000001.npz")
    return tmp_path / "run"


def test_a_run_is_read_from_its_folder_its_log_or_its_trace(folder: Path) -> None:
    both = Run.read(folder)
    assert (both.name, len(both.events), both.every, both.topology) == ("run", 2, 10, Topology(1, 4))
    assert both.trace is not None
    log, recorded = Run.read(folder / "events.jsonl"), Run.read(folder / "000000000001.npz")
    assert log.events == both.events
    assert log.trace is None
    assert recorded.events == ()
    assert recorded.trace is not None
    assert torch.equal(recorded.trace.load, both.trace.load)


@pytest.mark.parametrize(
    ("changed", "wording"),
    [
        ({"imbalance_before": (1.5,)}, "imbalances of 1 layers, not 2"),
        ({"imbalance_before": (None, None)}, "it has 10 steps, but tokens in no layer"),
        ({"imbalance_after": (1.5, "x")}, "iteration 10 is damaged"),
        ({"imbalance_next": (1.5, float("inf"))}, "negative or not finite"),
        ({"seconds": {"move": -1.0}}, "negative or not finite"),
        ({"tokens_of_gpu_before": ((1, 2), (1,))}, "[1, 2, 4] GPUs"),
        ({"tokens_of_gpu_before": ((10**400, 2, 3, 4),) * 2}, "iteration 10 is damaged"),
        ({"num_nodes": 3}, "[4] GPUs on 3 nodes"),
        ({"hottest_experts": (((1,),),) * 2}, "damaged"),
        ({"reason": 7}, "a name is no text"),
        ({"layers": 7}, "damaged"),
        ({"iteration": "7"}, "damaged"),
    ],
)
def test_a_damaged_event_is_refused_by_name(changed: dict[str, Any], wording: str) -> None:
    with pytest.raises(DistplbError, match=r"^log: the event of iteration") as refused:
        Run("log", (replace(event(), **changed),))
    assert wording in str(refused.value)


def test_files_of_different_jobs_are_refused(folder: Path) -> None:
    with pytest.raises(DistplbError, match="its trace is of 4 GPUs and 2 layers, the topology of 8 GPUs"):
        Run.read(folder, Topology(1, 8))
    with pytest.raises(DistplbError, match="the events of 3 layers"):
        Run("run", (event(layers=3),), trace())


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_the_figures_and_says_where(folder: Path, tmp_path: Path) -> None:
    page, png = tmp_path / "report.html", tmp_path / "figures"
    done = CliRunner().invoke(main, ["report", str(folder), "--output", str(page), "--png", str(png), "--every", "5"])
    assert done.exit_code == 0, done.output
    headline, where, *drawn = done.stdout.splitlines()
    assert headline == Summary.of(Run.read(folder)).headline
    assert where == str(page)
    assert drawn == sorted(str(path) for path in png.iterdir())
    assert [Path(path).name for path in drawn] == [f"{n}-{panel.name}.png" for n, panel in enumerate(figures.PANELS, 1)]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert len(Page(page.read_text()).images) == len(figures.PANELS)


def test_the_command_tells_the_numbers_as_json(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["report", str(folder / "events.jsonl"), "--output", str(page), "--json"])
    told = json.loads(done.stdout)
    assert told["report"] == str(page)
    assert (told["imbalance_before"], told["imbalance_after"]) == pytest.approx((1.5, 1.2))
    assert (told["slots_moved"], told["bytes_moved"], told["repaid"]) == (8, 8_000_000, [True, True])


@pytest.mark.parametrize(
    ("arguments", "wording"),
    [
        (["nowhere"], "there is no nowhere; pass the folder of Rebalancer(record=...)"),
        (["{run}/empty.jsonl"], "neither events nor a trace"),
        (["{run}/damaged.jsonl"], "the event of iteration 10 is damaged"),
        (["{run}/../noise.npz"], "noise.npz cannot be read"),
        (["{run}", "--every", "1000"], "the trace covers 20 iterations"),
        (["{run}/events.jsonl", "--every", "5"], "events.jsonl has no trace to try intervals on"),
        (["{run}", "--nodes", "2"], "--nodes 2 without --gpus-per-node"),
        (["{run}", "--output", "{run}/no/report.html"], "there is no folder"),
        (["{run}/000000000001.npz", "--gpus-per-node", "3"], "8 experts cannot be spread evenly over 3 GPUs"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], wording: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "empty.jsonl").write_text("")
    (folder / "damaged.jsonl").write_text(event(imbalance_before=(1.5,)).to_json() + "\n")
    (folder.parent / "noise.npz").write_bytes(b"PK\x03\x04 and no more")
    done = CliRunner().invoke(main, ["report", *(one.format(run=folder) for one in arguments)])
    assert done.exit_code == 2
    assert wording in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_missing_library_is_named_with_what_brings_it(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distplb.report.page", None)
    done = CliRunner().invoke(main, ["report", str(folder)])
    assert done.exit_code == 2
    assert "pip install 'distplb[report]'" in done.stderr


@pytest.mark.parametrize("lengths", [[1], [5], [1, 1], [3, 3, 3], [1, 5, 1], [5, 1], [1, 1, 1, 9]])
def test_no_iteration_is_planned_on_and_judged(lengths: list[int]) -> None:
    """The second half of a trace began in the middle of an iteration, whose other micro-batches were planned on."""
    iteration = [10 * nth for nth, length in enumerate(lengths) for _ in range(length)]
    run = Run("run", trace=replace(trace(len(iteration)), iteration=torch.tensor(iteration)))
    assert run.judged is not None
    assert run.trace is not None
    unseen = run.judged.unseen
    begins = [iteration.index(at) for at in sorted(set(iteration))]
    half = next((at for at in begins if at >= max(1, len(iteration) // 2)), None)
    if half is None:
        assert unseen is None
    else:
        assert unseen is not None
        assert int(unseen.before.sum()) == int(run.trace.load[half:].sum())
        assert (unseen.first, unseen.last) == (iteration[half], iteration[-1])
    assert Summary.of(run).imbalance_before is not None
