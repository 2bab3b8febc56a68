"""Loads from files: the layouts that each kind may have, and which files are refused with which message.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distplb import DistplbError, Placement, Trace, TraceWriter
from distplb.records.read_loads import read_loads

COUNTS = [[5, 1, 0, 2], [3, 3, 7, 1]]  # [L, E]
STEPS = [COUNTS, [[1, 1, 1, 1], [0, 9, 0, 0]]]  # [T, L, E]


def trace() -> Trace:
    placement = Placement.contiguous(2, 4, 2)
    return Trace(torch.tensor(STEPS), (placement,), torch.zeros(2).long(), torch.arange(2), ("first", "second"))


def npy(path: Path, values: object) -> None:
    np.save(path, np.asarray(values))


def text(path: Path, content: str) -> None:
    path.write_text(content)


def archive(path: Path, **arrays: object) -> None:
    np.savez_compressed(path, **{name: np.asarray(values) for name, values in arrays.items()})


# --- what is read -----------------------------------------------------------------------------------------------

READ: dict[str, tuple[Callable[[Path], None], list, tuple[str, ...]]] = {
    "a.npy": (lambda path: npy(path, COUNTS), COUNTS, ("0", "1")),
    "steps.npy": (lambda path: npy(path, STEPS), STEPS, ("0", "1")),
    "floats.npy": (lambda path: npy(path, np.array(COUNTS, np.float32)), COUNTS, ("0", "1")),
    "big-endian.npy": (lambda path: npy(path, np.array(COUNTS, ">u2")), COUNTS, ("0", "1")),
    "fortran.npy": (lambda path: npy(path, np.asfortranarray(STEPS)), STEPS, ("0", "1")),
    "UPPER.NPY": (lambda path: np.save(path.open("wb"), COUNTS), COUNTS, ("0", "1")),
    "one.npz": (lambda path: archive(path, counts=COUNTS), COUNTS, ("0", "1")),
    "named.npz": (lambda path: archive(path, load=STEPS, iteration=[0, 1]), STEPS, ("0", "1")),
    "trace.npz": (lambda path: trace().save(path), STEPS, ("first", "second")),
    "a.json": (lambda path: text(path, json.dumps(COUNTS)), COUNTS, ("0", "1")),
    "steps.json": (lambda path: text(path, json.dumps(STEPS)), STEPS, ("0", "1")),
    "named.json": (lambda path: text(path, json.dumps(dict(zip("ba", COUNTS, strict=True)))), COUNTS, ("b", "a")),
    "bare.csv": (lambda path: text(path, "5,1,0,2\n3,3,7,1\n"), COUNTS, ("0", "1")),
    "spaces.csv": (lambda path: text(path, "\ufeff5, 1, 0, 2.0\r\n\r\n3, 3, 7, 1e0\r\n"), COUNTS, ("0", "1")),
    "header.csv": (lambda path: text(path, "e0,e1,e2,e3\n5,1,0,2\n3,3,7,1\n"), COUNTS, ("0", "1")),
    "names.csv": (lambda path: text(path, "a,5,1,0,2\nb,3,3,7,1\n"), COUNTS, ("a", "b")),
    "both.csv": (lambda path: text(path, "layer,e0,e1,e2,e3\n7,5,1,0,2\n8,3,3,7,1\n"), COUNTS, ("7", "8")),
    "pandas.csv": (lambda path: text(path, ",0,1,2,3\n0,5,1,0,2\n1,3,3,7,1\n"), COUNTS, ("0", "1")),
    "numbers.csv": (lambda path: text(path, "Name,0,1,2,3\nx,5,1,0,2\ny,3,3,7,1\n"), COUNTS, ("x", "y")),
}


@pytest.mark.parametrize("name", READ)
def test_what_a_file_holds(name: str, tmp_path: Path) -> None:
    write, expected, layers = READ[name]
    write(tmp_path / name)
    result = read_loads(tmp_path / name)
    assert result.load.dtype == torch.int64
    assert result.load.tolist() == expected
    assert result.layers == layers


def test_a_folder_of_trace_parts(tmp_path: Path) -> None:
    with TraceWriter(tmp_path, layers=("first", "second")) as writer:
        for at, step in enumerate(STEPS):
            writer.add(torch.tensor([step]), Placement.contiguous(2, 4, 2), [at])
    result = read_loads(tmp_path)
    assert result.load.tolist() == STEPS
    assert result.layers == ("first", "second")


# --- what is refused --------------------------------------------------------------------------------------------


class RunsCode:
    """Raises when it is unpickled; a reader that refuses pickles never gets there."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise AssertionError('a pickle was run')",)


