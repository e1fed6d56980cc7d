"""Decay between the tokens of a chunk in plain PyTorch: `decay.py` is the same inside a kernel.

    A_ij = x_i^T exp(g_(j, i]) y_j,  i >= j          g_(j, i] the gates after token j up to i          (5.7)

exp(g_(start, i] - g_(start, j]) would be one product, but of numbers that overflow, or that agree in all their digits
once the sums are large. So pairs are sorted by halving: cut a block in two, the second half reads what the first half
wrote, and the exponent has two parts on either side of the cut,

    g_(j, i] = g_(j, cut] + g_(cut, i]               both <= 0, both summed from the cut               (5.19)

one for the row and one for the column: a matrix product. Pairs inside one half: the same again, down to one token. A
gate is summed only where a pair really crosses it, so a token's scores depend on nothing later, bit for bit.

The sums of all levels come by doubling. In blocks of h tokens keep the sum up to each token (upto) and the sum after
it (after); twice as long a block adds the first half's sum to the second half's upto, and the second half's to the
first half's after. Turned around, from the largest block down, that is the gradient of g: no cumulative sum, and no
difference of large numbers anywhere.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Factors(NamedTuple):
    """exp of the local sums of a chunk's gates [..., C, G], C a power of two."""

    levels: list[
        tuple[Tensor, Tensor]
    ]  # for h = 1, 2, 4, ...: to_cut and from_cut, [..., C / 2h, h, G]
    from_start: Tensor  # [..., C, G] exp(g_(start, i])
    to_end: Tensor  # [..., C, G] exp(g_(j, end])
    whole: Tensor  # [..., G, 1] exp(g_(start, end])


def to_power_of_two(x: Tensor) -> Tensor:
    """[..., C, D] filled up with zeros to the next power of two of tokens."""
    C = x.shape[-2]
    more = (1 << (C - 1).bit_length()) - C
    return pad(x, (0, 0, 0, more)) if more else x


def factors(g: Tensor) -> Factors:
    """The factors of (5.19) at every level, and those of the whole chunk, for g [..., C, G] <= 0."""
    upto = to_power_of_two(g).clone()
    after, levels, h = torch.zeros_like(upto), [], 1
    while h < upto.shape[-2]:
        before, behind = halves(upto, h), halves(after, h)
        # contiguous first: exp of a strided tensor is four times slower
        levels.append((behind[0].contiguous().exp(), before[1].contiguous().exp()))
        first, second = (x[..., -1:, :].clone() for x in before)  # the sums of the halves
        before[1].add_(first)
        behind[0].add_(second)
        h *= 2
    return Factors(levels, upto.exp(), after.exp(), upto[..., -1:, :].exp().mT)


def sums_backward(
    levels: list[tuple[Tensor, Tensor]], dupto: Tensor, dafter: Tensor, dtotal: Tensor
) -> Tensor:
    """dg [..., C, G] from the gradients of every exponent of `factors`.

    Those of to_cut and from_cut at each level, [..., C, G] of from_start and to_end, [..., 1, G] of whole.
    """
    C = dupto.shape[-2]
    dupto, dafter = (to_power_of_two(x).clone() for x in (dupto, dafter))
    dupto[..., -1:, :] += dtotal
    for n in reversed(range(len(levels))):
        before, behind = halves(dupto, 1 << n), halves(dafter, 1 << n)
        dfirst, dsecond = before[1].sum(-2), behind[0].sum(-2)
        before[0][..., -1, :] += dfirst
        before[1][..., -1, :] += dsecond
        behind[0].add_(levels[n][0])
        before[1].add_(levels[n][1])
    return dupto[..., :C, :]


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """Views of [..., C, D] in blocks of 2 h tokens: the first and the second halves, each [..., C / 2h, h, D]."""
    blocks = x.unflatten(-2, (-1, 2, h))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def corners(A: Tensor, h: int) -> Tensor:
    """A view of A [..., C, C]: rows of second halves, columns of the first half of their block [..., C / 2h, h, h]."""
    blocks = A.unflatten(-1, (-1, 2, h)).unflatten(-4, (-1, 2, h))
    own = blocks.diagonal(dim1=-6, dim2=-3)  # of [..., block, half, i, block, half, j]
    return own[..., 1, :, 0, :, :].movedim(-1, -3)


