"""What distplb costs in an iteration in which it does nothing: microseconds, allocations, and what grows with calls.

    python -m benchmarks.train.bench_idle --against COMMIT --output benchmarks/results/DATE-idle.md

`Rebalancer.step()` between rebalances, `LoadWindow.add`, and `StepBalancer` in steps in which no replica pays, on one
rank and on two over gloo, beside the exchange of counts that a dispatcher makes itself. With `--against`, the package
of that commit takes turns with this one in the same processes.
Shapes: N tokens of a rank, K = 2 experts of each token, L layers, E experts, G = 4 own slots of a rank, M ranks.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.shared.allocations import MEMORY
from benchmarks.shared.earlier import EARLIER, put_earlier
from benchmarks.shared.processes import on_this_host, run_job
from benchmarks.shared.tables import command_line, header, markdown, progress, publish, verdict

MODULE, RANKS = "benchmarks.train.bench_idle", (1, 2)
LAYERS, EXPERTS, STEPS = 58, 256, 64  # of the window and the rebalancer: those of DeepSeek-V3
TOKENS, OWN = 512, 4
NEVER, WARM_UP = 10**9, 20
KEPT = 0.05  # of a call, on average; a dict that grows once leaves that behind
EXCHANGE, STEP_PLAIN = "exchange of counts, by hand", "forward and backward, by hand"
DISPATCH = "`dispatch`, even"
STEP_BALANCED = "forward and backward, even"
FEW, MANY, TIMES = 50, 1500, 2  # calls before growth is measured, and while it is, so many times
SETTLED = 4200  # the same before, of a balancer, which then forgets as many forwards as come
SETTLED_CLOCK = 10_100  # the same of a rebalancer, which then forgets as many iterations' times
SECONDS = 900
TEXT = (
    "Microseconds of a call: median, with the minimum in brackets. All calls take turns in one process, in an order "
    "that changes; on two ranks each starts at a barrier, so their code is cold, as in a step. `Python` and `tensors` "
    "are what a call allocates: bytes of Python and NumPy that are alive at once, and tensors. `kept` is what a call "
    "leaves behind, blocks of Python's memory and tensors, on average over {many} calls, the least of {times} times: "
    "Python keeps lists of free objects, which fill for a while. Before that come {few} calls, "
    "or {clock} of `Rebalancer.step()`, which keeps the times of 10,000 iterations at most, or {settled} of "
    "`dispatch`, which knows 4,096 forwards of a layer at most and gets other counts in each call here. `exchange of "
    "counts, by hand` counts, exchanges counts, and sums them to split sizes; `dispatch` takes its place, decides, and "
    "says which slot each token goes to. Both end when split sizes are known. {layers} layers of {experts} experts, "
    "windows of {steps} steps; {tokens} tokens with 2 experts each, {own} experts on a rank. Load average of the "
    "machine, which other jobs share: {before:.1f} before and {after:.1f} after, on {cores} cores."
)
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A call that is measured.

    Args:
        call: what is timed.
        prepare: what has to come before each, untimed.
        other: the same call with other numbers each time, if it could remember them.
        before: calls before growth is measured.
    """

    call: Call
    prepare: Call | None = None
    other: Call | None = None
    before: int = FEW


def main() -> None:
    """Measure, print the report, and write it if requested."""
    options = parsed_options()
    if options.job:
        run_job(options.job, measured)
        return
    before = os.getloadavg()[0]
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.against is not None:
            put_earlier(options.against, Path(folder))
        for ranks in RANKS:
            progress(f"{ranks} ranks")
            earlier = None if options.against is None else folder
            task = {"rounds": options.rounds, "earlier": earlier, "quick": options.quick}
            found[ranks] = on_this_host(ranks, MODULE, task, seconds=SECONDS)
    progress("")
    counts = {"few": FEW, "many": MANY, "times": TIMES, "settled": SETTLED, "clock": SETTLED_CLOCK}
    sizes = {"layers": LAYERS, "experts": EXPERTS, "steps": STEPS, "tokens": TOKENS, "own": OWN}
    text = TEXT.format(**counts, **sizes, before=before, after=os.getloadavg()[0], cores=len(os.sched_getaffinity(0)))
    words = {"--against": options.against, "--rounds": options.rounds, "--quick": options.quick}
    top = header("What a step costs when nothing happens", text, command_line("train.bench_idle", words), "cpu")
    parts = [part(ranks, rows) for ranks, rows in found.items()]
    publish("\n\n".join([top, *parts, growth(found)]), options.output)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What distplb costs when nothing happens.")
    parser.add_argument("--against", metavar="COMMIT", help="take turns with the package of this commit")
    parser.add_argument("--rounds", type=int, default=400, help="timed calls of each kind")
    parser.add_argument("--quick", action="store_true", help="few calls, too few for what is kept")
    parser.add_argument("--job", type=Path, help="folder of a task, for the ranks of a job")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser.parse_args()


# --- on the ranks -------------------------------------------------------------------------------------------------


