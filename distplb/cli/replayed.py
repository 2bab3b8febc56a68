"""What `distplb replay` prints: tables and a paragraph, or one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from rich.table import Table

from distplb.cli.empties import Empties
from distplb.cli.output import console, plain, table
from distplb.core.price import MoveModel, TimeCurve
from distplb.study.costs import AssumedJob, tokens_of_mean_gpu
from distplb.study.verdict import Verdict, percent
from distplb.study.what_if import PRICED, STATIC, Study, WhatIf

__all__ = ["Costs", "Replayed", "document", "print_tables"]


class Costs(NamedTuple):
    """What tokens and moves cost, and the job that it was assumed of; None where a job has recorded it."""

    model: MoveModel
    curve: TimeCurve | None
    job: AssumedJob | None = None


class Replayed(NamedTuple):
    """What there is to tell: planners by name, other intervals with the price, the bound of all placements, advice,
    and what of the trace has no tokens."""

    study: Study
    costs: Costs
    found: Mapping[str, WhatIf]
    others: Sequence[WhatIf]
    bound: float
    told: Verdict
    empties: Empties


def document(replayed: Replayed) -> dict[str, Any]:
    """All of it, for scripts."""
    study, costs, found, others, bound, told, empties = replayed
    trace = study.trace
    return {
        "steps": trace.num_steps,
        **empties.as_json(),
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "iterations": study.iterations,
        "topology": asdict(study.topology),
        "every": found[PRICED].every,
        "stands_for": study.stands_for,
        "costs": asdict(costs.model),
        "assumed": None if costs.job is None else asdict(costs.job),
        "bound": bound,
        "planners": {name: asdict(one) for name, one in found.items()},
        "what_if": [asdict(one) for one in others],
        "verdict": asdict(told),
    }


def print_tables(replayed: Replayed) -> None:
    """Two tables, what was assumed, and the advice."""
    study, costs, found, others, bound, told, empties = replayed
    out = console()
    trace, cluster = study.trace, study.topology
    out.print(
        f"{trace.num_steps} steps of {study.iterations} iterations, {trace.num_layers} "
        f"layer{'s' * (trace.num_layers != 1)} of {trace.num_experts} experts on {cluster.num_gpus} GPUs "
        f"({cluster.num_nodes} × {cluster.gpus_per_node})"
    )
    if empties.told():
        out.print(plain(empties.told()))
    out.print()
    out.print(_planners(found, bound))
    out.print()
    out.print(_what_if(others))
    out.print()
    out.print(_costs(study, costs), style="dim")
    out.print()
    out.print(told.text, style={"yes": "green", "no": "red", "longer": "yellow"}[told.answer])


def _planners(found: Mapping[str, WhatIf], bound: float) -> Table:
    lines = table(
        *("planner", "imbalance", "worst step", "slots moved", "computing (s)", "moving (s)", "saved"),
        title=f"A rebalance every {found[PRICED].every} iterations; every step under a plan that had not seen it",
    )
    for name, one in found.items():
        numbers = (f"{one.imbalance:.3f}", f"{one.worst_step:.2f}", f"{one.slots_moved}")
        seconds = (f"{one.compute_seconds:.3f}", f"{one.move_seconds:.3f}")
        lines.add_row(name, *numbers, *seconds, "" if name == STATIC else percent(one.saved))
    lines.add_section()
    lines.add_row("bound", f"{bound:.3f}")
    return lines


def _what_if(others: Sequence[WhatIf]) -> Table:
    lines = table(
        *("every", "rebalances", "imbalance", "slots moved", "saved", "95\u00a0% interval"),
        title="Plans with the price, at other intervals",
    )
    for one in others:
        interval = (
            "too few" if one.low is None or one.high is None else f"{percent(one.low, '')} to {percent(one.high)}"
        )
        numbers = (f"{one.every}", f"{one.rebalances}", f"{one.imbalance:.3f}", f"{one.slots_moved}")
        lines.add_row(*numbers, percent(one.saved), interval)
    return lines


def _costs(study: Study, costs: Costs) -> str:
    job, model = costs.job, costs.model
    stands = f"a recorded step stands for {study.stands_for:.3g} of the job's (--stands-for)."
    if job is None:
        return (
            f"As the job recorded: {model.bytes_per_slot / 1e6:.3g} MB an expert with its state, "
            f"{model.seconds_per_token * 1e6:.3g} µs a token, {model.bandwidth_inside / 1e9:.3g} GB/s of all GPUs "
            f"inside nodes and {model.bandwidth_between / 1e9:.3g} between them; {stands}"
        )
    mean = tokens_of_mean_gpu(study.trace.load, study.topology.num_gpus)
    return (
        f"Assumed: {job.bytes_per_slot / 1e6:.0f} MB an expert with its state, {job.seconds_per_token * 1e6:.2f} µs a "
        f"token, {job.bandwidth_inside / 1e9:g} GB/s a GPU inside a node and {job.bandwidth_between / 1e9:g} between "
        f"nodes; {job.tokens_per_gpu:g} tokens on the mean GPU in a step and layer (the trace has {mean:.0f}, "
        f"--tokens-per-gpu {mean:.0f} takes them as they are); {stands}"
    )
