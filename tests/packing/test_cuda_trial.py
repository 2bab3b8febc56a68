"""Engine `cuda` is used once it plans the same as `cpu`; a failing one is noticed, and plans stay the same.

Triton's interpreter runs here in a child process, because Triton must not have been imported before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from interpreted import prepare, printed_by
from jobs import EXPERTS, LAYERS, Job, by_slot, skewed
from packing_cases import settle_cases
from ranks import on_ranks
from torch import Tensor

from distplb import DistplbError, LoadWindow, Placement, RebalanceEvent, Topology, balanced_packing
from distplb.comm.base import WorldOfOne
from distplb.comm.torchdist import TorchComm
from distplb.core.machine_code import compiled_module
from distplb.packing import cpu, cuda, cuda_trial, reference
from distplb.packing.cuda_trial import ComparedEngine
from distplb.planning.engine_choice import engine_for
from distplb.planning.options import PlanOptions
from distplb.planning.plan import plan_in_stages
from distplb.train import agreed_options

TOPOLOGY = Topology(2, 1)
SHAPE = (3, 2, 8)  # T, L, E


class Broken:
    """An engine with one wrong call."""

    def __init__(self, call: str, wrong: Callable[[Tensor], Tensor]) -> None:
        self._call, self._wrong = call, wrong

    def __getattr__(self, name: str) -> Any:
        right = getattr(reference, name)
        return (
            right if name != self._call else lambda *arguments, **keywords: self._wrong(right(*arguments, **keywords))
        )


def last_row_swapped(table: Tensor) -> Tensor:
    """Swap two slots, in the last row only."""
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
    yield "settle", next(settle_cases([(12, 3, 4, 5)], rows=3, seed=1)).answer(engine)


def test_an_engine_that_agrees_answers_as_it_does() -> None:
    both = zip(calls(ComparedEngine(cpu, reference)), calls(reference), strict=True)  # type: ignore[arg-type]
    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in both)


@pytest.mark.parametrize("call", ["pack", "finish", "refine", "polish", "settle"])
@pytest.mark.parametrize(
    ("wrong", "wording"),
    [
        (last_row_swapped, "{} returns a different table in 1 of 3 rows"),
        (lambda table: table.int(), "{} returns torch.int32 of shape"),
        (lambda table: table[:-1], "{} returns torch.int64 of shape"),
    ],
)
def test_a_call_that_answers_otherwise_is_named(call: str, wrong: Callable[[Tensor], Tensor], wording: str) -> None:
    with pytest.raises(DistplbError, match=wording.format(call)):
        list(calls(ComparedEngine(Broken(call, wrong), reference)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("every", "kept", "steps"), [(500, 64, [64]), (1, 6, [1, 2, 4, 6]), (5, 64, [5, 10, 20, 40, 64]), (8, 8, [8])]
)
def test_windows_of_any_number_of_micro_batches_are_tried(
    every: int, kept: int, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, needed = [], set[int]()
    monkeypatch.setattr(agreed_options, "engine_for", lambda options, topology, shape, device: tried.append(shape[0]))
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
LONG_PLANS = {"blocks", "classes"}


class Wrong:
    """One function of `cuda`, broken in some way."""

    @staticmethod
    def table() -> tuple[str, Any]:
        right = cuda.settle
        return "settle", lambda *arguments, **keywords: last_row_swapped(right(*arguments, **keywords))

    @staticmethod
    def compiler() -> tuple[str, Any]:
        def refuses() -> Any:
            raise RuntimeError("Failed to find C compiler")

        return "_kernels", refuses

    @staticmethod
    def memory() -> tuple[str, Any]:
        def is_full(*_: Any) -> Any:
            raise torch.OutOfMemoryError("out of memory")

        return "_scratch_shapes", is_full


@contextmanager
def broken(how: str | None) -> Iterator[None]:
    """`cuda`, broken in the given way; trials are run again."""
    cuda_trial._passes.cache_clear()
    name, value = ("_CELLS", cuda._CELLS) if how is None else getattr(Wrong, how)()
    right = getattr(cuda, name)
    setattr(cuda, name, value)
    try:
        yield
    finally:
        setattr(cuda, name, right)


@contextmanager
def launches() -> Iterator[set[str]]:
    """What Triton compiles for: a kernel, its blocks, and the types of its arguments."""
    compiled, launch = set[str](), cuda._launch

    def noted(kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> None:
        types = [str(getattr(value, "dtype", type(value))) for value in arguments]
        compiled.add(f"{kernel.fn.__name__} {sorted(options.items())} {types}")
        launch(kernel, arguments, options)

    cuda._launch = noted
    yield compiled
    cuda._launch = launch


class Logged(logging.Handler):
    """The package's log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []
        logger = logging.getLogger("distplb")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname} {record.getMessage()}")


def planned(engine: str | None, **options: Any) -> tuple[str, list[list[int]]]:
    result = plan_in_stages(LOAD, TOPOLOGY, WorldOfOne(), PlanOptions(engine=engine, **options))
    return result.engine, result.placement.expert_of_slot.tolist()


def interpreted(is_long: bool) -> None:
    """Print the plans, the engine of each, and what was logged."""
    prepare()
    messages = Logged().messages
    answers: dict[str, Any] = {}
    for name in LONG_PLANS if is_long else PLANS.keys() - LONG_PLANS:
        messages.clear()
        options = PLANS[name]
        with broken(None), launches() as tried:
            engine_for(PlanOptions(engine="cuda", **options), TOPOLOGY, SHAPE, LOAD.device)
            launched = len(tried)
            with launches() as used:
                plans = [planned("cuda", **options), planned("cpu", **options)]
        answers[name] = [launched, *plans, sorted(used), sorted(tried), messages[:]]
    if not is_long:
        answers |= failures(messages)
        answers["packed"] = packed(messages)
        answers["ranks"] = on_ranks(2, one_rank_of_a_job, deadline=240)
    print(json.dumps(answers))


