"""Splits of single steps compared with those of published systems: imbalance, replicas, traffic, cost, caps, and time.

    python -m benchmarks.splitting.bench_splitting --loads DIR --output benchmarks/results/DATE-splitting.md

`cases.py` lists the loads, `methods.py` the splits, `measurement.py` what is measured of each, `prices.py` what an H100
host charges, `caps.py` and `times.py` the caps and the times, `tables.py` the tables.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from benchmarks.shared.tables import command_line, header, markdown, progress, publish
from benchmarks.splitting import prices, tables
from benchmarks.splitting.caps import cap_lines, cap_table, caps_of, loads_once
from benchmarks.splitting.cases import LARGE, SIZE, SMALL, all_cases
from benchmarks.splitting.measurement import Result, measured
from benchmarks.splitting.times import REPEATS, time_lines, time_table, times
from distplb.splitting import cpu

__all__ = ["main"]

TEXT = (
    "Figures are medians over steps, with quartiles in brackets, of one run. Imbalance is the busiest GPU / the mean; "
    "`bound` is distplb.splitting.bound.step_bound / the mean, which no split with R slots can beat; replicas stay "
    "inside nodes, except in rows that say otherwise. Sends and receives are replicas, of the GPU that sends or "
    "receives most: a method that ignores R shows there how many slots it takes. Replicas without tokens are not "
    "counted. Tokens between GPUs and between nodes are shares of all tokens, routed by distplb.splitting.routes for "
    f"every method. µs is the time of a compiled decision, fastest of {REPEATS} calls on one core of a machine that "
    "others use at the same time; methods without a time are in NumPy. The methods are written from their published "
    "descriptions (benchmarks/splitting/baselines.py); they are not those systems' programs. The threshold search runs "
    "twice: to within 1 % of the lowest threshold, and with the level that distplb aims at as its first threshold. "
    "Homes are contiguous; only EPLB moves them, and puts an expert's copies on any GPUs of its node. It plans from "
    "another draw of the same layer (recorded), from another draw of the same popularities (power laws, log-normal), "
    "or from the step before (workloads); the first two are the best that a window can tell it. Its replicas lie in "
    "their slots from one plan to the next, and its moves of homes are not counted; the replicas of all others are "
    "sent in every step. Recorded steps are sums of random sequences of DeepSeek-V2-Lite, counts times 16, tokens "
    "dealt to random sources, so they say nothing about tokens that could stay on their GPU."
)
WHERE_BETTER = """\
`fewer replicas`: steps in which another method has fewer replicas than distplb at equal or lower imbalance.
`more even`: steps in which it is more even with at most as many replicas. distplb stops at its level, 0.5 % above
the mean or the mean of the busiest node, so a method that goes on is often a little more even; `level missed` are
those of these steps in which distplb does not reach its level. `fewer sends`: steps in which its busiest sender sends
fewer replicas, at most as many replicas in all and at most as unevenly. Pairs of load and method without such
steps are left out."""
COST = """\
{prices}

