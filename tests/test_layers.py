"""The house: who may import whom, what a module's face looks like, and that the examples in it are true."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import distplb
from distplb.packing import cpu

PACKAGE = Path(distplb.__file__).parent
SOURCES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# Import only downward. A name stands for a module or for all modules of a folder.
LEVELS = [
    {
        *("errors", "arguments", "counts", "topology", "stages", "hashing", "stoploss", "ties", "torchnames"),
        "documents",
    },
    {"placement", "load", "layer", "events", "traces", "spread", "saves", "background"},
    {"cost", "balance", "bound", "price", "routing", "saved", "saving", "eventlog"},
    {"packing", "planning", "comm", "chance"},
    {"migrate", "replay", "measure", "assumed"},
    {"planner", "observer"},
    {"account", "pricer"},
    {"rebalancer"},
    {"advice"},
    {"verdict", "doctor"},
    {"integrations", "report"},
    {"cli", "__main__"},
]
# Names of one level do not import each other, but for these.
SIDEWAYS = {
    ("topology", "errors"),
    ("topology", "arguments"),
    ("arguments", "errors"),
    ("counts", "errors"),
    ("counts", "arguments"),
    ("__main__", "cli"),
    ("stages", "errors"),
    ("bound", "cost"),
    ("balance", "cost"),
    ("eventlog", "cost"),
    ("documents", "errors"),
    ("traces", "placement"),
    ("planning", "packing"),
    ("migrate.mover", "migrate.transfer"),
    ("migrate.mover", "migrate.checksum"),
    ("migrate.mover", "migrate.pieces"),
    ("migrate.mover", "migrate.state"),
    ("migrate.mover", "migrate.rows"),
    ("migrate.mover", "migrate.claims"),
    ("migrate.mover", "migrate.settings"),
    ("migrate.mover", "migrate.watch"),
    ("migrate.mover", "migrate.fsdp2"),
    ("migrate.claims", "migrate.rows"),
    ("migrate.claims", "migrate.dtensors"),
    ("migrate.settings", "migrate.rows"),
    ("migrate.watch", "migrate.rows"),
    ("migrate.watch", "migrate.fsdp2"),
    ("migrate.watch", "migrate.dtensors"),
    ("migrate.transfer", "migrate.schedule"),
    ("migrate.transfer", "migrate.messages"),
    ("migrate.transfer", "migrate.routes"),
    ("migrate.transfer", "migrate.pieces"),
    ("migrate.transfer", "migrate.state"),
    ("migrate.transfer", "migrate.rows"),
    ("migrate.checksum", "migrate.state"),
    ("migrate.checksum", "migrate.rows"),
    ("migrate.rows", "migrate.pieces"),
    ("migrate.rows", "migrate.dtensors"),
    ("migrate.state", "migrate.rows"),
    ("migrate.state", "migrate.settings"),
    ("migrate.state", "migrate.dtensors"),
    ("migrate.mover", "migrate.kinds"),
    ("migrate.mover", "migrate.histories"),
    ("migrate.mover", "migrate.unlike"),
    ("migrate.kinds", "migrate.state"),
    ("migrate.kinds", "migrate.rows"),
    ("migrate.histories", "migrate.dtensors"),
    ("migrate.histories", "migrate.kinds"),
    ("migrate.histories", "migrate.rows"),
    ("migrate.histories", "migrate.settings"),
    ("migrate.histories", "migrate.state"),
    ("migrate.unlike", "migrate.histories"),
    ("migrate.unlike", "migrate.rows"),
    ("migrate.unlike", "migrate.state"),
    ("migrate.messages", "migrate.schedule"),
    ("migrate.messages", "migrate.routes"),
    ("migrate.messages", "migrate.pieces"),
    ("migrate.routes", "migrate.pieces"),
    ("migrate.budget", "migrate.schedule"),
    ("integrations.huggingface", "integrations.common"),
    ("integrations.torchtitan", "integrations.common"),
    ("integrations.megatron", "integrations.common"),
}
# Folders whose modules see each other; those of `migrate` only as told above.
OPEN_FOLDERS = {"documents", "packing", "planning", "comm", "traces", "report", "doctor", "cli"}
# All but the numbers of a report, which need no plotting library.
FIGURES = {
    f"distplb.report.{name}" for name in ("bars", "figures", "gpu_load", "history", "hottest", "intervals", "style")
}
# Libraries that only one place may know, and those that none may.
KEPT_IN = {
    "torch.distributed": {
        *("distplb.comm.torchdist", "distplb.migrate.dtensors", "distplb.migrate.fsdp2", "distplb.torchnames"),
    },
    "mpi4py": {"distplb.comm.mpi"},
    "yaml": {"distplb.documents.text"},
    "scipy": {"distplb.planning.relabel", "distplb.saving"},
    "numba": {"distplb.packing.cpu", "distplb.packing.cpu_steps"},
    "filelock": {"distplb.packing.cpu"},
    "concurrent": {
        *("distplb.packing.cpu", "distplb.traces.writer", "distplb.eventlog", "distplb.background"),
    },
    "triton": {"distplb.packing.cuda_kernels", "distplb.packing.cuda_settle", "distplb.packing.cuda_steps"},
    "matplotlib": {*FIGURES},
    "jinja2": {"distplb.report.page"},
    "transformers": {"distplb.integrations.huggingface"},
    "torchtitan": {"distplb.integrations.torchtitan"},
    "megatron": {"distplb.integrations.megatron"},
}
NOWHERE = {"deepspeed", "accelerate", "tensorboard"}
# Imported when they are used, and by modules that nothing imports before.
FRAMEWORKS = {"transformers", "torchtitan", "megatron"}
LATE = {"yaml", "numba", "triton", "filelock", "scipy", "mpi4py", "matplotlib", "jinja2", "click", "rich"}
NEEDS = {
    "distplb.packing.cpu_kernels": "numba",
    "distplb.packing.cpu_settle": "numba",
    "distplb.packing.cpu_steps": "numba",
    "distplb.packing.cuda_kernels": "triton",
    "distplb.packing.cuda_settle": "triton",
    "distplb.packing.cuda_steps": "triton",
    **dict.fromkeys(FIGURES, "matplotlib"),
    "distplb.report.page": "jinja2",
    "distplb.integrations.huggingface": "transformers",
    "distplb.integrations.torchtitan": "torchtitan",
    "distplb.integrations.megatron": "megatron",
}
PURE = [name for name in SOURCES if name.startswith(("distplb.planning", "distplb.packing"))]
PURE += ["distplb.price", "distplb.chance", "distplb.replay", "distplb.assumed", "distplb.verdict"]
PURE += ["distplb.saved", "distplb.cost", "distplb.balance", "distplb.bound", "distplb.stoploss", "distplb.account"]
PURE += ["distplb.counts", "distplb.arguments"]
PURE += [f"distplb.migrate.{name}" for name in ("schedule", "messages", "routes", "pieces", "budget")]
IMPURE_MODULES = {"time", "os", "random", "io", "socket", "subprocess", "threading", "pathlib", "datetime", "secrets"}
IMPURE_MODULES |= {"numpy.random", "torch.random", "torch.distributed", "distplb.comm", "distplb.stages"}
IMPURE_MODULES |= {"tempfile", "concurrent", "multiprocessing", "filelock"}
# Where machine code is kept, how many threads there are, and how long a trial took never reaches a result.
EXCUSED = {
    "distplb.packing.cpu": {"os", "tempfile", "pathlib", "concurrent", "filelock"},
    "distplb.packing.trial": {"time"},
}
IMPURE_NAMES = {
    "open",
    "print",
    "input",
    "manual_seed",
    "rand",
    "randn",
    "randint",
    "randperm",
    "multinomial",
    "Generator",
}


def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(), str(SOURCES[module]))


def imports(module: str) -> set[str]:
    """Full names of what a module imports, wherever in it; of `from a import b` both a and a.b."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively in line {node.lineno}"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def uses(module: str) -> set[str]:
    """Dotted names in a module's code, such as torch.distributed.barrier, and their beginnings."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute | ast.Name):
            found.add(ast.unparse(node))
    return found


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def own_imports(module: str) -> set[str]:
    """The modules of this package that a module imports, without the package's name."""
    return {name.removeprefix("distplb.") for name in imports(module) if name in SOURCES and name != "distplb"}


