"""`distplb replay`: estimate what rebalancing would have saved on a trace, and advise whether to install it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from distplb.cli.empty_parts import EmptyParts
from distplb.cli.load_hints import load_hints
from distplb.cli.option_names import as_option
from distplb.cli.output import json_option, print_hints, print_json, progress
from distplb.cli.param_types import FiniteNumber, NamedPath, WholeNumber
from distplb.cli.replay_tables import Costs, ReplayResult, document, print_tables
from distplb.cli.shared_options import option_group
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.records.foreign.megatron_lines import is_megatron, num_ranks
from distplb.records.read_loads import read_trace
from distplb.records.read_log import read_events
from distplb.records.trace import Trace
from distplb.study.costs import (
    BYTES_PER_PARAMETER,
    EXPERT_PARAMETERS,
    FLOPS,
    OPERATIONS,
    AssumedJob,
    recorded_costs,
    steps_stood_for,
)
from distplb.study.verdict import verdict
from distplb.study.what_if import PRICED, STATIC, STEPS, SUM, WINDOW_STEPS, Study, WhatIf

__all__ = ["replay"]

_JOB = AssumedJob()
_MIN_REBALANCES = 12  # at the default interval
_FACTORS = (0.25, 0.5, 2, 4)  # of `every`: other intervals to replay

_EPILOG = """\b
Examples:
  distplb replay run/ --every 500 --expert-share 0.35
  distplb replay checkpoints/tokens_per_expert --megatron-ep 64 --nodes 8
"""


def _count(name: str, text: str, default: int | None = None) -> Callable[[Any], Any]:
    has_default = default is not None
    return click.option(name, type=WholeNumber(), metavar="N", default=default, show_default=has_default, help=text)


def _amount(name: str, text: str, default: float | None = None, maximum: float = 1e18) -> Callable[[Any], Any]:
    number, has_default = FiniteNumber(maximum=maximum), default is not None
    return click.option(name, type=number, metavar="X", default=default, show_default=has_default, help=text)


_trace_options = option_group(
    _count("--nodes", "Nodes of the EP group.", 1),
    _count("--gpus-per-node", "GPUs of the EP group on each node; default: those of the trace."),
    _count("--megatron-ep", "Expert-parallel size of Megatron-Core's files; default: all ranks."),
    _count("--megatron-pipeline", "Pipeline stages of Megatron-Core's files.", 1),
    _count("--megatron-expert-tp", "Expert tensor-parallel size of Megatron-Core's files.", 1),
)
_search_options = option_group(
    _count("--every", "Iterations between rebalances; default: at most 1/12 of the trace."),
    _count("--window", "Most steps that a plan is made from.", WINDOW_STEPS),
    _count("--candidates", "Randomised starts per layer; default: 4."),
    click.option("--engine", metavar="NAME", help="reference, cpu or cuda; default: the fastest available."),
)
_MEGATRON = ("megatron_ep", "megatron_pipeline", "megatron_expert_tp")
_COSTS = (
    "expert_parameters",
    "bytes_per_parameter",
    "tflops",
    "tokens_per_gpu",
    "bandwidth_inside",
    "bandwidth_between",
)
_job_options = option_group(
    _amount("--expert-parameters", "Parameters of one expert, as in DeepSeek-V3.", EXPERT_PARAMETERS),
    _amount(
        "--bytes-per-parameter", "Bytes moved per parameter: weight, master copy, two moments.", BYTES_PER_PARAMETER
    ),
    _amount("--tflops", "TFLOP/s that a GPU reaches in experts.", FLOPS / 1e12),
    _amount(
        "--tokens-per-gpu", "Tokens of the mean GPU in a step and layer, counted once per expert.", _JOB.tokens_per_gpu
    ),
    _amount("--bandwidth-inside", "GB/s of each GPU inside a node, while all send.", _JOB.bandwidth_inside / 1e9),
    _amount("--bandwidth-between", "GB/s of each GPU between nodes, while all send.", _JOB.bandwidth_between / 1e9),
    _amount(
        "--expert-share",
        "Share of an iteration spent in experts, such as 0.35; default: savings refer to the time in experts.",
        maximum=1,
    ),
    _amount("--stands-for", "Steps of the job that a recorded step stands for; default: derived from iterations."),
)


@click.command(epilog=_EPILOG)
@click.argument("paths", metavar="TRACE...", nargs=-1, required=True, type=NamedPath(exists=True))
@_trace_options
@_search_options
@_job_options
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the answer is no.")
@json_option
def replay(
    *,
    paths: Sequence[Path],
    nodes: int,
    gpus_per_node: int | None,
    megatron_ep: int | None,
    megatron_pipeline: int,
    megatron_expert_tp: int,
    every: int | None,
    exit_code: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what rebalancing would have saved on a trace, and advise whether to install it.

    TRACE is a .npz file or the folder of Rebalancer(record=...); or Megatron-Core's folder tokens_per_expert, its files
    rank<number>.jsonl, or its earlier tokens_per_expert.log; or counts [steps, layers, experts] in a format of distplb
    plan, with --gpus-per-node and one step per iteration. Every step is judged under a plan that had not seen it. The
    costs of tokens and moves are those that the job measured, if the folder has priced events and you pass no other
    costs; else they are assumed. Exits with 0; with 1 under --exit-code if the answer is no; with 2 for wrong usage or
    input. Hints are those of `distplb plan`.
    """
    gpus = None if gpus_per_node is None else nodes * gpus_per_node
    trace, side_by_side = _read(paths, gpus, megatron_ep, megatron_expert_tp, megatron_pipeline)
    topology = _topology(trace, nodes, gpus_per_node)
    costs = _recorded(paths[0]) or _assumed(trace, topology, options)
    study = _study(trace, side_by_side, topology, costs, options)
    every = every or _default_interval(study)
    planners, intervals = _replay(study, every)
    bound = study.bound(every)
    advice = verdict(
        planners,
        bound=bound,
        experts_per_gpu=trace.num_experts // topology.num_gpus,
        bytes_per_slot=costs.model.bytes_per_slot,
        expert_share=options["expert_share"],
    )
    result = ReplayResult(study, costs, planners, intervals, bound, advice, EmptyParts.of(trace.load, trace.layers))
    hints = load_hints(trace.load, before=planners[STATIC].imbalance, is_trace=True)
    if as_json:
        print_json(document(result) | {"hints": hints})
    else:
        print_tables(result)
        print_hints(hints)
    if exit_code and advice.answer == "no":
        sys.exit(1)


