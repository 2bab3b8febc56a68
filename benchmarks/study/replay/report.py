"""The report of bench_replay: targets, gains in words and in tables, and a table for each trace."""

from __future__ import annotations

import argparse

from benchmarks.shared.tables import markdown, verdict
from benchmarks.study.replay.measure import GREEDY, JOB, PRICED, STATIC, STEPS, SUM, Result
from distplb.study.costs import FLOPS

MAX_MOVES = 1 / 3  # of greedy's
TEXT = (
    "Every step is judged under a plan that had not seen it; until the first rebalance all planners run on the "
    "contiguous placement. `imbalance` is the mean over layers and steps after the first rebalance; `worst step` is "
    "the largest mean over layers of any of these steps; `moved` counts slots whose expert came from another GPU, with "
    "their share of all slots in a rebalance in parentheses. Seconds are modelled for the whole trace: the busiest "
    "GPU's tokens in every step and layer, plus the moves. `over even` is the excess of the total over that of equally "
    "loaded GPUs without moves. Plans on the sum and on the steps also start from the placement in force, but without "
    "a price. A move saves more on the steps that were planned on than on those after them, so the price counts half "
    "of the saving (MoveModel.trust); other multiples of that price are also shown. Drawn traces are steps of random "
    "sequences out of 200, which recur, so a planner has seen them in other combinations (bench_steps.py separates "
    "them). No result depends on the machine."
)
BALANCED = (
    "Does a job whose router balances itself need a rebalancer? Here biases hold every expert at the same mean over "
    "the trace, while each step keeps its total of tokens. Drift within the trace stays, and the few tokens of cold "
    "experts are scaled up together with their fluctuations. Of the recorded traces, only a loss-free one had a router "
    "that really balances itself, and it hardly changes. `waits` is the time that static waits for the busiest GPU, in "
    "percent of its total; the other columns are the time saved against static, moves included, in percent of static's "
    "total."
)
FOLLOWING = (
    "A real router's biases follow drift, but the rescaling above does not: where the load drifts, shifts or rotates, "
    "biases would have made part of the savings shown above. Here every expert is rescaled to the same mean within "
    "each {every} steps between two rebalances. Only differences between these steps remain; columns as above."
)


def assumptions(options: argparse.Namespace) -> str:
    """The cost model in words, and the price that follows from it."""
    gpus, job = 8, JOB
    step = job.seconds_per_token * job.tokens_per_gpu
    inside, between = (job.bytes_per_slot / (rate * gpus) for rate in (job.bandwidth_inside, job.bandwidth_between))
    return (
        f"Assumed: an expert of {job.bytes_per_slot / 1e6:.0f} MB with its weight, master copy and two moments "
        f"(DeepSeek-V3's: 3 × 7168 × 2048 parameters of 14 bytes); {job.seconds_per_token * 1e6:.3f} µs a token, both "
        f"passes (6 operations a parameter at {FLOPS / 1e12:.0f} TFLOP/s); "
        f"{job.tokens_per_gpu:.0f} tokens on the mean GPU in a step and layer (4,096 tokens of 8 experts), "
        f"whatever the trace's own numbers, so {step * 1e3:.1f} ms; each GPU sends "
        f"{job.bandwidth_inside / 1e9:.0f} GB/s inside a node and {job.bandwidth_between / 1e9:.0f} GB/s between nodes "
        "while all GPUs send. "
        f"{options.experts_per_gpu} experts per GPU; jobs with four or more GPUs use two nodes. "
        f"On {gpus} GPUs a moved slot then takes "
        f"{inside * 1e3:.2f} ms inside a node and {between * 1e3:.2f} ms between nodes, {inside / step:.1%} and "
        f"{between / step:.1%} of the mean GPU's time in one step and layer. With a rebalance every {options.every} "
        f"steps its price is {inside / step / options.every:.3%} and {between / step / options.every:.3%} of the "
        "mean GPU's tokens of the window: neither free nor prohibitive."
    )


def report_parts(results: list[Result], following: list[Result], options: argparse.Namespace) -> list[str]:
    """Targets, gains, the figure, and a table for each case."""
    plain = [result for result in results if not result.case.balanced]
    balanced = [result for result in results if result.case.balanced]
    recorded = [result for result in plain if result.case.origin == "recorded"]
    parts = [f"## Targets on recorded traces\n\n{targets(recorded)}"] if recorded else []
    parts.append(f"## As the traces are\n\n{gains(plain)}")
    parts.append(f"## A perfectly bias-balanced router\n\n{BALANCED}\n\n{gains(balanced)}\n\n{in_words(balanced)}")
    text = FOLLOWING.format(every=options.every)
    parts.append(f"## Biases that follow the load\n\n{text}\n\n{gains(following)}\n\n{in_words(following)}")
    if options.output:
        parts.append(f"![Imbalance and modelled seconds, step by step]({options.output.with_suffix('.png').name})")
    return parts + [f"## {result.case.title}\n\n{table(result)}" for result in results]


