"""How long `import distplb` takes once torch is imported.

python -m benchmarks.house.bench_import --output benchmarks/results/DATE-import.md
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.shared.tables import command_line, header, markdown, progress, publish

PROGRAM = """
import time, torch
begin, used = time.perf_counter(), time.process_time()
import distplb
print(time.perf_counter() - begin, time.process_time() - used)
"""
TEXT = (
    "Each turn is a new process that imports torch, then distplb, and prints the wall and CPU seconds of the latter. "
    "Modules are compiled, and files are in the system's cache."
)


def main() -> None:
    """Measure, print the report, and write it if requested."""
    parser = argparse.ArgumentParser(description="How long `import distplb` takes once torch is imported.")
    parser.add_argument("--turns", type=int, default=15, help="number of measured processes")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    samples = []
    for turn in range(options.turns + 1):
        progress(f"turn {turn} of {options.turns}")
        run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        samples.append([float(number) for number in run.stdout.split()])
    progress("")
    lines = []
    for name, values in zip(("wall", "CPU"), zip(*samples[1:], strict=True), strict=True):
        lines.append([name, *(f"{statistic(values):.3f}" for statistic in (statistics.median, min, max))])
    command = command_line("house.bench_import", {"--turns": options.turns})
    top = header("Importing distplb after torch", TEXT, command, "none")
    publish(f"{top}\n\n{markdown(['seconds', 'median', 'min', 'max'], lines)}", options.output)


if __name__ == "__main__":
    main()
