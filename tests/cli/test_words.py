"""The command line's messages: options by their own names, on one line, text shown as it is, and hints at odd loads.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from benchmark_modules import BENCHMARKS, imported
from click.testing import Result
from commands import GPUS, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import distplb
from distplb import DistplbError, Topology, Trace
from distplb.cli.doctor import _print
from distplb.cli.load_hints import load_hints
from distplb.cli.main import main
from distplb.cli.option_names import as_option
from distplb.cli.output import console, one_line, table
from distplb.doctor.examine import Examination
from distplb.doctor.finding import Timing, note, ok
from distplb.doctor.local_checks import local_ranks
from distplb.errors import OptionError, in_stage

PACKAGE = Path(distplb.__file__).parent
# Names of arguments and how Python passes them; `record=...`, of Rebalancer, is allowed: it has no option.
PYTHON = re.compile(r"\bnum_\w+|\bgpus_per_node|\bmove_price|\bmax_bytes(?! in Python)|\b\w+=(?!\.\.\.)\w")


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "load.npy"
    np.save(path, np.random.default_rng(0).integers(1, 100, (2, 2, 8)))
    return path


# --- options by name --------------------------------------------------------------------------------------------


def named_options() -> set[str]:
    """The options that the templates of all option errors in the package name, or the strings they are built from."""
    fields, values = set(), set()
    for path in PACKAGE.rglob("*.py"):
        if "raise OptionError" not in (text := path.read_text()) and "return OptionError" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "OptionError":
                values |= {keyword.arg for keyword in node.keywords}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                fields |= set(re.findall(r"\{([a-z_]+)", node.value))
    return fields - values


def test_every_option_that_an_error_names_is_one_of_python_and_of_a_command() -> None:
    named = named_options()
    called = (distplb.plan, Topology, Trace.from_megatron)
    arguments = {name for one in called for name in inspect.signature(one).parameters}
    options = {option for command in main.commands.values() for one in command.params for option in one.opts}
    assert {"num_slots", "num_groups", "engine", "current", "num_nodes"} <= named
    assert named <= arguments
    assert {as_option(name, "") for name in named} <= options


def test_an_option_error_names_options_as_its_reader_passes_them() -> None:
    error = OptionError(
        "{num_slots} is {found!r}; pass {num_slots:{fits}}, {mode:'remap'} or {engine:None}", found="{x}", fits=8
    )
    assert str(error) == "num_slots is '{x}'; pass num_slots=8, mode='remap' or engine=None"
    assert error.told(as_option) == "--slots is '{x}'; pass --slots 8, --mode remap or no --engine"
    assert as_option("max_bytes", "") == "max_bytes in Python"
    assert repr(error).startswith('OptionError("num_slots is')
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (OptionError, str(error))


VALUES = st.one_of(
    st.integers(-(2**70), 2**70).map(str),
    st.integers(-2, 12).map(str),
    st.sampled_from(
        ["nan", "inf", "-inf", "1e3", "0x10", "", " ", "-", "1,2", "1,2,3", "None", "[/]", "cpu ", "remap"]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8),
)
OPTIONS = ["nodes", "gpus-per-node", "slots", "groups", "mode", "current", "move-price", "candidates", "seed", "engine"]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(OPTIONS), VALUES, min_size=1, max_size=3))
def test_any_value_of_any_option_plans_or_is_one_line_in_the_words_of_the_command_line(
    load: Path, options: dict[str, str]
) -> None:
    if options.get("candidates", "").isdecimal():
        options["candidates"] = str(min(int(options["candidates"]), 2**22 + 1))
        if int(options["candidates"]) <= 2**22:
            options["candidates"] = "2"
    if options.get("slots", "").isdecimal() and 64 < int(options["slots"]) <= 2**20:
        options["slots"] = "64"  # a larger drawn number once took 20 GB, and minutes
    options = {"gpus-per-node": "2", "engine": "reference", "candidates": "2"} | options
    result = run("plan", load, "--json", *(f"--{name}={value}" for name, value in options.items()))
    if result.exit_code == 0:
        assert json.loads(result.stdout)["layers"]
        return
    assert result.exit_code == 2, (options, result.stderr)
    assert result.stderr.count("\n") == 1
    assert not PYTHON.search(re.sub(r"'[^']*'", "", result.stderr)), result.stderr


# --- one line ---------------------------------------------------------------------------------------------------


def test_a_long_message_keeps_its_beginning_and_its_remedy() -> None:
    assert one_line("a  line\nof\x1bten") == "a line of?ten"
    line = one_line(f"what was found {'x' * 5000}; pass this")
    assert len(line) == 600
    assert line.startswith("what was found xxx")
    assert line.endswith("xxx; pass this")
    name = "y" * 3000
    for words in ((name,), (f"{name}.npy",), ("load.npy", "--current", name), ("load.npy", "--engine", name)):
        result = run("plan", *words, *GPUS)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert len(result.stderr) < 620


def raised(make: Callable[[], object]) -> Exception:
    try:
        make()
    except Exception as error:
        return error
    raise AssertionError("no error")


def endless() -> int:
    return endless() + 1


# Errors that distplb did not raise, but the libraries, and how the line reports them.
FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "torch": (lambda: torch.zeros(2).view(3), r"RuntimeError .*\(shape '\[3\]' is invalid"),
    "numpy": (lambda: np.zeros(2).reshape(3), "ValueError .*cannot reshape"),
    "overflow": (lambda: float(10**400), "OverflowError .*too large"),
    "recursion": (endless, "RecursionError"),
    "unicode": (lambda: b"\xff".decode(), "UnicodeDecodeError .*codec"),
    "key": (lambda: {}["[/]"], r"KeyError .*\('\[/\]'\)"),
    "assertion": (lambda: int(Topology.__dict__["missing"]), "KeyError"),
}
NO_MEMORY: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.empty(2**50),
    "numpy": lambda: np.empty(2**50),
}


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Result:
    @click.command()
    def fail() -> None:
        raise error

    monkeypatch.setitem(main.commands, "fail", fail)
    return run("fail")


@pytest.mark.parametrize("in_a_stage", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_that_asks_to_report_it(
    name: str, in_a_stage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = FAULTS[name]
    error = raised(make)
    result = failing(monkeypatch, in_stage("search", error) if in_a_stage else error)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (70, "", 1)
    assert re.match(rf"Error: bug in distplb: {words}.*; please report this line", result.stderr), result.stderr
    assert "`python -X dev -m distplb`" in result.stderr


@pytest.mark.parametrize("in_a_stage", [False, True])
@pytest.mark.parametrize("name", NO_MEMORY)
def test_want_of_memory_is_no_fault(name: str, in_a_stage: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    error = raised(NO_MEMORY[name])
    result = failing(monkeypatch, in_stage("search", error) if in_a_stage else error)
    assert result.exit_code == 2
    assert result.stderr == "Error: not enough memory; pass fewer steps, slots or candidates\n"


def test_a_fault_says_where_it_is(load: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distplb.cli.plan.moved_slots", lambda *_: torch.zeros(1, 2))
    result = run("plan", load, *GPUS)
    assert result.exit_code == 70
    assert re.search(r"bug in distplb: ValueError at cli/plan\.py:\d+ \(", result.stderr), result.stderr


def test_development_mode_shows_the_traceback() -> None:
    code = "from distplb.cli.main import click, main\nmain.add_command(click.Command('f', callback=lambda: 1 / 0))\n"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-c", f"{code}main(['f'])"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


# --- shown as it is ---------------------------------------------------------------------------------------------

ODD = ["[/]", "[fast]", "[red]x[/red]", ":warning:", "[link=x]", "\\[x]", "100 %"]


@pytest.mark.parametrize("text", ODD)
def test_whatever_is_printed_is_shown_as_it_is(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install 'distplb[fast]'` lost its end, and OMP_NUM_THREADS='[/]' crashed `distplb doctor`."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    shown = console()
    lines = table(text, text, title=text)
    lines.add_row(text, text)
    shown.print(lines)
    shown.print(text, style="dim")
    shown.print(f"\x1b[31m{text}")
    _print(Examination([ok(text, text), note("engine cpu", f"pip install 'distplb{text}'")], [Timing(text, 1, 1.0)]))
    assert "\x1b" not in out.getvalue()
    shown_text = " ".join(out.getvalue().split())
    assert shown_text.count(text) + (text.count(" ") and shown_text.count(text.replace(" ", "\n"))) >= 10 - text.count(
        " "
    )
    assert f"?[31m{text}" in shown_text


def test_only_one_file_prints_through_rich() -> None:
    """Its console treats no string as markup, so printed text needs no checks."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.name != "output.py":
            assert not re.search(r"rich\.(console|progress|markup|live|print)\b|from_markup|import print\b", text), path
        assert not re.search(r"\bConsole\(", text.replace("class _Console(Console)", "").replace("_Console(", "")), path


