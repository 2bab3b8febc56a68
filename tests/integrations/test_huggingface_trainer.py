"""Replicas and moves in transformers' own `Trainer`, by the callback of docs/frameworks.md: the run without both."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pages import ROOT, blocks
from ranks import on_ranks
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_huggingface import batch, random_placement
from test_huggingface_replicas import CLOSE, FAR, FREELY, OWN_BATCHES, AllInFloat64, Job, apart, left_behind, watch
from transformers import Trainer, TrainerCallback, TrainingArguments

PAGE = ROOT / "docs" / "frameworks.md"
UPDATES, PARTS = 12, 2  # iterations, and micro-batches of each


def rebalancing(every: int | None, lent: int) -> Any:
    """The page's callback, as it stands there except for these options and the price of moves."""
    lines = next(block for block in blocks(PAGE, "python") if "TrainerCallback" in block)
    options = "every=500, replica_slots=2"
    assert lines.count(options) == 1
    names: dict[str, Any] = {"__name__": __name__, "FREELY": FREELY}
    exec(lines.replace(options, f"every={every}, replica_slots={lent}, moves=FREELY"), names)
    return names["Rebalancing"]()


class Seen(TrainerCallback):
    """Moves homes at random between two updates, and notes the losses and which steps of a layer had replicas."""

    def __init__(self, rebalancing: Any, moves: bool) -> None:
        self.rebalancing, self.moves, self.losses, self.slots = rebalancing, moves, list[float](), 0
        self.steps = list[bool]()
        self.generator = torch.Generator().manual_seed(1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if self.rebalancing.rebalancer.step_balancer is not None:
            watch(self.rebalancing.rebalancer.step_balancer, self.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if self.moves:
            before = self.rebalancing.rebalancer.placement
            self.rebalancing.rebalancer.apply(random_placement(before, self.generator))
            after = self.rebalancing.rebalancer.placement
            self.slots += int((after.expert_of_slot != before.expert_of_slot).sum())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **objects: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


class InFloat64(Trainer):
    """The loss is computed in float64 too."""

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        with AllInFloat64():
            return super().compute_loss(*arguments, **options)


class Built(Job):
    """The model and optimizer of a job, which its own callback rebalances."""

    def __init__(self) -> None:
        super().__init__("mixtral", OWN_BATCHES, 0)
        self.rebalancer.close()


def trained(folder: str, lent: int, every: int | None) -> dict[str, Any]:
    job, callback = Built(), rebalancing(every, lent)
    seen = Seen(callback, every is not None)
    words = torch.cat([batch(number) for number in range(2 * UPDATES * PARTS)])
    trainer = InFloat64(
        model=job.model,
        args=TrainingArguments(
            output_dir=folder,
            max_steps=UPDATES,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=PARTS,
            max_grad_norm=0.5,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": one, "labels": one} for one in words],  # type: ignore[arg-type]
        optimizers=(job.optimizer, torch.optim.lr_scheduler.ConstantLR(job.optimizer, 1.0)),
        callbacks=[callback, seen],
    )
    trainer.train()
    job.rebalancer = callback.rebalancer
    state = job.state()
    callback.rebalancer.close()
    losses: Tensor = torch.tensor(seen.losses, dtype=torch.float64)
    return {"loss": {"loss": losses}, "state": state, "slots": seen.slots, "steps": seen.steps}


def compared() -> dict[str, Any]:
    ranks, rank = str(dist.get_world_size()), str(dist.get_rank())  # accelerate reads these, as torchrun sets them
    os.environ |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
    with tempfile.TemporaryDirectory() as folder:
        plain, found = trained(folder, 0, None), trained(folder, 2, 3)
        with left_behind():
            wrong = trained(folder, 2, 3)
    return {
        "apart": {kind: apart(plain[kind], found[kind]) for kind in ("loss", "state")},
        "wrong": apart(plain["state"], wrong["state"]),
        "slots": found["slots"],
        "steps": sum(found["steps"]) / len(found["steps"]),
        "number": len(found["steps"]),
        "losses": len(plain["loss"]["loss"]),
    }


def test_a_run_of_the_trainer_with_replicas_and_moves_is_the_run_without_both() -> None:
    for rank in on_ranks(2, compared, deadline=200):
        print(rank)
        assert rank["number"] == UPDATES * PARTS * 2
        assert rank["steps"] > 0.5
        assert rank["slots"] > 0
        assert rank["losses"] == UPDATES
        assert all(distance <= CLOSE for distance in rank["apart"].values())
        assert rank["wrong"] > FAR