def table(result: Result) -> str:
    """A line for each planner."""
    head = ["planner", "imbalance", "worst step", "moved", "computing s", "moving s", "total s", "over even"]
    lines = []
    for name, run in result.replays.items():
        slots = max(1, len(run.moved)) * result.case.trace.num_layers * result.case.trace.num_experts
        lines.append(
            [
                name,
                f"{float(result.uneven(name).mean()):.4f}",
                f"{float(result.uneven(name).max()):.3f}",
                f"{run.slots_moved} ({run.slots_moved / slots:.1%})",
                f"{run.compute_seconds:.3f}",
                f"{run.move_seconds:.3f}",
                f"{run.seconds:.3f}",
                f"{run.seconds / float(result.even.sum()) - 1:.2%}",
            ]
        )
    cluster = result.case.topology
    nodes = f"{cluster.num_nodes} {'node' if cluster.num_nodes == 1 else 'nodes'}"
    inside, between = result.model.price(result.every, result.every)
    text = (
        f"{result.case.trace.num_steps} steps, {result.case.trace.num_layers} layers, {result.case.trace.num_experts} "
        f"experts on {cluster.num_gpus} GPUs ({nodes}); a moved slot costs {inside:.0f} tokens of "
        f"the window inside a node and {between:.0f} between nodes."
    )
    return f"{text}\n\n{markdown(head, lines)}"


def gains(results: list[Result]) -> str:
    """A line for each trace: the share of time that static waits, and the share that the others save."""
    names = [name for name in results[0].replays if name != STATIC]
    lines = []
    for result in results:
        savings = (f"{result.saved(name):+.2%}" for name in names)
        lines.append([result.case.name, result.case.origin, f"{waits(result):.2%}", *savings])
    return markdown(["trace", "is", "waits", *(f"saved, {name}" for name in names)], lines)


def waits(result: Result) -> float:
    """The share of static's seconds in which GPUs wait for the busiest one."""
    return 1 - float(result.even.sum()) / result.replays[STATIC].seconds


def in_words(results: list[Result]) -> str:
    """The ranges of waiting and saving, by the origin of the traces."""
    lines = []
    for origin in dict.fromkeys(result.case.origin for result in results):
        own = [result for result in results if result.case.origin == origin]
        ranges = {name: [result.saved(name) for result in own] for name in (GREEDY, SUM, STEPS, PRICED)}
        static = [waits(result) for result in own]
        lines.append(
            f"- {origin} ({len(own)}): static waits {min(static):.1%} to {max(static):.1%} of its time; with the "
            f"price, {percent(ranges[PRICED])} of it is saved; on the steps without a price {percent(ranges[STEPS])}, "
            f"on the sum {percent(ranges[SUM])}, by greedy {percent(ranges[GREEDY])}."
        )
    useful = [result.case.name for result in results if result.saved(PRICED) >= 0.01]
    names = f" ({'; '.join(useful)})" if useful else ": none of them needs a rebalancer"
    worth = f"With the price, at least 1 % of the time is saved on {len(useful)} of {len(results)} traces{names}."
    return "\n".join([*lines, "", worth])


def percent(values: list[float]) -> str:
    """A range of shares."""
    return f"{min(values):+.1%} to {max(values):+.1%}"


def targets(results: list[Result]) -> str:
    """Three lines for each trace, and three for all traces together."""
    names = list(results[0].replays)
    seconds = {result.case.name: {name: result.replays[name].seconds for name in names} for result in results}
    moved = {result.case.name: {name: result.replays[name].slots_moved for name in names} for result in results}
    for of in (seconds, moved):
        of["all together"] = {name: sum(row[name] for row in of.values()) for name in names}
    lines = [line for trace in seconds for line in target_lines(trace, seconds[trace], moved[trace])]
    return markdown(["trace", "measure", "asked", "reached", "verdict"], lines)


def target_lines(trace: str, seconds: dict[str, float], moved: dict[str, int]) -> list[list[str]]:
    """A line for each measure."""
    best = min((STATIC, GREEDY, SUM, STEPS), key=seconds.__getitem__)
    share, ours = moved[PRICED] / max(1, moved[GREEDY]), seconds[PRICED]
    measures = (
        ("modelled seconds, best other planner", f"≤ {seconds[best]:.3f} ({best})", ours, ours <= seconds[best]),
        ("modelled seconds, greedy", f"< {seconds[GREEDY]:.3f}", ours, ours < seconds[GREEDY]),
        ("slots moved ÷ greedy's", f"≤ {MAX_MOVES:.3f}", share, share <= MAX_MOVES),
    )
    return [[trace, measure, limit, f"{reached:.3f}", verdict(is_met)] for measure, limit, reached, is_met in measures]