def test_a_launcher_that_tells_of_no_ranks_is_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """LOCAL_WORLD_SIZE=0 crashed `distplb doctor` with a division by zero."""
    for text in ("0", "", "-1", "two"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
        assert local_ranks() == 1


# --- hints ------------------------------------------------------------------------------------------------------


def hinted(load: Tensor, before: float = 1.3) -> list[str]:
    return [hint.split(":")[0] for hint in load_hints(load, before=before, is_trace=True)]


def of_ranks(ranks: int, own: int, seed: int) -> Tensor:
    """`[ranks, 3, ranks × own]`: each step has the counts of one rank's own experts, in any order."""
    random = np.random.default_rng(seed)
    load = np.zeros((ranks, 3, ranks * own), dtype=np.int64)
    for layer in range(3):
        order = random.permutation(ranks * own)
        for rank in range(ranks):
            load[rank, layer, order[rank * own : (rank + 1) * own]] = random.integers(1, 100, own)
    return torch.from_numpy(load)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 99))
def test_counts_of_single_ranks_are_known_by_their_own_experts(ranks: int, own: int, seed: int) -> None:
    load = of_ranks(ranks, own, seed)
    assert hinted(load) == [f"no expert has tokens in more than one of {ranks} steps"]
    assert hinted(load.sum(0, keepdim=True))[0].startswith("there is one step")
    twice = torch.cat([load, load])
    assert hinted(twice) == []


