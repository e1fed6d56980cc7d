"""The chunk form in plain PyTorch, one step a function, for the tied family (derived in chapter 6).

Every rule that erases what the key recalls becomes the same map once its chunk is prepared: C tokens, the state S
before them, and operands in which decay, if any, is already written (Q~, K~ read, K^ writes; without decay Q, K, K):

    r_i = v_i - S^T k~_i - sum_{j<i} L_ij beta_j r_j          what the memory gets wrong, after the tokens before i
    (I + L diag(beta)) R = V - K~ S                           all i at once                           (6.2)
    X = (I + L diag(beta))^{-1}                               once a chunk, before S is known         (6.3)
    R = X V - (X K~) S,   U = beta * R                                                                (6.4)
    S' = fade * S + K^^T U                                    the walk, chunk after chunk             (6.5)
    O = scale * (Q~ S + A U)                                  all chunks at once again                (6.6)

The backward is the same steps turned around, with dO already multiplied by scale and D the gradient of S':

    dU = A^T dO + K^ D      dP = X^T (beta * dU)      D <- fade * D + Q~^T dO - K~^T dP               (6.7)
    dQ~ = dO S^T    dK~ = -dP S^T    dK^ = U D^T    dV = dP                                           (6.8)
    dA = dO U^T     dL = -dP U^T     dfade = rowsum(S * D)     dbeta = rowsum(R * (dU - L^T dP))      (6.9)

Tensors of chunks are [N, B H, C, .]: the walk takes one slice of memory a step. Needs torch only.
Source: Bischof and Van Loan 1987 for the WY form; Yang et al. 2024, section 3, for its use here.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Chunks(NamedTuple):
    """The operands of the chunk map; fade is None without decay, and L may have more digits than the rest."""

    Q: Tensor  # [N, B H, C, K] Q~
    K: Tensor  # [N, B H, C, K] K~
    W: Tensor  # [N, B H, C, K] K^
    V: Tensor  # [N, B H, C, V]
    beta: Tensor  # [N, B H, C, 1]
    A: Tensor  # [N, B H, C, C] lower triangular
    L: Tensor  # [N, B H, C, C] strictly lower triangular
    fade: Tensor | None = None  # [N, B H, K or 1, 1]


class Kept(NamedTuple):
    """What the backward can take over from the forward."""

    X: Tensor  # [N, B H, C, C]
    A: Tensor  # [N, B H, C, C]
    L: Tensor  # [N, B H, C, C] in A's dtype
    R: Tensor  # [N, B H, C, V]
    starts: Tensor  # [N, B H, K, V] the state before each chunk


class Gradients(NamedTuple):
    """The gradients of `Chunks`, in its order; dA and dL are right where A and L are not zero, and so is dfade."""

    dQ: Tensor  # noqa: N815
    dK: Tensor  # noqa: N815
    dW: Tensor  # noqa: N815
    dV: Tensor  # noqa: N815
    dbeta: Tensor
    dA: Tensor  # noqa: N815
    dL: Tensor  # noqa: N815
    dfade: Tensor | None


def exact_dtype(x: Tensor) -> torch.dtype:
    """What the triangle is solved in: float64, which Apple's GPUs do not have (decision 0011)."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def chunks(x: Tensor, C: int) -> Tensor:
    """[B, T, H, D] as [N, B H, C, D], the last chunk filled up with zeros: tokens that change nothing."""
    B, T, H, D = x.shape
    N = -(-T // C)
    if N * C > T:
        x = pad(x, (0, 0, 0, 0, 0, N * C - T))
    return x.view(B, N, C, H, D).permute(1, 0, 3, 2, 4).reshape(N, B * H, C, D)


def tokens(x: Tensor, like: Tensor) -> Tensor:
    """[N, B H, C, D] as [B, T, H, D], B, T and H those of `like`: the way back, in its dtype, the filling cut off."""
    (B, T, H), (N, _, C, D) = like.shape[:3], x.shape
    x = x.view(N, B, H, C, D).permute(1, 0, 3, 2, 4).reshape(B, N * C, H, D)
    return x[:, :T].to(like.dtype)


def inverse(L: Tensor, beta: Tensor) -> Tensor:
    """X of (6.3) for L [..., C, C] and beta [..., C, 1], in L's dtype: rounded once multiplied (decision 0011)."""
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand(L.shape)
    columns = beta.to(L.dtype).mT  # diag(beta) from the right scales columns
    return torch.linalg.solve_triangular(L * columns, eye, upper=False, unitriangular=True)


def times(X: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """X y and X z, multiplied in X's dtype and rounded to that of y."""
    D = y.shape[-1]
    both = X.new_empty((*y.shape[:-1], D + z.shape[-1]))
    both[..., :D], both[..., D:] = y, z
    out = (X @ both).to(y.dtype)
    return out[..., :D], out[..., D:]


def walk(x: Chunks, X: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The state before every chunk [N, B H, K, V], R [N, B H, C, V], and the state after the last: (6.4), (6.5)."""
    starts, R = [], []
    for n, (XV, XK) in enumerate(zip(*times(X, x.V, x.K), strict=True)):
        starts.append(S)
        R.append(torch.baddbmm(XV, XK, S, alpha=-1))  # (6.4)
        S = S if x.fade is None else x.fade[n] * S
        S = torch.baddbmm(S, x.W[n].mT, x.beta[n] * R[n])  # (6.5)
    if not R:
        return x.V.new_empty((0, *S.shape)), torch.empty_like(x.V), S
    return torch.stack(starts), torch.stack(R), S


def forward(x: Chunks, S: Tensor, scale: float) -> tuple[Tensor, Tensor, Kept]:
    """O [N, B H, C, V], the last state, and what may be kept, from the state S [B H, K, V] before the first chunk."""
    X = inverse(x.L, x.beta)
    starts, R, S = walk(x, X, S)
    O = plus(x.Q @ starts, x.A, x.beta * R) * scale  # (6.6)
    return O, S, Kept(X, x.A, x.L.to(R.dtype), R, starts)


def plus(x: Tensor, y: Tensor, z: Tensor, sign: int = 1) -> Tensor:
    """x + sign * y z for products of all chunks [N, B H, ., .], without a tensor in between."""
    out = torch.baddbmm(x.flatten(0, 1), y.flatten(0, 1), z.flatten(0, 1), alpha=sign)
    return out.view(x.shape)


def backward(x: Chunks, kept: Kept, dO: Tensor, D: Tensor) -> tuple[Gradients, Tensor]:
    """The gradients of `forward` in all operands and in S; dO is already multiplied by scale, D that of the last state.

    Of x it reads neither A nor L: `kept` has them.
    """
    X, A, L, R, starts = kept
    U, dU = x.beta * R, A.mT @ dO  # dU is to be complete further down
    XU, XW = times(X.mT, x.beta * dU, x.beta * x.W)
    D, ends, dP = D.clone(), torch.empty_like(starts), torch.empty_like(R)
    for n in reversed(range(len(dO))):  # (6.7)
        ends[n] = D
        torch.baddbmm(XU[n], XW[n], D, out=dP[n])
        if x.fade is not None:
            D.mul_(x.fade[n])
        D.baddbmm_(x.Q[n].mT, dO[n]).baddbmm_(x.K[n].mT, dP[n], alpha=-1)
    dU = plus(plus(dU, x.W, ends), L.mT, dP, -1)
    minus = -dP
    grads = Gradients(
        dO @ starts.mT,  # (6.8)
        minus @ starts.mT,
        U @ ends.mT,
        dP,
        (R * dU).sum(-1, keepdim=True),  # (6.9)
        dO @ U.mT,
        minus @ U.mT,
        None if x.fade is None else (starts * ends).sum(-1, keepdim=True),
    )
    return grads, D
