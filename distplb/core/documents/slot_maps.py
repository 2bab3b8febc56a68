"""Which expert each slot holds, read from a file of distplb or of another project.

The formats of other projects, according to their sources in November 2026:

- SGLang, `--init-expert-location` in python/sglang/srt/eplb/expert_location.py, and vLLM, `EplbState`: an object with
  "physical_to_logical_map" `[layers, slots]`; SGLang's recorder of single passes: "last_physical_to_logical_map". EPLB
  names it `phy2log`.
- TensorRT-LLM, examples/wide_ep/ep_load_balancer: "initial_global_assignments", a list of slots for each layer
  number, "num_slots", and in some versions "ep_size".
- vllm-ascend, `expert_map_path` in vllm_ascend/ops/expert_load_balancer.py: "layer_list" of "device_list" of
  "device_expert".

Shapes: L layers, P slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distplb.core.arguments import listed
from distplb.errors import DistplbError

__all__ = ["FORMAT", "MAPS", "VERSION", "SlotMap", "parse_slot_map"]

FORMAT, VERSION = "distplb.placement", 1
_TABLES = ("physical_to_logical_map", "last_physical_to_logical_map", "phy2log")
MAPS = (*_TABLES, "initial_global_assignments", "layer_list", "expert_of_slot")
_MOST = 2**31  # experts and GPUs


class SlotMap(NamedTuple):
    """A placement as a file describes it.

    Args:
        rows: the P experts of each layer, in the file's order.
        layer_keys: what the keys of `rows` are: names ("names"), numbers among all layers of the model ("numbers"), or
            just the order ("order").
        num_experts: None if the file does not contain it.
        num_gpus: None if the file does not contain it.
    """

    rows: dict[str, list[int]]
    layer_keys: str
    num_experts: int | None
    num_gpus: int | None


def parse_slot_map(path: Path, document: Any) -> SlotMap:
    """The placement in a document of any of these projects.

    Raises:
        ValueError: if it is not a placement; with the place.
        DistplbError: if it is a distplb file of an unknown format or version.
    """
    if not isinstance(document, Mapping):
        raise ValueError(
            "it has no names, and a bare table may also map logical experts to slots; pass an object with "
            "'physical_to_logical_map'"
        )
    names = [name for name in MAPS if name in document]
    if "version" in document or "format" in document or names == ["expert_of_slot"]:
        return _ours(path, document)
    if len(names) != 1:
        raise ValueError(f"it has {listed(document) or 'no names'} where exactly one of {', '.join(MAPS)} is expected")
    if names[0] == "layer_list":
        return _by_device(document)
    if names[0] == "initial_global_assignments":
        return _by_number(document)
    table = _list(document[names[0]], names[0])
    rows = {str(layer): _row(row, f"{names[0]}, layer {layer}") for layer, row in enumerate(table)}
    return _checked(SlotMap(rows, "order", None, None))


def _ours(path: Path, document: Mapping[str, Any]) -> SlotMap:
    """The format of `Placement.save`."""
    kind = document.get("format", FORMAT)
    if kind != FORMAT:
        raise DistplbError(f"{path} has format {str(kind)[:40]!r}; this distplb reads {FORMAT!r}")
    if "version" not in document:
        raise ValueError("it has no 'version'")
    version = document["version"]
    if type(version) is not int or version != VERSION:
        raise DistplbError(f"{path} has version {str(version)[:40]}; this distplb reads version {VERSION}")
    missing = [name for name in ("num_experts", "num_gpus", "expert_of_slot") if name not in document]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}")
    experts, gpus = (_number(document[name], name) for name in ("num_experts", "num_gpus"))
    rows = {name: _row(row, f"layer {name[:80]!r}") for name, row in _mapping(document["expert_of_slot"]).items()}
    return _checked(SlotMap(rows, "names", experts, gpus))


def _by_number(document: Mapping[str, Any]) -> SlotMap:
    """The format of TensorRT-LLM."""
    table = _mapping(document["initial_global_assignments"])
    rows = {str(name): _row(row, f"layer {str(name)[:40]}") for name, row in table.items()}
    if "num_slots" in document:
        slots = _number(document["num_slots"], "num_slots")
        for name, row in rows.items():
            if len(row) != slots:
                raise ValueError(f"layer {name[:40]} has length {len(row)}, but num_slots is {slots}")
    gpus = _number(document["ep_size"], "ep_size") if "ep_size" in document else None
    return _checked(SlotMap(rows, "numbers", None, gpus))


def _by_device(document: Mapping[str, Any]) -> SlotMap:
    """The format of vllm-ascend."""
    layers = _list(document["layer_list"], "layer_list")
    if "moe_layer_count" in document and _number(document["moe_layer_count"], "moe_layer_count") != len(layers):
        raise ValueError(f"moe_layer_count is {document['moe_layer_count']}, but layer_list has length {len(layers)}")
    rows: dict[str, list[int]] = {}
    gpus = set()
    for nth, layer in enumerate(layers):
        place = f"entry {nth} of layer_list"
        number = str(_number(_mapping(layer).get("layer_id", nth), f"layer_id of {place}", minimum=0))
        devices = _list(layer.get("device_list"), f"device_list of {place}")
        if "device_count" in layer and _number(layer["device_count"], f"device_count of {place}") != len(devices):
            raise ValueError(
                f"device_count of {place} is {layer['device_count']}, but its device_list has length {len(devices)}"
            )
        if number in rows:
            raise ValueError(f"layer_id {number} occurs twice")
        ids = [_mapping(device).get("device_id", at) for at, device in enumerate(devices)]
        if ids != list(range(len(devices))):
            raise ValueError(f"the device_ids of {place} are {str(ids)[:60]}; they must count up from 0")
        parts = [_row(device.get("device_expert"), f"device {at} of {place}") for at, device in enumerate(devices)]
        if len({len(part) for part in parts}) > 1:
            raise ValueError(f"the devices of {place} have different numbers of experts; pass the same number on each")
        rows[number] = [expert for part in parts for expert in part]
        gpus.add(len(devices))
    if len(gpus) > 1:
        raise ValueError(f"its layers are on {min(gpus)} and {max(gpus)} devices; pass the same number for each layer")
    in_order = [int(number) for number in rows] == list(range(len(rows)))
    return _checked(SlotMap(rows, "order" if in_order else "numbers", None, next(iter(gpus), None)))


def _checked(slot_map: SlotMap) -> SlotMap:
    first = next(iter(slot_map.rows.values()), [])
    for name, row in slot_map.rows.items():
        if len(row) != len(first):
            raise ValueError(f"layer {name[:80]!r} has length {len(row)} where the first layer has {len(first)}")
    if not first:
        raise ValueError("it has no layers or no slots")
    return slot_map


def _number(value: Any, name: str, minimum: int = 1) -> int:
    if type(value) is not int or not minimum <= value < _MOST:
        raise ValueError(f"{name} is {value!r:.40}; it must be an integer from {minimum} to {_MOST - 1}")
    return value


def _row(values: Any, place: str) -> list[int]:
    row = _list(values, place)
    for slot, expert in enumerate(row):
        if type(expert) is not int or not -_MOST < expert < _MOST:
            raise ValueError(f"{place}: slot {slot} holds {expert!r:.40}; it must be an expert id")
    return row


def _list(values: Any, place: str) -> list[Any]:
    if isinstance(values, np.ndarray) and values.ndim:
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"{place} is {values!r:.40} where a list is expected")
    return list(values)


def _mapping(values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"it has {values!r:.40} where an object is expected")
    return values
