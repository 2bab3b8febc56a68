#!/usr/bin/env bash
# Before a release: builds the wheel, installs it into an empty environment, and tests the pages' snippets, the
# command line and the report in a folder without the sources of the package.
set -euo pipefail
if [ $# -gt 0 ]; then
    echo "launch/wheel.sh takes no arguments, and $* was passed; run it without arguments" >&2
    exit 2
fi
. "$(dirname "$0")/environment.sh" dev
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m build --outdir "$folder/dist"
"${PYTHON3:-python3}" -m venv "$folder/venv"
install=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${install[@]}" "$(grep '^torch==' constraints.txt)"
wheel=$(echo "$folder"/dist/distplb-*.whl)
"${install[@]}" --constraint constraints.txt "${wheel}[test]"
cp -r README.md CONTRIBUTING.md setup.cfg docs tests examples benchmarks launch "$folder"
cd "$folder"
venv/bin/python -c "import distplb; print(distplb.__version__, distplb.__file__)"
venv/bin/python -m pytest tests/house/test_{pages,troubleshooting}.py tests/cli/test_{compare_command,main,plan_command,replay_command,wrong_input}.py tests/report/test_{figures,page,run}.py -k "not lead_somewhere"