def failures(messages: list[str]) -> dict[str, Any]:
    """For each way in which `cuda` breaks: its plans, twice, the plan by `cpu`, and what is logged."""
    answers = {}
    for how in ("table", "compiler", "memory"):
        messages.clear()
        with broken(how):
            plans = [planned("cuda", **PLANS["priced"]) for _ in range(2)]
            answers[how] = [*plans, planned("cpu", **PLANS["priced"]), messages[:]]
    return answers


def packed(messages: list[str]) -> list[Any]:
    """Weights packed by `cuda`, twice, and by `cpu`; and what is logged."""
    messages.clear()
    with broken(None):
        named = cuda_trial.engine_named  # weights on a GPU would get cuda, but there is no GPU here
        cuda_trial.engine_named = lambda name, *device: named("cuda" if device else name)
        by_cuda = [balanced_packing(LOAD[0], 4, 2)[0].tolist() for _ in range(2)]
        cuda_trial.engine_named = named
        return [*by_cuda, balanced_packing(LOAD[0], 4, 2)[0].tolist(), messages[:]]


def one_rank_of_a_job() -> dict[str, Any]:
    """Rank 1's kernels are wrong; that is logged when the rebalancer is created, and nothing more while it plans."""
    prepare()
    messages, events = Logged().messages, list[RebalanceEvent]()
    with broken("table" if TorchComm().rank else None):
        job = Job()
        balancer = job.rebalancer(engine="cuda", every=4, num_candidates=4, on_event=events.append)
        at_first = messages[:]
        for hot in ((0, 1), (2, 3)):
            for _ in range(4):
                job.iterate(by_slot(skewed(hot), balancer.placement))
            balancer._parts.iteration += 3  # as if it had been called after each
            balancer.step()
        balancer.close()
    plans = [event.placement_digest for event in events if event.imbalance_next is None]
    return {
        "at first": at_first,
        "in all": messages,
        "plans": plans,
        "decisions": [event.decision for event in events],
        "engines": sorted({event.engine for event in events}),
    }


@cache
def printed(is_long: bool) -> dict[str, Any]:
    """What `interpreted` prints in a child process."""
    answers: dict[str, Any] = printed_by("test_cuda_trial", "interpreted", is_long)
    return answers


@pytest.fixture
def answers() -> dict[str, Any]:
    """All but the long plans."""
    return printed(False)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG_PLANS)) for name in PLANS]
)
def test_an_engine_that_passes_its_trial_plans(name: str) -> None:
    launched, by_cuda, by_cpu, used, tried, messages = printed(name in LONG_PLANS)[name]
    assert (by_cuda[0], by_cpu[0]) == ("cuda", "cpu")
    assert by_cuda[1] == by_cpu[1]
    # Nothing is left to compile in a rebalance.
    assert launched == len(tried)
    assert set(used) <= set(tried)
    assert used
    assert len(messages) == 1
    assert messages[0].startswith("INFO engine 'cuda' agrees with 'cpu' on 8 experts in ")
    assert "of 2 GPUs, 4 steps: compiled and compared in " in messages[0]


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("table", "DistplbError: settle returns a different table in "),
        ("compiler", "RuntimeError: Failed to find C compiler"),
        ("memory", "OutOfMemoryError: out of memory"),
    ],
)
def test_one_that_fails_is_logged_once_and_the_plan_is_the_same(answers: dict[str, Any], how: str, cause: str) -> None:
    """A job's first rebalance would have met the fault, and ended training or moved experts by a wrong plan."""
    first, second, expected, messages = answers[how]
    assert first == second == expected
    assert first[0] == "cpu"
    assert len(messages) == 1
    assert messages[0].startswith(f"WARNING engine 'cuda' failed its trial ({cause}")
    assert messages[0].endswith("engine 'cpu' makes the same plans instead; pass engine='cpu' to skip the trial")


def test_packing_alone_has_a_trial_too(answers: dict[str, Any]) -> None:
    first, second, by_cpu, messages = answers["packed"]
    assert first == second == by_cpu
    assert [line.split(": ")[0] for line in messages] == ["INFO engine 'cuda' agrees with 'cpu' on 8 items in 4 packs"]


def test_ranks_whose_engines_differ_agree_and_nothing_is_tried_in_a_rebalance(
    answers: dict[str, Any],
) -> None:
    good, wrong = answers["ranks"]
    assert (good["engines"], wrong["engines"]) == (["cuda"], ["cpu"])
    assert len(good["at first"]) == len(wrong["at first"]) == 1
    for rank in (good, wrong):
        assert rank["in all"] == rank["at first"]
        assert rank["decisions"] == ["moved", "moved", "moved"]
        assert rank["plans"] == good["plans"]


def test_the_cpu_engine_compiles_nothing_after_its_warm_up() -> None:
    """A rebalance would wait for the compiler."""
    cpu.warm_up()
    kernels = [value for value in vars(compiled_module(cpu._KERNELS)).values() if hasattr(value, "signatures")]
    before = [list(kernel.signatures) for kernel in kernels]
    assert sum(map(len, before)) >= 5
    for options in PLANS.values():
        planned("cpu", **options)
    list(calls(cpu))
    assert [list(kernel.signatures) for kernel in kernels] == before
