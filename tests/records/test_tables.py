"""Text tables: however the same counts are written, they are read as these counts or refused.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from distplb import DistplbError
from distplb.records.read_loads import Loads, read_loads

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(folder: Path, name: str, text: str) -> Loads:
    (folder / name).write_bytes(text.encode())
    return read_loads(folder / name)


# --- as programs write them -------------------------------------------------------------------------------------

tables = st.integers(2, 12).flatmap(
    lambda experts: st.lists(
        st.lists(st.integers(0, 10**6) | st.integers(0, 3), min_size=experts, max_size=experts), min_size=2, max_size=4
    )
)
SEPARATORS = {".csv": ",;\t", ".tsv": "\t", ".txt": ",|;"}
# By kind: the names of the columns, in any order of the experts if they are numbered.
TITLES = {
    "numbers": lambda experts: [str(expert) for expert in experts],
    "prefix": lambda experts: [f"expert_{expert}" for expert in experts],
    "from one": lambda experts: [f"E{expert + 1}" for expert in experts],
    "words": lambda experts: ["x" * (at + 1) for at in range(len(experts))],
    "none": lambda experts: [],
}
NAMES = {"none": lambda layer: [], "words": lambda layer: [f"moe.{layer}"], "numbers": lambda layer: [str(layer + 3)]}


@st.composite
def written(draw: st.DrawFn) -> tuple[str, str, list[list[int]], tuple[str, ...]]:
    """A file's name, its text, the counts in it, and the names of the layers."""
    counts = draw(tables)
    titles, names = draw(st.sampled_from(sorted(TITLES))), draw(st.sampled_from(sorted(NAMES)))
    assume(titles != "none" or names == "words")  # others are ambiguous
    experts = list(range(len(counts[0])))
    experts = experts if titles in ("words", "none") else draw(st.permutations(experts))
    assume(names != "none" or titles != "numbers" or experts == sorted(experts))
    total = draw(st.booleans()) and titles != "none"
    corner = [draw(st.sampled_from(["layer", "Layer ID", "name", ""]))] * (names != "none")
    lines = [[*corner, *TITLES[titles](experts), *["Total"] * total]] * (titles != "none")
    lines += [
        [*NAMES[names](layer), *(str(row[expert]) for expert in experts), *[str(sum(row))] * total]
        for layer, row in enumerate(counts)
    ]
    suffix = draw(st.sampled_from(sorted(SEPARATORS)))
    file, end = io.StringIO(), draw(st.sampled_from(["\n", "\r\n"]))
    form = {
        "delimiter": draw(st.sampled_from(SEPARATORS[suffix])),
        "quoting": draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    }
    empty = [""] * draw(st.integers(0, 2))  # columns
    csv.writer(file, lineterminator=end, **form).writerows([*line, *empty] for line in lines)
    text = "\ufeff" * draw(st.booleans()) + end * draw(st.integers(0, 1)) + file.getvalue()
    layers = [NAMES[names](layer) or [str(layer)] for layer in range(len(counts))]
    return f"a{suffix}", text, counts, tuple(name for (name,) in layers)


@QUICK
@given(file=written())
def test_however_counts_are_written_they_are_read(
    tmp_path: Path, file: tuple[str, str, list[list[int]], tuple[str, ...]]
) -> None:
    """Experts kept the order of the columns despite their numbers; totals and layer indices were read as experts."""
    name, text, counts, layers = file
    result = read(tmp_path, name, text)
    assert result.load.tolist() == counts
    assert result.layers == layers


STYLES = {
    "plain": str,
    "commas": lambda value: f"{value:,}",
    "points": lambda value: f"{value:,}".replace(",", "."),
    "spaces": lambda value: f"{value:,}".replace(",", " "),
    "narrow spaces": lambda value: f"{value:,}".replace(",", "\u202f"),
    "apostrophes": lambda value: f"{value:,}".replace(",", "’"),
    "one decimal": lambda value: f"{value}.0",
    "three decimals": lambda value: f"{value:.3f}",
    "decimal comma": lambda value: f"{value},00",
    "three after a comma": lambda value: f"{value},000",
    "American": lambda value: f"{value:,}.00",
    "German": lambda value: f"{value:,}".replace(",", ".") + ",00",
    "numpy.savetxt": lambda value: f"{value:.18e}",
    "rounded": lambda value: f"{value:.2e}",
}
ALWAYS = {"plain", "spaces", "narrow spaces", "apostrophes", "one decimal", "decimal comma", "American", "German"}


