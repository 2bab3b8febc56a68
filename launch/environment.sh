# Sourced by the other scripts: sets $PYTHON to a Python that has distplb, with the extra $1 if one is named.
# An active environment belongs to the user: distplb and missing requirements are installed, no version is imposed.
# Otherwise .venv is created, with the versions in constraints.txt.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
package=".${1:+[$1]}"
if [ -n "${VIRTUAL_ENV:-}" ] || [ -n "${CONDA_PREFIX:-}" ]; then
    PYTHON=python
    "$PYTHON" -m pip install --quiet --editable "$package"
else
    PYTHON=.venv/bin/python
    # The mark is written last, so that an interrupted installation, or one with other versions, is repeated.
    if ! cmp --silent constraints.txt ".venv/installed-${1:-plain}"; then
        echo "Installing distplb${1:+[$1]} into .venv ..."
        "${PYTHON3:-python3}" -m venv .venv
        # Compiled afterwards on all cores; pip uses one.
        install=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile)
        # torch first and by its exact version, because a later request could replace it with another build.
        "${install[@]}" "$(grep '^torch==' constraints.txt)"
        "${install[@]}" --constraint constraints.txt --editable "$package"
        "$PYTHON" -m compileall -qq -j 0 .venv/lib || true # some frameworks contain files for other Python versions
        cp constraints.txt ".venv/installed-${1:-plain}"
    fi
fi
