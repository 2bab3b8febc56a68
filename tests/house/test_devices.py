"""Tensors are created on the documented device, whatever the user's default device and dtype are.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.utils._device import _device_constructors

import distplb
from distplb import (
    LoadWindow,
    MoELayer,
    MoveModel,
    Moves,
    Placement,
    Rebalancer,
    Search,
    TimeCurve,
    Topology,
    Trace,
    TraceWriter,
)
from distplb.comm.agreement import agree
from distplb.comm.base import WorldOfOne
from distplb.comm.torchdist import TorchComm
from distplb.core.balance import balancedness_sglang, balancedness_vllm, max_violation
from distplb.core.price import moved_slots
from distplb.core.ties import RouterTies
from distplb.doctor.local_checks import findings
from distplb.integrations.common import tokens_of_experts
from distplb.migrate.budget import within_budget
from distplb.planning.greedy import contiguous, greedy_numpy
from distplb.study.what_if import PRICED, Study

PACKAGE = Path(distplb.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
MAKERS = {function.__name__ for function in _device_constructors()}  # their tensors are on torch's default device

LOAD = torch.from_numpy(np.random.default_rng(0).zipf(1.4, (6, 2, 8)).clip(max=500))  # [T, L, E]
TOPOLOGY = Topology(2, 2)
START = Placement.contiguous(2, 8, 4)
CURVE = TimeCurve.linear(2.0)
MODEL = MoveModel(2e-9, 10**5, 10**9, 10**8)


# --- in the sources ----------------------------------------------------------------------------------------------


def without_device(tree: ast.Module) -> Iterator[str]:
    """Yield calls that create a tensor without naming a device."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            makes = ast.unparse(node.func.value) == "torch" and node.func.attr in MAKERS
            if makes and "device" not in {keyword.arg for keyword in node.keywords}:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_a_tensor_of_no_device_is_found() -> None:
    source = "torch.zeros(3)\ntorch.full((2,), 1, device=x.device)\nx.new_zeros(2)\ny = [torch.as_tensor(x)]\n"
    assert list(without_device(ast.parse(source))) == ["line 1: torch.zeros(3)", "line 4: torch.as_tensor(x)"]
    assert {"zeros", "tensor", "arange", "full", "empty", "as_tensor", "randperm"} <= MAKERS


@pytest.mark.parametrize("file", SOURCES)
def test_every_tensor_is_made_on_a_device_that_is_named(file: str) -> None:
    """Under `torch.set_default_device`, tensors without a device met tensors on another one, and torch raised."""
    assert not list(without_device(SOURCES[file]))


# --- at run time -------------------------------------------------------------------------------------------------


def trace() -> Trace:
    return Trace(LOAD, (START,), [0] * 6, list(range(6)))


def window() -> list[Any]:
    counted = LoadWindow(2, 8, 4)
    for step in LOAD:
        for layer, counts in enumerate(step):
            counted.add(layer, counts, training=True)
    counted.rename(torch.arange(7, -1, -1, device="cpu").expand(2, -1))
    found = [counted.load(), counted.steps(), counted.seen]
    counted.clear()
    return [*found, counted.load()]


def parameters(rows: int) -> nn.Parameter:
    return nn.Parameter(torch.arange(rows * 3.0, device="cpu", dtype=torch.float32).view(rows, 3))


