"""Types and values of counts."""

from __future__ import annotations

import json
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
from inputs.case import Case, command

__all__ = ["CASES"]

_TWO = Topology(1, 2)
_ONE_LAYER = Placement.contiguous(1, 4, 2)


def _planned(load: Any, **options: Any) -> list[list[int]]:
    return plan(load, _TWO, engine="reference", **options).expert_of_slot.tolist()


def _uneven(load: Any) -> float:
    return round(float(imbalance(load, _ONE_LAYER)), 4)


def _added(counts: Any, layer: Any = 0, **options: Any) -> list[list[list[int]]]:
    window = LoadWindow(1, 4, 2)
    window.add(layer, counts, **({"training": True} | options))
    return window.load().tolist()


def _left_by_accelerator(counts: Tensor) -> object:
    """What `load` says of counts that `add` did not wait for."""
    window = LoadWindow(1, 4, 2)
    window.name_layers(["blocks.0.moe"])
    window.add(0, torch.zeros(4), training=True)
    window._counts[0, 0] = marked(counts)
    return window.load()


def _of_file(folder: Path, values: Any) -> str:
    """The imbalance after `distplb plan`."""
    np.save(folder / "load.npy", values)
    options = ("--gpus-per-node", 2, "--engine", "reference", "--json")
    return command("plan", folder / "load.npy", *options, show=lambda told: json.loads(told)["all_layers"]["after"])


def _of_own_trace(folder: Path) -> list[list[int]]:
    Trace([[[900, 100, 500, 500]]], (_ONE_LAYER,), [0], [7]).save(folder / "trace.npz")
    return _planned(np.load(folder / "trace.npz")["load"])


def _recorded(folder: Path, load: Any) -> object:
    with TraceWriter(folder / "trace") as writer:
        writer.add(load, _ONE_LAYER, [7])
    return Trace.read(folder / "trace").load.tolist()


