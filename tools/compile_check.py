"""Compile every kernel for GPUs that are not there, and hold what it asks of them against a stored table.

    python tools/compile_check.py            compare with tests/golden/compile.json, exit 1 on a difference
    python tools/compile_check.py --write    store what is found; read the difference before you commit it

A line of the table: registers a thread, spilled bytes, shared bytes, matrix instructions. The numbers belong to one
version of triton, written in the table; under another one only the limits are checked.
"""

import argparse
import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from gdr_teach.aot import SHARED_LIMIT, TARGETS, compile_launch
from gdr_teach.delta import chunk as delta_chunk
from gdr_teach.delta import recurrent as delta_recurrent
from gdr_teach.gated import recurrent as gated_recurrent
from gdr_teach.runtime import recorded
from gdr_teach.testing import delta_inputs, gated_inputs

TABLE = Path(__file__).parent.parent / "tests" / "golden" / "compile.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (64, 128, 256)


def run(forward, backward, x) -> None:
    """One forward and one backward call on the inputs of a rule."""
    *tensors, S0 = x
    forward(*tensors, initial_state=S0)
    backward(torch.ones_like(x.v), *tensors, dstate=torch.ones_like(S0), initial_state=S0)


def families(dtype: str, D: int):
    """(name, call) of every family of kernels that takes this dtype and width on a GPU."""
    shape, kind = (1, 64, 2, D, D), {"dtype": DTYPES[dtype]}
    pair = delta_recurrent.delta_recurrent, delta_recurrent.delta_recurrent_backward
    yield "recurrent", lambda: run(*pair, delta_inputs(*shape, **kind))
    pair = gated_recurrent.gated_recurrent, gated_recurrent.gated_recurrent_backward
    for per in ("head", "channel"):
        yield f"per {per}", lambda per=per: run(*pair, gated_inputs(*shape, per=per, **kind))
    if dtype != "fp32" and D <= 128:
        pair = delta_chunk.delta_chunk, delta_chunk.delta_chunk_backward
        yield "chunk", lambda: run(*pair, delta_inputs(*shape, **kind))


def measure(case: tuple[str, int, str]) -> dict[str, list[int]]:
    """The lines of one dtype, width and target."""
    dtype, D, target = case
    lines = {}
    for family, call in families(dtype, D):
        with recorded() as launches:
            call()
        for launch in launches:
            writes = [
                n for n, x in zip(launch.kernel.arg_names, launch.args, strict=False) if x is None
            ]
            name = f"{launch.kernel.__name__} ({family}), without {'+'.join(writes) or 'nothing'}"
            key = f"{name} | {dtype} | {D} | {target}"
            if key not in lines:
                r = compile_launch(launch, target)
                lines[key] = [r.registers, r.spilled, r.shared, r.tensor_core]
    return lines


def main() -> int:
    """Compile, compare or store, and say what differs."""
    parser = argparse.ArgumentParser(description="compile every kernel and compare with the table")
    parser.add_argument("--write", action="store_true", help="store what is found")
    arguments = parser.parse_args()
    cases = list(itertools.product(DTYPES, WIDTHS, TARGETS))
    found: dict[str, list[int]] = {}
    with ProcessPoolExecutor(max_workers=2) as pool:
        for lines in pool.map(measure, cases):
            found |= lines
    if arguments.write:
        rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(found.items()))
        TABLE.write_text(
            f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n{rows}\n  }}\n}}\n'
        )
    stored = json.loads(TABLE.read_text())
    same_version = stored["triton"] == triton.__version__
    faults = [f"not in the table: {key}" for key in sorted(found.keys() - stored["kernels"].keys())]
    faults += [
        f"no longer compiled: {key}" for key in sorted(stored["kernels"].keys() - found.keys())
    ]
    for key in sorted(found.keys() & stored["kernels"].keys()):
        if same_version and found[key] != stored["kernels"][key]:
            faults.append(f"{key}: wanted {stored['kernels'][key]}, got {found[key]}")
    large = [k for k, v in found.items() if v[2] > SHARED_LIMIT[k.rpartition(" | ")[2]]]
    spilling = sum(v[1] > 0 for v in found.values())
    print(
        f"{len(found)} kernels compiled with triton {triton.__version__}; {spilling} spill, ",
        end="",
    )
    print(f"{len(large)} want more shared memory than their target has")
    for line in [f"does not fit: {key}" for key in large] + faults:
        print(line)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
