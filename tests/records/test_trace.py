"""Traces survive on disk and are written while a job runs, and only traces are read as traces.

Shapes: S steps, L layers, E experts, P slots, M GPUs, D EP groups, B micro-batches, N placements.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distplb import DistplbError, Placement, Trace, TraceWriter
from distplb.records.read_loads import read_loads


def random_trace(seed: int = 0, steps: int = 6, first: int = 0) -> Trace:
    random_ = random.Random(seed)
    tables = [[random_.sample([*range(6), 0, 1], 8) for _ in range(2)] for _ in range(3)]
    return Trace(
        torch.tensor([[[random_.randrange(300) for _ in range(6)] for _ in range(2)] for _ in range(steps)]),
        tuple(Placement(torch.tensor(table), 6, 4) for table in tables),
        torch.tensor(sorted(random_.choices(range(3), k=steps))),
        torch.tensor([first + step // 2 for step in range(steps)]),
        ("blocks.0.moe", "blocks.1.moe"),
        "python pretrain.py --größe 1",
    )


def check_same(result: Trace, expected: Trace) -> None:
    for name in ("load", "iteration", "placement_of_step"):
        assert getattr(result, name).dtype == torch.int64
        assert torch.equal(getattr(result, name), getattr(expected, name))
    assert (result.placements, result.layers, result.note) == (expected.placements, expected.layers, expected.note)


# --- the value --------------------------------------------------------------------------------------------------


def test_layers_without_names_are_numbered() -> None:
    one = Trace(torch.ones(3, 2, 4, dtype=torch.int32), [Placement.contiguous(2, 4, 2)], [0] * 3, [5, 5, 9])
    assert one.layers == ("0", "1")
    assert (one.num_steps, one.num_layers, one.num_experts) == (3, 2, 4)
    assert one.load.dtype == torch.int64


@pytest.mark.parametrize(
    ("changed", "wording"),
    [
        ({"load": torch.full((2, 1, 4), 0.5)}, "load has 0.5 for expert 0 of layer 0 in step 0"),
        ({"load": torch.ones(4, 8, dtype=torch.int64)}, "load has shape .4, 8.; pass .steps, layers, experts."),
        ({"load": torch.ones(0, 1, 4, dtype=torch.int64)}, "load has shape"),
        ({"load": torch.full((2, 1, 4), -3)}, "load has -3 for expert 0 of layer 0 in step 0"),
        ({"iteration": [1, 2, 3]}, "iteration has shape .3. where .2. is expected"),
        ({"iteration": [2, 1]}, "iteration decreases from one step to the next"),
        ({"placement_of_step": [0, 1]}, r"placement_of_step has values from 0 to 1; pass indices in \[0, 1\)"),
        ({"placement_of_step": [-1, 0]}, "placement_of_step has values from -1"),
        ({"placements": ()}, "placements is empty"),
        ({"placements": (Placement.contiguous(1, 4, 2), Placement.contiguous(1, 4, 4))}, "placement 1 has"),
        (
            {"placements": (Placement.contiguous(1, 6, 2),)},
            r"placement 0 has \[layers, experts, slots, GPUs\] \[1, 6, 6, 2\]",
        ),
        ({"layers": ("a", "b")}, "layers in the load: 1, different names: 2"),
    ],
)
def test_what_does_not_fit_together_is_refused(changed: dict[str, Any], wording: str) -> None:
    fields = {
        "load": torch.ones(2, 1, 4, dtype=torch.int64),
        "placements": (Placement.contiguous(1, 4, 2),),
        "placement_of_step": [0, 0],
        "iteration": [1, 1],
    }
    with pytest.raises(DistplbError, match=wording):
        Trace(**fields | changed)


# --- files ------------------------------------------------------------------------------------------------------


def test_a_trace_comes_back_from_its_file(tmp_path: Path) -> None:
    expected = random_trace()
    expected.save(tmp_path / "trace.npz")
    expected.save(tmp_path / "trace.npz")
    check_same(Trace.read(tmp_path / "trace.npz"), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


@pytest.mark.parametrize(("most", "dtype"), [(255, "u1"), (256, "u2"), (65536, "u4"), (2**32, "u8"), (2**62, "u8")])
def test_counts_take_the_smallest_integers_that_hold_them(tmp_path: Path, most: int, dtype: str) -> None:
    one = Trace(torch.tensor([[[most, 0]]]), (Placement.contiguous(1, 2, 2),), [0], [0])
    one.save(tmp_path / "trace.npz")
    with np.load(tmp_path / "trace.npz", allow_pickle=False) as file:
        assert file["load"].dtype == dtype
    assert int(Trace.read(tmp_path / "trace.npz").load.max()) == most


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8", ">u2", ">u8"])
def test_unsigned_counts_are_read_as_they_are(tmp_path: Path, dtype: str) -> None:
    """By `read_loads` too, and in the byte order of another machine."""
    arrays = arrays_of(random_trace(), tmp_path)
    most = min(int(np.iinfo(dtype).max), 2**63 - 1)
    load = np.array(arrays["load"], dtype)
    load[0, 0, 0] = most
    np.savez_compressed(tmp_path / "other.npz", **arrays | {"load": load})
    for result in (Trace.read(tmp_path / "other.npz").load, read_loads(tmp_path / "other.npz").load):
        assert int(result[0, 0, 0]) == most
        assert result[1:].tolist() == random_trace().load[1:].tolist()


def test_a_trace_of_an_earlier_version_is_still_read() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "traces" / "plain-2x16.npz"
    with np.load(path) as file:
        about, load = json.loads(file["about"].tobytes()), file["load"].astype(np.int64)
    result = read_loads(path)
    assert result.load.tolist() == load.tolist()
    assert result.layers == tuple(about["layers"])


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = random_trace()
    expected.save(tmp_path / "trace.npz")

    def fail(file: io.BufferedWriter, **_: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="no space"):
        random_trace(1).save(tmp_path / "trace.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]
    check_same(Trace.read(tmp_path / "trace.npz"), expected)


def arrays_of(one: Trace, folder: Path) -> dict[str, np.ndarray]:
    one.save(folder / "whole.npz")
    with np.load(folder / "whole.npz", allow_pickle=False) as file:
        return dict(file)


def about(**changed: Any) -> np.ndarray:
    fields = {"format": "distplb.trace", "version": 1, "num_gpus": 4, "layers": ["a", "b"], "note": ""}
    return np.frombuffer(json.dumps(fields | changed).encode(), dtype=np.uint8)


@pytest.mark.parametrize(
    ("changed", "wording"),
    [
        ({"about": about(version=2)}, "version 2; this distplb reads 'distplb.trace', version 1"),
        ({"about": about(format="other")}, "it is 'other', version 1"),
        ({"about": about(layers=["a"])}, "layers in the load: 2, different names: 1"),
        ({"about": about(layers=7)}, "is not a trace"),
        ({"about": about(num_gpus=3)}, "num_slots=8, num_experts=6, num_gpus=3"),
        ({"about": about(num_gpus=4.9)}, "its num_gpus is 4.9 where a positive integer is expected"),
        ({"about": about(num_gpus="4")}, "its num_gpus is '4' where a positive integer is expected"),
        ({"about": about(num_gpus=True)}, "its num_gpus is True where a positive integer is expected"),
        ({"about": about(version=True)}, "version True; this distplb reads 'distplb.trace', version 1"),
        ({"about": about(layers="ab")}, "its layers are 'ab' where a list of names is expected"),
        ({"about": about(layers=[["a"], ["b"]])}, "where a list of names is expected"),
        (
            {"about": np.frombuffer(b'{"version": 1, "version": 1}', dtype=np.uint8)},
            "an object has the name 'version' twice",
        ),
        ({"about": np.frombuffer(b"[" * 100_000, dtype=np.uint8)}, "is not a trace"),
        ({"about": np.frombuffer(b"[]", dtype=np.uint8)}, "is not a trace"),
        ({"about": np.zeros(1 << 23, dtype=np.uint8)}, "names and note take 8388608 bytes"),
        ({"load": np.zeros((6, 2, 6))}, "array 'load' with dtype float64"),
        ({"load": np.zeros((6, 2, 6), dtype=np.int64)}, "array 'load' with dtype int64"),
        ({"load": np.zeros((6, 12), dtype=np.uint8)}, r"array 'load' with dtype uint8 and shape \(6, 12\)"),
        (
            {"load": np.full((6, 2, 6), 1 << 63, dtype=np.uint64)},
            "it has 9223372036854775808, which does not fit int64",
        ),
        ({"load": np.zeros((0, 2, 6), dtype=np.uint8)}, "load has shape"),
        ({"load": np.array([[[{}]]])}, "array 'load' with dtype object"),
        ({"iteration": np.array([{}])}, "array 'iteration' with dtype object"),
        ({"iteration": np.zeros(5, dtype=np.int64)}, "iteration has shape .5. where .6. is expected"),
        ({"expert_of_slot": np.full((3, 2, 8), 6, dtype=np.uint8)}, "holds expert 6"),
        ({"expert_of_slot": np.zeros((0, 2, 8), dtype=np.uint8)}, "placements is empty"),
        ({"surplus": np.zeros(1)}, "holds arrays 'about', 'expert_of_slot', 'iteration', 'load', 'placement_of_step',"),
    ],
)
def test_other_archives_are_refused_by_name(tmp_path: Path, changed: dict[str, np.ndarray], wording: str) -> None:
    arrays = arrays_of(random_trace(), tmp_path)
    np.savez_compressed(tmp_path / "other.npz", **arrays | changed)
    with pytest.raises(DistplbError, match=wording) as caught:
        Trace.read(tmp_path / "other.npz")
    assert str(tmp_path / "other.npz") in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harm",))

    arrays = arrays_of(random_trace(), tmp_path) | {"load": np.array([[[Harm()]]], dtype=object)}
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(DistplbError, match="array 'load' with dtype object"):
        Trace.read(tmp_path / "other.npz")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"text", b"\x93NUMPY\x01\x00"])
def test_files_that_are_no_archives_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.npz").write_bytes(content)
    with pytest.raises(DistplbError, match=r"other\.npz cannot be read .*; pass a trace written by Trace\.save"):
        Trace.read(tmp_path / "other.npz")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DistplbError, match=r"none\.npz cannot be read .*No such file"):
        Trace.read(tmp_path / "none.npz")
    with pytest.raises(DistplbError, match=r"is a folder without \.npz files"):
        Trace.read(tmp_path)


def test_truncated_and_damaged_files_are_refused_or_still_the_same(tmp_path: Path) -> None:
    expected, random_, path = random_trace(), random.Random(0), tmp_path / "trace.npz"
    expected.save(path)
    content = path.read_bytes()
    damaged = [content[:size] for size in range(0, len(content), 29)]
    for _ in range(300):
        flipped = bytearray(content)
        flipped[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
        damaged.append(bytes(flipped))
    refusals = []
    for content in damaged:
        path.write_bytes(content)
        try:
            check_same(Trace.read(path), expected)
        except DistplbError as error:
            refusals.append(str(error))
    assert len(refusals) > len(damaged) // 2
    assert all(str(path) in refusal for refusal in refusals)


def header(shape: tuple[int, ...], dtype: str) -> bytes:
    """The header of a `.npy` file."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    arrays = arrays_of(random_trace(), tmp_path) | {"load": np.zeros((1 << 12, 1 << 6, 1 << 8), dtype=np.uint8)}
    np.savez_compressed(tmp_path / "bomb.npz", **arrays)  # 64 MiB in 70 KB
    del arrays
    tracemalloc.start()
    with pytest.raises(DistplbError, match=r"would take 53687.* bytes in memory, but max_bytes allows 16777216;"):
        Trace.read(tmp_path / "bomb.npz", max_bytes=1 << 24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 21


@pytest.mark.parametrize("shape", [(1 << 40, 1 << 40, 1 << 40), (1 << 31, 1, 1), (-1, 2, 6), (5, 2, 6)])
def test_a_header_that_promises_what_the_file_has_not_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays_of(random_trace(), tmp_path)
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(tmp_path / "other.npz", "w") as other:
        for name in whole.namelist():
            other.writestr(name, whole.read(name) if name != "load.npy" else header(shape, "|u1") + bytes(6 * 2 * 6))
    with pytest.raises(DistplbError, match=r"array 'load' with (dtype|shape)"):
        Trace.read(tmp_path / "other.npz")


def test_all_parts_count_against_the_limit(tmp_path: Path) -> None:
    for first in range(4):
        random_trace(steps=2, first=first).save(tmp_path / f"{first}.npz")
    size = 8 * (4 * (2 * 2 * 6 + 2 + 2 + 3 * 2 * 8))
    with pytest.raises(DistplbError, match=f"would take .* bytes in memory, but max_bytes allows {size};"):
        Trace.read(tmp_path, max_bytes=size)
    assert Trace.read(tmp_path, max_bytes=2 * size + 8192).num_steps == 8


# --- the writer -------------------------------------------------------------------------------------------------


def test_parts_are_joined_in_their_order(tmp_path: Path) -> None:
    one, other = Placement.contiguous(1, 2, 2), Placement(torch.tensor([[1, 0]]), 2, 2)
    load = torch.arange(14).reshape(7, 1, 2)
    with TraceWriter(tmp_path / "new" / "folder", layers=["moe"], note="a run") as writer:
        writer.add(load[:2], one, [9, 9])
        writer.add(load[2:5], other, torch.tensor([10, 11, 12]))
        writer.add(load[5:5], other, [])
        writer.add(load[5:], one, [100, 101])
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["000000000009.npz", "000000000010.npz", "000000000100.npz"]
    expected = Trace(load, (one, other), [0, 0, 1, 1, 1, 0, 0], [9, 9, 10, 11, 12, 100, 101], ("moe",), "a run")
    check_same(Trace.read(tmp_path / "new" / "folder"), expected)
    assert writer.error is None


def test_a_resumed_job_overwrites_what_it_counts_again(tmp_path: Path) -> None:
    placement = Placement.contiguous(1, 2, 2)
    for begin, tokens in ((0, 1), (10, 1), (15, 2)):
        with TraceWriter(tmp_path) as writer:
            writer.add(torch.full((10, 1, 2), tokens), placement, range(begin, begin + 10))
    result = Trace.read(tmp_path)
    assert result.iteration.tolist() == list(range(25))
    assert result.load[:, 0, 0].tolist() == [1] * 15 + [2] * 10


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(1, 4), min_size=1, max_size=4)), min_size=1, max_size=4)
)
def test_of_each_life_what_the_next_one_records_again_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, lives: list[tuple[int, list[int]]]
) -> None:
    """Parts of an earlier run came between those of a later one, wherever their names put them.

    Each run begins at an iteration, or where the last one ended if that is earlier, and writes parts of some lengths.
    Every second run continues in the same process: the job has loaded an earlier state.
    """
    folder, expected = tmp_path_factory.mktemp("run"), dict[int, int]()
    writer = TraceWriter(folder)
    for life, (begin, lengths) in enumerate(lives, start=1):
        if life % 2:
            writer.close()
            writer = TraceWriter(folder)
        at = min(begin, max(expected, default=0) + 1)
        expected = {iteration: tokens for iteration, tokens in expected.items() if iteration < at}
        for length in lengths:
            part = range(at, at + length)
            writer.add(torch.full((length, 1, 2), life), Placement.contiguous(1, 2, 2), part)
            expected |= dict.fromkeys(part, life)
            at += length
    writer.close()
    result = Trace.read(folder)
    assert dict(zip(result.iteration.tolist(), result.load[:, 0, 0].tolist(), strict=True)) == expected
    assert result.iteration.tolist() == sorted(expected)


