"""Output of `distplb replay`: tables and a paragraph, or one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rich.table import Table

from distplb.cli.empty_parts import EmptyParts
from distplb.cli.output import console, table
from distplb.core.price import MoveModel, TimeCurve
from distplb.study.costs import AssumedJob, tokens_of_mean_gpu
from distplb.study.verdict import Verdict, percent
from distplb.study.what_if import PRICED, STATIC, Study, WhatIf

__all__ = ["Costs", "ReplayResult", "document", "print_tables"]


class Costs(NamedTuple):
    """The costs of tokens and moves, with the assumed job, or None if a job recorded them."""

    model: MoveModel
    curve: TimeCurve | None
    job: AssumedJob | None = None


class ReplayResult(NamedTuple):
    """The result of `distplb replay`.

    Args:
        study: study of the trace.
        costs: costs of tokens and moves.
        planners: outcomes of the planners, by name.
        intervals: outcomes of plans with the price, by interval between rebalances.
        bound: lower bound of any placement.
        verdict: the advice whether to install it.
        empty_parts: parts of the trace without tokens.
    """

    study: Study
    costs: Costs
    planners: Mapping[str, WhatIf]
    intervals: Sequence[WhatIf]
    bound: float
    verdict: Verdict
    empty_parts: EmptyParts


def document(result: ReplayResult) -> dict[str, Any]:
    """The result as one JSON object."""
    study, costs, planners, intervals, bound, verdict, empty_parts = result
    trace = study.trace
    return {
        "steps": trace.num_steps,
        **empty_parts.as_json(),
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "iterations": study.iterations,
        "topology": asdict(study.topology),
        "every": planners[PRICED].every,
        "stands_for": study.stands_for,
        "costs": asdict(costs.model),
        "assumed": None if costs.job is None else asdict(costs.job),
        "bound": bound,
        "planners": {name: asdict(one) for name, one in planners.items()},
        "what_if": [asdict(one) for one in intervals],
        "verdict": asdict(verdict),
    }


def print_tables(result: ReplayResult) -> None:
    """Print two tables, the costs, and the advice."""
    study, costs, planners, intervals, bound, verdict, empty_parts = result
    out = console()
    trace, cluster = study.trace, study.topology
    out.print(
        f"{trace.num_steps} steps of {study.iterations} iterations, {trace.num_layers} "
        f"layer{'s' * (trace.num_layers != 1)} of {trace.num_experts} experts on {cluster.num_gpus} GPUs "
        f"({cluster.num_nodes} node{'s' * (cluster.num_nodes != 1)} × {cluster.gpus_per_node})"
    )
    if left_out := empty_parts.sentence():
        out.print(left_out)
    out.print()
    out.print(_planner_table(planners, bound))
    out.print()
    out.print(_interval_table(intervals))
    out.print()
    out.print(_cost_sentence(study, costs), style="dim")
    out.print()
    out.print(verdict.text, style={"yes": "green", "no": "red", "longer": "yellow"}[verdict.answer])


def _planner_table(planners: Mapping[str, WhatIf], bound: float) -> Table:
    lines = table(
        *("planner", "imbalance", "worst step", "slots moved", "computing (s)", "moving (s)", "saved"),
        title=f"{planners[PRICED].every} iteration{'s' * (planners[PRICED].every != 1)} between rebalances; "
        "each step is judged under a plan that had not seen it",
    )
    for name, one in planners.items():
        numbers = (f"{one.imbalance:.3f}", f"{one.worst_step:.2f}", f"{one.slots_moved}")
        seconds = (f"{one.compute_seconds:.3f}", f"{one.move_seconds:.3f}")
        lines.add_row(name, *numbers, *seconds, "" if name == STATIC else percent(one.saved))
    lines.add_section()
    lines.add_row("bound", f"{bound:.3f}")
    return lines


def _interval_table(intervals: Sequence[WhatIf]) -> Table:
    lines = table(
        *("every", "rebalances", "imbalance", "slots moved", "saved", "95\u00a0% interval"),
        title="Plans with the price, at other intervals",
    )
    for one in intervals:
        interval = (
            "too few" if one.low is None or one.high is None else f"{percent(one.low, '')} to {percent(one.high)}"
        )
        numbers = (f"{one.every}", f"{one.rebalances}", f"{one.imbalance:.3f}", f"{one.slots_moved}")
        lines.add_row(*numbers, percent(one.saved), interval)
    return lines


def _cost_sentence(study: Study, costs: Costs) -> str:
    job, model = costs.job, costs.model
    stands = f"each recorded step stands for {study.stands_for:.3g} of the job's steps (--stands-for)."
    if job is None:
        return (
            f"Recorded by the job: {model.bytes_per_slot / 1e6:.3g} MB per expert with its state, "
            f"{model.seconds_per_token * 1e6:.3g} µs per token, {model.bandwidth_inside / 1e9:.3g} GB/s over all GPUs "
            f"inside nodes and {model.bandwidth_between / 1e9:.3g} between nodes; {stands}"
        )
    mean = tokens_of_mean_gpu(study.trace.load, study.topology.num_gpus)
    return (
        f"Assumed: {job.bytes_per_slot / 1e6:.0f} MB per expert with its state, {job.seconds_per_token * 1e6:.2f} µs "
        f"per token, {job.bandwidth_inside / 1e9:g} GB/s per GPU inside a node and {job.bandwidth_between / 1e9:g} "
        f"between nodes; {job.tokens_per_gpu:g} tokens on the mean GPU in a step and layer (the trace has {mean:.0f}; "
        f"pass --tokens-per-gpu {mean:.0f} to use that); {stands}"
    )
