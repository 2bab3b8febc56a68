"""The pages are true: their code runs, commands print their recorded sessions, their links have targets."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pages import PAGES, ROOT, Session, anchors, blocks, is_as_printed, links, sessions
from ranks import on_ranks

import distplb
from distplb import EventLog, Placement, RebalanceEvent, Record, Trace
from distplb.comm.torchdist import TorchComm

README, FRAMEWORKS = ROOT / "README.md", ROOT / "docs" / "frameworks.md"
EXAMPLE = ROOT / "examples" / "minimal.py"


def own_blocks(page: Path) -> list[str]:
    """Those that need no framework and are no file of their own."""
    return [one for one in blocks(page, "python") if "distplb.integrations" not in one and one != EXAMPLE.read_text()]


def test_the_readme_can_be_read_at_once_and_shows_the_example_by_line_15() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 250
    assert "```python" in lines[:15]
    assert blocks(README, "python")[0] == EXAMPLE.read_text()
    assert len(EXAMPLE.read_text().splitlines()) < 60


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_example_trains_in_expert_parallel_groups_and_moves_experts(device: str, tmp_path: Path) -> None:
    ranks = 4 if device == "cpu" else min(4, torch.cuda.device_count() // 2 * 2)
    if not ranks:
        pytest.skip("it takes two CUDA devices")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, str(EXAMPLE)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    events = distplb.read_events(tmp_path / "run" / "events.jsonl")
    assert [event.iteration for event in events] == [20, 40, 60, 80, 100]
    assert events[0].decision == "moved"
    assert events[0].num_experts == 16
    for before, after in zip(events[0].imbalance_before, events[0].imbalance_after, strict=True):
        assert before is not None
        assert after is not None
        assert after < before


def leave_events(layers: tuple[str, ...]) -> None:
    """As a job of a page's lines leaves them behind."""
    Path("run/events.jsonl").unlink(missing_ok=True)
    log = EventLog("run/events.jsonl")
    log(RebalanceEvent(iteration=60, layers=layers, decision="kept", reason="", seconds={}, last_applied=60))
    log.close()


def snippets_run(page: Path, folder: str) -> int:
    """All Python of a page, one block after the other, around the example's model on one rank."""
    sys.path.insert(0, str(ROOT / "examples"))
    from moe_model import Config, Transformer

    torch.manual_seed(0)
    model = Transformer(Config(layers=2, experts=8, dim=16, ffn=16, heads=2), dist.group.WORLD, seed=0)
    window = distplb.LoadWindow(2, 8, num_steps=8)
    layers = [
        distplb.MoELayer(
            name=f"blocks.{i}.moe",
            experts={"w_in": moe.w_in, "w_out": moe.w_out},
            router={"weight": moe.router.weight},
        )
        for i, moe in enumerate(model.moes)
    ]
    names = {
        "distplb": distplb,
        "TorchComm": TorchComm,
        "layers": layers,
        "window": window,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "group": dist.group.WORLD,
        "num_nodes": 1,
        "gpus_per_node": 1,
        "run_expert": model.moes[0].run_one_expert,
        "counts": torch.randint(1000, (120, 2, 16)),
    }
    os.chdir(folder)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # as under torchrun
    torch.save(names["counts"], "counts.pt")
    start = Placement.contiguous(2, 16, 4)
    trace = Trace(names["counts"], (start,), torch.zeros(120, dtype=torch.int64), torch.arange(120))
    trace.save("trace.npz")
    leave_events(tuple(layer.name for layer in layers))
    for block in own_blocks(page):
        if "write_report" in block:  # of a run that has both; the folder's own trace would be of other experts
            leave_events(trace.layers)
            trace.save("run/000000000000.npz")
        exec(compile(block, page.name, "exec"), names)
        if "rebalancer" in names:
            names.pop("rebalancer").close()  # each block stands for a job of its own
    return len(own_blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if own_blocks(page)], ids=lambda page: page.name)
def test_every_python_snippet_runs(page: Path, tmp_path: Path) -> None:
    assert on_ranks(1, snippets_run, page, str(tmp_path), deadline=60)[0] >= 1


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "pycon")], ids=lambda page: page.name)
def test_examples_with_prompts_print_what_they_show(page: Path) -> None:
    source = "\n".join(blocks(page, "pycon"))
    example = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), 0)
    failed, attempted = doctest.DocTestRunner().run(example)
    assert attempted
    assert not failed


# --- the frameworks -----------------------------------------------------------------------------------------------


def lines_of(page: Path, framework: str) -> str:
    """The page's block that uses a framework's adapter, with rebalances in every second iteration."""
    found = [one for one in blocks(page, "python") if f"distplb.integrations import {framework}" in one]
    (block,) = (one for one in found if "TrainerCallback" not in one)  # which test_huggingface_trainer.py runs
    assert block.count("every=500") == 1
    return block.replace("every=500", "every=2")


