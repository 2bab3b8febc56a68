"""Runs of torchtitan jobs with replicas and moving homes, what they leave, and how far two runs are apart.

Shapes: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from test_torchtitan import attached, furthest, gradients, logical
from titan_models import Job
from torch import Tensor

from distplb.replicas.lend import Lender

__all__ = ["FAULTS", "Left", "apart", "broken", "lent_job", "run", "summary", "without"]

_LOOK_EVERY = 3  # iterations; gathering all gradients takes as long as an iteration


@dataclass
class Left:
    """What a run leaves: losses, clipped gradients of every third iteration, weights and moments at its end."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    lent: int = 0  # forwards of a layer in which some GPU held a replica
    forwards: int = 0
    moved: int = 0  # slots


def gpus_of(job: Job) -> int:
    return int(job.dims.ep)


def lent_job(job: Job, left: Left, *, replica_slots: int = 2, **options: Any) -> Any:
    """The rebalancer of a job, which counts forwards with replicas; all GPUs of the EP group are one node."""
    defaults = {"replica_slots": replica_slots, "gpus_per_node": gpus_of(job), "pp_schedule": schedule_of(job)}
    events = {"on_event": lambda event: setattr(left, "moved", left.moved + event.slots_moved)}
    built = attached(job, **(defaults | events | options))
    balancer = built.step_balancer
    if balancer is not None:
        dispatch = balancer.dispatch

        def counted(layer: Any, ids: Tensor) -> Any:
            step = dispatch(layer, ids)
            left.forwards += 1
            left.lent += not step.is_trivial
            return step

        balancer.dispatch = counted
    return built


def schedule_of(job: Job) -> Any:
    return getattr(job, "schedule", None)


def run(
    job: Job,
    iterations: range,
    *,
    mode: str = "permute",
    balancer: Any = None,
    left: Left | None = None,
    **options: Any,
) -> Left:
    """Train a job under the rebalancer of `lent_job`, or another one."""
    left = left or Left()
    built = balancer or lent_job(job, left, mode=mode, **options)
    for iteration in iterations:
        looks = iteration % _LOOK_EVERY == _LOOK_EVERY - 1
        if looks:
            job.on_clipped = lambda: left.gradients.append(gradients(job, built.placement, mode))
        else:
            job.on_clipped = lambda: None
        left.losses.append(job.step(iteration))
        job.optimizers.zero_grad()
        built.step()
    left.state = logical(job, built.placement, mode)
    if balancer is None:
        built.close()
    return left


def without(job: Job, iterations: range) -> Left:
    """The run without replicas and without moves."""
    return run(job, iterations, replica_slots=0, every=None)


def apart(one: Left, other: Left) -> dict[str, float]:
    """The largest differences of losses, of gradients and of the final state; relative, in the maximum norm."""
    losses, others = (torch.tensor(left.losses, dtype=torch.float64) for left in (one, other))
    pairs = zip(one.gradients, other.gradients, strict=True)
    return {
        "losses": float((losses - others).abs().max() / others.abs().max()),
        "gradients": max(furthest(*pair) for pair in pairs),
        "state": furthest(one.state, other.state),
    }


# --- faults, on all ranks alike -----------------------------------------------------------------------------------


def _stay_away(self: Lender, loan: Any, home: Any, lent: Any) -> None:
    """Replicas' gradients are not brought home."""


_push = Lender._push


def _arrive_as_zeros(self: Lender, loan: Any) -> None:
    _push(self, loan)
    self._wait()
    for rows in loan.replica_rows:
        rows.zero_()


FAULTS: Mapping[str, tuple[str, Any]] = {
    "gradients stay away": ("bring_home", _stay_away),
    "weights do not arrive": ("_push", _arrive_as_zeros),
}


@contextmanager
def broken(fault: str) -> Iterator[None]:
    """Break what all steps do in the block."""
    name, wrong = FAULTS[fault]
    kept = getattr(Lender, name)
    setattr(Lender, name, wrong)
    try:
        yield
    finally:
        setattr(Lender, name, kept)


def summary(left: Left, reference: Left) -> SimpleNamespace:
    """What a test checks, without tensors."""
    return SimpleNamespace(**apart(left, reference), lent=left.lent, forwards=left.forwards, moved=left.moved)
