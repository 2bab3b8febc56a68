"""What `distplb replay` prints: tables and a paragraph, or one JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from distplb.advice import PRICED, STATIC, Study, WhatIf
from distplb.assumed import AssumedJob
from distplb.cli.output import console
from distplb.verdict import Verdict, percent

__all__ = ["document", "print_tables"]


def document(
    study: Study,
    job: AssumedJob,
    found: Mapping[str, WhatIf],
    others: Sequence[WhatIf],
    bound: float,
    told: Verdict,
) -> dict[str, Any]:
    """All of it, for scripts."""
    trace = study.trace
    return {
        "steps": trace.num_steps,
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "iterations": study.iterations,
        "topology": asdict(study.topology),
        "every": found[PRICED].every,
        "stands_for": study.stands_for,
        "assumed": asdict(job),
        "bound": bound,
        "planners": {name: asdict(one) for name, one in found.items()},
        "what_if": [asdict(one) for one in others],
        "verdict": asdict(told),
    }


def print_tables(
    study: Study,
    job: AssumedJob,
    found: Mapping[str, WhatIf],
    others: Sequence[WhatIf],
    bound: float,
    told: Verdict,
) -> None:
    """Two tables, what was assumed, and the advice."""
    out = console()
    trace, cluster = study.trace, study.topology
    out.print(
        f"{trace.num_steps} steps of {study.iterations} iterations, {trace.num_layers} layers of {trace.num_experts} "
        f"experts on {cluster.num_gpus} GPUs ({cluster.num_nodes} × {cluster.gpus_per_node})"
    )
    out.print(_planners(found, bound))
    out.print(_what_if(others))
    out.print(_assumed(study, job), style="dim")
    out.print()
    out.print(told.text, style={"yes": "green", "no": "red", "longer": "yellow"}[told.answer])


def _planners(found: Mapping[str, WhatIf], bound: float) -> Table:
    table = _table(
        f"A rebalance every {found[PRICED].every} iterations; every step under a plan that had not seen it",
        *("", "imbalance", "worst step", "slots moved", "computing s", "moving s", "saved"),
    )
    for name, one in found.items():
        numbers = (f"{one.imbalance:.3f}", f"{one.worst_step:.2f}", f"{one.slots_moved}")
        seconds = (f"{one.compute_seconds:.3f}", f"{one.move_seconds:.3f}")
        table.add_row(name, *numbers, *seconds, "" if name == STATIC else percent(one.saved))
    table.add_row("bound", f"{bound:.3f}")
    return table


def _what_if(others: Sequence[WhatIf]) -> Table:
    table = _table(
        "Plans with the price, at other intervals",
        *("every", "rebalances", "imbalance", "slots moved", "saved", "95 % interval"),
    )
    for one in others:
        interval = (
            "too few" if one.low is None or one.high is None else f"{percent(one.low, '')} to {percent(one.high)}"
        )
        numbers = (f"{one.every}", f"{one.rebalances}", f"{one.imbalance:.3f}", f"{one.slots_moved}")
        table.add_row(*numbers, percent(one.saved), interval)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if not name or number == len(columns) else "right")
    return table


def _assumed(study: Study, job: AssumedJob) -> str:
    mean = float(study.trace.load.sum()) / study.trace.num_steps / study.trace.num_layers / study.topology.num_gpus
    return (
        f"Assumed: {job.bytes_per_slot / 1e6:.0f} MB an expert with its state, {job.seconds_per_token * 1e6:.2f} µs a "
        f"token, {job.bandwidth_inside / 1e9:g} GB/s a GPU inside a node and {job.bandwidth_between / 1e9:g} between "
        f"nodes; {job.tokens_per_gpu:g} tokens on the mean GPU in a step and layer (the trace has {mean:.0f}, "
        f"--tokens-per-gpu {mean:.0f} takes them as they are); a recorded step stands for {study.stands_for:.3g} "
        "of the job's (--stands-for)."
    )
