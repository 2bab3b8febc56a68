"""Records of rebalances as lines and as scalars: none is lost, none slows the training loop or raises in it.

Shapes: L layers, M GPUs.
"""

from __future__ import annotations

import inspect
import json
import logging
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from distplb import (
    DistplbError,
    EventLog,
    LoadWindow,
    MoELayer,
    MoveModel,
    Moves,
    RebalanceEvent,
    Rebalancer,
    Record,
    Search,
    TimeCurve,
    Topology,
    Trace,
    read_events,
)
from distplb.records.scalars import scalars
from distplb.train.options import Spread

NEXT: dict[str, Any] = {"imbalance_next": (1.25, 1.5), "iteration_seconds_next": 0.25, "repaid": True}


def event(iteration: int = 500, **other: Any) -> RebalanceEvent:
    known: dict[str, Any] = {
        "layers": ("first", "second"),
        "decision": "moved",
        "reason": "the moves lower the cost by more than their price",
        "seconds": {"count": 0.5, "move": 2.0},
        "last_applied": iteration,
        "num_experts": 4,
        "num_nodes": 2,
        "steps": 8,
        "imbalance_before": (1.5, 2.5),
        "imbalance_after": (1.0, 1.5),
        "imbalance_bound": (1.0, 1.0),
        "tokens_of_gpu_before": ((30, 10), (20, 20)),
        "tokens_of_gpu_after": ((20, 20), (20, 20)),
        "hottest_experts": (((3, 25), (0, 5)), ((1, 20), (2, 10))),
        "time_curve": ((0, 0), (10, 100)),
        "router_ties": (0.25, None),
        "bytes_inside": 3000,
        "bytes_between": 500,
        "iteration_seconds": 0.5,
    }
    return RebalanceEvent(iteration=iteration, **known | other)


# --- lines ----------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_from_its_line() -> None:
    line = event().to_json()
    assert "\n" not in line
    assert RebalanceEvent.from_json(line) == event()
    document = json.loads(line)
    assert (document["format"], document["version"]) == ("distplb.event", 1)
    assert set(document) == {"format", "version"} | {one.name for one in fields(RebalanceEvent)}


def test_a_line_of_fewer_fields_is_read() -> None:
    few = {"format": "distplb.event", "version": 1, "iteration": 3, "layers": ["0"], "decision": "kept"}
    read = RebalanceEvent.from_json(json.dumps(few | {"reason": "", "seconds": {}, "last_applied": 3}))
    assert (read.iteration, read.layers, read.imbalance_next, read.bytes_moved) == (3, ("0",), None, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"format": "distplb.event", "version": 2}', "it is 'distplb.event', version 2; this distplb reads"),
        ('{"format": "other", "version": 1}', "it is 'other', version 1"),
        ('{"version": 1}', "not a rebalance's record"),
        (
            '{"format": "distplb.event", "version": 1, "iteration": 3}',
            "lacks layers, decision, reason, seconds, last_a",
        ),
        (event().to_json().replace('"iteration": 500', '"iteration": "500"'), "record .iteration is '500'"),
        (event().to_json().replace('"steps": 8', '"steps": 8.5'), "record .steps is 8.5"),
        ("[1, 2]", "not a rebalance's record"),
        ("7", "not a rebalance's record"),
    ],
)
def test_other_lines_are_refused(line: str, message: str) -> None:
    with pytest.raises(DistplbError, match=message):
        RebalanceEvent.from_json(line)


def test_fields_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    """The README promises that a version may add fields, but one new field made the whole log unreadable."""
    more = event().to_json()[:-1] + ', "colour": [3, {"format": "distplb.event"}]}'
    assert RebalanceEvent.from_json(more) == event()
    (tmp_path / "events.jsonl").write_text(f"{more}\n")
    assert read_events(tmp_path / "events.jsonl") == [event()]


