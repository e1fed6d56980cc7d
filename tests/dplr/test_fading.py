"""Decay between the tokens of a chunk for free directions, from its definition: gates added up pair by pair."""

import pytest
import torch

from gdr_teach.chunkwise.affine import Chunks, Scores
from gdr_teach.dplr import fading
from gdr_teach.testing import assert_rows_close

every_size = pytest.mark.parametrize("C", [1, 2, 3, 8, 13])
NAMES = ("Q", "A", "B", "K", "whole", "QB", "QK", "AB", "AK")


def pairwise(x, y, g, *, own: bool):
    """x_i^T exp(the gates after token j up to i, i's own or not) y_j."""
    C = x.shape[-2]
    S = x.new_zeros(*x.shape[:-2], C, C)
    for i in range(C):
        for j in range(i + own):
            crossed = g[..., j + 1 : i + own, :].sum(-2).exp()
            S[..., i, j] = (x[..., i, :] * crossed * y[..., j, :]).sum(-1)
    return S


def by_definition(q, a, b, k, g):
    """(5.25) and (5.26), each exponent a sum of the gates that are crossed."""
    C = g.shape[-2]
    upto = torch.stack([g[..., : i + 1, :].sum(-2) for i in range(C)], dim=-2).exp()
    before = torch.stack([g[..., :i, :].sum(-2) for i in range(C)], dim=-2).exp()
    after = torch.stack([g[..., j + 1 :, :].sum(-2) for j in range(C)], dim=-2).exp()
    whole = g.sum(-2, keepdim=True).exp().mT
    pairs = [pairwise(x, y, g, own=x is q) for x in (q, a) for y in (b, k)]
    return upto * q, before * a, after * b, after * k, whole, *pairs


def drawn(C, gate=None):
    x = torch.randn(4, 3, 2, C, 4, dtype=torch.float64).unbind()
    g = -torch.rand(3, 2, C, 4, dtype=torch.float64)
    return *x, g if gate is None else torch.full_like(g, gate)


def ours(q, a, b, k, g):
    f = fading.fade(q, a, b, k, g)
    scores = fading.scores(q, b, k, f, torch.float64)
    return f, (f.Q, f.A, f.B, f.K, f.whole, *scores)


def our_gradients(q, a, b, k, g, given):
    with torch.no_grad():
        f, _ = ours(q, a, b, k, g)
        dQ, dA, dB, dK, dwhole, *dscores = (x.clone() for x in given)
        none = torch.zeros(0)
        d = Chunks(dQ, dA, dB, dK, none, dwhole)
        return fading.backward(q, b, k, f, d, Scores(*dscores))


@every_size
@pytest.mark.parametrize("gate", [None, 0.0, -20.0, -1e4, -torch.inf])
def test_operands_and_scores(C, gate):
    x = drawn(C, gate)
    for name, got, want in zip(NAMES, ours(*x)[1], by_definition(*x), strict=True):
        if want.any():
            assert_rows_close(got, want, rtol=1e-13, name=name)
        else:
            assert torch.equal(got, want), name


@every_size
def test_their_gradients(C):
    leaves = [x.requires_grad_() for x in drawn(C)]
    wanted = list(by_definition(*leaves))
    given = [torch.randn_like(x) for x in wanted]
    wanted[7:] = [S + 0 * leaves[1].sum() for S in wanted[7:]]  # one token: no pair, no graph
    wants = torch.autograd.grad(wanted, leaves, given)
    found = our_gradients(*leaves, given)
    for name, got, want in zip(("dq", "da", "db", "dk", "dg"), found, wants, strict=True):
        assert_rows_close(got, want, rtol=1e-12, name=name)


def test_a_gradient_beyond_a_reset_is_right():
    """exp(-inf) = 0: what is behind it has no part, and nothing is nan."""
    *x, g = drawn(8)
    g[..., 3, :] = -torch.inf
    leaves = [y.clone().requires_grad_() for y in (*x, g.clamp_min(-2000.0))]
    wanted = by_definition(*leaves)
    given = [torch.randn_like(y) for y in wanted]
    wants = torch.autograd.grad(wanted, leaves, given)
    found = our_gradients(*x, g, given)
    for name, got, want in zip(("dq", "da", "db", "dk", "dg"), found, wants, strict=True):
        assert_rows_close(got, want, rtol=1e-12, name=name)


def test_a_score_depends_on_no_later_gate_and_that_of_a_not_on_its_own():
    *x, g = drawn(16)
    before = ours(*x, g)[1][5:]
    for t in (1, 7, 8, 15):
        after = ours(*x, torch.cat([g[..., :t, :], 3 * g[..., t:, :]], dim=-2))[1][5:]
        for name, one, other in zip(NAMES[5:], before, after, strict=True):
            known = t + (name in ("AB", "AK"))
            assert torch.equal(one[..., :known, :], other[..., :known, :]), name
            if known < 16:
                assert not torch.equal(one[..., known, :], other[..., known, :]), name
