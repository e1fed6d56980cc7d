"""Decay of every channel between the tokens of a chunk, in plain PyTorch: `decay.py` is the same inside a kernel.

    A_ij = x_i^T exp(g_(j, i]) y_j,  i >= j          g_(j, i] the gates after token j up to i          (5.7)

exp(g_(start, i] - g_(start, j]) would be one product, but of numbers that overflow, or that agree in all their digits
once the sums are large. So pairs are sorted by halving: cut a block in two, the second half reads what the first half
wrote, and the exponent has two parts on either side of the cut,

    g_(j, i] = g_(j, cut] + g_(cut, i]               both <= 0, both summed from the cut               (5.19)

one for the row and one for the column: a matrix product. Pairs inside one half: the same again, down to one token. A
gate is multiplied in only where a pair really crosses it, so a token's scores depend on nothing later, bit for bit.

From small blocks to large ones the operands fade on the way. In blocks of h tokens

    q_i exp(g_(begin, i])      k_i exp(g_(begin, i])      k_j exp(g_(j, end])      whole = exp(g_(begin, end])

and in blocks of 2 h the second half reads through the first, which fades by the second: the first two are multiplied
by the first half's whole, the third by the second half's. At the end they are Q~, K~ and K^ of (5.6). Turned around,
from the largest block down, the gradients take the same factors, and a gate's gradient is a sum over what crosses its
block: no cumulative sum, and no difference of large numbers anywhere. `pairs` has the same functions for one decay a
head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Level(NamedTuple):
    """Blocks of 2 h tokens: the second halves' rows, the first halves' columns, and both halves' whole."""

    rows: Tensor  # [blocks, 2, h, K] of q and of k
    columns: Tensor  # [blocks, h, K]
    first: Tensor  # [blocks, 1, K]
    second: Tensor  # [blocks, 1, K]


class Faded(NamedTuple):
    """The operands of the chunk map for q, k, g [..., C, K], and what lies on the way to them."""

    Q: Tensor  # [..., C, K] exp(g_(start, i]) q_i
    K: Tensor  # [..., C, K] exp(g_(start, i]) k_i
    W: Tensor  # [..., C, K] exp(g_(j, end]) k_j
    whole: Tensor  # [..., K, 1] exp(g_(start, end])
    each: Tensor  # [M, C', K] exp(g_i), C' the next power of two
    levels: list[Level]


