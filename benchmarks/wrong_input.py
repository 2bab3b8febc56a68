"""What the command line answers to wrong input, each command as a process of its own.

    python benchmarks/wrong_input.py --output benchmarks/results/DATE-wrong-input.md

`tests/cli/test_wrong_input.py` holds it to more of it; this is the table to read.
"""

from __future__ import annotations

import argparse
import pickle
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tables import command_line, header, markdown, progress

TRACE = Path(__file__).parent / "traces" / "plain-2x16.npz"
COMMANDS = [
    "plan missing.npy --gpus-per-node 4",
    "plan flat.npy --gpus-per-node 4",
    "plan empty.npy --gpus-per-node 4",
    "plan nothing.npy --gpus-per-node 4",
    "plan cut.npz --gpus-per-node 4",
    "plan pickle.npy --gpus-per-node 4",
    "plan objects.npy --gpus-per-node 4",
    "plan negative.csv --gpus-per-node 4",
    "plan words.csv --gpus-per-node 4",
    "plan trace.npz --gpus-per-node 3",
    "plan trace.npz --gpus-per-node 0",
    "plan trace.npz",
    "plan trace.npz --gpus-per-node 4 --output missing/placement.json",
    "compare trace.npz --gpus-per-node 4 --unseen flat.npy",
    "compare cut.npz --gpus-per-node 4",
    "replay missing.npz",
    "replay cut.npz",
    "replay folder",
    "replay trace.npz --nodes 3",
    "replay trace.npz --gpus-per-node 3",
    "replay trace.npz --every 1000",
    "report missing",
    "report folder",
    "report cut.npz",
    "report damaged.jsonl",
    "report trace.npz --output missing/report.html",
    "doctor --deadline 0",
    "rebalance trace.npz",
]
TEXT = (
    "Every command without a terminal, its output in a pipe. `code` is the exit code; `says` all that came on standard "
    "error, and nothing came on standard output. No line is a traceback. Names of files are in a folder made for this."
)


def main() -> None:
    """Run, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description="What the command line answers to wrong input.")
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        for number, command in enumerate(COMMANDS):
            progress(f"{number + 1} of {len(COMMANDS)}")
            words = [sys.executable, "-m", "distplb", *shlex.split(command)]
            run = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
            if run.stdout or run.stderr.count("\n") != 1:
                raise SystemExit(f"{command} said more than one line:\n{run.stdout}{run.stderr}")
            lines.append([f"`{command}`", str(run.returncode), run.stderr.strip().replace("|", "\\|")])
    progress("")
    given = command_line("wrong_input.py", {"--output": options.output})
    report = f"{header('Wrong input', TEXT, given, 'none')}\n\n{markdown(['distplb ...', 'code', 'says'], lines)}"
    print(report)
    if options.output:
        options.output.write_text(f"{report}\n")


def make_files(folder: Path) -> None:
    """One of each kind of damage."""
    whole = TRACE.read_bytes()
    (folder / "trace.npz").write_bytes(whole)
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.npy").touch()
    np.save(folder / "flat.npy", np.arange(16))
    np.save(folder / "nothing.npy", np.zeros((0, 16), dtype=np.int64))
    (folder / "pickle.npy").write_bytes(pickle.dumps([[1, 2], [3, 4]]))
    np.save(folder / "objects.npy", np.array([[1, "two"]], dtype=object), allow_pickle=True)
    (folder / "negative.csv").write_text("1,2,3,-4\n")
    (folder / "words.csv").write_text("layer,a,b,c,d\nfirst,1,2,three,4\n")
    (folder / "folder").mkdir()
    (folder / "damaged.jsonl").write_text('{"format": "distplb.event", "version": 7}\n')


if __name__ == "__main__":
    main()
