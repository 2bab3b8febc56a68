"""Files of arrays, and dumps that other projects write."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inputs.case import Case
from inputs.file_cases import array, counts_case, placement_text

__all__ = ["CASES"]


def _archive(**arrays: object) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **{name: np.array(one) for name, one in arrays.items()})


def _tensors(values: object) -> Callable[[Path], object]:
    return lambda path: torch.save(values, path)


def _safetensors(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


CASES: list[Case] = [
    counts_case(
        ".npy of 4 dims",
        "refused: a.npy has shape (1, 1, 1, 2), 4 dims; sum over the ranks, or over any dim that is not steps, "
        "layers or experts, and pass counts as [layers, experts] or [steps, layers, experts]",
        "a.npy",
        array([[[[5, 3]]]]),
    ),
    counts_case(
        ".npy of float16, 4096",
        "refused: a.npy has 4096.0 at [0, 0] (1 such value); counts must be at most 2048 in float16, which rounds "
        "larger ones: use int64",
        "a.npy",
        array([[4096, 1]], np.float16),
    ),
    counts_case(".npy of uint64", "[[9223372036854775807, 1]], layers: 0", "a.npy", array([[2**63 - 1, 1]], np.uint64)),
    counts_case(
        ".npz with logical_count and a rank",
        "[[[5, 3]]], layers: 0",
        "a.npz",
        _archive(logical_count=[[[5, 3]]], rank=0),
    ),
    counts_case(
        "SGLang's .pt of mode stat",
        "[[[5, 3]]], layers: 0",
        "a.pt",
        _tensors({"rank": 0, "logical_count": torch.tensor([[[5, 3]]])}),
    ),
    counts_case(
        "SGLang's .pt of mode per_pass",
        "refused: a.pt: 'records' holds single passes and ranks, as SGLang's mode per_pass writes them: record in "
        "mode stat; pass [layers][experts] or [steps][layers][experts] as 'load'",
        "a.pt",
        _tensors({"records": [], "last_physical_to_logical_map": torch.tensor([[0]])}),
    ),
    counts_case(
        ".pt of torch.uint16", "[[60000, 3]], layers: 0", "a.pt", _tensors(torch.tensor([[60000, 3]]).to(torch.uint16))
    ),
    counts_case(
        ".pt with a Fraction",
        (
            "refused: a.pt holds fractions.Fraction, and unpickling that can run code; pass a torch.save file of "
            "tensors or lists and dicts of them, or a .npy file"
        ),
        "a.pt",
        _tensors({"load": Fraction(1, 2)}),
    ),
    counts_case(
        "a pickle named .pt",
        (
            "refused: a.pt is not an archive of torch.save in torch 1.6 or later, and a pickle is not read because "
            "it can run code; pass a torch.save file of tensors, or a .npy file"
        ),
        "a.pt",
        pickle.dumps({"load": [[5, 3]]}),
    ),
    counts_case(
        "JSON: logical_count", "[[5, 3], [1, 7]], layers: 0, 1", "a.json", '{"logical_count": [[5, 3], [1, 7]]}'
    ),
    counts_case(
        "JSON: expert_load of one layer",
        "refused: a.json has dtype int64 and shape (2,); pass counts as [layers, experts] or [steps, layers, "
        "experts], with no empty dim",
        "a.json",
        '{"expert_load": [5, 3]}',
    ),
    counts_case(
        "JSON: expert_load of rank 3",
        "refused: a.json has 'rank' next to 'expert_load', so it belongs to one rank; sum over all ranks",
        "a.json",
        '{"rank": 3, "expert_load": [[5, 3]]}',
    ),
    counts_case(
        "JSON: vLLM's expert_load_window",
        "refused: a.json: 'expert_load_window' is a ring buffer of one rank's tokens on physical experts: sum over "
        "the ranks and replicas; pass [layers][experts] or [steps][layers][experts] as 'load'",
        "a.json",
        '{"expert_load_window": [[[5, 3]]]}',
    ),
    counts_case(
        "JSON: load_history of ranks",
        "refused: a.json has shape (1, 2, 1, 2), 4 dims; sum over the ranks, or over any dim that is not steps, "
        "layers or experts, and pass counts as [layers, experts] or [steps, layers, experts]",
        "a.json",
        '{"load_history": [[[[5, 3]], [[1, 7]]]]}',
    ),
    counts_case(
        "JSON: a list of objects",
        "[[5, 3]], layers: 0",
        "a.json",
        '[{"layer": 0, "expert": 0, "tokens": 5}, {"layer": 0, "expert": 1, "tokens": 3}]',
    ),
    counts_case(
        "JSON: an object of objects",
        "refused: a.json: '0' is an object, as pandas writes it, and may be a layer or an expert; pass a list of "
        "counts for each layer",
        "a.json",
        '{"0": {"0": 5, "1": 3}}',
    ),
    counts_case(
        "JSON: a layer twice",
        "refused: a.json cannot be read as JSON (an object has the name 'x' twice)",
        "a.json",
        '{"x": [5, 3], "x": [1, 7]}',
    ),
    counts_case(
        "JSON: a placement",
        "refused: a.json: 'expert_of_slot' is a placement, which --current and Placement.load read; pass "
        "[layers][experts] or [steps][layers][experts] as 'load'",
        "a.json",
        placement_text(),
    ),
    counts_case("YAML", "[[5, 3], [1, 7]], layers: x, y", "a.yaml", "x: [5, 3]\ny: [1, 7]\n"),
    counts_case(
        "YAML: 010, which some readers take as 8",
        (
            "refused: a.yaml cannot be read as YAML (line 1 has '010', which is not a plain number, text, list or "
            "object)"
        ),
        "a.yaml",
        "x: [010, 3]\n",
    ),
    counts_case(
        ".safetensors of U16",
        "[[60000, 3]], layers: 0",
        "a.safetensors",
        _safetensors({"load": {"dtype": "U16", "shape": [1, 2], "data_offsets": [0, 4]}}, b"\x60\xea\x03\x00"),
    ),
    counts_case(
        "TensorRT-LLM's .safetensors of one rank",
        "refused: a.safetensors has names such as '100_3', as in TensorRT-LLM's statistics of one rank; sum over "
        "the files of all ranks, and pass [iterations, layers, experts] as 'load'",
        "a.safetensors",
        _safetensors({"100_3": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    ),
    counts_case(
        ".safetensors with a wrong header",
        (
            "refused: a.safetensors: the header puts tensor 'load' of shape [1048576, 64] at bytes 0 to 536870912 "
            "of 8; it is damaged or cut off: write it again"
        ),
        "a.safetensors",
        _safetensors({"load": {"dtype": "I64", "shape": [1 << 20, 64], "data_offsets": [0, 1 << 29]}}, bytes(8)),
    ),
]
