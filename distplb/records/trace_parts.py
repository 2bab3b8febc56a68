"""What a file of a trace says of itself, without its loads; and whether a folder's parts are of one job.

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
# Arrays of a file: kinds of dtype, dims.
_ARRAYS = {
    "about": ("u", 1),  # JSON, as bytes
    "load": ("u", 3),
    "iteration": ("i", 1),
    "placement_of_step": ("i", 1),
    "expert_of_slot": ("u", 3),
}


class About(NamedTuple):
    """M, the L names, a note, and which life of the job wrote the part: 0 where that was not written down."""

    num_gpus: int
    layers: tuple[str, ...]
    note: str
    life: int = 0


def write_about(about: About) -> bytes:
    """As JSON.

    Raises:
        DistplbError: if it is too long to be read again.
    """
    fields = about._asdict() | {"layers": list(about.layers)}
    if not about.life:
        del fields["life"]
    encoded = json.dumps({"format": _FORMAT, "version": _VERSION} | fields).encode()
    if len(encoded) > _MAX_BYTES:
        raise DistplbError(f"Trace: names and note take {len(encoded)} bytes; shorten the note")
    return encoded


def open_part(path: Path) -> ArrayFile:
    """A file with the arrays of a trace, of which only the headers were read.

    Raises:
        DistplbError: naming the file, if it is none.
    """
    return ArrayFile(path, _ARRAYS)


def read_about(file: ArrayFile) -> About:
    """What a file says of itself.

    Raises:
        DistplbError: if it is of a version that is not known.
        ValueError, KeyError, TypeError, RecursionError: if it is damaged.
    """
    if file.shapes["about"][0] > _MAX_BYTES:
        raise DistplbError(f"it has names and a note of {file.shapes['about'][0]} bytes; write it anew")
    document: dict[str, Any] = parse_json(file.read("about").tobytes())
    if document["format"] != _FORMAT or type(document["version"]) is not int or document["version"] != _VERSION:
        raise DistplbError(
            f"it is {str(document['format'])[:40]!r}, version {str(document['version'])[:40]}; "
            f"this distplb reads {_FORMAT!r}, version {_VERSION}"
        )
    life = document.get("life", 0)
    if type(life) is not int or life < 0:
        raise DistplbError(f"its life is {life!r:.40}, which is no number of one")
    return About(_num_gpus(document["num_gpus"]), _names(document["layers"]), str(document["note"]), life)


def _num_gpus(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise DistplbError(f"its num_gpus is {value!r:.40}, which is no number of GPUs")
    return value


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(type(name) in (str, int) for name in values):
        raise DistplbError(f"its layers are {values!r:.40}, which is no list of names")
    return tuple(str(name) for name in values)


def check_folder(folder: Path, layers: Sequence[str], num_experts: int, num_gpus: int) -> int:
    """Check that all parts in a folder are of a job with these layers, experts and GPUs.

    Parts that cannot be read are passed over: a resumed job goes on beside them, and who reads the trace hears of them.

    Returns:
        The life that a writer begins here: one more than the last of the parts.

    Raises:
        DistplbError: naming the file, if one is of another job.
    """
    life = 0
    for path, about, experts in _parts(folder):
        if (about.layers, experts, about.num_gpus) != (tuple(layers), num_experts, num_gpus):
            raise DistplbError(
                f"{path} is of another job: it has {_shown(about.layers, experts, about.num_gpus)}; this one "
                f"{_shown(layers, num_experts, num_gpus)}; record in a folder of its own, or move the files away"
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
