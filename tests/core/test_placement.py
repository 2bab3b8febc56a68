"""`Placement`: its checks, what it derives, and its files.

Shapes: L layers, E experts, P slots, M GPUs, R replicas.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyyaml import needs_pyyaml, those_of_pyyaml_marked

from distplb import DistplbError, Placement

# Expert 1 has three slots in layer 0, expert 0 has two; in layer 1 experts 2 and 3 have replicas.
REPLICATED = [[1, 0, 1, 3, 0, 2, 1], [2, 3, 0, 1, 2, 3, 2]]


@pytest.fixture
def replicated() -> Placement:
    return Placement(torch.tensor(REPLICATED), num_experts=4, num_gpus=7)


@pytest.fixture
def permuted() -> Placement:
    """`[3, 6]` on 3 GPUs, a different order in each layer."""
    random_ = random.Random(0)
    return Placement(torch.tensor([random_.sample(range(6), 6) for _ in range(3)]), num_experts=6, num_gpus=3)


# --- derived ----------------------------------------------------------------------------------------------------


def test_sizes_are_read_off_the_table(replicated: Placement, permuted: Placement) -> None:
    assert (replicated.num_layers, replicated.num_slots, replicated.slots_per_gpu) == (2, 7, 1)
    assert (permuted.num_layers, permuted.num_slots, permuted.slots_per_gpu) == (3, 6, 2)
    assert replicated.has_replicas
    assert not permuted.has_replicas


def test_contiguous_puts_each_expert_in_its_own_slot() -> None:
    placement = Placement.contiguous(num_layers=2, num_experts=4, num_gpus=2)
    assert placement.expert_of_slot.tolist() == [[0, 1, 2, 3]] * 2
    assert (placement.num_experts, placement.num_gpus) == (4, 2)
    assert torch.equal(placement.inverse[..., 0], placement.expert_of_slot)


def test_replicas_are_counted_layer_by_layer(replicated: Placement, permuted: Placement) -> None:
    assert replicated.replicas.tolist() == [[2, 3, 1, 1], [1, 1, 3, 2]]
    assert permuted.replicas.tolist() == [[1] * 6] * 3


def test_the_inverse_lists_the_slots_of_every_expert_in_ascending_order(replicated: Placement) -> None:
    assert replicated.inverse.tolist() == [
        [[1, 4, -1], [0, 2, 6], [5, -1, -1], [3, -1, -1]],
        [[2, -1, -1], [3, -1, -1], [0, 4, 6], [1, 5, -1]],
    ]


@pytest.mark.parametrize("num_slots", [5, 6, 11, 40])
def test_the_inverse_of_any_table_leads_back_to_it(num_slots: int) -> None:
    random_ = random.Random(num_slots)
    table = [random_.sample([*range(5), *random_.choices(range(5), k=num_slots - 5)], num_slots) for _ in range(4)]
    inverse = Placement(torch.tensor(table), num_experts=5, num_gpus=1).inverse.tolist()  # [L][E][R]
    assert inverse == [
        [
            (slots := [slot for slot, held in enumerate(row) if held == expert])
            + [-1] * (len(inverse[0][0]) - len(slots))
            for expert in range(5)
        ]
        for row in table
    ]
    assert len(inverse[0][0]) == max(row.count(expert) for row in table for expert in range(5))


def test_the_table_is_copied_in(permuted: Placement) -> None:
    table = permuted.expert_of_slot.clone()
    placement = Placement(table, 6, 3)
    table.zero_()
    assert placement == permuted


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.int64])
def test_any_integers_become_int64(dtype: torch.dtype) -> None:
    placement = Placement(torch.tensor([[1, 0]], dtype=dtype), 2, 2)
    assert placement.expert_of_slot.dtype == torch.int64
    assert placement == Placement([[1, 0]], 2, 2)  # type: ignore[arg-type]


# --- a value ----------------------------------------------------------------------------------------------------


def test_equal_placements_are_equal_and_hash_alike(permuted: Placement) -> None:
    twin = Placement(permuted.expert_of_slot.clone(), 6, 3)
    assert twin == permuted
    assert twin is not permuted
    assert hash(twin) == hash(permuted)
    assert twin.digest() == permuted.digest()
    assert len({twin, permuted}) == 1


def test_placements_that_differ_anywhere_are_unequal_and_have_other_digests(permuted: Placement) -> None:
    swapped = permuted.expert_of_slot.clone()
    swapped[2, [4, 5]] = swapped[2, [5, 4]]
    others = [
        Placement(swapped, 6, 3),
        Placement(permuted.expert_of_slot, 6, 2),  # other GPUs, the same table
        Placement(permuted.expert_of_slot[:2], 6, 3),
        Placement(permuted.expert_of_slot[[1, 0, 2]], 6, 3),
        Placement(torch.tensor([[0, 1, 0, 1]]), 2, 2),
        Placement(torch.tensor([[0, 1], [0, 1]]), 2, 2),  # the same numbers in another shape
    ]
    assert all(other != permuted for other in others)
    assert len({placement.digest() for placement in (permuted, *others)}) == len(others) + 1
    assert permuted != "a placement"


def test_digests_fit_62_bits_and_are_what_they_were_when_pinned(replicated: Placement) -> None:
    """Checkpoints and events carry the digest across machines and releases."""
    assert Placement.contiguous(2, 4, 2).digest() == 2095924722463093457
    assert replicated.digest() == 3096344521394965420
    digests = [Placement(torch.randperm(64)[None], 64, 8).digest() for _ in range(200)]
    assert all(0 <= digest < 2**62 for digest in digests)
    assert max(digests) > 2**61


def test_a_placement_is_frozen(permuted: Placement) -> None:
    with pytest.raises(FrozenInstanceError):
        permuted.num_gpus = 2  # type: ignore[misc]


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "num_experts", "num_gpus", "wording"),
    [
        ([0, 1], 2, 1, r"expert_of_slot is torch.int64 of shape \(2,\); pass integers of shape \[layers, slots\]"),
        ([[0.0, 1.0]], 2, 1, r"expert_of_slot is torch.float32 of shape \(1, 2\); pass integers"),
        ([[True, False]], 2, 1, "expert_of_slot is torch.bool"),
        ([[0, 1, 2]], 3, 2, "num_slots=3, num_experts=3, num_gpus=2; num_slots must be a multiple of num_gpus, and at"),
        ([[0, 1, 2]], 3, 0, "num_slots=3, num_experts=3, num_gpus=0; num_slots must be a multiple"),
        ([[0, 1]], 4, 2, "num_slots=2, num_experts=4, num_gpus=2; .* multiple of num_gpus, and at least num_experts"),
        ([[0, 1], [1, 2]], 2, 2, "slot 1 of layer 1 holds expert 2; experts are numbered 0 to 1"),
        ([[0, -1]], 2, 2, "slot 1 of layer 0 holds expert -1; experts are numbered 0 to 1"),
        ([[0, 1, 2], [2, 0, 2]], 3, 3, "expert 1 has no slot in layer 1; every expert needs at least one"),
        ([[0, 0, 2, 2]], 3, 2, "expert 1 has no slot in layer 0"),
    ],
)
def test_impossible_tables_are_refused_by_the_value_found(
    table: list[Any], num_experts: int, num_gpus: int, wording: str
) -> None:
    with pytest.raises(DistplbError, match=wording):
        Placement(torch.tensor(table), num_experts, num_gpus)


# --- on disk ----------------------------------------------------------------------------------------------------

NAMES = ["blocks.0.moe", "blocks.2.moe", "blocks.10.moe"]


def test_what_was_saved_is_loaded(tmp_path: Path, permuted: Placement, replicated: Placement) -> None:
    permuted.save(tmp_path / "permuted.json")
    replicated.save(str(tmp_path / "replicated.json"))
    assert Placement.load(tmp_path / "permuted.json") == permuted
    assert Placement.load(str(tmp_path / "replicated.json")) == replicated


def test_nothing_but_the_file_is_left_and_an_older_one_is_replaced(tmp_path: Path, permuted: Placement) -> None:
    path = tmp_path / "placement.json"
    Placement.contiguous(1, 2, 1).save(path)
    permuted.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert Placement.load(path) == permuted


def test_layers_are_found_by_name_in_any_order(tmp_path: Path, permuted: Placement) -> None:
    path = tmp_path / "placement.json"
    permuted.save(path, NAMES)
    assert Placement.load(path) == permuted
    assert Placement.load(path, NAMES) == permuted
    backwards = Placement.load(path, NAMES[::-1])
    assert torch.equal(backwards.expert_of_slot, permuted.expert_of_slot.flip(0))
    one = Placement.load(path, NAMES[1:2])
    assert torch.equal(one.expert_of_slot, permuted.expert_of_slot[1:2])


def test_a_layer_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, permuted: Placement) -> None:
    path = tmp_path / "placement.json"
    permuted.save(path, NAMES)
    wording = r"placement.json has no layer 'blocks.3.moe'; it has blocks.0.moe, blocks.2.moe, blocks.10.moe"
    with pytest.raises(DistplbError, match=wording):
        Placement.load(path, ["blocks.0.moe", "blocks.3.moe"])


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "a"], []])
def test_layers_need_a_name_of_their_own_each(tmp_path: Path, permuted: Placement, names: list[str]) -> None:
    wording = f"layer_names has {len(set(names))} unique names for 3 layers; pass one unique name for each layer"
    with pytest.raises(DistplbError, match=wording):
        permuted.save(tmp_path / "placement.json", names)
    assert not list(tmp_path.iterdir())


def test_another_version_is_refused_by_its_number(tmp_path: Path, permuted: Placement) -> None:
    path = tmp_path / "placement.json"
    permuted.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(DistplbError, match=r"placement.json has version 2; this distplb reads version 1"):
        Placement.load(path)
    path.write_text('{"version": 2, "whatever": "the next version calls its table"}')
    with pytest.raises(DistplbError, match=r"placement.json has version 2; this distplb reads version 1"):
        Placement.load(path)


@pytest.mark.parametrize(
    "text",
    [
        "experts",
        "[1, 2]",
        "null",
        '{"expert_of_slot": {"0": [0, 1]}}',
        '{"version": 1, "num_experts": 2, "num_gpus": 1}',
        '{"version": 1, "num_experts": 2, "num_gpus": 1, "expert_of_slot": [[0, 1]]}',
        '{"version": 1, "num_experts": 2, "num_gpus": 1, "expert_of_slot": {"0": [0, "one"]}}',
        '{"version": 1, "num_experts": 2, "num_gpus": null, "expert_of_slot": {"0": [0, 1]}}',
        '{"version": 1, "num_experts": 2, "num_gpus": 1, "expert_of_slot": {"0": {"0": 1}}}',
        "[" * 100_000,
    ],
    ids=range(10),
)
def test_a_file_that_is_no_placement_is_refused(tmp_path: Path, text: str) -> None:
    """A table that was a list or held words raised a bare TypeError or ValueError without the file's name."""
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(DistplbError, match=r"other.json is not a placement file \(.*\); pass one written by Placement"):
        Placement.load(path)


