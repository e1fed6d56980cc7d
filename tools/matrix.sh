#!/bin/sh
# Interprets the kernels on every version of triton that gdr_teach.runtime knows. Called by `make matrix`.
# Each version lies in a folder of its own and is put in front of the one in .venv, which stays as it is.
set -eu

root=$(pwd)
for version in 3.6.0 3.7.1 3.8.0 3.9.0; do
    place=$root/.venv/triton/$version
    # pip makes the folder last, so a broken download leaves none
    [ -d "$place" ] || .venv/bin/python -m pip install -q --no-deps --target "$place" ${PIP_ARGS:-} "triton==$version"
    echo "triton $version"
    PYTHONPATH=$place:$root .venv/bin/python -m pytest -n 2 -q --no-header -k "not compiles" -m "not gpu" \
        tests/test_runtime.py tests/test_sanitizer.py tests/test_rules.py \
        tests/delta/test_recurrent.py tests/delta/test_chunk.py tests/gated/test_recurrent.py tests/gated/test_chunk.py \
        tests/iplr/test_recurrent.py tests/iplr/test_chunk.py tests/dplr/test_recurrent.py tests/dplr/test_chunk.py \
        tests/chunkwise/test_segments.py
done
