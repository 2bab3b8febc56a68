"""Planners on traces: what a job would have waited for the fullest GPU, and for its experts to move.

    python benchmarks/bench_replay.py --loads DIR --output benchmarks/results/DATE-replay.md
    python benchmarks/bench_replay.py --windows --loads DIR
    python benchmarks/bench_replay.py --traces FILE FOLDER --every 100 --no-made

Every step is judged under a plan that had not seen it. The traces are those of benchmarks/traces, the generators of
troubles.py, and steps that are made of the recorded sequences of --loads; each as it is, and with every expert
rescaled to the same mean over the trace.
Shapes: S steps, T steps of a window, L layers, E experts, M GPUs, K candidates.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import replay_cases as cases
import replay_figure
import torch
import windows
from replay_cases import Case
from tables import command_line, header, markdown, progress
from torch import Tensor

import distplb
from distplb import MoveModel, Placement, replay
from distplb.packing.engines import engine_named
from distplb.study.costs import FLOPS, AssumedJob
from distplb.study.replay import Planner, Replay

STATIC, GREEDY, SUM, STEPS, PRICED = "static", "greedy", "ours on the sum", "ours on the steps", "ours with the price"
MOST_MOVES = 1 / 3  # of greedy's
TEXT = (
    "Every step is judged under a plan that had not seen it; until the first rebalance all planners run on the "
    "contiguous placement. `imbalance` is the mean over layers and steps after the first rebalance, `worst step` the "
    "largest mean over the layers of a step there, `moved` the slots whose expert came from another GPU, and in "
    "brackets their share of all slots in a rebalance. Seconds are modelled, of the whole trace: the fullest GPU's "
    "tokens of every step and layer, and the moves. `over even` is the total over that of GPUs that are equally full, "
    "without a move. The sum and the steps are planned from the placement in force too, but at no price. What a move "
    "saves on the steps that were planned on is more than it saves on those after them, so the price counts half of it "
    "(MoveModel.trust); other multiples of that price are shown too. Drawn traces are steps of random sequences out of "
    "200, which recur, so a planner has met them in other company (bench_steps.py keeps them apart). "
    "Nothing depends on the machine."
)
BALANCED = (
    "This is what decides whether anyone needs a rebalancer whose router balances itself: biases that hold every "
    "expert's mean over the trace at the same height while each step keeps its tokens. Drift within the trace stays, "
    "and the few tokens of experts that were cold are blown up, wavering and all; of the recorded traces only a "
    "loss-free one had a router that really balances itself, and it is hardly changed. `waits` is what static waits "
    "for the fullest GPU, in percent of its total; the others are what they take less than static, moves included, in "
    "percent of static's total."
)
FOLLOWING = (
    "A real router's biases follow what drifts, and the rescaling above does not: what is saved there where the load "
    "drifts, shifts or rotates is partly what biases would have done. Here every expert is rescaled to the same mean "
    "over each {every} steps between two rebalances by itself. What is left are steps that differ from each other; "
    "columns as above."
)
WINDOWS = (
    "What is planned on, for ours on the steps without a price: the last window as it is, the last two or four, the "
    "last with weights that halve with so many steps of age, or rescaled to a forecast, a straight line for every "
    "expert through the last window or two. `excess` is the mean imbalance after the first rebalance, less 1; the "
    "others are ratios to it, below 1 is better than the last window, and in brackets their range over the traces."
)


@dataclass(frozen=True)
class Found:
    """What all planners made of a case, by name."""

    case: Case
    model: MoveModel
    every: int
    replays: dict[str, Replay]

    @property
    def even(self) -> Tensor:
        """`[S]` float64: modelled seconds of each step if all GPUs were equally full."""
        return self.case.trace.load.sum((1, 2)).double() / self.case.topology.num_gpus * self.model.seconds_per_token

    def uneven(self, name: str) -> Tensor:
        """`[S]`: imbalance after the first rebalance, mean over the layers."""
        return self.replays[name].imbalance[self.every :].mean(1)

    def seconds(self, name: str) -> Tensor:
        """`[S]` float64, modelled, of each step; of the moves too, in the first step after them."""
        one = self.replays[name]
        seconds = one.fullest.sum(1).double() * self.model.seconds_per_token
        for step, (inside, between) in zip(one.rebalance_steps, one.moved.tolist(), strict=True):
            seconds[step] += self.model.seconds(inside, between)
        return seconds

    def saved(self, name: str) -> float:
        """Share of static's seconds that a planner takes less."""
        return 1 - self.replays[name].seconds / self.replays[STATIC].seconds


