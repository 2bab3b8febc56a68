"""Files of placements, and commands that read counts and write placements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from distplb import Placement
from inputs.case import Case, command
from inputs.file_cases import Content, array, placement_text, written

__all__ = ["CASES"]


def _placement_case(description: str, answer: str, name: str, content: Content, *names: Any, **sizes: int) -> Case:
    """A case that reads a file as a placement, and shows the expert of each slot, experts and GPUs."""

    def run(folder: Path) -> str:
        placement = Placement.load(written(folder, name, content), *names, **sizes)
        return f"{placement.expert_of_slot.tolist()}, {placement.num_experts} experts, {placement.num_gpus} GPUs"

    return Case(description, answer, run)


def _current_case(
    description: str, answer: str, name: str, content: Content, counts: str = "layer,0,1,2,3\nb,9,1,1,9\na,9,1,9,1\n"
) -> Case:
    """A case that passes a file as `--current`, and shows the imbalance of the placement in force."""

    def run(folder: Path) -> str:
        load, current = written(folder, "load.csv", counts), written(folder, name, content)
        options = ("--gpus-per-node", 2, "--engine", "reference", "--json")
        return command("plan", load, "--current", current, *options, show=_before)

    return Case(description, answer, run)


def _before(text: str) -> str:
    return ", ".join(f"{row['layer']}: {row['before']:.2f}" for row in json.loads(text)["layers"])


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


def _replayed(folder: Path) -> str:
    path = written(folder, "a.npy", array(np.random.default_rng(0).integers(1, 99, (40, 1, 4))))
    return command("replay", path, "--gpus-per-node", 2, "--every", 10, "--engine", "reference", "--json", show=_steps)


def _steps(text: str) -> str:
    document = json.loads(text)
    return f"{document['steps']} steps of {document['iterations']} iterations"


def _without_gpus(folder: Path) -> str:
    return command("replay", written(folder, "a.npy", array(np.ones((40, 1, 4)))))


def _one_step(folder: Path) -> str:
    return command("replay", written(folder, "a.npy", array(np.ones((40, 4)))), "--gpus-per-node", 2)


def _saved_by_name(folder: Path) -> str:
    load = written(folder, "a.csv", "layer,0,1,2,3\nmoe.3,9,8,1,1\nmoe.4,1,9,9,1\n")
    command("plan", load, "--gpus-per-node", 2, "--engine", "reference", "--output", folder / "p.json")
    return f"layers {', '.join(json.loads((folder / 'p.json').read_text())['expert_of_slot'])}"


CASES: list[Case] = [
    _placement_case(
        "a placement, by its layers' names",
        "[[3, 0, 1, 2], [0, 2, 1, 3]], 4 experts, 2 GPUs",
        "p.json",
        placement_text(),
        ["b", "a"],
    ),
    _placement_case(
        "a placement, for a layer that it lacks",
        "refused: p.json has no layer 'c'; it has a, b",
        "p.json",
        placement_text(),
        ["c"],
    ),
    _placement_case(
        "a placement with num_experts 4.9",
        (
            "refused: p.json is not a placement file (num_experts is 4.9; it must be an integer from 1 to "
            "2147483647); pass one written by Placement.save, or an object with physical_to_logical_map"
        ),
        "p.json",
        placement_text(num_experts=4.9),
    ),
    _placement_case(
        'a placement with num_gpus "2"',
        (
            "refused: p.json is not a placement file (num_gpus is '2'; it must be an integer from 1 to "
            "2147483647); pass one written by Placement.save, or an object with physical_to_logical_map"
        ),
        "p.json",
        placement_text(num_gpus="2"),
    ),
    _placement_case(
        "a placement with another format",
        "refused: p.json has format 'eplb'; this distplb reads 'distplb.placement'",
        "p.json",
        placement_text(format="eplb"),
    ),
    _placement_case(
        "a placement with layer a twice",
        (
            "refused: p.json is not a placement file (it cannot be read as JSON (an object has the name 'a' "
            "twice)); pass one written by Placement.save, or an object with physical_to_logical_map"
        ),
        "p.json",
        placement_text().replace('"b"', '"a"'),
    ),
    _placement_case(
        "a placement with a shorter row",
        (
            "refused: p.json is not a placement file (layer 'b' has length 2 where the first layer has 4); pass "
            "one written by Placement.save, or an object with physical_to_logical_map"
        ),
        "p.json",
        placement_text(expert_of_slot={"a": [0, 1, 2, 3], "b": [0, 1]}),
    ),
    _placement_case(
        "a placement with `true` as an expert",
        (
            "refused: p.json is not a placement file (layer 'a': slot 1 holds True; it must be an expert id); pass "
            "one written by Placement.save, or an object with physical_to_logical_map"
        ),
        "p.json",
        placement_text(expert_of_slot={"a": [0, True, 2, 3]}),
    ),
    _placement_case(
        "SGLang's or vLLM's map",
        "[[0, 1, 2, 0]], 3 experts, 2 GPUs",
        "p.json",
        '{"physical_to_logical_map": [[0, 1, 2, 0]]}',
        num_gpus=2,
    ),
    _placement_case(
        "the same without num_gpus",
        "refused: p.json does not contain the number of GPUs; pass num_gpus, the size of the EP group",
        "p.json",
        '{"physical_to_logical_map": [[0, 1, 2, 0]]}',
    ),
    _placement_case(
        "a bare table",
        (
            "refused: p.json is not a placement file (it has no names, and a bare table may also map logical "
            "experts to slots; pass an object with 'physical_to_logical_map'); pass one written by Placement.save, "
            "or an object with physical_to_logical_map"
        ),
        "p.json",
        "[[1, 2, 0]]",
        num_gpus=1,
    ),
    _placement_case(
        "TensorRT-LLM's YAML", "[[0, 1, 2, 0], [2, 1, 0, 1]], 3 experts, 2 GPUs", "p.yaml", _TRT, num_gpus=2
    ),
    _placement_case(
        "TensorRT-LLM's YAML, with layers by index",
        "[[2, 1, 0, 1], [0, 1, 2, 0]], 3 experts, 2 GPUs",
        "p.yaml",
        _TRT,
        ["layers.4.moe", "layers.3.moe"],
        num_gpus=2,
    ),
    _placement_case(
        "TensorRT-LLM's YAML, for too few layers",
        "refused: p.yaml also has layer '4', which is not among 3; pass a placement of exactly these layers",
        "p.yaml",
        _TRT,
        ["3"],
        num_gpus=2,
    ),
    _placement_case("vllm-ascend's JSON", "[[2, 0, 1, 2]], 3 experts, 2 GPUs", "p.json", json.dumps(_ASCEND)),
    _placement_case(
        "vllm-ascend's JSON, for 4 GPUs",
        "refused: p.json has num_gpus=2 where 4 is expected; pass the placement of this model and cluster",
        "p.json",
        json.dumps(_ASCEND),
        num_gpus=4,
    ),
    _current_case("--current with the layers in another order", "b: 1.80, a: 1.80", "p.json", placement_text()),
    _current_case(
        "--current with other layer names",
        "exit 2: [Error: p.json has no layer '0'; it has a, b]",
        "p.json",
        placement_text(),
        "0,1,2,3\n9,1,1,1\n1,9,1,1\n",
    ),
    _current_case(
        "--current with an additional layer",
        ("exit 2: [Error: p.json also has layer 'a', which is not among b; pass a placement of exactly these layers]"),
        "p.json",
        placement_text(),
        "layer,0,1,2,3\nb,9,1,1,1\n",
    ),
    _current_case(
        "--current with SGLang's map",
        "b: 1.80, a: 1.80",
        "p.json",
        '{"physical_to_logical_map": [[3, 0, 1, 2], [0, 2, 1, 3]]}',
    ),
    _current_case(
        "--current with a binary file",
        "exit 2: [Error: p.bin is not a placement file (it is not UTF-8 text (byte 127); save it as "
        "UTF-8); pass one written by Placement.save, or an object with physical_to_logical_map]",
        "p.bin",
        bytes(range(1, 256)),
    ),
    Case("plan --output with layers moe.3, moe.4", "layers moe.3, moe.4", _saved_by_name),
    Case("replay of a .npy file with --gpus-per-node", "40 steps of 40 iterations", _replayed),
    Case(
        "replay of a .npy file without --gpus-per-node",
        "exit 2: [Error: a.npy has counts but no placement; also pass --gpus-per-node and, if needed, --nodes]",
        _without_gpus,
    ),
    Case(
        "replay of shape [layers, experts]",
        "exit 2: [Error: a.npy has counts of a single step, [layers, experts]; pass [steps, layers, experts]]",
        _one_step,
    ),
]
