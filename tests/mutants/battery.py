"""What every kernel has to survive: a compact set of calls, checked by the sanitizer, by poison and by an oracle.

Small enough to be run once for every planted bug, and chosen so that nothing is a power of two, a multiple of the
chunk or equal to another size by chance. `ROOMS` says which calls hold which modules to account; a new family of
kernels adds its calls and its modules there.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton.language as tl

import gdr_teach.delta.chunk
import gdr_teach.delta.recurrent
import gdr_teach.dplr.chunk
import gdr_teach.dplr.recurrent
import gdr_teach.gated.chunk
import gdr_teach.iplr.chunk  # noqa: F401  the rooms are looked up as attributes of the package
from gdr_teach import chunkwise, delta, dplr, gated, iplr
from gdr_teach.runtime import cdiv, kernel, next_power_of_2, poisoned
from gdr_teach.sanitizer import KernelFault, sanitize
from gdr_teach.testing import (
    as_rows,
    assert_rows_close,
    delta_inputs,
    delta_oracle,
    dplr_inputs,
    dplr_oracle,
    gated_inputs,
    gated_oracle,
    gradients,
    iplr_inputs,
)

ORACLES = {
    "Inputs": delta_oracle,
    "GatedInputs": gated_oracle,
    "IplrInputs": dplr_oracle,
    "DplrInputs": dplr_oracle,
}


class Poisoned(AssertionError):
    """A result holds what undefined memory was filled with."""


def packed(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


@functools.cache
def drawn(
    inputs: Callable, sizes: tuple, options: tuple, lengths: tuple | None, scale, state: bool
):
    """The tensors of one call, and what the oracle makes of them in float64; the same for every bug."""
    options = dict(options)
    small = options.pop("small_beta", False)
    if lengths is not None:
        options["N"] = len(lengths)
    x = inputs(*sizes, **options)
    if small and "beta" in x._fields:
        x.beta[:, ::3] = 0.01  # below what the gradient of beta divides by
    cu = None if lengths is None else packed(list(lengths))
    exact = type(x)(*(y.double() for y in x))
    if not state:
        exact.initial_state.zero_()
    draw = torch.Generator().manual_seed(7)
    do, dstate = (
        torch.randn(y.shape, generator=draw, dtype=torch.float64) for y in (exact.v, exact[-1])
    )
    oracle, more = ORACLES[type(x).__name__], {"cu_seqlens": cu, "scale": scale}
    want = oracle(*exact[:-1], initial_state=exact.initial_state, **more)
    return x, cu, (do, dstate), (*want, *gradients(oracle, exact, do, dstate, **more))


def hold(
    forward, backward, inputs, *sizes, lengths=None, scale=None, state=True, rtol=1e-10, **options
) -> None:
    """Forward and backward of one call against the oracle, every access checked, undefined memory full of NaN."""
    more = {name: options.pop(name) for name in ("chunk_size", "segments") if name in options}
    lengths = None if lengths is None else tuple(lengths)
    x, cu, (do, dstate), want = drawn(inputs, sizes, tuple(options.items()), lengths, scale, state)
    more |= {"cu_seqlens": cu, "scale": scale}
    more["initial_state"] = x.initial_state if state else None
    with sanitize(), poisoned(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # of numpy, about NaN, which are looked for below
        out = forward(*x[:-1], **more)
        kind = out.state.dtype
        grads = backward(do.to(x.v.dtype), *x[:-1], dstate=dstate.to(kind), **more)
    names = ("o", "state", *(f"d{name}" for name in x._fields))
    got = [*out, *(g for g in grads if g is not None)]
    for name, g in zip(names, got, strict=False):
        if g.isnan().any():
            raise Poisoned(f"{name} holds NaN")
    norm = "row" if x.q.dtype == torch.float64 else "tensor"
    for name, g, w in zip(names, got, want, strict=False):
        assert_rows_close(as_rows(g), as_rows(w), rtol=rtol, norm=norm, name=name)


# -- token kernels: a state of two tiles of columns, documents, segments of two tokens ---------------------------------


def token_calls(room, forward: str, backward: str, inputs) -> Iterator[Callable[[], None]]:
    def call(*sizes, **options):
        # looked up at the call, when the planted bug is in place
        hold(getattr(room, forward), getattr(room, backward), inputs, *sizes, **options)

    def narrow(*sizes, **options):
        # tiles of two columns and segments of two tokens: at these sizes one tile and one segment would do
        tiles = lambda K, V: (next_power_of_2(K), 2, cdiv(V, 2))
        with mock.patch.object(room, "tile", tiles):
            if not hasattr(room, "segment_length"):
                return call(*sizes, **options)
            with mock.patch.object(room, "segment_length", return_value=2):
                return call(*sizes, **options)

    yield lambda: call(2, 5, 2, 3, 5)
    yield lambda: call(1, 9, 2, 5, 3, lengths=[3, 0, 1, 5], scale=0.3)
    yield lambda: narrow(1, 9, 2, 5, 3, lengths=[3, 0, 1, 5])
    yield lambda: narrow(2, 3, 1, 3, 7, state=False)


# -- chunk kernels -----------------------------------------------------------------------------------------------------


def chunk_calls(room, forward: str, backward: str, inputs) -> Iterator[Callable[[], None]]:
    def call(*sizes, C, **options):
        ways = getattr(room, forward), getattr(room, backward)
        hold(*ways, inputs, *sizes, chunk_size=C, small_beta=True, **options)

    yield lambda: call(1, 15, 2, 3, 5, C=4, lengths=[3, 0, 4, 5, 1, 2], scale=0.3)
    yield lambda: call(2, 6, 1, 5, 3, C=4, state=False)
    yield lambda: call(1, 3, 1, 70, 67, C=2)  # two tiles of channels, two of columns
    yield lambda: call(1, 19, 1, 5, 3, C=16, dtype=torch.float16, rtol=1e-2)
    yield lambda: call(1, 19, 1, 5, 3, C=16, dtype=torch.bfloat16, rtol=2e-2)
    yield lambda: call(1, 5, 1, 5, 3, C=4, dtype=torch.float32, rtol=1e-5)


def segment_calls(room, forward: str, backward: str, inputs) -> Iterator[Callable[[], None]]:
    def call(*sizes, **options):
        ways = getattr(room, forward), getattr(room, backward)
        with mock.patch.object(chunkwise.segments, "SHORTEST", 1):
            hold(*ways, inputs, *sizes, chunk_size=2, segments=3, **options)

    yield lambda: call(1, 12, 2, 3, 5, lengths=[7, 0, 3, 2])
    yield lambda: call(1, 6, 1, 70, 20, state=False)  # two tiles of channels, two of columns


@kernel
def sequences_kernel(p_cu, p_out, T, H):
    """First row and count of each program's sequence and head."""
    _, _, row, count = delta.recurrent.program_place(p_cu, T, H, 1, p_cu is not None)
    tl.store(p_out + 2 * tl.program_id(0), row)
    tl.store(p_out + 2 * tl.program_id(0) + 1, count)