def main() -> None:
    """Replay, print, and write where that is asked for."""
    options = parsed_options()
    engine = engine_named(options.engine)[0]
    found_cases = all_cases(options)
    if options.windows:
        title, text = "Which steps to plan on", WINDOWS
        parts = [f"## Traces\n\n{window_part(found_cases, options, engine)}"]
    else:
        title, text = "Planners on traces", TEXT
        balanced = [case.rescaled() for case in found_cases]
        following = [case.rescaled(options.every) for case in found_cases]
        found = [replayed(case, options, engine) for case in (*found_cases, *balanced)]
        parts = report_parts(found, [replayed(case, options, engine) for case in following], options)
        written(found, options)
    progress("")
    report = "\n\n".join([header(title, text, command(options), engine), assumptions(options), *parts])
    print(report)
    if options.output:
        options.output.write_text(f"{report}\n")


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Planners on traces.")
    parser.add_argument(
        "--traces", type=Path, nargs="+", default=[cases.SHIPPED], help=".npz files, or folders of them"
    )
    parser.add_argument("--loads", type=Path, metavar="DIR", help="folder of deepseek-v2-lite_*_steps.npy")
    parser.add_argument("--no-made", action="store_true", help="leave out the generators of troubles.py")
    parser.add_argument("--seeds", type=int, default=1, help="of the generators")
    parser.add_argument("--windows", action="store_true", help="instead: which steps to plan on")
    parser.add_argument("--every", type=int, default=32, metavar="N", help="steps between rebalances, all planned on")
    parser.add_argument("--candidates", type=int, default=4, metavar="K")
    parser.add_argument("--dearer", type=float, nargs="*", default=[0.5, 2.0], help="also at so many times the price")
    parser.add_argument("--experts-per-gpu", type=int, default=8, metavar="G")
    parser.add_argument("--nodes", type=int, metavar="N", help="by default two for four GPUs or more")
    parser.add_argument("--engine", help="distplb's; by default the fastest that is there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown, and a figure")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every step's figures there")
    add_model_options(parser)
    return parser.parse_args()


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What is assumed of the job."""
    job = AssumedJob()
    parser.add_argument(
        "--seconds-per-token", type=float, default=job.seconds_per_token, help="of one expert, both passes"
    )
    parser.add_argument("--bytes-per-slot", type=int, default=job.bytes_per_slot, help="with the optimizer's state")
    parser.add_argument("--tokens-per-gpu", type=float, default=job.tokens_per_gpu, help="mean of a step and layer")
    parser.add_argument("--inside", type=float, default=job.bandwidth_inside, help="bytes/s of each GPU inside a node")
    parser.add_argument(
        "--between", type=float, default=job.bandwidth_between, help="bytes/s of each GPU between nodes"
    )


def command(options: argparse.Namespace) -> str:
    """The command line without the reader's own paths."""
    given: dict[str, object] = {"--windows": options.windows, "--loads": options.loads and "DIR"}
    given |= {} if options.traces == [cases.SHIPPED] else {"--traces": "TRACES"}
    names = ["no_made", "seeds", "every", "candidates", "dearer", "experts_per_gpu", "nodes", "engine"]
    if not options.windows:
        names += ["tokens_per_gpu", "seconds_per_token", "bytes_per_slot", "inside", "between"]
    return command_line(
        "bench_replay.py", given | {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    )


def all_cases(options: argparse.Namespace) -> list[Case]:
    """As they are."""
    sources = {"recorded": list(cases.recorded(options.traces))}
    sources["drawn"] = list(cases.drawn(options.loads)) if options.loads else []
    sources["made"] = [] if options.no_made else list(cases.made(options.seeds))
    found = []
    for origin, traces in sources.items():
        for name, trace in traces:
            topology = cases.cluster_of(trace.num_experts, options.experts_per_gpu, options.nodes)
            found.append(Case(name, origin, trace, topology))
    return found


# --- measurement ------------------------------------------------------------------------------------------------


def planners(case: Case, model: MoveModel, options: argparse.Namespace, engine: str) -> dict[str, Planner]:
    """By name."""
    cluster = {"topology": case.topology, "num_candidates": options.candidates, "engine": engine}

    def priced(load: Tensor, current: Placement, times: float = 1.0) -> Placement:
        inside, between = model.price(len(load), options.every)
        return distplb.plan(load, current=current, move_price=(times * inside, times * between), **cluster)

    found: dict[str, Planner] = {
        STATIC: lambda load, current: current,
        GREEDY: partial(greedy, case),
        SUM: lambda load, current: distplb.plan(load.sum(0), current=current, **cluster),
        STEPS: lambda load, current: distplb.plan(load, current=current, **cluster),
        PRICED: priced,
    }
    return found | {dearer(times): partial(priced, times=times) for times in options.dearer}


def dearer(times: float) -> str:
    """The line of a table."""
    return f"{PRICED} × {times:g}"


def greedy(case: Case, load: Tensor, current: Placement) -> Placement:
    """DeepSeek's, on the sum; it knows no placement in force."""
    table = baselines.greedy_numpy(load.sum(0), case.topology, current.num_slots)
    return Placement(table, current.num_experts, current.num_gpus)


def assumed(options: argparse.Namespace) -> AssumedJob:
    """Of the job."""
    given = {name: getattr(options, name) for name in ("seconds_per_token", "bytes_per_slot", "tokens_per_gpu")}
    return AssumedJob(**given, bandwidth_inside=options.inside, bandwidth_between=options.between)


def replayed(case: Case, options: argparse.Namespace, engine: str) -> Found:
    """By every planner."""
    model = assumed(options).model(case.trace, case.topology.num_gpus)
    found = {}
    for name, planner in planners(case, model, options, engine).items():
        progress(f"{case.title}: {name}")
        found[name] = replay(case.trace, planner, topology=case.topology, every=options.every, model=model)
    return Found(case, model, options.every, found)


def window_part(found_cases: list[Case], options: argparse.Namespace, engine: str) -> str:
    """Every choice of steps on every trace."""
    excess: dict[str, dict[str, float]] = {}
    for case in found_cases:
        model = assumed(options).model(case.trace, case.topology.num_gpus)
        planner = planners(case, model, options, engine)[STEPS]
        excess[case.name] = {}
        for name, prepare in windows.choices(options.every).items():
            progress(f"{case.name}: {name}")
            remembering = windows.Remembering(prepare, planner)
            one = replay(case.trace, remembering, topology=case.topology, every=options.every, model=model)
            excess[case.name][name] = float(one.imbalance[options.every :].mean()) - 1
    return windows.report(excess, {case.name: case.origin for case in found_cases})


# --- text -------------------------------------------------------------------------------------------------------


def assumptions(options: argparse.Namespace) -> str:
    """The model in words, and the price that follows."""
    if options.windows:
        return f"A rebalance every {options.every} steps, {options.experts_per_gpu} experts a GPU."
    gpus, job = 8, assumed(options)
    step = job.seconds_per_token * job.tokens_per_gpu
    inside, between = (job.bytes_per_slot / (rate * gpus) for rate in (job.bandwidth_inside, job.bandwidth_between))
    return (
        f"Assumed: an expert of {job.bytes_per_slot / 1e6:.0f} MB with its weight, master copy and two moments "
        f"(DeepSeek-V3's: 3 × 7168 × 2048 parameters of 14 bytes); {job.seconds_per_token * 1e6:.3f} µs a token, both "
        f"passes (6 operations a parameter at {FLOPS / 1e12:.0f} TFLOP/s by default); "
        f"{job.tokens_per_gpu:.0f} tokens on the mean GPU in a step and layer (4,096 tokens of 8 experts by default), "
        f"whatever the trace's own numbers, so {step * 1e3:.1f} ms; each GPU sends {options.inside / 1e9:.0f} GB/s "
        f"inside a node and {options.between / 1e9:.0f} GB/s between nodes while all do. "
        f"{options.experts_per_gpu} experts a GPU, four GPUs and more on two nodes by default. "
        f"On {gpus} GPUs a moved slot then takes "
        f"{inside * 1e3:.2f} ms inside a node and {between * 1e3:.2f} ms between nodes, {inside / step:.1%} and "
        f"{between / step:.1%} of the mean GPU's time in one step and layer. With a rebalance every {options.every} "
        f"steps its price is {inside / step / options.every:.3%} and {between / step / options.every:.3%} of the "
        "mean GPU's tokens of the window: neither free nor prohibitive."
    )


def report_parts(found: list[Found], following: list[Found], options: argparse.Namespace) -> list[str]:
    """Targets, the rows that decide, the figure, and a table for each case."""
    plain = [one for one in found if not one.case.balanced]
    balanced = [one for one in found if one.case.balanced]
    recorded = [one for one in plain if one.case.origin == "recorded"]
    parts = [f"## Targets on recorded traces\n\n{targets(recorded)}"] if recorded else []
    parts.append(f"## As the traces are\n\n{gains(plain)}")
    parts.append(f"## A perfectly bias-balanced router\n\n{BALANCED}\n\n{gains(balanced)}\n\n{in_words(balanced)}")
    text = FOLLOWING.format(every=options.every)
    parts.append(f"## Biases that follow the load\n\n{text}\n\n{gains(following)}\n\n{in_words(following)}")
    if options.output:
        parts.append(f"![Imbalance and modelled seconds, step by step]({options.output.with_suffix('.png').name})")
    return parts + [f"## {one.case.title}\n\n{table(one)}" for one in found]


def table(found: Found) -> str:
    """A line for each planner."""
    head = ["planner", "imbalance", "worst step", "moved", "computing s", "moving s", "total s", "over even"]
    lines = []
    for name, one in found.replays.items():
        slots = max(1, len(one.moved)) * found.case.trace.num_layers * found.case.trace.num_experts
        lines.append(
            [
                name,
                f"{float(found.uneven(name).mean()):.4f}",
                f"{float(found.uneven(name).max()):.3f}",
                f"{one.slots_moved} ({one.slots_moved / slots:.1%})",
                f"{one.compute_seconds:.3f}",
                f"{one.move_seconds:.3f}",
                f"{one.seconds:.3f}",
                f"{one.seconds / float(found.even.sum()) - 1:.2%}",
            ]
        )
    cluster = found.case.topology
    nodes = f"{cluster.num_nodes} {'node' if cluster.num_nodes == 1 else 'nodes'}"
    inside, between = found.model.price(found.every, found.every)
    text = (
        f"{found.case.trace.num_steps} steps, {found.case.trace.num_layers} layers, {found.case.trace.num_experts} "
        f"experts on {cluster.num_gpus} GPUs ({nodes}); a moved slot costs {inside:.0f} tokens of "
        f"the window inside a node and {between:.0f} between nodes."
    )
    return f"{text}\n\n{markdown(head, lines)}"


def gains(found: list[Found]) -> str:
    """A line for each trace: what static waits, and what the others save of it."""
    names = [name for name in found[0].replays if name != STATIC]
    lines = [
        [one.case.name, one.case.origin, f"{waits(one):.2%}", *(f"{one.saved(name):+.2%}" for name in names)]
        for one in found
    ]
    return markdown(["trace", "is", "waits", *(f"saved, {name}" for name in names)], lines)


def waits(found: Found) -> float:
    """Share of static's seconds."""
    return 1 - float(found.even.sum()) / found.replays[STATIC].seconds


def in_words(found: list[Found]) -> str:
    """What the rows of a perfectly bias-balanced router say."""
    lines = []
    for origin in dict.fromkeys(one.case.origin for one in found):
        own = [one for one in found if one.case.origin == origin]
        ranges = {name: [one.saved(name) for one in own] for name in (GREEDY, SUM, STEPS, PRICED)}
        static = [waits(one) for one in own]
        lines.append(
            f"- {origin} ({len(own)}): static waits {min(static):.1%} to {max(static):.1%} of its time; with the "
            f"price, {percent(ranges[PRICED])} of it is saved; on the steps at no price {percent(ranges[STEPS])}, on "
            f"the sum {percent(ranges[SUM])}, by greedy {percent(ranges[GREEDY])}."
        )
    useful = [one.case.name for one in found if one.saved(PRICED) >= 0.01]
    names = f" ({'; '.join(useful)})" if useful else ": nobody there needs a rebalancer"
    worth = f"With the price, 1 % of the time or more is saved on {len(useful)} of {len(found)} traces{names}."
    return "\n".join([*lines, "", worth])


def percent(values: list[float]) -> str:
    """A range."""
    return f"{min(values):+.1%} to {max(values):+.1%}"


def targets(found: list[Found]) -> str:
    """Three lines for each trace, and for all of them together."""
    names = list(found[0].replays)
    seconds = {one.case.name: {name: one.replays[name].seconds for name in names} for one in found}
    moved = {one.case.name: {name: one.replays[name].slots_moved for name in names} for one in found}
    for of in (seconds, moved):
        of["all together"] = {name: sum(row[name] for row in of.values()) for name in names}
    lines = [line for trace in seconds for line in target_lines(trace, seconds[trace], moved[trace])]
    return markdown(["trace", "measure", "asked", "reached", "verdict"], lines)


def target_lines(trace: str, seconds: dict[str, float], moved: dict[str, int]) -> list[list[str]]:
    """A line for each measure."""
    best = min((STATIC, GREEDY, SUM, STEPS), key=seconds.__getitem__)
    share, ours = moved[PRICED] / max(1, moved[GREEDY]), seconds[PRICED]
    asked = (
        ("modelled seconds, best other planner", f"≤ {seconds[best]:.3f} ({best})", ours, ours <= seconds[best]),
        ("modelled seconds, greedy", f"< {seconds[GREEDY]:.3f}", ours, ours < seconds[GREEDY]),
        ("slots moved ÷ greedy's", f"≤ {MOST_MOVES:.3f}", share, share <= MOST_MOVES),
    )
    return [[trace, what, most, f"{reached:.3f}", "met" if met else "missed"] for what, most, reached, met in asked]


def written(found: list[Found], options: argparse.Namespace) -> None:
    """The figure, and every step's figures, where they are asked for."""
    if options.output:
        shown = []
        for one in found:
            runs = {name: (run, one.seconds(name)) for name, run in one.replays.items()}
            title = f"{one.case.name}, rescaled" if one.case.balanced else one.case.name
            shown.append((title, runs, one.even))
        half = len(shown) // 2  # a trace and its rescaled twin side by side
        pairs = zip(shown[:half], shown[half:], strict=True)
        replay_figure.draw([case for pair in pairs for case in pair], options.output.with_suffix(".png"))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            write_steps(found, csv.writer(file))


def write_steps(found: list[Found], writer: Any) -> None:
    """A line for each trace, planner and step: mean imbalance of the layers, slots moved before, modelled seconds."""
    writer.writerow(["trace", "planner", "step", "imbalance", "moved", "seconds"])
    for one in found:
        for name, run in one.replays.items():
            moved = torch.zeros(one.case.trace.num_steps, dtype=torch.int64)
            moved[list(run.rebalance_steps)] = run.moved.sum(1)
            columns = run.imbalance.mean(1).tolist(), moved.tolist(), one.seconds(name).tolist()
            for step, values in enumerate(zip(*columns, strict=True)):
                writer.writerow([one.case.title, name, step, *values])


if __name__ == "__main__":
    main()
