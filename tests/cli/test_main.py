"""Common to all commands: help, interrupts, warnings, closed pipes, encodings, narrow tables and the progress bar."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import click
import pytest
from commands import GPUS, printed, run, saved, traced
from rich.console import Console

import distplb
from distplb import Placement
from distplb.cli.main import main
from distplb.cli.output import progress, table


def test_help_and_version() -> None:
    assert printed("--version") == f"distplb, version {distplb.__version__}\n"
    assert printed("-h") == printed("--help")
    for name in main.commands:
        assert re.search(rf"\n  Examples?:\n(    .*\n)*    distplb {name}\b", printed(name, "--help")), name


def test_an_interrupt_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def stop() -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(main.commands, "stop", stop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        result = run("stop")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def careful() -> None:
        warnings.warn("line 3\nis not whole", RuntimeWarning, stacklevel=1)
        click.echo("done")

    monkeypatch.setitem(main.commands, "careful", careful)
    result = run("careful")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "done\n", "Warning: line 3 is not whole\n")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_closed_pipe_is_quiet(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    load, errors = saved(tmp_path / "load.npy"), io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            main.main(["plan", str(load), *GPUS, *options])
    assert ended.value.code == 141
    assert errors.getvalue() == ""


def test_what_an_encoding_lacks_is_a_question_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "load.json").write_text('{"schräg": [1, 2, 3, 4], "\\u001b[31m[red]": [1, 2, 3, 4]}')
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as ended:
        main.main(["plan", str(tmp_path / "load.json"), *GPUS])
    assert ended.value.code == 0
    out.flush()
    lines = out.buffer.getvalue().decode("ascii").splitlines()
    assert [line.split()[0] for line in lines[3:5]] == ["schr?g", "?[31m[red]"]


def test_a_table_fits_forty_columns() -> None:
    drawn = table("planner", "in sample", "unseen", "worst layer", title="Imbalance, busiest GPU / mean GPU; unseen")
    drawn.add_row("model.layers.11.mlp.experts", "12.3456", "12.3456", "12.3456")
    out = io.StringIO()
    Console(file=out, width=40).print(drawn)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert out.getvalue().count("12.3456") == 3
    assert "…" not in out.getvalue()
    assert "".join(line.split()[0] for line in lines[5:]).startswith("model.layers.11.mlp")


def test_in_a_pipe_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("planning") as update:
        update(1, 2)
    assert capsys.readouterr() == ("", "")


def all_of(terminal: int, process: subprocess.Popen[bytes], seconds: float = 120) -> str:
    """All output of a process on its terminal, read until it ends, because the terminal's buffer is small."""
    shown, until = b"", time.monotonic() + seconds
    try:
        while select.select([terminal], [], [], max(0.0, until - time.monotonic()))[0]:
            shown += os.read(terminal, 1 << 16)
    except OSError:  # how Linux reports that all writers are gone
        process.wait(30)
    finally:
        process.kill()
        os.close(terminal)
    return shown.decode()


def test_as_a_process_with_a_terminal_for_errors_and_a_pipe_for_results(tmp_path: Path) -> None:
    load, placement = traced(tmp_path / "trace.npz"), tmp_path / "placement.json"
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "distplb", "plan", load, *GPUS, "--output", placement, "--json"]
    environment = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "result.json").open("w") as result:
        process = subprocess.Popen(command, stdout=result, stderr=end, env=environment)
    os.close(end)
    shown = all_of(terminal, process)
    assert process.returncode == 0, shown
    assert json.loads((tmp_path / "result.json").read_text())["output"] == str(placement)
    assert "planning" in shown
    assert "━" in shown
    assert shown.endswith("\x1b[2K")  # the bar is erased at the end
    assert Placement.load(placement, ["a", "b", "c"]).num_gpus == 2
