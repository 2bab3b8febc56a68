"""The lines of docs/frameworks.md for torchtitan: its own `Trainer` with them, on two gloo processes.

The class is read from the page and run; only its `every` is made smaller. The configuration is torchtitan's for its
debug Qwen3-MoE, cut down, with its tokenizer, text loader, optimizers, selective recomputation and checkpointer; words
and vocabulary are made here. The Trainer expects CUDA and a later torch, so this test replaces some of its parts:

- the device is "cpu", and a stub answers for its device module (name, memory, index);
- FSDP2's reductions are plain sums, because gloo has none with a factor;
- experts are `ExactExperts`: torchtitan's grouped products, in float32 instead of bfloat16;
- attention is `ScaledDotProductAttention`, because the default needs CUDA;
- each rank draws its weights from its own seed, because DTensor's generator, which would do so, is for GPUs;
- process groups keep their timeouts, because `torch.distributed.set_timeout` is not in torch 2.13;
- rank 0 does not sleep for two seconds at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

pytest.importorskip("torchtitan")

import torchtitan.distributed.parallel_dims as titan_meshes
from titan_models import ExactExperts
from titan_runs import broken
from torchtitan.components import metrics
from torchtitan.distributed import utils as titan_distributed
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.moe import MoE
from torchtitan.tools import utils as titan_tools

PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
EVERY, SAVED, STEPS = 3, 6, 9  # the save comes right after a move
EXPERTS, TOP_K, HIDDEN, WORDS, SEQUENCE = 16, 4, 32, 200, 32
# Larger than torchtitan's, so that experts matter from the first steps.
WEIGHT = partial(torch.nn.init.normal_, std=0.1)
TOLERANCE = 1e-5  # relative; float32 sums are taken in another order
LENT_TOLERANCE = 3e-4  # replicas' gradients are too, and AdamW's first steps follow the sign of the smallest


def lines_of_page() -> str:
    """The Python block with the class."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "BalancedTrainer" in block)


def balanced_trainer(replica_slots: int = 2) -> Any:
    """The page's class, as it stands there except for `every` and perhaps `replica_slots`."""
    lines = lines_of_page()
    assert lines.count("every=500") == lines.count("replica_slots=2") == 1
    names: dict[str, Any] = {"__name__": __name__}
    lines = lines.replace("every=500", f"every={EVERY}").replace("replica_slots=2", f"replica_slots={replica_slots}")
    exec(lines, names)
    return names["BalancedTrainer"]


# --- replacements for a GPU -----------------------------------------------------------------------------------------


def replace_what_needs_a_gpu() -> None:
    import torchtitan.trainer as titan  # slow to import; only these processes need it

    nothing = {name: lambda *_: None for name in ("set_device", "reset_peak_memory_stats", "empty_cache")}
    device = SimpleNamespace(
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_name=lambda _: "CPU",
        get_device_properties=lambda _: SimpleNamespace(total_memory=1),
        memory_stats=lambda _: {},
        **nothing,
    )
    titan_tools.device_type = metrics.device_type = titan_meshes.device_type = "cpu"
    titan_tools.device_module = metrics.device_module = device
    titan_distributed.set_pg_timeouts = lambda **_: None
    titan.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _: None)
    # As torchrun sets them.
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "LOCAL_WORLD_SIZE": str(dist.get_world_size())}


def on_cpu(spec: Any) -> Any:
    """The model's specification, whose `parallelize_fn` also makes the changes listed in the docstring above."""

    def parallelize(model: Any, **arguments: Any) -> Any:
        model = spec.parallelize_fn(model, **arguments)
        for module in model.modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):
                module.set_force_sum_reduction_for_comms(True)
        torch.manual_seed(dist.get_rank())
        return model

    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return dataclasses.replace(spec, parallelize_fn=parallelize)


