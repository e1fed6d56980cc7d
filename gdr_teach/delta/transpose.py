"""The backward of the delta rule in plain PyTorch, line by line the transpose of `reference` (derived in chapter 8).

do is the gradient of o, dstate the gradient of the last state; D is the gradient of the state at the place named.
Neither function builds an autograd graph: they are what the operator runs when the backend is torch.
"""

from functools import partial

import torch
from torch import Tensor

from ..chunkwise import wy
from ..packing import per_document
from .reference import chunkwise, start_state, without_scores


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
    kept: wy.Kept | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `delta_chunkwise`: those of its operands (`chunkwise.wy`), and back to q and k.

    With L = tril_{-1}(K K^T), A = tril(Q K^T), P = V - K S and dO already multiplied by scale:

        dU = A^T dO + K D          dP = T^T dU          D <- D + Q^T dO - K^T dP                      (2.13)
        G = tril_{-1}(dP U^T)      dA = tril(dO U^T)    dV = dP                                       (2.14)
        dQ = dO S^T + dA K         dK = U D^T + dA^T Q - dP S^T - (G + G^T) K                         (2.15)
        dbeta = rowsum((P - L U) * (dU - L^T dP))                                                     (2.16)

    (2.16) has no division: U = beta (P - L U), so its row sums hold at beta = 0 as well.
    Args and Returns: as `delta_recurrence_backward`, chunk_size C >= 1, and kept: what the forward gave (None: again).
    """
    if cu_seqlens is not None:
        states = {"dstate": dstate, "initial_state": initial_state}
        options = {"scale": scale, "chunk_size": chunk_size}
        return per_document(
            delta_chunkwise_backward, cu_seqlens, (do, q, k, v, beta), states, **options
        )
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    if kept is None:
        kept = chunkwise(q, k, v, beta, scale, initial_state, chunk_size)[1]
    one = partial(_segment_backward, scale=scale, C=chunk_size)
    return wy.backward_by_segments(one, do, (q, k, v, beta), kept, dstate, chunk_size)


def _segment_backward(do, q, k, v, beta, kept, D: Tensor, *, scale: float, C: int):
    x = without_scores(q, k, v, beta, D.dtype, C)
    dO = scale * wy.chunks(do.to(D.dtype), C)
    d, D = wy.backward(x, wy.Kept(*kept), dO, D)  # (2.13)
    dA, dL = d.dA.tril(), d.dL.tril(-1)  # (2.14): dL = -G
    dQ = wy.plus_(d.dQ, dA, x.K)  # (2.15)
    dK = wy.plus_(wy.plus_(d.dK.add_(d.dW), dA.mT, x.Q), dL + dL.mT, x.K)
    return (dQ, dK, d.dV, d.dbeta), D


def read(S: Tensor, x: Tensor) -> Tensor:
    """S^T x, for S [..., K, V] and x [..., K]."""
    return (x[..., None, :] @ S)[..., 0, :]


def write(S: Tensor, y: Tensor) -> Tensor:
    """S y, for S [..., K, V] and y [..., V]."""
    return (S @ y[..., :, None])[..., 0]


def outer(x: Tensor, y: Tensor) -> Tensor:
    """x y^T, for x [..., K] and y [..., V]."""
    return x[..., :, None] * y[..., None, :]