@kernel
def slots_kernel(p_cu, p_out, slot, T, H, N, C: tl.constexpr):
    """First row and count of chunk slots from one on."""
    row, count = chunkwise.place.chunk_place(p_cu, slot + tl.program_id(0), H - 1, T, H, N, C)
    tl.store(p_out + 2 * tl.program_id(0), row)
    tl.store(p_out + 2 * tl.program_id(0) + 1, count)


def far_rows() -> None:
    """Rows beyond 2^31, computed and not touched."""
    start, T = 2**31, 2**30
    out = torch.zeros(2, 2, dtype=torch.int64)
    sequences_kernel[(2,)](torch.tensor([start, start + 3, start + 5]), out, start + 5, 1)
    equal(out, [[start, 3], [start + 3, 2]])
    out = torch.zeros(3, 2, dtype=torch.int64)
    sequences_kernel[(3,)](None, out, T, 1)
    equal(out, [[0, T], [T, T], [2 * T, T]])


def far_chunks() -> None:
    """The same for chunks."""
    T, C = 2**30, 64
    out = torch.zeros(1, 2, dtype=torch.int64)
    slots_kernel[(1,)](None, out, 2 * (T // C) + 5, T, 1, 3, C)
    equal(out, [[2 * T + 5 * C, T - 5 * C]])
    slots_kernel[(1,)](None, out, T // C - 1, T, 4, 1, C)
    equal(out, [[4 * (T - C) + 3, C]])


@kernel
def half_kernel(
    p_x, p_y, p_low, p_z, OF: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr
):
    """One helper that owes more digits than its operands' type has; OF names it."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    b_x, b_y = tl.load(p_x + i * C + j), tl.load(p_y + i * C + j)
    if OF == "add_product":
        b_z = chunkwise.triangular.add_product(b_x, b_x, b_y, DOT, "ieee", ACC)
    elif OF == "times_inverse":
        b_low = tl.load(p_low + i * C + j)
        b_z = chunkwise.triangular.times_inverse(b_x, b_y, b_low, DOT, "ieee", ACC, ACC)
    elif OF == "gate_sums":
        b_z = chunkwise.decay.gate_sums(j <= i, b_x, DOT, "ieee", ACC)
    else:
        b_z = chunkwise.triangular.guarded_inverse(b_x, C, DOT, "ieee", ACC, "ieee")
    tl.store(p_z + i * C + j, b_z)


def half_digits() -> None:
    """What the helpers keep of float32 beside operands of 8 and 11 digits: 16 digits or more."""
    draw = torch.Generator().manual_seed(7)
    x, y, unused = (torch.randn(16, 16, generator=draw) for _ in range(3))
    few = (8 * x).round() / 8  # of few digits: what is lost then is X's
    for dtype, kind in ((torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)):
        high = y.to(dtype)
        low = (y - high.float()).to(dtype)
        exact = [t.double() for t in (x, few, high, high.double() + low.double())]
        x64, few64, high64, sum64 = exact
        cases = {"gate_sums": [(x, unused, torch.ones(16, 16).double().tril() @ x64)]}
        cases["times_inverse"] = [(few, high, few64 @ sum64)]
        cases["add_product"] = [(few, high, few64 + few64 @ high64)]
        if dtype == torch.bfloat16:
            cases["times_inverse"] += [(x, high, x64 @ sum64)]
            cases["add_product"] += [(x, high, x64 + x64 @ high64)]
        for name, given in cases.items():
            for a, b, want in given:
                got = torch.empty(16, 16)
                half_kernel[(1,)](a, b, low, got, name, 16, kind, tl.float32)
                error = ((got - want).norm() / want.norm()).item()
                assert error < 2**-15, f"{name} with {dtype} errs by {error:.1e}"
    keys = torch.nn.functional.normalize(torch.randn(64, 64, generator=draw) + 4.5, dim=-1)
    # nearly the same keys: worth refining; keys of length 2: beyond the range of float16, into inf; growth by 1.3 a
    # token: into NaN among small numbers
    ones = torch.ones(64, 64).tril(-1)
    for A in ((keys @ keys.T).tril(-1), 4 * ones, -0.3 * ones):
        got, want = torch.empty(64, 64), torch.linalg.inv(torch.eye(64).double() + A.double())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, about what the guard is for
            half_kernel[(1,)](A, A, A, got, "guarded_inverse", 64, tl.float16, tl.float32)
        error = ((got - want).norm() / want.norm()).item()
        assert error < 1e-5, f"an inverse errs by {error:.1e}"


def equal(got: torch.Tensor, want: list) -> None:
    assert got.tolist() == want, f"rows and counts {got.tolist()}, wanted {want}"


# -- who holds whom ----------------------------------------------------------------------------------------------------


def per_head(*sizes, **options) -> Any:
    return gated_inputs(*sizes, per="head", **options)


def mixed(*sizes, **options) -> Any:
    # no decay, some, and all; below what bfloat16 has room for
    return gated_inputs(*sizes, log_decay="mixed", **options)


def dplr_per_head(*sizes, **options) -> Any:
    return dplr_inputs(*sizes, per="head", **options)


DELTA = "delta_recurrent", "delta_recurrent_backward"
GATED = "gated_recurrent", "gated_recurrent_backward"
DPLR = "dplr_recurrent", "dplr_recurrent_backward"
IPLR_CHUNK = "iplr_chunk", "iplr_chunk_backward"
DPLR_CHUNK = "dplr_chunk", "dplr_chunk_backward"
DELTA_CHUNK = "delta_chunk", "delta_chunk_backward"
GATED_CHUNK = "gated_chunk", "gated_chunk_backward"

CALLS: dict[str, list[Callable[[], None]]] = {
    "delta": [*token_calls(delta.recurrent, *DELTA, delta_inputs), far_rows],
    "gated": [
        *token_calls(gated.recurrent, *GATED, gated_inputs),
        *list(token_calls(gated.recurrent, *GATED, per_head))[:1],
        *list(token_calls(gated.recurrent, *GATED, mixed))[:1],
    ],
    "dplr": [
        *token_calls(dplr.recurrent, *DPLR, dplr_inputs),
        *list(token_calls(dplr.recurrent, *DPLR, dplr_per_head))[:1],
        *list(token_calls(dplr.recurrent, *DPLR, iplr_inputs))[1:3],
    ],
    "tied": [
        *chunk_calls(delta.chunk, *DELTA_CHUNK, delta_inputs),
        *chunk_calls(gated.chunk, *GATED_CHUNK, gated_inputs),
        *list(chunk_calls(gated.chunk, *GATED_CHUNK, per_head))[:1],
        *itertools.chain(
            *([x[0], x[4]] for x in [list(chunk_calls(gated.chunk, *GATED_CHUNK, mixed))])
        ),
        far_chunks,
        half_digits,
    ],
    "untied": [
        *chunk_calls(dplr.chunk, *DPLR_CHUNK, dplr_inputs),
        *chunk_calls(iplr.chunk, *IPLR_CHUNK, iplr_inputs),
        *list(chunk_calls(dplr.chunk, *DPLR_CHUNK, dplr_per_head))[:1],
    ],
    "segments": [*segment_calls(delta.chunk, *DELTA_CHUNK, delta_inputs)],
}

ROOMS = {
    "gdr_teach.delta.recurrent": "delta",
    "gdr_teach.gated.recurrent": "gated",
    "gdr_teach.dplr.recurrent": "dplr",
    "gdr_teach.chunkwise.place": "tied",
    "gdr_teach.chunkwise.prepare": "tied",
    "gdr_teach.chunkwise.scan": "tied",
    "gdr_teach.chunkwise.grads": "tied",
    "gdr_teach.chunkwise.decay": "tied",
    "gdr_teach.chunkwise.triangular": "tied",
    "gdr_teach.chunkwise.tied": "tied",
    "gdr_teach.chunkwise.prepare_untied": "untied",
    "gdr_teach.chunkwise.scan_untied": "untied",
    "gdr_teach.chunkwise.grads_untied": "untied",
    "gdr_teach.chunkwise.untied": "untied",
    "gdr_teach.chunkwise.segments": "segments",
}


def fault_of(error: BaseException) -> tuple[str, str]:
    """Who caught an error, and what kind of bug that says it is."""
    if isinstance(error, KernelFault):
        kinds = {"race": "race", "miss": "race", "unin": "uninitialised"}
        return "sanitizer", kinds.get(error.kind[:4], "memory")
    if isinstance(error, Poisoned):
        return "poison", "uninitialised"
    if isinstance(error, AssertionError):
        return "oracle", "number"
    return type(error).__name__, "error"
