"""Engine `cuda` is used once it has planned what `cpu` plans; one that fails is noticed, and plans stay the same.

Triton interprets here, in a child, because it must not have been imported before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from interpreted import prepare, printed_by
from jobs import EXPERTS, LAYERS, Job, by_slot, skewed
from ranks import on_ranks
from settle_cases import settle_cases
from torch import Tensor

from distplb import DistplbError, LoadWindow, Placement, RebalanceEvent, Topology, balanced_packing
from distplb.comm.base import WorldOfOne
from distplb.comm.torchdist import TorchComm
from distplb.packing import cpu, cuda, reference
from distplb.packing import trial as packing_trial
from distplb.packing.trial import Compared
from distplb.planning.engine_choice import engine_for
from distplb.planning.options import PlanOptions
from distplb.planning.plan import plan_in_stages
from distplb.train import agreed

TOPOLOGY = Topology(2, 1)
SHAPE = (3, 2, 8)  # T, L, E


class Broken:
    """An engine of which one call goes wrong."""

    def __init__(self, call: str, wrong: Callable[[Tensor], Tensor]) -> None:
        self._call, self._wrong = call, wrong

    def __getattr__(self, name: str) -> Any:
        right = getattr(reference, name)
        return right if name != self._call else lambda *given, **named: self._wrong(right(*given, **named))


def last_row_swapped(table: Tensor) -> Tensor:
    """Two slots of the last row alone have changed places."""
    table = table.clone()
    table[-1, [0, -1]] = table[-1, [-1, 0]]
    return table


def calls(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """All entry points, each once."""
    weight = torch.arange(36).view(3, 12) % 7 + 1
    names = {"layer": torch.arange(3), "candidate": torch.arange(3), "seed": 5}
    table = torch.arange(12).expand(3, -1).contiguous()
    yield "pack", engine.pack(weight, 3, **names)
    yield "finish", engine.finish(weight, table, 3)
    yield "refine", engine.refine(weight, 3, 15, shared=False, **names)
    yield "polish", engine.polish(weight, table, 3)
    yield "settle", next(settle_cases([(12, 3, 4, 5)], rows=3, seed=1)).settled(engine)


def test_an_engine_that_agrees_answers_as_it_does() -> None:
    both = zip(calls(Compared(cpu, reference)), calls(reference), strict=True)  # type: ignore[arg-type]
    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in both)


@pytest.mark.parametrize("call", ["pack", "finish", "refine", "polish", "settle"])
@pytest.mark.parametrize(
    ("wrong", "wording"),
    [
        (last_row_swapped, "{} gives another table in 1 of 3 rows"),
        (lambda table: table.int(), "{} gives torch.int32 of shape"),
        (lambda table: table[:-1], "{} gives torch.int64 of shape"),
    ],
)
def test_a_call_that_answers_otherwise_is_named(call: str, wrong: Callable[[Tensor], Tensor], wording: str) -> None:
    with pytest.raises(DistplbError, match=wording.format(call)):
        list(calls(Compared(Broken(call, wrong), reference)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("every", "kept", "steps"), [(500, 64, [64]), (1, 6, [1, 2, 4, 6]), (5, 64, [5, 10, 20, 40, 64]), (8, 8, [8])]
)
def test_windows_of_any_number_of_micro_batches_are_tried(
    every: int, kept: int, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, needed = [], set[int]()
    monkeypatch.setattr(agreed, "engine_for", lambda options, topology, shape, device: tried.append(shape[0]))
    Job(ranks=1).rebalancer(every=every, window=LoadWindow(LAYERS, EXPERTS, kept), engine="reference").close()
    assert tried == steps
    for micro_batches in range(1, kept + 1):
        needed.add((min(kept, every * micro_batches) - 1).bit_length())
    assert needed <= {(number - 1).bit_length() for number in tried}


# --- interpreted ----------------------------------------------------------------------------------------------------

LOAD = torch.poisson(torch.arange(1.0, 9).expand(3, 2, -1) * 20, generator=torch.Generator().manual_seed(0)).long()
PLANS: dict[str, dict[str, Any]] = {
    "priced": {"current": Placement.contiguous(2, 8, 2), "move_price": (9.0, 20.0), "mode": "permute"},
    "replicas in groups": {"num_slots": 10, "num_groups": 4},
    "blocks": {"num_groups": 4, "mode": "permute", "current": Placement.contiguous(2, 8, 2)},
    "classes": {"slot_class": torch.arange(8) % 2, "current": Placement.contiguous(2, 8, 2), "move_price": 3.0},
}


class Wrong:
    """`cuda` with one entry point that breaks in some way."""

    @staticmethod
    def table() -> tuple[str, Any]:
        right = cuda.settle
        return "settle", lambda *given, **named: last_row_swapped(right(*given, **named))

    @staticmethod
    def compiler() -> tuple[str, Any]:
        def refuses() -> Any:
            raise RuntimeError("Failed to find C compiler")

        return "_kernels", refuses

    @staticmethod
    def memory() -> tuple[str, Any]:
        def is_full(*_: Any) -> Any:
            raise torch.OutOfMemoryError("out of memory")

        return "_room", is_full


@contextmanager
def broken(how: str | None) -> Iterator[None]:
    """`cuda` as it would be; trials are held anew."""
    packing_trial._stands.cache_clear()
    name, value = ("MOST_ITEMS", cuda.MOST_ITEMS) if how is None else getattr(Wrong, how)()
    right = getattr(cuda, name)
    setattr(cuda, name, value)
    try:
        yield
    finally:
        setattr(cuda, name, right)


@contextmanager
def launches() -> Iterator[set[str]]:
    """What Triton compiles for: a kernel, its blocks, and which tensors are there, of which types."""
    seen, launch = set[str](), cuda._launch

    def noted(kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> None:
        types = [str(getattr(value, "dtype", type(value))) for value in arguments]
        seen.add(f"{kernel.fn.__name__} {sorted(options.items())} {types}")
        launch(kernel, arguments, options)

    cuda._launch = noted
    yield seen
    cuda._launch = launch


class Logged(logging.Handler):
    """What is said."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []
        logger = logging.getLogger("distplb")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(f"{record.levelname} {record.getMessage()}")