def test_a_part_says_which_life_wrote_it_and_a_trace_alone_does_not(tmp_path: Path) -> None:
    for life in (1, 2):
        with TraceWriter(tmp_path) as writer:
            writer.add(torch.ones(1, 1, 2, dtype=torch.int64), Placement.contiguous(1, 2, 2), [life])
    random_trace().save(tmp_path / "alone.npz")
    documents = [json.loads(np.load(path)["about"].tobytes()) for path in sorted(tmp_path.iterdir())]
    assert [one.get("life") for one in documents] == [1, 2, None]


def test_nothing_is_written_beside_parts_of_another_job(tmp_path: Path) -> None:
    """After that, the parts of neither job could be read."""
    with TraceWriter(tmp_path, layers=["moe"]) as writer:
        writer.add(torch.ones(1, 1, 4, dtype=torch.int64), Placement.contiguous(1, 4, 2), [0])
    other = TraceWriter(tmp_path, layers=["moe"])
    other.add(torch.ones(1, 1, 4, dtype=torch.int64), Placement.contiguous(1, 4, 4), [5])
    with pytest.warns(
        RuntimeWarning, match=r"0\.npz belongs to another job: it has .*GPUs: 2; this job has .*GPUs: 4; rec"
    ):
        other.close()
    assert Trace.read(tmp_path).iteration.tolist() == [0]


