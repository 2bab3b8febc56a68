"""Files of counts and placements."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distplb import Placement
from distplb.records.loads import read_loads
from inputs.case import Case, command

__all__ = ["CASES"]

Content = str | bytes | Callable[[Path], object]


def _written(folder: Path, name: str, content: Content) -> Path:
    path = folder / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _counts(given: str, answer: str, name: str, content: Content) -> Case:
    """A file read as counts: the load, and the names of the layers."""

    def run(folder: Path) -> str:
        found = read_loads(_written(folder, name, content))
        return f"{found.load.tolist()} of {', '.join(found.layers)}"

    return Case(given, answer, run)


def _placed(given: str, answer: str, name: str, content: Content, *names: Any, **sizes: int) -> Case:
    """A file read as a placement: the expert of each slot, experts and GPUs."""

    def run(folder: Path) -> str:
        found = Placement.load(_written(folder, name, content), *names, **sizes)
        return f"{found.expert_of_slot.tolist()}, {found.num_experts} experts, {found.num_gpus} GPUs"

    return Case(given, answer, run)


def _current(
    given: str, answer: str, name: str, content: Content, counts: str = "layer,0,1,2,3\nb,9,1,1,9\na,9,1,9,1\n"
) -> Case:
    """A file given as `--current`: the imbalance of the placement in force."""

    def run(folder: Path) -> str:
        load, current = _written(folder, "load.csv", counts), _written(folder, name, content)
        options = ("--gpus-per-node", 2, "--engine", "reference", "--json")
        return command("plan", load, "--current", current, *options, show=_before)

    return Case(given, answer, run)


def _before(text: str) -> str:
    return ", ".join(f"{row['layer']}: {row['before']:.2f}" for row in json.loads(text)["layers"])


def _array(values: object, dtype: object = np.int64) -> Callable[[Path], object]:
    return lambda path: np.save(path, np.array(values, dtype))


def _archive(**arrays: object) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **{name: np.array(one) for name, one in arrays.items()})


def _tensors(values: object) -> Callable[[Path], object]:
    return lambda path: torch.save(values, path)


def _safetensors(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


_PLACEMENT = {
    "format": "distplb.placement",
    "version": 1,
    "num_experts": 4,
    "num_gpus": 2,
    "expert_of_slot": {"a": [0, 2, 1, 3], "b": [3, 0, 1, 2]},
}
_ASCEND = {
    "moe_layer_count": 1,
    "layer_list": [
        {
            "layer_id": 0,
            "device_count": 2,
            "device_list": [{"device_id": 0, "device_expert": [2, 0]}, {"device_id": 1, "device_expert": [1, 2]}],
        }
    ],
}
_TRT = "initial_global_assignments:\n  3: [0, 1, 2, 0]\n  4: [2, 1, 0, 1]\nnum_slots: 4\n"


def _ours(**changed: object) -> str:
    return json.dumps(_PLACEMENT | changed)


# Tables.
_TABLES = [
    _counts("CSV: 0,1,2 above counts", "[[5, 3, 4], [1, 7, 1]] of 0, 1", "a.csv", "0,1,2\n5,3,4\n1,7,1\n"),
    _counts(
        "CSV: layer,1,2,3 above counts", "[[5, 3, 4], [1, 7, 1]] of x, y", "a.csv", "layer,1,2,3\nx,5,3,4\ny,1,7,1\n"
    ),
    _counts(
        "CSV: columns e0,e1,e10,e2, ...",
        "[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]] of 0",
        "a.csv",
        "e0,e1,e10,e2,e3,e4,e5,e6,e7,e8,e9\n0,1,10,2,3,4,5,6,7,8,9\n",
    ),
    _counts(
        "CSV: columns e0,e2",
        "refused: a.csv, line 1 has column 'e0' and 1 more, and none of number 1; pass a column for each expert",
        "a.csv",
        "e0,e2\n5,3\n",
    ),
    _counts(
        "CSV: columns layer_idx, 0, 1, total",
        "[[5, 3], [1, 7]] of 3, 4",
        "a.csv",
        "layer_idx,0,1,total\n3,5,3,8\n4,1,7,8\n",
    ),
    _counts(
        "CSV: a total that is none",
        "refused: a.csv, line 2: the experts have 8 tokens, and the total is 9; correct it, or leave the column out",
        "a.csv",
        "layer,0,1,total\n3,5,3,9\n",
    ),
    _counts(
        "CSV: a last row named total", "[[5, 3], [1, 7]] of x, y", "a.csv", "layer,0,1\nx,5,3\ny,1,7\ntotal,6,10\n"
    ),
    _counts(
        "CSV: columns rank, layer, 0, 1",
        "refused: a.csv, line 1: column 'rank' says that rows are of one rank each; add up the ranks, "
        "and pass a row for each layer",
        "a.csv",
        "rank,layer,0,1\n0,x,5,3\n1,x,1,7\n",
    ),
    _counts(
        "CSV: columns step, layer, 0, 1",
        "[[[5, 3], [1, 7]], [[4, 4], [2, 2]]] of x, y",
        "a.csv",
        "step,layer,0,1\n7,x,5,3\n7,y,1,7\n8,y,2,2\n8,x,4,4\n",
    ),
    _counts(
        "CSV: a step without one of the layers",
        "refused: a.csv has no row of layer 'y' in step 8; pass all layers of each step",
        "a.csv",
        "step,layer,0,1\n7,x,5,3\n7,y,1,7\n8,x,4,4\n",
    ),
    _counts(
        "CSV: columns layer, expert, count",
        "[[5, 3], [1, 7]] of 0, 1",
        "a.csv",
        "layer,expert,count\n0,0,5\n0,1,3\n1,1,7\n1,0,1\n",
    ),
    _counts(
        "CSV: the same without a count of 0",
        "refused: a.csv has no count of expert 0 in layer '1'; pass zeros too",
        "a.csv",
        "layer,expert,count\n0,0,5\n0,1,3\n1,1,7\n",
    ),
    _counts(
        "CSV: rows named expert_0, expert_1",
        "refused: a.csv: 'expert_0' names an expert where a layer is expected; pass a row for each layer "
        "and a column for each expert, of all ranks together",
        "a.csv",
        "expert_0,5,3\nexpert_1,1,7\n",
    ),
    _counts("CSV: pandas' index above it nothing", "[[5, 3], [1, 7]] of 0, 1", "a.csv", ",0,1\n0,5,3\n1,1,7\n"),
    _counts(
        "CSV: pandas' index and a column layer",
        "[[5, 3], [1, 7]] of x, y",
        "a.csv",
        "Unnamed: 0,layer,0,1\n0,x,5,3\n1,y,1,7\n",
    ),
    _counts(
        "CSV without a header: rows begin with 0, 1, 2",
        "refused: a.csv: the first column counts the rows from 0; put a header above it, 'layer,0,1,2' "
        "and so on if it is the number of the layer, '0,1,2' if it is a count",
        "a.csv",
        "0,5,3\n1,1,7\n2,4,4\n",
    ),
    _counts(
        "CSV of Excel: byte order mark, CRLF, empty columns and lines",
        "[[5, 3]] of x",
        "a.csv",
        "\ufefflayer,0,1,,\r\nx,5,3,,\r\n,,,,\r\n",
    ),
    _counts(
        "CSV: moe.0 and moe.1 before counts, the first of which are 0, 1, 2",
        "[[0, 1, 2], [4, 4, 1]] of moe.0, moe.1",
        "a.csv",
        "moe.0,0,1,2\nmoe.1,4,4,1\n",
    ),
    _counts(
        "CSV: moe,0,1,2 above counts",
        "refused: a.csv, line 1 has 'moe' and the numbers from 0 to 2, and may be a header or counts; name its "
        "first column 'layer' or 'step' if it is a header, else put one above it",
        "a.csv",
        "moe,0,1,2\nx,5,3,4\n",
    ),
    _counts(
        "CSV: columns epoch, layer, e0, e1",
        "refused: a.csv, line 1 has column 'epoch', which does not number an expert as 'e0' does; leave it "
        "out, or name it 'layer' or 'step' if it is that",
        "a.csv",
        "epoch,layer,e0,e1\n0,x,5,3\n",
    ),
    _counts(
        "CSV: columns layer, 0, 1, mean",
        "refused: a.csv, line 1 has column 'mean' beside experts that are numbered; leave it out, or name it "
        "'layer' or 'step' if it is that",
        "a.csv",
        "layer,0,1,mean\nx,5,3,4\n",
    ),
    _counts(
        "JSON: columns of pandas, each a list",
        "refused: a.json: 'layer' is what a column is named, and stands where a layer's name is expected; pass "
        "a list of counts for each layer, or rows with names of columns above them",
        "a.json",
        '{"layer": [0, 0], "expert": [0, 1], "count": [5, 3]}',
    ),
    _counts(
        "JSON: load of ep_rank 3",
        "refused: a.json has 'ep_rank' beside 'load', and is of one rank; add up all ranks",
        "a.json",
        '{"ep_rank": 3, "load": [[5, 3]]}',
    ),
    _counts(
        "JSON: a setting beside the layers",
        "refused: a.json: 'epoch' is 3 where a list of counts is expected; pass a list of counts for each "
        "layer, all as long, or name [steps][layers][experts] 'load' (it has 'epoch', 'x')",
        "a.json",
        '{"epoch": 3, "x": [5, 3]}',
    ),
    _counts(
        "YAML with a tag of Python",
        "refused: a.yaml is not YAML that can be read (line 1 has a tag, which is no plain number, text, list "
        "or object)",
        "a.yaml",
        "x: !!python/tuple [5, 3]\n",
    ),
    _counts(
        ".npz of one array without a name",
        "[[5, 3], [1, 7]] of 0, 1",
        "a.npz",
        lambda path: np.savez(path, np.array([[5, 3], [1, 7]])),
    ),
    _counts(".npy of bools, a token each", "[[1, 0]] of 0", "a.npy", _array([[1, 0]], bool)),
    _counts(
        ".pt of bools, a token each",
        "[[1, 0]] of 0",
        "a.pt",
        lambda path: torch.save(torch.tensor([[True, False]]), path),
    ),
    _counts("CSV of semicolons", "[[5, 3]] of x", "a.csv", "layer;0;1\nx;5;3\n"),
    _counts(
        "CSV of sep=; with 1.234.567 and 5,0", "[[1234567, 5]] of x", "a.csv", "sep=;\nlayer;0;1\nx;1.234.567;5,0\n"
    ),
    _counts(
        "CSV of semicolons with 5,0",
        "refused: a.csv has commas and semicolons; begin it with a line 'sep=;' that names what parts the cells",
        "a.csv",
        "layer;0;1\nx;5,0;3,0\n",
    ),
    _counts(
        'CSV: "1,234"',
        "refused: a.csv, line 2, column 2: '1,234' may be 1234, or 1 and 234 thousandths; write counts as digits alone",
        "a.csv",
        'layer,0,1\nx,"1,234",5\n',
    ),
    _counts('CSV: "1,234" and "1,234,567"', "[[1234, 1234567]] of x", "a.csv", 'layer,0,1\nx,"1,234","1,234,567"\n'),
    _counts(
        "CSV: 1.23E+05",
        "refused: a.csv, line 2, column 2: '1.23E+05' may be rounded; write counts as digits alone",
        "a.csv",
        "layer,0,1\nx,1.23E+05,5\n",
    ),
    _counts(
        "CSV: 0.5",
        "refused: a.csv, line 2, column 2: '0.5' is not whole; pass tokens, not shares or means of them",
        "a.csv",
        "layer,0,1\nx,0.5,0.5\n",
    ),
    _counts("TSV", "[[5, 3]] of x", "a.tsv", "layer\t0\t1\nx\t5\t3\n"),
    _counts(
        "TXT of numpy.savetxt",
        "[[5, 12]] of 0",
        "a.txt",
        "# by hand\n5.000000000000000000e+00 1.200000000000000000e+01\n",
    ),
    _counts(
        "an Excel workbook named .csv",
        "refused: a.csv is no text but a zip archive, such as an Excel workbook or a .npz: export it as "
        "CSV, or give it its suffix",
        "a.csv",
        b"PK\x03\x04\x14\x00",
    ),
    _counts(
        "a .csv saved as UTF-16",
        "refused: a.csv is no text but UTF-16: save it as UTF-8",
        "a.csv",
        "layer,0,1\nx,5,3\n".encode("utf-16"),
    ),
]

# Arrays and other people's dumps.
_DUMPS = [
    _counts(
        ".npy of 4 dims",
        "refused: a.npy has shape (1, 1, 1, 2), 4 dims; sum over the ranks, or whatever is beside steps, "
        "layers and experts, and pass counts, [layers, experts] or [steps, layers, experts]",
        "a.npy",
        _array([[[[5, 3]]]]),
    ),
    _counts(
        ".npy of float16, 4096",
        "refused: a.npy has 4096.0 at [0, 0] (1 such); counts must be at most 2048 in float16, which "
        "rounds others: use int64",
        "a.npy",
        _array([[4096, 1]], np.float16),
    ),
    _counts(".npy of uint64", "[[9223372036854775807, 1]] of 0", "a.npy", _array([[2**63 - 1, 1]], np.uint64)),
    _counts(
        ".npz of logical_count beside a rank", "[[[5, 3]]] of 0", "a.npz", _archive(logical_count=[[[5, 3]]], rank=0)
    ),
    _counts(
        "SGLang's .pt of mode stat",
        "[[[5, 3]]] of 0",
        "a.pt",
        _tensors({"rank": 0, "logical_count": torch.tensor([[[5, 3]]])}),
    ),
    _counts(
        "SGLang's .pt of mode per_pass",
        "refused: a.pt: 'records' is of single passes and ranks, as SGLang's mode per_pass writes: "
        "record in mode stat; pass [layers][experts] or [steps][layers][experts] as 'load'",
        "a.pt",
        _tensors({"records": [], "last_physical_to_logical_map": torch.tensor([[0]])}),
    ),
    _counts(".pt of torch.uint16", "[[60000, 3]] of 0", "a.pt", _tensors(torch.tensor([[60000, 3]]).to(torch.uint16))),
    _counts(
        ".pt with a Fraction",
        "refused: a.pt holds fractions.Fraction, and unpickling that can run code; pass torch.save of "
        "tensors, lists and dicts of them, or .npy",
        "a.pt",
        _tensors({"load": Fraction(1, 2)}),
    ),
    _counts(
        "a pickle named .pt",
        "refused: a.pt is no archive of torch.save, as torch 1.6 and later write; a pickle can run code "
        "and is not read: pass torch.save of tensors, or .npy",
        "a.pt",
        pickle.dumps({"load": [[5, 3]]}),
    ),
    _counts("JSON: logical_count", "[[5, 3], [1, 7]] of 0, 1", "a.json", '{"logical_count": [[5, 3], [1, 7]]}'),
    _counts(
        "JSON: expert_load of one layer",
        "refused: a.json has dtype int64 and shape (2,); pass counts, [layers, experts] or [steps, "
        "layers, experts], none empty",
        "a.json",
        '{"expert_load": [5, 3]}',
    ),
    _counts(
        "JSON: expert_load of rank 3",
        "refused: a.json has 'rank' beside 'expert_load', and is of one rank; add up all ranks",
        "a.json",
        '{"rank": 3, "expert_load": [[5, 3]]}',
    ),
    _counts(
        "JSON: vLLM's expert_load_window",
        "refused: a.json: 'expert_load_window' is a ring of one rank's tokens on physical experts: add "
        "up the ranks and the replicas; pass [layers][experts] or [steps][layers][experts] as 'load'",
        "a.json",
        '{"expert_load_window": [[[5, 3]]]}',
    ),
    _counts(
        "JSON: load_history of ranks",
        "refused: a.json has shape (1, 2, 1, 2), 4 dims; sum over the ranks, or whatever is beside "
        "steps, layers and experts, and pass counts, [layers, experts] or [steps, layers, experts]",
        "a.json",
        '{"load_history": [[[[5, 3]], [[1, 7]]]]}',
    ),
    _counts(
        "JSON: a list of objects",
        "[[5, 3]] of 0",
        "a.json",
        '[{"layer": 0, "expert": 0, "tokens": 5}, {"layer": 0, "expert": 1, "tokens": 3}]',
    ),
    _counts(
        "JSON: objects in an object",
        "refused: a.json: '0' is an object, as pandas writes them, and may be a layer or an expert; pass "
        "a list of counts for each layer",
        "a.json",
        '{"0": {"0": 5, "1": 3}}',
    ),
    _counts(
        "JSON: a layer twice",
        "refused: a.json is not JSON that can be read (an object names 'x' twice)",
        "a.json",
        '{"x": [5, 3], "x": [1, 7]}',
    ),
    _counts(
        "JSON: a placement",
        "refused: a.json: 'expert_of_slot' is a placement, which --current and Placement.load take; pass "
        "[layers][experts] or [steps][layers][experts] as 'load'",
        "a.json",
        _ours(),
    ),
    _counts("YAML", "[[5, 3], [1, 7]] of x, y", "a.yaml", "x: [5, 3]\ny: [1, 7]\n"),
    _counts(
        "YAML: 010, which is 8 to some",
        "refused: a.yaml is not YAML that can be read (line 1 has '010', which is no plain number, text, "
        "list or object)",
        "a.yaml",
        "x: [010, 3]\n",
    ),
    _counts(
        ".safetensors of U16",
        "[[60000, 3]] of 0",
        "a.safetensors",
        _safetensors({"load": {"dtype": "U16", "shape": [1, 2], "data_offsets": [0, 4]}}, b"\x60\xea\x03\x00"),
    ),
    _counts(
        "TensorRT-LLM's .safetensors of one rank",
        "refused: a.safetensors has names such as '100_3', as TensorRT-LLM's statistics of one rank "
        "have; add up all ranks' files, and pass [iterations, layers, experts] as 'load'",
        "a.safetensors",
        _safetensors({"100_3": {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    ),
    _counts(
        ".safetensors whose header lies",
        "refused: a.safetensors: tensor 'load' of shape [1048576, 64] is said to be at bytes 0 to "
        "536870912 of 8: it is damaged or cut off; write it anew",
        "a.safetensors",
        _safetensors({"load": {"dtype": "I64", "shape": [1 << 20, 64], "data_offsets": [0, 1 << 29]}}, bytes(8)),
    ),
]

# Placements.
_PLACEMENTS = [
    _placed(
        "a placement, by its layers' names",
        "[[3, 0, 1, 2], [0, 2, 1, 3]], 4 experts, 2 GPUs",
        "p.json",
        _ours(),
        ["b", "a"],
    ),
    _placed(
        "a placement, of a layer that it has not",
        "refused: p.json has no layer 'c'; it has a, b",
        "p.json",
        _ours(),
        ["c"],
    ),
    _placed(
        "a placement of num_experts 4.9",
        "refused: p.json is not a placement file (num_experts is 4.9; it must be a whole number, at "
        "least 1); pass one written by Placement.save, or an object with physical_to_logical_map",
        "p.json",
        _ours(num_experts=4.9),
    ),
    _placed(
        'a placement of num_gpus "2"',
        "refused: p.json is not a placement file (num_gpus is '2'; it must be a whole number, at least "
        "1); pass one written by Placement.save, or an object with physical_to_logical_map",
        "p.json",
        _ours(num_gpus="2"),
    ),
    _placed(
        "a placement of another format",
        "refused: p.json has format 'eplb'; this distplb reads 'distplb.placement'",
        "p.json",
        _ours(format="eplb"),
    ),
    _placed(
        "a placement with layer a twice",
        "refused: p.json is not a placement file (it is not JSON that can be read (an object names 'a' "
        "twice)); pass one written by Placement.save, or an object with physical_to_logical_map",
        "p.json",
        _ours().replace('"b"', '"a"'),
    ),
    _placed(
        "a placement with a shorter row",
        "refused: p.json is not a placement file (layer 'b' has 2 slots where the first has 4); pass one "
        "written by Placement.save, or an object with physical_to_logical_map",
        "p.json",
        _ours(expert_of_slot={"a": [0, 1, 2, 3], "b": [0, 1]}),
    ),
    _placed(
        "a placement with true for an expert",
        "refused: p.json is not a placement file (layer 'a': slot 1 holds True; it must be the number of "
        "an expert); pass one written by Placement.save, or an object with physical_to_logical_map",
        "p.json",
        _ours(expert_of_slot={"a": [0, True, 2, 3]}),
    ),
    _placed(
        "SGLang's or vLLM's map",
        "[[0, 1, 2, 0]], 3 experts, 2 GPUs",
        "p.json",
        '{"physical_to_logical_map": [[0, 1, 2, 0]]}',
        num_gpus=2,
    ),
    _placed(
        "the same without num_gpus",
        "refused: p.json does not tell its number of GPUs; pass num_gpus, the size of the EP group",
        "p.json",
        '{"physical_to_logical_map": [[0, 1, 2, 0]]}',
    ),
    _placed(
        "a bare table",
        "refused: p.json is not a placement file (it has no names, and a bare table may also map from "
        "logical to physical; pass an object with 'physical_to_logical_map'); pass one written by "
        "Placement.save, or an object with physical_to_logical_map",
        "p.json",
        "[[1, 2, 0]]",
        num_gpus=1,
    ),
    _placed("TensorRT-LLM's YAML", "[[0, 1, 2, 0], [2, 1, 0, 1]], 3 experts, 2 GPUs", "p.yaml", _TRT, num_gpus=2),
    _placed(
        "TensorRT-LLM's YAML, of layers by number",
        "[[2, 1, 0, 1], [0, 1, 2, 0]], 3 experts, 2 GPUs",
        "p.yaml",
        _TRT,
        ["layers.4.moe", "layers.3.moe"],
        num_gpus=2,
    ),
    _placed(
        "TensorRT-LLM's YAML, of too few layers",
        "refused: p.yaml also has layer '4', which is not among 3; pass one of these",
        "p.yaml",
        _TRT,
        ["3"],
        num_gpus=2,
    ),
    _placed("vllm-ascend's JSON", "[[2, 0, 1, 2]], 3 experts, 2 GPUs", "p.json", json.dumps(_ASCEND)),
    _placed(
        "vllm-ascend's JSON, for 4 GPUs",
        "refused: p.json is of 2 GPUs, and 4 are asked for; pass the placement of this model and cluster",
        "p.json",
        json.dumps(_ASCEND),
        num_gpus=4,
    ),
    _current("--current in another order of layers", "b: 1.80, a: 1.80", "p.json", _ours()),
    _current(
        "--current of other names",
        "exit 2: [Error: p.json has no layer '0'; it has a, b]",
        "p.json",
        _ours(),
        "0,1,2,3\n9,1,1,1\n1,9,1,1\n",
    ),
    _current(
        "--current of a layer more",
        "exit 2: [Error: p.json also has layer 'a', which is not among b; pass one of these]",
        "p.json",
        _ours(),
        "layer,0,1,2,3\nb,9,1,1,1\n",
    ),
    _current(
        "--current of SGLang's map",
        "b: 1.80, a: 1.80",
        "p.json",
        '{"physical_to_logical_map": [[3, 0, 1, 2], [0, 2, 1, 3]]}',
    ),
    _current(
        "--current of a binary file",
        "exit 2: [Error: p.bin is not a placement file (it is not UTF-8 text (byte 127); save it as "
        "UTF-8); pass one written by Placement.save, or an object with physical_to_logical_map]",
        "p.bin",
        bytes(range(1, 256)),
    ),
]


def _replayed(folder: Path) -> str:
    path = _written(folder, "a.npy", _array(np.random.default_rng(0).integers(1, 99, (40, 1, 4))))
    return command("replay", path, "--gpus-per-node", 2, "--every", 10, "--engine", "reference", "--json", show=_steps)


def _steps(text: str) -> str:
    found = json.loads(text)
    return f"{found['steps']} steps of {found['iterations']} iterations"


def _without_gpus(folder: Path) -> str:
    return command("replay", _written(folder, "a.npy", _array(np.ones((40, 1, 4)))))


def _one_step(folder: Path) -> str:
    return command("replay", _written(folder, "a.npy", _array(np.ones((40, 4)))), "--gpus-per-node", 2)


def _saved_by_name(folder: Path) -> str:
    load = _written(folder, "a.csv", "layer,0,1,2,3\nmoe.3,9,8,1,1\nmoe.4,1,9,9,1\n")
    command("plan", load, "--gpus-per-node", 2, "--engine", "reference", "--output", folder / "p.json")
    return f"layers {', '.join(json.loads((folder / 'p.json').read_text())['expert_of_slot'])}"


CASES: list[Case] = [
    *_TABLES,
    *_DUMPS,
    *_PLACEMENTS,
    Case("plan --output of layers moe.3, moe.4", "layers moe.3, moe.4", _saved_by_name),
    Case("replay of a .npy with --gpus-per-node", "40 steps of 40 iterations", _replayed),
    Case(
        "replay of a .npy alone",
        "exit 2: [Error: a.npy has counts, and no placement; pass --gpus-per-node, and --nodes, as well]",
        _without_gpus,
    ),
    Case(
        "replay of [layers, experts]",
        "exit 2: [Error: a.npy has one step alone, [layers, experts]; pass [steps, layers, experts] here]",
        _one_step,
    ),
]
