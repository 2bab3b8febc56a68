"""Planning on steps compared with planning on their sum: imbalance on steps of unseen sequences.

    python -m benchmarks.planning.bench_steps --loads DIR --output benchmarks/results/DATE-steps.md

A step is the sum of random sequences from all three texts. The sequences are split in halves: plans are made from steps
of one half, and judged on steps of the other.
Shapes: N sequences, T steps, L layers, E experts, M GPUs, K candidates.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import distplb
from benchmarks.shared import baselines
from benchmarks.shared.loads import GPUS_PER_NODE
from benchmarks.shared.sequences import halves, read_sequences, rescaled, steps_of
from benchmarks.shared.tables import command_line, header, markdown, progress, publish, verdict
from distplb import Placement, Topology, imbalance, lower_bound
from distplb.packing.engines import engine_named

Planner = Callable[[Tensor], Tensor]  # steps [T, L, E] -> expert of slot [L, E]

SIZES, GPUS = (8, 32), (8, 16)  # sequences in a step, and GPUs: the four settings of the targets
MIN_EXPERTS = 2  # experts on a GPU in the settings where planning on steps gains nothing
MAX_RATIO, MAX_RATIO_OF_LAYER = 0.62, 1.05
TEXT = (
    "Excess is busiest GPU / mean GPU - 1, mean over layers, unseen steps and splits. `÷ sum` is the excess divided by "
    "that of distplb.plan on the sum with as many candidates (with the fewest, for other planners). `worst layer` is "
    "the largest such ratio of a layer, after averaging over splits. Placements do not depend on the machine. A "
    "perfectly bias-balanced router is imitated by rescaling every expert to the same mean over all sequences, which "
    "also amplifies the fluctuations of cold experts."
)


@dataclass(frozen=True)
class Setting:
    """How large steps are, for how many GPUs, and whether experts are rescaled to the same mean."""

    size: int
    gpus: int
    balanced: bool = False

    @property
    def topology(self) -> Topology:
        """The cluster; its number of nodes has no effect without prices and groups."""
        nodes = max(1, self.gpus // GPUS_PER_NODE)
        return Topology(nodes, self.gpus // nodes)

    @property
    def text(self) -> str:
        """The heading of the setting."""
        router = ", every expert rescaled to the same mean" if self.balanced else ""
        return f"{self.size} sequences a step, {self.gpus} GPUs{router}"


@dataclass(frozen=True)
class Case:
    """One setting, and the excess `[L]` of every planner as a mean over unseen steps and splits."""

    setting: Setting
    excess: dict[str, Tensor]

    def mean(self, name: str) -> float:
        """Mean excess over the layers."""
        return float(self.excess[name].mean())

    def ratio(self, name: str, other: str) -> float:
        """Ratio of the mean excesses."""
        return self.mean(name) / self.mean(other)

    def worst_layer(self, name: str, other: str) -> float:
        """Largest ratio of the excesses of a layer."""
        return float((self.excess[name] / self.excess[other]).max())


def main() -> None:
    """Measure, print the report, and write it if requested."""
    options = parsed_options()
    engine = engine_named(options.engine)[0]
    sequences = torch.cat(list(read_sequences(options.loads).values()))
    cases = [measured(sequences, setting, options, engine) for setting in settings(sequences.shape[2])]
    progress("")
    parts = [f"## Targets\n\n{targets(cases, options.candidates)}", f"## All settings\n\n{summary(cases, options)}"]
    parts += [f"## {case.setting.text}\n\n{table(case, options.candidates)}" for case in cases]
    text = f"{TEXT} {len(sequences)} sequences; {options.steps} steps to plan on, {options.judged} to judge."
    top = header("Planning on steps and on their sum", text, command(options), engine)
    publish("\n\n".join([top, *parts]), options.output)


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Planning on steps compared with planning on their sum.")
    parser.add_argument("--loads", type=Path, required=True, metavar="DIR", help="folder of deepseek-v2-lite_*_steps")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8, 16], metavar="K")
    parser.add_argument("--steps", type=int, default=32, metavar="T", help="steps that plans are made from")
    parser.add_argument("--judged", type=int, default=64, metavar="T", help="unseen steps that plans are judged on")
    parser.add_argument("--splits", type=int, default=3, help="number of random splits into halves")
    parser.add_argument("--engine", help="engine of distplb; by default the fastest that is available")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report (Markdown) there")
    return parser.parse_args()


def command(options: argparse.Namespace) -> str:
    """Return the command line, with the user's paths replaced."""
    names = ("candidates", "steps", "judged", "splits", "engine")
    return command_line(
        "planning.bench_steps", {"--loads": "DIR"} | {f"--{name}": getattr(options, name) for name in names}
    )


