#!/usr/bin/env bash
# Installs missing requirements of the tests, then runs linter, type checker and tests:
#   launch/test.sh           # each kind of behaviour once
#   launch/test.sh --long    # also the cases that repeat a test at another size
# Arguments are passed to pytest: launch/test.sh -k packing
set -euo pipefail
. "$(dirname "$0")/environment.sh" dev
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# More threads would spin while they wait for cores that other processes use.
export OMP_NUM_THREADS=1
# Three files at a time: half of the tests keep a core busy, the others start processes that mostly wait for each other.
exec "$PYTHON" -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
