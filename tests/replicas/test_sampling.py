"""Sampled steps: the events tell what happened, on the sampled steps alone, and change nothing in the training.

Shapes: N tokens of a rank, D dim, P slots, M ranks, G own and R replica slots, X rows.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lending import Step, moe
from ranks import errors_on_ranks, on_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distplb import EventLog, StepBalancer, StepEvent, Topology, read_events, read_steps, step_bound
from distplb.comm.steps import StepOfOne, TorchStepComm
from distplb.errors import DistplbError
from distplb.replicas.sampling import Clock, Sample, Sampler, seconds_of_parts

DIM, HIDDEN, OWN = 4, 6, 2
ALWAYS = {"count", "waiting to count", "split", "dispatch", "experts", "waiting", "experts backward"}
ALWAYS |= {"waiting backward"}
WITH_REPLICAS = {"push", "push again", "bring home"}
EVEN = "even"  # the name of a layer whose router is even


def weights(layer: str) -> list[Tensor]:
    gen = torch.Generator().manual_seed(len(layer) + 100 * dist.get_rank())
    shapes = ((OWN, DIM, HIDDEN), (OWN, HIDDEN, DIM))
    return [torch.randn(shape, generator=gen, dtype=torch.float64).requires_grad_() for shape in shapes]


def tokens(layer: str, iteration: int) -> Step:
    slots = OWN * dist.get_world_size()
    ids = torch.arange(slots).repeat(3)[:, None]
    if layer != EVEN:  # most tokens go to one expert
        ids = torch.cat([torch.full((20 + 3 * dist.get_rank(), 1), iteration % slots), ids])
    x = torch.linspace(-1, 1, len(ids) * DIM, dtype=torch.float64).view(len(ids), DIM)
    return Step(x, ids, torch.ones(len(ids), 1, dtype=torch.float64))


class Trained:
    """A few iterations of two layers, and what was seen of them from outside."""

    def __init__(self, iterations: int, recompute: str = "", **options: Any) -> None:
        self.events: list[StepEvent] = []
        self.splits: list[dict[str, Any]] = []  # of each iteration, by layer
        self.gathers: list[int] = []  # of counts or seconds, in each iteration
        self.bytes: list[int] = []  # that this rank sent, in each iteration
        self.gradients: list[Tensor] = []
        size = dist.get_world_size()
        topology = Topology(2, size // 2) if size > 3 else Topology(1, size)
        is_told = options.pop("told", "rank 0")
        on_event = self.events.append if is_told == "all" or (is_told and dist.get_rank() == 0) else None
        self.balancer = StepBalancer(
            topology=topology, num_experts=OWN * size, deadline=300, on_event=on_event, **options
        )
        gather, start = TorchStepComm.all_gather, TorchStepComm.start

        def gathered(comm: Any, row: Tensor) -> Tensor:
            self.gathers[-1] += 1
            return gather(comm, row)

        def started(comm: Any, sends: Any, receives: Any) -> Any:
            self.bytes[-1] += sum(rows.nbytes for rows, _ in sends)
            return start(comm, sends, receives)

        with patch.object(TorchStepComm, "all_gather", gathered), patch.object(TorchStepComm, "start", started):
            for iteration in range(iterations):
                self.iterate(iteration, recompute)

    def iterate(self, iteration: int, recompute: str) -> None:
        self.gathers.append(0)
        self.bytes.append(0)
        self.splits.append({})
        for layer in ("hot", EVEN):
            step, own = tokens(layer, iteration), weights(layer)
            whole = self.balancer.dispatch

            def dispatch(name: str, ids: Tensor, whole: Any = whole) -> Any:
                found = whole(name, ids)
                counts = None if found.split is None else found.split.counts
                self.splits[-1].setdefault(name, (found.split, counts))
                return found

            x = step.x.requires_grad_()
            with patch.object(self.balancer, "dispatch", dispatch):

                def forward(x: Tensor, layer: str = layer, step: Step = step, own: list[Tensor] = own) -> Tensor:
                    return moe(self.balancer, layer, Step(x, step.ids, step.gate), own)

                out = checkpoint(forward, x, use_reentrant=recompute == "reentrant") if recompute else forward(x)
            if not self.balancer._lender.keep and not recompute:
                self.balancer._lender._held = None  # as if another layer had pushed its replicas in between
            out.pow(2).sum().backward()
            self.gradients += [x.grad, *(one.grad for one in own)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


# --- what is told -----------------------------------------------------------------------------------------------


def told(recompute: str) -> list[Any]:
    plain = Trained(8, recompute, told="")
    found = Trained(8, recompute, sample_every=3)
    assert equal(plain.gradients, found.gradients)
    assert plain.bytes == found.bytes
    # One collective more, of the layer that begins a sampled step: at iterations 4 and 7, counted from 1.
    more = [sampled - without for sampled, without in zip(found.gathers, plain.gathers, strict=True)]
    assert more == [0, 0, 0, 1, 0, 0, 1, 0]
    return [found.events, [plain.splits[0], plain.splits[3]], [found.bytes[0], found.bytes[3]]]


@pytest.mark.parametrize("recompute", ["", "not reentrant", "reentrant"])
def test_events_tell_what_happened(recompute: str) -> None:
    answers = on_ranks(4, told, recompute)
    (events, splits, _), *others = answers
    assert [one[0] for one in others] == [[], [], []]  # told on rank 0 only
    assert [event.step for event in events] == [1, 4]
    assert len({event.started for event in events}) == 1
    for number, event in enumerate(events):
        assert event.layers == ("hot", EVEN)
        assert (event.num_slots, event.num_nodes, event.replica_slots) == (8, 2, 2)
        split, counts = splits[number]["hot"]
        assert split.num_replicas
        home = torch.arange(8) // OWN
        before = torch.zeros(4, dtype=torch.int64).index_add(0, home, counts.sum(0))
        mean = int(counts.sum()) / 4
        assert event.tokens_of_gpu_before[0] == tuple(before.tolist())
        assert event.tokens_of_gpu_after[0] == tuple(split.load.tolist())
        assert event.imbalance_before == (int(before.max()) / mean, 1.0)
        assert event.imbalance_after == (split.imbalance, 1.0)
        assert event.imbalance_bound == (step_bound(counts, home, topology=Topology(2, 2)) / mean, 1.0)
        held = [(slot, gpu) for gpu, row in enumerate(split.replica.tolist()) for slot in row if slot >= 0]
        assert event.replicas == (tuple((s, gpu, int(split.quota[s, gpu])) for s, gpu in held), ())
        assert event.bytes_inside == sum(answer[2][number] for answer in answers)
        assert event.bytes_between == 0
        # A recomputation has just pushed what its backward needs.
        assert event.seconds.keys() == ALWAYS | WITH_REPLICAS - ({"push again"} if recompute else set())
        assert all(math.isfinite(seconds) and seconds >= 0 for seconds in event.seconds.values())
        assert event.seconds["experts"] > 0


def crossing() -> list[Any]:
    found = Trained(3, sample_every=1, told="all", push_price=(0.0, 0.0))
    return [found.events, found.bytes]


def test_bytes_inside_and_between_nodes_are_those_that_ranks_sent() -> None:
    answers = on_ranks(4, crossing)
    first, second = answers[0][0][:2]
    assert all(answer[0] == answers[0][0] for answer in answers)  # every rank that asks is told the same
    for number, event in enumerate((first, second)):
        assert event.bytes_between > 0
        assert event.bytes_inside + event.bytes_between == sum(answer[1][number] for answer in answers)


def held() -> list[Any]:
    found = Trained(3, sample_every=1, told="all", keep=True)
    return [found.events, found.bytes]


def test_replicas_that_are_held_are_pushed_once() -> None:
    answers = on_ranks(2, held)
    for number, event in enumerate(answers[0][0]):
        assert event.bytes_inside == sum(answer[1][number] for answer in answers)
        assert event.seconds.keys() == ALWAYS | WITH_REPLICAS - {"push again"}


def without_gradients() -> list[Any]:
    """Forwards of an evaluation are steps too."""
    found = Trained(0, told="all", sample_every=1)
    with torch.no_grad():
        for iteration in range(2):
            step = tokens("hot", iteration)
            moe(found.balancer, "hot", step, weights("hot"))
    return found.events


def test_an_evaluation_has_no_backward() -> None:
    for events in on_ranks(2, without_gradients):
        (event,) = events
        assert event.seconds.keys() == {part for part in ALWAYS if "backward" not in part} | {"push"}


def backward_in_another_order(reentrant: bool) -> list[Any]:
    """Two micro-batches are recomputed, the one that is not sampled first."""
    events: list[StepEvent] = []
    size, sent = dist.get_world_size(), list[int]()
    balancer = StepBalancer(
        topology=Topology(1, size), num_experts=OWN * size, deadline=300, on_event=events.append, sample_every=2
    )
    start = TorchStepComm.start

    def started(comm: Any, sends: Any, receives: Any) -> Any:
        sent.append(sum(rows.nbytes for rows, _ in sends))
        return start(comm, sends, receives)

    outs = []
    with patch.object(TorchStepComm, "start", started):
        for iteration in range(2):
            step, own = tokens("hot", iteration), weights("hot")
            x = step.x.requires_grad_()

            def forward(x: Tensor, step: Step = step, own: list[Tensor] = own) -> Tensor:
                return moe(balancer, "hot", Step(x, step.ids, step.gate), own)

            outs.append(checkpoint(forward, x, use_reentrant=reentrant))
        for out in reversed(outs):
            out.pow(2).sum().backward()
        balancer.dispatch("hot", tokens("hot", 0).ids)
    # Two forwards, then push and gradients of the second one and of the first.
    forward, _, _, _, again, home = sent
    return [events, forward + again + home]


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_recomputation_of_another_step_is_not_counted(reentrant: bool) -> None:
    answers = on_ranks(2, backward_in_another_order, reentrant)
    (event,) = answers[0][0]
    assert event.bytes_inside == sum(sent for _, sent in answers) > 0


def dry() -> list[Any]:
    found = Trained(3, "not reentrant", told="all", sample_every=1, dry_run=True)
    return [found.events, found.bytes]


def test_a_dry_run_tells_what_would_have_been_lent_and_sends_nothing() -> None:
    for events, sent in on_ranks(2, dry):
        assert sent == [0, 0, 0]
        for event in events:
            assert event.num_replicas
            assert event.imbalance_after[0] < 1.05 < 1.2 < event.imbalance_before[0]  # of 60 tokens
            assert (event.bytes_inside, event.bytes_between) == (0, 0)
            assert event.seconds.keys() == ALWAYS


# --- what it costs ----------------------------------------------------------------------------------------------


def never_sampled() -> list[Any]:
    with patch.object(Sample, "__init__", side_effect=AssertionError("a sample")):
        return Trained(3, told="").balancer._sampler is None, Trained(1, told="").events


def test_without_a_listener_on_any_rank_no_step_is_sampled() -> None:
    assert on_ranks(2, never_sampled) == [(True, [])] * 2


def few_samples() -> list[int]:
    made = list[int]()
    whole = Sample.__init__

    def counted(self: Sample, layer: Any, step: int, clock: Clock) -> None:
        made.append(step)
        whole(self, layer, step, clock)

    with patch.object(Sample, "__init__", counted):
        Trained(7, sample_every=5)
    return made


def test_other_steps_make_no_sample() -> None:
    assert on_ranks(2, few_samples) == [[1, 1, 6, 6]] * 2  # of two layers


# --- what goes wrong --------------------------------------------------------------------------------------------


def failing() -> tuple[list[str], int]:
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("distplb").addHandler(handler)

    def fails(event: StepEvent) -> None:
        raise OSError("disk full")

    size = dist.get_world_size()
    balancer = StepBalancer(topology=Topology(1, size), num_experts=OWN * size, on_event=fails, sample_every=1)
    for iteration in range(3):
        moe(balancer, "hot", tokens("hot", iteration), weights("hot"))
    return texts, balancer._calls


def test_a_listener_that_fails_is_logged_and_training_goes_on() -> None:
    expected = [f"on_event failed at step {step}; training continues" for step in (1, 2)]
    assert on_ranks(2, failing) == [(expected, 3)] * 2


def other_samples() -> str:
    size, rank = dist.get_world_size(), dist.get_rank()
    balancer = StepBalancer(
        topology=Topology(1, size), num_experts=OWN * size, on_event=print, sample_every=2 + rank, deadline=300
    )
    try:
        balancer.dispatch("hot", tokens("hot", 0).ids)
    except DistplbError as error:
        return str(error)
    return ""


def test_ranks_that_would_sample_other_steps_are_refused() -> None:
    assert all("the options of the StepBalancer" in text for text in errors_on_ranks(2, other_samples))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sample_every": 0}, "sample_every is 0"),
        ({"sample_every": 1.5}, "sample_every is 1.5"),
        ({"on_event": "steps.jsonl"}, "on_event is 'steps.jsonl'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(DistplbError, match=text):
        StepBalancer(topology=Topology(1, 1), num_experts=4, **options)


# --- the log ----------------------------------------------------------------------------------------------------


def logged(folder: str) -> list[StepEvent]:
    """Two jobs, the second of which is the first one resumed, write into one file."""
    events: list[StepEvent] = []
    for _ in range(2):
        log = EventLog(Path(folder) / "steps.jsonl") if dist.get_rank() == 0 else None
        size = dist.get_world_size()
        balancer = StepBalancer(
            topology=Topology(1, size),
            num_experts=OWN * size,
            on_event=None if log is None else lambda event, log=log: (log(event), events.append(event)),
            sample_every=1,
        )
        for iteration in range(3):
            moe(balancer, "hot", tokens("hot", iteration), weights("hot"))
        if log is not None:
            log.close()
    return events


def test_a_log_holds_every_event_also_of_a_resumed_job(tmp_path: Path) -> None:
    events, none = on_ranks(2, logged, str(tmp_path))
    assert none == []
    assert read_steps(tmp_path / "steps.jsonl") == events
    assert [event.step for event in events] == [1, 2, 1, 2]
    assert events[2].started > events[0].started
    assert read_events(tmp_path / "steps.jsonl") == []


def test_the_stages_of_a_step_are_ranges_in_a_profile() -> None:
    balancer = StepBalancer(topology=Topology(1, 1), num_experts=4, on_event=lambda _: None, sample_every=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        balancer.dispatch("a", torch.tensor([[0], [1]]))
    ranges = {event.key for event in profile.key_averages() if event.key.startswith("distplb::")}
    assert ranges == {"distplb::count", "distplb::split", "distplb::sample"}
    assert set(balancer.seconds) == {"count", "split", "sample"}


# --- marks in time ----------------------------------------------------------------------------------------------


class FakeClock(Clock):
    """Time that goes on by one second at each mark."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now = 0.0

    def mark(self) -> float:
        self.now += 1
        return self.now


