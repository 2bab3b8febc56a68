"""The metadata of a trace file, and the check that the parts in a folder belong to one job.

Shapes: L layers, E experts, M GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distplb.core.documents.text import parse_json
from distplb.errors import DistplbError
from distplb.records.archive import ArrayFile

__all__ = ["About", "check_folder", "open_part", "read_about", "write_about"]

_FORMAT, _VERSION = "distplb.trace", 1
_MAX_BYTES = 1 << 22
# The arrays of a file: kinds of dtype, number of dims.
_ARRAYS = {
    "about": ("u", 1),  # JSON, as bytes
    "load": ("u", 3),
    "iteration": ("i", 1),
    "placement_of_step": ("i", 1),
    "expert_of_slot": ("u", 3),
}


class About(NamedTuple):
    """M, the names of the L layers, a note, and which run ("life") of the job wrote the part; 0 if not recorded."""

    num_gpus: int
    layers: tuple[str, ...]
    note: str
    life: int = 0


def write_about(about: About) -> bytes:
    """Encode the metadata as JSON.

    Raises:
        DistplbError: if it is too long to be read back.
    """
    fields = about._asdict() | {"layers": list(about.layers)}
    if not about.life:
        del fields["life"]
    encoded = json.dumps({"format": _FORMAT, "version": _VERSION} | fields).encode()
    if len(encoded) > _MAX_BYTES:
        raise DistplbError(f"Trace: layer names and note take {len(encoded)} bytes; shorten the note")
    return encoded


def open_part(path: Path) -> ArrayFile:
    """Open a file with the arrays of a trace; only the headers are read.

    Raises:
        DistplbError: naming the file, if it does not have these arrays.
    """
    return ArrayFile(path, _ARRAYS)


def read_about(file: ArrayFile) -> About:
    """Read the metadata of a file.

    Raises:
        DistplbError: if it has an unknown version, is too long, or has values of a wrong type.
        ValueError, KeyError, TypeError, RecursionError: if it is damaged.
    """
    if file.shapes["about"][0] > _MAX_BYTES:
        raise DistplbError(
            f"its layer names and note take {file.shapes['about'][0]} bytes; write it with a shorter note"
        )
    document: dict[str, Any] = parse_json(file.read("about").tobytes())
    if document["format"] != _FORMAT or type(document["version"]) is not int or document["version"] != _VERSION:
        raise DistplbError(
            f"it is {str(document['format'])[:40]!r}, version {str(document['version'])[:40]}; "
            f"this distplb reads {_FORMAT!r}, version {_VERSION}"
        )
    life = document.get("life", 0)
    if type(life) is not int or life < 0:
        raise DistplbError(f"its life is {life!r:.40} where an integer of at least 0 is expected")
    return About(_num_gpus(document["num_gpus"]), _names(document["layers"]), str(document["note"]), life)


def _num_gpus(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise DistplbError(f"its num_gpus is {value!r:.40} where a positive integer is expected")
    return value


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(type(name) in (str, int) for name in values):
        raise DistplbError(f"its layers are {values!r:.40} where a list of names is expected")
    return tuple(str(name) for name in values)


def check_folder(folder: Path, layers: Sequence[str], num_experts: int, num_gpus: int) -> int:
    """Check that all parts in a folder belong to a job with these layers, experts and GPUs.

    Parts that cannot be read are skipped: a resumed job continues next to them, and `Trace.read` reports them.

    Returns:
        The life that a writer begins here: one more than the last life of the parts.

    Raises:
        DistplbError: naming the file, if a part belongs to another job.
    """
    life = 0
    for path, about, experts in _parts(folder):
        if (about.layers, experts, about.num_gpus) != (tuple(layers), num_experts, num_gpus):
            raise DistplbError(
                f"{path} belongs to another job: it has {_shown(about.layers, experts, about.num_gpus)}; this job has "
                f"{_shown(layers, num_experts, num_gpus)}; record in another folder, or move the files away"
            )
        life = max(life, about.life)
    return life + 1


def _parts(folder: Path) -> Iterator[tuple[Path, About, int]]:
    for path in sorted(folder.glob("*.npz")):
        try:
            file = open_part(path)
            yield path, read_about(file), file.shapes["load"][2]
        except (DistplbError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue


def _shown(layers: Sequence[str], num_experts: int, num_gpus: int) -> str:
    names = f"{layers[0]!r:.60}" + (f" to {layers[-1]!r:.60}" if len(layers) > 1 else "") if layers else "none"
    return f"layers: {len(layers)} ({names}), experts: {num_experts}, GPUs: {num_gpus}"
