"""Megatron-LM's lines as jobs write them: recomputed, truncated, resumed, of an earlier revision.

Shapes: B micro-batches, L layers, R ranks, G experts on each, E experts.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs.megatron_logs import line, text_line

from distplb import DistplbError, Trace

Load = np.ndarray[Any, np.dtype[np.int64]]


def lines(load: Load, rank: int, iterations: list[int], order: list[int] | None = None) -> str:
    """A rank's file from `[iterations, B, L, R, G]`, with its micro-batches in the given order, repeats included."""
    order = list(range(load.shape[1])) if order is None else order
    return "".join(
        line(at, layer, load[nth, order, layer, rank].tolist())
        for nth, at in enumerate(iterations)
        for layer in range(load.shape[2])
    )


def one_forward_one_backward(micro_batches: int, ahead: int) -> list[int]:
    """The micro-batches that a stage computes, forward and again before backward, with `ahead` forwards in advance."""
    ahead = min(ahead, micro_batches)
    order = list(range(ahead))
    for nth in range(micro_batches):
        order += [ahead + nth] * (ahead + nth < micro_batches) + [nth]
    return order


def read(folder: Path, texts: list[str], **options: Any) -> tuple[Trace, list[str]]:
    """The trace, and the warnings."""
    folder.mkdir(exist_ok=True)
    for rank, text in enumerate(texts):
        (folder / f"rank{rank}.jsonl").write_text(text)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = Trace.from_megatron(folder, **options)
    assert all(one.filename == __file__ for one in caught)
    return trace, [str(one.message) for one in caught]


def expected(load: Load) -> list[Any]:
    """`[S, L, E]`."""
    iterations, rows, layers = load.shape[:3]
    return load.reshape(iterations * rows, layers, -1).tolist()


# --- activation recomputation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 5])
@pytest.mark.parametrize("ahead", [0, 1, 3, 9])
def test_recomputed_micro_batches_are_used_once_whatever_the_schedule(
    tmp_path: Path, micro_batches: int, ahead: int
) -> None:
    """A forward hook counted the recomputation too, so every load and the number of steps doubled."""
    load = np.random.default_rng(ahead).integers(50, 200, size=(3, micro_batches, 2, 4, 2))
    order = one_forward_one_backward(micro_batches, ahead)
    trace, messages = read(tmp_path, [lines(load, rank, [5, 10, 15], order) for rank in range(4)])
    assert trace.load.tolist() == expected(load)
    (text,) = messages
    assert (
        "jsonl: iterations in which each micro-batch is counted twice, as with activation recomputation: 3 of 3;"
        in text
    )


