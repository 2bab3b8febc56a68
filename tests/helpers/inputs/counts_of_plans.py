"""Types and values of counts, as `plan` and `imbalance` take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distplb import (
    Placement,
    Topology,
    Trace,
    imbalance,
    plan,
)
from inputs.case import Case, command

__all__ = ["CASES", "ONE_LAYER", "TWO", "planned"]


TWO = Topology(1, 2)


ONE_LAYER = Placement.contiguous(1, 4, 2)


def planned(load: Any, **options: Any) -> list[list[int]]:
    return plan(load, TWO, engine="reference", **options).expert_of_slot.tolist()


def _imbalance(load: Any) -> float:
    return round(float(imbalance(load, ONE_LAYER)), 4)


def _of_file(folder: Path, values: Any) -> str:
    """Return the imbalance after `distplb plan`."""
    np.save(folder / "load.npy", values)
    options = ("--gpus-per-node", 2, "--engine", "reference", "--json")
    return command("plan", folder / "load.npy", *options, show=lambda text: json.loads(text)["all_layers"]["after"])


def _of_own_trace(folder: Path) -> list[list[int]]:
    Trace([[[900, 100, 500, 500]]], (ONE_LAYER,), [0], [7]).save(folder / "trace.npz")
    return planned(np.load(folder / "trace.npz")["load"])


CASES: list[Case] = [
    Case(
        "plan([[9, 5, 1, 5]], Topology(1, 2)), a list",
        "[[0, 2, 1, 3]]",
        lambda _: planned([[9, 5, 1, 5]]),
    ),
    Case(
        "plan, the same as uint16 in NumPy",
        "[[0, 2, 1, 3]]",
        lambda _: planned(np.array([[9, 5, 1, 5]], dtype="u2")),
    ),
    Case(
        "plan, the same as uint32 in torch",
        "[[0, 2, 1, 3]]",
        lambda _: planned(torch.tensor([[9, 5, 1, 5]], dtype=torch.uint32)),
    ),
    Case(
        "plan, the same as uint64 in torch",
        "[[0, 2, 1, 3]]",
        lambda _: planned(torch.tensor([[9, 5, 1, 5]], dtype=torch.uint64)),
    ),
    Case(
        "plan, the same as big-endian int16",
        "[[0, 2, 1, 3]]",
        lambda _: planned(np.array([[9, 5, 1, 5]], dtype=">i2")),
    ),
    Case(
        "plan, the same as bfloat16",
        "[[0, 2, 1, 3]]",
        lambda _: planned(torch.tensor([[9, 5, 1, 5]], dtype=torch.bfloat16)),
    ),
    Case(
        "plan, the same as float16 in NumPy",
        "[[0, 2, 1, 3]]",
        lambda _: planned(np.array([[9, 5, 1, 5]], dtype="f2")),
    ),
    Case(
        "plan, the same as a list of tensors, one per layer",
        "[[0, 2, 1, 3]]",
        lambda _: planned([torch.tensor([9, 5, 1, 5])]),
    ),
    Case(
        "plan, the same as a tensor with `requires_grad`",
        "[[0, 2, 1, 3]]",
        lambda _: planned(torch.tensor([[9.0, 5, 1, 5]], requires_grad=True)),
    ),
    Case(
        'plan of `np.load("trace.npz")["load"]`, which a trace keeps as uint16',
        "[[0, 1, 2, 3]]",
        lambda folder: _of_own_trace(folder),
    ),
    Case(
        "distplb plan load.npy, uint16: imbalance after",
        "1.0",
        lambda folder: _of_file(folder, np.array([[9, 5, 1, 5]], dtype="u2")),
    ),
    Case(
        "distplb plan load.npy, float32: imbalance after",
        "1.0",
        lambda folder: _of_file(folder, np.array([[9, 5, 1, 5]], dtype="f4")),
    ),
    Case(
        "imbalance of bools, one token each",
        "1.3333",
        lambda _: _imbalance([[True, True, False, True]]),
    ),
    Case(
        "imbalance of bfloat16 up to 256",
        "1.3333",
        lambda _: _imbalance(torch.tensor([[256, 0, 128, 0]], dtype=torch.bfloat16)),
    ),
    Case(
        "imbalance of bfloat16 with 300",
        (
            "refused: load has 300.0 for expert 0 of layer 0 (1 such value); counts must be exact: torch.bfloat16 "
            "represents every integer only up to 256, and may round larger ones; count in int64"
        ),
        lambda _: _imbalance(torch.tensor([[300, 0, 128, 0]], dtype=torch.bfloat16)),
    ),
    Case(
        "imbalance of float16 with 4,000",
        (
            "refused: load has 4000.0 for expert 0 of layer 0 (1 such value); counts must be exact: torch.float16 "
            "represents every integer only up to 2048, and may round larger ones; count in int64"
        ),
        lambda _: _imbalance(np.array([[4000, 0, 128, 0]], dtype="f2")),
    ),
    Case(
        "imbalance of float32 with 2^24 + 2",
        (
            "refused: load has 16777218.0 for expert 0 of layer 0 (1 such value); counts must be exact: "
            "torch.float32 represents every integer only up to 16777216, and may round larger ones; count in int64"
        ),
        lambda _: _imbalance(torch.tensor([[2.0**24 + 2, 0, 1, 0]])),
    ),
    Case(
        "imbalance of float64 with 2^53 + 2",
        (
            "refused: load has 9007199254740994.0 for expert 0 of layer 0 (1 such value); counts must be exact: "
            "torch.float64 represents every integer only up to 9007199254740992, and may round larger ones; count "
            "in int64"
        ),
        lambda _: _imbalance([[2.0**53 + 2, 0, 1, 0]]),
    ),
    Case(
        "imbalance([[.5, .5, .5, 1.5]]), weights",
        "1.3333",
        lambda _: _imbalance([[0.5, 0.5, 0.5, 1.5]]),
    ),
    Case(
        "plan([[.4, .3, .2, .1]]), weights",
        "[[0, 3, 1, 2]]",
        lambda _: planned([[0.4, 0.3, 0.2, 0.1]]),
    ),
    Case(
        "the same with a price of moves, which is in tokens",
        (
            "refused: load has 0.4 for expert 0 of layer 0 (4 such values); counts must be whole tokens: multiply "
            "frequencies by the number of tokens, and pass sums over steps instead of means (mean × steps)"
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
            "refused: load has nan for expert 1 of layer 0 (1 such value); counts must be finite: check the "
            "counter that produced them"
        ),
        lambda _: planned([[9.0, float("nan"), 1.0, 5.0]]),
    ),
    Case(
        "plan with an infinite count",
        (
            "refused: load has inf for expert 2 of layer 0 in step 1 (1 such value); counts must be finite: check "
            "the counter that produced them"
        ),
        lambda _: planned([[[9.0, 5.0, 1.0, 5.0]], [[9.0, 5.0, float("inf"), 5.0]]]),
    ),
    Case(
        "plan with a negative count",
        (
            "refused: load has -1 for expert 2 of layer 0 (1 such value); counts must be non-negative: check the "
            "counter that produced them"
        ),
        lambda _: planned([[9, 5, -1, 5]]),
    ),
    Case(
        "plan of an int32 counter that overflowed",
        (
            "refused: load has -1794967296 for expert 2 of layer 0 (1 such value); counts must be non-negative: an "
            "overflowed 32-bit counter shows this for 2500000000; count in int64"
        ),
        lambda _: planned(np.array([[9, 5, 2_500_000_000 - 2**32, 5]], dtype="i4")),
    ),
    Case(
        "plan of an int16 counter that overflowed",
        (
            "refused: load has -25536 for expert 2 of layer 0 (1 such value); counts must be non-negative: an "
            "overflowed 16-bit counter shows this for 40000; count in int64"
        ),
        lambda _: planned(np.array([[9, 5, 40_000 - 2**16, 5]], dtype="i2")),
    ),
    Case(
        "plan of uint64 with 2^63",
        (
            "refused: load has 9223372036854775808 for expert 0 of layer 0 (1 such value); counts must be below "
            "2^63: check the counter that produced them"
        ),
        lambda _: planned(np.array([[2**63, 1, 1, 1]], dtype="u8")),
    ),
    Case(
        "plan of more than 2^48 tokens in a layer",
        "refused: load has 2.81e+14 tokens in layer 0; pass fewer than 2^48 tokens per layer on each rank",
        lambda _: planned([[2**47, 2**47, 1, 1]]),
    ),
    Case(
        "plan of shape [experts]",
        "refused: load has shape (4,); pass [layers, experts] or [steps, layers, experts], with no empty dim",
        lambda _: planned([9, 5, 1, 5]),
    ),
    Case(
        "plan of zero steps",
        ("refused: load has shape (0, 1, 4); pass [layers, experts] or [steps, layers, experts], with no empty dim"),
        lambda _: planned(torch.zeros(0, 1, 4)),
    ),
    Case(
        "plan of rows of different lengths",
        "refused: load[0] is a list of length 4, load[1] is a list of length 3; pass lists of equal length",
        lambda _: planned([[9, 5, 1, 5], [9, 5, 1]]),
    ),
    Case(
        "plan of strings",
        "refused: load holds text, such as '9'; pass counts as integers",
        lambda _: planned([["9", "5", "1", "5"]]),
    ),
    Case(
        "plan of a list with None",
        "refused: load is an array of objects, None at [0, 2]; pass counts as integers",
        lambda _: planned([[9, 5, None, 5]]),
    ),
    Case(
        "plan of complex numbers",
        "refused: load has dtype torch.complex64; pass counts as integers",
        lambda _: planned(torch.ones(1, 4, dtype=torch.complex64)),
    ),
    Case(
        "plan of a sparse tensor",
        "refused: load has the layout torch.sparse_coo; pass load.to_dense()",
        lambda _: planned(torch.eye(4).to_sparse()),
    ),
    Case(
        "plan of a tensor on the device meta",
        "refused: load is on the meta device, which holds no values; pass real counts",
        lambda _: planned(torch.ones(1, 4, device="meta")),
    ),
    Case(
        "plan of a masked array",
        "refused: load is masked in 1 of 4 places; pass load.filled(0)",
        lambda _: planned(np.ma.masked_array([[9, 5, 1, 5]], mask=[[0, 1, 0, 0]])),
    ),
    Case(
        "plan of a dict",
        "refused: load is a dict; pass a tensor, a NumPy array or nested lists of numbers",
        lambda _: planned({"moe": [9, 5, 1, 5]}),
    ),
    Case(
        'plan("load.npy", ...), a path',
        "refused: load is 'load.npy'; pass a tensor, a NumPy array or nested lists of numbers",
        lambda _: planned("load.npy"),
    ),
]
