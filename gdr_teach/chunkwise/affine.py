"""The chunk form in plain PyTorch, one step a function, for the untied family: free directions a and b.

A rule that reads along one direction and writes along another is this map once its chunk is prepared: C tokens, the
state S before them, and operands in which decay, if any, is already written (Q~, A~ read, B^, K^ write):

    u_i = S^T a~_i + sum_{j<i} (AB_ij u_j + AK_ij v_j)        what a_i reads, after the tokens before i
    (I - AB) U = A~ S + AK V                                  all i at once                           (6.22)
    X = (I - AB)^{-1}                                         once a chunk, before S is known         (6.23)
    U = (X A~) S + X (AK V)                                                                           (6.24)
    S' = fade * S + B^^T U + K^^T V                           the walk, chunk after chunk             (6.25)
    O = scale * (Q~ S + QB U + QK V)                          all chunks at once again                (6.26)

One affine map of S a chunk. The tied family (`wy`) has one stream of writes, b = k, and needs half of these products.
The backward is the same steps turned around, with dO already multiplied by scale and D the gradient of S':

    dU = QB^T dO + B^ D     D <- fade * D + Q~^T dO + (X A~)^T dU     dP = X^T dU                     (6.27)
    dQ~ = dO S^T    dA~ = dP S^T    dB^ = U D^T    dK^ = V D^T    dV = K^ D + QK^T dO + AK^T dP       (6.28)
    dQB = dO U^T    dQK = dO V^T    dAB = dP U^T   dAK = dP V^T   dfade = rowsum(S * D)               (6.29)

dP is the gradient of the right side of (6.22), and dAB needs no product with X: U is X times that side already.
Tensors of chunks are [N, B H, C, .], as in `wy`. Needs torch only. Source: Yang et al. 2024, section 3 and appendix
(the generalized delta rule); Peng et al. 2025, "RWKV-7", appendix (the same map with decay).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import wy


class Scores(NamedTuple):
    """What a token reads of another's write inside the chunk; the last two may have more digits than the rest."""

    QB: Tensor  # [N, B H, C, C] q on b, lower triangular
    QK: Tensor  # [N, B H, C, C] q on k, lower triangular
    AB: Tensor  # [N, B H, C, C] a on b, strictly lower triangular
    AK: Tensor  # [N, B H, C, C] a on k, strictly lower triangular


class Chunks(NamedTuple):
    """The operands of the chunk map; fade is None without decay."""

    Q: Tensor  # [N, B H, C, K] Q~
    A: Tensor  # [N, B H, C, K] A~
    B: Tensor  # [N, B H, C, K] B^
    K: Tensor  # [N, B H, C, K] K^
    V: Tensor  # [N, B H, C, V]
    fade: Tensor | None = None  # [N, B H, K, 1]


class Kept(NamedTuple):
    """What the backward can take over from the forward."""

    X: Tensor  # [N, B H, C, C]
    XA: Tensor  # [N, B H, C, K] X A~
    U: Tensor  # [N, B H, C, V]
    starts: Tensor  # [N, B H, K, V] the state before each chunk
    QB: Tensor  # [N, B H, C, C]
    QK: Tensor  # [N, B H, C, C]
    AB: Tensor  # [N, B H, C, C] in QB's dtype, as AK
    AK: Tensor  # [N, B H, C, C]


def scores(x: Chunks) -> Scores:
    """The scores where nothing fades: products of the operands."""
    exact = wy.exact_dtype(x.A)
    A, B, K = (y.to(exact) for y in (x.A, x.B, x.K))
    QB, QK = (x.Q @ x.B.mT).tril(), (x.Q @ x.K.mT).tril()
    return Scores(QB, QK, (A @ B.mT).tril(-1), (A @ K.mT).tril(-1))


