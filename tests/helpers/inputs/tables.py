"""Tables of counts: CSV, TSV and text, and a few files that look like tables."""

from __future__ import annotations

import numpy as np
import torch

from inputs.case import Case
from inputs.file_cases import array, counts_case

__all__ = ["CASES"]


CASES: list[Case] = [
    counts_case("CSV: 0,1,2 above counts", "[[5, 3, 4], [1, 7, 1]], layers: 0, 1", "a.csv", "0,1,2\n5,3,4\n1,7,1\n"),
    counts_case(
        "CSV: layer,1,2,3 above counts",
        "[[5, 3, 4], [1, 7, 1]], layers: x, y",
        "a.csv",
        "layer,1,2,3\nx,5,3,4\ny,1,7,1\n",
    ),
    counts_case(
        "CSV: columns e0,e1,e10,e2, ...",
        "[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], layers: 0",
        "a.csv",
        "e0,e1,e10,e2,e3,e4,e5,e6,e7,e8,e9\n0,1,10,2,3,4,5,6,7,8,9\n",
    ),
    counts_case(
        "CSV: columns e0,e2",
        "refused: a.csv, line 1 numbers experts as in 'e0', but has no column with number 1; pass a column for each "
        "expert",
        "a.csv",
        "e0,e2\n5,3\n",
    ),
    counts_case(
        "CSV: columns layer_idx, 0, 1, total",
        "[[5, 3], [1, 7]], layers: 3, 4",
        "a.csv",
        "layer_idx,0,1,total\n3,5,3,8\n4,1,7,8\n",
    ),
    counts_case(
        "CSV: a wrong total",
        "refused: a.csv, line 2: the counts add up to 8, but the total is 9; correct it, or leave the column out",
        "a.csv",
        "layer,0,1,total\n3,5,3,9\n",
    ),
    counts_case(
        "CSV: a last row named total",
        "[[5, 3], [1, 7]], layers: x, y",
        "a.csv",
        "layer,0,1\nx,5,3\ny,1,7\ntotal,6,10\n",
    ),
    counts_case(
        "CSV: columns rank, layer, 0, 1",
        "refused: a.csv, line 1: column 'rank' means that each row belongs to one rank; sum over the ranks, and "
        "pass a row for each layer",
        "a.csv",
        "rank,layer,0,1\n0,x,5,3\n1,x,1,7\n",
    ),
    counts_case(
        "CSV: columns step, layer, 0, 1",
        "[[[5, 3], [1, 7]], [[4, 4], [2, 2]]], layers: x, y",
        "a.csv",
        "step,layer,0,1\n7,x,5,3\n7,y,1,7\n8,y,2,2\n8,x,4,4\n",
    ),
    counts_case(
        "CSV: a step without one of the layers",
        "refused: a.csv has no row for layer 'y' in step 8; pass all layers of each step",
        "a.csv",
        "step,layer,0,1\n7,x,5,3\n7,y,1,7\n8,x,4,4\n",
    ),
    counts_case(
        "CSV: columns layer, expert, count",
        "[[5, 3], [1, 7]], layers: 0, 1",
        "a.csv",
        "layer,expert,count\n0,0,5\n0,1,3\n1,1,7\n1,0,1\n",
    ),
    counts_case(
        "CSV: the same without a count of 0",
        "refused: a.csv has no count for expert 0 in layer '1'; pass zeros too",
        "a.csv",
        "layer,expert,count\n0,0,5\n0,1,3\n1,1,7\n",
    ),
    counts_case(
        "CSV: rows named expert_0, expert_1",
        "refused: a.csv: 'expert_0' names an expert where a layer is expected; pass a row for each layer and a "
        "column for each expert, summed over all ranks",
        "a.csv",
        "expert_0,5,3\nexpert_1,1,7\n",
    ),
    counts_case(
        "CSV: pandas' index without a header", "[[5, 3], [1, 7]], layers: 0, 1", "a.csv", ",0,1\n0,5,3\n1,1,7\n"
    ),
    counts_case(
        "CSV: pandas' index and a column layer",
        "[[5, 3], [1, 7]], layers: x, y",
        "a.csv",
        "Unnamed: 0,layer,0,1\n0,x,5,3\n1,y,1,7\n",
    ),
    counts_case(
        "CSV without a header: rows begin with 0, 1, 2",
        "refused: a.csv: the first column numbers the rows from 0; add a header: 'layer,0,1,2' and so on if that "
        "column is the layer's index, '0,1,2' and so on if it has counts",
        "a.csv",
        "0,5,3\n1,1,7\n2,4,4\n",
    ),
    counts_case(
        "CSV from Excel: byte order mark, CRLF, empty columns and lines",
        "[[5, 3]], layers: x",
        "a.csv",
        "\ufefflayer,0,1,,\r\nx,5,3,,\r\n,,,,\r\n",
    ),
    counts_case(
        "CSV: rows moe.0 and moe.1, whose first counts are 0, 1, 2",
        "[[0, 1, 2], [4, 4, 1]], layers: moe.0, moe.1",
        "a.csv",
        "moe.0,0,1,2\nmoe.1,4,4,1\n",
    ),
    counts_case(
        "CSV: moe,0,1,2 above counts",
        "refused: a.csv, line 1 has 'moe' and the numbers from 0 to 2, so it may be a header or counts; if it is a "
        "header, name its first column 'layer' or 'step', else add a header above it",
        "a.csv",
        "moe,0,1,2\nx,5,3,4\n",
    ),
    counts_case(
        "CSV: columns epoch, layer, e0, e1",
        "refused: a.csv, line 1 has column 'epoch', which does not number an expert as 'e0' does; leave it out, or "
        "name it 'layer' or 'step' if that is what it holds",
        "a.csv",
        "epoch,layer,e0,e1\n0,x,5,3\n",
    ),
    counts_case(
        "CSV: columns layer, 0, 1, mean",
        "refused: a.csv, line 1 has column 'mean' next to numbered experts; leave it out, or name it 'layer' or "
        "'step' if that is what it holds",
        "a.csv",
        "layer,0,1,mean\nx,5,3,4\n",
    ),
    counts_case(
        "JSON: pandas columns, each a list",
        "refused: a.json: 'layer' is the name of a column where the name of a layer is expected; pass a list of "
        "counts for each layer, or rows below a header",
        "a.json",
        '{"layer": [0, 0], "expert": [0, 1], "count": [5, 3]}',
    ),
    counts_case(
        "JSON: load of ep_rank 3",
        "refused: a.json has 'ep_rank' next to 'load', so it belongs to one rank; sum over all ranks",
        "a.json",
        '{"ep_rank": 3, "load": [[5, 3]]}',
    ),
    counts_case(
        "JSON: a setting among the layers",
        "refused: a.json: 'epoch' is 3 where a list of counts is expected; pass a list of counts for each layer, "
        "all of equal length, or name [steps][layers][experts] 'load' (the file has 'epoch', 'x')",
        "a.json",
        '{"epoch": 3, "x": [5, 3]}',
    ),
    counts_case(
        "YAML with a Python tag",
        (
            "refused: a.yaml cannot be read as YAML (line 1 has a tag, which is not a plain number, text, list or "
            "object)"
        ),
        "a.yaml",
        "x: !!python/tuple [5, 3]\n",
    ),
    counts_case(
        ".npz with one unnamed array",
        "[[5, 3], [1, 7]], layers: 0, 1",
        "a.npz",
        lambda path: np.savez(path, np.array([[5, 3], [1, 7]])),
    ),
    counts_case(".npy of bools, one token each", "[[1, 0]], layers: 0", "a.npy", array([[1, 0]], bool)),
    counts_case(
        ".pt of bools, one token each",
        "[[1, 0]], layers: 0",
        "a.pt",
        lambda path: torch.save(torch.tensor([[True, False]]), path),
    ),
    counts_case("CSV with semicolons", "[[5, 3]], layers: x", "a.csv", "layer;0;1\nx;5;3\n"),
    counts_case(
        "CSV with sep=;, 1.234.567 and 5,0", "[[1234567, 5]], layers: x", "a.csv", "sep=;\nlayer;0;1\nx;1.234.567;5,0\n"
    ),
    counts_case(
        "CSV with semicolons and 5,0",
        "refused: a.csv has commas and semicolons; begin it with a line such as 'sep=;' that names the separator",
        "a.csv",
        "layer;0;1\nx;5,0;3,0\n",
    ),
    counts_case(
        'CSV: "1,234"',
        "refused: a.csv, line 2, column 2: '1,234' may be 1234, or 1 and 234 thousandths; write counts in digits only",
        "a.csv",
        'layer,0,1\nx,"1,234",5\n',
    ),
    counts_case(
        'CSV: "1,234" and "1,234,567"', "[[1234, 1234567]], layers: x", "a.csv", 'layer,0,1\nx,"1,234","1,234,567"\n'
    ),
    counts_case(
        "CSV: 1.23E+05",
        "refused: a.csv, line 2, column 2: '1.23E+05' may be rounded; write counts in digits only",
        "a.csv",
        "layer,0,1\nx,1.23E+05,5\n",
    ),
    counts_case(
        "CSV: 0.5",
        "refused: a.csv, line 2, column 2: '0.5' is not an integer; pass tokens, not fractions or means of them",
        "a.csv",
        "layer,0,1\nx,0.5,0.5\n",
    ),
    counts_case("TSV", "[[5, 3]], layers: x", "a.tsv", "layer\t0\t1\nx\t5\t3\n"),
    counts_case(
        "TXT from numpy.savetxt",
        "[[5, 12]], layers: 0",
        "a.txt",
        "# by hand\n5.000000000000000000e+00 1.200000000000000000e+01\n",
    ),
    counts_case(
        "an Excel workbook named .csv",
        (
            "refused: a.csv is not text but a zip archive, such as an Excel workbook or a .npz: export it as CSV, "
            "or rename it with its suffix"
        ),
        "a.csv",
        b"PK\x03\x04\x14\x00",
    ),
    counts_case(
        "a .csv saved as UTF-16",
        "refused: a.csv is not text but UTF-16: save it as UTF-8",
        "a.csv",
        "layer,0,1\nx,5,3\n".encode("utf-16"),
    ),
]
