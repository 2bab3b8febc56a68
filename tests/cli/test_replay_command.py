"""The input of `distplb replay`."""

from __future__ import annotations

from pathlib import Path

from commands import GPUS, assert_refused, document, drawn, run, saved, traced


def test_replay_of_counts_is_that_of_the_same_trace(tmp_path: Path) -> None:
    """Counts were refused, and only a job could make a trace."""
    load = drawn()
    rows = [
        f"{step},{layer},{','.join(map(str, row))}"
        for step, one in enumerate(load.tolist())
        for layer, row in zip("abc", one, strict=True)
    ]
    (tmp_path / "load.csv").write_text("\n".join(["step,layer,0,1,2,3,4,5,6,7", *rows]))
    paths = [traced(tmp_path / "trace.npz"), saved(tmp_path / "load.npy"), tmp_path / "load.csv"]
    results = [document("replay", path, *GPUS, "--every", 2) for path in paths]
    assert results[0] == results[1] == results[2]
    assert_refused(run("replay", paths[1]), "load.npy has counts but no placement; also pass --gpus-per-node")
    assert_refused(
        run("replay", paths[1], "--gpus-per-node", 3), "load.npy: 8 experts cannot be spread evenly over 3 GPUs"
    )