@QUICK
@given(style=st.sampled_from(sorted(STYLES)), row=st.lists(st.integers(0, 10**9), min_size=2, max_size=5))
def test_numbers_of_any_style_are_read_right_or_refused(tmp_path: Path, style: str, row: list[int]) -> None:
    """1.000 was read as 1, even if it meant 1000; 1,23E+05 lost its last digits."""
    file = io.StringIO()
    csv.writer(file).writerows([["layer", *range(len(row))], ["a", *map(STYLES[style], row)]])
    try:
        result = read(tmp_path, "a.csv", file.getvalue()).load.tolist()
    except DistplbError as refused:
        result = str(refused)
    assert result == [row] or (style not in ALWAYS and "line 2, column" in result)


@QUICK
@given(
    counts=tables,
    steps=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
    columns=st.permutations(["layer", "expert_id", "tokens", "iteration"]),
)
def test_one_row_a_count_in_any_order(
    tmp_path: Path, counts: list[list[int]], steps: int, order: object, columns: list[str]
) -> None:
    """The indices of layers and experts were read as counts."""
    rows = [
        {"iteration": 10 * step, "layer": layer, "expert_id": expert, "tokens": tokens + step}
        for step in range(steps)
        for layer, row in enumerate(counts)
        for expert, tokens in enumerate(row)
    ]
    order.shuffle(rows)  # type: ignore[attr-defined]
    lines = [",".join(columns), *(",".join(str(row[name]) for name in columns) for row in rows)]
    result = read(tmp_path, "a.csv", "\n".join(lines))
    assert result.load.tolist() == [(np.array(counts) + step).tolist() for step in range(steps)]
    with pytest.raises(DistplbError, match=r"has no (count|expert|row|header)|no expert|a header but no rows"):
        read(tmp_path, "a.csv", "\n".join(lines[:-1]))


# --- what is refused, with the line -----------------------------------------------------------------------------

