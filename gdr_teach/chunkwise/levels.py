"""Decay between the tokens of a chunk in plain PyTorch: `decay.py` is the same inside a kernel.

    A_ij = x_i^T exp(g_(j, i]) y_j,  i >= j          g_(j, i] the gates after token j up to i          (5.7)

exp(g_(start, i] - g_(start, j]) would be one product, but of numbers that overflow, or that agree in all their digits
once the sums are large. So pairs are sorted by halving: cut a block in two, the second half reads what the first half
wrote, and the exponent has two parts on either side of the cut,

    g_(j, i] = g_(j, cut] + g_(cut, i]               both <= 0, both summed from the cut               (5.19)

one for the row and one for the column: a matrix product. Pairs inside one half: the same again, down to one token. A
gate is summed only where a pair really crosses it, so a token's scores depend on nothing later, bit for bit.

The factors of all levels come by doubling. In blocks of h tokens keep the factor up to each token (upto) and the one
after it (after); twice as long a block multiplies the second half's upto by the first half's whole factor, and the
first half's after by the second half's. Turned around, from the largest block down, that is the gradient of g: no
cumulative sum, and no difference of large numbers anywhere. `pairs` has the same functions for one decay a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Factors(NamedTuple):
    """exp of the local sums of a chunk's gates [..., C, K], C a power of two."""

    levels: list[tuple[Tensor, Tensor]]  # for h = 1, 2, 4, ...: to_cut and from_cut, [blocks, h, K]
    from_start: Tensor  # [..., C, K] exp(g_(start, i])
    to_end: Tensor  # [..., C, K] exp(g_(j, end])
    whole: Tensor  # [..., K, 1] exp(g_(start, end])


def to_power_of_two(x: Tensor) -> Tensor:
    """[..., C, D] filled up with zeros to the next power of two of tokens."""
    C = x.shape[-2]
    more = (1 << (C - 1).bit_length()) - C
    return pad(x, (0, 0, 0, more)) if more else x.contiguous()


def factors(g: Tensor) -> Factors:
    """The factors of (5.19) at every level, and those of the whole chunk, for g [..., C, K] <= 0."""
    # of the whole chunk from the sum: its rounding would come back in every chunk, always the same way
    g, whole = to_power_of_two(g), g.sum(-2, keepdim=True).exp().mT
    upto = g.exp().clone()  # exp keeps its result for autograd
    after, levels, h = torch.ones_like(upto), [], 1
    while h < upto.shape[-2]:
        to_cut, (first, second) = halves(after, h)[0], halves(upto, h)
        levels.append((to_cut.clone(), second.clone()))
        of_first, of_second = (x[:, -1:].clone() for x in (first, second))  # of the whole halves
        second.mul_(of_first)
        to_cut.mul_(of_second)
        h *= 2
    return Factors(levels, upto, after, whole)


def sums_backward(
    levels: list[tuple[Tensor, Tensor]], dupto: Tensor, dafter: Tensor, dtotal: Tensor
) -> Tensor:
    """dg [..., C, K] from the gradients of every exponent of `factors`.

    Those of to_cut and from_cut at each level, [..., C, K] of from_start and to_end, [..., 1, K] of whole. dupto and
    dafter are used up.
    """
    C = dupto.shape[-2]
    dupto, dafter = to_power_of_two(dupto), to_power_of_two(dafter)
    dupto[..., -1:, :] += dtotal
    for n in reversed(range(len(levels))):
        (before, behind), (first, _) = halves(dupto, 1 << n), halves(dafter, 1 << n)
        dbefore, dbehind = behind.sum(-2), first.sum(-2)
        before[:, -1] += dbefore
        behind[:, -1] += dbehind
        first.add_(levels[n][0])
        behind.add_(levels[n][1])
    return dupto[..., :C, :]


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """Views of a contiguous [..., C, D] in blocks of 2 h tokens: their first and second halves, each [blocks, h, D]."""
    blocks = x.view(-1, 2, h, x.shape[-1])
    return blocks[:, 0], blocks[:, 1]


