"""The advice on a trace: what is saved and how surely, when moves have repaid themselves, and the answer in words.

Shapes: S steps, L layers, E experts, R rebalances.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from distplb import (
    DistplbError,
    EventLog,
    MoveModel,
    Placement,
    RebalanceEvent,
    TimeCurve,
    Topology,
    Trace,
    imbalance,
    plan,
)
from distplb.cli.main import main
from distplb.study.advice import PRICED, STATIC, STEPS, SUM, Study, WhatIf, assumed_model, what_if
from distplb.study.bootstrap import Saving, saving
from distplb.study.costs import AssumedJob, steps_stood_for
from distplb.study.verdict import verdict

TRACES = Path(__file__).parents[2] / "benchmarks" / "traces"
TOPOLOGY = Topology(num_nodes=1, gpus_per_node=2)
MODEL = MoveModel(seconds_per_token=1e-3, bytes_per_slot=10, bandwidth_inside=1000.0, bandwidth_between=100.0)


def trace_of(load: Tensor, iteration: Tensor | None = None, num_gpus: int = 2) -> Trace:
    steps = len(load)
    placement = Placement.contiguous(load.shape[1], load.shape[2], num_gpus)
    return Trace(
        load,
        (placement,),
        torch.zeros(steps, dtype=torch.int64),
        torch.arange(steps) if iteration is None else iteration,
    )


def skewed(steps: int) -> Tensor:
    """`[S, 1, 4]`: two hot experts on the first of two GPUs; apart, both GPUs have the same."""
    return torch.tensor([[[6, 6, 1, 1]]]).expand(steps, -1, -1).clone()


def noise(steps: int, tokens: float = 20.0, experts: int = 32) -> Tensor:
    """`[S, 2, E]`: nothing but chance, anew in each step."""
    mean = torch.full((steps, 2, experts), tokens)
    return torch.poisson(mean, generator=torch.Generator().manual_seed(0)).long()


# --- what is saved ----------------------------------------------------------------------------------------------


def test_what_is_saved_is_counted_by_hand() -> None:
    # Contiguous: 12 tokens on the fullest GPU; apart: 7. One swap moves two slots, 20 bytes at 1000 bytes/s.
    (one,) = Study(trace_of(skewed(20)), TOPOLOGY, MODEL).run([(STEPS, 4)])
    assert (one.every, one.rebalances, one.slots_moved) == (4, 4, 2)
    assert one.imbalance == one.imbalance_seen == one.worst_step == 1.0
    assert one.static_seconds == pytest.approx(16 * 0.012)
    assert one.compute_seconds == pytest.approx(16 * 0.007)
    assert one.move_seconds == pytest.approx(0.020)
    assert one.saved == pytest.approx(1 - (16 * 0.007 + 0.020) / (16 * 0.012))
    assert one.low is not None
    assert one.high is not None
    assert one.low <= one.saved <= one.high


def test_static_saves_nothing_and_moves_nothing() -> None:
    (one,) = Study(trace_of(skewed(20)), TOPOLOGY, MODEL).run([(STATIC, 4)])
    assert (one.saved, one.low, one.high, one.slots_moved, one.imbalance) == (0, 0, 0, 0, 12 / 7)


def test_the_steps_before_the_first_plan_are_out_on_both_sides() -> None:
    load = skewed(12)
    load[:4] *= 1000
    (one,) = Study(trace_of(load), TOPOLOGY, MODEL).run([(STEPS, 4)])
    assert one.static_seconds == pytest.approx(8 * 0.012)
    assert one.compute_seconds == pytest.approx(8 * 0.007)


def test_an_interval_that_is_cut_off_is_out_too() -> None:
    found = [Study(trace_of(skewed(steps)), TOPOLOGY, MODEL).run([(STEPS, 4)])[0] for steps in (12, 15)]
    assert found[0] == found[1]


def test_plans_with_the_price_do_not_move_what_does_not_repay_itself() -> None:
    dear = replace(MODEL, bytes_per_slot=10**6)
    study = Study(trace_of(skewed(20)), TOPOLOGY, dear)
    free, priced = study.run([(STEPS, 4), (PRICED, 4)])
    assert free.slots_moved == 2
    assert free.saved < 0
    assert priced.slots_moved == priced.saved == 0
    assert priced == what_if(trace_of(skewed(20)), TOPOLOGY, dear, [4])[0]


def test_plans_are_made_from_an_even_sample_as_in_a_rebalancer() -> None:
    load = noise(60)
    study = Study(trace_of(load, num_gpus=4), Topology(1, 4), MODEL, window=5)
    (one,) = study.run([(STEPS, 30)])
    sample = load[:30:6]
    placement = plan(sample, Topology(1, 4), current=Placement.contiguous(2, 32, 4))
    assert one.imbalance == pytest.approx(float(imbalance(load[30:], placement).mean()))
    assert one.imbalance_seen == pytest.approx(float(imbalance(sample, placement).mean()))


def test_a_curve_is_what_is_balanced_and_timed() -> None:
    # 6 tokens take 9 ns, 1 takes 3: contiguous 18, apart 12.
    curve = TimeCurve((0, 1, 6), (0, 3, 9))
    cheap = replace(MODEL, bandwidth_inside=1e15)
    (one,) = what_if(trace_of(skewed(20)), TOPOLOGY, cheap, [4], curve=curve)
    assert one.saved == pytest.approx(1 / 3, abs=1e-4)
    assert one.static_seconds == pytest.approx(16 * 18e-9)


def test_progress_goes_from_nothing_to_all() -> None:
    told: list[tuple[int, int]] = []
    what_if(trace_of(skewed(12)), TOPOLOGY, MODEL, [3, 6], progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert {total for _, total in told} == {24}
    assert told[-1] == (24, 24)


# --- steps that stand for several -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iterations", "side_by_side", "wanted"),
    [
        ([1, 2, 3, 4], 1, 1.0),
        ([5, 5, 6, 6, 7, 7], 1, 1.0),  # all micro-batches of each iteration
        ([100, 100, 200, 200, 300, 300], 1, 100.0),
        ([100, 100, 200, 200, 300, 300], 2, 50.0),
        ([3, 3, 3], 1, 1.0),
    ],
)
def test_a_step_stands_for_as_many_as_its_iterations_are_apart(
    iterations: list[int], side_by_side: int, wanted: float
) -> None:
    trace = trace_of(skewed(len(iterations)), torch.tensor(iterations))
    assert steps_stood_for(trace, side_by_side) == wanted


def test_where_steps_stand_for_several_moves_weigh_less() -> None:
    every_step = Study(trace_of(skewed(20)), TOPOLOGY, MODEL)
    each_tenth = Study(trace_of(skewed(20), 10 * torch.arange(20)), TOPOLOGY, MODEL)
    assert (each_tenth.iterations, each_tenth.stands_for) == (200, 10)
    assert each_tenth.cuts_of(40) == every_step.cuts_of(4) == [4, 8, 12, 16, 20]
    one, ten = every_step.run([(STEPS, 4)])[0], each_tenth.run([(STEPS, 40)])[0]
    assert ten.move_seconds == pytest.approx(one.move_seconds)
    assert ten.static_seconds == pytest.approx(10 * one.static_seconds)
    assert ten.saved == pytest.approx(1 - (160 * 0.007 + 0.020) / (160 * 0.012))
    # A move at three times an interval's saving does not pay; one that is repaid ten times over does.
    dear = replace(MODEL, bytes_per_slot=25)
    assert Study(trace_of(skewed(20)), TOPOLOGY, dear).run([(PRICED, 4)])[0].slots_moved == 0
    assert Study(trace_of(skewed(20)), TOPOLOGY, dear, stands_for=10).run([(PRICED, 4)])[0].slots_moved == 2


@pytest.mark.parametrize(
    ("every", "text"),
    [
        (11, "the trace covers 20 iterations, and a rebalance every 11 takes twice as many.*every 10 or less"),
        (0, "no step in 0 iterations; rebalance every 1 or more"),
    ],
)
def test_an_interval_that_the_trace_cannot_tell_of_is_refused(every: int, text: str) -> None:
    with pytest.raises(DistplbError, match=text):
        what_if(trace_of(skewed(20)), TOPOLOGY, MODEL, [every])


def test_a_trace_of_one_iteration_is_not_told_to_rebalance_every_zero() -> None:
    with pytest.raises(DistplbError, match=r"covers one iteration: .* takes two; record for longer"):
        what_if(trace_of(skewed(1)), TOPOLOGY, MODEL, [1])


@pytest.mark.parametrize("gap", [1, 10])
def test_intervals_are_of_whole_iterations(gap: int) -> None:
    """Half an iteration's micro-batches were planned on, and its other half judged under that plan."""
    lengths = [2, 2, 2, 6, 6, 6, 1, 3, 4]  # steps of each iteration: a batch that grows, and a sample of a window
    iteration = torch.tensor([gap * nth for nth, length in enumerate(lengths) for _ in range(length)])
    study = Study(trace_of(skewed(32), iteration), TOPOLOGY, MODEL)
    (one,) = study.run([(STEPS, 2 * gap)])
    assert one.rebalances == 3
    assert one.static_seconds == pytest.approx(24 * 0.012 * gap)
    assert one.compute_seconds == pytest.approx(24 * 0.007 * gap)
    assert (study.iterations, study.least) == (9 * gap, gap)
    assert study.cuts_of(2 * gap) == [4, 12, 24, 28]
    assert study.cuts_of(4 * gap) == [12, 28]
    with pytest.raises(DistplbError, match=f"no step in {gap // 3} iterations; rebalance every {gap} or more"):
        study.cuts_of(gap // 3)


def test_a_trace_of_any_size_stands_for_a_step_of_the_same_seconds() -> None:
    job = AssumedJob(seconds_per_token=1e-6, bytes_per_slot=1000, bandwidth_inside=100.0, bandwidth_between=10.0)
    for scale in (1, 7):
        trace = trace_of(scale * noise(6))
        model = assumed_model(trace, Topology(1, 4), job)
        mean = float(trace.load.sum()) / 6 / 2 / 4
        assert mean * model.seconds_per_token == pytest.approx(0.032768)
        assert model.seconds(1, 0) == pytest.approx(1000 / 400)
        assert model.seconds(0, 1) == pytest.approx(1000 / 40)
    with pytest.raises(DistplbError, match="no tokens"):
        assumed_model(trace_of(torch.zeros(3, 1, 4, dtype=torch.int64)), TOPOLOGY)


# --- steps and layers without tokens ----------------------------------------------------------------------------


def ring(filled: Tensor, rows: int, first: int = 0) -> Tensor:
    """`[S, L, E]`: a buffer of so many rows, of which some in a row are filled."""
    load = torch.zeros(rows, *filled.shape[1:], dtype=torch.int64)
    load[first : first + len(filled)] = filled
    return load


@pytest.mark.parametrize("first", [0, 130, 380])
def test_a_buffer_that_is_filled_in_part_is_what_was_filled(first: int) -> None:
    """Steps without tokens were even, and took no time: no planner saved anything, or the moves of one more."""
    load, cluster = noise(20) * torch.arange(1, 33), Topology(1, 2)
    trials = [(name, 5) for name in (STATIC, SUM, STEPS, PRICED)]
    studies = [Study(trace_of(one), cluster, MODEL) for one in (load, ring(load, 400, first))]
    found, wanted = (study.run(trials) for study in reversed(studies))
    assert found == wanted
    assert [study.iterations for study in studies] == [20, 20]
    assert [study.stands_for for study in studies] == [1, 1]
    assert [study.bound(5) for study in studies] == [studies[0].bound(5)] * 2
    models = [assumed_model(trace_of(one), cluster) for one in (load, ring(load, 400, first))]
    assert models[0] == models[1]


def test_a_price_does_not_depend_on_steps_without_tokens() -> None:
    """Empty steps are no time in which a move could repay itself, and take none from one that does."""
    alternating = torch.stack([skewed(20), torch.zeros_like(skewed(20))], dim=1).flatten(0, 1)
    for slot_bytes, moved in ((4, 2), (6, 0)):
        model = replace(MODEL, bytes_per_slot=slot_bytes)
        for load in (skewed(20), ring(skewed(20), 999), alternating):
            assert Study(trace_of(load), TOPOLOGY, model).run([(PRICED, 4)])[0].slots_moved == moved


def test_layers_without_tokens_are_in_no_mean() -> None:
    load = noise(20) * torch.arange(1, 33)
    dense = torch.cat([torch.zeros(20, 3, 32, dtype=torch.int64), load], dim=1)
    trials = [(name, 4) for name in (STATIC, PRICED)]
    found, wanted = (Study(trace_of(one), Topology(1, 2), MODEL).run(trials) for one in (dense, load))
    assert list(map(asdict, found)) == [pytest.approx(asdict(one), rel=1e-12) for one in wanted]
    assert assumed_model(trace_of(dense), TOPOLOGY) == assumed_model(trace_of(load), TOPOLOGY)


def test_a_trace_without_tokens_is_refused() -> None:
    with pytest.raises(DistplbError, match="the trace has 3 steps and no tokens in any; pass one of a job that trains"):
        Study(trace_of(torch.zeros(3, 1, 4, dtype=torch.int64)), TOPOLOGY, MODEL)


def test_a_curve_without_time_is_refused() -> None:
    """What is saved was a fraction of nothing."""
    curve = TimeCurve((0, 100, 200), (0, 0, 10))
    with pytest.raises(
        DistplbError, match="the time curve gives no time to the tokens of the trace; pass one that was"
    ):
        what_if(trace_of(skewed(20)), TOPOLOGY, MODEL, [4], curve=curve)
    assert saving([1, 2], [0, 0]) == Saving(0.0, None, None)
    found = saving([0, 0, 0, 0, 0, 0, 0, 9], [0, 0, 0, 0, 0, 0, 0, 10])
    assert found.low == found.high == pytest.approx(0.1)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_says_what_it_leaves_out(tmp_path: Path, as_json: bool) -> None:
    load = torch.cat([torch.zeros(20, 1, 4, dtype=torch.int64), skewed(20)], dim=1)
    trace_of(ring(load, 24)).save(tmp_path / "trace.npz")
    words = ["replay", str(tmp_path / "trace.npz"), "--every", "4", "--engine", "reference"]
    done = CliRunner().invoke(main, words + ["--json"] * as_json)
    assert done.exit_code == 0, done.output
    if as_json:
        told = json.loads(done.stdout)
        assert (told["steps"], told["iterations"]) == (20, 20)
        assert (told["steps_without_tokens"], told["layers_without_tokens"]) == (4, ["0"])
        assert told["planners"]["static"]["imbalance"] == 12 / 7
    else:
        assert "4 of 24 steps had no tokens and are left out. 1 of 2 layers had no tokens: 0; means" in done.stdout
        assert "nan" not in done.stdout


# --- how surely -------------------------------------------------------------------------------------------------


def test_few_intervals_tell_no_interval() -> None:
    assert saving([7, 8, 9], [10, 10, 10]) == Saving(pytest.approx(0.2), None, None)
    assert saving([7, 8, 9, 8], [10, 10, 10, 10]).low is not None


def test_intervals_that_are_all_alike_leave_no_doubt() -> None:
    assert saving([9] * 5, [10] * 5) == Saving(*[pytest.approx(0.1)] * 3)


@pytest.mark.parametrize(("number", "alike"), [(6, 0.0), (16, 0.3), (36, 0.5)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(number: int, alike: float) -> None:
    generator, hits = np.random.default_rng(0), 0
    for seed in range(200):
        chance = generator.standard_normal(number + 30)
        for at in range(1, len(chance)):
            chance[at] = alike * chance[at - 1] + np.sqrt(1 - alike**2) * chance[at]
        static = 1 + 0.05 * generator.standard_normal(number)
        found = saving((0.95 * static - 0.03 * chance[30:]).tolist(), static.tolist(), seed)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.05 <= found.high
    assert 0.88 <= hits / 200 <= 0.995


# --- the answer -------------------------------------------------------------------------------------------------


def outcome(saved: float = 0.2, low: float | None = 0.1, high: float | None = 0.3, **others: Any) -> WhatIf:
    numbers = {"every": 50, "rebalances": 9, "imbalance": 1.1, "imbalance_seen": 1.05, "worst_step": 1.2}
    seconds = {"slots_moved": 40, "compute_seconds": 75.0, "move_seconds": 5.0, "static_seconds": 100.0}
    return WhatIf(**{**numbers, **seconds, "saved": saved, "low": low, "high": high, **others})


def advised(priced: WhatIf, free: WhatIf | None = None, static: float = 1.4, **options: Any) -> Any:
    found = {
        STATIC: outcome(imbalance=static, imbalance_seen=static),
        STEPS: free or priced,
        PRICED: priced,
    }
    return verdict(found, **{"bound": 1.01, "experts_per_gpu": 8, "bytes_per_slot": 10**9} | options)


def test_yes_says_what_is_saved_how_surely_and_when_moves_have_repaid_themselves() -> None:
    told = advised(outcome())
    assert (told.answer, told.why) == ("yes", "saves")
    # 25 s are gained by 9 rebalances that took 5 s: a fifth of 50 iterations each.
    assert told.break_even == pytest.approx(10)
    assert told.times == pytest.approx(5)
    assert told.text == (
        "Install it. Rebalancing every 50 iterations would save 20.0 % of the time that experts take, moves included "
        "(95 % interval 10.0 to 30.0 %, 9 rebalances): imbalance 1.100 instead of 1.400, bound 1.010. The moves of a "
        "rebalance repay themselves within 10 iterations; the same moves would still do so with 5.0 times the bytes "
        "(5.0 GB an expert), or at 1/5.0 of the bandwidth. See it in your job before anything moves: "
        'Rebalancer(..., moves=Moves(dry_run=True), record=Record("run")).'
    )


def test_a_share_of_the_iteration_is_told_and_decided_by() -> None:
    told = advised(outcome(), expert_share=0.3)
    assert told.answer == "yes"
    assert "save 6.0 % of an iteration, moves included (95 % interval 3.0 to 9.0 %" in told.text
    assert advised(outcome(), expert_share=0.03).answer == "no"


@pytest.mark.parametrize(
    ("priced", "options", "answer", "why", "words"),
    [
        (outcome(low=None, high=None, rebalances=1), {}, "longer", "too few", "1 interval .* 4 are the fewest"),
        (outcome(0.05, -0.02, 0.12), {}, "longer", "chance", "may be chance.*Record 1000 iterations or more"),
        (outcome(-0.05, -0.2, 0.12), {}, "no", "moves", "add 5.0 % to .*interval of what is saved -20.0 to 12.0 %"),
        (outcome(0.004, 0.001, 0.008), {}, "no", "moves", "were they free, 25.0 % would be saved"),
        (outcome(), {"experts_per_gpu": 1}, "no", "one expert", "one expert a GPU every placement.*takes replicas"),
        (outcome(), {"bound": 1.395, "experts_per_gpu": 2}, "no", "bound", "no placement of 2 experts a GPU has less"),
        (outcome(), {"static": 1.015}, "no", "balanced", "router already balances: imbalance is 1.01"),
        (outcome(0.001, -0.003, 0.005), {"static": 1.05}, "no", "balanced", "Plans reach 1.050 .* but 1.100 on the"),
        (outcome(0, 0, 0, slots_moved=0, move_seconds=0.0), {}, "no", "moves", "Nothing would be moved"),
    ],
)
def test_other_answers_have_their_reason(
    priced: WhatIf, options: dict[str, Any], answer: str, why: str, words: str
) -> None:
    told = advised(priced, **options)
    assert (told.answer, told.why) == (answer, why)
    assert re.search(words, told.text), told.text
    assert told.text.startswith({"no": "Do not install it.", "longer": "Do not decide on this trace."}[answer])


def test_no_where_plans_do_not_last() -> None:
    none = outcome(0, 0, 0, slots_moved=0, compute_seconds=100.0, move_seconds=0.0, imbalance=1.4)
    told = advised(none, free=outcome(-0.3, -0.4, -0.2, compute_seconds=100.5, imbalance=1.41, imbalance_seen=1.1))
    assert (told.answer, told.why, told.break_even, told.times) == ("no", "changes", None, None)
    assert "Plans reach 1.100 on the steps that they are made from, but 1.410 on the steps after" in told.text


# --- the command ------------------------------------------------------------------------------------------------


def replayed(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


def told(result: Result) -> dict[str, Any]:
    assert result.stderr == ""
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.mark.parametrize(
    ("name", "every", "answer"),
    [("plain-2x16", 20, "yes"), ("loss-free-4x32", 30, "no"), ("plain-3x64-code-to-prose", 40, "yes")],
)
def test_the_traces_that_are_shipped_have_the_answers_that_they_should(name: str, every: int, answer: str) -> None:
    found = replayed(TRACES / f"{name}.npz", "--every", every, "--candidates", 2)
    assert found.exit_code == 0, found.output
    opening = {"yes": "Install it.", "no": "Do not install it. The router already balances"}[answer]
    assert opening in found.stdout
    for text in (STATIC, SUM, STEPS, PRICED, "bound", "Assumed: 617 MB an expert", "stands for 1 of the job's"):
        assert text in found.stdout


@pytest.mark.parametrize(
    ("load", "options", "answer", "why"),
    [
        (noise(80), [], "no", "balanced"),
        (noise(80, tokens=0.5), [], "no", "changes"),
        (skewed(6), [], "yes", "saves"),
        (skewed(6), ["--every", "2"], "longer", "too few"),
        (torch.full((40, 2, 8), 5), [], "no", "balanced"),
        (skewed(40), ["--gpus-per-node", "4"], "no", "one expert"),
    ],
)
def test_made_traces_have_the_answers_that_they_should(
    load: Tensor, options: list[str], answer: str, why: str, tmp_path: Path
) -> None:
    trace_of(load).save(tmp_path / "trace.npz")
    result = replayed(tmp_path / "trace.npz", "--json", "--exit-code", *options)
    document = told(result)
    assert (document["verdict"]["answer"], document["verdict"]["why"]) == (answer, why)
    assert result.exit_code == (answer == "no")
    assert list(document["planners"]) == [STATIC, SUM, STEPS, PRICED]
    assert [one["every"] for one in document["what_if"]] == sorted({one["every"] for one in document["what_if"]})
    assert document["planners"][PRICED] in document["what_if"]


def test_options_of_the_job_reach_the_model(tmp_path: Path) -> None:
    trace_of(skewed(40)).save(tmp_path / "trace.npz")
    options = {"--expert-parameters": 1e6, "--bytes-per-parameter": 10, "--tflops": 6, "--tokens-per-gpu": 7}
    links = {"--bandwidth-inside": 1, "--bandwidth-between": 0.5, "--stands-for": 3, "--every": 5}
    flat = [word for pair in (options | links).items() for word in pair]
    document = told(replayed(tmp_path / "trace.npz", "--json", *flat))
    assert document["assumed"] == {
        "seconds_per_token": pytest.approx(1e-6),
        "bytes_per_slot": 10**7,
        "tokens_per_gpu": 7,
        "bandwidth_inside": 1e9,
        "bandwidth_between": 5e8,
    }
    assert (document["every"], document["stands_for"]) == (5, 3)
    # 35 steps, each of three, of 12 tokens at 1 µs.
    assert document["planners"][STATIC]["static_seconds"] == pytest.approx(3 * 35 * 12e-6)


def test_a_runs_own_costs_are_taken_unless_others_are_named(tmp_path: Path) -> None:
    trace_of(skewed(40)).save(tmp_path / "000000000000.npz")
    costs = {"bytes_per_slot": 10, "bandwidth_inside": 3.0, "bandwidth_between": 2.0, "trust": 0.75}
    log = EventLog(tmp_path / "events.jsonl")
    known = {"layers": ("0",), "decision": "kept", "reason": "", "seconds": {}, "last_applied": 5}
    for iteration, second in ((5, 1.0), (10, 0.5), (15, None)):  # the last one that has them counts
        priced = costs | {"seconds_per_token": second} if second else {}
        log(RebalanceEvent(iteration=iteration, **known, **priced))
    log.close()
    document = told(replayed(tmp_path, "--json", "--every", 5))
    assert document["assumed"] is None
    assert document["costs"] == costs | {"seconds_per_token": 0.5}
    other = told(replayed(tmp_path, "--json", "--every", 5, "--tflops", 6))
    assert other["assumed"] is not None
    assert other["costs"] != document["costs"]
    assert "As the job recorded: 1e-05 MB an expert" in replayed(tmp_path, "--every", 5).stdout


def test_megatrons_files_are_read_and_ep_groups_side_by_side_are_known(tmp_path: Path) -> None:
    # Four ranks, two EP groups of two; every hundredth iteration, two micro-batches of each.
    for rank in range(4):
        counts = [[6, 6], [6, 6]] if rank % 2 == 0 else [[1, 1], [1, 1]]
        lines = [{"iter": 100 * at, "block": "decoder", "layer": 1, "tpe": counts} for at in range(1, 11)]
        (tmp_path / f"rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = told(replayed(tmp_path, "--megatron-ep", 2, "--every", 200, "--json"))
    assert (document["steps"], document["iterations"], document["stands_for"]) == (40, 1000, 50)
    assert document["topology"] == {"num_nodes": 1, "gpus_per_node": 2}
    assert document["planners"][PRICED]["rebalances"] == 4
    assert document["verdict"]["answer"] == "yes"
    files = [tmp_path / f"rank{rank}.jsonl" for rank in range(4)]
    assert told(replayed(*files, "--megatron-ep", 2, "--every", 200, "--json")) == document
    log = tmp_path / "earlier" / "tokens_per_expert.log"
    log.parent.mkdir()
    log.write_text(
        "".join(
            f"Rank={rank} iter={100 * at} layer=1 tokens_per_expert={[6, 6] if rank % 2 == 0 else [1, 1]}\n"
            for at in range(1, 11)
            for rank in range(4)
            for _ in range(2)
        )
    )
    for path in (log, log.parent):
        assert told(replayed(path, "--megatron-ep", 2, "--every", 200, "--json")) == document


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    good = tmp_path / "trace.npz"
    trace_of(skewed(20)).save(good)
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    wrong = {
        "nothing.npz' does not exist": [tmp_path / "nothing.npz"],
        "without .npz files": [tmp_path / "empty"],
        "cut.npz cannot be read": [tmp_path / "cut.npz"],
        "4 experts cannot be spread evenly over 3 GPUs": [good, "--gpus-per-node", 3],
        "do not go evenly on 3 nodes": [good, "--nodes", 3],
        "covers 20 iterations, and a rebalance every 21": [good, "--every", 21],
        "one GPU has nothing to balance": [good, "--gpus-per-node", 1],
        "2 traces were named": [good, good],
        "engine 'abacus' is not there": [good, "--engine", "abacus"],
        "0.0 is not in the range": [good, "--tflops", 0],
    }
    for text, arguments in wrong.items():
        result = replayed(*arguments)
        assert result.exit_code == 2, text
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert text in result.stderr
