#!/usr/bin/env bash
# Installs what the tests need where it is missing, and runs linter, type checker and tests.
# Arguments are handed on to pytest: launch/test.sh -k packing
set -euo pipefail
. "$(dirname "$0")/environment.sh" dev
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest "$@"