def corners(A: Tensor, h: int) -> Tensor:
    """A view of a contiguous A [M, C, C]: rows of second halves, columns of their first [M, C / 2h, h, h]."""
    M, C, _ = A.shape
    strides = (C * C, 2 * h * (C + 1), C, 1)
    return A.as_strided((M, C // (2 * h), h, h), strides, A.storage_offset() + h * C)


def rows_by_columns(x: Tensor, y: Tensor) -> Tensor:
    """x y^T for [blocks, h, K]: without a matrix product for blocks of one row."""
    return x @ y.mT if x.shape[-2] > 1 else (x * y).sum(-1, keepdim=True)


def decayed_scores(q: Tensor, k: Tensor, f: Factors, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """A in q's dtype and L in `exact`, (5.7) for q, k [..., C, K] and the factors of their gates.

    L is summed in more digits from factors as they are: without decay they are exactly 1, with it errors fade as well.
    """
    *lead, C, _ = q.shape
    q, k = to_power_of_two(q), to_power_of_two(k)
    A = torch.diag_embed((q * k).sum(-1).view(-1, q.shape[-2]))
    L = torch.zeros(A.shape, dtype=exact, device=A.device)
    for n, (to_cut, from_cut) in enumerate(f.levels):
        h = 1 << n
        (k_first, k_second), (_, q_second) = halves(k, h), halves(q, h)
        columns, A_h, L_h = k_first * to_cut, corners(A, h), corners(L, h)
        A_h.copy_(rows_by_columns(q_second * from_cut, columns).view(A_h.shape))
        rows, columns = (k_second * from_cut).to(exact), columns.to(exact)
        L_h.copy_(rows_by_columns(rows, columns).view(L_h.shape))
    return A[..., :C, :C].view(*lead, C, C), L[..., :C, :C].view(*lead, C, C)


def decayed_scores_backward(
    dA: Tensor, dL: Tensor, q: Tensor, k: Tensor, f: Factors
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """dq, dk and the gradients of every level's exponents, of A (q reads k) and L (k reads k, strictly) at once.

    dA, dL [..., C, C] are not read above the diagonal, dL not on it; q, k [..., C, K].
    """
    C, K = q.shape[-2:]
    q, k = to_power_of_two(q), to_power_of_two(k)
    if more := q.shape[-2] - C:
        dA, dL = (pad(z, (0, more, 0, more)) for z in (dA, dL))
    dA, dL = (z.contiguous().flatten(0, -3) for z in (dA, dL))
    d = dA.diagonal(dim1=-2, dim2=-1).reshape(*q.shape[:-1], 1)
    dq, dk, levels = d * k, d * q, []  # no decay on the diagonal
    for n, (to_cut, from_cut) in enumerate(f.levels):
        h = 1 << n
        (k_first, k_second), (_, q_second) = halves(k, h), halves(q, h)
        columns = k_first * to_cut
        rows = columns.new_empty((len(columns), 2, h, K))
        torch.mul(q_second, from_cut, out=rows[:, 0])
        torch.mul(k_second, from_cut, out=rows[:, 1])
        dscores = torch.cat([corners(dA, h), corners(dL, h)], dim=-2).view(-1, 2 * h, h)
        if h > 1:
            drows = (dscores @ columns).view(rows.shape)
            dcolumns = dscores.mT @ rows.view(-1, 2 * h, K)
        else:
            drows = dscores[..., None] * columns[:, None]
            dcolumns = (dscores[..., None] * rows).sum(1)
        halves(dq, h)[1].addcmul_(drows[:, 0], from_cut)
        dk_first, dk_second = halves(dk, h)
        dk_second.addcmul_(drows[:, 1], from_cut)
        dk_first.addcmul_(dcolumns, to_cut)
        back = rows.mul_(drows)
        levels.append((columns.mul_(dcolumns), back[:, 0].add_(back[:, 1])))
    return dq[..., :C, :], dk[..., :C, :], levels
