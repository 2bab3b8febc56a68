"""A rank of a torchtitan job with replicas is killed in a step: the other one ends with an error in time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist
from ranks import outcomes_on_ranks

pytest.importorskip("torchtitan")

from titan_models import ExactExperts, Job, meshes
from titan_runs import Left, lent_job

from distplb.errors import DistplbError
from distplb.replicas.lend import Lender

DEADLINE = 5.0  # of distplb's waits, in seconds
VICTIM = 1
# Name: what the victim is killed in.
PLACES: dict[str, tuple[type, str]] = {
    "push": (Lender, "_push"),
    "experts": (ExactExperts, "forward"),
    "gradients come home": (Lender, "bring_home"),
}


def killed(place: str) -> str:
    """Train two iterations; the victim is killed in the second."""
    job = Job(meshes(2), steps=4)
    left = Left()
    lent_job(job, left, every=None, deadline=DEADLINE)
    job.step(0)
    assert left.lent
    if dist.get_rank() == VICTIM:
        owner, name = PLACES[place]
        original: Callable[..., Any] = getattr(owner, name)

        def dying(*arguments: Any) -> None:
            original(*arguments) if name == "forward" else None
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, dying)
    try:
        job.step(1)
    except Exception as error:
        return f"{'ours' if isinstance(error, DistplbError) else 'theirs'}: {error}"
    return "nothing happened"


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[tuple[bool, Any]]]:
    """By place and rank: whether it answered, and what it caught."""
    with ThreadPoolExecutor(len(PLACES)) as pool:  # they mostly wait
        found = pool.map(lambda place: outcomes_on_ranks(2, killed, place, deadline=DEADLINE + 20), PLACES)
        return dict(zip(PLACES, found, strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_the_other_rank_ends_with_an_error(outcomes: dict[str, list[tuple[bool, Any]]], place: str) -> None:
    (answered, said), (other_answered, _) = outcomes[place]
    print(place, said)
    assert answered, said
    assert not other_answered
    if place == "experts":  # the survivor waits in torchtitan's own exchange, or in distplb's next one
        assert said.startswith(("ours: in stage", "theirs: "))
    else:
        assert "ours: in stage" in said
        assert f"rank {VICTIM} did not answer" in said
