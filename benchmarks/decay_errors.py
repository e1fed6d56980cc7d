"""How far every gradient is from the float64 token loop under weak, strong and very strong decay, by every way.

    python benchmarks/decay_errors.py             print the tables
    python benchmarks/decay_errors.py --write     also store them in docs/kernels.md, between the two marker lines

A cell is the length of the difference and, after it, that over the length of the gradient itself: where a decay
makes a gradient 1e-9 long, the first says nothing. Inputs are drawn from one seed and rounded to the dtype, and the
token loop takes them as rounded. Triton's kernels are interpreted.
"""

import argparse
import sys
from pathlib import Path

import torch

from gdr_teach import dplr_delta_rule, gated_delta_rule
from gdr_teach.testing import dplr_inputs, gated_inputs, gradients

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- decay errors: begin -->", "<!-- decay errors: end -->"
SHAPE = (1, 64, 1, 32, 32)  # B, T, H, K, V
DECAYS = (-0.6, -5.0, -20.0)  # the logarithm, the same for every token and channel
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
WAYS = (("torch", "chunk"), ("triton", "recurrent"), ("triton", "chunk"))
LOOP = {"backend": "torch", "mode": "recurrent"}
RULES = {  # the operator, and how its inputs are drawn
    "gated_delta_rule": (gated_delta_rule, gated_inputs),
    "dplr_delta_rule": (dplr_delta_rule, dplr_inputs),
}


def errors(rule: str, decay: float, dtype: torch.dtype) -> dict[tuple[str, str], dict]:
    """way -> {gradient: (error, error over the gradient's length)} of one rule, decay and dtype."""
    op, inputs = RULES[rule]
    x = inputs(*SHAPE, log_decay=decay, dtype=dtype)
    exact = type(x)(*(y.double() for y in x))
    torch.manual_seed(0)
    do, dstate = (torch.randn(y.shape).to(y.dtype).double() for y in (x.v, x.initial_state))
    wants = gradients(op, exact, do, dstate, **LOOP)._asdict()
    found = {}
    for backend, mode in WAYS:
        got = gradients(op, x, do, dstate, backend=backend, mode=mode)._asdict()
        lengths = {
            n: ((got[n].double() - w).norm().item(), w.norm().item()) for n, w in wants.items()
        }
        found[backend, mode] = {name: (e, e / length) for name, (e, length) in lengths.items()}
    return found


def table(rule: str) -> list[str]:
    """The lines of one rule's table."""
    lines = []
    for decay in DECAYS:
        for dtype in DTYPES:
            for way, row in errors(rule, decay, dtype).items():
                if not lines:
                    names = ("dstate0" if name == "initial_state" else f"d{name}" for name in row)
                    lines += [f"| {rule} | dtype | way | {' | '.join(names)} |"]
                    lines += ["|---" * (len(row) + 3) + "|"]
                cells = (f"{error:.0e} {relative:.0e}" for error, relative in row.values())
                kind = str(dtype).removeprefix("torch.")
                lines += [f"| {decay:g} | {kind} | {' '.join(way)} | {' | '.join(cells)} |"]
    return lines


def report() -> str:
    """Both tables, and what they are of."""
    B, T, H, K, V = SHAPE
    head = (
        "Every gradient against the float64 token loop: the length of the error, and that over the gradient's\n"
        f"own. First column: one decay for all. B = {B}, T = {T}, H = {H}, K = {K}, V = {V}; interpreted,\n"
        f"torch {torch.__version__}; `python benchmarks/decay_errors.py --write` makes these tables."
    )
    return "\n\n".join([head, *("\n".join(table(rule)) for rule in RULES)])


def stored(page: str) -> str | None:
    """What stands between the markers of a page; None where it has none."""
    if BEGIN not in page or END not in page:
        return None
    return page.partition(BEGIN)[2].partition(END)[0].strip()


def main() -> int:
    """Print the tables, and store them if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"store them in docs/{PAGE.name}")
    write = parser.parse_args().write
    page = PAGE.read_text()
    if write and stored(page) is None:
        parser.error(f"docs/{PAGE.name} has no lines {BEGIN} and {END}")
    text = report()
    print(text)
    if write:
        before, after = page.partition(BEGIN)[0], page.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
