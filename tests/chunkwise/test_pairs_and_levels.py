"""Decay between the tokens of a chunk, in PyTorch, from its definition: gates added up pair by pair."""

import pytest
import torch

from gdr_teach.chunkwise import levels, pairs
from gdr_teach.testing import assert_rows_close

every_size = pytest.mark.parametrize("C", [1, 2, 3, 8, 13])
both = pytest.mark.parametrize(
    ("decay", "width"), [(pairs, 1), (levels, 4)], ids=["a head", "a channel"]
)


def pairwise(x, y, g):
    """A_ij = x_i^T exp(g_(j, i]) y_j for i >= j."""
    C = x.shape[-2]
    A = x.new_zeros(*x.shape[:-2], C, C)
    for i in range(C):
        for j in range(i + 1):
            A[..., i, j] = (x[..., i, :] * g[..., j + 1 : i + 1, :].sum(-2).exp() * y[..., j, :]).sum(-1)  # fmt: skip
    return A


def drawn(C, width):
    q, k = torch.randn(2, 3, C, 4, dtype=torch.float64).unbind()
    return q, k, -torch.rand(3, C, width, dtype=torch.float64)


@every_size
@both
def test_scores(decay, width, C):
    q, k, g = drawn(C, width)
    A, L = decay.decayed_scores(q, k, decay.factors(g), torch.float64)
    assert_rows_close(A, pairwise(q, k, g), rtol=1e-13, name="A")
    assert_rows_close(L, pairwise(k, k, g).tril(-1), rtol=1e-13, name="L")


@every_size
@both
def test_their_gradients(decay, width, C):
    leaves = [z.requires_grad_() for z in drawn(C, width)]
    q, k, g = leaves
    A, L = pairwise(q, k, g), pairwise(k, k, g).tril(-1)
    dA, dL = torch.randn_like(A), torch.randn_like(L)
    wants = torch.autograd.grad((A, L), leaves, (dA, dL), allow_unused=True)
    with torch.no_grad():
        dq, dk, dsums = decay.decayed_scores_backward(dA, dL, q, k, decay.factors(g))
        none = torch.zeros_like(g)
        dg = decay.sums_backward(dsums, none.clone(), none.clone(), none[..., :1, :])
    for name, got, want in zip(("dq", "dk", "dg"), (dq, dk, dg), wants, strict=True):
        assert_rows_close(
            got, torch.zeros_like(got) if want is None else want, rtol=1e-12, name=name
        )


@every_size
@both
def test_factors_of_the_whole_chunk_and_their_gradients(decay, width, C):
    g = drawn(C, width)[2].requires_grad_()
    f = decay.factors(g)
    upto = g.cumsum(-2)
    want = upto.exp(), (upto[..., -1:, :] - upto).exp(), upto[..., -1:, :].exp()
    got = f.from_start[..., :C, :], f.to_end[..., :C, :], f.whole.mT
    back = [torch.randn_like(x) for x in want]
    for name, x, y in zip(("from_start", "to_end", "whole"), got, want, strict=True):
        assert_rows_close(x, y, rtol=1e-13, name=name)
    (dg,) = torch.autograd.grad(want, g, back)
    if decay is levels:
        none = [(torch.zeros_like(x), torch.zeros_like(y)) for x, y in f.levels]
    else:
        none = torch.zeros_like(f.E)
    exponents = [x.detach() * y for x, y in zip(want, back, strict=True)]
    assert_rows_close(decay.sums_backward(none, *exponents), dg, rtol=1e-12, name="dg")


def test_corners_are_a_view_that_covers_every_pair_once():
    seen = torch.eye(16).repeat(3, 1, 1)
    for h in (1, 2, 4, 8):
        levels.corners(seen, h).add_(1)
    assert torch.equal(seen, torch.ones(16, 16).tril().expand_as(seen))


@both
def test_a_score_depends_on_no_later_gate(decay, width):
    q, k, g = drawn(16, width)
    before = decay.decayed_scores(q, k, decay.factors(g), torch.float64)
    for t in (1, 7, 8, 15):
        other = torch.cat([g[:, :t], 3 * g[:, t:]], dim=1)
        after = decay.decayed_scores(q, k, decay.factors(other), torch.float64)
        assert all(torch.equal(x[:, :t], y[:, :t]) for x, y in zip(before, after, strict=True))
        assert not torch.equal(before[0][:, t], after[0][:, t])
