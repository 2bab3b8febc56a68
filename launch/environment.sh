# Sourced by the other scripts: leaves a Python in $PYTHON that has distplb, with the extra $1 if one is named.
# An environment that is already active is the user's: it gets distplb and what is missing, no version is imposed.
# Otherwise .venv is made, with the versions of constraints.txt.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
package=".${1:+[$1]}"
if [ -n "${VIRTUAL_ENV:-}" ] || [ -n "${CONDA_PREFIX:-}" ]; then
    PYTHON=python
    "$PYTHON" -m pip install --quiet --editable "$package"
else
    PYTHON=.venv/bin/python
    # Marked when done, so that an installation that broke off, or one for other versions, is taken up again.
    if ! cmp --silent constraints.txt ".venv/installed-${1:-plain}"; then
        echo "Installing distplb${1:+[$1]} into .venv ..."
        "${PYTHON3:-python3}" -m venv .venv
        # Compiled on all cores afterwards, where pip would take one.
        install=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile)
        # torch first and by its exact version: another request could bring another build of it.
        "${install[@]}" "$(grep '^torch==' constraints.txt)"
        "${install[@]}" --constraint constraints.txt --editable "$package"
        "$PYTHON" -m compileall -qq -j 0 .venv/lib || true # frameworks bring files for other Pythons
        cp constraints.txt ".venv/installed-${1:-plain}"
    fi
fi
