"""The backward of the delta rule in plain PyTorch, line by line the transpose of `reference` (derived in chapter 8).

do is the gradient of o, dstate the gradient of the last state; D is the gradient of the state at the place named.
Neither function builds an autograd graph: they are what the operator runs when the backend is torch.
"""

import torch
from torch import Tensor

from ..packing import per_document
from .reference import chunks, correction_matrix, start_state, tokens


def delta_recurrence_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `delta_recurrence`, token after token: (2.9) to (2.12), written out in `recurrent`.

    Args: do [B, T, H, V], dstate [N, H, K, V] in the state's dtype; the rest as in the forward.
    Returns: dq, dk, dv, dbeta in their inputs' dtypes, dstate0 [N, H, K, V]. All states are kept: T K V numbers a head.
    """
    if cu_seqlens is not None:
        states = {"dstate": dstate, "initial_state": initial_state}
        return per_document(
            delta_recurrence_backward, cu_seqlens, (do, q, k, v, beta), states, scale=scale
        )
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)
    Q, K, V, b, dO = (x.to(S.dtype) for x in (q, k, v, beta, do))
    before, r = [], []  # S_{t-1} and r_t
    for t in range(q.shape[1]):
        before.append(S)
        r.append(V[:, t] - read(S, K[:, t]))  # (2.1)
        S = S + outer(K[:, t], b[:, t, :, None] * r[t])
    before.append(S)
    D = dstate.clone()
    dQ, dK, dV, db = (torch.zeros_like(x) for x in (Q, K, V, b))
    for t in reversed(range(q.shape[1])):
        D = D + scale * outer(Q[:, t], dO[:, t])  # (2.9)
        du = read(D, K[:, t])  # (2.10)
        dr = b[:, t, :, None] * du
        dV[:, t] = dr
        db[:, t] = (du * r[t]).sum(-1)  # (2.11)
        dK[:, t] = write(D, b[:, t, :, None] * r[t]) - write(before[t], dr)
        dQ[:, t] = scale * write(before[t + 1], dO[:, t])  # (2.12)
        D = D - outer(K[:, t], dr)
    return dQ.to(q.dtype), dK.to(k.dtype), dV.to(v.dtype), db.to(beta.dtype), D


def delta_chunkwise_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, ...]:
    """The gradients of `delta_chunkwise`: a forward walk for S and U, a reverse walk for D, then all chunks at once.

    With L = tril_{-1}(K K^T), A = tril(Q K^T), P = V - K S and dO already multiplied by scale:

        dU = A^T dO + K D          dP = T^T dU          D <- D + Q^T dO - K^T dP                      (2.13)
        G = tril_{-1}(dP U^T)      dA = tril(dO U^T)    dV = dP                                       (2.14)
        dQ = dO S^T + dA K         dK = U D^T + dA^T Q - dP S^T - (G + G^T) K                         (2.15)
        dbeta = rowsum((P - L U) * (dU - L^T dP))                                                     (2.16)

    (2.16) has no division: U = beta (P - L U), so its row sums hold at beta = 0 as well.
    Args and Returns: as `delta_recurrence_backward`, and chunk_size C >= 1.
    """
    if cu_seqlens is not None:
        states = {"dstate": dstate, "initial_state": initial_state}
        options = {"scale": scale, "chunk_size": chunk_size}
        return per_document(
            delta_chunkwise_backward, cu_seqlens, (do, q, k, v, beta), states, **options
        )
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)
    Q, K, V, dO = (chunks(x.to(S.dtype), chunk_size) for x in (q, k, v, do))  # [B, H, N, C, .]
    b = chunks(beta.to(S.dtype)[..., None], chunk_size)  # [B, H, N, C, 1]
    dO = scale * dO
    A, L = (Q @ K.mT).tril(), (K @ K.mT).tril(-1)
    dU = A.mT @ dO
    T = correction_matrix(K, b)  # in float64: rounded once it is multiplied
    u, w, y, x = (
        (M @ z.to(T.dtype)).to(S.dtype) for M, z in ((T, V), (T, K), (T.mT, dU), (T.mT, K))
    )
    N = Q.shape[2]

    starts, U = S.new_empty((*S.shape[:2], N, *S.shape[2:])), torch.empty_like(V)
    for n in range(N):
        starts[:, :, n] = S
        U[:, :, n] = u[:, :, n] - w[:, :, n] @ S  # (2.6)
        S = S + K[:, :, n].mT @ U[:, :, n]  # (2.8)
    ends, dP = torch.empty_like(starts), torch.empty_like(V)
    D = dstate.clone()
    for n in reversed(range(N)):
        ends[:, :, n] = D
        dP[:, :, n] = y[:, :, n] + x[:, :, n] @ D  # (2.13)
        D = D + Q[:, :, n].mT @ dO[:, :, n] - K[:, :, n].mT @ dP[:, :, n]

    dU = dU + K @ ends
    G, dA = (dP @ U.mT).tril(-1), (dO @ U.mT).tril()  # (2.14)
    dQ = dO @ starts.mT + dA @ K  # (2.15)
    dK = U @ ends.mT + dA.mT @ Q - dP @ starts.mT - (G + G.mT) @ K
    R = V - K @ starts - L @ U
    db = (R * (dU - L.mT @ dP)).sum(-1, keepdim=True)  # (2.16)
    dq, dk, dv, dbeta = (
        tokens(x, q.shape[1]).to(like.dtype)
        for x, like in zip((dQ, dK, dP, db), (q, k, v, beta), strict=True)
    )
    return dq, dk, dv, dbeta[..., 0], D


def read(S: Tensor, x: Tensor) -> Tensor:
    """S^T x, for S [..., K, V] and x [..., K]."""
    return (x[..., None, :] @ S)[..., 0, :]


def write(S: Tensor, y: Tensor) -> Tensor:
    """S y, for S [..., K, V] and y [..., V]."""
    return (S @ y[..., :, None])[..., 0]


def outer(x: Tensor, y: Tensor) -> Tensor:
    """x y^T, for x [..., K] and y [..., V]."""
    return x[..., :, None] * y[..., None, :]
