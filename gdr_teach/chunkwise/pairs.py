"""One decay a head between the tokens of a chunk, in plain PyTorch: a number for every pair of tokens.

    A_ij = E_ij x_i^T y_j        E_ij = exp(g_(j, i]), i >= j, else 0          g_(j, i] the gates after token j up to i

Each column of E has a sum of its own that starts at its token: only what a pair crosses is added, and no difference is
taken. Turned around, a gate's gradient is the sum over all pairs that cross it. `levels` has the same functions for a
decay of every channel, where a number for every pair and channel would be too many. (5.6), (5.7)
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """exp of the sums of a chunk's gates [..., C, 1]."""

    E: Tensor  # [..., C, C] exp(g_(j, i]) for i >= j, else 0
    from_start: Tensor  # [..., C, 1] exp(g_(start, i])
    to_end: Tensor  # [..., C, 1] exp(g_(j, end])
    whole: Tensor  # [..., 1, 1] exp(g_(start, end])


def factors(g: Tensor) -> Factors:
    """All factors of g [..., C, 1] <= 0."""
    C = g.shape[-2]
    E = g.expand(*g.shape[:-1], C).tril(-1).cumsum(-2).exp().tril()
    from_start = g.cumsum(-2).exp()
    return Factors(E, from_start, E[..., -1:, :].mT, from_start[..., -1:, :])


def decayed_scores(q: Tensor, k: Tensor, f: Factors, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """A in q's dtype and L, strictly lower, in `exact` for q, k [..., C, K]."""
    wide = k.to(exact)
    return (q @ k.mT).mul_(f.E), (wide @ wide.mT) * f.E.tril(-1)


def decayed_scores_backward(
    dA: Tensor, dL: Tensor, q: Tensor, k: Tensor, f: Factors
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and the gradients of all exponents g_(j, i] [..., C, C], of A (q reads k) and L (k reads k, strictly).

    dA, dL [..., C, C] are not read above the diagonal, dL not on it; q, k [..., C, K].
    """
    dA, dL = dA * f.E, (dL * f.E).tril(-1)
    dE = (q @ k.mT).mul_(dA).addcmul_(k @ k.mT, dL)
    return dA @ k, dA.mT @ q + (dL + dL.mT) @ k, dE


def sums_backward(dE: Tensor, dupto: Tensor, dafter: Tensor, dtotal: Tensor) -> Tensor:
    """dg [..., C, 1] from the gradients of every exponent of `factors`.

    Those of E [..., C, C], of from_start and to_end [..., C, 1], and of whole [..., 1, 1]: all sums from after some
    token j, or from the start, up to a token i, or to the end, so that token t is in those with j < t <= i.
    """
    dE = torch.cat([torch.cat([dupto, dE.tril(-1)], -1), torch.cat([dtotal, dafter.mT], -1)], -2)
    from_here_on = dE.flip(-2).cumsum(-2).flip(-2)  # the sum over all ends i >= t
    return from_here_on[..., :-1, :-1].tril().sum(-1, keepdim=True)