CASES: list[Case] = [
    Case(
        "plan([[9, 5, 1, 5]], Topology(1, 2)), a list",
        "[[0, 2, 1, 3]]",
        lambda _: _planned([[9, 5, 1, 5]]),
    ),
    Case(
        "plan, the same as uint16 of NumPy",
        "[[0, 2, 1, 3]]",
        lambda _: _planned(np.array([[9, 5, 1, 5]], dtype="u2")),
    ),
    Case(
        "plan, the same as uint32 of torch",
        "[[0, 2, 1, 3]]",
        lambda _: _planned(torch.tensor([[9, 5, 1, 5]], dtype=torch.uint32)),
    ),
    Case(
        "plan, the same as uint64 of torch",
        "[[0, 2, 1, 3]]",
        lambda _: _planned(torch.tensor([[9, 5, 1, 5]], dtype=torch.uint64)),
    ),
    Case(
        "plan, the same as big-endian int16",
        "[[0, 2, 1, 3]]",
        lambda _: _planned(np.array([[9, 5, 1, 5]], dtype=">i2")),
    ),
    Case(
        "plan, the same as bfloat16",
        "[[0, 2, 1, 3]]",
        lambda _: _planned(torch.tensor([[9, 5, 1, 5]], dtype=torch.bfloat16)),
    ),
    Case(
        "plan, the same as float16 of NumPy",
        "[[0, 2, 1, 3]]",
        lambda _: _planned(np.array([[9, 5, 1, 5]], dtype="f2")),
    ),
    Case(
        "plan, the same as a list of tensors, one a layer",
        "[[0, 2, 1, 3]]",
        lambda _: _planned([torch.tensor([9, 5, 1, 5])]),
    ),
    Case(
        "plan, the same as a tensor with `requires_grad`",
        "[[0, 2, 1, 3]]",
        lambda _: _planned(torch.tensor([[9.0, 5, 1, 5]], requires_grad=True)),
    ),
    Case(
        'plan of `np.load("trace.npz")["load"]`, which a trace keeps as uint16',
        "[[0, 1, 2, 3]]",
        lambda folder: _of_own_trace(folder),
    ),
    Case(
        "distplb plan load.npy, uint16: the imbalance after it",
        "1.0",
        lambda folder: _of_file(folder, np.array([[9, 5, 1, 5]], dtype="u2")),
    ),
    Case(
        "distplb plan load.npy, float32: the imbalance after it",
        "1.0",
        lambda folder: _of_file(folder, np.array([[9, 5, 1, 5]], dtype="f4")),
    ),
    Case(
        "imbalance of bools, a token each",
        "1.3333",
        lambda _: _uneven([[True, True, False, True]]),
    ),
    Case(
        "imbalance of bfloat16 up to 256",
        "1.3333",
        lambda _: _uneven(torch.tensor([[256, 0, 128, 0]], dtype=torch.bfloat16)),
    ),
    Case(
        "imbalance of bfloat16 with 300",
        (
            "refused: load has 300.0 for expert 0 of layer 0 (1 such); counts must be exact: torch.bfloat16 has "
            "every whole number up to 256 only, and a larger one may be rounded; count in int64"
        ),
        lambda _: _uneven(torch.tensor([[300, 0, 128, 0]], dtype=torch.bfloat16)),
    ),
    Case(
        "imbalance of float16 with 4,000",
        (
            "refused: load has 4000.0 for expert 0 of layer 0 (1 such); counts must be exact: torch.float16 has "
            "every whole number up to 2048 only, and a larger one may be rounded; count in int64"
        ),
        lambda _: _uneven(np.array([[4000, 0, 128, 0]], dtype="f2")),
    ),
    Case(
        "imbalance of float32 with 2^24 + 2",
        (
            "refused: load has 16777218.0 for expert 0 of layer 0 (1 such); counts must be exact: torch.float32 "
            "has every whole number up to 16777216 only, and a larger one may be rounded; count in int64"
        ),
        lambda _: _uneven(torch.tensor([[2.0**24 + 2, 0, 1, 0]])),
    ),
    Case(
        "imbalance of float64 with 2^53 + 2",
        (
            "refused: load has 9007199254740994.0 for expert 0 of layer 0 (1 such); counts must be exact: "
            "torch.float64 has every whole number up to 9007199254740992 only, and a larger one may be rounded; "
            "count in int64"
        ),
        lambda _: _uneven([[2.0**53 + 2, 0, 1, 0]]),
    ),
    Case(
        "imbalance([[.5, .5, .5, 1.5]]), of weights",
        "1.3333",
        lambda _: _uneven([[0.5, 0.5, 0.5, 1.5]]),
    ),
    Case(
        "plan([[.4, .3, .2, .1]]), of weights",
        "[[0, 3, 1, 2]]",
        lambda _: _planned([[0.4, 0.3, 0.2, 0.1]]),
    ),
    Case(
        "the same with a price of moves, which is in tokens",
        (
            "refused: load has 0.4 for expert 0 of layer 0 (4 such); counts must be whole tokens: multiply "
            "frequencies by the tokens they stand for, and of means over steps pass the sums (mean × steps)"
        ),
        lambda _: plan(
            [[0.4, 0.3, 0.2, 0.1]],
            Topology(1, 2),
            current=Placement.contiguous(1, 4, 2),
            move_price=1.0,
            engine="reference",
        ),
    ),
    Case(
        "plan with NaN",
        (
            "refused: load has nan for expert 1 of layer 0 (1 such); counts must be finite: check the counter "
            "that made them"
        ),
        lambda _: _planned([[9.0, float("nan"), 1.0, 5.0]]),
    ),
    Case(
        "plan with an infinite count",
        (
            "refused: load has inf for expert 2 of layer 0 in step 1 (1 such); counts must be finite: check the "
            "counter that made them"
        ),
        lambda _: _planned([[[9.0, 5.0, 1.0, 5.0]], [[9.0, 5.0, float("inf"), 5.0]]]),
    ),
    Case(
        "plan with a negative count",
        (
            "refused: load has -1 for expert 2 of layer 0 (1 such); counts must be non-negative: check the "
            "counter that made them"
        ),
        lambda _: _planned([[9, 5, -1, 5]]),
    ),
    Case(
        "plan of an int32 counter that overflowed",
        (
            "refused: load has -1794967296 for expert 2 of layer 0 (1 such); counts must be non-negative: a "
            "32-bit counter that overflowed shows 2500000000 so; count in int64"
        ),
        lambda _: _planned(np.array([[9, 5, 2_500_000_000 - 2**32, 5]], dtype="i4")),
    ),
    Case(
        "plan of an int16 counter that overflowed",
        (
            "refused: load has -25536 for expert 2 of layer 0 (1 such); counts must be non-negative: a 16-bit "
            "counter that overflowed shows 40000 so; count in int64"
        ),
        lambda _: _planned(np.array([[9, 5, 40_000 - 2**16, 5]], dtype="i2")),
    ),
    Case(
        "plan of uint64 with 2^63",
        (
            "refused: load has 9223372036854775808 for expert 0 of layer 0 (1 such); counts must be below 2^63: "
            "check the counter that made them"
        ),
        lambda _: _planned(np.array([[2**63, 1, 1, 1]], dtype="u8")),
    ),
    Case(
        "plan of more than 2^48 tokens in a layer",
        "refused: load has 2.81e+14 tokens in layer 0; 2^48 on each rank is the most that can be added up",
        lambda _: _planned([[2**47, 2**47, 1, 1]]),
    ),
    Case(
        "plan of [experts]",
        "refused: load has shape (4,); pass [layers, experts] or [steps, layers, experts], none empty",
        lambda _: _planned([9, 5, 1, 5]),
    ),
    Case(
        "plan of no steps",
        "refused: load has shape (0, 1, 4); pass [layers, experts] or [steps, layers, experts], none empty",
        lambda _: _planned(torch.zeros(0, 1, 4)),
    ),
    Case(
        "plan of rows of different lengths",
        "refused: load[0] is a list of 4, load[1] is a list of 3; pass lists of equal length",
        lambda _: _planned([[9, 5, 1, 5], [9, 5, 1]]),
    ),
    Case(
        "plan of texts",
        "refused: load holds text, such as '9'; pass counts as integers",
        lambda _: _planned([["9", "5", "1", "5"]]),
    ),
    Case(
        "plan of a list with None",
        "refused: load is an array of objects, None at [0, 2]; pass counts as integers",
        lambda _: _planned([[9, 5, None, 5]]),
    ),
    Case(
        "plan of complex numbers",
        "refused: load has dtype torch.complex64; pass counts as integers",
        lambda _: _planned(torch.ones(1, 4, dtype=torch.complex64)),
    ),
    Case(
        "plan of a sparse tensor",
        "refused: load has the layout torch.sparse_coo; pass load.to_dense()",
        lambda _: _planned(torch.eye(4).to_sparse()),
    ),
    Case(
        "plan of a tensor on the device meta",
        "refused: load is on the device meta, which keeps no values; pass the counts themselves",
        lambda _: _planned(torch.ones(1, 4, device="meta")),
    ),
    Case(
        "plan of a masked array",
        "refused: load is masked in 1 of 4 places; pass load.filled(0)",
        lambda _: _planned(np.ma.masked_array([[9, 5, 1, 5]], mask=[[0, 1, 0, 0]])),
    ),
    Case(
        "plan of a dict",
        "refused: load is a dict; pass a tensor, an array of NumPy or nested lists, of numbers",
        lambda _: _planned({"moe": [9, 5, 1, 5]}),
    ),
    Case(
        'plan("load.npy", ...), a path',
        "refused: load is 'load.npy'; pass a tensor, an array of NumPy or nested lists, of numbers",
        lambda _: _planned("load.npy"),
    ),
    Case(
        "lower_bound of uint16",
        "[1.0]",
        lambda _: lower_bound(np.array([[9, 5, 1, 5]], dtype="u2"), _TWO, 4).tolist(),
    ),
    Case(
        "window.add(0, [9, 5, 1, 5]), a list",
        "[[[9, 5, 1, 5]]]",
        lambda _: _added([9, 5, 1, 5]),
    ),
    Case(
        "window.add of torch.histc, float32",
        "[[[1, 2, 0, 1]]]",
        lambda _: _added(torch.histc(torch.tensor([0.0, 1, 1, 3]), 4, 0, 3)),
    ),
    Case(
        "window.add of uint16",
        "[[[9, 5, 1, 5]]]",
        lambda _: _added(np.array([9, 5, 1, 5], dtype="u2")),
    ),
    Case(
        "window.add of shares of tokens",
        (
            "refused: LoadWindow.add: layer 0 has 0.699999988079071 for expert 0 (4 such); counts must be whole "
            "tokens: multiply frequencies by the tokens they stand for, and of means over steps pass the sums "
            "(mean × steps)"
        ),
        lambda _: _added(torch.tensor([0.7, 0.1, 0.1, 0.1])),
    ),
    Case(
        "window.add with NaN",
        (
            "refused: LoadWindow.add: layer 0 has nan for expert 2 (1 such); counts must be finite: check the "
            "counter that made them"
        ),
        lambda _: _added(torch.tensor([9.0, 5, float("nan"), 5])),
    ),
    Case(
        "window.add of NaN on an accelerator, told by window.load()",
        (
            "refused: LoadWindow: layer 'blocks.0.moe' has a number of torch.float32 that is no whole one from "
            "0 to 16777216 for expert 2 in step 0 (1 such); counts must be whole tokens, and torch.float32 "
            "counts to 16777216 only: check the counter that made them, or count in int64"
        ),
        lambda _: _left_by_accelerator(torch.tensor([9.0, 5, float("nan"), 5])),
    ),
    Case(
        "window.add of -3 on an accelerator, told by window.load()",
        (
            "refused: LoadWindow: layer 'blocks.0.moe' has -3 for expert 2 in step 0 (1 such); counts must be "
            "non-negative: check the counter that made them"
        ),
        lambda _: _left_by_accelerator(torch.tensor([9, 5, -3, 5])),
    ),
    Case(
        "window.add of [1, experts]",
        "refused: LoadWindow.add: counts has shape (1, 4); pass [4], one for each of the router's outputs",
        lambda _: _added(torch.ones(1, 4)),
    ),
    Case(
        "window.add of rows of different lengths",
        "refused: LoadWindow.add: counts[0] is a list of 2, counts[1] is a list of 1; pass lists of equal length",
        lambda _: _added([[9, 5], [1]]),
    ),
    Case(
        "window.add for layer 1 of one",
        "refused: LoadWindow.add: layer is 1; pass an index in [0, 1)",
        lambda _: _added([9, 5, 1, 5], layer=1),
    ),
    Case(
        'window.add for layer "0"',
        "refused: LoadWindow.add: layer is '0'; pass an index in [0, 1)",
        lambda _: _added([9, 5, 1, 5], layer="0"),
    ),
    Case(
        "window.add for layer np.int64(0)",
        "[[[9, 5, 1, 5]]]",
        lambda _: _added([9, 5, 1, 5], layer=np.int64(0)),
    ),
    Case(
        "Trace of float32, whole numbers",
        "[[[9, 5, 1, 5]]]",
        lambda _: Trace(torch.tensor([[[9.0, 5, 1, 5]]]), (_ONE_LAYER,), [0], [7]).load.tolist(),
    ),
    Case(
        "Trace of fractions, of a layer that has a name",
        (
            "refused: Trace: load has 9.5 for expert 0 of layer 'moe' in step 0 (1 such); counts must be whole "
            "tokens: multiply frequencies by the tokens they stand for, and of means over steps pass the sums "
            "(mean × steps)"
        ),
        lambda _: Trace([[[9.5, 5, 1, 5]]], (_ONE_LAYER,), [0], [7], ("moe",)),
    ),
    Case(
        "TraceWriter.add of a list",
        "[[[9, 5, 1, 5]]]",
        lambda folder: _recorded(folder, [[[9, 5, 1, 5]]]),
    ),
    Case(
        "TraceWriter.add of a negative count",
        (
            "refused: load has -1 for expert 2 of layer 0 in step 0 (1 such); counts must be non-negative: "
            "check the counter that made them"
        ),
        lambda folder: _recorded(folder, [[[9, 5, -1, 5]]]),
    ),
    Case(
        "balanced_packing of fractions, which weights may be",
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
            "refused: weight has -5 for item 3 of row 0 (1 such); counts must be non-negative: check the "
            "counter that made them"
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
            "refused: weight has nan for expert 2 of layer 0 (1 such); counts must be finite: check the counter "
            "that made them"
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
        "refused: Topology: gpus_per_node is 8.0; pass a whole number of at least 1",
        lambda _: Topology(1, 8.0),  # type: ignore[arg-type]
    ),
    Case(
        "Topology(True, 8)",
        "refused: Topology: num_nodes is True; pass a whole number of at least 1",
        lambda _: Topology(True, 8),
    ),
    Case(
        "plan(num_slots=torch.tensor(6))",
        "[[0, 1, 2, 0, 2, 3]]",
        lambda _: _planned([[8, 1, 2, 1]], num_slots=torch.tensor(6)),
    ),
    Case(
        "plan(num_slots=6.0)",
        "refused: num_slots is 6.0; pass a whole number",
        lambda _: _planned([[8, 1, 2, 1]], num_slots=6.0),
    ),
    Case(
        "plan(seed=True)",
        "refused: seed is True; pass a whole number",
        lambda _: _planned([[8, 1, 2, 1]], seed=True),
    ),
    Case(
        'plan(comm="nccl")',
        (
            "refused: comm is 'nccl'; pass a communicator, such as TorchComm(group) of distplb.comm.torchdist, "
            "or None for this process alone"
        ),
        lambda _: _planned([[8, 1, 2, 1]], comm="nccl"),
    ),
    Case(
        "plan(load, (1, 2)), a tuple for the topology",
        "refused: topology is a tuple; pass a Topology, such as Topology.from_env()",
        lambda _: plan([[8, 1, 2, 1]], (1, 2)),  # type: ignore[arg-type]
    ),
    Case(
        "imbalance(load, table), a table for the placement",
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
        "refused: Spread: share_after is 2.5; pass a whole number",
        lambda _: Spread(1, 2.5),  # type: ignore[arg-type]
    ),
    Case(
        "TimeCurve.time of half a token",
        (
            "refused: load has 0.5 for place [0] (1 such); counts must be whole tokens: multiply frequencies by "
            "the tokens they stand for, and of means over steps pass the sums (mean × steps)"
        ),
        lambda _: TimeCurve((0, 10), (0, 700)).time([0.5]),  # type: ignore[arg-type]
    ),
]