def measured(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name of a call and version of the package: seconds, and what it allocates."""
    names = ["distplb"]
    if task["earlier"] is not None:
        sys.path.insert(0, task["earlier"])
        names.insert(0, EARLIER)
    cases = by_hand()
    for name in names:
        cases |= {f"{name}: {what}": case for what, case in of_package(import_module(name)).items()}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(WARM_UP + task["rounds"]):
        for name in list(cases)[:: 1 if turn % 2 else -1]:
            case = cases[name]
            if case.prepare is not None:
                case.prepare()
            dist.barrier()
            begin = time.perf_counter()
            case.call()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
    return {
        name: {"seconds": seconds[name]} | ({} if name.startswith(EARLIER) else allocations(case, quick=task["quick"]))
        for name, case in cases.items()
    }


def by_hand() -> dict[str, Case]:
    """What a layer does without distplb."""
    ranks = dist.get_world_size()
    slots = OWN * ranks
    ids = even_ids(slots)
    rows, weight = leaves()

    def exchange() -> None:
        sent = ids.flatten().bincount(minlength=slots)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        for counts in (sent, received):
            assert len(counts.view(ranks, OWN).sum(1).tolist()) == ranks

    def step() -> None:
        exchange()
        experts(rows, [weight], []).sum().backward()

    return {EXCHANGE: Case(exchange), STEP_PLAIN: Case(step)}


def of_package(package: ModuleType) -> dict[str, Case]:
    """Calls of a version of the package, and what has to come before each, untimed."""
    return idle_rebalancer(package) | window(package) | balancers(package)


def idle_rebalancer(package: ModuleType) -> dict[str, Case]:
    """`Rebalancer.step()` between rebalances: after an optimizer step, and after a call that has taken note of it.

    An optimizer of any package in the process is one that has stepped.
    """
    layers, parameters = [], list[torch.nn.Parameter]()
    local = EXPERTS // dist.get_world_size()
    for number in range(LAYERS):
        w_in, w_out, router = (torch.nn.Parameter(torch.zeros(rows, 2)) for rows in (local, local, EXPERTS))
        parameters += [w_in, w_out, router]
        own = {"w_in": w_in, "w_out": w_out}
        layers.append(package.MoELayer(name=f"layer {number}", experts=own, router={"weight": router}))
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    rebalancer = package.Rebalancer(
        layers,
        optimizer,
        topology=package.Topology(1, dist.get_world_size()),
        every=NEVER,
        comm=import_module(f"{package.__name__}.comm.torchdist").TorchComm(),
        window=package.LoadWindow(LAYERS, EXPERTS, STEPS),
    )

    def train() -> None:
        optimizer.zero_grad()
        torch.stack([parameter.sum() for parameter in parameters]).sum().backward()
        optimizer.step()

    for _ in range(3):
        train()
        rebalancer.step()
    return {
        "`Rebalancer.step()`, after an optimizer step": Case(rebalancer.step, train, before=SETTLED_CLOCK),
        "`Rebalancer.step()`, without one": Case(rebalancer.step, rebalancer.step, before=SETTLED_CLOCK),
    }


def window(package: ModuleType) -> dict[str, Case]:
    """`LoadWindow.add`."""
    full = package.LoadWindow(LAYERS, EXPERTS, STEPS)
    counts = torch.arange(EXPERTS)

    def every_layer() -> None:
        for layer in range(LAYERS):
            full.add(layer, counts)

    for _ in range(STEPS + 1):
        every_layer()
    one = package.LoadWindow(1, EXPERTS, STEPS)
    return {
        "`LoadWindow.add`, one layer": Case(lambda: one.add(0, counts)),
        f"`LoadWindow.add`, {LAYERS} layers": Case(every_layer),
    }


def balancers(package: ModuleType) -> dict[str, Case]:
    """`StepBalancer` where no replica pays."""
    ranks = dist.get_world_size()
    quiet, telling = (
        package.StepBalancer(
            topology=package.Topology(1, ranks), num_experts=OWN * ranks, on_event=on_event, sample_every=NEVER
        )
        for on_event in (None, lambda _: None)
    )
    rows, weight = leaves()

    def dispatch(balancer: Any, ids: torch.Tensor) -> Any:
        step = balancer.dispatch("layer", ids)
        assert step.is_trivial
        assert len(step.exchange.send_sizes) == len(step.exchange.receive_sizes)
        return step

    even, none, numbers = even_ids(OWN * ranks), torch.zeros(0, 2, dtype=torch.int64), itertools.count()
    dispatch(telling, even)  # the first step is sampled

    def other() -> None:
        """Experts 0 and 1, and 2 and 3, share the tokens of their GPU in another way than in the calls before."""
        number, ids = next(numbers), even.clone()
        for first, share in ((0, number % 100), (2, number // 100)):
            column = ids[:, first % 2]
            column[column.eq(first).nonzero()[:share, 0]] = first + 1
        dispatch(quiet, ids)

    def step() -> None:
        quiet.compute(dispatch(quiet, even), experts, rows, weight).sum().backward()

    return {
        DISPATCH: Case(lambda: dispatch(quiet, even), None, other, SETTLED),
        "`dispatch`, no tokens": Case(lambda: dispatch(quiet, none)),
        "`dispatch`, even, with `on_event`": Case(lambda: dispatch(telling, even)),
        STEP_BALANCED: Case(step),
    }


def even_ids(slots: int) -> torch.Tensor:
    """`[N, 2]`, as many tokens for each slot."""
    return (torch.arange(2 * TOKENS) % slots).view(TOKENS, 2)


def leaves() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and a weight with gradients, so small that computing takes no time."""
    return torch.zeros(16, 4, requires_grad=True), torch.zeros(OWN, 4, requires_grad=True)


def experts(rows: torch.Tensor, own: Any, _: Any) -> torch.Tensor:
    """Experts that hardly compute."""
    return rows + own[0][0]


def allocations(case: Case, *, quick: bool = False) -> dict[str, float]:
    """What a call allocates, and what it leaves behind after so many calls that nothing is new, or after a few."""
    call = case.other or case.call
    calls = FEW if quick else MANY
    tracemalloc.start()  # before all calls, because what replaces a block that it has not seen would count as more
    for _ in range(FEW if quick else case.before):
        call()
    seen = [(live_blocks(), live_tensors()) for _ in range(2)][1:]  # twice, because the first leaves something behind
    for _ in range(TIMES):
        for _ in range(calls):
            call()
        seen.append((live_blocks(), live_tensors()))
    kept, kept_tensors = (
        min(after - before for before, after in itertools.pairwise(live)) / calls for live in zip(*seen, strict=True)
    )
    begin = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    case.call()
    peak = tracemalloc.get_traced_memory()[1] - begin
    tracemalloc.stop()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for _ in range(FEW):
            case.call()
    sizes = memory_events(seen)
    return {
        "kept_blocks": kept,
        "kept_tensors": kept_tensors,
        "peak_bytes": peak,
        "tensors": sum(size > 0 for size in sizes) / FEW,
    }


def live_blocks() -> int:
    """Blocks of Python's memory that are alive, those of tracemalloc itself left out."""
    gc.collect()
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)])
    return len(snapshot.traces)