def scores_backward(x: Chunks, d: Chunks, s: Scores) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, da, db, dk [N, B H, C, K] of operands that are their own scores' factors, from d and s; d is used up."""
    QB, QK, AB, AK = s.QB.tril(), s.QK.tril(), s.AB.tril(-1), s.AK.tril(-1)
    dq = wy.plus_(wy.plus_(d.Q, QB, x.B), QK, x.K)
    da = wy.plus_(wy.plus_(d.A, AB, x.B), AK, x.K)
    db = wy.plus_(wy.plus_(d.B, QB.mT, x.Q), AB.mT, x.A)
    dk = wy.plus_(wy.plus_(d.K, QK.mT, x.Q), AK.mT, x.A)
    return dq, da, db, dk


def inverse(AB: Tensor) -> Tensor:
    """X of (6.23) for AB [..., C, C], in its dtype: rounded once multiplied (decision 0011)."""
    eye = torch.eye(AB.shape[-1], dtype=AB.dtype, device=AB.device).expand(AB.shape)
    return torch.linalg.solve_triangular(-AB, eye, upper=False, unitriangular=True)


def walk(x: Chunks, XV: Tensor, XA: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state before every chunk [N, B H, K, V], U [N, B H, C, V], and the state after the last: (6.24), (6.25)."""
    if not len(XV):
        return XV.new_empty((0, *S.shape)), XV, S
    starts, U = [], []
    fades = [None] * len(XV) if x.fade is None else x.fade.unbind()
    written = x.K.mT @ x.V  # [N, B H, K, V], known before S is
    slices = zip(XV.unbind(), XA.unbind(), x.B.mT.unbind(), written.unbind(), fades, strict=True)
    for n, (xv, xa, b, own, fade) in enumerate(slices):
        starts.append(S)
        U.append(torch.baddbmm(xv, xa, S))  # (6.24)
        S = torch.baddbmm(own + (S if fade is None else fade * S), b, U[n])  # (6.25)
    return torch.stack(starts), torch.stack(U), S


def forward(x: Chunks, s: Scores, S: Tensor, scale: float) -> tuple[Tensor, Tensor, Kept]:
    """O [N, B H, C, V], the last state, and what may be kept, from the state S [B H, K, V] before the first chunk."""
    X = inverse(s.AB)
    XA = wy.times(X, x.A)
    XV = (X @ (s.AK @ x.V.to(s.AK.dtype))).to(x.V.dtype)
    starts, U, S = walk(x, XV, XA, S)
    O = wy.plus_(wy.plus_(x.Q @ starts, s.QB, U), s.QK, x.V).mul_(scale)  # (6.26)
    return O, S, Kept(X, XA, U, starts, s.QB, s.QK, s.AB.to(U.dtype), s.AK.to(U.dtype))


def backward(x: Chunks, kept: Kept, dO: Tensor, D: Tensor) -> tuple[Chunks, Scores, Tensor]:
    """The gradients of `forward` in all operands, all scores and S, from dO, already multiplied by scale, and D.

    The gradients of scores are right where the scores are not zero, and that of fade is one for each row.
    """
    dU, G = kept.QB.mT @ dO, x.Q.mT @ dO
    # the gradient of the state after each chunk, the first state's first
    ends = G.new_empty((len(G) + 1, *D.shape))
    ends[-1] = D
    fades = [None] * len(G) if x.fade is None else x.fade.unbind()
    operands = (ends[1:], ends[:-1], dU, x.B, G, kept.XA.mT)
    slices = zip(*(y.unbind() for y in operands), fades, strict=True)
    for end, start, du, b, g, xa, fade in reversed(list(slices)):  # (6.27)
        du.baddbmm_(b, end)
        g.baddbmm_(xa, du)
        torch.add(g, end, out=start) if fade is None else torch.addcmul(g, fade, end, out=start)
    D, ends = ends[0], ends[1:]
    dP = wy.times(kept.X.mT, dU)
    dV = wy.plus_(wy.plus_(x.K @ ends, kept.QK.mT, dO), kept.AK.mT, dP)
    dfade = None if x.fade is None else (kept.starts * ends).sum(-1, keepdim=True)
    S, U, V = kept.starts, kept.U, x.V
    operands = Chunks(dO @ S.mT, dP @ S.mT, U @ ends.mT, V @ ends.mT, dV, dfade)  # (6.28)
    return operands, Scores(dO @ U.mT, dO @ V.mT, dP @ U.mT, dP @ V.mT), D  # (6.29)