def planned(engine: str | None, **options: Any) -> tuple[str, list[list[int]]]:
    found = plan_in_stages(LOAD, TOPOLOGY, WorldOfOne(), PlanOptions(engine=engine, **options))
    return found.engine, found.placement.expert_of_slot.tolist()


def interpreted() -> None:
    """Print what plans came out, by which engine, and what was said."""
    prepare()
    said = Logged().said
    found: dict[str, Any] = {}
    for name, options in PLANS.items():
        with broken(None), launches() as tried:
            engine_for(PlanOptions(engine="cuda", **options), TOPOLOGY, SHAPE, LOAD.device)
            found[name] = [len(tried)]
            with launches() as used:
                found[name] += [planned("cuda", **options), planned("cpu", **options), sorted(used), sorted(tried)]
    found["good"] = said[:]
    for how in ("table", "compiler", "memory"):
        said.clear()
        with broken(how):
            plans = [planned("cuda", **PLANS["priced"]) for _ in range(2)]
            found[how] = [*plans, planned("cpu", **PLANS["priced"]), said[:]]
    said.clear()
    with broken(None):
        named = packing_trial.engine_named  # for weights on a GPU it is cuda, and here is none
        packing_trial.engine_named = lambda name, *device: named("cuda" if device else name)
        packed = [balanced_packing(LOAD[0], 4, 2)[0].tolist() for _ in range(2)]
        packing_trial.engine_named = named
        found["packed"] = [*packed, balanced_packing(LOAD[0], 4, 2)[0].tolist(), said[:]]
    found["ranks"] = on_ranks(2, one_rank_of_a_job, deadline=240)
    print(json.dumps(found))


