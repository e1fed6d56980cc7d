"""The chunk kernels themselves; what they compute is held by test_op.py through the operator."""

import itertools

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl

from gdr_teach import delta_rule
from gdr_teach.aot import SHARED_LIMIT, SPILL_BUDGET, compile_launch
from gdr_teach.chunkwise.place import chunk_place
from gdr_teach.chunkwise.triangular import guarded_inverse, unit_lower_inverse
from gdr_teach.delta.chunk import call as delta_chunk_call
from gdr_teach.delta.chunk import delta_chunk, delta_chunk_backward
from gdr_teach.delta.reference import delta_recurrence
from gdr_teach.runtime import kernel, poisoned, recorded
from gdr_teach.sanitizer import sanitize
from gdr_teach.testing import (
    HARD,
    Inputs,
    as_rows,
    assert_near_token_loop,
    assert_rows_close,
    delta_inputs,
    gradients,
)

NAMES = ("dq", "dk", "dv", "dbeta", "dstate0")
STAGES = ["prepare", "scan", "states", "reverse_scan", "grads"]


def run(x: Inputs, cu=None, C: int = 64):
    """Forward and backward; all results."""
    options = {"initial_state": x.initial_state, "cu_seqlens": cu, "chunk_size": C}
    out = delta_chunk(*x[:4], **options)
    do, dstate = torch.ones_like(x.v), torch.ones_like(x.initial_state)
    return (*out, *delta_chunk_backward(do, *x[:4], dstate=dstate, **options))


@pytest.mark.parametrize("C", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize(("keys", "beta"), [("unit", None), ("identical", 2.0), ("cos0.9", 1.0)])
def test_any_chunk_size_gives_the_same(C, keys, beta):
    x = delta_inputs(2, 19, 2, 5, 3, keys=keys, beta=beta)
    want = delta_recurrence(*x[:4], initial_state=x.initial_state)
    ones = torch.ones_like(x.v), torch.ones_like(x.initial_state)
    wants = gradients(delta_recurrence, x, *ones)
    got = run(x, C=C)
    for name, g, w in zip(("o", "state", *NAMES), got, (*want, *wants), strict=True):
        assert_rows_close(as_rows(g), as_rows(w), rtol=1e-11, name=name)


@pytest.mark.parametrize("C", [4, 16])
def test_packed_lengths_around_the_chunk(C):
    lengths = [0, 1, C - 1, C, C + 1, 2 * C, 0, 3]
    for order in (lengths, lengths[::-1]):
        cu = torch.tensor([0, *itertools.accumulate(order)])
        x = delta_inputs(1, sum(order), 2, 4, 3, N=len(order))
        with poisoned(), sanitize():
            got = run(x, cu, C)
        want = delta_recurrence(*x[:4], initial_state=x.initial_state, cu_seqlens=cu)
        assert_rows_close(got[0], want.o, rtol=1e-11, name="o")
        assert_rows_close(got[1], want.state, rtol=1e-11, name="state")


@pytest.mark.parametrize("shape", [(2, 21, 2, 7, 5), (1, 17, 1, 20, 90), (2, 0, 1, 4, 3)], ids=str)
def test_every_element_is_written_and_nothing_else_is_touched(shape):
    x = delta_inputs(*shape)
    want = run(x, C=8)
    with poisoned(), sanitize():
        got = run(x, C=8)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("keys", "beta"), HARD)
def test_stays_near_the_token_loop(dtype, keys, beta):
    x = delta_inputs(
        1, 130 if dtype == torch.float32 else 200, 1, 64, 64, dtype=dtype, keys=keys, beta=beta
    )
    assert_near_token_loop(delta_rule, x, keys=keys, beta=beta, backend="triton", mode="chunk")


@kernel
def inverse_kernel(p_A, p_X, C: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr):
    """X = (I + A)^-1."""
    i = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(p_X + i, guarded_inverse(tl.load(p_A + i), C, DOT, "ieee", ACC, "ieee"))


@kernel
def unguarded_kernel(p_A, p_X, C: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr):
    """X = (I + A)^-1, whatever happens."""
    i = tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(p_X + i, unit_lower_inverse(tl.load(p_A + i), C, DOT, "ieee", ACC))


@pytest.mark.parametrize("C", [1, 2, 4, 8, 16, 32, 64])
def test_inverse(C):
    A = 0.3 * torch.randn(C, C, dtype=torch.float64).tril(-1)
    X = torch.zeros_like(A)
    inverse_kernel[(1,)](A, X, C, tl.float64, tl.float64)
    want = torch.linalg.inv(torch.eye(C, dtype=torch.float64) + A)
    assert_rows_close(X[None], want[None], rtol=1e-10)


