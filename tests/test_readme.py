"""The README's code runs as it stands, and its commands exist."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import on_ranks

from distplb import Placement, Trace

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf" *```{language}\n(.*?)```", README, flags=re.DOTALL)


def snippets_run(folder: str) -> int:
    """All Python of the README, one block after the other, around the example's model on one rank."""
    sys.path.insert(0, str(ROOT / "examples"))
    from moe_model import Config, Transformer

    torch.manual_seed(0)
    model = Transformer(Config(layers=2, experts=8, dim=16, ffn=16, heads=2), dist.group.WORLD, seed=0)
    tokens = torch.randint(256, (2, 17))
    names = {
        "model": lambda batch: model(*batch),
        "moes": {f"blocks.{i}.moe": moe for i, moe in enumerate(model.moes)},
        "optimizer": torch.optim.AdamW(model.parameters()),
        "data": [(tokens[:, :-1], tokens[:, 1:])] * 4,
        "ep_group": dist.group.WORLD,
        "num_layers": 2,
        "num_experts": 8,
        "num_nodes": 1,
        "gpus_per_node": 1,
        "run_expert": model.moes[0].run_one_expert,
    }
    os.chdir(folder)
    counts = torch.randint(1000, (120, 2, 16))
    torch.save(counts, "counts.pt")
    start = Placement.contiguous(2, 16, 4)
    Trace(counts, (start,), torch.zeros(120, dtype=torch.int64), torch.arange(120)).save("trace.npz")
    iterations = []
    for block in blocks("python"):
        exec(compile(textwrap.dedent(block), "README.md", "exec"), names)
        iterations.append(names["rebalancer"].iteration)
    assert iterations[0] == 4
    return len(blocks("python"))


def test_every_python_snippet_runs(tmp_path: Path) -> None:
    assert on_ranks(1, snippets_run, str(tmp_path), deadline=60)[0] >= 2


def test_working_code_stands_by_line_15() -> None:
    first = README.splitlines()[:15]
    assert "```python" in first
    assert any("MoELayer(" in line for line in first)


def test_the_commands_and_paths_that_it_names_exist() -> None:
    for path in re.findall(r"(?:launch|examples|benchmarks|distplb|tests)/[\w./-]*\w", README):
        assert (ROOT / path).exists(), path