# --- a small job ----------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    vocabulary = {f"w{word}": word for word in range(WORDS)} | {"<s>": WORDS, "</s>": WORDS + 1}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def add_texts() -> None:
    """Add a data set to torchtitan's text loader, where its documentation says to."""
    import datasets
    from torchtitan.hf_datasets import DatasetConfig
    from torchtitan.hf_datasets.text_datasets import DATASETS

    generator = torch.Generator().manual_seed(0)
    # Skewed, so that some experts are hot.
    words = (torch.rand(100, SEQUENCE, generator=generator) ** 3 * WORDS).long().cumsum(1) % WORDS
    texts = [{"text": " ".join(f"w{word}" for word in text)} for text in words.tolist()]
    DATASETS["words"] = DatasetConfig(
        path="", loader=lambda _: datasets.Dataset.from_list(texts), sample_processor=lambda sample: sample["text"]
    )


def job(folder: Path, **checkpoint: Any) -> Any:
    """A torchtitan configuration, cut down, with expert parallelism over both ranks."""
    from torchtitan.models.qwen3.config_registry import qwen3_moe_debug

    config = qwen3_moe_debug()
    model = config.model_spec.model
    del model.layers[2:]
    for layer in model.layers:
        router, experts = layer.moe.router, layer.moe.routed_experts
        for part in (layer.moe, router, experts.token_dispatcher):
            part.num_experts = EXPERTS
        router.gate.out_features = EXPERTS
        router.top_k = experts.token_dispatcher.top_k = TOP_K
        inner = experts.inner_experts
        weights = dict.fromkeys(inner.param_init, WEIGHT)
        experts.inner_experts = ExactExperts.Config(
            dim=inner.dim, hidden_dim=HIDDEN, num_experts=EXPERTS, param_init=weights
        )
    config.model_spec = on_cpu(config.model_spec)
    config.hf_assets_path, config.dump_folder, config.dataloader.dataset = str(folder), str(folder), "words"
    config.parallelism.expert_parallel_degree, config.parallelism.spmd_backend = 2, "partial_dtensor"
    training = config.training
    training.local_batch_size, training.seq_len, training.steps = 4, SEQUENCE, STEPS
    training.disable_cuda_graphs, training.mixed_precision_param = True, "float32"
    config.optimizer.param_groups[0].optimizer_kwargs["lr"] = 3e-3
    config.checkpoint.interval = SAVED
    for key, value in checkpoint.items():
        setattr(config.checkpoint, key, value)
    return config