@pytest.mark.parametrize("cosine", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_refining_gives_the_digits_back(cosine, beta):
    k = torch.nn.functional.normalize(torch.randn(64, 64) + cosine * 40, dim=-1)
    A = (beta * k @ k.T).tril(-1)
    want = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + A.double())
    error = []
    for inverse in (unguarded_kernel, inverse_kernel):
        X = torch.zeros_like(A)
        inverse[(1,)](A, X, 64, tl.float16, tl.float32)
        error.append(((X - want).norm() / want.norm()).item())
    assert error[0] > 4e-5  # or there would be nothing to refine
    assert error[1] < error[0] / 10


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid", "ignore:All-NaN")
def test_the_guard_catches_what_fp16_cannot_hold():
    # identical keys of length 2: the inverse grows to 1e30
    A = 4 * torch.ones(64, 64).tril(-1)
    want = torch.linalg.inv(torch.eye(64, dtype=torch.float64) + A.double())
    X = torch.zeros_like(A)
    unguarded_kernel[(1,)](A, X, 64, tl.float16, tl.float32)
    assert not X.isfinite().all()
    inverse_kernel[(1,)](A, X, 64, tl.float16, tl.float32)
    assert_rows_close(X[None], want[None], rtol=1e-4, norm="tensor")


@kernel
def slots_kernel(p_cu, p_row, p_count, T, N, C: tl.constexpr):
    """The place of every chunk slot."""
    i = tl.program_id(0)
    row, count = chunk_place(p_cu, i, 0, T, 1, N, C)
    tl.store(p_row + i, row)
    tl.store(p_count + i, count)


def test_chunk_slots_cover_every_token_once():
    C = 4
    for lengths in ([0, 1, 3, 4, 5, 8, 0], [7], [0], [0, 0, 9, 0], [1] * 20, [16, 16]):
        cu = torch.tensor([0, *itertools.accumulate(lengths)])
        slots = int(cu[-1]) // C + len(lengths)
        row, count = torch.full((2, slots), -99, dtype=torch.int64)
        slots_kernel[(slots,)](cu, row, count, int(cu[-1]), len(lengths), C)
        seen = [int(r) + t for r, n in zip(row, count, strict=True) for t in range(min(int(n), C))]
        assert sorted(seen) == list(range(sum(lengths)))


@pytest.mark.parametrize("stage", STAGES)
def test_compiles_for_hopper(stage):
    """K = V = 64 in bfloat16, the size that was tuned; `make compile-check` has the others."""
    x = delta_inputs(1, 64, 2, 64, 64, dtype=torch.bfloat16)
    with recorded("sm_90") as launches:
        forward, backward = call(x), call(x)
        kept = forward.forward()[2]
        backward.backward(torch.ones_like(x.v), torch.ones_like(x.initial_state), kept)
    names = [launch.kernel.__name__.removesuffix("_tied_kernel") for launch in launches]
    assert names == ["prepare", "scan", "scan", "reverse_scan", "grads"]
    report = compile_launch(launches[STAGES.index(stage)], "sm_90")
    assert report.spilled <= SPILL_BUDGET["sm_90"], report
    assert report.tensor_core > 0
    assert report.shared <= SHARED_LIMIT["sm_90"] // 2, f"not two programs at a time: {report}"


def call(x: Inputs):
    """The launches of one call."""
    options = {"initial_state": x.initial_state, "cu_seqlens": None, "scale": None}
    return delta_chunk_call(*x[:4], **options)


@kernel
def far_kernel(p_out, slot, T, C: tl.constexpr):
    """The first row of one chunk slot of a dense batch of three sequences."""
    row, count = chunk_place(None, slot + tl.program_id(0), 0, T, 1, 3, C)
    tl.store(p_out, row)
    tl.store(p_out + 1, count)


def test_rows_of_chunks_beyond_two_to_the_31():
    out = torch.zeros(2, dtype=torch.int64)
    far_kernel[(1,)](out, 2 * 2**24 + 5, 2**30, 64)
    assert out.tolist() == [2**31 + 5 * 64, 2**30 - 5 * 64]


def test_many_heads_need_one_grid_axis():
    x = delta_inputs(1, 1, 70_000, 1, 1, dtype=torch.float16)
    with recorded() as launches:
        this = call(x)
        this.backward(torch.ones_like(x.v), None, this.forward()[2])
    assert [launch.grid for launch in launches] == [(70_000,)] * 5