def level_of(name: str) -> int:
    folder = name.split(".")[0]
    levels = [number for number, names in enumerate(LEVELS) if folder in names]
    assert len(levels) == 1, f"{name} has no level of its own: give it one in LEVELS and in the design"
    return levels[0]


INSIDE = [name for name in SOURCES if name != "distplb"]
IMPORTABLE = [name for name in SOURCES if name not in NEEDS or find_spec(NEEDS[name])]


def loaded(module: str) -> ModuleType:
    """The module; those of Numba with their machine code where the engine keeps it.

    Elsewhere it would be kept beside the sources, and be used on when those have changed.
    """
    if NEEDS.get(module) == "numba":
        cpu.warm_up()
    return importlib.import_module(module)


# --- who imports whom -------------------------------------------------------------------------------------------


def test_the_sources_are_found() -> None:
    assert {"distplb.topology", "distplb.packing.reference", "distplb.comm.torchdist"} <= set(INSIDE)
    assert "placement" in own_imports("distplb.planner")
    assert "torch.distributed" in imports("distplb.comm.torchdist")


@pytest.mark.parametrize("module", INSIDE)
def test_a_module_imports_only_downward(module: str) -> None:
    own = module.removeprefix("distplb.")
    for imported in own_imports(module):
        if level_of(imported) < level_of(own):
            continue
        assert level_of(imported) == level_of(own), f"{own} imports {imported}, which stands above it"
        folder, other = own.split(".")[0], imported.split(".")[0]
        inside = folder == other and folder in OPEN_FOLDERS
        assert inside or {(own, imported), (folder, other)} & SIDEWAYS, f"{own} imports {imported} beside it"


