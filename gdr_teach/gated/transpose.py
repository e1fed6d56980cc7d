"""The backward of the gated delta rule in plain PyTorch, line by line the transpose of `reference`.

do is the gradient of o, dstate the gradient of the last state; D is the gradient of the state at the place named.
The gradient of a decay needs care. From (5.1), with D~_t the gradient of S~_t,

    dg_t = rowsum(S~_t * D~_t)                                                                       (5.10)

is a product of two small numbers where the decay is strong. The formula of the papers, a cumulative sum of
q * dq + k * dk over all later tokens, gets it as a difference of large ones: at g = -20 no digit is left in float32.
Here every exponent is a sum of g over the tokens that a pair crosses, and so dg is the same sum turned around: what
the pairs that cross token t, and no others, hand back.
"""

from functools import partial

import torch
from torch import Tensor

from ..chunkwise import wy
from ..delta.reference import start_state
from ..delta.transpose import outer, read, write
from ..packing import per_document
from .reference import by_row, chunkwise, decays, without_scores


def gated_recurrence_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `gated_recurrence`, token after token: (5.10) to (5.14), written out in `recurrent`.

    Args: do [B, T, H, V], dstate [N, H, K, V] in the state's dtype; the rest as in the forward.
    Returns: dq, dk, dv, dbeta, dlog_decay in their inputs' shapes and dtypes, dstate0 [N, H, K, V].
    """
    operands = (q, k, v, beta, log_decay)
    if cu_seqlens is not None:
        states = {"dstate": dstate, "initial_state": initial_state}
        return per_document(
            gated_recurrence_backward, cu_seqlens, (do, *operands), states, scale=scale
        )
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)
    Q, K, V, b, g, dO = (x.to(S.dtype) for x in (*operands[:4], by_row(log_decay), do))
    decay = g.exp()[..., None]  # [B, T, H, K or 1, 1]
    faded, r, written = [], [], []  # S~_t, r_t and S_t
    for t in range(q.shape[1]):
        faded.append(decay[:, t] * S)  # (5.1)
        r.append(V[:, t] - read(faded[t], K[:, t]))  # (5.2)
        S = faded[t] + outer(K[:, t], b[:, t, :, None] * r[t])
        written.append(S)
    D = dstate.clone()
    dQ, dK, dV, db, dg = (torch.zeros_like(x) for x in (Q, K, V, b, K))
    for t in reversed(range(q.shape[1])):
        D = D + scale * outer(Q[:, t], dO[:, t])  # (5.11)
        du = read(D, K[:, t])
        dr = b[:, t, :, None] * du  # (5.12)
        dV[:, t] = dr
        db[:, t] = (du * r[t]).sum(-1)  # (5.13)
        dK[:, t] = write(D, b[:, t, :, None] * r[t]) - write(faded[t], dr)
        dQ[:, t] = scale * write(written[t], dO[:, t])
        D = D - outer(K[:, t], dr)  # (5.14)
        dg[:, t] = (faded[t] * D).sum(-1)  # (5.10)
        D = decay[:, t] * D
    dlog_decay = like(dg, log_decay)
    return dQ.to(q.dtype), dK.to(k.dtype), dV.to(v.dtype), db.to(beta.dtype), dlog_decay, D


def gated_chunkwise_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    kept: wy.Kept | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `gated_chunkwise`: a forward walk for S and U, a reverse walk for D, then all chunks at once.

    In the letters of (5.6) to (5.9), with P = V - K~ S and dO already multiplied by scale:

        dU = A^T dO + K^ D        dP = T^T dU        D <- exp(g_(start, end]) * D + Q~^T dO - K~^T dP     (5.15)
        dA = tril(dO U^T)         dL = -tril_{-1}(dP U^T)        dV = dP                                  (5.16)
        dQ~ = dO S^T              dK~ = -dP S^T                  dK^ = U D^T                              (5.17)
        dbeta = rowsum((P - L U) * (dU - L^T dP))                                                         (5.18)

    and from dA, dL, dQ~, dK~, dK^ back through the exponents of (5.6) and (5.7) to q, k and g.
    Args and Returns: as `gated_recurrence_backward`, chunk_size C >= 1, and kept: what the forward gave (None: again).
    """
    operands = (q, k, v, beta, log_decay)
    if cu_seqlens is not None:
        states = {"dstate": dstate, "initial_state": initial_state}
        options = {"scale": scale, "chunk_size": chunk_size}
        return per_document(
            gated_chunkwise_backward, cu_seqlens, (do, *operands), states, **options
        )
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    if kept is None:
        kept = chunkwise(*operands, scale, initial_state, chunk_size)[1]
    one = partial(_segment_backward, scale=scale, C=chunk_size)
    return wy.backward_by_segments(one, do, operands, kept, dstate, chunk_size)


def _segment_backward(do, q, k, v, beta, log_decay, kept, D: Tensor, *, scale: float, C: int):
    x, Q, K, f = without_scores(q, k, v, beta, log_decay, D.dtype, C)
    dO = scale * wy.chunks(do.to(D.dtype), C)
    d, D = wy.backward(x, wy.Kept(*kept), dO, D)  # (5.15) to (5.18)
    assert d.dfade is not None
    dfaded = (d.dQ, d.dK, d.dW, d.dfade)
    dq, dk, dg = decays(log_decay).backward(Q, K, f, dfaded, d.dA, d.dL)
    return (dq, dk, d.dV, d.dbeta, dg), D


def like(dg: Tensor, log_decay: Tensor) -> Tensor:
    """dg [B, T, H, K], a number a row of the state, in log_decay's shape and dtype."""
    return (dg if log_decay.dim() == 4 else dg.sum(-1)).to(log_decay.dtype)