def built_and_stepped(framework: str) -> tuple[str, str]:
    """The README's lines for a framework: those before the loop, and the one in it."""
    build, step = lines_of(README, framework).rstrip("\n").rsplit("\n", 1)
    assert step.startswith("rebalancer.step()")
    return build, step


def huggingface_lines(folder: str) -> tuple[int, bool, int]:
    from transformers import AutoModelForCausalLM, MixtralConfig

    os.chdir(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(64, (2, 16))
    names = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    names["data"] = [{"input_ids": tokens, "labels": tokens}] * 4
    exec(lines_of(FRAMEWORKS, "huggingface"), names)
    iteration = names.pop("rebalancer").close() or 4
    build, step = built_and_stepped("huggingface")
    exec(build, names)
    for batch in names["data"]:
        model(**batch).loss.backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
        exec(step, names)
    return iteration, Path("checkpoint/config.json").exists(), names["rebalancer"].iteration


def test_the_lines_of_transformers_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert on_ranks(1, huggingface_lines, str(tmp_path), deadline=60) == [(4, True, 4)]


def torchtitan_lines() -> tuple[int, int]:
    from titan_models import Job, meshes

    os.environ["LOCAL_WORLD_SIZE"] = "2"  # as under torchrun
    dims = meshes(ep=2)
    job = Job(dims, steps=4)
    names = {"model_parts": [job.model], "optimizers": job.optimizers, "parallel_dims": dims}
    build, step = built_and_stepped("torchtitan")
    exec(build, names)
    for iteration in range(4):
        job.backward(iteration)
        job.optimizers.step()
        job.optimizers.zero_grad()
        exec(step, names)
    return names["rebalancer"].iteration, names["rebalancer"].last_applied


def test_the_readmes_lines_of_torchtitan_run() -> None:
    """Those of docs/frameworks.md, a whole Trainer, run in tests/integrations/test_torchtitan_trainer.py."""
    pytest.importorskip("torchtitan")
    assert on_ranks(2, torchtitan_lines, deadline=120) == [(4, 4)] * 2


def megatron_lines() -> tuple[int, int, int, int]:
    """On two stages of a pipeline, of which the first has no MoE layer."""
    from megatron_models import Job, groups

    events: list[Any] = []
    with groups(expert_parallel=2, pipeline=2):
        job = Job(num_layers=2, moe_layer_freq=[0, 1])
        job.have_it_step_as_on_cuda()
        names = {"model": job.chunks, "optimizer": job.optimizer, "train_iters": 4, "batch_size": 1}
        names |= {"forward_backward": job.forward_backward, "opt_param_scheduler": job.schedule}
        names |= {"record": Record(on_event=events.append)}
        options = "every=2, gpus_per_node=4, record=record"
        exec(lines_of(FRAMEWORKS, "megatron").replace("every=2", options), names)
        rebalancer = names.pop("rebalancer")
        iteration, steps = rebalancer.iteration, job.schedule.num_steps
        rebalancer.close()
        build, step = built_and_stepped("megatron")
        exec(build.replace("every=2", "every=2, gpus_per_node=4"), names)
        for number in range(2):
            job.forward_backward(number)
            assert job.optimizer.step()[0]
            job.optimizer.zero_grad()
            exec(step, names)
        return iteration, len(events), steps, names["rebalancer"].iteration


def test_the_lines_of_megatron_run_on_a_pipeline() -> None:
    pytest.importorskip("megatron.core")
    results = on_ranks(4, megatron_lines, deadline=90)
    assert results[:2] == [(4, 0, 4, 2)] * 2
    assert results[2:] == [(4, 3, 4, 2)] * 2  # two rebalances, and the first once more


# --- sessions, messages, links ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "session", [one for page in PAGES for one in sessions(page)], ids=lambda one: f"{one.page.name}: {one.command}"
)
def test_a_recorded_session_is_what_the_command_prints(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert is_as_printed(session)


def test_a_session_that_is_not_printed_so_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    session = Session(README, "distplb --version", f"distplb, version {distplb.__version__}\n")
    assert is_as_printed(session)
    assert is_as_printed(session._replace(recorded=f"distplb,\n...\n{distplb.__version__}\n"))
    assert not is_as_printed(session._replace(recorded="distplb, version 17\n"))
    assert not is_as_printed(session._replace(recorded=f"...\n{distplb.__version__}\nand more\n"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(
        r"(?<![\w./-])(?:launch|examples|benchmarks|distplb|tests|docs)/[\w./-]*\w", page.read_text()
    ):
        assert (ROOT / path).exists(), path