def decayed_scores(q: Tensor, k: Tensor, f: Factors, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """A in q's dtype and L in `exact`, (5.7) for q, k [..., C, K] and the factors of their gates.

    L is summed in more digits from factors as they are: without decay they are exactly 1, with it errors fade as well.
    """
    C = q.shape[-2]
    q, k = to_power_of_two(q), to_power_of_two(k)
    if f.from_start.shape[-1] == 1:  # one decay a head: a number for every pair
        E, wide = pair_factors(f), k.to(exact)
        A, L = (q @ k.mT) * E, (wide @ wide.mT) * E.to(exact).tril(-1)
        return A[..., :C, :C], L[..., :C, :C]
    A = torch.diag_embed((q * k).sum(-1))
    L = torch.zeros(A.shape, dtype=exact, device=A.device)
    for n, (to_cut, from_cut) in enumerate(f.levels):
        h = 1 << n
        k_first, k_second = halves(k, h)
        columns = (k_first * to_cut).mT
        corners(A, h).copy_((halves(q, h)[1] * from_cut) @ columns)
        corners(L, h).copy_((k_second * from_cut).to(exact) @ columns.to(exact))
    return A[..., :C, :C], L[..., :C, :C]


def pair_factors(f: Factors) -> Tensor:
    """exp(g_(j, i]) for i >= j, else 0, [..., C, C], for gates [..., C, 1]."""
    E = torch.diag_embed(torch.ones_like(f.from_start[..., 0]))
    for n, (to_cut, from_cut) in enumerate(f.levels):
        corners(E, 1 << n).copy_(from_cut * to_cut.mT)
    return E


def decayed_scores_backward(
    dA: Tensor, dL: Tensor, q: Tensor, k: Tensor, f: Factors
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """dq, dk and the gradients of every level's exponents, of A (q reads k) and L (k reads k, strictly) at once.

    dA, dL [..., C, C] are not read above the diagonal, dL not on it; q, k [..., C, K].
    """
    C = q.shape[-2]
    dA, dL = (to_power_of_two(to_power_of_two(z).mT).mT for z in (dA, dL))
    q, k = to_power_of_two(q), to_power_of_two(k)
    if f.from_start.shape[-1] == 1:
        return _one_decay_a_head(dA, dL, q, k, f, C)
    d = dA.diagonal(dim1=-2, dim2=-1)[..., None]
    dq, dk, levels = d * k, d * q, []  # no decay on the diagonal
    for n, (to_cut, from_cut) in enumerate(f.levels):
        h = 1 << n
        (k_first, k_second), q_second = halves(k, h), halves(q, h)[1]
        columns = k_first * to_cut
        rows = columns.new_empty((*columns.shape[:-2], 2, h, columns.shape[-1]))
        torch.mul(q_second, from_cut, out=rows[..., 0, :, :])
        torch.mul(k_second, from_cut, out=rows[..., 1, :, :])
        dscores = torch.cat([corners(dA, h), corners(dL, h)], dim=-2)
        drows = (dscores @ columns).unflatten(-2, (2, h))
        dcolumns = dscores.mT @ rows.flatten(-3, -2)
        halves(dq, h)[1].addcmul_(drows[..., 0, :, :], from_cut)
        halves(dk, h)[1].addcmul_(drows[..., 1, :, :], from_cut)
        halves(dk, h)[0].addcmul_(dcolumns, to_cut)
        back = rows.mul_(drows)
        levels.append((columns.mul_(dcolumns), back[..., 0, :, :].add_(back[..., 1, :, :])))
    return dq[..., :C, :], dk[..., :C, :], levels


def _one_decay_a_head(dA, dL, q, k, f: Factors, C: int):
    E = pair_factors(f)
    dA, dL = dA * E, (dL * E).tril(-1)
    dE = dA * (q @ k.mT) + dL * (k @ k.mT)  # E times its gradient: what every pair hands back
    dq, dk = dA @ k, dA.mT @ q + (dL + dL.mT) @ k
    levels = []
    for n in range(len(f.levels)):
        pairs = corners(dE, 1 << n)
        levels.append((pairs.sum(-2)[..., None], pairs.sum(-1)[..., None]))
    return dq[..., :C, :], dk[..., :C, :], levels