def test_stages_of_a_pipeline_are_ahead_by_different_numbers(tmp_path: Path) -> None:
    load = np.random.default_rng(0).integers(50, 200, size=(2, 6, 2, 4, 2))
    orders = [one_forward_one_backward(6, 1 - rank // 2) for rank in range(4)]
    assert orders[0] != orders[2]
    trace, messages = read(
        tmp_path, [lines(load, rank, [5, 10], orders[rank]) for rank in range(4)], pipeline_parallel=2
    )
    stages = [load[:, :, :, ranks].reshape(12, 2, 4) for ranks in (slice(0, 2), slice(2, 4))]
    assert trace.load.tolist() == np.concatenate(stages, axis=1).tolist()
    assert len(messages) == 1


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_not_doubled_in_all_layers_and_ranks_is_not_halved(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Few tokens: rows are equal by chance in many layers, and in some of them every row has a duplicate."""
    size = (*(data.draw(st.integers(1, most)) for most in (2, 4, 2, 2)), 1)
    numbers = data.draw(st.lists(st.integers(0, 1), min_size=int(np.prod(size)), max_size=int(np.prod(size))))
    load = np.array(numbers, dtype=np.int64).reshape(size)
    iterations, rows = size[:2]
    together = [sorted(load[at].reshape(rows, -1).tolist()) for at in range(iterations)]
    doubled = rows % 2 == 0 and all(one[::2] == one[1::2] for one in together)
    differ = len({tuple(row) for one in together for row in one}) > 1
    assume(not (doubled and differ))
    texts = [lines(load, rank, list(range(iterations))) for rank in range(size[3])]
    trace, messages = read(tmp_path_factory.mktemp("job"), texts)
    assert trace.load.tolist() == expected(load)
    assert messages == []


def test_iterations_of_more_micro_batches_are_known_by_themselves(tmp_path: Path) -> None:
    """The job was resumed with recomputation, or its batch grew."""
    load = np.random.default_rng(0).integers(50, 200, size=(2, 3, 1, 2, 2))
    texts = [lines(load[:1], rank, [1]) + lines(load[1:], rank, [2], [0, 0, 1, 1, 2, 2]) for rank in range(2)]
    trace, messages = read(tmp_path, texts)
    assert trace.load.tolist() == expected(load)
    assert ": 1 of 2; each micro-batch is used once" in messages[0]


def test_only_some_layers_are_recomputed(tmp_path: Path) -> None:
    """Layers with different numbers of micro-batches were refused."""
    load = np.random.default_rng(0).integers(50, 200, size=(1, 3, 2, 2, 2))
    orders = ([0, 1, 0, 2, 1, 2], [0, 1, 2])
    texts = [
        "".join(line(1, layer, load[0, orders[layer], layer, rank].tolist()) for layer in (0, 1)) for rank in (0, 1)
    ]
    trace, messages = read(tmp_path, texts)
    assert (trace.load.tolist(), len(messages)) == (expected(load), 1)
    texts[0] = texts[0].replace(str(load[0, 0, 0, 0].tolist()), "[7, 7]", 1)
    with pytest.raises(DistplbError, match=r"rank0\.jsonl .* in iteration 1: 3 of decoder\.layers\.1, 6 of"):
        read(tmp_path, texts)


# --- jobs that died ---------------------------------------------------------------------------------------------


def test_a_rank_that_dies_anywhere_leaves_the_iterations_before(tmp_path: Path) -> None:
    """A rank that died an iteration before the others, or within a line, made all files of the job unreadable."""
    load = np.random.default_rng(0).integers(50, 200, size=(3, 2, 2, 2, 2))
    texts = [lines(load, rank, [5, 10, 15]) for rank in (0, 1)]
    ends = [len(lines(load[:number], 1, [5, 10, 15][:number])) for number in (1, 2, 3)]
    for cut in range(ends[0] - 1, ends[2], 3):
        whole = sum(cut >= end - 1 for end in ends)  # complete even without the last newline
        trace, messages = read(tmp_path, [texts[0], texts[1][:cut]])
        assert trace.load.tolist() == expected(load[:whole])
        assert trace.iteration.tolist() == [at for at in [5, 10, 15][:whole] for _ in range(2)]
        if whole < 3:
            lacking = 5 * whole + 5
            assert f"left out {3 - whole} of 3 iterations: " in messages[0]
            assert f"rank1.jsonl lacks iteration {lacking} of decoder.layers." in messages[0]
            is_torn = texts[1][cut - 1] != "\n" and texts[1][cut] != "\n"
            assert (f"rank1.jsonl: line {texts[1][:cut].count(chr(10)) + 1}" in messages[0]) == is_torn
    with pytest.raises(DistplbError, match=r"rank1\.jsonl has no complete line; pass files that have"):
        read(tmp_path, [texts[0], texts[1][:20]])


def test_a_job_that_goes_on_behind_a_line_that_breaks_off_is_read(tmp_path: Path) -> None:
    """The next run appended to the same line, which was refused as damaged."""
    load = np.random.default_rng(0).integers(50, 200, size=(4, 2, 2, 2, 2))
    texts = [lines(load, rank, [1, 2, 3, 4]) for rank in (0, 1)]
    begin, end = (len(lines(load[:number], 1, [1, 2, 3, 4][:number])) for number in (2, 3))
    again = np.random.default_rng(1).integers(50, 200, size=load.shape)  # from iteration 2 on
    joined = np.concatenate([load[:1], again[1:]])
    for cut in range(begin, end, 5):
        lives = [text[: len(text) if rank == 0 else cut] for rank, text in enumerate(texts)]
        later = [lines(again[1:], rank, [2, 3, 4]) for rank in (0, 1)]
        trace, messages = read(tmp_path, [lives[rank] + "\0" * (cut % 2) + later[rank] for rank in (0, 1)])
        assert trace.load.tolist() == expected(joined)
        assert all("is truncated" in text and "left out" not in text for text in messages)


def test_lines_of_two_lives_are_not_mixed(tmp_path: Path) -> None:
    """Iteration 3 comes from the second run on rank 0 and the first on rank 1; 4 comes from the first on both."""
    first, second = np.random.default_rng(0).integers(50, 200, size=(2, 4, 1, 1, 2, 2))
    texts = [
        lines(first, 0, [1, 2, 3, 4]) + lines(second[1:3], 0, [2, 3]),
        lines(first, 1, [1, 2, 3, 4]) + lines(second[1:2], 1, [2]),
    ]
    trace, messages = read(tmp_path, texts)
    assert trace.iteration.tolist() == [1, 2, 4]
    assert trace.load.tolist() == expected(np.concatenate([first[:1], second[1:2], first[3:]]))
    assert "left out 1 of 4 iterations: " in messages[0]
    assert "has iteration 3 from an earlier run of the job" in messages[0]


def test_lines_that_a_resumed_job_repeats_are_no_doubt(tmp_path: Path) -> None:
    """The resumed job counts the same again, and its rank 1 died before it did."""
    load = np.random.default_rng(0).integers(50, 200, size=(3, 2, 1, 2, 2))
    trace, messages = read(
        tmp_path, [lines(load, 0, [1, 2, 3]) + lines(load[1:], 0, [2, 3]), lines(load, 1, [1, 2, 3])]
    )
    assert (trace.load.tolist(), messages) == (expected(load), [])


@pytest.mark.parametrize(
    "bad", ['{"iter": 2}', "{", "iter", '{"iter": 2, "block": "encoder", "layer": 0, "tpe": [[1]]}']
)
def test_what_breaks_off_is_the_beginning_of_a_line_and_nothing_else(tmp_path: Path, bad: str) -> None:
    """At the end of a file without a newline, and followed by a complete line."""
    good = line(1, 0, [[1, 2]])
    if bad == "{":
        trace, messages = read(tmp_path, [good + bad])
        assert (trace.iteration.tolist(), "line 2 is truncated" in messages[0]) == ([1], True)
        return
    for text in (good + bad, good + bad + good):
        with pytest.raises(DistplbError, match=r"rank0\.jsonl, line 2 is not a line of tokens per expert"):
            read(tmp_path, [text])


# --- one file of all ranks --------------------------------------------------------------------------------------


def test_the_log_of_an_earlier_revision_is_read_as_the_files_are(tmp_path: Path) -> None:
    load = np.random.default_rng(0).integers(50, 200, size=(3, 2, 2, 4, 2))
    iterations = [5, 10, 15]
    text = "".join(
        text_line(rank, at, layer, load[nth, row, layer, rank].tolist())
        for nth, at in enumerate(iterations)
        for rank in (2, 0, 3, 1)
        for row in range(2)
        for layer in range(2)
    )
    for where in (tmp_path, tmp_path / "tokens_per_expert.log"):
        (tmp_path / "tokens_per_expert.log").write_text(text)
        trace = Trace.from_megatron(where)
        assert trace.load.tolist() == expected(load)
        assert trace.iteration.tolist() == [5, 5, 10, 10, 15, 15]
    other, _ = read(tmp_path / "files", [lines(load, rank, iterations) for rank in range(4)])
    assert torch.equal(other.load, trace.load)
    assert other.layers == trace.layers
    for cut in range(len(text) - 30, len(text) - 1):
        (tmp_path / "tokens_per_expert.log").write_text(text[:cut])
        with pytest.warns(RuntimeWarning, match=r"rank 1 lacks iteration 15|is truncated"):
            assert set(Trace.from_megatron(tmp_path).iteration.tolist()) >= {5, 10}


def test_a_resumed_job_in_that_log_counts_by_its_last_lines(tmp_path: Path) -> None:
    first, second = [[1, 2], [3, 4]], [[5, 6], [7, 8]]
    (tmp_path / "tokens_per_expert.log").write_text(
        "".join(text_line(rank, 1, 0, first[rank]) for rank in (0, 1))
        + "".join(text_line(rank, 1, 0, second[rank]) for rank in (0, 1))
    )
    assert Trace.from_megatron(tmp_path).load.tolist() == [[[5, 6, 7, 8]]]


@pytest.mark.parametrize(
    ("text", "wording"),
    [
        ("", r"log has no complete line"),
        ("Rank=1 iter=1 layer=0 tokens_per_expert=[1]\n", r"has lines of rank 1, but not of rank 0; pass a log of all"),
        ("Rank=0 iter=1 layer=0 tokens_per_expert=[]\n", r"line 1 is not a line of tokens per expert"),
        ("Rank=0 iter=1 layer=0 tokens_per_expert=[1, 9223372036854775808]\n", r"line 1 is not a line"),
        ("Rank=0 iter=1 layer=0 tokens_per_expert=[1, -2]\n", r"line 1 is not a line of tokens per expert"),
        ("Rank=0 iter=1 layer=experts tokens_per_expert=[1]\n", r"line 1 is not a line of tokens per expert"),
        (
            "Rank=0 iter=1 layer=0 tokens_per_expert=[1]\nRank=0 iter=1 layer=0 tokens_per_expert=[1, 2]\n",
            r"different numbers of experts",
        ),
    ],
)
def test_other_lines_of_that_log_are_refused(tmp_path: Path, text: str, wording: str) -> None:
    (tmp_path / "tokens_per_expert.log").write_text(text)
    with pytest.raises(DistplbError, match=wording):
        Trace.from_megatron(tmp_path)
