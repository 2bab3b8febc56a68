"""Examples, benchmarks and scripts of launch/ refuse unknown options, which some of them used to ignore."""

from __future__ import annotations

import argparse
import ast
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import distplb
from distplb.core.cost import mean_of_layers

ROOT = Path(__file__).parents[2]
PYTHON = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
UNKNOWN = ["--no-such-option", "2"]
FRAMEWORKS = {"megatron_moe", "torchtitan_moe", "huggingface_moe"}


def block_of(path: Path) -> list[ast.stmt]:
    """Return the statements under `if __name__ == "__main__"`, none if the file has no such block."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            return node.body
    return []


def started(path: Path) -> None:
    """Run a script, or only the part that reads its options if its framework takes seconds to import."""
    if path.stem in FRAMEWORKS:
        block = block_of(path)
        end = next(number for number, one in enumerate(block, 1) if "parse_args()" in ast.unparse(one))
        first = ast.Module(block[:end], [])
        exec(compile(first, str(path), "exec"), {"argparse": argparse, "__doc__": "Train."})
    else:
        runpy.run_path(str(path), run_name="__main__")


SCRIPTS = [path for path in PYTHON if block_of(path)]


def test_the_scripts_are_found() -> None:
    assert {"pretrain_moe", "starved_experts", "bench_planning", "turns", *FRAMEWORKS} <= {
        path.stem for path in SCRIPTS
    }


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_refuses_options_that_it_does_not_know(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`examples/torchtitan_moe.py --replica-slots 2` trained without them."""
    monkeypatch.setattr(sys, "argv", [str(path), *UNKNOWN])
    # Benchmarks are run as modules from the root.
    monkeypatch.syspath_prepend(str(ROOT if path.is_relative_to(ROOT / "benchmarks") else path.parent))
    with pytest.raises(SystemExit) as ended:
        started(path)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    lacks = "the following arguments are required: " in told  # argparse reports these before unknown ones
    assert lacks or f"unrecognized arguments: {' '.join(UNKNOWN)}" in told
    assert "parse_known_args" not in path.read_text() or path.stem == "bench_spread"  # it passes unknown options on


@pytest.mark.parametrize("name", sorted({"pretrain_moe", *FRAMEWORKS}))
def test_an_example_tells_of_rebalances_that_know_no_imbalance_of_a_layer(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A skipped rebalance, or a layer without tokens, caused an error in the log."""
    body = ast.parse((ROOT / "examples" / f"{name}.py").read_text()).body
    report = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == "report"]
    on_rank_0 = SimpleNamespace(get_rank=lambda: 0)
    names = {"Any": Any, "distplb": distplb, "dist": on_rank_0, "say": print, "mean_of_layers": mean_of_layers}
    exec(compile(ast.Module(list(report), []), name, "exec"), names)
    skipped = distplb.RebalanceEvent(
        iteration=8, layers=("a", "b"), decision="skipped", reason="", seconds={}, last_applied=0
    )
    levels = {f"imbalance_{when}": (1.5, None) for when in ("before", "after", "bound")}
    for event in (skipped, replace(skipped, decision="moved", steps=2, **levels)):
        names["report"](event)
    assert capsys.readouterr().out.count("imbalance 1.5") == 1


def test_building_the_wheel_takes_no_arguments() -> None:
    done = subprocess.run(
        ["bash", ROOT / "launch" / "wheel.sh", "python3.10"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "launch/wheel.sh takes no arguments, and python3.10 was passed; run it without arguments\n"
