#!/usr/bin/env bash
# Runs the tests with a Python and a torch of your choice, and the newest of all other libraries that goes with them:
# launch/versions.sh python3.10 2.6.0
# Further arguments are handed on to pytest. They run in a new environment, which is removed in the end; torch's CUDA
# builds take up to 8 GB in $TMPDIR, and as much is downloaded if pip has not kept it.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "pass a Python and a version of torch; launch/versions.sh python3.10 2.6.0" >&2
    exit 2
fi
python=$(command -v "$1") || { echo "no $1 here; pass a Python that is installed" >&2 && exit 2; }
torch=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
# In one request: whatever asks for another torch is refused, or taken in a version that does not.
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "torch==$torch" --editable '.[test]'
export OMP_NUM_THREADS=1
"$folder/venv/bin/python" -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
