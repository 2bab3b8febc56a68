"""Which modules may import which, what every module must declare, and whether the examples in docstrings are true."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import subprocess
import sys
from functools import cache
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

# A module may import from its own room and from rooms of earlier lines, not from other rooms of its own line.
LEVELS = [
    "errors",
    "core",
    "packing splitting comm records",
    "planning migrate replicas",
    "train study",
    "integrations",
    "report doctor",
    "cli",
    "__main__",
]
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms.split()}
# Libraries, and the only modules or rooms that may use each.
KEPT_IN = {
    "torch.distributed": "comm",
    "mpi4py": "comm.mpi",
    "yaml": "core.documents.text",
    "scipy": "core.price planning.renumber_gpus splitting.exact study.bootstrap",
    "numba": "core.machine_code packing.cpu_row splitting.cpu_routes splitting.cpu_split",
    "filelock": "core.machine_code",
    "concurrent": "records.trace_writer records.event_log train.background",
    "triton": "packing.cuda_kernels packing.cuda_settle packing.cuda_settle_state packing.cuda_steps",
    "matplotlib": "report.figures report.drawings",  # a report's figures are computed without a plotting library
    "jinja2": "report.page",
    "transformers": "integrations.huggingface integrations.huggingface_replicas",
    "torchtitan": "integrations.torchtitan integrations.torchtitan_replicas",
    "megatron": "integrations.megatron integrations.megatron_optimizers",
}
NOWHERE = {"deepspeed", "accelerate", "tensorboard"}
# Imported on first use only; `import distplb` does not load them.
FRAMEWORKS = {"transformers", "torchtitan", "megatron"}
LATE = {"yaml", "numba", "triton", "filelock", "scipy", "mpi4py", "matplotlib", "jinja2", "click", "rich"}
NEEDS = {
    "distplb.packing.cpu_cost": "numba",
    "distplb.packing.cpu_kernels": "numba",
    "distplb.packing.cpu_order": "numba",
    "distplb.packing.cpu_row": "numba",
    "distplb.packing.cpu_settle": "numba",
    "distplb.packing.cpu_settle_state": "numba",
    "distplb.packing.cpu_steps": "numba",
    "distplb.splitting.cpu_routes": "numba",
    "distplb.splitting.cpu_split": "numba",
    "distplb.packing.cuda_kernels": "triton",
    "distplb.packing.cuda_settle": "triton",
    "distplb.packing.cuda_settle_state": "triton",
    "distplb.packing.cuda_steps": "triton",
    "distplb.report.figures": "matplotlib",
    **{name: "matplotlib" for name in SOURCES if name.startswith("distplb.report.drawings.")},
    "distplb.report.page": "jinja2",
    "distplb.integrations.huggingface": "transformers",
    "distplb.integrations.huggingface_replicas": "transformers",
    "distplb.integrations.torchtitan": "torchtitan",
    "distplb.integrations.torchtitan_replicas": "torchtitan",
    "distplb.integrations.megatron": "megatron",
    "distplb.integrations.megatron_optimizers": "megatron",
}
# Rooms and modules that decide, and have no side effects.
PURE = """
core.arguments core.balance core.bound core.bound_with_replicas core.bound_without_replicas core.cost core.count_errors
core.counts core.fixed_point core.hashing core.plain_tensor core.price core.ties
packing splitting planning.chance planning.eplb planning.engine_choice planning.greedy planning.legal planning.move_cost
planning.options planning.policies planning.problem planning.renumber_gpus planning.slot_classes planning.warm_start
migrate.schedule migrate.messages migrate.slot_routes migrate.layout migrate.budget
replicas.pushes replicas.tokens replicas.buffer
train.stop_loss train.checkpoint train.rebalance_event study.replay study.costs study.verdict
"""
IMPURE_MODULES = {"time", "os", "random", "io", "socket", "subprocess", "threading", "pathlib", "datetime", "secrets"}
IMPURE_MODULES |= {"numpy.random", "torch.random", "torch.distributed", "distplb.comm", "distplb.core.stages"}
IMPURE_MODULES |= {"distplb.core.machine_code", "distplb.core.threads"}
IMPURE_MODULES |= {"tempfile", "concurrent", "multiprocessing", "filelock"}
# No result depends on where machine code is kept, how many threads there are, or how long a trial took.
EXCUSED = {
    "distplb.packing.cpu": {"distplb.core.machine_code", "distplb.core.threads"},
    "distplb.packing.cuda_trial": {"time"},
    "distplb.splitting.cpu": {"distplb.core.machine_code"},
    "distplb.splitting.routes": {"distplb.core.machine_code"},
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


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text(), str(SOURCES[module]))


@cache
def imports(module: str) -> set[str]:
    """Collect the full names that a module imports anywhere; `from a import b` gives both a and a.b."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively in line {node.lineno}"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def uses(module: str) -> set[str]:
    """Collect the dotted names in a module's code, such as torch.distributed.barrier, and their prefixes."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute | ast.Name):
            found.add(ast.unparse(node))
    return found


def strings(module: str) -> set[str]:
    """Collect the string constants in a module's code, which include names of modules imported by name."""
    constants = (node.value for node in ast.walk(tree(module)) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def own_imports(module: str) -> set[str]:
    """Collect the modules of this package that a module imports, without the prefix `distplb.`."""
    return {name.removeprefix("distplb.") for name in imports(module) if name in SOURCES and name != "distplb"}


def room_of(name: str) -> str:
    return name.removeprefix("distplb.").split(".")[0]


INSIDE = [name for name in SOURCES if name != "distplb"]
IMPORTABLE = [name for name in SOURCES if name not in NEEDS or find_spec(NEEDS[name])]


def loaded(module: str) -> ModuleType:
    """Import a module; for those of Numba, let the engine first set the folder of its machine code.

    Otherwise the machine code would be kept next to the sources, and still be used after they have changed.
    """
    if NEEDS.get(module) == "numba":
        cpu.warm_up()
    return importlib.import_module(module)


# --- who imports whom -------------------------------------------------------------------------------------------


def test_the_sources_are_found() -> None:
    assert {"distplb.core.topology", "distplb.packing.reference", "distplb.comm.torchdist"} <= set(INSIDE)
    assert "core.placement" in own_imports("distplb.planning.plan")
    assert "torch.distributed" in imports("distplb.comm.torchdist")


@pytest.mark.parametrize("module", INSIDE)
def test_a_module_imports_only_downward(module: str) -> None:
    own = room_of(module)
    for imported in own_imports(module):
        room = room_of(imported)
        assert room == own or LEVEL[room] < LEVEL[own], f"{module} imports {imported}, which is not below it"


def test_every_room_says_what_it_may_import() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.suffix not in (".pyc", ".typed") and path.is_dir()}
    assert rooms - {"__pycache__"} == LEVEL.keys() - {"errors", "__main__"}
    for room in rooms - {"__pycache__"}:
        assert "ay import" in str(ast.get_docstring(tree(f"distplb.{room}")))


