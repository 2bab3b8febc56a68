"""Private names of torch: the installed torch has them, and only two files and a few exceptions use them."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distplb
from distplb.comm.private_names import default_store, flattened, local_shape_and_offset, num_groups
from distplb.core.private_names import forward_pre_hooks, is_in_backward, is_of_compiled_graph, leaves

PACKAGE = Path(distplb.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
# Each name's module, and what distplb needs it for. Those of FSDP2 are in tests/migrate/test_fsdp2.py.
NAMES = {
    ("torch._C", "_current_graph_task_id"): "to tell recomputations from forwards (LoadWindow.add)",
    ("torch._C", "_will_engine_execute_node"): "to tell what a backward comes to (StepBalancer)",
    ("torch._C", "_storage_Use_Count"): "so that gradients that others read are not added to (StepBalancer)",
    ("torch", "Tensor._use_count"): "so that gradients that others read are not added to (StepBalancer)",
    ("torch", "UntypedStorage._cdata"): "so that gradients that others read are not added to (StepBalancer)",
    ("torch._C._profiler", "_RecordFunctionFast"): "to name the stages of a step in profiles (StepBalancer)",
    ("torch._C", "_len_torch_dispatch_stack"): "to tell whether an operation is seen (StepBalancer)",
    ("torch.utils._python_dispatch", "_disable_current_modes"): "for selective recomputation (StepBalancer)",
    ("torch.nn", "Module._compiled_call_impl"): "to refuse compiled layers where replicas are lent (adapters)",
    ("torch._dynamo", "OptimizedModule._orig_mod"): "to refuse compiled layers where replicas are lent (adapters)",
    ("torch._dynamo", "graph_break"): "to move a window to the device of a compiled forward (LoadWindow.add)",
    (
        "torch.nn",
        "Module._forward_pre_hooks",
    ): "so that a second rebalancer finds the first one's table (adapters, mode='remap')",
    ("torch.utils._pytree", "tree_leaves"): "to refuse optimizer state that cannot travel (Rebalancer)",
    ("torch.distributed", "ProcessGroup._allgather_base"): "to gather the counts of a step (StepBalancer)",
    ("torch.distributed.distributed_c10d", "_get_default_store"): "to name lost ranks (TorchComm)",
    ("torch.distributed.distributed_c10d", "_world.pg_names"): "to create groups of some ranks (TorchComm.new_group)",
    (
        "torch.distributed._functional_collectives",
        "all_to_all_single_autograd",
    ): "to send tokens as transformers does (adapters)",
    ("torch.distributed._functional_collectives", "wait_tensor"): "to send tokens as transformers does (adapters)",
    ("torch.distributed.device_mesh", "DeviceMesh._flatten"): "to build one group of all EP groups (torchtitan)",
    ("torch.distributed.tensor._utils", "compute_local_shape_and_global_offset"): "to move DTensors (Rebalancer)",
}
KEEPERS = ("core/private_names.py", "comm/private_names.py")
# Other files that may use private names, of torch or of a framework. PUBLIC: underscored names that are public.
EXCUSED = {
    "comm/fsdp2.py": {"_all_gather_result", "_partial_reduce_output", "_module_state_mapping"}
    | {"_unsharded_param", "_fsdp_param_groups", "_fsdp_param_group", "_composable_state"},
    "integrations/huggingface_replicas.py": {"_experts_implementation"},
    "integrations/torchtitan.py": {"_debug_force_load_balance", "_get_node_limited_routing_scores"},
    "integrations/megatron_optimizers.py": {"_get_model_param_range_map"},
    "packing/cpu_row.py": {"_nrt"},  # of Numba, which does without; tests/packing/test_cpu_engine.py
}
PUBLIC = {"_asdict", "_replace", "_fields", "os._exit", "sys._getframe"}


# --- the names exist ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES, ids=".".join)
def test_this_torch_has_the_name(name: tuple[str, str]) -> None:
    module, path = name
    lost = f"torch {torch.__version__} has no {module}.{path}; distplb needs it {NAMES[name]}; see {KEEPERS}"
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        pytest.fail(lost)
    for part in path.split("."):
        if path == "Module._forward_pre_hooks" and part == "_forward_pre_hooks":
            found = found()  # an attribute of instances, not of the class
        if part == "_orig_mod":
            found = torch.compile(nn.Linear(1, 1))  # too
        assert hasattr(found, part), lost
        found = getattr(found, part)


def test_they_do_what_they_are_needed_for() -> None:
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(is_in_backward()))
    y.sum().backward()
    assert [is_in_backward(), *seen] == [False, True]
    assert leaves({"a": [1, (2, 3)], "b": {"c": 4}}) == [1, 2, 3, 4]
    module, hooks = nn.Linear(1, 1), [lambda *_: None, lambda *_: None]
    for hook in hooks:
        module.register_forward_pre_hook(hook)
    assert forward_pre_hooks(module) == hooks


def test_the_context_of_a_compiled_graph_is_known() -> None:
    """Compare the context of a custom function with the one in a compiled graph."""
    contexts = []

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            contexts.append(context)
            return x * 2

    x = torch.ones(2, requires_grad=True)
    Own.apply(x)
    torch._dynamo.reset()
    contexts.append(torch.compile(lambda x: x * 2, backend="aot_eager")(x).grad_fn)
    assert [is_of_compiled_graph(context) for context in contexts] == [False, True]


def used_on_ranks() -> list[Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ep"))
    flat = flattened(mesh, "all")
    weights = distribute_tensor(torch.arange(12.0).view(6, 2), mesh["ep"], [Shard(0)])
    default_store().set(f"told by {dist.get_rank()}", "yes")
    dist.barrier()
    before = num_groups()
    dist.destroy_process_group(dist.new_group())
    dist.new_group([0])
    joined = num_groups() - before
    told = [default_store().get(f"told by {rank}") for rank in range(4)]
    return [flat.ndim, flat.size(), local_shape_and_offset(weights), told == [b"yes"] * 4, joined]


def test_those_of_several_ranks_do_what_they_are_needed_for() -> None:
    found = on_ranks(4, used_on_ranks)
    assert found == [[1, 4, ((3, 2), (3 * (rank % 2), 0)), True, int(rank == 0)] for rank in range(4)]


# --- and are used nowhere else -----------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def own_names() -> set[str]:
    """Collect the private names that distplb defines: functions, classes, and attributes that it assigns."""
    found = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


def private_names(tree: ast.Module) -> Iterator[str]:
    """Yield private names that are imported, or read as attributes of objects other than self, or by `getattr`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                yield from (part for part in f"{module}.{alias.name}".split(".") if is_private(part))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not is_own and ast.unparse(node) not in PUBLIC:
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            yield from (
                argument.value
                for argument in node.args[1:2]
                if isinstance(argument, ast.Constant) and is_private(str(argument.value))
            )


def test_private_names_are_found_however_they_are_used() -> None:
    source = """
import torch._dynamo as d, torch
from torch.distributed._tensor import api
from torch.x import _y
torch._C.f()
group._z()
getattr(a, "_w", None)
self._own
torch.ok.__version__
"""
    assert sorted(private_names(ast.parse(source))) == ["_C", "_dynamo", "_tensor", "_w", "_y", "_z"]


@pytest.mark.parametrize("file", SOURCES)
def test_no_other_file_uses_a_private_name_of_torch(file: str) -> None:
    """A name that torch drops or changes then fails in one known file, not in the middle of a job."""
    if file not in KEEPERS:
        found = set(private_names(SOURCES[file])) - PUBLIC - own_names()
        assert found == EXCUSED.get(file, set())


def test_every_private_name_is_in_the_table() -> None:
    known = {part for name in NAMES for whole in name for part in whole.split(".")}
    assert {name for file in KEEPERS for name in private_names(SOURCES[file])} <= known
