"""The user's own planners: a folder of Python files, each with a function of DeepSeek EPLB's interface.

    def rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus):
        ...
        return physical_to_logical, logical_to_physical, logical_count

`weight` are tokens `[L, E]`, int64 on the CPU. The results are integers: the expert of each slot `[L, P]`, the slots of
each expert `[L, E, R]`, padded with -1, and the number of slots of each expert `[L, E]`; slot p is on GPU `p // G`.
Shapes: L layers, E experts, P slots, N nodes, M GPUs, G = P / M slots on each, R the most replicas of an expert.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.shared.loads import Layout, sampled

__all__ = ["BadPlannerError", "UserPlanner", "tried", "user_planners"]

FUNCTION = "rebalance_experts"
ARGUMENTS = ("weight", "num_replicas", "num_groups", "num_nodes", "num_gpus")
RESULTS = ("physical_to_logical", "logical_to_physical", "logical_count")
TRIAL_LAYERS = 2


class BadPlannerError(Exception):
    """A planner of the user's cannot be compared; the text names its file and says why."""


class UserPlanner:
    """A planner of the user's on one layout: tokens `[L, E]` -> expert of slot `[L, P]`.

    Args:
        path: its file.
        function: its `rebalance_experts`.
        layout: the cluster, and the groups that stay on nodes, if any.
    """

    def __init__(self, path: Path, function: Callable[..., Any], layout: Layout) -> None:
        self._path, self._function, self._layout = path, function, layout

    def __call__(self, load: Tensor) -> Tensor:
        """Plan, and check nothing: this is what is timed."""
        layout = self._layout
        # Without groups a program of this interface takes one, which it ignores on several nodes.
        groups = 1 if layout.groups is None else layout.groups
        table: Tensor = self._function(load, layout.slots, groups, layout.nodes, layout.topology.num_gpus)[0]
        return table

    def checked(self, load: Tensor) -> Tensor:
        """Plan, and refuse anything but a legal placement.

        Raises:
            BadPlannerError: if the planner raises, changes its argument, or returns no legal placement.
        """
        layout, given = self._layout, load.clone()
        arguments = (layout.slots, 1 if layout.groups is None else layout.groups, layout.nodes)
        where = f"on {layout.text(load.shape[1])}"
        try:
            found = self._function(given, *arguments, layout.topology.num_gpus)
        except Exception as error:
            raise BadPlannerError(f"{self._path}: {FUNCTION} raised {error!r} {where}") from error
        if not torch.equal(given, load):
            raise BadPlannerError(f"{self._path}: {FUNCTION} has changed its argument weight {where}; plan on a copy")
        wrong = fault(found, load, layout)
        if wrong:
            raise BadPlannerError(f"{self._path}: {wrong} {where}")
        table: Tensor = found[0].to("cpu", torch.int64)
        return table


def user_planners(folder: Path) -> dict[Path, Callable[..., Any]]:
    """The functions of all files of a folder whose names do not begin with an underscore.

    Raises:
        SystemExit: if there are none, or a file does not load or has no such function; with all such files.
    """
    paths = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_"))
    if not paths:
        raise SystemExit(f"--planners: no Python files in {folder}; pass a folder with a file for each planner")
    found, refused = dict[Path, Callable[..., Any]](), []
    sys.path.insert(0, str(folder.resolve()))  # a planner may import others, now and later
    for path in paths:
        try:
            found[path] = function_of(path)
        except BadPlannerError as error:
            refused.append(str(error))
    refuse(refused)
    return found