def test_what_needs_a_compiler_is_imported_by_its_engine_alone() -> None:
    names = {module: imports(module) | strings(module) for module in SOURCES}
    needy = [module for module in NEEDS if "packing" in module or "splitting" in module]
    importers = {name: {module for module in SOURCES if name in names[module]} for name in needy}
    assert importers == {
        "distplb.packing.cpu_cost": {"distplb.packing.cpu_kernels"},
        "distplb.packing.cpu_kernels": {"distplb.packing.cpu"},
        "distplb.packing.cpu_order": {"distplb.packing.cpu_steps"},
        "distplb.packing.cpu_row": {
            f"distplb.packing.cpu_{name}" for name in ("cost", "kernels", "order", "settle", "settle_state", "steps")
        },
        "distplb.packing.cpu_settle": {"distplb.packing.cpu_kernels"},
        "distplb.packing.cpu_settle_state": {"distplb.packing.cpu_kernels"},
        "distplb.packing.cpu_steps": {"distplb.packing.cpu_kernels"},
        "distplb.packing.cuda_kernels": {"distplb.packing.cuda"},
        "distplb.packing.cuda_settle": {"distplb.packing.cuda_kernels"},
        "distplb.packing.cuda_settle_state": {"distplb.packing.cuda_settle"},
        "distplb.packing.cuda_steps": {
            f"distplb.packing.cuda_{name}" for name in ("kernels", "settle", "settle_state")
        },
        "distplb.splitting.cpu_routes": {"distplb.splitting.routes"},
        "distplb.splitting.cpu_split": {"distplb.splitting.cpu"},
    }


def test_no_modules_import_each_other_in_a_circle() -> None:
    waiting = {module.removeprefix("distplb."): own_imports(module) for module in INSIDE}
    while waiting:
        ready = {module for module, imported in waiting.items() if not imported & (waiting.keys() - {module})}
        assert ready, f"an import cycle among {sorted(waiting)}"
        waiting = {module: imported for module, imported in waiting.items() if module not in ready}


@pytest.mark.parametrize("library", KEPT_IN)
def test_a_library_is_known_in_one_place(library: str) -> None:
    places = [f"distplb.{place}" for place in KEPT_IN[library].split()]
    knowing = {module for module in SOURCES if any(is_in(name, library) for name in imports(module) | uses(module))}
    assert not {module for module in knowing if not any(is_in(module, place) for place in places)}
    assert all(any(is_in(module, place) for module in knowing) for place in places), "a listed place no longer uses it"


@pytest.mark.parametrize("module", SOURCES)
def test_frameworks_and_plots_are_not_imported(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & NOWHERE


@pytest.mark.parametrize(
    "module", [name for name in SOURCES if any(is_in(name, f"distplb.{place}") for place in PURE.split())]
)
def test_what_decides_has_no_clock_file_process_group_or_random_state(module: str) -> None:
    impure = IMPURE_MODULES - EXCUSED.get(module, set())
    assert not [name for name in imports(module) if any(is_in(name, one) for one in impure)]
    assert not {name.split(".")[-1] for name in uses(module)} & IMPURE_NAMES


# --- what modules declare ---------------------------------------------------------------------------------------


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
        assert len(tree(module).body) == 1, "a folder's __init__ may contain only a docstring"
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
    assert {"distplb.planning.plan.plan", "distplb.core.topology.Topology"} <= {parameter.id for parameter in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_what_it_says(example: doctest.DocTest) -> None:
    told: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(example, out=told.append)
    assert not told, "".join(told)