def one_rank_of_a_job() -> dict[str, Any]:
    """Rank 1's kernels are wrong; said when the rebalancer is made, and nothing more while it plans."""
    prepare()
    said, told = Logged().said, list[RebalanceEvent]()
    with broken("table" if TorchComm().rank else None):
        job = Job()
        held = job.rebalancer(engine="cuda", every=4, num_candidates=4, on_event=told.append)
        at_first = said[:]
        for hot in ((0, 1), (2, 3)):
            for _ in range(4):
                job.iterate(by_slot(skewed(hot), held.placement))
            held._parts.iteration += 3  # as if it had been called after each
            held.step()
        held.close()
    plans = [event.placement_digest for event in told if event.imbalance_next is None]
    return {
        "at first": at_first,
        "in all": said,
        "plans": plans,
        "decisions": [event.decision for event in told],
        "engines": sorted({event.engine for event in told}),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `interpreted` prints, in a child."""
    answer: dict[str, Any] = printed_by("test_trial", "interpreted")
    return answer


def test_an_engine_that_stands_its_trial_plans(found: dict[str, Any]) -> None:
    for name in PLANS:
        launched, by_cuda, by_cpu, used, tried = found[name]
        assert (by_cuda[0], by_cpu[0]) == ("cuda", "cpu"), name
        assert by_cuda[1] == by_cpu[1]
        # Nothing is left to be compiled in a rebalance.
        assert launched == len(tried)
        assert set(used) <= set(tried)
        assert used
    assert len(found["good"]) == len(PLANS)
    for line in found["good"]:
        assert line.startswith("INFO engine 'cuda' agrees with 'cpu' on 8 experts in "), line
        assert "of 2 GPUs, 4 steps: compiled and compared in " in line


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("table", "DistplbError: settle gives another table in "),
        ("compiler", "RuntimeError: Failed to find C compiler"),
        ("memory", "OutOfMemoryError: out of memory"),
    ],
)
def test_one_that_fails_is_said_once_and_the_plan_is_the_same(found: dict[str, Any], how: str, cause: str) -> None:
    """The first rebalance of a job would have met it, and ended the training or moved experts by a wrong plan."""
    first, second, wanted, said = found[how]
    assert first == second == wanted
    assert first[0] == "cpu"
    assert len(said) == 1
    assert said[0].startswith(f"WARNING engine 'cuda' failed its trial ({cause}")
    assert said[0].endswith("plans are made by 'cpu', and are the same; pass engine='cpu' to go without the trial")


def test_packing_alone_has_a_trial_too(found: dict[str, Any]) -> None:
    first, second, by_cpu, said = found["packed"]
    assert first == second == by_cpu
    assert [line.split(": ")[0] for line in said] == ["INFO engine 'cuda' agrees with 'cpu' on 8 items in 4 packs"]


def test_ranks_whose_engines_differ_in_the_end_agree_and_nothing_is_tried_in_a_rebalance(found: dict[str, Any]) -> None:
    good, wrong = found["ranks"]
    assert (good["engines"], wrong["engines"]) == (["cuda"], ["cpu"])
    assert len(good["at first"]) == len(wrong["at first"]) == 1
    for rank in (good, wrong):
        assert rank["in all"] == rank["at first"]
        assert rank["decisions"] == ["moved", "moved", "moved"]
        assert rank["plans"] == good["plans"]


def test_the_cpu_engine_compiles_nothing_after_its_warm_up() -> None:
    """A rebalance would wait for the compiler."""
    cpu.warm_up()
    kernels = [value for value in vars(cpu._kernels()).values() if hasattr(value, "signatures")]
    before = [list(kernel.signatures) for kernel in kernels]
    assert sum(map(len, before)) >= 5
    for options in PLANS.values():
        planned("cpu", **options)
    list(calls(cpu))
    assert [list(kernel.signatures) for kernel in kernels] == before
