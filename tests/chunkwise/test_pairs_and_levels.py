"""Decay between the tokens of a chunk, in PyTorch, from its definition: gates added up pair by pair."""

import pytest
import torch

from gdr_teach.chunkwise import levels, pairs
from gdr_teach.testing import assert_rows_close

every_size = pytest.mark.parametrize("C", [1, 2, 3, 8, 13])
both = pytest.mark.parametrize(
    ("decay", "width"), [(pairs, 1), (levels, 4)], ids=["a head", "a channel"]
)
NAMES = ("Q", "K", "W", "whole", "A", "L")


def pairwise(x, y, g):
    """A_ij = x_i^T exp(g_(j, i]) y_j for i >= j."""
    C = x.shape[-2]
    A = x.new_zeros(*x.shape[:-2], C, C)
    for i in range(C):
        for j in range(i + 1):
            A[..., i, j] = (x[..., i, :] * g[..., j + 1 : i + 1, :].sum(-2).exp() * y[..., j, :]).sum(-1)  # fmt: skip
    return A


def by_definition(q, k, g):
    """(5.6) and (5.7), each exponent a sum of the gates that are crossed."""
    C = g.shape[-2]
    upto = torch.stack([g[..., : i + 1, :].sum(-2) for i in range(C)], dim=-2).exp()
    after = torch.stack([g[..., j + 1 :, :].sum(-2) for j in range(C)], dim=-2).exp()
    whole = g.sum(-2, keepdim=True).exp().mT
    return upto * q, upto * k, after * k, whole, pairwise(q, k, g), pairwise(k, k, g).tril(-1)


def drawn(C, width, gate=None):
    q, k = torch.randn(2, 3, 2, C, 4, dtype=torch.float64).unbind()
    g = -torch.rand(3, 2, C, width, dtype=torch.float64)
    return q, k, g if gate is None else torch.full_like(g, gate)


def ours(decay, q, k, g):
    f = decay.fade(q, k, g)
    return f, (f.Q, f.K, f.W, f.whole, *decay.scores(q, k, f, torch.float64))


@every_size
@both
@pytest.mark.parametrize("gate", [None, 0.0, -20.0, -1e4, -torch.inf])
def test_operands_and_scores(decay, width, C, gate):
    q, k, g = drawn(C, width, gate)
    for name, got, want in zip(NAMES, ours(decay, q, k, g)[1], by_definition(q, k, g), strict=True):
        if want.any():
            assert_rows_close(got, want, rtol=1e-13, name=name)
        else:
            assert torch.equal(got, want), name


@every_size
@both
def test_their_gradients(decay, width, C):
    leaves = [z.requires_grad_() for z in drawn(C, width)]
    wanted = by_definition(*leaves)
    given = [torch.randn_like(x) for x in wanted]
    wants = torch.autograd.grad(wanted, leaves, given)
    with torch.no_grad():
        q, k, _ = leaves
        f, _ = ours(decay, *leaves)
        got = decay.backward(q, k, f, tuple(given[:4]), *given[4:])
    for name, x, want in zip(("dq", "dk", "dg"), got, wants, strict=True):
        assert_rows_close(x, want, rtol=1e-12, name=name)


@both
def test_a_gradient_beyond_a_reset_is_right(decay, width):
    """exp(-inf) = 0: what is behind it has no part, and nothing is nan."""
    q, k, g = drawn(8, width)
    g[..., 3, :] = -torch.inf
    with torch.no_grad():
        f, found = ours(decay, q, k, g)
        given = [torch.randn_like(x) for x in found]
        got = decay.backward(q, k, f, tuple(x.clone() for x in given[:4]), *given[4:])
    leaves = [z.clone().requires_grad_() for z in (q, k, g.clamp_min(-2000.0))]
    wants = torch.autograd.grad(by_definition(*leaves), leaves, given)
    for name, x, want in zip(("dq", "dk", "dg"), got, wants, strict=True):
        assert_rows_close(x, want, rtol=1e-12, name=name)


def test_corners_are_a_view_that_covers_every_pair_once():
    seen = torch.eye(16).repeat(3, 1, 1)
    for h in (1, 2, 4, 8):
        levels.corners(seen, h).add_(1)
    assert torch.equal(seen, torch.ones(16, 16).tril().expand_as(seen))


@both
def test_a_score_depends_on_no_later_gate(decay, width):
    q, k, g = drawn(16, width)
    before = ours(decay, q, k, g)[1][4:]
    for t in (1, 7, 8, 15):
        other = torch.cat([g[..., :t, :], 3 * g[..., t:, :]], dim=-2)
        after = ours(decay, q, k, other)[1][4:]
        assert all(
            torch.equal(x[..., :t, :], y[..., :t, :]) for x, y in zip(before, after, strict=True)
        )
        assert not torch.equal(before[0][..., t, :], after[0][..., t, :])


@both
@pytest.mark.parametrize("lead", [(0, 2), (2, 0)])
def test_no_chunk_at_all(decay, width, lead):
    q, k = torch.zeros(2, *lead, 8, 4).unbind()
    f = decay.fade(q, k, torch.zeros(*lead, 8, width))
    A, L = decay.scores(q, k, f, torch.float64)
    given = tuple(torch.zeros_like(x) for x in (f.Q, f.K, f.W, f.whole))
    dq, dk, dg = decay.backward(q, k, f, given, A, L.float())
    assert A.shape == L.shape == (*lead, 8, 8)
    assert dq.shape == dk.shape == (*lead, 8, 4)
    assert dg.shape == (*lead, 8, width)
