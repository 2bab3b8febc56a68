"""`distplb replay`: answers on shipped, made and foreign traces; costs; wrong input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from small_traces import noise, ring, skewed, trace_of
from torch import Tensor

from distplb import EventLog, RebalanceEvent
from distplb.cli.main import main
from distplb.study.what_if import PRICED, STATIC, STEPS, SUM

TRACES = Path(__file__).parents[2] / "benchmarks" / "traces"


def replayed(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


def document_of(result: Result) -> dict[str, Any]:
    assert result.stderr == ""
    document: dict[str, Any] = json.loads(result.stdout)
    return document


@pytest.mark.parametrize(
    ("name", "every", "answer"),
    [("plain-2x16", 20, "yes"), ("loss-free-4x32", 30, "no"), ("plain-3x64-code-to-prose", 40, "yes")],
)
def test_the_traces_that_are_shipped_have_the_answers_that_they_should(name: str, every: int, answer: str) -> None:
    result = replayed(TRACES / f"{name}.npz", "--every", every, "--candidates", 2)
    assert result.exit_code == 0, result.output
    opening = {"yes": "Install it.", "no": "Do not install it. The router already balances the load"}[answer]
    assert opening in result.stdout
    for text in (STATIC, SUM, STEPS, PRICED, "bound", "Assumed: 617 MB per expert", "stands for 1 of the job's"):
        assert text in result.stdout


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
    document = document_of(result)
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
    document = document_of(replayed(tmp_path / "trace.npz", "--json", *flat))
    assert document["assumed"] == {
        "seconds_per_token": pytest.approx(1e-6),
        "bytes_per_slot": 10**7,
        "tokens_per_gpu": 7,
        "bandwidth_inside": 1e9,
        "bandwidth_between": 5e8,
    }
    assert (document["every"], document["stands_for"]) == (5, 3)
    # 35 steps that stand for three each, of 12 tokens at 1 µs.
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
    document = document_of(replayed(tmp_path, "--json", "--every", 5))
    assert document["assumed"] is None
    assert document["costs"] == costs | {"seconds_per_token": 0.5}
    other = document_of(replayed(tmp_path, "--json", "--every", 5, "--tflops", 6))
    assert other["assumed"] is not None
    assert other["costs"] != document["costs"]
    assert "Recorded by the job: 1e-05 MB per expert" in replayed(tmp_path, "--every", 5).stdout


def test_megatrons_files_are_read_and_ep_groups_side_by_side_are_known(tmp_path: Path) -> None:
    # Four ranks in two EP groups; every hundredth iteration is recorded, with two micro-batches of each group.
    for rank in range(4):
        counts = [[6, 6], [6, 6]] if rank % 2 == 0 else [[1, 1], [1, 1]]
        lines = [{"iter": 100 * at, "block": "decoder", "layer": 1, "tpe": counts} for at in range(1, 11)]
        (tmp_path / f"rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = document_of(replayed(tmp_path, "--megatron-ep", 2, "--every", 200, "--json"))
    assert (document["steps"], document["iterations"], document["stands_for"]) == (40, 1000, 50)
    assert document["topology"] == {"num_nodes": 1, "gpus_per_node": 2}
    assert document["planners"][PRICED]["rebalances"] == 4
    assert document["verdict"]["answer"] == "yes"
    files = [tmp_path / f"rank{rank}.jsonl" for rank in range(4)]
    assert document_of(replayed(*files, "--megatron-ep", 2, "--every", 200, "--json")) == document
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
        assert document_of(replayed(path, "--megatron-ep", 2, "--every", 200, "--json")) == document


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
        "cannot be spread evenly over 3 nodes": [good, "--nodes", 3],
        "covers 20 iterations, but rebalancing every 21": [good, "--every", 21],
        "nothing to balance on one GPU": [good, "--gpus-per-node", 1],
        "2 traces were passed": [good, good],
        "engine 'abacus' is unknown": [good, "--engine", "abacus"],
        "0.0 is not in the range": [good, "--tflops", 0],
    }
    for text, arguments in wrong.items():
        result = replayed(*arguments)
        assert result.exit_code == 2, text
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert text in result.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_says_what_it_leaves_out(tmp_path: Path, as_json: bool) -> None:
    load = torch.cat([torch.zeros(20, 1, 4, dtype=torch.int64), skewed(20)], dim=1)
    trace_of(ring(load, 24)).save(tmp_path / "trace.npz")
    words = ["replay", str(tmp_path / "trace.npz"), "--every", "4", "--engine", "reference"]
    done = CliRunner().invoke(main, words + ["--json"] * as_json)
    assert done.exit_code == 0, done.output
    if as_json:
        document = json.loads(done.stdout)
        assert (document["steps"], document["iterations"]) == (20, 20)
        assert (document["steps_without_tokens"], document["layers_without_tokens"]) == (4, ["0"])
        assert document["planners"]["static"]["imbalance"] == 12 / 7
    else:
        assert "4 of 24 steps had no tokens and are left out. 1 of 2 layers had no tokens: 0; means" in done.stdout
        assert "nan" not in done.stdout
