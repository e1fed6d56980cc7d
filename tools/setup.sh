#!/bin/sh
# Builds .venv and installs the course, the tests and the package itself. Called by `make setup`;
# returns at once when .venv holds what the files ask for.
#   PYTHON    interpreter to build from (default python3)
#   PIP_ARGS  passed on to pip, for example an index of PyTorch's CPU builds
set -eu

PYTHON=${PYTHON:-python3}
PIP_ARGS=${PIP_ARGS:-}
VENV=.venv
DONE=$VENV/.installed
UNFINISHED=.venv.unfinished # outside .venv, so that clearing .venv does not clear the mark

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

# The stamp: what was installed, and where. An environment does not survive being moved.
wanted="$(cat pyproject.toml constraints.txt tools/setup.sh | cksum) in $PWD"
found=$(cat "$DONE" 2>/dev/null || true)
if [ "$found" = "$wanted" ] && [ ! -e "$UNFINISHED" ] && [ -x "$VENV/bin/python" ]; then
    exit 0
fi

command -v "$PYTHON" >/dev/null 2>&1 ||
    fail "wanted Python 3.11 or newer, found no command '$PYTHON'" "name one: make ... PYTHON=python3.12"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "wanted Python 3.11 or newer, got '$("$PYTHON" --version 2>&1)' from '$PYTHON'" \
        "name another: make ... PYTHON=python3.12"

if [ -e "$UNFINISHED" ]; then
    echo "setup: an earlier run was cut short, building $VENV again"
    rm -rf "$VENV"
elif [ -n "$found" ] && [ "${found#* in }" != "$PWD" ]; then
    echo "setup: this folder was moved, building $VENV again"
    rm -rf "$VENV"
fi
: >"$UNFINISHED"

if ! "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    if ! "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; then
        rm -f "$UNFINISHED"
        fail "'$PYTHON' has no venv module; on Debian and Ubuntu: sudo apt install python3-venv"
    fi
    echo "setup: creating $VENV with $("$PYTHON" --version 2>&1)"
    "$PYTHON" -m venv --clear "$VENV"
fi

quiet=
[ -z "$found" ] || quiet=--quiet # the first time takes minutes: show what pip does

pip_install() {
    # shellcheck disable=SC2086  # PIP_ARGS is a list of words, quiet one word or none
    "$VENV/bin/python" -m pip install --disable-pip-version-check $quiet \
        --constraint constraints.txt $PIP_ARGS "$@" || {
        rm -f "$UNFINISHED" # pip said no by itself and undid its work: what is there serves the next try
        fail "pip could not install: $*"
    }
}

echo "setup: installing the course and its tests into $VENV (the first time takes minutes)"
pip_install --editable '.[course,test,bench]'
# The independent oracle of the tests. Its own dependencies would bring a CUDA torch and more: not needed here.
pip_install --no-deps fla-core

echo "$wanted" >"$DONE"
rm -f "$UNFINISHED"
echo "setup: done"
