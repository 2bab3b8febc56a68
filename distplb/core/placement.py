"""Which expert each slot holds, as a frozen value that checks itself when it is built.

Shapes: L layers, E experts, P slots, M GPUs, G = P / M slots on each GPU.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distplb.core.arguments import refuse_wrong_types, whole_number
from distplb.core.counts import as_integers
from distplb.core.documents.read import check_is_file, read_document
from distplb.core.documents.slot_maps import FORMAT, MAPS, VERSION, SlotMap, parse_slot_map
from distplb.core.hashing import digest
from distplb.errors import DistplbError

__all__ = ["Placement", "load_placement"]

_MOST_BYTES = 1 << 30  # of memory: enough for 10,000 layers of 500 slots as text
_EXPECTED = "one written by Placement.save, or an object with physical_to_logical_map"


@dataclass(frozen=True, eq=False)
class Placement:
    """The expert of every slot, layer by layer; slot p is on GPU `p // G`.

    >>> placement = Placement(torch.tensor([[2, 0, 1, 3]]), num_experts=4, num_gpus=2)
    >>> placement.inverse[..., 0]
    tensor([[1, 2, 0, 3]])

    Args:
        expert_of_slot: `[L, P]` integers in [0, E), with every expert at least once in each layer. Copied.
        num_experts: E.
        num_gpus: M; divides P.

    Raises:
        DistplbError: if a slot holds no known expert, an expert has no slot, or P is not a multiple of M.
    """

    expert_of_slot: Tensor
    num_experts: int
    num_gpus: int

    def __post_init__(self) -> None:
        expected = "integers of shape [layers, slots]"
        table = as_integers("Placement: expert_of_slot", self.expert_of_slot, expected)
        if table.dim() != 2:
            raise DistplbError(
                f"Placement: expert_of_slot is {table.dtype} of shape {tuple(table.shape)}; pass {expected}"
            )
        object.__setattr__(self, "expert_of_slot", table.to("cpu", copy=True).contiguous())
        for name in ("num_experts", "num_gpus"):
            object.__setattr__(self, name, whole_number(f"Placement: {name}", getattr(self, name)))
        self._check()

    def _check(self) -> None:
        if self.num_gpus < 1 or self.num_slots % self.num_gpus or self.num_slots < self.num_experts:
            raise DistplbError(
                f"Placement: num_slots={self.num_slots}, num_experts={self.num_experts}, num_gpus={self.num_gpus}; "
                "num_slots must be a multiple of num_gpus, and at least num_experts"
            )
        table = self.expert_of_slot
        if table.numel() and (int(table.min()) < 0 or int(table.max()) >= self.num_experts):
            layer, slot = ((table < 0) | (table >= self.num_experts)).nonzero()[0].tolist()
            raise DistplbError(
                f"Placement: slot {slot} of layer {layer} holds expert {int(table[layer, slot])}; "
                f"experts are numbered 0 to {self.num_experts - 1}"
            )
        replicas = self.replicas
        if replicas.numel() and int(replicas.min()) == 0:
            layer, expert = (replicas == 0).nonzero()[0].tolist()
            raise DistplbError(
                f"Placement: expert {expert} has no slot in layer {layer}; every expert needs at least one"
            )

    @classmethod
    def contiguous(cls, num_layers: int, num_experts: int, num_gpus: int) -> Placement:
        """The placement with which jobs start: expert e in slot e of every layer."""
        num_layers, num_experts = (
            whole_number(f"Placement: {name}", value, minimum=0)
            for name, value in (("num_layers", num_layers), ("num_experts", num_experts))
        )
        table = torch.arange(num_experts, device="cpu").expand(num_layers, num_experts)
        return cls(table, num_experts, num_gpus)

    @property
    def num_layers(self) -> int:
        """L, the number of layers."""
        return int(self.expert_of_slot.shape[0])

    @property
    def num_slots(self) -> int:
        """P, the number of slots."""
        return int(self.expert_of_slot.shape[1])

    @property
    def slots_per_gpu(self) -> int:
        """G, the slots on each GPU."""
        return self.num_slots // self.num_gpus

    @property
    def has_replicas(self) -> bool:
        """Whether some expert has more than one slot (P > E)."""
        return self.num_slots > self.num_experts

    @property
    def replicas(self) -> Tensor:
        """`[L, E]` int64: how many slots hold each expert."""
        counts = torch.zeros(self.num_layers, self.num_experts, dtype=torch.int64, device="cpu")
        return counts.scatter_add_(1, self.expert_of_slot, torch.ones_like(self.expert_of_slot))

    @property
    def inverse(self) -> Tensor:
        """`[L, E, R]` int64: the slots of every expert in ascending order, −1 where it has fewer than R.

        R is the largest number of slots that any expert has, 1 without replicas.
        """
        replicas = self.replicas
        most = int(replicas.max()) if self.num_layers else 1
        slots = torch.full((self.num_layers, self.num_experts, most), -1, device="cpu")
        by_expert = torch.sort(self.expert_of_slot, dim=1, stable=True)
        first = replicas.cumsum(1) - replicas  # [L, E], where an expert's run begins in the sorted order
        position = torch.arange(self.num_slots, device="cpu").expand_as(by_expert.values)
        nth = position - first.gather(1, by_expert.values)  # [L, P], which replica of its expert
        layer = torch.arange(self.num_layers, device="cpu")[:, None].expand_as(nth)
        slots[layer, by_expert.values, nth] = by_expert.indices
        return slots

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            self.num_experts == other.num_experts
            and self.num_gpus == other.num_gpus
            and torch.equal(self.expert_of_slot, other.expert_of_slot)
        )

    def __hash__(self) -> int:
        return self.digest()

    def digest(self) -> int:
        """A hash in [0, 2^62), the same on every machine, that differs between different placements."""
        head = torch.tensor([self.num_experts, self.num_gpus, *self.expert_of_slot.shape], device="cpu")
        data = torch.cat([head, self.expert_of_slot.flatten()]).numpy().astype("<i8").tobytes()
        return digest(data)

    def save(self, path: str | os.PathLike[str], layer_names: Sequence[str] | None = None) -> None:
        """Write the placement as JSON, keyed by layer name ("0", "1", ... by default).

        Raises:
            DistplbError: if `layer_names` is not one unique name for each layer.
        """
        refuse_wrong_types({"path": (path, (str, os.PathLike), "the path of a file")})
        names = _checked_names(layer_names, self.num_layers)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "num_experts": self.num_experts,
            "num_gpus": self.num_gpus,
            "expert_of_slot": dict(zip(names, self.expert_of_slot.tolist(), strict=True)),
        }
        # A reader sees the old file or the new one, never half of either.
        draft = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(document))
        draft.replace(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        layer_names: Sequence[str] | None = None,
        *,
        num_experts: int | None = None,
        num_gpus: int | None = None,
    ) -> Placement:
        """Read a file of `save`, or a map that another project wrote; see the tables in docs/planning.md.

        Args:
            path: the file: YAML, `.pt`, `.safetensors` or `.npz` by its suffix, else JSON.
            layer_names: the layers to read, in this order; None for the file's layers and order. From a file of `save`
                they may be a part of the layers, such as a pipeline stage; a map of another project must have exactly
                these layers.
            num_experts: E, which must match the file; if neither gives it, one more than the largest expert id.
            num_gpus: M, which must match the file; the maps of most projects do not contain it.

        Raises:
            DistplbError: with the file and the place, if it is not a placement or has other layers, experts or GPUs.
        """
        refuse_wrong_types(
            {
                "path": (path, (str, os.PathLike), "the path of a placement file"),
                "layer_names": (layer_names, (Sequence, None), "the names of layers"),
            }
        )
        num_experts = None if num_experts is None else whole_number("num_experts", num_experts, minimum=1)
        num_gpus = None if num_gpus is None else whole_number("num_gpus", num_gpus, minimum=1)
        return load_placement(Path(path), layer_names, num_experts, num_gpus, all_layers=False)


def load_placement(
    path: Path, layer_names: Sequence[str] | None, num_experts: int | None, num_gpus: int | None, *, all_layers: bool
) -> Placement:
    """Like `Placement.load`; with `all_layers`, `layer_names` must name all layers of the file."""
    check_is_file(path, _EXPECTED)
    slot_map = _read(path)
    experts = _agreed(path, "num_experts", num_experts, slot_map.num_experts)
    gpus = _agreed(path, "num_gpus", num_gpus, slot_map.num_gpus)
    if gpus is None:
        raise DistplbError(f"{path} does not contain the number of GPUs; pass num_gpus, the size of the EP group")
    names = _names_in_file(path, slot_map, layer_names, all_layers=all_layers or slot_map.layer_keys != "names")
    table = torch.tensor([slot_map.rows[name] for name in names], device="cpu")
    try:
        return Placement(table, int(table.max()) + 1 if experts is None else experts, gpus)
    except DistplbError as error:
        raise DistplbError(f"{path}: {str(error).removeprefix('Placement: ')}") from error


def _read(path: Path) -> SlotMap:
    try:
        document = read_document(path, _chosen, _MOST_BYTES, otherwise=".json")
    except DistplbError as error:
        why = f"it {str(error).removeprefix(f'{path} ')}"
        raise DistplbError(f"{path} is not a placement file ({why}); pass {_EXPECTED}") from error
    try:
        return parse_slot_map(path, document)
    except ValueError as error:
        raise DistplbError(f"{path} is not a placement file ({error}); pass {_EXPECTED}") from error


def _chosen(names: Sequence[str]) -> str:
    return next((name for name in MAPS if name in names), names[0])


def _agreed(path: Path, what: str, expected: int | None, in_file: int | None) -> int | None:
    if expected is not None and in_file is not None and expected != in_file:
        raise DistplbError(
            f"{path} has {what}={in_file} where {expected} is expected; pass the placement of this model and cluster"
        )
    return in_file if expected is None else expected


def _names_in_file(path: Path, slot_map: SlotMap, layer_names: Sequence[str] | None, *, all_layers: bool) -> list[str]:
    """The keys of the file's rows, in the order of `layer_names`."""
    rows = list(slot_map.rows)
    if layer_names is None:
        return rows
    names = [str(name) for name in layer_names]
    if not names:
        raise DistplbError(f"{path}: no layer is requested; pass at least one of {_few(rows)}")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DistplbError(f"{path}: layer {twice[:80]!r} is requested twice; pass each layer once")
    if slot_map.layer_keys == "order" and set(names) != set(rows):
        if len(names) != len(rows):
            raise DistplbError(
                f"{path} has {len(rows)} unnamed layer{'s' * (len(rows) != 1)}, but {len(names)} "
                f"{'is' if len(names) == 1 else 'are'} requested; pass a placement of exactly these layers"
            )
        return rows
    if slot_map.layer_keys == "numbers" and not set(names) & set(rows):
        numbers = [re.findall(r"[0-9]+", name) for name in names]
        if all(len(one) == 1 for one in numbers):  # such as model.layers.3.mlp
            names = [number.lstrip("0") or "0" for (number,) in numbers]
    missing = [name for name in names if name not in slot_map.rows]
    if missing:
        raise DistplbError(f"{path} has no layer {missing[0][:80]!r}; it has {_few(rows)}")
    surplus = [name for name in rows if name not in names]
    if all_layers and surplus:
        raise DistplbError(
            f"{path} also has layer {surplus[0][:80]!r}, which is not among {_few(names)}; "
            "pass a placement of exactly these layers"
        )
    if len(set(names)) != len(names):
        raise DistplbError(
            f"{path} numbers its layers, and two of {_few(list(layer_names))} have the same number; "
            "pass names whose numbers differ"
        )
    return names


def _few(names: Sequence[str]) -> str:
    return ", ".join(name[:80] for name in names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _checked_names(layer_names: Sequence[str] | None, num_layers: int) -> list[str]:
    refuse_wrong_types({"layer_names": (layer_names, (Sequence, None), "a name for each layer")})
    names = [str(layer) for layer in (range(num_layers) if layer_names is None else layer_names)]
    if len(names) != num_layers or len(set(names)) != num_layers:
        raise DistplbError(
            f"layer_names has {len(set(names))} unique name{'s' * (len(set(names)) != 1)} for {num_layers} "
            f"layer{'s' * (num_layers != 1)}; pass one unique name for each layer"
        )
    return names