def test_parts_interrupt_each_other_and_what_has_not_ended_is_unknown() -> None:
    sample = Sample("a", 1, FakeClock())
    sample.begin("dispatch")  # 1
    with sample.part("push"):  # dispatch ends at 2; 3 to 4; dispatch goes on at 5
        pass
    sample.end("dispatch")  # 6
    sample.end("dispatch")
    sample.begin("experts backward")
    known = dict(zip(("count", "split", "push", "dispatch"), sample.nanoseconds(), strict=False))
    assert known == {"count": -1, "split": -1, "push": 10**9, "dispatch": 2 * 10**9}
    assert sample.nanoseconds()[6] == -1


def test_seconds_of_parts_are_means_over_ranks_and_what_the_slowest_waits_for() -> None:
    none = [-1] * 8
    first, second = [none.copy(), none.copy()], [none.copy(), none.copy()]  # ranks: layers
    first[0][0], second[0][0] = 4 * 10**9, 2 * 10**9  # count
    first[0][4], second[0][4] = 10**9, 3 * 10**9  # experts
    first[1][4], second[1][4] = 5 * 10**9, 3 * 10**9
    first[0][3] = 10**9  # dispatch, which the second rank does not know
    found = seconds_of_parts(torch.tensor([first, second]))
    assert found == {"count": 2.0, "waiting to count": 1.0, "experts": 6.0, "waiting": 2.0}


