"""Counts of windows, traces and packing, and types of other arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distplb import (
    LoadWindow,
    Placement,
    Spread,
    TimeCurve,
    Topology,
    Trace,
    TraceWriter,
    balanced_packing,
    imbalance,
    lower_bound,
    plan,
    rebalance_experts,
)
from distplb.core.counts import marked
from inputs.case import Case
from inputs.counts_of_plans import ONE_LAYER, TWO, planned

__all__ = ["CASES"]


def _window(counts: Any, layer: Any = 0, **options: Any) -> list[list[list[int]]]:
    window = LoadWindow(1, 4, 2)
    window.add(layer, counts, **({"training": True} | options))
    return window.load().tolist()


def _window_of_accelerator(counts: Tensor) -> object:
    """Load counts that `add` did not wait for."""
    window = LoadWindow(1, 4, 2)
    window.name_layers(["blocks.0.moe"])
    window.add(0, torch.zeros(4), training=True)
    window._counts[0, 0] = marked(counts)
    return window.load()


def _recorded(folder: Path, load: Any) -> object:
    with TraceWriter(folder / "trace") as writer:
        writer.add(load, ONE_LAYER, [7])
    return Trace.read(folder / "trace").load.tolist()


CASES: list[Case] = [
    Case(
        "lower_bound of uint16",
        "[1.0]",
        lambda _: lower_bound(np.array([[9, 5, 1, 5]], dtype="u2"), TWO, 4).tolist(),
    ),
    Case(
        "window.add(0, [9, 5, 1, 5]), a list",
        "[[[9, 5, 1, 5]]]",
        lambda _: _window([9, 5, 1, 5]),
    ),
    Case(
        "window.add of torch.histc, float32",
        "[[[1, 2, 0, 1]]]",
        lambda _: _window(torch.histc(torch.tensor([0.0, 1, 1, 3]), 4, 0, 3)),
    ),
    Case(
        "window.add of uint16",
        "[[[9, 5, 1, 5]]]",
        lambda _: _window(np.array([9, 5, 1, 5], dtype="u2")),
    ),
    Case(
        "window.add of shares of tokens",
        (
            "refused: LoadWindow.add: layer 0 has 0.699999988079071 for expert 0 (4 such values); counts must be "
            "whole tokens: multiply frequencies by the number of tokens, and pass sums over steps instead of means "
            "(mean × steps)"
        ),
        lambda _: _window(torch.tensor([0.7, 0.1, 0.1, 0.1])),
    ),
    Case(
        "window.add with NaN",
        (
            "refused: LoadWindow.add: layer 0 has nan for expert 2 (1 such value); counts must be finite: check "
            "the counter that produced them"
        ),
        lambda _: _window(torch.tensor([9.0, 5, float("nan"), 5])),
    ),
    Case(
        "window.add of NaN on an accelerator, reported by window.load()",
        (
            "refused: LoadWindow: layer 'blocks.0.moe' has a torch.float32 value that is not an integer from 0 to "
            "16777216 for expert 2 in step 0 (1 such value); counts must be whole tokens, which torch.float32 "
            "represents exactly only up to 16777216: check the counter, or count in int64"
        ),
        lambda _: _window_of_accelerator(torch.tensor([9.0, 5, float("nan"), 5])),
    ),
    Case(
        "window.add of -3 on an accelerator, reported by window.load()",
        (
            "refused: LoadWindow: layer 'blocks.0.moe' has -3 for expert 2 in step 0 (1 such value); counts must "
            "be non-negative: check the counter that produced them"
        ),
        lambda _: _window_of_accelerator(torch.tensor([9, 5, -3, 5])),
    ),
    Case(
        "window.add of [1, experts]",
        "refused: LoadWindow.add: counts has shape (1, 4); pass [4], one for each of the router's outputs",
        lambda _: _window(torch.ones(1, 4)),
    ),
    Case(
        "window.add of rows of different lengths",
        (
            "refused: LoadWindow.add: counts[0] is a list of length 2, counts[1] is a list of length 1; pass lists "
            "of equal length"
        ),
        lambda _: _window([[9, 5], [1]]),
    ),
    Case(
        "window.add for layer 1 of a window with one layer",
        "refused: LoadWindow.add: layer is 1; pass an index in [0, 1)",
        lambda _: _window([9, 5, 1, 5], layer=1),
    ),
    Case(
        'window.add for layer "0"',
        "refused: LoadWindow.add: layer is '0'; pass an index in [0, 1)",
        lambda _: _window([9, 5, 1, 5], layer="0"),
    ),
    Case(
        "window.add for layer np.int64(0)",
        "[[[9, 5, 1, 5]]]",
        lambda _: _window([9, 5, 1, 5], layer=np.int64(0)),
    ),
    Case(
        "Trace of integers in float32",
        "[[[9, 5, 1, 5]]]",
        lambda _: Trace(torch.tensor([[[9.0, 5, 1, 5]]]), (ONE_LAYER,), [0], [7]).load.tolist(),
    ),
    Case(
        "Trace of fractions, with a named layer",
        (
            "refused: Trace: load has 9.5 for expert 0 of layer 'moe' in step 0 (1 such value); counts must be "
            "whole tokens: multiply frequencies by the number of tokens, and pass sums over steps instead of means "
            "(mean × steps)"
        ),
        lambda _: Trace([[[9.5, 5, 1, 5]]], (ONE_LAYER,), [0], [7], ("moe",)),
    ),
    Case(
        "TraceWriter.add of a list",
        "[[[9, 5, 1, 5]]]",
        lambda folder: _recorded(folder, [[[9, 5, 1, 5]]]),
    ),
    Case(
        "TraceWriter.add of a negative count",
        (
            "refused: load has -1 for expert 2 of layer 0 in step 0 (1 such value); counts must be non-negative: "
            "check the counter that produced them"
        ),
        lambda folder: _recorded(folder, [[[9, 5, -1, 5]]]),
    ),
    Case(
        "balanced_packing of fractions, which weights may have",
        "[[0, 0, 1, 1]]",
        lambda _: balanced_packing([[0.9, 0.1, 0.5, 0.5]], 2)[0].tolist(),
    ),
    Case(
        "balanced_packing of uint16",
        "[[0, 0, 1, 1]]",
        lambda _: balanced_packing(np.array([[9, 1, 5, 5]], dtype="u2"), 2)[0].tolist(),
    ),
    Case(
        "balanced_packing of a negative weight",
        (
            "refused: weight has -5 for item 3 of row 0 (1 such value); counts must be non-negative: check the "
            "counter that produced them"
        ),
        lambda _: balanced_packing([[9, 1, 5, -5]], 2),
    ),
    Case(
        "rebalance_experts of uint32",
        "[[0, 1, 2, 0, 2, 3]]",
        lambda _: rebalance_experts(np.array([[8, 1, 2, 1]], dtype="u4"), 6, 1, 1, 2)[0].tolist(),
    ),
    Case(
        "rebalance_experts with NaN",
        (
            "refused: weight has nan for expert 2 of layer 0 (1 such value); counts must be finite: check the "
            "counter that produced them"
        ),
        lambda _: rebalance_experts([[8.0, 1.0, float("nan"), 1.0]], 6, 1, 1, 2),
    ),
    Case(
        "Topology(np.int64(1), 8)",
        "Topology(num_nodes=1, gpus_per_node=8)",
        lambda _: Topology(np.int64(1), 8),  # type: ignore[arg-type]
    ),
    Case(
        "Topology(1, 8.0)",
        "refused: Topology: gpus_per_node is 8.0; pass an integer of at least 1",
        lambda _: Topology(1, 8.0),  # type: ignore[arg-type]
    ),
    Case(
        "Topology(True, 8)",
        "refused: Topology: num_nodes is True; pass an integer of at least 1",
        lambda _: Topology(True, 8),
    ),
    Case(
        "plan(num_slots=torch.tensor(6))",
        "[[0, 1, 2, 0, 2, 3]]",
        lambda _: planned([[8, 1, 2, 1]], num_slots=torch.tensor(6)),
    ),
    Case(
        "plan(num_slots=6.0)",
        "refused: num_slots is 6.0; pass an integer",
        lambda _: planned([[8, 1, 2, 1]], num_slots=6.0),
    ),
    Case(
        "plan(seed=True)",
        "refused: seed is True; pass an integer",
        lambda _: planned([[8, 1, 2, 1]], seed=True),
    ),
    Case(
        'plan(comm="nccl")',
        (
            "refused: comm is 'nccl'; pass a communicator, such as TorchComm(group) from distplb.comm.torchdist, "
            "or None for this process alone"
        ),
        lambda _: planned([[8, 1, 2, 1]], comm="nccl"),
    ),
    Case(
        "plan(load, (1, 2)), a tuple as topology",
        "refused: topology is a tuple; pass a Topology, such as Topology.from_env()",
        lambda _: plan([[8, 1, 2, 1]], (1, 2)),  # type: ignore[arg-type]
    ),
    Case(
        "imbalance(load, table), a table as placement",
        "refused: placement is a Tensor; pass a Placement",
        lambda _: imbalance([[8, 1, 2, 1]], torch.arange(4)),  # type: ignore[arg-type]
    ),
    Case(
        "Placement of a table of uint8",
        "[[1, 0]]",
        lambda _: Placement(np.array([[1, 0]], dtype="u1"), 2, 2).expert_of_slot.tolist(),
    ),
    Case(
        "Placement of a table of floats",
        ("refused: Placement: expert_of_slot is torch.float32 of shape (1, 2); pass integers of shape [layers, slots]"),
        lambda _: Placement(torch.tensor([[1.0, 0.0]]), 2, 2),
    ),
    Case(
        "Spread(1, 2.5)",
        "refused: Spread: share_after is 2.5; pass an integer",
        lambda _: Spread(1, 2.5),  # type: ignore[arg-type]
    ),
    Case(
        "TimeCurve.time of half a token",
        (
            "refused: load has 0.5 for index [0] (1 such value); counts must be whole tokens: multiply frequencies "
            "by the number of tokens, and pass sums over steps instead of means (mean × steps)"
        ),
        lambda _: TimeCurve((0, 10), (0, 700)).time([0.5]),  # type: ignore[arg-type]
    ),
]