def test_planning_and_comm_do_not_see_each_other() -> None:
    for module in INSIDE:
        for here, there in (("planning", "comm"), ("comm", "planning"), ("packing", "comm"), ("comm", "packing")):
            if is_in(module, f"distplb.{here}"):
                assert not any(is_in(name, there) for name in own_imports(module))


def test_packing_does_not_see_planning() -> None:
    assert any(is_in(name, "packing") for name in own_imports("distplb.planning.problem"))
    for module in INSIDE:
        if is_in(module, "distplb.packing"):
            assert not any(is_in(name, "planning") for name in own_imports(module))


def test_what_needs_a_compiler_is_imported_by_its_engine_alone() -> None:
    importers = {
        needy: {module for module in SOURCES if needy in imports(module)} for needy in NEEDS if "packing" in needy
    }
    assert importers == {
        "distplb.packing.cpu_kernels": {"distplb.packing.cpu"},
        "distplb.packing.cpu_settle": {"distplb.packing.cpu_kernels"},
        "distplb.packing.cpu_steps": {"distplb.packing.cpu_kernels", "distplb.packing.cpu_settle"},
        "distplb.packing.cuda_kernels": {"distplb.packing.cuda"},
        "distplb.packing.cuda_settle": {"distplb.packing.cuda_kernels"},
        "distplb.packing.cuda_steps": {"distplb.packing.cuda_kernels", "distplb.packing.cuda_settle"},
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    waiting = {module.removeprefix("distplb."): own_imports(module) for module in INSIDE}
    while waiting:
        ready = {module for module, imported in waiting.items() if not imported & (waiting.keys() - {module})}
        assert ready, f"a circle among {sorted(waiting)}"
        waiting = {module: imported for module, imported in waiting.items() if module not in ready}


@pytest.mark.parametrize("library", KEPT_IN)
def test_a_library_is_known_in_one_place(library: str) -> None:
    knowing = {module for module in SOURCES if any(is_in(name, library) for name in imports(module) | uses(module))}
    assert knowing == KEPT_IN[library]


@pytest.mark.parametrize("module", SOURCES)
def test_frameworks_and_plots_are_not_imported(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & NOWHERE


@pytest.mark.parametrize("module", PURE)
def test_what_decides_has_no_clock_file_process_group_or_random_state(module: str) -> None:
    impure = IMPURE_MODULES - EXCUSED.get(module, set())
    assert not [name for name in imports(module) if any(is_in(name, one) for one in impure)]
    assert not {name.split(".")[-1] for name in uses(module)} & IMPURE_NAMES


# --- faces ------------------------------------------------------------------------------------------------------


def test_the_top_module_holds_the_public_names_and_nothing_else() -> None:
    docstring, *statements = tree("distplb").body
    assert isinstance(docstring, ast.Expr)
    for statement in statements:
        if isinstance(statement, ast.Assign):
            assert ast.unparse(statement.targets[0]) in ("__all__", "__version__")
        else:
            assert isinstance(statement, ast.ImportFrom), f"line {statement.lineno}: {ast.unparse(statement)}"
    imported = {
        alias.asname or alias.name for node in statements if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == set(distplb.__all__)
    assert distplb.__all__ == sorted(distplb.__all__)


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_says_what_it_is_and_which_names_are_public(module: str) -> None:
    assert ast.get_docstring(tree(module))
    if SOURCES[module].name == "__init__.py" and module != "distplb":
        assert len(tree(module).body) == 1, "a folder's __init__ holds a docstring and nothing else"
        return
    if module not in IMPORTABLE:
        pytest.skip(f"needs {NEEDS[module]}")
    names = loaded(module).__all__
    assert isinstance(names, list)
    assert all(isinstance(name, str) and hasattr(loaded(module), name) for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("module", SOURCES)
def test_public_classes_and_functions_have_a_docstring(module: str) -> None:
    outer = [node for node in tree(module).body if isinstance(node, ast.ClassDef | ast.FunctionDef) and is_public(node)]
    classes = [node for node in outer if isinstance(node, ast.ClassDef)]
    methods = [node for one in classes for node in one.body if isinstance(node, ast.FunctionDef) and is_public(node)]
    without = [node.name for node in [*outer, *methods] if not ast.get_docstring(node)]
    assert not without


def is_public(node: ast.ClassDef | ast.FunctionDef) -> bool:
    return not node.name.startswith("_")


IMPORTED_ALONE = """
import sys, torch
before, state, threads = set(sys.modules), torch.get_rng_state(), torch.get_num_threads()
import distplb
assert torch.equal(state, torch.get_rng_state()), "the random state changed"
assert torch.get_num_threads() == threads, "the number of threads changed"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
assert not torch.distributed.is_initialized(), "torch.distributed was initialised"
assert "torch.distributed.tensor" not in sys.modules, "it takes as long to import as torch itself"
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_importing_runs_nothing() -> None:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run(
        [sys.executable, "-c", IMPORTED_ALONE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "distplb" in run.stdout.split()
    assert not (NOWHERE | FRAMEWORKS | LATE) & set(run.stdout.split())


# --- the examples -----------------------------------------------------------------------------------------------

EXAMPLES = [
    pytest.param(example, id=example.name)
    for module in IMPORTABLE
    for example in doctest.DocTestFinder(exclude_empty=True).find(loaded(module))
    if example.examples
]


def test_the_examples_are_found() -> None:
    assert {"distplb.planner.plan", "distplb.topology.Topology"} <= {parameter.id for parameter in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_what_it_says(example: doctest.DocTest) -> None:
    told: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(example, out=told.append)
    assert not told, "".join(told)
