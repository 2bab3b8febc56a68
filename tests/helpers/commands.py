"""Runs the commands in this process, on random loads and traces.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from distplb import Placement, Topology, Trace
from distplb.cli.main import main

__all__ = ["GPUS", "TOPOLOGY", "assert_refused", "document", "drawn", "printed", "run", "saved", "traced"]

GPUS = ["--gpus-per-node", "2", "--engine", "reference"]
TOPOLOGY = Topology(num_nodes=1, gpus_per_node=2)


def drawn(steps: int = 6, layers: int = 3, experts: int = 8) -> Tensor:
    """Draw a skewed load `[T, L, E]`."""
    random = np.random.default_rng(0)
    return torch.from_numpy(random.lognormal(4, 1, (steps, layers, experts)).astype(np.int64) + 1)


def saved(path: Path, load: Tensor | None = None) -> Path:
    np.save(path, (drawn() if load is None else load).numpy())
    return path


def traced(path: Path) -> Path:
    load = drawn()
    steps, layers, experts = load.shape
    placement = Placement.contiguous(layers, experts, 2)
    Trace(load, (placement,), torch.zeros(steps).long(), torch.arange(steps), ("a", "b", "c")).save(path)
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def printed(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert all(line.startswith("Hint: ") for line in result.stderr.splitlines())
    assert "\x1b" not in result.stdout
    return result.stdout


def document(*words: object) -> dict[str, Any]:
    result = json.loads(printed(*words, "--json"))
    assert isinstance(result, dict)
    return result


def assert_refused(result: Result, words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(words, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit)