def test_a_part_that_is_half_written_is_ignored_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    random_trace(steps=2).save(tmp_path / "0.npz")
    random_trace(steps=2, first=1).save(tmp_path / "1.npz")
    content = (tmp_path / "1.npz").read_bytes()
    (tmp_path / "2.npz.77.tmp").write_bytes(content[:100])
    assert Trace.read(tmp_path).num_steps == 4
    for damage in (b"", content[:100], content[:-40], content[:300] + b"\0" * 200 + content[500:]):
        (tmp_path / "1.npz").write_bytes(damage)
        with pytest.raises(DistplbError, match=r"1\.npz .*; or move 1\.npz away to read the other parts$"):
            Trace.read(tmp_path)
        with TraceWriter(tmp_path / "new") as writer:  # it does not stop a resumed job
            writer.add(torch.ones(1, 1, 2, dtype=torch.int64), Placement.contiguous(1, 2, 2), [9])
        (tmp_path / "new" / "0.npz").write_bytes(damage)
        with TraceWriter(tmp_path / "new") as writer:
            writer.add(torch.ones(1, 1, 2, dtype=torch.int64), Placement.contiguous(1, 2, 2), [10])
        assert writer.error is None


def test_the_first_step_of_each_iteration(tmp_path: Path) -> None:
    def begins(*iteration: int) -> list[int]:
        load = torch.ones(len(iteration), 1, 2, dtype=torch.int64)
        one = Trace(load, (Placement.contiguous(1, 2, 2),), [0] * len(iteration), iteration)  # type: ignore[arg-type]
        return one.begins.tolist()

    assert begins(7) == begins(7, 7, 7) == [0]
    assert begins(7, 7, 8, 20, 20) == [0, 2, 3]


