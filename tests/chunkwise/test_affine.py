"""The chunk form with free directions, step by step: each step from its definition, token after token."""

from itertools import pairwise

import pytest
import torch

from gdr_teach.chunkwise import affine, wy
from gdr_teach.dplr.reference import chunk_operands, dplr_chunkwise
from gdr_teach.dplr.transpose import dplr_chunkwise_backward
from gdr_teach.testing import assert_rows_close, dplr_inputs, dplr_oracle

SIZES = [
    (2, 7, 2, 5, 3, 4),
    (1, 1, 1, 1, 1, 1),
    (1, 12, 3, 4, 6, 4),
    (2, 3, 1, 4, 4, 8),
]  # B, T, H, K, V, C
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
with_and_without = pytest.mark.parametrize("decay", [False, True])


def drawn(size, *, decay: bool, requires_grad: bool = False):
    """Operands and scores of the chunk map that belong to no rule, and a state."""
    B, T, H, K, V, C = size
    shape = (-(-T // C), B * H)
    randn = lambda *end: torch.randn(*shape, *end, dtype=torch.float64)
    fade = torch.rand(*shape, K, 1, dtype=torch.float64) if decay else None
    x = affine.Chunks(*(randn(C, K) for _ in range(4)), randn(C, V), fade)
    lower, strictly = [randn(C, C).tril() for _ in range(2)], [randn(C, C).tril(-1) for _ in "12"]
    s, S = affine.Scores(*lower, *strictly), torch.randn(B * H, K, V, dtype=torch.float64)
    for y in (*x, *s, S) if requires_grad else ():
        if y is not None:
            y.requires_grad_()
    return x, s, S


@every_size
def test_the_inverse(size):
    _, s, _ = drawn(size, decay=False)
    eye = torch.eye(size[-1], dtype=torch.float64).expand_as(s.AB)
    assert_rows_close(affine.inverse(s.AB) @ (eye - s.AB), eye, rtol=1e-10)


@every_size
@with_and_without
def test_one_read_after_the_other(size, decay):
    x, s, S = drawn(size, decay=decay)
    O, last, kept = affine.forward(x, s, S, 0.5)
    for n in range(len(x.V)):
        U = torch.zeros_like(x.V[n])
        for i in range(size[-1]):  # (6.22), token by token
            U[:, i] = (x.A[n, :, i, None] @ S)[:, 0]
            for j in range(i):
                U[:, i] += s.AB[n, :, i, j, None] * U[:, j] + s.AK[n, :, i, j, None] * x.V[n, :, j]
        o = 0.5 * (x.Q[n] @ S + s.QB[n] @ U + s.QK[n] @ x.V[n])
        assert_rows_close(kept.U[n], U, rtol=1e-9, name="U")
        assert_rows_close(O[n], o, rtol=1e-9, name="O")
        S = (S if x.fade is None else x.fade[n] * S) + x.B[n].mT @ U + x.K[n].mT @ x.V[n]
    assert_rows_close(last, S, rtol=1e-9, name="state")


@every_size
@with_and_without
def test_the_backward_is_the_gradient(size, decay):
    x, s, S = drawn(size, decay=decay, requires_grad=True)
    O, last, kept = affine.forward(x, s, S, 0.5)
    dO, D = torch.randn_like(O), torch.randn_like(last)
    leaves = {n: y for n, y in (x._asdict() | s._asdict() | {"S": S}).items() if y is not None}
    wants = torch.autograd.grad((O, last), tuple(leaves.values()), (dO, D))
    with torch.no_grad():
        d, ds, dS = affine.backward(x, kept, 0.5 * dO, D)
    got = [y for y in (*d, *ds, dS) if y is not None]
    lower = {"QB": 0, "QK": 0, "AB": -1, "AK": -1}  # scores: where they are
    for name, *pair in zip(leaves, got, wants, strict=True):
        g, w = (y.tril(lower[name]) if name in lower else y for y in pair)
        assert_rows_close(g, w, rtol=1e-8, name=f"d{name}")


@every_size
def test_scores_that_are_products_and_their_gradients(size):
    x, _, _ = drawn(size, decay=False, requires_grad=True)
    s = affine.scores(x)
    wants = ((x.Q, x.B, 0), (x.Q, x.K, 0), (x.A, x.B, -1), (x.A, x.K, -1))
    for got, (rows, columns, below) in zip(s, wants, strict=True):
        want = torch.einsum("nhik,nhjk->nhij", rows, columns).tril(below)
        assert_rows_close(got, want, rtol=1e-13, name="scores")
    ds = affine.Scores(*(torch.randn_like(y) for y in s))
    wanted = torch.autograd.grad(tuple(s), x[:4], tuple(ds))
    nothing = affine.Chunks(*(torch.zeros_like(y) for y in x[:5]))
    with torch.no_grad():
        found = affine.scores_backward(x, nothing, ds)
    for name, got, want in zip(("dq", "da", "db", "dk"), found, wanted, strict=True):
        assert_rows_close(got, want, rtol=1e-12, name=name)


def test_the_rule_by_hand():
    x = dplr_inputs(1, 7, 2, 5, 3, keys="cos0.9")
    operands, scores = chunk_operands(*x[:-1], dtype=torch.float64, C=4)
    O, last, _ = affine.forward(operands, scores, x.initial_state.flatten(0, 1), 5**-0.5)
    want = dplr_oracle(*x[:-1], initial_state=x.initial_state)
    o = torch.full_like(x.v, torch.nan)
    wy.put(O, o)
    assert_rows_close(o, want.o, rtol=1e-12, name="o")
    assert_rows_close(last[None], want.state, rtol=1e-12, name="state")


@pytest.mark.parametrize("per", [None, "head", "channel"])
def test_segments_change_no_bit(per, monkeypatch):
    x = dplr_inputs(2, 101, 2, 5, 3, per=per or "head")
    operands = x[:6] if per else x[:5]
    do, dstate = torch.randn_like(x.v), torch.randn_like(x.initial_state)
    options = {"initial_state": x.initial_state, "chunk_size": 8}

    def run():
        out = dplr_chunkwise(*operands, **options)
        return *out, *dplr_chunkwise_backward(do, *operands, dstate=dstate, **options)

    want = run()
    monkeypatch.setattr(wy, "SEGMENT", 1)
    parts = wy.segments(x.q, x.v, 8)
    assert len(parts) == 13
    assert all(s.stop == t.start for s, t in pairwise(parts))
    assert all(torch.equal(y, z) for y, z in zip(run(), want, strict=True))