# --- input ------------------------------------------------------------------------------------------------------


def _read(paths: Sequence[Path], gpus: int | None, ep: int | None, expert_tp: int, pipeline: int) -> tuple[Trace, int]:
    """The trace, and the number of EP groups (copies of the same experts) whose simultaneous steps it holds."""
    if is_megatron(paths):
        trace = Trace.from_megatron(*paths, num_gpus=ep, expert_tensor_parallel=expert_tp, pipeline_parallel=pipeline)
        return trace, num_ranks(paths) // (trace.placements[0].num_gpus * expert_tp * pipeline)
    if passed := _passed(_MEGATRON):
        raise DistplbError(f"{passed[0]} is for Megatron-Core's files, and {paths[0]} is not one; leave it out")
    if len(paths) > 1:
        raise DistplbError(f"{len(paths)} traces were passed; pass one, or Megatron-Core's files of all ranks")
    return read_trace(paths[0], gpus), 1


def _passed(names: Sequence[str]) -> list[str]:
    """Of the options whose parameters have these names, those on the command line."""
    source = click.get_current_context().get_parameter_source
    return [as_option(name, "") for name in names if source(name) is ParameterSource.COMMANDLINE]


def _topology(trace: Trace, nodes: int, gpus_per_node: int | None) -> Topology:
    num_gpus = trace.placements[0].num_gpus
    if gpus_per_node is None and num_gpus % nodes:
        raise DistplbError(
            f"the trace's {num_gpus} GPU{'s' * (num_gpus != 1)} cannot be spread evenly over {nodes} nodes; pass "
            "--gpus-per-node"
        )
    topology = Topology(nodes, num_gpus // nodes if gpus_per_node is None else gpus_per_node)
    if topology.num_gpus == 1:
        raise DistplbError("there is nothing to balance on one GPU; pass --nodes and --gpus-per-node of the job")
    return topology


def _recorded(run: Path) -> Costs | None:
    """The costs in a run's events, unless others are on the command line."""
    log = run / "events.jsonl"
    if not log.is_file() or _passed(_COSTS):
        return None
    recorded = recorded_costs(read_events(log))
    return None if recorded is None else Costs(*recorded)


def _assumed(trace: Trace, topology: Topology, options: Mapping[str, Any]) -> Costs:
    parameters = options["expert_parameters"]
    job = AssumedJob(
        seconds_per_token=OPERATIONS * parameters / options["tflops"] / 1e12,
        bytes_per_slot=max(1, round(options["bytes_per_parameter"] * parameters)),
        tokens_per_gpu=options["tokens_per_gpu"],
        bandwidth_inside=options["bandwidth_inside"] * 1e9,
        bandwidth_between=options["bandwidth_between"] * 1e9,
    )
    return Costs(job.model(trace, topology.num_gpus), None, job)


def _study(trace: Trace, side_by_side: int, topology: Topology, costs: Costs, options: Mapping[str, Any]) -> Study:
    return Study(
        trace,
        topology,
        costs.model,
        curve=costs.curve,
        window=options["window"],
        stands_for=options["stands_for"] or steps_stood_for(trace, side_by_side),
        num_candidates=options["candidates"],
        engine=options["engine"],
    )


# --- replay -----------------------------------------------------------------------------------------------------


def _default_interval(study: Study) -> int:
    """A round number of iterations between rebalances: 1, 2, 5, 10, 20, 50 and so on."""
    maximum = max(1, study.iterations // _MIN_REBALANCES)
    round_ones: list[int] = [digit * 10**zeros for zeros in range(len(str(maximum))) for digit in (1, 2, 5)]
    return max(study.minimum_interval, *(number for number in round_ones if number <= maximum))


def _replay(study: Study, every: int) -> tuple[dict[str, WhatIf], list[WhatIf]]:
    """Outcomes of the planners by name; and of plans with the price, by interval between rebalances."""
    names = (STATIC, SUM, STEPS, PRICED)
    study.cuts_of(every)  # raises for an interval that cannot be replayed
    candidates = sorted({round(every * factor) for factor in _FACTORS} - {every})
    others = [one for one in candidates if study.allows(one)]
    with progress("replaying") as update:
        trials = [(name, every) for name in names] + [(PRICED, one) for one in others]
        outcomes = study.run(trials, update)
    intervals = sorted([*outcomes[len(names) :], outcomes[len(names) - 1]], key=lambda one: one.every)
    return dict(zip(names, outcomes, strict=False)), intervals