def claims(path: Path, shape: tuple[int, ...], dtype: str = "<i8") -> None:
    """Write an array whose header promises more data than the file has."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
        file.write(bytes(64))


def cut(path: Path, write: Callable[[Path], None], part: float) -> None:
    write(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


def zipped(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name.replace("_", "."), data)


def pickled(path: Path) -> None:
    np.save(path, np.array([[RunsCode()]], dtype=object), allow_pickle=True)


def pickled_npz(path: Path) -> None:
    data = io.BytesIO()
    np.save(data, np.array([[RunsCode()]], dtype=object), allow_pickle=True)
    zipped(path, load_npy=data.getvalue())


# By file: how it is written, and the error apart from the file's name.
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.npy": (lambda path: None, r"there is no file .*; pass \.npy, \.npz, .* or a folder of trace"),
    "folder": (lambda path: path.mkdir(), "is a folder without .npz files"),
    "empty.npy": (lambda path: text(path, ""), "is empty; pass"),
    "empty.npz": (lambda path: text(path, ""), "is empty; pass"),
    "empty.csv": (lambda path: text(path, ""), "is empty; pass"),
    "empty.json": (lambda path: text(path, ""), "is empty; pass"),
    "table.xlsx": (lambda path: path.write_bytes(b"PK"), r"ends in '.xlsx'; pass .npy, .npz"),
    "no-suffix": (lambda path: text(path, "1,2"), "ends in ''; pass .npy"),
    # --- arrays
    "no-items.npy": (
        lambda path: npy(path, np.zeros((0, 4), np.int64)),
        r"shape \(0, 4\); pass counts as .*with no empty dim",
    ),
    "one-dim.npy": (lambda path: npy(path, [1, 2]), r"shape \(2,\); pass counts as \[layers, experts\] or"),
    "four-dims.npy": (lambda path: npy(path, [[[[1]]]]), r"shape \(1, 1, 1, 1\), 4 dims; sum over the ranks"),
    "negative.npy": (
        lambda path: npy(path, [[1, -2]]),
        r"has -2 at \[0, 1\] \(1 such value\); counts must be non-negative",
    ),
    "nan.npy": (lambda path: npy(path, [[1, np.nan]]), r"has nan at \[0, 1\] .*counts must be finite"),
    "infinite.npy": (lambda path: npy(path, [[np.inf, 1]]), r"has inf at \[0, 0\] .*counts must be finite"),
    "shares.npy": (
        lambda path: npy(path, [[0.5, 0.25]]),
        r"has 0.5 at \[0, 0\] \(2 such values\); counts must be integers",
    ),
    "large.npy": (
        lambda path: npy(path, np.array([[2**63, 1]], np.uint64)),
        r"has 9223372036854775808 at .*must be below 2\^63",
    ),
    "complex.npy": (lambda path: npy(path, [[1j, 2]]), "has dtype complex128"),
    "texts.npy": (lambda path: npy(path, [["a", "b"]]), "has dtype <U1"),
    "pickle.npy": (
        pickled,
        "holds Python objects as a pickle, which is refused because reading a pickle can run code",
    ),
    "bare-pickle.npy": (lambda path: path.write_bytes(pickle.dumps(RunsCode())), "is a pickle, which is refused"),
    "claims.npy": (lambda path: claims(path, (1 << 40, 58, 256)), "it is damaged or cut off: write it again"),
    "below-zero.npy": (lambda path: claims(path, (-1, -8)), "it is damaged or cut off"),
    "cut.npy": (lambda path: cut(path, lambda path: npy(path, STEPS), 0.9), "it is damaged or cut off"),
    "cut-header.npy": (lambda path: cut(path, lambda path: npy(path, STEPS), 0.1), "cannot be read"),
    "not.npy": (lambda path: text(path, "1,2,3"), "cannot be read .*magic string"),
    # --- archives
    "cut.npz": (lambda path: cut(path, lambda path: archive(path, load=STEPS), 0.7), "cannot be read"),
    "cut-trace.npz": (lambda path: cut(path, lambda path: trace().save(path), 0.7), "cannot be read"),
    "pickle.npz": (pickled_npz, "array 'load' holds Python objects as a pickle, which is refused"),
    "torch.npz": (lambda path: torch.save(torch.ones(2, 4), path), "holds a pickle, which is refused"),
    "nothing.npz": (lambda path: zipped(path), "holds nothing where arrays are expected"),
    "other.npz": (lambda path: zipped(path, notes_txt=b"a"), "holds 'notes.txt' where arrays are expected"),
    "two.npz": (
        lambda path: archive(path, a=COUNTS, b=COUNTS),
        "holds arrays 'a', 'b'; pass a file with one array, or",
    ),
    "not.npz": (lambda path: text(path, "no archive"), "cannot be read .*not a zip file"),
    "damaged-trace.npz": (lambda path: archive(path, about=[1], load=STEPS), "pass a trace written by Trace.save"),
    # --- CSV
    "words.csv": (lambda path: text(path, "1,2\n3,four\n"), "line 2, column 2: 'four' is not a count"),
    "one-name.csv": (lambda path: text(path, "1,2\nb,4\n"), "line 2, column 1: 'b' is not a count"),
    "hole.csv": (lambda path: text(path, "1,2\n3,\n"), "line 2, column 2: '' is not a count"),
    "ragged.csv": (
        lambda path: text(path, "1,2\n\n3,4,5\n"),
        "line 3 and the first line have different numbers of cells, 3 and 2",
    ),
    "header.csv": (lambda path: text(path, "layer,e0,e1\n"), "has a header but no rows"),
    "names.csv": (
        lambda path: text(path, "layer\na\n"),
        "line 1 has no columns of experts, .*name a column for each expert",
    ),
    "no-header.csv": (
        lambda path: text(path, "layer,5,1\nb,3,3\n"),
        "line 1 has 'layer' like a header, but its numbers",
    ),
    "blank.csv": (lambda path: text(path, "\n\n"), "has no rows"),
    "nan.csv": (lambda path: text(path, "1,nan\n"), "line 1, column 2: 'nan' is not a count"),
    "half.csv": (lambda path: text(path, "1,2.5\n"), "line 1, column 2: '2.5' is not an integer"),
    "twice.csv": (lambda path: text(path, "a,1,2\na,3,4\n"), "has layer 'a' twice"),
    "latin-1.csv": (lambda path: path.write_bytes(b"caf\xe9,1,2\n"), r"is not UTF-8 text \(byte 3\)"),
    "quote.csv": (lambda path: text(path, '1,"2\n3,4'), "line 2: unexpected end of data; pass counts separated by"),
    # --- JSON
    "cut.json": (lambda path: text(path, "[[1, 2], [3"), "cannot be read as JSON"),
    "deep.json": (lambda path: text(path, "[" * 100_000), "cannot be read as JSON .*recursion"),
    "flat.json": (lambda path: text(path, "[1, 2]"), r"shape \(2,\); pass counts as \[layers, experts\] or"),
    "number.json": (lambda path: text(path, "7"), r"has dtype int64 and shape \(\)"),
    "empty-list.json": (lambda path: text(path, "[[]]"), r"has lists of shape \[1, 0\]; .*with no empty dim"),
    "four.json": (lambda path: text(path, "[[[[1]]]]"), r"shape \(1, 1, 1, 1\), 4 dims; sum over the ranks"),
    "ragged.json": (lambda path: text(path, "[[1, 2], [3]]"), r"a list of 1 at \[1\] where a list of 2 is expected"),
    "mixed.json": (lambda path: text(path, "[[1, 2], 3]"), r"3 at \[1\] where a list of 2 is expected"),
    "words.json": (lambda path: text(path, '[[1, "2"]]'), r'"2" at \[0, 1\] is not a count'),
    "truth.json": (lambda path: text(path, "[[1, true]]"), r"true at \[0, 1\] is not a count"),
    "nan.json": (lambda path: text(path, "[[1, NaN]]"), "counts must be finite"),
    "large.json": (lambda path: text(path, f"[[1, {10**30}]]"), r"has 10+ at \[0, 1\] .*must be below 2\^63"),
    "low.json": (lambda path: text(path, f"[[1, {-(10**30)}]]"), r"has -10+ at \[0, 1\] .*must be non-negative"),
    "twice.json": (lambda path: text(path, '{"a": [1], "a": [2]}'), "an object has the name 'a' twice"),
    "settings.json": (lambda path: text(path, '{"a": 3}'), "pass a list of counts for each layer"),
    "latin-1.json": (lambda path: path.write_bytes(b'{"caf\xe9": [1]}'), r"is not UTF-8 text \(byte 5\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(DistplbError, match=words) as refused:
        read_loads(tmp_path / name)
    assert str(tmp_path / name) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_nothing_is_unpacked_beyond_the_limit(tmp_path: Path) -> None:
    archive(tmp_path / "zeros.npz", load=np.zeros((100, 10, 10), np.uint8))  # 80 kB as int64, 200 bytes in the file
    assert read_loads(tmp_path / "zeros.npz", max_bytes=80_000).load.shape == (100, 10, 10)
    with pytest.raises(DistplbError, match="would take more than 79999 bytes"):
        read_loads(tmp_path / "zeros.npz", max_bytes=79_999)


@pytest.mark.parametrize("name", ["a.npy", "one.npz", "trace.npz", "names.csv", "named.json"])
def test_any_damage_is_an_error_or_other_counts(name: str, tmp_path: Path) -> None:
    READ[name][0](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for at in random.integers(len(data), size=3):
            damaged[at] = random.integers(256)
        (tmp_path / name).write_bytes(damaged[: random.integers(1, len(data) + 1)])
        try:
            read_loads(tmp_path / name)
        except DistplbError:
            refused += 1
    assert refused > 30
