"""Files that a case writes, and cases that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from distplb.records.read_loads import read_loads
from inputs.case import Case

__all__ = ["PLACEMENT", "Content", "array", "counts_case", "placement_text", "written"]


Content = str | bytes | Callable[[Path], object]


def written(folder: Path, name: str, content: Content) -> Path:
    path = folder / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def counts_case(description: str, answer: str, name: str, content: Content) -> Case:
    """A case that reads a file as counts, and shows the load and the names of the layers."""

    def run(folder: Path) -> str:
        loads = read_loads(written(folder, name, content))
        return f"{loads.load.tolist()}, layers: {', '.join(loads.layers)}"

    return Case(description, answer, run)


def array(values: object, dtype: object = np.int64) -> Callable[[Path], object]:
    return lambda path: np.save(path, np.array(values, dtype))


PLACEMENT = {
    "format": "distplb.placement",
    "version": 1,
    "num_experts": 4,
    "num_gpus": 2,
    "expert_of_slot": {"a": [0, 2, 1, 3], "b": [3, 0, 1, 2]},
}


def placement_text(**changed: object) -> str:
    return json.dumps(PLACEMENT | changed)