def test_parts_of_different_jobs_are_refused(tmp_path: Path) -> None:
    random_trace().save(tmp_path / "0.npz")
    Trace(torch.ones(1, 1, 2).long(), (Placement.contiguous(1, 2, 2),), [0], [9]).save(tmp_path / "1.npz")
    with pytest.raises(DistplbError, match=r"1\.npz has other layers than .*0\.npz; pass parts of one job and"):
        Trace.read(tmp_path)
    Trace(torch.ones(1, 2, 2).long(), (Placement.contiguous(2, 2, 2),), [0], [9], random_trace().layers).save(
        tmp_path / "1.npz"
    )
    with pytest.raises(DistplbError, match="belong to different jobs"):
        Trace.read(tmp_path)
    random_trace(first=1).save(tmp_path / "1.npz")
    random_trace(first=0).save(tmp_path / "2.npz")
    with pytest.raises(DistplbError, match=r"2\.npz begins at iteration 0, before .*1\.npz at 1; name parts"):
        Trace.read(tmp_path)


def test_a_part_is_a_copy(tmp_path: Path) -> None:
    load, iterations = torch.ones(1, 1, 2, dtype=torch.int64), torch.tensor([3])
    gate = threading.Event()
    with TraceWriter(tmp_path) as writer:
        writer._thread.submit(gate.wait, 30)
        writer.add(load, Placement.contiguous(1, 2, 2), iterations)
        load += 7
        iterations += 7
        gate.set()
    result = Trace.read(tmp_path)
    assert (result.load.tolist(), result.iteration.tolist()) == ([[[1, 1]]], [3])