The cost of a split is the busiest GPU's tokens, and the prices of the replicas that one GPU sends, or receives,
whichever is more, on the GPU where that is highest; in units of the mean GPU's tokens. distplb knows these prices and
trades evenness for them; where there are several nodes it is measured with replicas inside nodes, and again with
replicas between nodes. The others' splits do not depend on prices, so they send replicas where none pay, which is
unfair to them. EPLB's replicas lie in their slots from step to step, so their weights are not sent again, only their
gradients go home: they are charged half. EPLB also moves homes, and as a GPU's experts are then other ones, more than R
of them may be replicas. That costs nothing here, and it plans from the same popularities or, in workloads, from the
step before, which is unfair to the others. Prices in tokens do not depend on the size of a step: one replica costs
{low:.1%} to {high:.0%} of the mean in the steps measured here."""
CHEAPER = """\
Steps in which a split costs less than distplb's priced one, distplb's other splits among them: its search should find
what they find. Savings below 1/64 of a replica's price are left out, because the search does not tell such levels
apart. `at full price`: steps that are also cheaper if EPLB's replicas are charged like all others."""
LEAVES = """\
On nodes of eight GPUs, replicas may leave their node if that is allowed: `free` at no price, `priced` at H100's prices.
`steps that use them`: steps with such a replica at H100's prices. Saving and loss are of the cost, against the split
with replicas inside nodes; a loss shows where the search misses a split that it was free to choose."""
CAPS = """\
`split` refuses a cap (`max_tokens_per_gpu`) of 1 token, and names the smallest cap that it could keep; that one is
passed next. R = 0 to 4, the first {steps} steps of each load. `at the bound`: steps whose smallest cap is the bound
that no split can beat. `proven`: `split` says that no split keeps a lower cap. `kept`: it keeps the cap that it named.
The distance is that of the cap from the bound, in parts of the mean. Below the rows for all loads are those loads whose
caps are not all at the bound, proven and kept."""
TIMES = """\
Medians over steps, R = 2. The first three columns are decisions alone, from tokens to replicas; `decision, with its
check` also computes the quotas and checks that they are legal; `split()` is the public call, with the checks of its
arguments; `exchange_of()` computes from its result what one GPU sends and receives. The last column is the decision
at H100's prices, which tries several levels."""


def main() -> None:
    """Measure, print the report, and write it if requested."""
    options = parsed_options()
    cpu.warm_up()
    cases = all_cases(options.loads, options.steps, options.draws, options.small)
    results = [measured(case) for case in cases]
    caps = [caps_of(case, options.capped) for case in loads_once(cases)]
    timed = times((SMALL,) if options.small else (SIZE, LARGE), options.steps)
    progress("")
    lines = [*tables.comparison_lines(results), *tables.evenness_lines(results), *cap_lines(caps), *time_lines(timed)]
    parts = [
        f"## Targets\n\n{markdown(['load', 'measure', 'target', 'reached', 'verdict'], lines)}",
        f"## Where another method is better\n\n{WHERE_BETTER}\n\n{tables.better(results)}",
        f"## Replicas and imbalance\n\n{tables.summary(results)}",
        f"## Cost at the prices of an H100 host\n\n{cost_text(results)}\n\n{tables.cost_summary(results)}",
        f"## Where another split is cheaper\n\n{CHEAPER}\n\n{tables.cheaper(results)}",
        f"## Replicas between nodes\n\n{LEAVES}\n\n{tables.leaving_table(results)}",
        f"## The smallest cap\n\n{CAPS.format(steps=options.capped)}\n\n{cap_table(caps)}",
        f"## Time\n\n{TIMES}\n\n{time_table(timed)}",
        *map(section, results),
    ]
    text = f"{TEXT} {options.steps} steps of each made load; {options.draws} × all layers of each recorded one."
    top = header("Splits of single steps", text, command(options), "cpu")
    publish("\n\n".join([top, *parts]), options.output)


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Splits of single steps compared with those of published systems.")
    parser.add_argument("--loads", type=Path, required=True, metavar="DIR", help="folder of deepseek-v2-lite_*_steps")
    parser.add_argument("--steps", type=int, default=24, help="steps of each made load")
    parser.add_argument("--draws", type=int, default=2, help="steps of each recorded load, each with all layers")
    parser.add_argument("--capped", type=int, default=24, help="steps of each load whose smallest cap is searched")
    parser.add_argument("--small", action="store_true", help="few GPUs and experts, to try the benchmark")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report (Markdown) there")
    return parser.parse_args()


def command(options: argparse.Namespace) -> str:
    """Return the command line, with the user's paths replaced."""
    names = ("steps", "draws", "capped", "small")
    return command_line(
        "splitting.bench_splitting", {"--loads": "DIR"} | {f"--{name}": getattr(options, name) for name in names}
    )


def cost_text(results: list[Result]) -> str:
    """Explain prices and costs."""
    each = [price for result in results for price in result.prices]
    return COST.format(prices=textwrap.fill(prices.text(), 120), low=min(each), high=max(each))


def section(result: Result) -> str:
    """Format all figures of one load."""
    return f"## {result.case.text}\n\n{tables.table(result)}\n\n{tables.cost_table(result)}"


if __name__ == "__main__":
    main()
