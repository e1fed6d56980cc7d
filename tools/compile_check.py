"""Compile every kernel for GPUs that are not there, and hold what it asks of them against a stored table.

    python tools/compile_check.py            compare with tests/golden/compile.json, exit 1 on a difference
    python tools/compile_check.py --write    store what is found; read the difference before you commit it

A line of the table: registers a thread, spilled bytes, shared bytes, matrix instructions. The numbers belong to one
version of triton, written in the table; under another one only the limits are checked.
"""

import argparse
import functools
import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from gdr_teach.aot import SHARED_LIMIT, SPILL_BUDGET, TARGETS, compile_launch
from gdr_teach.delta import chunk as delta_chunk
from gdr_teach.delta import recurrent as delta_recurrent
from gdr_teach.dplr import chunk as dplr_chunk
from gdr_teach.dplr import recurrent as dplr_recurrent
from gdr_teach.gated import chunk as gated_chunk
from gdr_teach.gated import recurrent as gated_recurrent
from gdr_teach.iplr import chunk as iplr_chunk
from gdr_teach.iplr import recurrent as iplr_recurrent
from gdr_teach.runtime import recorded
from gdr_teach.testing import delta_inputs, dplr_inputs, gated_inputs, iplr_inputs

TABLE = Path(__file__).parent.parent / "tests" / "golden" / "compile.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (64, 128, 256)


# over the budget and known, in float32 by chunks at width 256, which nothing takes unasked: bytes
WIDE_FLOAT32 = 8192
GATE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float32, "fp32": torch.float32}


def run(forward, backward, x) -> None:
    """One forward and one backward call on the inputs of a rule."""
    *tensors, S0 = x
    forward(*tensors, initial_state=S0)
    backward(torch.ones_like(x.v), *tensors, dstate=torch.ones_like(S0), initial_state=S0)


def run_chunks(call, x) -> None:
    """The launches of one forward and its backward by chunks."""
    *tensors, S0 = x
    this = call(*tensors, initial_state=S0, cu_seqlens=None, scale=None)
    this.backward(torch.ones_like(x.v), torch.ones_like(S0), this.forward()[2])


def families(dtype: str, D: int):
    """(name, call) of every family of kernels."""
    shape, kind = (1, 64, 2, D, D), {"dtype": DTYPES[dtype]}

    def gated(per: str, inputs=gated_inputs):
        x = inputs(*shape, per=per, **kind)
        return x._replace(log_decay=x.log_decay.to(GATE_DTYPES[dtype]))

    pair = delta_recurrent.delta_recurrent, delta_recurrent.delta_recurrent_backward
    yield "recurrent", lambda: run(*pair, delta_inputs(*shape, **kind))
    yield "chunk", lambda: run_chunks(delta_chunk.call, delta_inputs(*shape, **kind))
    two = gated_recurrent.gated_recurrent, gated_recurrent.gated_recurrent_backward
    for per in ("head", "channel"):
        yield f"per {per}", lambda per=per: run(*two, gated(per))
        yield f"chunk per {per}", lambda per=per: run_chunks(gated_chunk.call, gated(per))
    free = iplr_recurrent.iplr_recurrent, iplr_recurrent.iplr_recurrent_backward
    yield "no decay", lambda: run(*free, iplr_inputs(*shape, **kind))
    yield "chunk, no decay", lambda: run_chunks(iplr_chunk.call, iplr_inputs(*shape, **kind))
    decayed = dplr_recurrent.dplr_recurrent, dplr_recurrent.dplr_recurrent_backward
    for per in ("head", "channel"):
        yield f"per {per}", lambda per=per: run(*decayed, gated(per, dplr_inputs))
        yield (
            f"chunk per {per}",
            lambda per=per: run_chunks(dplr_chunk.call, gated(per, dplr_inputs)),
        )
    cut = functools.partial(delta_chunk.call, segments=2)
    yield "segments", lambda: run_chunks(cut, delta_inputs(*shape, **kind))


def measure(case: tuple[str, int, str]) -> dict[str, list[int]]:
    """The lines of one dtype, width and target."""
    dtype, D, target = case
    lines = {}
    for family, call in families(dtype, D):
        with recorded(target) as launches:
            call()
        for launch in launches:
            given = zip(launch.kernel.arg_names, launch.args, strict=False)
            without = "+".join(name for name, x in given if x is None) or "nothing"
            name = f"{launch.kernel.__name__} ({family}), without {without}"
            key = f"{name} | {dtype} | {D} | {target}"
            if key not in lines:
                r = compile_launch(launch, target)
                lines[key] = [r.registers, r.spilled, r.shared, r.tensor_core]
    return lines


def over_budget(key: str, line: list[int]) -> bool:
    """Whether a chunk kernel spills more than its budget."""
    name, dtype, D, target = key.split(" | ")
    budget = WIDE_FLOAT32 if (dtype, D) == ("fp32", "256") else SPILL_BUDGET[target]
    return ("tied" in name or name.startswith("combine")) and line[1] > budget


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
    faults += [f"wants more shared memory than its target has: {key}" for key in large]
    faults += [f"spills over its budget: {k} {v}" for k, v in found.items() if over_budget(k, v)]
    spilling = sum(v[1] > 0 for v in found.values())
    print(
        f"{len(found)} kernels compiled with triton {triton.__version__}; {spilling} spill, ",
        end="",
    )
    print(f"{len(large)} want more shared memory than their target has")
    for line in faults:
        print(line)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