REFUSED = {
    "layer,0,1\na,1,2\na,3,4\n": "has layer 'a' twice",
    "step,layer,0,1\n0,a,1,2\n0,a,3,4\n": "line 3 has layer 'a' of step 0 again, after line 2",
    "layer,expert,count\n0,0,1\n0,0,2\n": "line 3 has expert 0 of layer '0' again, after line 2",
    "layer,expert,count\n0,1,1\n0,2,2\n": "has expert 2, but no expert 0; number experts from 0",
    "layer,expert,count,cost\n0,0,1,2\n": "pass columns 'layer', 'expert' and 'count', .* but not 'cost'",
    "expert,count\n0,1\n": "pass columns 'layer', 'expert' and 'count'",
    "expert,layer_0,layer_1\n0,1,2\n": "pass columns 'layer', 'expert' and 'count', .* but not 'layer_0'",
    "layer_0,layer_1\n1,2\n": "line 1: column 'layer_0' names a layer; pass a row for each layer",
    "step_0,step_1\n1,2\n": "line 1: column 'step_0' names a step",
    "gpu0,gpu1\n1,2\n": "line 1: column 'gpu0' names a rank",
    "layer,rank,0,1\na,0,1,2\n": "line 1: column 'rank' means that each row belongs to one rank; sum over the ranks",
    "layer,name,0,1\na,b,1,2\n": "columns 'layer' and 'name' both name the layer; keep one of them",
    "layer,e0,e1,mean\na,1,3,2\n": "line 1 has column 'mean', which does not number an expert as 'e0' does",
    "epoch,layer,e0,e1\n0,a,1,3\n": "line 1 has column 'epoch', which does not number an expert as 'e0' does",
    "layer,block,expert_0,expert_1\na,0,1,3\n": "line 1 has column 'block', which does not number an expert",
    "layer,e0,e1,p95\na,1,3,2\n": "line 1 has column 'p95', which does not number an expert as 'e0' does",
    "layer,0,1,mean\na,1,3,2\n": "line 1 has column 'mean' next to numbered experts; leave it out",
    "moe,0,1,2\na,1,3,2\n": "line 1 has 'moe' and the numbers from 0 to 2, so it may be a header or counts",
    "moe,1,2,3\na,1,3,2\n": "line 1 has 'moe' and the numbers from 1 to 3, so it may be a header or counts",
    "total,layer,expert,count\n3,0,0,1\n3,0,1,2\n": "pass columns 'layer', 'expert' and 'count', .* but not 'a total'",
    "layer,e0,e0\na,1,2\n": "has column 'e0' twice",
    "layer,0,2\na,1,2\n": "line 1 has 'layer' like a header, but its numbers do not run from 0 or 1",
    "layer,2,3\na,1,2\n": "line 1 has 'layer' like a header, but its numbers do not run from 0 or 1",
    "rank 0,1,2\nrank 1,3,4\n": "'rank 0' names a rank where a layer is expected",
    "a,1,2\nb,3,4\ntotal,5,6\n": "'total' is not the sum of the other rows",
    "a,1,2\nb,3,4\nmean,2,3\n": "'mean' is a statistic, not a layer; leave it out",
    "layer,0,1,sum\na,1,2,4\n": "line 2: the counts add up to 3, but the total is 4",
    "layer,0,1\n,1,2\n": "has a layer without a name",
    "0,1,2\n": "has a header but no rows; .*if its counts are 0, 1, 2",
    "0,1,10,2,3,4,5,6,7,8,9\n5,5,5,5,5,5,5,5,5,5,5\n": "line 1 has each number from 0 to 10 once, so it may be a",
    "1,2,3,4\n5,5,5,5\n": "line 1 has each number from 1 to 4 once, so it may be a header or counts",
    "1,5\n2,7\n3,9\n": "the first column numbers the rows from 1",
    "5\n7\n": r"line 1 has too few cells \(1\); pass a row for each layer",
    "1 2\n3 4\n": "has neither commas nor tabs",
    "1;2,3\n": "has commas and semicolons; begin it with a line such as 'sep=;'",
    "1,2\n3,-\n": "line 2, column 2: '-' is not a count",
    "layer,0,1\na,1.5e0,2\n": "line 2, column 2: '1.5e0' is not an integer",
    "layer,0,1\na,1e99,2\n": "line 2, column 2: '1e99' may be rounded",
    "layer,0,1\na,12.5,1.234.567\n": "line 2, column 2: '12.5' has '.' before decimals, .* between thousands",
    "layer,0,1\na,1_0,2\n": "line 2, column 2: '1_0' is not a count",
    "layer,0,1\na,٣,2\n": "line 2, column 2: '٣' is not a count",
    "layer,0,1\na,99999999999999999999,2\n": r"has 99999999999999999999 at \[0, 0\] .*below 2\^63",
    "step,0,1\n-1,1,2\n": "line 2, column 1: -1 is not the index of a step",
    "step,0,1\n0.5,1,2\n": "line 2, column 1: '0.5' is not an integer",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_not_certain_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(DistplbError, match=REFUSED[text]) as refused:
        read(tmp_path, "a.csv", text)
    assert str(refused.value).startswith(str(tmp_path / "a.csv"))
    assert "\n" not in str(refused.value)


def test_a_line_longer_than_csv_allows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DistplbError, match=r"line 1: field larger than field limit"):
        read(tmp_path, "a.csv", "1," + "2" * 200_000)


def test_names_in_quotes_may_have_separators_and_ends_of_lines(tmp_path: Path) -> None:
    """The text was split into lines before quotes were parsed."""
    result = read(tmp_path, "a.csv", 'layer,0,1\n"moe;1, a",5,3\n"moe\n2",1,7\n')
    assert result.load.tolist() == [[5, 3], [1, 7]]
    assert result.layers == ("moe;1, a", "moe\n2")