def function_of(path: Path) -> Callable[..., Any]:
    """The function of a file."""
    spec = spec_from_file_location(f"user_planner_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BadPlannerError(f"{path} does not load: {error!r}") from error
    function = getattr(module, FUNCTION, None)
    if not callable(function):
        raise BadPlannerError(
            f"{path} has no function {FUNCTION}(weight, num_replicas, num_groups, num_nodes, num_gpus)"
        )
    return function


def tried(functions: dict[Path, Callable[..., Any]], layouts: Iterable[tuple[int, Layout]]) -> None:
    """Have every planner plan a small load for every layout, so that no fault shows only after hours.

    Args:
        functions: by file.
        layouts: numbers of experts, and layouts.

    Raises:
        SystemExit: if some planner cannot be compared; with the first fault of each.
    """
    refused = dict[Path, str]()
    for experts, layout in dict.fromkeys(layouts):
        popularity = np.random.default_rng(experts).lognormal(0, 1, (TRIAL_LAYERS, experts))
        load = sampled(popularity / popularity.sum(1, keepdims=True), np.random.default_rng(0))
        for path, function in functions.items():
            if path not in refused:
                try:
                    UserPlanner(path, function, layout).checked(load)
                except BadPlannerError as error:
                    refused[path] = str(error)
    refuse(list(refused.values()))


def refuse(faults: list[str]) -> None:
    """End the benchmark if there are faults."""
    if faults:
        raise SystemExit("\n".join(["--planners: mend these files, or take them out of the folder:", *faults]))


def fault(found: Any, load: Tensor, layout: Layout) -> str:
    """What is wrong with the results of a planner, in words; empty if nothing is."""
    (layers, experts), slots = load.shape, layout.slots
    if not isinstance(found, tuple | list) or len(found) != 3:
        return f"{FUNCTION} returned no three results ({', '.join(RESULTS)})"
    shapes = ((layers, slots), (layers, experts, -1), (layers, experts))
    for name, value, shape in zip(RESULTS, found, shapes, strict=True):
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
            return f"{name} is no tensor of integers"
        sizes = list(value.shape)
        if len(sizes) != len(shape) or any(own not in (-1, size) for own, size in zip(shape, sizes, strict=True)):
            wanted = ", ".join("replicas" if own == -1 else str(own) for own in shape)
            return f"{name} has shape {sizes}, not [{wanted}]"
    table, slot_of, count = (value.to("cpu", torch.int64) for value in found)
    if int(table.min()) < 0 or int(table.max()) >= experts:
        return f"physical_to_logical has experts {int(table.min())} to {int(table.max())}, not in [0, {experts})"
    held = torch.zeros(layers, experts, dtype=torch.int64).scatter_add_(1, table, torch.ones_like(table))
    if not bool(held.all()):
        layer, expert = held.eq(0).nonzero()[0].tolist()
        return f"expert {expert} of layer {layer} has no slot in physical_to_logical"
    if not torch.equal(held, count):
        layer, expert = held.ne(count).nonzero()[0].tolist()
        return (
            f"logical_count of expert {expert} in layer {layer} is {int(count[layer, expert])}, but "
            f"physical_to_logical has it in {int(held[layer, expert])} slots"
        )
    return fault_of_slots(slot_of, table, held) or fault_of_groups(table, experts, layout)


def fault_of_slots(slot_of: Tensor, table: Tensor, held: Tensor) -> str:
    """Whether `slot_of [L, E, R]` has the slots of `table [L, P]`, which are `held [L, E]` of each expert."""
    for layer, row in enumerate(slot_of):
        for expert, listed in enumerate(row.tolist()):
            own = [slot for slot in listed if slot != -1]
            if sorted(own) != (table[layer] == expert).nonzero().flatten().tolist():
                return (
                    f"logical_to_physical of expert {expert} in layer {layer} lists slots {own[:8]}, but "
                    f"physical_to_logical has it in {(table[layer] == expert).nonzero().flatten().tolist()[:8]}"
                )
    return ""


def fault_of_groups(table: Tensor, experts: int, layout: Layout) -> str:
    """Whether each group of consecutive experts is on one node of its layer."""
    if layout.groups is None or layout.nodes == 1:
        return ""
    group = table // (experts // layout.groups)  # [L, P]
    for layer, row in enumerate(group.view(len(table), layout.nodes, -1)):
        nodes = torch.stack([row.eq(number).any(1) for number in range(layout.groups)]).sum(1)
        if bool((nodes > 1).any()):
            number = int(nodes.argmax())
            return f"group {number} of layer {layer} is on {int(nodes[number])} nodes (--flat leaves such layouts out),"
    return ""
