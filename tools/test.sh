#!/bin/sh
# Runs the notebooks, then the tests, and fails if either does. Called by `make test`.
# Two runs, because pytest-randomly would shuffle the cells of a notebook. The tests come last so
# that their closing line is the last one. pytest fails by itself when it finds no test.
set -eu

notebooks=0
.venv/bin/python -m pytest -n 2 --dist loadscope -p no:randomly \
    --nbval-lax --nbval-current-env --nbval-cell-timeout 60 notebooks solutions || notebooks=$?
.venv/bin/python -m pytest -n 2 --durations=5 "$@"
[ "$notebooks" -eq 0 ] || {
    echo "the tests passed, the notebooks did not: see above" >&2
    exit "$notebooks"
}