def test_the_job_waits_only_while_two_parts_are_being_written(tmp_path: Path) -> None:
    gate, third = threading.Event(), threading.Event()
    load, placement = torch.ones(1, 1, 2, dtype=torch.int64), Placement.contiguous(1, 2, 2)
    writer = TraceWriter(tmp_path)
    writer._thread.submit(gate.wait, 30)
    writer.add(load, placement, [0])
    writer.add(load, placement, [1])

    def add_third() -> None:
        writer.add(load, placement, [2])
        third.set()

    job = threading.Thread(target=add_third, daemon=True)
    job.start()
    assert not third.wait(0.2)
    gate.set()
    assert third.wait(30)
    writer.close()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failure_is_kept_and_warned_of_once_and_never_raised(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    load, placement = torch.ones(1, 1, 2, dtype=torch.int64), Placement.contiguous(1, 2, 2)
    writer = TraceWriter(tmp_path / "file" / "folder")

    def add_all() -> None:
        for iteration in range(1, 9):
            writer.add(load, placement, [iteration])
        writer.close()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer.add(load, placement, [0])
        writer._thread.submit(int).result(30)
    with pytest.warns(RuntimeWarning, match=r"no more parts of the trace are written to .*folder: ") as caught:
        add_all()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert isinstance(writer.error, OSError)
    with pytest.raises(DistplbError, match="is closed; create another TraceWriter"):
        writer.add(load, placement, [9])


def test_counts_that_do_not_fit_are_a_failure_too(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path)
    writer.add(torch.ones(2, 1, 4, dtype=torch.int64), Placement.contiguous(1, 2, 2), [0, 1])
    with pytest.warns(RuntimeWarning, match="placement 0 has"):
        writer.close()
    assert isinstance(writer.error, DistplbError)


UNCLOSED = """
import sys, torch
from distplb import Placement, TraceWriter
writer = TraceWriter(sys.argv[1])
for iteration in range(3):
    writer.add(torch.ones(1, 1, 2, dtype=torch.int64), Placement.contiguous(1, 2, 2), [iteration])
"""


def test_what_was_added_is_written_when_the_process_ends(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", UNCLOSED, str(tmp_path)], check=True, timeout=400)
    assert Trace.read(tmp_path).iteration.tolist() == [0, 1, 2]


# --- Megatron-LM's files ----------------------------------------------------------------------------------------


def line(iteration: int, layer: int, counts: list[list[int]], mtp: int | None = None) -> str:
    """A line as Megatron-LM's `ActivationLogger.save_tpe` writes it."""
    head = {"iter": iteration, "block": "decoder" if mtp is None else "mtp"}
    return json.dumps(head | ({} if mtp is None else {"mtp_idx": mtp}) | {"layer": layer, "tpe": counts}) + "\n"


def write_megatron(folder: Path, load: np.ndarray, iterations: list[int], gpus: int, copies: int, stages: int) -> None:
    """Write the files of all ranks from `load [iterations, B, D, L, E]`; the last layer of each stage is MTP's."""
    groups, layers, experts = load.shape[2:]
    each, size = layers // stages, experts // gpus
    for rank in range(copies * gpus * groups * stages):
        stage, group = rank // (copies * gpus * groups), rank // (copies * gpus) % groups
        first = rank // copies % gpus * size
        with (folder / f"rank{rank}.jsonl").open("a") as file:
            for nth, iteration in enumerate(iterations):
                for layer in range(each):
                    counts = load[nth, :, group, stage * each + layer, first : first + size].tolist()
                    last = layer == each - 1
                    file.write(line(iteration, 0 if last else layer + 1, counts, mtp=0 if last else None))


@pytest.mark.parametrize(
    ("gpus", "groups", "copies", "stages"), [(1, 1, 1, 1), (4, 1, 1, 1), (2, 3, 1, 1), (2, 2, 2, 3)]
)
def test_megatrons_files_become_the_load_of_all_experts(
    tmp_path: Path, gpus: int, groups: int, copies: int, stages: int
) -> None:
    load = np.random.default_rng(0).integers(100, size=(3, 5, groups, 12, 8))
    write_megatron(tmp_path, load, [10, 20, 30], gpus, copies, stages)
    result = Trace.from_megatron(tmp_path, num_gpus=gpus, expert_tensor_parallel=copies, pipeline_parallel=stages)
    assert result.load.tolist() == load.reshape(-1, 12, 8).tolist()
    assert result.iteration.tolist() == [at for at in (10, 20, 30) for _ in range(5 * groups)]
    assert result.placements == (Placement.contiguous(12, 8, gpus),)
    names = [f"decoder.layers.{layer}" for layer in range(1, 12 // stages)] + ["mtp.layers.0.mtp_model_layer.layers.0"]
    if stages > 1:
        names = [f"pp{stage}.{name}" for stage in range(stages) for name in names]
    assert list(result.layers) == names  # 11 layers: numbers in their order, not 1, 10, 11, 2


def test_ranks_are_one_ep_group_unless_told_and_files_may_be_named_each(tmp_path: Path) -> None:
    write_megatron(tmp_path, np.arange(24).reshape(1, 1, 1, 2, 12), [1], 12, 1, 1)
    result = Trace.from_megatron(*sorted(tmp_path.iterdir(), reverse=True))
    assert result.load.tolist() == [np.arange(24).reshape(2, 12).tolist()]
    assert result.placements[0].num_gpus == 12


def test_the_last_line_of_an_iteration_counts(tmp_path: Path) -> None:
    text = line(1, 0, [[1, 2]]) + line(2, 0, [[3, 4]]) + line(2, 0, [[5, 6]]) + line(1, 0, [[7, 8]])
    (tmp_path / "rank0.jsonl").write_text(text)
    result = Trace.from_megatron(tmp_path)
    assert (result.load[:, 0].tolist(), result.iteration.tolist()) == ([[7, 8], [5, 6]], [1, 2])


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[]",
        "7",
        "{}",
        "",
        "[" * 100_000,
        '{"iter": 1, "block": "decoder", "layer": 0, "tpe": [[1, 2]',
        '{"iter": 1, "block": "encoder", "layer": 0, "tpe": [[1, 2]]}',
        '{"iter": 1, "block": "mtp", "layer": 0, "tpe": [[1, 2]]}',
        '{"iter": -1, "block": "decoder", "layer": 0, "tpe": [[1, 2]]}',
        '{"iter": 1, "block": "decoder", "layer": "0", "tpe": [[1, 2]]}',
        '{"iter": true, "block": "decoder", "layer": 0, "tpe": [[1, 2]]}',
        '{"iter": 1, "block": "decoder", "layer": 0, "tpe": [[1, -2]]}',
        '{"iter": 1, "block": "decoder", "layer": 0, "tpe": [[1.5, 2]]}',
        '{"iter": 1, "block": "decoder", "layer": 0, "tpe": [[1], [1, 2]]}',
        '{"iter": 1, "block": "decoder", "layer": 0, "tpe": [1, 2]}',
        '{"iter": 1, "block": "decoder", "layer": 0, "tpe": []}',
        '{"iter": 1, "block": "decoder", "layer": 0, "tpe": [[9223372036854775808]]}',
        '{"iter": 1, "block": "decoder", "layer": 0, "tpe": [[NaN]]}',
        '{"iter": 1, "block": "decoder", "layer": 0, "tpe": "none"}',
        '{"iter": "' + "9" * 10_000 + '", "block": "decoder", "layer": 0, "tpe": [[1]]}',
        b"\xff\xfe",
    ],
)
def test_a_bad_line_is_refused_by_file_and_number(tmp_path: Path, bad: str | bytes) -> None:
    path = tmp_path / "rank0.jsonl"
    path.write_bytes(line(1, 0, [[1, 2]]).encode() + (bad.encode() if isinstance(bad, str) else bad) + b"\n")
    with pytest.raises(DistplbError, match=r"rank0\.jsonl, line 2 is not a line of tokens per expert") as caught:
        Trace.from_megatron(path)
    assert len(str(caught.value)) < 1000


def test_lines_and_files_have_limits(tmp_path: Path) -> None:
    path = tmp_path / "rank0.jsonl"
    path.write_bytes(line(1, 0, [[1, 2]]).encode())
    with pytest.raises(DistplbError, match=r"the files of all ranks have .* bytes, but max_bytes allows 10; pass"):
        Trace.from_megatron(path, max_bytes=10)
    path.write_bytes(line(1, 0, [[1, 2]]).encode() + b" " * (1 << 24) + b"1")
    with pytest.raises(DistplbError, match=r"rank0\.jsonl, line 2 has more than 16777216 bytes"):
        Trace.from_megatron(path)


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    def refuses(wording: str, **options: int) -> None:
        with pytest.raises(DistplbError, match=wording):
            Trace.from_megatron(tmp_path, **options)

    refuses("there is no file of rank 0")
    (tmp_path / "rank1.jsonl").write_text(line(1, 0, [[1, 2]]))
    refuses("there is no file of rank 0")
    (tmp_path / "rank0.jsonl").write_text("")
    refuses(r"rank0\.jsonl has no complete line; pass files that have at least one")
    (tmp_path / "rank0.jsonl").write_text(line(1, 0, [[1, 2]]))
    assert Trace.from_megatron(tmp_path).num_experts == 4
    refuses("the number of ranks, 2, is not a multiple of EP size .*, 3 × 1 × 1; pass the sizes", num_gpus=3)
    refuses(r"2 × 1 × 0; pass", pipeline_parallel=0)
    (tmp_path / "rank0.jsonl").write_text(line(1, 0, [[1, 3]]))
    refuses("rank0.jsonl and .*rank1.jsonl have different counts", expert_tensor_parallel=2)
    for other, wording in (
        (line(2, 0, [[1, 2]]), r"rank1\.jsonl lacks iteration 1 of decoder\.layers\.0, and no iteration is complete"),
        (line(1, 0, [[1, 2]]) + line(1, 1, [[1, 2]]), r"rank0\.jsonl lacks iteration 1 of decoder\.layers\.1, and no"),
        (
            line(1, 0, [[1, 2, 3]]),
            r"rank1\.jsonl has counts \[micro-batches, experts\] of shape \[1, 3\] in iteration 1",
        ),
        (line(1, 0, [[1, 2]] * 2), r"rank1\.jsonl has counts \[micro-batches, experts\] of shape \[2, 2\]"),
    ):
        (tmp_path / "rank1.jsonl").write_text(other)
        refuses(wording)
    refuses("the pipeline stages have .1, 2. micro-batches of .2, 2. experts in iteration 1", pipeline_parallel=2)
    with pytest.raises(DistplbError, match=r"other\.jsonl is not named rank<number>\.jsonl"):
        Trace.from_megatron(tmp_path / "other.jsonl")
    with pytest.raises(DistplbError, match=r"or is a second file of its rank"):
        Trace.from_megatron(tmp_path, tmp_path / "rank0.jsonl")
    with pytest.raises(DistplbError, match=r"there is no file .*rank7\.jsonl"):
        Trace.from_megatron(tmp_path, tmp_path / "rank7.jsonl")
