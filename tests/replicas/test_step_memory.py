"""What replicas hold in memory: one buffer for all layers, whatever their number.

Measured by the allocator's events, because the resident size of a process hardly changes when memory is freed.

Shapes: L layers, R replica slots.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.profiler import ProfilerActivity, profile

from distplb import Topology
from distplb.replicas.step_balancer import StepBalancer

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

EXPERTS, DIM, FFN, SEQUENCE, R = 8, 384, 384, 4, 2
REPLICA = 2 * DIM * FFN * 4  # bytes of an expert's weights in float32
FEW, MANY = 2, 8


def peak_of_a_step(layers: int, keep: bool | None, warm: bool) -> tuple[int, int]:
    """The most bytes that one step has beyond what there is before it, on this rank; replicas that it received.

    Args:
        layers: L.
        keep: that of the balancer; None for the layer without one.
        warm: whether a step has gone before, so that buffers and gradients are there.
    """
    from moe_model import Config, Transformer

    balancer = None
    if keep is not None:
        topology = Topology(1, dist.get_world_size())
        balancer = StepBalancer(topology=topology, num_experts=EXPERTS, replica_slots=R, keep=keep)
    config = Config(layers=layers, experts=EXPERTS, dim=DIM, ffn=FFN, heads=2, max_sequence=SEQUENCE)
    model = Transformer(config, dist.group.WORLD, seed=0, balancer=balancer)
    for moe in model.moes:
        moe.expert_bias[:2] = 9.0  # rank 0 has all tokens, and lends both experts
    received: list[int] = []
    if balancer is not None:
        dispatch = balancer.dispatch

        def watched(*arguments: Any) -> Any:
            step = dispatch(*arguments)
            received.append(0 if step.loan is None else len(step.loan.pushes.receives))
            return step

        balancer.dispatch = watched  # type: ignore[method-assign]
    tokens = torch.randint(256, (1, SEQUENCE + 1), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(warm):
        model(tokens[:, :-1], tokens[:, 1:]).backward()  # without the all-reduce, whose buffer would hide the rest
    received.clear()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model(tokens[:, :-1], tokens[:, 1:]).backward()  # without the all-reduce, whose buffer would hide the rest
    return peak(profiled), sum(received)


def peak(profiled: Any) -> int:
    """The most bytes that were allocated at once since the profile began, from the allocator's events in its trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = [one for one in json.loads(path.read_text())["traceEvents"] if one.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda one: float(one["ts"])):
        held += int(event["args"]["Bytes"])
        most = max(most, held)
    return most


def peaks(warm: bool) -> dict[str, dict[int, tuple[int, int]]]:
    ways = {"plain": None, "lent": False, "kept": True}
    return {name: {layers: peak_of_a_step(layers, keep, warm) for layers in (FEW, MANY)} for name, keep in ways.items()}


STEPS = [pytest.param(True, id="later step"), pytest.param(False, id="first step", marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=STEPS)
def of_ranks(request: pytest.FixtureRequest) -> list[dict[str, dict[int, tuple[int, int]]]]:
    found = on_ranks(2, peaks, request.param)
    for rank in found:
        for name, of in rank.items():
            print(name, {layers: (one / REPLICA, number) for layers, (one, number) in of.items()})
    return found


def more(rank: dict[str, dict[int, tuple[int, int]]], name: str) -> tuple[float, float]:
    """What a way holds more than the layer without a balancer, with few layers and with many, in replicas."""
    few, many = ((rank[name][layers][0] - rank["plain"][layers][0]) / REPLICA for layers in (FEW, MANY))
    return few, many


def test_every_layer_had_replicas(of_ranks: list[dict[str, dict[int, tuple[int, int]]]]) -> None:
    for name in ("lent", "kept"):
        for layers in (FEW, MANY):
            assert sum(rank[name][layers][1] for rank in of_ranks) >= layers


def test_what_replicas_hold_does_not_grow_with_the_layers(
    of_ranks: list[dict[str, dict[int, tuple[int, int]]]],
) -> None:
    for rank in of_ranks:
        few, many = more(rank, "lent")
        assert many < few + 1  # not one replica more for six layers more
        # R each of weights, their gradients as autograd makes them, and gradients that come home.
        assert max(few, many) < 3 * R + 1


def test_with_keep_the_same_measurement_grows(of_ranks: list[dict[str, dict[int, tuple[int, int]]]]) -> None:
    for rank in of_ranks:
        few, many = more(rank, "kept")
        assert many - few > 0.9 * R * (MANY - FEW)