def test_thin_steps_have_other_experts_by_chance() -> None:
    load = torch.zeros(2, 1, 8, dtype=torch.int64)
    load[0, 0, 3] = load[1, 0, 5] = 1
    assert hinted(load) == []
    assert hinted(load * 0) == []
    assert hinted(torch.full((2, 2, 4), 5), before=1.0) == ["the GPUs are already balanced"]
    assert hinted(torch.full((2, 2, 4), 5), before=1.02) == ["all 2 layers have the same counts"]


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 12), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_padding_is_known_by_the_same_extra_in_all_layers(layers: int, number: int, same: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    load = random.integers(50, 150, (4, layers, 32))
    assert hinted(torch.from_numpy(load)) == []
    for layer in range(layers):
        load[:, layer, np.arange(number) if same else random.permutation(32)[:number]] += 2000
    (hint,) = load_hints(torch.from_numpy(load), before=1.3, is_trace=True)
    experts = "experts? 0(, 1)?(, 2)?(, 3)? ha(s|ve)" if same else f"{number} experts? ha(s|ve)"
    assert re.match(rf"in every layer ({experts}|experts? [\d, ]+ ha(s|ve)) at least \d,\d\d\d tokens more", hint)


def test_loads_of_jobs_have_no_hints() -> None:
    for path in sorted((BENCHMARKS / "traces").glob("*.npz")):
        load = Trace.read(path).load
        for part in (load, load[:8], load[-2:]):
            assert hinted(part) == [], path.name
    troubles = imported("shared.troubles")
    for make in troubles.TROUBLES.values():
        for size in ((6, 3, 16, 2_000), (40, 4, 64, 100_000), (4, 1, 8, 50)):
            assert hinted(make(troubles.Size(*size), 0)) == []


@pytest.mark.parametrize("command", ["plan", "compare"])
def test_hints_stand_beside_the_result(command: str, tmp_path: Path) -> None:
    np.save(tmp_path / "load.npy", of_ranks(4, 2, 0).numpy())
    words = (command, tmp_path / "load.npy", *GPUS)
    printed = run(*words)
    assert printed.exit_code == 0
    assert printed.stderr == (
        "Hint: no expert has tokens in more than one of 4 steps: if each step counts only one rank's experts, add "
        "the steps up\n"
    )
    as_json = run(*words, "--json")
    assert as_json.stderr == ""
    assert [f"Hint: {hint}\n" for hint in json.loads(as_json.stdout)["hints"]] == [printed.stderr]


# --- errors in Python -------------------------------------------------------------------------------------------


def test_a_plan_on_one_rank_raises_the_error_itself() -> None:
    """It raised another error with the same text, in which the command line could not name its own options."""
    with pytest.raises(OptionError) as refused:
        distplb.plan(torch.ones(1, 8, dtype=torch.int64), Topology(1, 2), num_slots=9)
    assert "pass --slots 10 (2 for replicas)" in refused.value.told(as_option)
    assert isinstance(refused.value, DistplbError)
