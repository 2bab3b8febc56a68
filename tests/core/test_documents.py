"""Untrusted files: dumps, tensors, YAML; no code is run, and memory is allocated only within limits.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import io
import json
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyyaml import those_of_pyyaml_marked

from distplb import DistplbError, Placement, Topology
from distplb.records.read_loads import read_loads
from distplb.report.run import Run

SUFFIXES = [".csv", ".tsv", ".txt", ".json", ".yaml", ".npy", ".npz", ".pt", ".safetensors"]
COUNTS = [[5, 1, 0, 2], [3, 3, 7, 1]]  # [L, E]
STEPS = [COUNTS, [[1, 1, 1, 1], [0, 9, 0, 0]]]  # [T, L, E]


def safetensors(path: Path, tensors: dict[str, tuple[str, Any]]) -> None:
    """Write tensors by name, each given by its kind in safetensors and the array of its bytes."""
    header, data = {}, b""
    for name, (kind, values) in tensors.items():
        part = np.ascontiguousarray(values).tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(np.shape(values)),
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def saved(values: object) -> Callable[[Path], object]:
    return lambda path: torch.save(values, path)


def bfloat16(values: object) -> np.ndarray:
    return (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


# --- what is read -----------------------------------------------------------------------------------------------

READ: dict[str, tuple[Callable[[Path], object], list, tuple[str, ...]]] = {
    "bare.pt": (saved(torch.tensor(STEPS)), STEPS, ("0", "1")),
    "bfloat16.pth": (saved(torch.tensor(COUNTS).bfloat16()), COUNTS, ("0", "1")),
    "uint16.pt": (saved(torch.tensor(COUNTS).to(torch.uint16)), COUNTS, ("0", "1")),
    "view.pt": (saved(torch.tensor([[0, 0, 0, 0], *COUNTS])[1:]), COUNTS, ("0", "1")),
    "transposed.pt": (saved(torch.tensor(COUNTS).T.contiguous().T), COUNTS, ("0", "1")),
    "gradient.pt": (saved(torch.tensor(COUNTS, dtype=torch.float32, requires_grad=True)), COUNTS, ("0", "1")),
    "list.pt": (saved([torch.tensor(row) for row in COUNTS]), COUNTS, ("0", "1")),
    "named.pt": (saved(dict(zip("ba", map(torch.tensor, COUNTS), strict=True))), COUNTS, ("b", "a")),
    "numbered.pt": (saved({3: torch.tensor(COUNTS[0]), 4: torch.tensor(COUNTS[1])}), COUNTS, ("3", "4")),
    "sglang.pt": (
        saved({"rank": 0, "logical_count": torch.tensor(STEPS, dtype=torch.int32), "average": None}),
        STEPS,
        ("0", "1"),
    ),
    "int64.safetensors": (lambda path: safetensors(path, {"counts": ("I64", np.array(STEPS))}), STEPS, ("0", "1")),
    "bf16.safetensors": (lambda path: safetensors(path, {"load": ("BF16", bfloat16(COUNTS))}), COUNTS, ("0", "1")),
    "named.safetensors": (
        lambda path: safetensors(
            path, {"b": ("U8", np.array(COUNTS[0], "u1")), "a": ("U8", np.array(COUNTS[1], "u1"))}
        ),
        COUNTS,
        ("b", "a"),
    ),
    "key.json": (lambda path: path.write_text(json.dumps({"expert_load": COUNTS, "model": "m"})), COUNTS, ("0", "1")),
    "key-of-names.json": (
        lambda path: path.write_text(json.dumps({"counts": dict(zip("ba", COUNTS, strict=True))})),
        COUNTS,
        ("b", "a"),
    ),
    "rows.json": (
        lambda path: path.write_text(
            json.dumps([dict(zip("3120", (row[3], row[1], row[2], row[0]), strict=True)) for row in COUNTS])
        ),
        COUNTS,
        ("0", "1"),
    ),
    "wholes.json": (lambda path: path.write_text(json.dumps([[5.0, 2**60 + 1]])), [[5, 2**60 + 1]], ("0",)),
    "named.yaml": (lambda path: path.write_text("b: [5, 1, 0, 2]\na: [3, 3, 7, 1]\n"), COUNTS, ("b", "a")),
    "nested.yml": (lambda path: path.write_text(f"load: {STEPS}\n"), STEPS, ("0", "1")),
    "key.npz": (lambda path: np.savez(path, rank=3, logical_count=STEPS), STEPS, ("0", "1")),
}


@pytest.mark.parametrize("name", those_of_pyyaml_marked(READ))
def test_what_other_people_write_is_read(name: str, tmp_path: Path) -> None:
    write, expected, layers = READ[name]
    write(tmp_path / name)
    result = read_loads(tmp_path / name)
    assert result.load.dtype == torch.int64
    assert (result.load.tolist(), result.layers) == (expected, layers)


# --- what is refused --------------------------------------------------------------------------------------------


def rewritten(path: Path, tensor: torch.Tensor, compression: int = zipfile.ZIP_STORED, most: int | None = None) -> None:
    """Write the content of torch.save to another archive, with only the first `most` of the tensor's bytes."""
    file = io.BytesIO()
    torch.save(tensor, file)
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(path, "w", compression) as other:
        for name in whole.namelist():
            other.writestr(name, whole.read(name)[: most if name.endswith("/data/0") else None])