@pytest.mark.parametrize("tables", [{}, {"0": [0, 1], "1": [0, 1, 0]}])
def test_a_file_without_layers_or_with_unequal_ones_is_refused(tmp_path: Path, tables: dict[str, list[int]]) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({"version": 1, "num_experts": 2, "num_gpus": 1, "expert_of_slot": tables}))
    with pytest.raises(
        DistplbError, match=r"odd.json is not a placement file \((it has no layers|layer '1' has length 3)"
    ):
        Placement.load(path)


def test_a_truncated_file_is_refused(tmp_path: Path, permuted: Placement) -> None:
    path = tmp_path / "cut.json"
    permuted.save(path)
    whole = path.read_text()
    for length in (1, len(whole) // 2, len(whole) - 1):
        path.write_text(whole[:length])
        with pytest.raises(DistplbError, match=r"cut.json is not a placement file"):
            Placement.load(path)


def test_a_file_whose_table_is_impossible_is_refused(tmp_path: Path, permuted: Placement) -> None:
    path = tmp_path / "placement.json"
    permuted.save(path)
    document = json.loads(path.read_text())
    document["expert_of_slot"]["1"][3] = 6
    path.write_text(json.dumps(document))
    with pytest.raises(DistplbError, match="slot 3 of layer 1 holds expert 6; experts are numbered 0 to 5"):
        Placement.load(path)


def changed(**fields: object) -> str:
    document = {
        "format": "distplb.placement",
        "version": 1,
        "num_experts": 2,
        "num_gpus": 1,
        "expert_of_slot": {"a": [0, 1]},
    }
    return json.dumps(document | fields)


# The message for each file's content, after the file's name.
WRONG = {
    changed(num_experts=2.9): r"\(num_experts is 2.9; it must be an integer",
    changed(num_experts="2"): r"\(num_experts is '2'; it must be an integer",
    changed(num_gpus=True): r"\(num_gpus is True; it must be an integer",
    changed(num_gpus=0): r"\(num_gpus is 0; it must be an integer from 1 to 2147483647",
    changed(format="somebody.else"): r"has format 'somebody.else'; this distplb reads 'distplb.placement'",
    changed(version=True): "has version True; this distplb reads version 1",
    changed(version="1"): "has version 1; this distplb reads version 1",
    changed(expert_of_slot={"a": [0, 1], "b": [0]}): r"\(layer 'b' has length 1 where the first layer has 2\)",
    changed(expert_of_slot={"a": [0, True]}): r"\(layer 'a': slot 1 holds True; it must be an expert id",
    changed(expert_of_slot={"a": [0, 1.0]}): r"\(layer 'a': slot 1 holds 1.0; it must be an expert id",
    changed(expert_of_slot={"a": [0, "1"]}): r"\(layer 'a': slot 1 holds '1'; it must be an expert id",
    changed(expert_of_slot={"a": "01"}): r"\(layer 'a' is '01' where a list is expected\)",
    changed(expert_of_slot={"a": [0, 2]}): "slot 1 of layer 0 holds expert 2; experts are numbered 0 to 1",
    changed().replace('"a": ', '"a": [1, 0], "a": '): r"\(it cannot be read as JSON .*an object has the name 'a' twice",
    changed().replace(
        '"num_gpus"', '"num_gpus": 2, "num_gpus"'
    ): r"\(it cannot be read as JSON .*an object has the name 'num_gpus' twice",
    "[[0, 1]]": r"\(it has no names, and a bare table may also map logical experts to slots; pass an object",
    '{"a": [0, 1]}': r"\(it has 'a' where exactly one of physical_to_logical_map, ",
    '{"phy2log": [[0]], "layer_list": []}': r"\(it has 'phy2log', 'layer_list' where exactly one of",
    "\0" * 9000: r"\(it is not text \(byte 0 is 0\); pass text",
    "\xff" * 9000: r"\(it is not UTF-8 text \(byte 0\)",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_what_is_no_placement_is_refused_with_the_place(tmp_path: Path, text: str) -> None:
    """num_experts 2.9 and "2" were read as 2, true as 1, the second of two layers of one name, and any format.

    The error for a file that is not text contained all of it.
    """
    (tmp_path / "p.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DistplbError, match=WRONG[text]) as refused:
        Placement.load(tmp_path / "p.json")
    assert str(refused.value).startswith(str(tmp_path / "p.json"))
    assert len(str(refused.value)) < len(str(tmp_path)) + 400
    assert "\n" not in str(refused.value)


def test_layers_experts_and_gpus_that_are_asked_for_must_be_the_files(tmp_path: Path, permuted: Placement) -> None:
    path = tmp_path / "p.json"
    permuted.save(path, NAMES)
    assert Placement.load(path, NAMES, num_experts=6, num_gpus=permuted.num_gpus) == permuted
    with pytest.raises(DistplbError, match=r"p.json has num_experts=6 where 8 is expected"):
        Placement.load(path, num_experts=8)
    with pytest.raises(DistplbError, match=rf"p.json has num_gpus={permuted.num_gpus} where 7 is expected"):
        Placement.load(path, num_gpus=7)
    with pytest.raises(DistplbError, match=r"layer 'blocks.2.moe' is requested twice"):
        Placement.load(path, [NAMES[1], NAMES[1]])
    with pytest.raises(DistplbError, match=r"no layer is requested; pass at least one of blocks.0.moe"):
        Placement.load(path, [])
    with pytest.raises(DistplbError, match="layer_names has 1 unique name for 3 layers"):
        permuted.save(path, [1, "1", "1"])  # type: ignore[list-item]


def test_a_file_of_another_name_and_one_that_is_not_there(tmp_path: Path, permuted: Placement) -> None:
    permuted.save(tmp_path / "placement")
    assert Placement.load(tmp_path / "placement") == permuted
    with pytest.raises(DistplbError, match=r"there is no file .*none.json; pass one written by Placement.save"):
        Placement.load(tmp_path / "none.json")


# --- maps of other projects -------------------------------------------------------------------------------------

TABLE = [[0, 1, 2, 3, 0, 1], [0, 2, 0, 1, 0, 3]]  # the example of vLLM's EplbState: 4 experts, 6 slots
DEVICES = [[[0, 1], [2, 3], [0, 1]], [[0, 2], [0, 1], [0, 3]]]


def expert_map(**fields: object) -> dict[str, Any]:
    """A map as vllm-ascend reads it."""
    layers = [
        {
            "layer_id": layer,
            "device_count": 3,
            "device_list": [{"device_id": at, "device_expert": experts} for at, experts in enumerate(devices)],
        }
        for layer, devices in enumerate(DEVICES)
    ]
    return {"moe_layer_count": 2, "layer_list": layers} | fields


def assignments(**fields: object) -> str:
    """A map as TensorRT-LLM's generate_eplb_config.py writes it."""
    document = {"initial_global_assignments": dict(zip((3, 4), TABLE, strict=True)), "num_slots": 6} | fields
    return "".join(
        f"{name}:\n" + "".join(f"  {key}: {row}\n" for key, row in value.items())
        if isinstance(value, dict)
        else f"{name}: {value}\n"
        for name, value in document.items()
    )


MAPS: dict[str, Callable[[Path], object]] = {
    "sglang.json": lambda path: path.write_text(json.dumps({"physical_to_logical_map": TABLE})),
    "sglang.pt": lambda path: torch.save({"physical_to_logical_map": torch.tensor(TABLE, dtype=torch.int32)}, path),
    "passes.pt": lambda path: torch.save({"records": [], "last_physical_to_logical_map": torch.tensor(TABLE)}, path),
    "eplb.npz": lambda path: np.savez(path, phy2log=TABLE, logcnt=[[2, 2, 1, 1], [3, 1, 1, 1]]),
    "trt.yaml": lambda path: path.write_text(assignments(layer_updates_per_iter=0)),
    "trt.json": lambda path: path.write_text(
        json.dumps({"initial_global_assignments": {"3": TABLE[0], "4": TABLE[1]}})
    ),
    "ascend.json": lambda path: path.write_text(json.dumps(expert_map())),
}


@pytest.mark.parametrize("name", those_of_pyyaml_marked(MAPS))
def test_maps_of_other_projects_become_placements(tmp_path: Path, name: str) -> None:
    MAPS[name](tmp_path / name)
    expected = Placement(torch.tensor(TABLE), 4, 3)
    assert Placement.load(tmp_path / name, num_gpus=3) == expected
    assert Placement.load(tmp_path / name, num_experts=4, num_gpus=3) == expected
    backwards = ["layers.4.mlp", "layers.3.mlp"] if "trt" in name else ["1", "0"]
    assert Placement.load(tmp_path / name, backwards, num_gpus=3) == Placement(torch.tensor(TABLE[::-1]), 4, 3)
    with pytest.raises(DistplbError, match=rf"{name} (also has layer '?|has 2 unnamed layers, but 1 is requested)"):
        Placement.load(tmp_path / name, backwards[:1] if "trt" in name else ["moe"], num_gpus=3)
    with pytest.raises(DistplbError, match=rf"{name}: expert 4 has no slot in layer 0"):
        Placement.load(tmp_path / name, num_experts=5, num_gpus=3)
    if name != "ascend.json":
        with pytest.raises(DistplbError, match=rf"{name} does not contain the number of GPUs; pass num_gpus"):
            Placement.load(tmp_path / name)


MAPS_REFUSED = {
    "physical_to_logical_map, layer 1 is 3 where a list is expected": {"physical_to_logical_map": [[0], 3]},
    "layer '1' has length 1 where the first layer has 2": {"physical_to_logical_map": [[0, 1], [0]]},
    "layer 3 has length 2, but num_slots is 4": {"initial_global_assignments": {"3": [0, 1]}, "num_slots": 4},
    "moe_layer_count is 3, but layer_list has length 2": expert_map(moe_layer_count=3),
    "device_count of entry 0 of layer_list is 2, but its device_list has length 1": {
        "layer_list": [{"device_count": 2, "device_list": [{"device_expert": [0]}]}]
    },
    "layer_id 0 occurs twice": {"layer_list": [{"layer_id": 0, "device_list": [{"device_expert": [0]}]}] * 2},
    r"the device_ids of entry 0 of layer_list are \[1\]; they must count up from 0": {
        "layer_list": [{"device_list": [{"device_id": 1, "device_expert": [0]}]}]
    },
    "the devices of entry 0 of layer_list have different numbers": {
        "layer_list": [{"device_list": [{"device_expert": [0]}, {"device_expert": [0, 1]}]}]
    },
    "its layers are on 1 and 2 devices; pass the same number": {
        "layer_list": [{"device_list": [{"device_expert": [0]}] * number} for number in (1, 2)]
    },
}


@pytest.mark.parametrize("words", MAPS_REFUSED)
def test_maps_that_do_not_fit_together_are_refused(tmp_path: Path, words: str) -> None:
    (tmp_path / "m.json").write_text(json.dumps(MAPS_REFUSED[words]))
    with pytest.raises(DistplbError, match=rf"m.json is not a placement file \({words}"):
        Placement.load(tmp_path / "m.json", num_gpus=1)


@needs_pyyaml
def test_layers_by_number_are_not_taken_by_order(tmp_path: Path) -> None:
    (tmp_path / "trt.yaml").write_text(assignments())
    with pytest.raises(DistplbError, match=r"trt.yaml has no layer '0'; it has 3, 4"):
        Placement.load(tmp_path / "trt.yaml", ["0", "1"], num_gpus=3)
    with pytest.raises(DistplbError, match=r"trt.yaml has no layer '5'; it has 3, 4"):
        Placement.load(tmp_path / "trt.yaml", ["layers.4", "layers.5"], num_gpus=3)