def settings(experts: int) -> list[Setting]:
    """List the four settings of the targets and those with two experts per GPU, each as recorded and rescaled."""
    gpus = (*GPUS, experts // MIN_EXPERTS)
    return [Setting(size, number, balanced) for balanced in (False, True) for number in gpus for size in SIZES]


# --- measurement ------------------------------------------------------------------------------------------------


def planners_of(setting: Setting, experts: int, candidates: list[int], engine: str) -> dict[str, Planner]:
    """Return the planners by name."""
    cluster = {"topology": setting.topology, "num_slots": experts}
    planners: dict[str, Planner] = {
        "static": lambda load: baselines.contiguous(load.sum(0), **cluster),
        "greedy on the sum": lambda load: baselines.greedy_numpy(load.sum(0), **cluster),
    }
    for name, summed in ((on_sum, True), (on_steps, False)):
        for number in candidates:
            planners[name(number)] = partial(planned, summed=summed, num_candidates=number, engine=engine, **cluster)
    return planners


def on_sum(candidates: int) -> str:
    """Name the planner on the sum in tables."""
    return f"distplb.plan on the sum, K = {candidates}"


def on_steps(candidates: int) -> str:
    """Name the planner on the steps in tables."""
    return f"distplb.plan on the steps, K = {candidates}"


def planned(load: Tensor, *, summed: bool, **options: object) -> Tensor:
    """Plan by distplb, on the steps or on their sum."""
    return distplb.plan(load.sum(0) if summed else load, **options).expert_of_slot


def measured(sequences: Tensor, setting: Setting, options: argparse.Namespace, engine: str) -> Case:
    """Judge every planner on every split."""
    experts = sequences.shape[2]
    runs = planners_of(setting, experts, options.candidates, engine)
    excess: dict[str, list[Tensor]] = {}
    for split in range(options.splits):
        seen, unseen = drawn(sequences, setting, options.steps, options.judged, split)
        for name, run in runs.items():
            progress(f"{setting.text}, split {split + 1} of {options.splits}: {name}")
            placement = Placement(run(seen), experts, setting.gpus)
            excess.setdefault(name, []).append(imbalance(unseen, placement).mean(0) - 1)
        excess.setdefault("lower bound", []).append(lower_bound(unseen, setting.topology, experts) - 1)
    return Case(setting, {name: torch.stack(values).mean(0) for name, values in excess.items()})


def drawn(sequences: Tensor, setting: Setting, steps: int, judged: int, split: int) -> tuple[Tensor, Tensor]:
    """Draw steps `[T, L, E]` to plan on, and steps of other sequences to judge plans on."""
    first, second = halves(rescaled(sequences) if setting.balanced else sequences, split)
    return (
        steps_of(first, steps, setting.size, [split, setting.size, 0]),
        steps_of(second, judged, setting.size, [split, setting.size, 1]),
    )


# --- text -------------------------------------------------------------------------------------------------------


def compared_with(name: str, candidates: list[int]) -> str:
    """Return the planner on the sum that a planner is compared with."""
    return next((on_sum(number) for number in candidates if name.endswith(f"K = {number}")), on_sum(candidates[0]))


def table(case: Case, candidates: list[int]) -> str:
    """Format a row for each planner."""
    lines = []
    for name in case.excess:
        other = compared_with(name, candidates)
        ratios = [f"{case.ratio(name, other):.3f}", f"{case.worst_layer(name, other):.3f}"]
        lines.append([name, f"{case.mean(name):.4f}", *ratios])
    return markdown(["planner", "excess", "÷ sum", "worst layer"], lines)


def summary(cases: list[Case], options: argparse.Namespace) -> str:
    """Format a row for each setting, with the largest number of candidates."""
    candidates = options.candidates[-1]
    columns = {
        "static": "static",
        "greedy": "greedy on the sum",
        "sum": on_sum(candidates),
        "steps": on_steps(candidates),
        "bound": "lower bound",
    }
    lines = [
        [
            case.setting.text,
            *(f"{case.mean(name):.4f}" for name in columns.values()),
            f"{case.ratio(on_steps(candidates), on_sum(candidates)):.3f}",
        ]
        for case in cases
    ]
    head = [f"excess, K = {candidates}", *columns, "steps ÷ sum"]
    return markdown(head, lines)


def targets(cases: list[Case], candidates: list[int]) -> str:
    """Format the targets of planning on steps, for every K; rescaled settings have no targets, only results."""
    lines = []
    for balanced in (False, True):
        of_target = [case for case in cases if case.setting.gpus in GPUS and case.setting.balanced == balanced]
        for number in candidates:
            lines += target_lines(of_target, number, balanced)
    return markdown(["settings", "K", "measure", "target", "reached", "verdict"], lines)


def target_lines(cases: list[Case], candidates: int, balanced: bool) -> list[list[str]]:
    """Format a row for each measure."""
    names = on_steps(candidates), on_sum(candidates)
    ratio = sum(case.ratio(*names) for case in cases) / len(cases)
    worst = max(case.worst_layer(*names) for case in cases)
    lines = []
    for measure, limit, reached in (
        ("excess ÷ sum, mean of the four", MAX_RATIO, ratio),
        ("excess ÷ sum, worst layer", MAX_RATIO_OF_LAYER, worst),
    ):
        outcome = [f"≤ {limit}", f"{reached:.3f}", verdict(reached <= limit)]
        if balanced:
            outcome = ["–", f"{reached:.3f}", "–"]
        lines.append(["rescaled" if balanced else "as recorded", str(candidates), measure, *outcome])
    return lines


if __name__ == "__main__":
    main()