def test_a_log_has_one_line_a_rebalance_and_a_short_one_of_its_outcome(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    log = EventLog(path)
    for record in (event(500), event(500, **NEXT), event(1000)):
        log(record)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["format"] for line in lines] == ["distplb.event", "distplb.outcome", "distplb.event"]
    assert lines[1] == {"format": "distplb.outcome", "version": 1, "iteration": 500} | NEXT | {
        "imbalance_next": [1.25, 1.5]
    }
    assert read_events(path) == [event(500, **NEXT), event(1000)]


def test_a_resumed_job_counts_by_its_last_life(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for life in ([event(500), event(1000), event(1500)], [event(1000, seed=2), event(1000, seed=2, **NEXT)]):
        log = EventLog(path)
        for record in life:
            log(record)
        log.close()
    assert read_events(path) == [event(500), event(1000, seed=2, **NEXT)]


def test_a_line_that_was_cut_off_is_left_out_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(f"{event(500).to_json()}\n{event(1000).to_json()[:200]}")
    with pytest.warns(RuntimeWarning, match=r"events.jsonl: line 2 is incomplete"):
        assert read_events(path) == [event(500)]


@pytest.mark.parametrize("between", ["\n", "", "\0\0", "\0\n"])
def test_a_record_that_breaks_off_anywhere_takes_no_other_along(tmp_path: Path, between: str) -> None:
    """A process was killed while it wrote record 2, and the next continued on the same line: 3 was left out too."""
    path = tmp_path / "events.jsonl"
    torn = event(2).to_json()
    for cut in range(1, len(torn), 7):
        path.write_text(f"{event(1).to_json()}\n{torn[:cut]}{between}{event(3).to_json()}\n{event(4).to_json()}\n")
        with pytest.warns(RuntimeWarning, match=r"events\.jsonl: line 2 is incomplete and left out$"):
            assert read_events(path) == [event(1), event(3), event(4)]
    path.write_text(f"{event(1).to_json()}\n{torn}{between}{event(3).to_json()}\n")
    assert read_events(path) == [event(1), event(2), event(3)]


def test_a_log_that_was_left_with_half_a_record_goes_on_in_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(f"{event(1).to_json()}\n{event(2).to_json()[:100]}")
    log = EventLog(path)
    for number in (3, 4):
        log(event(number))
    log.close()
    assert path.read_text().splitlines()[2:] == [event(3).to_json(), event(4).to_json()]


def test_a_record_that_breaks_off_tells_where_its_life_began(tmp_path: Path) -> None:
    """The outcome of a rebalance in the second run was added to the first run's record of the same iteration."""
    path = tmp_path / "events.jsonl"
    outcome = json.dumps({"format": "distplb.outcome", "version": 1, "iteration": 1000} | NEXT)
    path.write_text(
        f"{event(500).to_json()}\n{event(1000).to_json()}\n{event(1500).to_json()}\n{event(1000).to_json()[:200]}\n{outcome}\n"
    )
    with pytest.warns(RuntimeWarning, match="line 4 is incomplete"):
        assert read_events(path) == [event(500)]


def test_many_lines_that_break_off_are_one_warning(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(f"{event(1).to_json()}\n" + f"{event(2).to_json()[:50]}\n" * 12)
    with pytest.warns(RuntimeWarning, match=r"lines 2, .*, 10 are incomplete and left out \(and 3 more\)$") as caught:
        assert read_events(path) == [event(1)]
    assert [one.filename for one in caught] == [__file__]


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """A sparse file takes no space on the disk, but took its full size in memory."""
    path = tmp_path / "events.jsonl"
    with path.open("wb") as file:
        file.truncate(100 * 10**9)
    tracemalloc.start()
    with pytest.raises(
        DistplbError, match=r"events\.jsonl has 100000000000 bytes, but max_bytes allows 1073741824; pass a larger"
    ):
        read_events(path)
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(DistplbError, match=r"events\.jsonl, line 1 has more than 16777216 bytes; remove it, or"):
        read_events(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 27
    path.write_text(f"{event(1).to_json()}\n")
    with pytest.raises(DistplbError, match=r"bytes, but max_bytes allows 10;"):
        read_events(path, max_bytes=10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iteration,decision\n", "line 1: it is not JSON; pass a file that an EventLog wrote"),
        ("[]\n", "line 1: it is not a rebalance's record"),
        ('{"format": "distplb.outcome", "version": 9}\n', "line 1: it has version 9"),
        ('{"format": "distplb.outcome"}\n', "line 1: 'version'"),
    ],
)
def test_what_is_no_log_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(text)
    with pytest.raises(DistplbError, match=message):
        read_events(path)
    with pytest.raises(DistplbError, match=r"missing.jsonl cannot be read \(No such file"):
        read_events(tmp_path / "missing.jsonl")


def test_layers_without_tokens_are_null_in_a_log_and_in_no_mean(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    one = event(500, imbalance_before=(1.5, None), imbalance_after=(1.25, None), imbalance_bound=(1.0, None))
    outcome = NEXT | {"imbalance_next": (None, 1.5)}
    log = EventLog(path)
    for record in (one, replace(one, **outcome), event(1000), event(1000, **NEXT | {"imbalance_next": (None, None)})):
        log(record)
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["format"] for line in lines] == ["distplb.event", "distplb.outcome"] * 2
    assert (lines[0]["imbalance_before"], lines[1]["imbalance_next"], lines[3]["imbalance_next"]) == (
        [1.5, None],
        [None, 1.5],
        [None, None],
    )
    events = read_events(path)
    assert events == [replace(one, **outcome), event(1000, **NEXT | {"imbalance_next": (None, None)})]
    assert scalars(one)["imbalance/now"] == 1.5
    assert scalars(events[0])["imbalance/next"] == 1.5
    assert scalars(events[1]) == {"seconds/iteration_next": 0.25}


# --- scalars --------------------------------------------------------------------------------------------------------


def test_scalars_by_hand() -> None:
    values = scalars(event(tokens_peak_before=60, tokens_peak_after=40, balancedness_vllm_after=0.9))
    assert (values["imbalance/now"], values["imbalance/expected"], values["imbalance/bound"]) == (2.0, 1.25, 1.0)
    assert (values["moved/bytes_inside"], values["moved/bytes_between"]) == (3000, 500)
    assert (values["tokens_peak/now"], values["tokens_peak/expected"]) == (60, 40)
    assert (values["balancedness_vllm/now"], values["balancedness_vllm/expected"]) == (1.0, 0.9)
    assert (values["seconds/count"], values["seconds/move"], values["seconds/iteration"]) == (0.5, 2.0, 0.5)
    assert scalars(event(**NEXT)) == {"imbalance/next": 1.375, "seconds/iteration_next": 0.25}
    skipped = RebalanceEvent(iteration=3, layers=("0",), decision="skipped", reason="", seconds={}, last_applied=0)
    assert scalars(skipped) == {"last_applied": 0}


def summary_writer(folder: Path) -> Any:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="TensorBoard is not installed")
    return tensorboard.SummaryWriter(str(folder))


def test_tensorboard_shows_them_at_the_iteration_of_the_rebalance(tmp_path: Path) -> None:
    writer = summary_writer(tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventLog(None, writer)
    for record in (event(500), event(500, **NEXT), event(1000, imbalance_before=(3.0, 3.0))):
        log(record)
    log.close()
    writer.close()
    shown = EventAccumulator(str(tmp_path)).Reload()
    now = [(one.step, one.value) for one in shown.Scalars("distplb/imbalance/now")]
    assert now == [(500, 2.0), (1000, 3.0)]
    assert [(one.step, one.value) for one in shown.Scalars("distplb/imbalance/next")] == [(500, 1.375)]
    (text, _) = shown.Tensors("distplb/decision/text_summary")
    assert text.tensor_proto.string_val[0].decode() == f"moved: {event().reason}"


# --- in the background ----------------------------------------------------------------------------------------------


class Stuck:
    """A writer whose disk does not answer until `free` is set, and then fails."""

    def __init__(self) -> None:
        self.free, self.calls = threading.Event(), 0

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.calls += 1
        assert self.free.wait(60)
        raise OSError("no space left on device")

    add_text = add_scalar


def test_the_loop_neither_waits_for_a_writer_nor_hears_of_its_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = Stuck()
    log = EventLog(tmp_path / "events.jsonl", stuck)
    with caplog.at_level(logging.WARNING, "distplb"):
        for number in range(100):
            log(event(number))  # returns before anything is written
        assert not stuck.free.is_set()
        stuck.free.set()
        log.close()
        log(event(100))
    assert stuck.calls == 100  # each record was tried
    assert len(read_events(tmp_path / "events.jsonl")) == 100  # the file has the records that the writer refused
    failures = [record.message for record in caplog.records]
    assert len(failures) == 2  # each text once
    assert "no space left on device" in failures[0]
    assert "cannot schedule" in failures[1]


def test_a_record_that_follows_one_cut_off_has_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, is_full, opened = tmp_path / "events.jsonl", True, Path.open

    def open_on_full_disk(self: Path, *arguments: Any, **options: Any) -> Any:
        if is_full:
            with opened(self, *arguments, **options) as file:
                file.write(event(500).to_json()[:100])
            raise OSError("no space left on device")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_on_full_disk)
    log = EventLog(path)
    log._take_down(lambda: event(500))
    is_full = False
    log._take_down(lambda: event(1000))
    log._take_down(lambda: event(1500))
    log.close()
    with pytest.warns(RuntimeWarning, match="line 1 is incomplete"):
        assert [one.iteration for one in read_events(path)] == [1000, 1500]


def test_a_rebalancer_writes_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    experts = torch.nn.Parameter(torch.arange(4.0)[:, None].clone())
    optimizer = torch.optim.AdamW([experts])
    window = LoadWindow(1, 4, 8)

    def fails(record: RebalanceEvent) -> None:
        raise ValueError("a figure could not be drawn")

    rebalancer = Rebalancer(
        [MoELayer(name="moe", experts={"w": experts}, router={"w": torch.zeros(4, 2)})],
        optimizer,
        topology=Topology(1, 1),
        every=2,
        window=window,
        record=Record(tmp_path, on_event=fails),
    )
    with caplog.at_level(logging.ERROR, "distplb"):
        for _ in range(5):
            window.add(0, torch.tensor([4, 3, 2, 1]))
            rebalancer.step()
    rebalancer.close()
    assert "on_event failed at iteration 2" in caplog.text
    first, second = read_events(tmp_path / "events.jsonl")
    assert (first.iteration, first.imbalance_next, second.imbalance_next) == (2, (1.0,), None)
    assert first.hottest_experts == (((0, 8), (1, 6), (2, 4), (3, 2)),)
    assert (first.num_experts, first.num_nodes, first.tokens_of_gpu_before) == (4, 1, ((20,),))
    assert first.max_violation == pytest.approx(0.6)
    assert Trace.read(tmp_path).num_steps == 4


def test_a_rebalancer_writes_of_windows_without_tokens_that_nothing_is_known(tmp_path: Path) -> None:
    experts, records = torch.nn.Parameter(torch.arange(4.0)[:, None].clone()), list[RebalanceEvent]()
    window = LoadWindow(1, 4, 8)
    rebalancer = Rebalancer(
        [MoELayer(name="moe", experts={"w": experts}, router={"w": torch.zeros(4, 2)})],
        torch.optim.AdamW([experts]),
        topology=Topology(1, 1),
        every=2,
        window=window,
        record=Record(tmp_path, on_event=records.append),
    )
    for counts in ([0, 0, 0, 0], [0, 0, 0, 0], [4, 3, 2, 1], [0, 0, 0, 0], [4, 3, 2, 1]):
        window.add(0, torch.tensor(counts))
        rebalancer.step()
    rebalancer.close()
    first, second = read_events(tmp_path / "events.jsonl")
    assert [one.imbalance_next for one in records] == [None, (1.0,), None]
    assert (first.decision, first.steps, first.imbalance_before, first.imbalance_next) == ("kept", 0, (), (1.0,))
    assert (second.steps, second.imbalance_before, second.tokens_of_gpu_before) == (1, (1.0,), ((10,),))
    assert Trace.read(tmp_path).load.sum((1, 2)).tolist() == [0, 0, 10, 0]


# --- on the host ----------------------------------------------------------------------------------------------------


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU: results of operations on it are there too, until they are moved to "cpu"."""

    touched: ClassVar[list[tuple[str, str]]] = []  # thread and operation

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        cls.touched.append((threading.current_thread().name, str(func)))
        result = super().__torch_function__(func, types, args, kwargs)
        to_host = "cpu" in (*args[1:], kwargs.get("device"))
        if func is torch.Tensor.cpu or (func is torch.Tensor.to and to_host):
            return result.as_subclass(torch.Tensor)
        return result


@pytest.mark.parametrize("spread", [None, Spread(1, 1)])
def test_a_record_is_made_on_the_host_and_the_gpu_is_left_to_the_training(
    tmp_path: Path, spread: Spread | None
) -> None:
    """The log's thread computed bound and quantiles on the training's stream, and waited for it each time."""
    experts = torch.nn.Parameter(torch.arange(4.0)[:, None].clone())
    window = LoadWindow(1, 4, 8)
    window._counts, window._numbers = window._counts.as_subclass(OnDevice), window._numbers.as_subclass(OnDevice)
    records: list[RebalanceEvent] = []
    rebalancer = Rebalancer(
        [MoELayer(name="moe", experts={"w": experts}, router={"w": torch.zeros(4, 2)})],
        torch.optim.AdamW([experts]),
        topology=Topology(1, 1),
        every=4,
        window=window,
        search=Search(time_curve=TimeCurve.linear(3.0), engine="reference"),
        moves=Moves(max_bytes=0, model=MoveModel(1e-6, 10, 1e9, 1e9), spread=spread),
        record=Record(tmp_path, summary_writer=summary_writer(tmp_path / "tensorboard"), on_event=records.append),
    )
    makers: list[Any] = []
    assert rebalancer._parts.journal.log is not None
    take = rebalancer._parts.journal.log.take
    rebalancer._parts.journal.log.take = lambda make: (makers.append(make), take(make))[1]  # type: ignore[method-assign]
    OnDevice.touched.clear()
    for _ in range(14):
        window.add(0, torch.tensor([4, 3, 2, 1]))
        rebalancer.step()
    rebalancer.close()
    threads = {thread for thread, _ in OnDevice.touched}
    assert threads == {"MainThread"} | ({"distplb_0"} if spread else set())  # the threads of training and search
    events = read_events(tmp_path / "events.jsonl")
    assert [event.iteration for event in events] == [4, 8, 12]
    assert events[:2] == [event for event in records if event.imbalance_next is not None]
    # Records that wait for the next window hold no GPU memory either.
    assert len(makers) == 5
    assert [where for make in makers for where in on_device(make)] == []


def on_device(value: Any, where: str = "", visited: set[int] | None = None) -> Iterator[str]:
    """Yield where a closure, or anything that it refers to, holds tensors of the device."""
    visited = set() if visited is None else visited
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, OnDevice):
        yield where
    elif isinstance(value, list | tuple | set):
        for number, one in enumerate(value):
            yield from on_device(one, f"{where}[{number}]", visited)
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from on_device(one, f"{where}[{name!r}]", visited)
    elif not isinstance(value, torch.Tensor):
        inside = inspect.getclosurevars(value).nonlocals if inspect.isfunction(value) else {}
        inside = inside | {"wrapped": getattr(value, "__wrapped__", None)} | getattr(value, "__dict__", {})
        for name, one in inside.items():
            if name != "self":  # the rebalancer, which holds the window
                yield from on_device(one, f"{where}.{name}", visited)
