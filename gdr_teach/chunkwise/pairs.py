"""One decay a head between the tokens of a chunk, in plain PyTorch: a number for every pair of tokens.

    A_ij = E_ij x_i^T y_j        E_ij = exp(g_(j, i]), i >= j, else 0          g_(j, i] the gates after token j up to i

Each column of E has a sum of its own that starts at its token: only what a pair crosses is added, and no difference is
taken. Turned around, a gate's gradient is the sum over all pairs that cross it. `levels` has the same functions for a
decay of every channel, where a number for every pair and channel would be too many. (5.6), (5.7)
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Faded(NamedTuple):
    """The operands of the chunk map for q, k [..., C, K], g [..., C, 1], and the factors of pairs."""

    Q: Tensor  # [..., C, K] exp(g_(start, i]) q_i
    K: Tensor  # [..., C, K] exp(g_(start, i]) k_i
    W: Tensor  # [..., C, K] exp(g_(j, end]) k_j
    whole: Tensor  # [..., 1, 1] exp(g_(start, end])
    from_start: Tensor  # [..., C, 1] exp(g_(start, i])
    to_end: Tensor  # [..., C, 1] exp(g_(j, end])
    E: Tensor  # [..., C, C]


def fade(q: Tensor, k: Tensor, g: Tensor) -> Faded:
    """The operands for q, k [..., C, K] and g [..., C, 1] <= 0, and all factors."""
    E = g.expand(*g.shape[:-1], g.shape[-2]).tril(-1).cumsum(-2).exp().tril()
    from_start, to_end = g.cumsum(-2).exp(), E[..., -1:, :].mT
    whole = from_start[..., -1:, :]
    return Faded(q * from_start, k * from_start, k * to_end, whole, from_start, to_end, E)


def scores(q: Tensor, k: Tensor, f: Faded, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """A in q's dtype and L, strictly lower, in `exact`: (5.7) for the q, k [..., C, K] that `fade` had."""
    wide = k.to(exact)
    return (q @ k.mT) * f.E, (wide @ wide.mT) * f.E.tril(-1)


def backward(
    q: Tensor, k: Tensor, f: Faded, d: tuple[Tensor, ...], dA: Tensor, dL: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk [..., C, K], dg [..., C, 1] of `fade` and `scores` together, from d: the gradients of Q, K, W and whole.

    dA, dL [..., C, C] are not read above the diagonal, dL not on it.
    """
    dQ, dK, dW, dwhole = d
    # an exponent's gradient is its factor times the factor's gradient, and every channel has the same exponent
    dfrom_start = torch.addcmul(f.Q * dQ, f.K, dK).sum(-1, keepdim=True)
    dto_end, dwhole = (f.W * dW).sum(-1, keepdim=True), f.whole * dwhole.sum(-2, keepdim=True)
    dA, dL = dA * f.E, (dL * f.E).tril(-1)
    dE = ((q @ k.mT) * dA).addcmul_(k @ k.mT, dL)
    dq = (dA @ k).addcmul_(dQ, f.from_start)
    dk = (dA.mT @ q + (dL + dL.mT) @ k).addcmul_(dK, f.from_start).addcmul_(dW, f.to_end)
    return dq, dk, crossed_by(dE, dfrom_start, dto_end, dwhole)


def crossed_by(dE: Tensor, dfrom_start: Tensor, dto_end: Tensor, dwhole: Tensor) -> Tensor:
    """dg [..., C, 1] from the gradients of all exponents: the sum of those that contain the gate.

    dE [..., C, C], dfrom_start and dto_end [..., C, 1], dwhole [..., 1, 1]: they begin after some token j, or at the
    start, and end with a token i, or at the end, so that token t's gate is in those with j < t <= i.
    """
    above = torch.cat([dfrom_start, dE.tril(-1)], dim=-1)
    dE = torch.cat([above, torch.cat([dwhole, dto_end.mT], dim=-1)], dim=-2)
    from_here_on = dE.flip(-2).cumsum(-2).flip(-2)  # the sum over all ends i >= t
    return from_here_on[..., :-1, :-1].tril().sum(-1, keepdim=True)