class Losses(metrics.BaseLogger):
    """A torchtitan logger that keeps the losses."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.found.append(values["loss_metrics/global_avg_loss"])


def run(trainer: Any, before: Callable[[Any], None] = lambda _: None) -> dict[str, Any]:
    """Call `train()`, with `before(trainer)` once a checkpoint is loaded; return its losses and placements.

    A placement is the rebalancer's iteration and the expert of each slot, before the first step and after each.
    "held" is whether a step ended with gradients still held, "lent" in how many forwards of a layer replicas were.
    """
    trainer.metrics_processor.logger = losses = Losses()
    placements: list[tuple[int, list[list[int]]]] = []
    train_step, has, held, lent = trainer.train_step, hasattr(trainer, "rebalancer"), [], []
    balancer = trainer.rebalancer.step_balancer if has else None
    if balancer is not None:
        compute = balancer.compute
        balancer.compute = lambda step, *others: (lent.append(not step.is_trivial), compute(step, *others))[1]

    def placement() -> tuple[int, list[list[int]]]:
        return trainer.rebalancer.iteration, trainer.rebalancer.placement.expert_of_slot.tolist()

    def watched(data_iterator: Any) -> None:
        if not losses.found:
            before(trainer)
            placements.extend([placement()] if has else [])
        train_step(data_iterator)
        placements.extend([placement()] if has else [])
        held.append(any(weight.grad is not None for weight in trainer.model_parts[0].parameters()))

    trainer.train_step = watched
    trainer.train()
    trainer.close()
    return {"losses": losses.found, "placements": placements, "held": any(held), "lent": sum(lent)}


def mistake(trainer: Any) -> None:
    """Move experts without their router rows."""
    for module in trainer.model_parts[0].modules():
        if isinstance(module, MoE):
            weight: Any = module.routed_experts.inner_experts.w2_EDF
            local = weight.to_local().detach()
            local.copy_(local.roll(1, 0))


def broken_run(trainer: Any) -> dict[str, Any]:
    """Gradients of replicas are not brought home."""
    with broken("gradients stay away"):
        return run(trainer)


def jobs(folder: str) -> dict[str, Any]:
    """All runs, on one rank of two."""
    import torchtitan.trainer as titan

    replace_what_needs_a_gpu()
    add_texts()
    balanced, homes, path = balanced_trainer(), balanced_trainer(0), Path(folder)
    loading = {"enable": True, "load_only": True, "load_step": SAVED}
    without = job(path, **loading, exclude_from_loading=["rebalancer"])
    without.training.steps = SAVED + 1
    return {
        "plain": run(titan.Trainer(job(path))),
        "balanced": run(balanced(job(path, enable=True))),
        "homes": run(homes(job(path))),
        "broken": broken_run(balanced(job(path))),
        "resumed": run(balanced(job(path, **loading))),
        "resumed without replicas": run(homes(job(path, **loading))),
        "without its state": run(balanced(without), before=mistake),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        one, other = on_ranks(2, jobs, folder, deadline=240)
    assert one == other  # torchtitan's losses are means over all ranks
    return dict(one)


def contiguous() -> list[list[int]]:
    return [list(range(EXPERTS))] * 2


# --- tests ----------------------------------------------------------------------------------------------------------


def test_the_trainer_rebalances_every_few_steps(found: dict[str, Any]) -> None:
    placements = found["balanced"]["placements"]
    assert [iteration for iteration, _ in placements] == list(range(STEPS + 1))
    assert placements[0][1] == contiguous()
    changed = [step for step in range(1, STEPS + 1) if placements[step][1] != placements[step - 1][1]]
    assert changed[:2] == [EVERY, SAVED]
    assert all(step % EVERY == 0 for step in changed)


def test_no_gradients_are_held_when_experts_move(found: dict[str, Any]) -> None:
    assert found["plain"]["held"]  # torchtitan's own step keeps them
    assert not found["balanced"]["held"]


def test_losses_are_those_of_the_trainer_without(found: dict[str, Any]) -> None:
    plain = found["plain"]["losses"]
    assert len(plain) == STEPS
    assert plain[-1] < 0.9 * plain[0]  # a model that does not learn would agree with anything
    assert found["homes"]["losses"] == pytest.approx(plain, rel=TOLERANCE)
    assert found["balanced"]["losses"] == pytest.approx(plain, rel=LENT_TOLERANCE)
    assert max(abs(one / other - 1) for one, other in zip(found["broken"]["losses"], plain, strict=True)) > (
        4 * LENT_TOLERANCE
    )


def test_it_lends_replicas(found: dict[str, Any]) -> None:
    assert found["balanced"]["lent"] > STEPS
    assert found["resumed"]["lent"] > 0
    assert found["resumed without replicas"]["lent"] == 0


@pytest.mark.parametrize("run", ["resumed", "resumed without replicas"])
def test_its_checkpointer_saves_and_loads_the_placement_and_the_job_goes_on(found: dict[str, Any], run: str) -> None:
    resumed, whole = found[run], found["balanced"]
    assert resumed["placements"] == whole["placements"][SAVED:]
    assert resumed["losses"] == pytest.approx(whole["losses"][SAVED:], rel=LENT_TOLERANCE)


def test_without_the_rebalancers_state_its_placement_is_that_of_the_start(found: dict[str, Any]) -> None:
    assert found["without its state"]["placements"][0] == (0, contiguous())


def test_losses_would_show_experts_that_moved_without_their_router_rows(found: dict[str, Any]) -> None:
    right, wrong = found["balanced"]["losses"][SAVED], found["without its state"]["losses"][0]
    assert abs(wrong / right - 1) > 4 * LENT_TOLERANCE
