#!/usr/bin/env bash
# Runs the tests with a Python and a torch of your choice, and the newest versions of all other libraries that fit them:
# launch/versions.sh python3.10 2.6.0
# Further arguments are passed to pytest. The tests run in a new environment, which is removed afterwards; torch's CUDA
# builds take up to 8 GB in $TMPDIR, and as much is downloaded if it is not in pip's cache.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "pass a Python and a version of torch; launch/versions.sh python3.10 2.6.0" >&2
    exit 2
fi
python=$(command -v "$1") || { echo "$1 is not installed; pass an installed Python" >&2 && exit 2; }
torch=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
# One request, so that pip chooses versions that accept this torch, or fails.
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "torch==$torch" --editable '.[test]'
export OMP_NUM_THREADS=1
"$folder/venv/bin/python" -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"
