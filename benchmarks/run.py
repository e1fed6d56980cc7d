"""Times both rules, forward alone and with the backward, each way they can go on this machine.

    python benchmarks/run.py            (or `make bench`)      print a table
    python benchmarks/run.py --save     also write benchmarks/results/<device>-<date>-<commit>.json

A saved result says where it came from, so --save wants a CUDA device and a work tree without changes. Times are
milliseconds, the median of the repeats. Interpreted kernels are timed on short sequences only, where they still end
soon; the plain token loop on the CPU only, because its gradient keeps every state in memory. "loop" is that loop as
anyone would write it (`reference.py`), differentiated by autograd.
"""

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import torch

import gdr_teach
from gdr_teach import delta_rule, gated_delta_rule
from gdr_teach.delta.reference import delta_recurrence
from gdr_teach.gated.reference import gated_recurrence

HERE = Path(__file__).resolve().parent
WAYS = {
    "cpu": [("torch", "loop"), ("torch", "recurrent"), ("torch", "chunk"), ("triton", "recurrent")],
    "cuda": [("torch", "chunk"), ("triton", "recurrent"), ("triton", "chunk")],
}
RULES = {  # the operator, the loop, and the axes of its decay
    "delta": (delta_rule, delta_recurrence, None),
    "gated, a head": (gated_delta_rule, gated_recurrence, "BTH"),
    "gated, a channel": (gated_delta_rule, gated_recurrence, "BTHK"),
}
REPEATS = 5
INTERPRETED_TOKENS = 256  # longer sequences are not interpreted here


def inputs(
    shape: dict[str, int], device: str, dtype: torch.dtype, gate: str | None = None
) -> list[torch.Tensor]:
    """q, k, v, beta with unit keys and steps between 0 and 1, and a decay between -1 and 0, drawn from one seed."""
    torch.manual_seed(0)
    B, T, H, K, V = (shape[name] for name in "BTHKV")
    q = torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1)
    k = torch.nn.functional.normalize(torch.randn(B, T, H, K), dim=-1)
    v, beta = torch.randn(B, T, H, V), torch.rand(B, T, H)
    decay = [] if gate is None else [-torch.rand([shape[name] for name in gate])]
    return [x.to(device, dtype).requires_grad_() for x in (q, k, v, beta, *decay)]


def median_ms(call, device: str) -> float:
    """Median wall time of `call` after one that is not counted."""
    times = []
    for _ in range(REPEATS + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def measure(shape: dict[str, int], device: str, dtype: torch.dtype) -> list[dict]:
    rows = []
    for rule, (op, loop, gate) in RULES.items():
        args = inputs(shape, device, dtype, gate)
        for backend, mode in WAYS[device]:
            if backend == "triton" and device == "cpu" and shape["T"] > INTERPRETED_TOKENS:
                continue
            way = {} if mode == "loop" else {"backend": backend, "mode": mode}
            call = functools.partial(loop if mode == "loop" else op, *args, **way)

            def forward(call=call):
                with torch.no_grad():
                    return call().o

            def both(call=call, args=args):
                torch.autograd.grad(call().o.sum(), args)

            times = {"forward_ms": median_ms(forward, device), "both_ms": median_ms(both, device)}
            rows.append({**shape, "rule": rule, "backend": backend, "mode": mode, **times})
    return rows


def machine(device: str, dtype: torch.dtype) -> dict[str, str]:
    def installed(name: str) -> str:
        try:
            return __import__(name).__version__
        except ImportError:
            return "none"

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "gdr_teach": gdr_teach.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def git(*words: str) -> str:
    run = subprocess.run(["git", *words], cwd=HERE, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--save", action="store_true", help="write the result under benchmarks/results"
    )
    save = parser.parse_args().save
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if save and device != "cuda":
        parser.error("--save wants a CUDA device, found none")
    if save and git("status", "--porcelain"):
        parser.error(
            "--save wants a work tree without changes: a result names the commit it measured"
        )
    about = machine(device, dtype)
    print("  ".join(f"{name} {value}" for name, value in about.items()))
    shapes = tomllib.loads((HERE / "shapes.toml").read_text())[device]
    rows = []
    print(
        f"{'B':>3}{'T':>6}{'H':>4}{'K':>5}{'V':>5}  {'rule':<18}{'way':<18}{'forward ms':>12}{'both ms':>10}"
    )
    for shape in shapes:
        for row in measure(shape, device, dtype):
            rows.append(row)
            sizes = "{B:>3}{T:>6}{H:>4}{K:>5}{V:>5}".format(**row)
            way = f"{row['backend']} {row['mode']}"
            print(
                f"{sizes}  {row['rule']:<18}{way:<18}{row['forward_ms']:>12.2f}{row['both_ms']:>10.2f}"
            )
    if save:
        commit = git("rev-parse", "--short", "HEAD")
        name = about["device"].lower().replace(" ", "-")
        path = HERE / "results" / f"{name}-{about['date']}-{commit}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**about, "commit": commit, "rows": rows}, indent=1) + "\n")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
