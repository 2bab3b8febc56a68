"""The README's code runs as it stands, and its commands exist."""

from __future__ import annotations

import ast
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from ranks import on_ranks

import distplb
from distplb import EventLog, Placement, RebalanceEvent, Record, Trace
from distplb.cli import output
from distplb.cli.main import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf" *```{language}\n(.*?)```", README, flags=re.DOTALL)


def own_blocks() -> list[str]:
    """Those that need no framework."""
    return [block for block in blocks("python") if "distplb.integrations" not in block]


def lines_of(framework: str) -> str:
    """The block that uses a framework's adapter."""
    (found,) = (block for block in blocks("python") if f"distplb.integrations import {framework}" in block)
    return found


def leave_events(layers: tuple[str, ...]) -> None:
    """As a job of the README's lines leaves them behind."""
    Path("run/events.jsonl").unlink(missing_ok=True)
    log = EventLog("run/events.jsonl")
    log(RebalanceEvent(iteration=60, layers=layers, decision="kept", reason="", seconds={}, last_applied=60))
    log.close()


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
        "group": dist.group.WORLD,
        "num_layers": 2,
        "num_experts": 8,
        "num_nodes": 1,
        "gpus_per_node": 1,
        "run_expert": model.moes[0].run_one_expert,
    }
    os.chdir(folder)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # as under torchrun
    counts = torch.randint(1000, (120, 2, 16))
    torch.save(counts, "counts.pt")
    start = Placement.contiguous(2, 16, 4)
    trace = Trace(counts, (start,), torch.zeros(120, dtype=torch.int64), torch.arange(120))
    trace.save("trace.npz")
    leave_events(trace.layers)
    trace.save("run/000000000000.npz")
    iterations = []
    for block in own_blocks():
        if "Rebalancer(" in block and "rebalancer" in names:
            names["rebalancer"].close()  # each block stands for a job of its own
        if 'record=distplb.Record("run"' in block:  # which is resumed here; the trace was of another
            Path("run/000000000000.npz").unlink()
            leave_events(tuple(names["moes"]))
        exec(compile(textwrap.dedent(block), "README.md", "exec"), names)
        iterations.append(names["rebalancer"].iteration)
    assert iterations[0] == 4
    return len(own_blocks())


def test_every_python_snippet_runs(tmp_path: Path) -> None:
    assert on_ranks(1, snippets_run, str(tmp_path), deadline=60)[0] >= 2


def huggingface_lines(folder: str) -> tuple[int, bool]:
    """On one rank; a rebalance is asked for in every second iteration instead of every 500th."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    os.chdir(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(64, (2, 16))
    names = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    names["data"] = [{"input_ids": tokens, "labels": tokens}] * 4
    exec(lines_of("huggingface").replace("every=500", "every=2"), names)
    return names["rebalancer"].iteration, Path("checkpoint/config.json").exists()


def test_the_lines_of_transformers_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert on_ranks(1, huggingface_lines, str(tmp_path), deadline=60) == [(4, True)]


def megatron_lines() -> tuple[int, int, int]:
    """On two stages of a pipeline, of which the first has no MoE layer."""
    from megatron_models import Job, groups

    events: list[Any] = []
    with groups(expert_parallel=2, pipeline=2):
        job = Job(num_layers=2, moe_layer_freq=[0, 1])
        job.have_it_step_as_on_cuda()
        names = {"model": job.chunks, "optimizer": job.optimizer, "train_iters": 4, "batch_size": 1}
        names |= {"forward_backward": job.forward_backward, "opt_param_scheduler": job.schedule}
        names |= {"told": events.append, "Record": Record}
        exec(lines_of("megatron").replace("every=500", "every=2, gpus_per_node=4, record=Record(on_event=told)"), names)
        return names["rebalancer"].iteration, len(events), job.schedule.num_steps


def test_the_lines_of_megatron_run_on_a_pipeline() -> None:
    pytest.importorskip("megatron.core")
    found = on_ranks(4, megatron_lines, deadline=90)
    assert found[:2] == [(4, 0, 4)] * 2
    assert found[2:] == [(4, 3, 4)] * 2  # two rebalances, and the first once more


@pytest.mark.parametrize("session", [one for block in blocks("console") for one in block.strip().split("\n\n$ ")])
def test_a_recorded_session_says_what_the_command_says(session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the line breaks of paragraphs, and the seconds in the last column of `compare`."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(output, "_PIPE_WIDTH", 100)
    command, _, recorded = session.removeprefix("$ ").partition("\n")
    said = CliRunner().invoke(main, command.split()[1:])
    assert said.exit_code == 0, said.output
    seconds = r"(?<= )\d+\.\d{3} *$" if " compare " in command else r"$^"
    found, wanted = (re.sub(seconds, "", text, flags=re.MULTILINE).split() for text in (said.stdout, recorded))
    assert found == wanted


def test_the_messages_that_it_explains_are_those_of_the_code() -> None:
    rows = README.partition("## Troubleshooting")[2].partition("\n## ")[0].splitlines()
    quoted = [text for row in rows if row.startswith("| `") for text in re.findall(r"`(.*?)`", row.split("|")[1])]
    assert len(quoted) > 12
    texts = [text for path in Path(distplb.__file__).parent.rglob("*.py") for text in messages(path)]
    for one in quoted:
        parts = [part.strip() for part in one.split("…") if part.strip()]
        assert any(all(part in text for part in parts) for text in texts), one


def messages(path: Path) -> list[str]:
    """Texts in a file's code, joined as Python joins them, with … for what is filled in."""
    constants = {
        node.targets[0].id: str(node.value.value)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }

    def filled(part: ast.expr) -> str:
        if isinstance(part, ast.Constant):
            return str(part.value)
        return constants.get(ast.unparse(part.value), "…") if isinstance(part, ast.FormattedValue) else "…"

    nodes = list(ast.walk(ast.parse(path.read_text())))
    joined = ["".join(map(filled, node.values)) for node in nodes if isinstance(node, ast.JoinedStr)]
    return joined + [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_working_code_stands_by_line_15() -> None:
    first = README.splitlines()[:15]
    assert "```python" in first
    assert any("MoELayer(" in line for line in first)


def test_the_commands_and_paths_that_it_names_exist() -> None:
    for path in re.findall(r"(?:launch|examples|benchmarks|distplb|tests)/[\w./-]*\w", README):
        assert (ROOT / path).exists(), path
