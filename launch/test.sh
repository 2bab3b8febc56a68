#!/usr/bin/env bash
# Installs what the tests need where it is missing, and runs linter, type checker and tests:
#   launch/test.sh           # each kind of behaviour once
#   launch/test.sh --long    # what repeats a case at another size, too
# Arguments are handed on to pytest: launch/test.sh -k packing
set -euo pipefail
. "$(dirname "$0")/environment.sh" dev
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
# Threads of one process would spin while they wait for a core that another process has.
export OMP_NUM_THREADS=1
# Three files at a time: half of the tests keep a core busy, the others start processes that wait for each other.
exec "$PYTHON" -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
