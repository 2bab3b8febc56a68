"""How far runs with moves differ from runs without, in each framework: the figures behind what the tests assert.

    python -m benchmarks.integrations.bench_agreement --output benchmarks/results/DATE-agreement.md

The runs are those of the tests (mostly 30 AdamW steps, with a rebalance every 5, gradient clipping, weight decay and a
schedule), in real processes over gloo, with the frameworks' own models; this benchmark records their differences.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.shared.processes import outside
from benchmarks.shared.tables import command_line, header, markdown, progress, publish

HEAD = ["run", "ranks", "losses", "tensors", "slots moved by rebalances"]
Line = list[str]
TEXT = (
    "Largest difference between a run in which experts move and the run in which they do not, relative to the largest "
    "value (absolute for torchtitan's losses): of the losses, and of weights and moments in logical order. Random "
    "placements are applied between rebalances, which have nothing to do on one rank. Rows with something left behind "
    "are controls, in which a moment, a router row or main parameters did not travel. All runs use CPU processes; "
    "differences do not depend on the load of the machine."
)


def main() -> None:
    """Run, print, and write the result if requested."""
    parser = argparse.ArgumentParser(description="Differences of runs with moves from runs without.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown")
    options = parser.parse_args()
    parts = [
        f"## {name}\n\n{markdown(HEAD, list(lines()))}"
        for name, lines in (
            (f"transformers {metadata.version('transformers')}", of_transformers),
            (f"torchtitan {metadata.version('torchtitan')}", of_torchtitan),
            (f"megatron-core {metadata.version('megatron-core')}", of_megatron),
        )
    ]
    progress("")
    top = header("Moves against no moves", TEXT, command_line("integrations.bench_agreement", {}), "cpu")
    publish("\n\n".join([top, *parts]), options.output)


def parts_of(name: str) -> tuple[Callable[..., list[Any]], ModuleType]:
    """The function that starts ranks, and the tests of a framework, which define the runs."""
    return outside("tests/helpers", "ranks").on_ranks, outside("tests/integrations", name)


def of_transformers() -> Iterator[Line]:
    """Whole models in float64, with routers in float32 except that of gpt-oss; two ranks take batches in two ways."""
    on_ranks, tests = parts_of("test_huggingface")
    for name in tests.MODELS:
        for mode in tests.MODES:
            progress(f"transformers: {name}, {mode}")
            yield compared(f"{name}, {mode}", "1", [tests.compared(name, mode)])
    for left in ("moment", "router row"):
        yield compared(f"gpt_oss, permute, a {left} left behind", "1", [tests.compared("gpt_oss", left=left)])
    progress("transformers: two ranks")
    ranks = on_ranks(2, tests.all_of_two_ranks, deadline=400)
    for key, cases in (("own batches", tests.CASES), ("one batch", tests.CASES_OF_ONE_BATCH)):
        for number, (name, mode, left) in enumerate(cases):
            what = f"{name}, {mode}, {key}" + (f", a {left} left behind" if left else "")
            yield compared(what, "2", [rank[key][number] for rank in ranks])


def compared(what: str, ranks: str, differences: list[dict[str, Any]]) -> Line:
    """A row with the largest differences on any rank."""
    losses, tensors = (max(own[key] for own in differences) for key in ("loss", "state"))
    return [what, ranks, f"{losses:.1e}", f"{tensors:.1e}", str(differences[0]["slots"])]


def of_torchtitan() -> Iterator[Line]:
    """Qwen3 blocks with torchtitan's MoE and a balancing bias, in float64."""
    on_ranks, tests = parts_of("test_torchtitan")
    progress("torchtitan: two ranks")
    two = on_ranks(2, tests.on_two, deadline=400)
    for key, what in (("moved", "permute"), ("remapped", "remap"), ("torn", "permute, a moment left behind")):
        losses, tensors = (max(rank[key][one] for rank in two) for one in ("loss", "state"))
        yield [f"EP 2, {what}", "2", f"{losses:.1e}", f"{tensors:.1e}", str(two[0][key]["moved"])]
    progress("torchtitan: four ranks")
    with tempfile.TemporaryDirectory() as folder:
        four = on_ranks(4, tests.on_four, Path(folder), deadline=400)
    moved = four[0]["moved"]
    state = f"{max(rank['state'] for rank in four):.1e}"
    for key, what, tensors, slots in (
        ("dim 0", "EP 2 × FSDP2 2 along dim 0, 30 steps", state, str(moved[0])),
        ("dim 1", "EP 2 × FSDP2 2 along dim 1", "", str(moved[1])),
        ("2 -> 4", "saved after 15 steps at EP 2, resumed at EP 4", "", ""),
        ("4 -> 2", "saved after 15 steps at EP 4, resumed at EP 2, dim 1", "", ""),
    ):
        yield [what, "4", f"{max(rank[key] for rank in four):.1e}", tensors, slots]


def of_megatron() -> Iterator[Line]:
    """GPT models with Megatron's optimizers and schedule; one figure covers losses, gradient norms and experts."""
    on_ranks, tests = parts_of("test_megatron")
    progress("megatron-core: two ranks")
    two = on_ranks(2, tests.two_ranks, deadline=400)
    for key, what in (
        ("run, one for all", "EP 2, FP32Optimizer, float64"),
        ("run, groups", "EP 2, group-limited routing, float64, 10 steps"),
        ("run, grouped", "EP 2, GroupedMLP, float64, 10 steps"),
    ):
        yield [what, "2", f"{max(rank[key] for rank in two):.1e}", "", ""]
    progress("megatron-core: four ranks")
    four = on_ranks(4, tests.four_ranks, deadline=400)
    for key, what in (
        ("same", "EP 2 × 2, DistributedOptimizer, float64"),
        ("moments left behind", "the same, moments left behind, 12 steps"),
        ("overlapped", "the same, gather and reduce overlapped, 6 steps"),
        ("pipeline", "PP 2 × EP 2, 6 steps"),
        ("a dense stage", "PP 2 × EP 2, one stage without MoE layers, 6 steps"),
        ("mixed", "EP 2 × 2, float32 with float64 main parameters, 10 steps"),
        ("main parameters left behind", "the same, main parameters left behind"),
    ):
        yield [what, "4", f"{max(rank[key] for rank in four):.1e}", "", ""]


if __name__ == "__main__":
    main()