def live_tensors() -> int:
    """Tensors that Python knows."""
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())  # lazy modules warn when asked more


def memory_events(seen: Any) -> list[int]:
    """Bytes of each allocation of a tensor, negative where one is freed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [int(event["args"]["Bytes"]) for event in events if event.get("name") == MEMORY]


# --- the report ---------------------------------------------------------------------------------------------------


def part(ranks: int, rows: dict[str, dict[str, Any]]) -> str:
    """The table of a number of ranks, and what `dispatch` adds."""
    lines = []
    for name in rows:
        if name.startswith(f"{EARLIER}: "):
            continue
        what = name.removeprefix("distplb: ")
        before = rows.get(f"{EARLIER}: {what}")
        lines.append(
            [
                what,
                "–" if before is None else microseconds(before["seconds"]),
                microseconds(rows[name]["seconds"]),
                f"{rows[name]['peak_bytes']:,.0f}",
                f"{rows[name]['tensors']:.0f}",
                f"{rows[name]['kept_blocks']:.2f}",
                f"{rows[name]['kept_tensors']:.2f}",
            ]
        )
    head = ["µs", "before", "now", "Python, bytes", "tensors", "kept, blocks", "kept, tensors"]
    adds = [
        f"{what} adds {added(rows, name, plain):.0f} µs to that by hand"
        + (f" (before: {added(rows, name, plain, EARLIER):.0f})" if f"{EARLIER}: {name}" in rows else "")
        for what, name, plain in (("`dispatch`", DISPATCH, EXCHANGE), ("A step", STEP_BALANCED, STEP_PLAIN))
    ]
    title = f"## {ranks} rank{'s' * (ranks > 1)}"
    return "\n\n".join([title, markdown(head, lines), f"Differences of medians: {'; '.join(adds)}."])


def added(rows: dict[str, dict[str, Any]], name: str, plain: str, package: str = "distplb") -> float:
    """Microseconds that a call takes longer than what is done by hand."""
    both = (statistics.median(rows[key]["seconds"]) for key in (f"{package}: {name}", plain))
    return 1e6 * (next(both) - next(both))


def microseconds(seconds: list[float]) -> str:
    """Median and minimum."""
    return f"{1e6 * statistics.median(seconds):.1f} [{1e6 * min(seconds):.1f}]"


def growth(found: dict[int, dict[str, dict[str, Any]]]) -> str:
    """Whether any call of this version leaves something behind each time."""
    grows = [
        f"{name.removeprefix('distplb: ')} on {ranks} rank{'s' * (ranks > 1)}"
        for ranks, rows in found.items()
        for name, one in rows.items()
        if name.startswith("distplb: ") and max(one["kept_blocks"], one["kept_tensors"]) >= KEPT
    ]
    reached = f"{verdict(not grows).capitalize()}{': ' + '; '.join(grows) if grows else ''}"
    return f"Target: no call leaves more behind than a block or tensor in {1 / KEPT:.0f} calls. {reached}."


if __name__ == "__main__":
    main()
