"""Reports of benchmarks: tables, a header with command, hardware and versions, and output."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import shutil
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import torch

import distplb


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """Format a Markdown table whose columns are also aligned as plain text, all but the first to the right."""
    widths = [max(2, *(len(line[column]) for line in [head, *lines])) for column in range(len(head))]  # 2 for "-:"
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
        for line in [head, rule, *lines]
    )


def header(title: str, text: str, command: str, engine: str) -> str:
    """Format title, text, command, hardware and versions; `text` explains how to read the figures, and their noise."""
    hardware = f"{cpu_model()}, {(cores := len(os.sched_getaffinity(0)))} core{'s' * (cores > 1)}"
    if engine == "cuda":
        hardware += f"; {torch.cuda.get_device_name()}"
    return "\n".join(
        [
            f"# {title}",
            "",
            textwrap.fill(f"{datetime.date.today().isoformat()}. {text}", 110),
            "",
            f"- command: `{command}`",
            f"- hardware: {hardware}",
            f"- versions: {versions()}",
            f"- engine: {engine}",
        ]
    )


def command_line(module: str, options: dict[str, object], *, ranks: int | None = None) -> str:
    """Build the command that repeats the benchmark from the root of a checkout.

    >>> command_line("planning.bench_steps", {"--candidates": [1, 8], "--engine": None})
    'python -m benchmarks.planning.bench_steps --candidates 1 8'

    Args:
        module: name of the module below `benchmarks`.
        options: values by option name; None and False are left out.
        ranks: number of ranks that torchrun starts; None is one process without torchrun.
    """
    words = ["python"] if ranks is None else ["torchrun", "--standalone", "--nproc-per-node", str(ranks)]
    words += ["-m", f"benchmarks.{module}"]
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [name, *map(str, values)]
    return shlex.join(words)


def versions() -> str:
    """List the versions of Python and of the packages that affect the figures."""
    names = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("numpy", "numba", "triton"):
        try:
            names.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join([*names, f"distplb {distplb.__version__}"])


def cpu_model() -> str:
    """Return the processor's name as the system reports it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def verdict(is_met: bool) -> str:
    """Return whether a target is met, in a word."""
    return "met" if is_met else "missed"


def publish(report: str, output: Path | None) -> None:
    """Print a report, and write it to a file if one is named."""
    print(report)
    if output is not None:
        output.write_text(f"{report}\n")


def progress(text: str) -> None:
    """Overwrite the progress line of a terminal; an empty text erases it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