def damaged(path: Path) -> None:
    torch.save(torch.arange(4000).reshape(2, 2000), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def headed(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def large_header(path: Path) -> None:
    """Write an array of NumPy's format 2.0 with a header of 64 MiB of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("load.npy", b"\x93NUMPY\x02\x00" + (1 << 26).to_bytes(4, "little") + bytes(1 << 26))


TENSOR = {"dtype": "I64", "shape": [1, 2], "data_offsets": [0, 16]}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "code.pt": (saved({"load": Fraction(1, 2)}), r"holds fractions.Fraction, and unpickling that can run code; pass"),
    "model.pt": (saved(torch.nn.Linear(2, 2)), "and unpickling that can run code; pass a torch.save file of tensors"),
    "old.pt": (
        lambda path: torch.save(torch.tensor(COUNTS), path, _use_new_zipfile_serialization=False),
        "is not an archive of torch.save in torch 1.6 or later, and",
    ),
    "packed.pt": (lambda path: rewritten(path, torch.tensor(COUNTS), zipfile.ZIP_DEFLATED), "is compressed, which"),
    "short.pt": (lambda path: rewritten(path, torch.arange(4000)[None], most=8), "torch.save"),
    "damaged.pt": (damaged, "is damaged at '.*data/0'; write it again with torch.save"),
    "wide.pt": (
        saved(torch.ones(1).long().expand(100_000, 100_000)),
        r"of shape \[100000, 100000\], which takes more than",
    ),
    "sparse.pt": (saved(torch.eye(2).to_sparse()), "pass dense integers"),
    "complex.pt": (saved(torch.ones(2, 2).cfloat()), "pass dense integers"),
    "deep.pt": (saved([[[[[[[[[[torch.ones(1)]]]]]]]]]]), "has more than 8 levels of nested lists"),
    "twice.pt": (saved({1: torch.ones(2), "1": torch.ones(2)}), "has two keys that read the same"),
    "ragged.pt": (saved([torch.ones(2), torch.ones(3)]), "has arrays of different shapes"),
    "passes.pt": (saved({"records": [{"rank": 0}]}), "'records' holds single passes and ranks, as SGLang's"),
    "map.pt": (saved({"physical_to_logical_map": torch.tensor([[0, 1]])}), "is a placement, which --current and"),
    "window.pt": (
        saved({"expert_load_window": torch.ones(2, 2, 4)}),
        "'expert_load_window' is a ring buffer of one rank",
    ),
    "ranks.pt": (saved({"load_history": torch.ones(2, 3, 2, 4)}), r"4 dims; sum over the ranks"),
    "steps.pt": (
        saved({"a": torch.ones(2, 4), "b": torch.ones(2, 4)}),
        r"'a' has shape \[2, 4\]; pass a list of counts",
    ),
    "not.safetensors": (lambda path: path.write_bytes(b"12345"), "has no safetensors header"),
    "long.safetensors": (lambda path: headed(path, {}, length=2**62), "has no safetensors header or is cut off"),
    "text.safetensors": (lambda path: headed(path, b"[1, 2"), "has an invalid safetensors header"),
    "list.safetensors": (lambda path: headed(path, [1, 2]), "has an invalid safetensors header"),
    "deep.safetensors": (lambda path: headed(path, b"[" * 100_000), "has an invalid safetensors header"),
    "complex.safetensors": (
        lambda path: headed(path, {"load": TENSOR | {"dtype": "C64"}}, bytes(16)),
        "dtype C64 cannot be counts",
    ),
    "negative.safetensors": (
        lambda path: headed(path, {"load": TENSOR | {"shape": [-1, -2]}}, bytes(16)),
        "shapes and offsets must be non-negative integers",
    ),
    "cut.safetensors": (
        lambda path: headed(path, {"load": TENSOR}, bytes(15)),
        r"at bytes 0 to 16 of 15; it is damaged",
    ),
    "other.safetensors": (
        lambda path: headed(path, {"load": TENSOR | {"shape": [1, 1]}}, bytes(16)),
        r"the header puts tensor 'load' of shape \[1, 1\] at",
    ),
    "huge.safetensors": (
        lambda path: headed(path, {"load": TENSOR | {"shape": [1 << 30, 1 << 30]}}, bytes(16)),
        "would take more than",
    ),
    "rank.safetensors": (
        lambda path: safetensors(path, {"100_3": ("I32", np.ones(2, "i4"))}),
        "as in TensorRT-LLM's statistics of one rank",
    ),
    "alias.yaml": (lambda path: path.write_text("a: &x [1, 2]\nb: *x\n"), "line 1 is used again by an alias"),
    "octal.yaml": (lambda path: path.write_text("a: [1, 2]\nb: [010, 3]\n"), "line 2 has '010', which is not a plain"),
    "minutes.yaml": (lambda path: path.write_text("[[1:30, 2]]"), "line 1 has '1:30', which is not a plain"),
    "tag.yaml": (lambda path: path.write_text("!!python/object/apply:os.getcwd []"), "cannot be read as YAML"),
    "twice.yaml": (lambda path: path.write_text("a: [1, 2]\na: [3, 4]\n"), "an object has the name 'a' twice"),
    "deep.yaml": (lambda path: path.write_text("[" * 1_000), "cannot be read as YAML .*recursion"),
    "control.yaml": (lambda path: path.write_text("a: \x01"), "unacceptable character #x0001"),
    "cut.yaml": (lambda path: path.write_text("a: [1,\n"), r"cannot be read as YAML \(line 2: "),
    "one-rank.npz": (lambda path: np.savez(path, load=COUNTS, rank=1), "has 'rank' next to 'load', so it belongs to"),
    "two.npz": (
        lambda path: np.savez(path, load_history=COUNTS, counts=COUNTS),
        "counts, 'load_history', 'counts'; keep",
    ),
    "large-header.npz": (large_header, "NumPy's format 2.0 is not used for numbers"),
    "float16.npy": (lambda path: np.save(path, np.array([[4096, 1]], "f2")), "at most 2048 in float16, which rounds"),
    "float32.npy": (lambda path: np.save(path, np.array([[2**25, 1]], "f4")), "at most 16777216 in float32"),
    "one-rank.json": (
        lambda path: path.write_text('{"rank": 1, "counts": [[1, 2]]}'),
        "has 'rank' next to 'counts', so it belongs to one rank; sum over all ranks",
    ),
    "objects.json": (lambda path: path.write_text('{"0": {"0": 1}}'), "'0' is an object, as pandas writes it"),
    "unlike.json": (lambda path: path.write_text('[{"0": 1}, {"1": 1}]'), "object 1 has other names than the first"),
    "holes.json": (lambda path: path.write_text('[{"0": 1, "1": null}]'), "object 0: null is not a count"),
    "zip.csv": (lambda path: path.write_bytes(b"PK\x03\x04"), "is not text but a zip archive, such as an Excel"),
    "npy.json": (lambda path: np.save(path.open("wb"), COUNTS), "is not text but a NumPy array: rename it to .npy"),
    "zeros.csv": (lambda path: path.write_bytes(b"1,2\0"), r"is not text \(byte 3 is 0\)"),
    "utf-16.tsv": (lambda path: path.write_bytes("1\t2".encode("utf-16")), "UTF-16: save it as UTF-8"),
}


@pytest.mark.parametrize("name", those_of_pyyaml_marked(REFUSED))
def test_what_is_not_certain_or_not_safe_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(DistplbError, match=words) as refused:
        read_loads(tmp_path / name)
    assert str(refused.value).startswith(str(tmp_path / name))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < len(str(tmp_path)) + 500


@pytest.mark.parametrize("name", ["wide.pt", "long.safetensors", "huge.safetensors", "large-header.npz"])
def test_what_is_too_large_is_refused_before_memory_is_taken(name: str, tmp_path: Path) -> None:
    """An array's header was read whole, whatever length a small archive claimed for it."""
    make, words = REFUSED[name]
    make(tmp_path / name)
    tracemalloc.start()
    with pytest.raises(DistplbError, match=words):
        read_loads(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


@pytest.mark.parametrize(
    "name",
    those_of_pyyaml_marked(["bare.pt", "int64.safetensors", "key.json", "named.yaml", "key.npz", "a.csv", "a.npy"]),
)
def test_every_format_has_a_limit(name: str, tmp_path: Path) -> None:
    others = {
        "a.csv": lambda path: path.write_text("layer,0,1\na,5,3\n"),
        "a.npy": lambda path: np.save(path, STEPS),
    }
    (READ[name][0] if name in READ else others[name])(tmp_path / name)
    with pytest.raises(DistplbError, match=r"bytes.*; pass|more than 40 bytes"):
        read_loads(tmp_path / name, max_bytes=40)


@pytest.mark.parametrize("suffix", those_of_pyyaml_marked(SUFFIXES))
def test_ten_gigabytes_are_refused_unread(suffix: str, tmp_path: Path) -> None:
    """A text file above a limit was refused, but a placement of any size was read whole."""
    path = tmp_path / f"a{suffix}"
    with path.open("wb") as file:
        file.truncate(10 << 30)  # sparse: it takes no room
    tracemalloc.start()
    for read in (read_loads, Placement.load):
        with pytest.raises(
            DistplbError, match=f"a{suffix} .*(has 10737418240 bytes|cannot be read|has no safetensors header)"
        ):
            read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_yaml_without_pyyaml_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text("a: [1, 2]\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(DistplbError, match=r"a.yaml needs PyYAML; pip install pyyaml, or pass it as JSON"):
        read_loads(tmp_path / "a.yaml")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["sglang.pt", "named.safetensors", "named.yaml", "key.npz"]),
    damage=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=3),
    part=st.floats(0.1, 1),
)
def test_damaged_files_are_errors_of_ours_or_still_counts(
    tmp_path: Path, name: str, damage: list[tuple[float, int]], part: float
) -> None:
    write, expected, _ = READ[name]
    write(tmp_path / name)
    data = bytearray((tmp_path / name).read_bytes())
    for at, byte in damage:
        data[int(at * len(data))] = byte
    (tmp_path / name).write_bytes(data[: int(part * len(data))] or b"x")
    try:
        result = read_loads(tmp_path / name).load.tolist()
    except DistplbError as refused:
        result = str(refused).splitlines()[1:]  # empty
    assert result in ([], expected) or name in ("named.safetensors", "named.yaml")  # which have no checksum


TEXTS = st.text("0123456789,;.[]{}:\"'-+eE_ \t\n\r#&*!|%nulaytrsp\0\ufeff", max_size=40)
NAMES = ["layer", "expert", "count", "step", "rank", "total", "index", "e0", "e1", "layer0", "a", "nan"]
WORDS = st.sampled_from([*NAMES, *["-1", "1.5", "1,000", "1.000", "2e1", "0", "1", "2", "3", "12"], "", "9" * 5000])
TABLES = st.lists(st.lists(WORDS, min_size=1, max_size=4).map(";".join), min_size=1, max_size=5).map("\n".join)
KEYS = st.sampled_from(
    [
        *[
            "load",
            "logical_count",
            "counts",
            "rank",
            "records",
            "total",
            "0",
            "a",
            "layer",
            "expert",
            "format",
            "version",
        ],
        *["num_experts", "num_gpus", "expert_of_slot", "physical_to_logical_map", "initial_global_assignments"],
        *["num_slots", "layer_list", "layer_id", "moe_layer_count", "device_list", "device_id", "device_count"],
        "device_expert",
    ]
)
VALUES = st.sampled_from([0, 1, 2, 3, -1, 1.5, 2.0, True, None, "a", "distplb.placement", 2**70, 10**400, 1e400])
DOCUMENTS = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
).map(json.dumps)
CONTENTS = (
    TEXTS.map(str.encode) | st.binary(max_size=200) | st.binary(max_size=100).map(lambda data: b"PK\x03\x04" + data)
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(SUFFIXES),
    content=CONTENTS,
)
@example(".csv", b'\t""0')  # csv names the separator unescaped
def test_whatever_a_file_holds_no_other_error_comes_out(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    for read in (read_loads, Placement.load):
        try:
            read(path)
        except DistplbError as refused:
            message = str(refused)
            if "\n" in message or len(message) > len(str(path)) + 500 or not message.isprintable():
                raise


# --- commands that read counts ----------------------------------------------------------------------------------


def test_a_report_of_counts_is_one_of_the_same_trace(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(STEPS, np.uint16))
    result = Run.read(tmp_path / "a.npy", Topology(1, 2))
    assert result.trace is not None
    assert result.trace.load.tolist() == STEPS
    assert result.trace.iteration.tolist() == [0, 1]
    assert result.trace.placements == (Placement.contiguous(2, 4, 2),)
    with pytest.raises(DistplbError, match=r"a.npy has counts but no placement; also pass --gpus-per-node"):
        Run.read(tmp_path / "a.npy")
    with pytest.raises(DistplbError, match=r"a.npy: 4 experts cannot be spread evenly over 3 GPUs"):
        Run.read(tmp_path / "a.npy", Topology(1, 3))