def test_marks_of_a_gpu_are_events_of_its_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            calls.append(("record", stream))

        def synchronize(self) -> None:
            calls.append("synchronize")

        def elapsed_time(self, other: Event) -> float:
            assert calls[-1] == "synchronize"  # or the device may not have come to it
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = Clock(torch.device("cuda:3"))
    assert clock.seconds(clock.mark(), clock.mark()) == 0.0025
    assert calls[:2] == [("record", "stream of cuda:3")] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_marks_of_a_real_gpu_measure_what_the_stream_does() -> None:
    clock = Clock(torch.device("cuda"))
    begin = clock.mark()
    torch.cuda._sleep(10_000_000)
    assert clock.seconds(begin, clock.mark()) > 1e-3


def test_one_gpu_alone_is_told_too() -> None:
    events: list[StepEvent] = []
    balancer = StepBalancer(topology=Topology(1, 1), num_experts=4, on_event=events.append, sample_every=1)
    rows = torch.ones(6, 2, requires_grad=True)
    for ids in ([[0]] * 6, torch.empty(0, 1, dtype=torch.int64)):
        step = balancer.dispatch(("block", 7), torch.as_tensor(ids))
        balancer.compute(step, lambda rows, own, _: rows * own[0][0], rows, torch.ones(4, 2)).sum().backward()
    balancer.dispatch(("block", 7), torch.tensor([[1]]))
    with_tokens, without = events
    assert with_tokens.layers == ("('block', 7)",)
    assert (with_tokens.imbalance_before, without.imbalance_before) == ((1.0,), (None,))
    assert "experts backward" in with_tokens.seconds


def test_layers_that_come_later_begin_a_step_of_their_own() -> None:
    events: list[StepEvent] = []
    where, own = Topology(1, 1), torch.arange(2)[None]
    sampler = Sampler(StepOfOne(), events.append, 2, 5.0, topology=where, own=own, num_replicas=1, between=False)
    for layer in "aababb":  # forwards 1, 2, -, 3, -, - of a and -, -, 1, -, 2, 3 of b
        sample = sampler.sample(layer)
        if sample is not None:
            sampler.take(sample, torch.tensor([[1, 2]]), None)
    assert [(event.step, event.layers) for event in events] == [(1, ("a", "b"))]
