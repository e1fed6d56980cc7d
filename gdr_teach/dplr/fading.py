"""Decay between the tokens of a chunk where reads and writes have directions of their own, in plain PyTorch.

A query reads the state after its token, a_i the state before it, undecayed by it; writes start to fade with the next
token. With g_(j, i] the sum of the gates after token j up to i, and g_[j, i) that of the same without g_i itself,

    QB_ij = q_i^T exp(g_(j, i]) b_j,  i >= j         AB_ij = a_i^T exp(g_(j, i-1]) b_j,  i > j        (5.26)

and the same with k in place of b. `chunkwise.levels` says why pairs are sorted by halving. Here too: cut a block in
two, the second half reads what the first half wrote, and either exponent has two parts, summed from the cut,

    g_(j, i] = g_(j, cut] + g_(cut, i]        g_(j, i-1] = g_(j, cut] + g_(cut, i-1]                  (5.27)

So q and a differ in the smallest block only, of one token: q_i begins with exp(g_i), a_i with 1. From there on both
are multiplied by the whole factor of every first half that they read through, and b and k by that of the second
halves. At the end they are Q~, A~, B^, K^ of (5.25). The backward takes the same factors from the largest block down:
a gate's gradient is a sum over what crosses its block, each an exponent's factor times the factor's gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..chunkwise.affine import Chunks, Scores
from ..chunkwise.levels import corners, flat, halves, rows_by_columns


class Level(NamedTuple):
    """Blocks of 2 h tokens: the second halves' rows, the first halves' columns, and both halves' whole factor."""

    q: Tensor  # [blocks, h, K] rows
    a: Tensor  # [blocks, h, K]
    b: Tensor  # [blocks, h, K] columns
    k: Tensor  # [blocks, h, K]
    first: Tensor  # [blocks, 1, K]
    second: Tensor  # [blocks, 1, K]


class Faded(NamedTuple):
    """The operands of the chunk map for q, a, b, k, g [..., C, K], and what lies on the way to them."""

    Q: Tensor  # [..., C, K] exp(g_(start, i]) q_i
    A: Tensor  # [..., C, K] exp(g_(start, i-1]) a_i
    B: Tensor  # [..., C, K] exp(g_(j, end]) b_j
    K: Tensor  # [..., C, K] exp(g_(j, end]) k_j
    whole: Tensor  # [..., K, 1] exp(g_(start, end])
    each: Tensor  # [M, C', K] exp(g_i), C' the next power of two
    levels: list[Level]


def fade(q: Tensor, a: Tensor, b: Tensor, k: Tensor, g: Tensor) -> Faded:
    """The operands for q, a, b, k, g [..., C, K], g <= 0; every level's rows and columns are kept."""
    C = g.shape[-2]
    # of the whole chunk from the sum: a product's rounding would come back in every chunk, always the same way
    total = g.sum(-2, keepdim=True).exp().mT
    each = flat(g).exp()
    faded = [flat(q) * each, *(flat(x).clone() for x in (a, b, k))]
    levels, whole, h = [], each, 1
    while h < each.shape[1]:
        first, second = halves(whole, 1)
        (_, q), (_, a), (b, _), (k, _) = (halves(x, h) for x in faded)
        levels.append(Level(q.clone(), a.clone(), b.clone(), k.clone(), first, second))
        q.mul_(first)
        a.mul_(first)
        b.mul_(second)
        k.mul_(second)
        whole = (first * second).view(len(each), each.shape[1] // (2 * h), each.shape[2])
        h *= 2
    Q, A, B, K = (x[:, :C].unflatten(0, g.shape[:-2]) for x in faded)
    return Faded(Q, A, B, K, total, each, levels)


def scores(q: Tensor, b: Tensor, k: Tensor, f: Faded, exact: torch.dtype) -> Scores:
    """QB and QK in q's dtype, AB and AK in `exact`: (5.26) for the q, b, k [..., C, K] that `fade` had."""
    *lead, C, _ = q.shape
    q, b, k = flat(q), flat(b), flat(k)
    QB, QK = torch.diag_embed((q * b).sum(-1)), torch.diag_embed((q * k).sum(-1))
    AB, AK = (torch.zeros(QB.shape, dtype=exact, device=q.device) for _ in range(2))
    for n, x in enumerate(f.levels):
        a, columns = x.a.to(exact), (x.b.to(exact), x.k.to(exact))
        pairs = ((QB, x.q, x.b), (QK, x.q, x.k), (AB, a, columns[0]), (AK, a, columns[1]))
        for S, rows, column in pairs:
            corner = corners(S, 1 << n)
            corner.copy_(rows_by_columns(rows, column).view(corner.shape))
    return Scores(*(x[..., :C, :C].unflatten(0, lead) for x in (QB, QK, AB, AK)))


def backward(
    q: Tensor, b: Tensor, k: Tensor, f: Faded, d: Chunks, dscores: Scores
) -> tuple[Tensor, ...]:
    """dq, da, db, dk, dg [..., C, K] of `fade` and `scores` together, from those of their results; d is used up.

    The gradients of QB, QK [..., C, C] are not read above the diagonal, those of AB, AK not on it.
    """
    assert d.fade is not None
    *lead, C, width = q.shape
    q, b, k, dQ, dA, dB, dK = (flat(x) for x in (q, b, k, d.Q, d.A, d.B, d.K))
    more = q.shape[-2] - C
    dscores = Scores(*(pad(x, (0, more, 0, more)).contiguous().flatten(0, -3) for x in dscores))
    # of the logarithm of each block's whole factor, from the largest block down; a factor's is factor times gradient
    dwhole = (f.whole * d.fade).mT.reshape(-1, 1, width)
    for n, x in reversed(list(enumerate(f.levels))):
        h = 1 << n
        dq, da = (halves(y, h)[1] for y in (dQ, dA))
        db, dk = (halves(y, h)[0] for y in (dB, dK))
        dfirst = (x.q * dq).addcmul_(x.a, da).sum(-2, keepdim=True) * x.first
        dsecond = (x.b * db).addcmul_(x.k, dk).sum(-2, keepdim=True) * x.second
        dwhole = torch.cat([dfirst, dsecond], dim=1).add_(dwhole.view(-1, 1, width))
        dwhole = dwhole.view(len(dQ), dQ.shape[1] // h, width)
        # [blocks, 2 h, 2 h]: rows of q and a on columns of b and k
        on_q, on_a = (
            torch.cat([corners(y, h) for y in pair], dim=-1) for pair in (dscores[:2], dscores[2:])
        )
        S = torch.cat([on_q, on_a], dim=-2).view(-1, 2 * h, 2 * h)
        drows = S @ torch.cat([x.b, x.k], dim=1)
        dcolumns = S.mT @ torch.cat([x.q, x.a], dim=1)
        torch.addcmul(drows[:, :h], dq, x.first, out=dq)
        torch.addcmul(drows[:, h:], da, x.first, out=da)
        torch.addcmul(dcolumns[:, :h], db, x.second, out=db)
        torch.addcmul(dcolumns[:, h:], dk, x.second, out=dk)
    dQ.mul_(f.each)
    dg = torch.addcmul(dwhole, dQ, q)
    on_b, on_k = (y.diagonal(dim1=-2, dim2=-1)[..., None] for y in dscores[:2])  # nothing fades
    dQ.addcmul_(on_b, b).addcmul_(on_k, k)
    dB.addcmul_(on_b, q)
    dK.addcmul_(on_k, q)
    dq, da, db, dk, dg = (y[:, :C].unflatten(0, lead) for y in (dQ, dA, dB, dK, dg))
    return dq, da, db, dk, dg
