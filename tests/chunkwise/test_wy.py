"""The chunk form in PyTorch, step by step: each step against its definition, the whole against the token loop."""

from itertools import pairwise

import pytest
import torch

from gdr_teach import delta_rule, gated_delta_rule
from gdr_teach.chunkwise import wy
from gdr_teach.testing import assert_rows_close, delta_inputs, delta_oracle, gated_inputs

SIZES = [
    (2, 7, 2, 5, 3, 4),
    (1, 1, 1, 1, 1, 1),
    (1, 12, 3, 4, 6, 4),
    (2, 3, 1, 4, 4, 8),
]  # B, T, H, K, V, C
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def drawn(size, *, decay: bool, requires_grad: bool = False):
    """Operands of the chunk map that are nobody's q and k, and a state."""
    B, T, H, K, V, C = size
    shape = (-(-T // C), B * H)
    randn = lambda *end: torch.randn(*shape, *end, dtype=torch.float64)
    x = wy.Chunks(
        *(randn(C, K) for _ in range(3)),
        randn(C, V),
        torch.rand(*shape, C, 1, dtype=torch.float64),
        randn(C, C).tril(),
        randn(C, C).tril(-1),
        torch.rand(*shape, K, 1, dtype=torch.float64) if decay else None,
    )
    S = torch.randn(B * H, K, V, dtype=torch.float64)
    if requires_grad:
        x = wy.Chunks(*(y if y is None else y.requires_grad_() for y in x))
        S.requires_grad_()
    return x, S


@every_size
def test_there_and_back(size):
    B, T, H, K, _, C = size
    x = torch.randn(B, T, H, K, dtype=torch.float64)
    y = wy.chunks(x, C)
    assert y.shape == (-(-T // C), B * H, C, K)
    back = torch.full_like(x, torch.nan)
    wy.put(y, back)
    assert torch.equal(back, x)
    assert torch.equal(y[0, 0, 0], x[0, 0, 0])
    assert y.numel() == x.numel() or not y[-1, :, T % C :].any()  # filled up with zeros


@every_size
def test_the_inverse(size):
    x, _ = drawn(size, decay=False)
    M = torch.eye(size[-1], dtype=torch.float64) + x.L * x.beta.mT
    got = wy.inverse(x.L, x.beta) @ M
    assert_rows_close(got, torch.eye(size[-1], dtype=torch.float64).expand_as(got), rtol=1e-10)


@every_size
@pytest.mark.parametrize("decay", [False, True])
def test_one_error_after_the_other(size, decay):
    x, S = drawn(size, decay=decay)
    O, last, kept = wy.forward(x, S, 0.5)
    for n in range(len(x.V)):
        R = torch.zeros_like(x.V[n])
        for i in range(size[-1]):  # (6.2), token by token
            r = x.V[n, :, i] - (x.K[n, :, i, None] @ S)[:, 0]
            for j in range(i):
                r = r - x.L[n, :, i, j, None] * x.beta[n, :, j] * R[:, j]
            R[:, i] = r
        U = x.beta[n] * R
        assert_rows_close(kept.R[n], R, rtol=1e-9, name="R")
        assert_rows_close(O[n], 0.5 * (x.Q[n] @ S + x.A[n] @ U), rtol=1e-9, name="O")
        S = (S if x.fade is None else x.fade[n] * S) + x.W[n].mT @ U
    assert_rows_close(last, S, rtol=1e-9, name="state")


@every_size
@pytest.mark.parametrize("decay", [False, True])
def test_the_backward_is_the_gradient(size, decay):
    x, S = drawn(size, decay=decay, requires_grad=True)
    O, last, kept = wy.forward(x, S, 0.5)
    dO, D = torch.randn_like(O), torch.randn_like(last)
    leaves = [y for y in (*x, S) if y is not None]
    wants = torch.autograd.grad((O, last), leaves, (dO, D))
    with torch.no_grad():
        grads, dS = wy.backward(x, kept, 0.5 * dO, D)
    got = [g for g in (*grads, dS) if g is not None]
    got[5], got[6] = got[5].tril(), got[6].tril(-1)  # dA and dL, where A and L are
    wants = (*wants[:5], wants[5].tril(), wants[6].tril(-1), *wants[7:])
    names = (*(n for n, y in zip(grads._fields, x, strict=True) if y is not None), "dS")
    for name, g, w in zip(names, got, wants, strict=True):
        assert_rows_close(g, w, rtol=1e-8, name=name)


def test_the_delta_rule_by_hand():
    x = delta_inputs(1, 7, 2, 5, 3, keys="cos0.9", beta=2.0)
    Q, K, V, b = (wy.chunks(y, 4) for y in (x.q, x.k, x.v, x.beta[..., None]))
    operands = wy.Chunks(Q, K, K, V, b, (Q @ K.mT).tril(), (K @ K.mT).tril(-1))
    O, last, _ = wy.forward(operands, x.initial_state.flatten(0, 1), 5**-0.5)
    want = delta_oracle(*x[:4], initial_state=x.initial_state)
    o = torch.full_like(x.v, torch.nan)
    wy.put(O, o)
    assert_rows_close(o, want.o, rtol=1e-12, name="o")
    assert_rows_close(last[None], want.state, rtol=1e-12, name="state")


@pytest.mark.parametrize("T", [0, 1, 7, 32, 33])
def test_segments_are_whole_chunks_that_cover_the_sequence(T, monkeypatch):
    q, v = torch.zeros(2, T, 3, 4), torch.zeros(2, T, 3, 5)
    for numbers, chunks in ((1, 1), (2 * 3 * 5 * 8 * 2, 2), (1 << 30, 1 << 20)):
        monkeypatch.setattr(wy, "SEGMENT", numbers)
        got = wy.segments(q, v, 8)
        assert got[0].start == 0
        assert got[-1].stop == T
        assert all(s.stop == t.start for s, t in pairwise(got))
        assert all(s.stop - s.start == 8 * chunks for s in got[:-1])
        assert got[-1].stop - got[-1].start <= 8 * chunks


@pytest.mark.parametrize("per", [None, "head", "channel"])
def test_segments_change_no_bit(per, monkeypatch):
    x = gated_inputs(2, 101, 2, 5, 3, per=per or "head")
    rule, operands = (gated_delta_rule, x[:5]) if per else (delta_rule, x[:4])

    def run():
        leaves = [y.clone().requires_grad_() for y in operands]
        o, state = rule(*leaves, initial_state=x.initial_state, backend="torch", mode="chunk")
        return o, state, *torch.autograd.grad((o.sum(), (state**2).sum()), leaves)

    want = run()
    monkeypatch.setattr(wy, "SEGMENT", 1)
    assert all(torch.equal(x, y) for x, y in zip(run(), want, strict=True))