def fade(q: Tensor, k: Tensor, g: Tensor) -> Faded:
    """The operands for q, k, g [..., C, K], g <= 0; every level's rows and columns are kept."""
    C = g.shape[-2]
    # of the whole chunk from the sum: a product's rounding would come back in every chunk, always the same way
    total = g.sum(-2, keepdim=True).exp().mT
    q, k, each = flat(q), flat(k), flat(g).exp()
    Q, K, W, whole = q * each, k * each, k.clone(), each
    levels, h = [], 1
    while h < Q.shape[1]:
        first, second = halves(whole, 1)
        (_, q_rows), (_, k_rows), (columns, _) = (halves(x, h) for x in (Q, K, W))
        levels.append(Level(torch.stack([q_rows, k_rows], dim=1), columns.clone(), first, second))
        q_rows.mul_(first)
        k_rows.mul_(first)
        columns.mul_(second)
        h *= 2
        whole = (first * second).view(len(Q), Q.shape[1] // h, Q.shape[2])
    Q, K, W = (x[:, :C].unflatten(0, g.shape[:-2]) for x in (Q, K, W))
    return Faded(Q, K, W, total, each, levels)


def scores(q: Tensor, k: Tensor, f: Faded, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """A in q's dtype and L, strictly lower, in `exact`: (5.7) for the q, k [..., C, K] that `fade` had.

    L is summed in more digits from factors as they are: without decay they are exactly 1, with it errors fade as well.
    """
    *lead, C, _ = q.shape
    q, k = flat(q), flat(k)
    A = torch.diag_embed((q * k).sum(-1))
    L = torch.zeros(A.shape, dtype=exact, device=A.device)
    for n, level in enumerate(f.levels):
        A_h, L_h = corners(A, 1 << n), corners(L, 1 << n)
        A_h.copy_(rows_by_columns(level.rows[:, 0], level.columns).view(A_h.shape))
        pairs = rows_by_columns(level.rows[:, 1].to(exact), level.columns.to(exact))
        L_h.copy_(pairs.view(L_h.shape))
    return A[..., :C, :C].unflatten(0, lead), L[..., :C, :C].unflatten(0, lead)


def backward(
    q: Tensor, k: Tensor, f: Faded, d: tuple[Tensor, ...], dA: Tensor, dL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dg [..., C, K] of `fade` and `scores` together, from d: the gradients of Q, K, W and whole; all used up.

    dA, dL [..., C, C] are not read above the diagonal, dL not on it.
    """
    *lead, C, width = q.shape
    q, k, dQ, dK, dW = (flat(x) for x in (q, k, *d[:3]))
    if more := q.shape[-2] - C:
        dA, dL = (pad(z, (0, more, 0, more)) for z in (dA, dL))
    dA, dL = (z.contiguous().flatten(0, -3) for z in (dA, dL))
    # of the logarithm of each block's whole factor, from the largest block down; a factor's is factor times gradient
    dwhole = (f.whole * d[3]).mT.reshape(len(dQ), 1, width)
    for n, (rows, columns, first, second) in reversed(list(enumerate(f.levels))):
        h = 1 << n
        (_, dQ_rows), (_, dK_rows), (dcolumns, _) = (halves(x, h) for x in (dQ, dK, dW))
        dfirst = (rows[:, 0] * dQ_rows).addcmul_(rows[:, 1], dK_rows).sum(-2, keepdim=True) * first
        dsecond = (columns * dcolumns).sum(-2, keepdim=True) * second
        both = torch.cat([dfirst, dsecond], dim=1).add_(dwhole.view(len(rows), 1, width))
        dwhole = both.view(len(dQ), dQ.shape[1] // h, width)
        dscores = torch.cat([corners(dA, h), corners(dL, h)], dim=-2).view(len(rows), 2 * h, h)
        if h > 1:
            drows = (dscores @ columns).view(rows.shape)
            more_dcolumns = dscores.mT @ rows.view(len(rows), 2 * h, width)
        else:  # no matrix product for blocks of one row
            drows = dscores[..., None] * columns[:, None]
            more_dcolumns = (dscores[..., None] * rows).sum(1)
        torch.addcmul(drows[:, 0], dQ_rows, first, out=dQ_rows)
        torch.addcmul(drows[:, 1], dK_rows, first, out=dK_rows)
        torch.addcmul(more_dcolumns, dcolumns, second, out=dcolumns)
    dQ.mul_(f.each)
    dK.mul_(f.each)
    dg = torch.addcmul(dwhole, dQ, q).addcmul_(dK, k)
    diagonal = dA.diagonal(dim1=-2, dim2=-1)[..., None]  # A's, where nothing fades
    dq, dk = dQ.addcmul_(diagonal, k), dK.add_(dW).addcmul_(diagonal, q)
    dq, dk, dg = (x[:, :C].unflatten(0, lead) for x in (dq, dk, dg))
    return dq, dk, dg


def flat(x: Tensor) -> Tensor:
    """[..., C, D] as a contiguous [M, C', D], filled up with zeros to the next power of two of tokens."""
    C = x.shape[-2]
    more = (1 << (C - 1).bit_length()) - C
    return (pad(x, (0, 0, 0, more)) if more else x.contiguous()).flatten(0, -3)


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """Views of a contiguous [M, C, D] in blocks of 2 h tokens: their first and second halves, each [blocks, h, D]."""
    M, C, D = x.shape
    blocks = x.view(M * (C // (2 * h)), 2, h, D)
    return blocks[:, 0], blocks[:, 1]


def corners(A: Tensor, h: int) -> Tensor:
    """A view of a contiguous A [M, C, C]: rows of second halves, columns of their first [M, C / 2h, h, h]."""
    M, C, _ = A.shape
    strides = (C * C, 2 * h * (C + 1), C, 1)
    return A.as_strided((M, C // (2 * h), h, h), strides, A.storage_offset() + h * C)


def rows_by_columns(x: Tensor, y: Tensor) -> Tensor:
    """x y^T for [blocks, h, K]: without a matrix product for blocks of one row."""
    return x @ y.mT if x.shape[-2] > 1 else (x * y).sum(-1, keepdim=True)