def rebalanced(comm: Any = None, gpus: int = 1) -> list[Any]:
    """Run two rebalances of 8 experts and apply a user's placement; then save the state and load it again."""
    weights, router = parameters(8 // gpus), parameters(8)
    optimizer = torch.optim.SGD([weights, router], lr=0.1, momentum=0.9)
    layer = MoELayer(name="moe", experts={"w": weights}, router={"weight": router})
    moves, search = Moves(verify="digest", max_bytes=10**6), Search(engine="reference")
    counted = LoadWindow(1, 8, 8)
    rebalancer = Rebalancer(
        [layer],
        optimizer,
        topology=Topology(1, gpus),
        every=2,
        comm=comm,
        window=counted,
        search=search,
        moves=moves,
    )
    for number in range(4):
        counted.add(0, LOAD[number, 0], training=True)
        (weights.sum() + router.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        rebalancer.step()
    rebalancer.apply(Placement(torch.arange(7, -1, -1, device="cpu")[None], 8, gpus))
    state = rebalancer.state_dict()
    rebalancer.load_state_dict(state)
    return [rebalancer.placement, weights.detach(), router.detach(), state]


def written(folder: Path) -> list[Any]:
    """Write a placement and a trace to disk, and read them back."""
    START.save(folder / "start.json")
    with TraceWriter(folder / "trace") as writer:
        writer.add(LOAD, START, range(6))
    return [Placement.load(folder / "start.json"), Trace.read(folder / "trace")]


def lent(**options: Any) -> distplb.Split:
    """A step of 8 experts on 4 GPUs, split."""
    return distplb.split(LOAD[:4, 0], torch.arange(8, device="cpu") // 2, topology=Topology(1, 4), **options)


def stepped() -> list[Any]:
    """One step of a balancer of one rank."""
    events: list[distplb.StepEvent] = []
    balancer = distplb.StepBalancer(topology=Topology(1, 1), num_experts=8, on_event=events.append, sample_every=1)
    ids, rows = (torch.ones(3, 2, device="cpu").to(dtype) for dtype in (torch.int64, torch.float32))
    for _ in range(2):
        step = balancer.dispatch("moe", ids)
        experts = parameters(8).detach()
        computed = balancer.compute(step, lambda rows, own, replicas: rows @ own[0][1, :2], rows, experts)
    (event,) = events
    return [step.slot_of_token, step.receive, computed, balancer.num_bytes, event.tokens_of_gpu_after]


def ties() -> float | None:
    found = RouterTies(2)
    found.add(torch.tensor([[0.5, 0.5, 0.1], [0.6, 0.2, 0.2]], device="cpu"))
    return found.take()


# A call for each public name; for a class, of its methods.
CALLS: dict[str, Callable[[Path], Any]] = {
    "LoadWindow": lambda _: window(),
    "MoveModel": lambda _: MODEL.seconds(3, 2),
    "Placement": lambda _: [START, START.inverse, START.replicas, START.digest(), Placement([[1, 0, 1, 2]], 3, 2)],
    "Rebalancer": lambda _: rebalanced(),
    "StepBalancer": lambda _: stepped(),
    "Split": lambda _: [lent().load, lent().imbalance, lent().pushes],
    "TimeCurve": lambda _: CURVE.time(LOAD),
    "Trace": lambda _: trace(),
    "TraceWriter": written,
    "balanced_packing": lambda _: [distplb.balanced_packing(x, 4) for x in (LOAD[0], LOAD[0].double(), [[3, 1, 2, 9]])],
    "imbalance": lambda _: distplb.imbalance(LOAD, START),
    "lower_bound": lambda _: [
        distplb.lower_bound(LOAD[0], TOPOLOGY, slots, num_groups=groups) for slots in (8, 12) for groups in (None, 4)
    ],
    "plan": lambda _: [
        distplb.plan(LOAD, TOPOLOGY, **options)
        for options in (
            {},
            {"engine": "reference", "num_candidates": 4},
            {"num_slots": 12},
            {"num_groups": 4},
            {"current": START, "move_price": (3, 9)},
            {"current": START, "mode": "permute", "num_groups": 4},
            {"slot_class": torch.arange(8, device="cpu") % 2, "current": START, "time_curve": CURVE},
        )
    ],
    "rebalance_experts": lambda _: distplb.rebalance_experts(LOAD.sum(0).double(), 12, 4, 2, 4),
    "replay": lambda _: distplb.replay(
        trace(), lambda load, current: distplb.plan(load, TOPOLOGY), topology=TOPOLOGY, every=2, model=MODEL
    ),
    "routes": lambda _: distplb.routes(lent(), Topology(1, 4)),
    "split": lambda _: [
        [found.quota, found.replica]
        for found in (
            lent(),
            lent(replica_slots=1, engine="reference", min_quota=8, tile=4),
            lent(push_price=(2.0, 9.0), time_curve=CURVE),
            lent(max_tokens_per_gpu=int(LOAD[:4, 0].sum()) // 3),
        )
    ],
    "step_bound": lambda _: distplb.step_bound(
        LOAD[:4, 0], torch.arange(8, device="cpu") // 2, topology=Topology(1, 4)
    ),
    "measured_curve": lambda _: distplb.measured_curve(lambda tokens: None, [1, 4]).tokens,
    # Documented functions of other modules.
    "agree": lambda _: agree(WorldOfOne(), {"a": 1}, None),
    "balance": lambda _: [balancedness_vllm(LOAD), balancedness_sglang(LOAD), max_violation(LOAD)],
    "findings": lambda _: [one.level for one in findings() if one.what.startswith("engine")],
    "greedy": lambda _: [contiguous(LOAD[0], TOPOLOGY, 12), greedy_numpy(LOAD[0], TOPOLOGY, 12, num_groups=4)],
    "moved_slots": lambda _: moved_slots(START, distplb.plan(LOAD, TOPOLOGY), TOPOLOGY),
    "what_if": lambda _: Study(trace(), TOPOLOGY, MODEL).run([(PRICED, 2)]),
    "ties": lambda _: ties(),
    "tokens_of_experts": lambda _: tokens_of_experts(LOAD % 8, 8),
    "within_budget": lambda _: within_budget(LOAD, START, distplb.plan(LOAD, TOPOLOGY), 6),
}
WITHOUT_TENSORS = {"DistplbError", "EventLog", "FlatShard", "MoELayer", "RebalanceEvent", "Spread", "Topology"}
WITHOUT_TENSORS |= {"Moves", "Record", "Search", "StepEvent", "read_events", "read_steps"}


def plain(value: Any) -> Any:
    """Convert to plain Python values, which == compares; a tensor becomes its device, dtype and values."""
    if isinstance(value, Tensor):
        return [str(value.device), str(value.dtype), value.tolist()]
    if isinstance(value, Placement):
        return [value.num_experts, value.num_gpus, plain(value.expert_of_slot)]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


@contextmanager
def defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def test_all_public_names_are_called() -> None:
    assert set(distplb.__all__) == (CALLS.keys() & set(distplb.__all__)) | WITHOUT_TENSORS


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.bfloat16)])
def test_what_comes_out_does_not_depend_on_the_defaults(
    name: str, device: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """On the device `meta` a tensor has no values, so a result cannot depend on a tensor created there."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "other").mkdir()
    wanted = plain(CALLS[name](tmp_path / "plain"))
    with defaults(device, dtype):
        found = CALLS[name](tmp_path / "other")
    assert plain(found) == wanted


def moved_between_ranks() -> list[Any]:
    found = []
    for device in ("cpu", "meta"):
        with defaults(device, torch.float32):
            found.append(plain(rebalanced(TorchComm(side_group=True), 2)))
    return [found[0] == found[1], found[0][0]]


def test_experts_move_alike_under_another_default_device() -> None:
    for same, placement in on_ranks(2, moved_between_ranks):
        assert same
        assert placement[-1][-1] == [list(range(7, -1, -1))]
