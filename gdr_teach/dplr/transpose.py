"""The backward of the DPLR rule in plain PyTorch, line by line the transpose of `reference`.

do is the gradient of o, dstate the gradient of the last state; D is the gradient of the state at the place named.
Without decay it is the backward of IPLR. The gradient of a decay is formed where it acts,

    dg_t = exp(g_t) * rowsum(S_{t-1} * D_t)                                                          (5.28)

and in the chunk form from the pairs that cross the token, as `gated.transpose` says: never as a difference of sums
over all later tokens. No function here builds an autograd graph.
"""

from functools import partial

import torch
from torch import Tensor

from ..chunkwise import affine, wy
from ..delta.reference import start_state
from ..delta.transpose import outer, read, write
from ..gated.reference import by_row
from ..gated.transpose import like
from ..packing import per_document
from . import fading
from .reference import chunkwise, given, without_scores


def dplr_recurrence_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `dplr_recurrence`, token after token: (5.28) to (5.32), written out in `recurrent`.

    Args: do [B, T, H, V], dstate [N, H, K, V] in the state's dtype; the rest as in the forward.
    Returns: dq, dk, dv, da, db and, with a decay, dlog_decay, in their inputs' shapes and dtypes, and last dstate0
    [N, H, K, V]. All states are kept: T K V numbers a head.
    """
    operands = given(q, k, v, a, b, log_decay)
    if cu_seqlens is not None:
        states = {"dstate": dstate, "initial_state": initial_state}
        return per_document(
            dplr_recurrence_backward, cu_seqlens, (do, *operands), states, scale=scale
        )
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    S = start_state(k, v, initial_state)
    Q, K, V, A, B, dO = (x.to(S.dtype) for x in (q, k, v, a, b, do))
    g = torch.zeros_like(K) if log_decay is None else by_row(log_decay).to(S.dtype)
    decay = g.exp()[..., None]  # [B, T, H, K or 1, 1]
    states = [S]  # S_{t-1} of every token, and the last
    for t in range(q.shape[1]):
        written = outer(B[:, t], read(S, A[:, t])) + outer(K[:, t], V[:, t])
        S = decay[:, t] * S + written  # (5.23)
        states.append(S)
    D = dstate.clone()
    dQ, dK, dV, dA, dB, dg = (torch.zeros_like(x) for x in (Q, K, V, A, B, K))
    for t in reversed(range(q.shape[1])):
        S = states[t]
        D = D + scale * outer(Q[:, t], dO[:, t])  # (5.29)
        du = read(D, B[:, t])  # (5.30)
        dV[:, t] = read(D, K[:, t])
        dK[:, t] = write(D, V[:, t])
        dB[:, t] = write(D, read(S, A[:, t]))  # (5.31)
        dA[:, t] = write(S, du)
        dQ[:, t] = scale * write(states[t + 1], dO[:, t])
        dg[:, t] = (decay[:, t] * S * D).sum(-1)  # (5.28)
        D = decay[:, t] * D + outer(A[:, t], du)  # (5.32)
    grads = [x.to(y.dtype) for x, y in zip((dQ, dK, dV, dA, dB), (q, k, v, a, b), strict=True)]
    return *grads, *(() if log_decay is None else (like(dg, log_decay),)), D


def dplr_chunkwise_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    dstate: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    kept: affine.Kept | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of `dplr_chunkwise`: those of its operands and scores, (6.27) to (6.29), and back to the inputs.

    From dQ~, dA~, dB^, dK^ and the gradients of the scores it goes through the exponents of (5.25) and (5.26) to
    q, a, b, k and g; where nothing fades, the scores are products and dQ = dQ~ + dQB B + dQK K, and so on.
    Args and Returns: as `dplr_recurrence_backward`, chunk_size C >= 1, and kept: what the forward gave (None: again).
    """
    operands = given(q, k, v, a, b, log_decay)
    if cu_seqlens is not None:
        states = {"dstate": dstate, "initial_state": initial_state}
        options = {"scale": scale, "chunk_size": chunk_size}
        return per_document(dplr_chunkwise_backward, cu_seqlens, (do, *operands), states, **options)
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    if kept is None:
        kept = chunkwise(*operands, scale=scale, initial_state=initial_state, C=chunk_size)[1]
    one = partial(_segment_backward, scale=scale, C=chunk_size)
    channels = [*operands[:5], *(by_row(x).to(dstate.dtype).expand(k.shape) for x in operands[5:])]
    *grads, dstate0 = wy.backward_by_segments(one, do, channels, kept, dstate, chunk_size)
    if log_decay is not None:
        grads[5] = like(grads[5], log_decay)
    return *grads, dstate0


def _segment_backward(do: Tensor, *rest, scale: float, C: int):
    *operands, kept, D = rest
    x, f = without_scores(*operands, dtype=D.dtype, C=C)
    dO = scale * wy.chunks(do.to(D.dtype), C)
    d, s, D = affine.backward(x, affine.Kept(*kept), dO, D)
    if f is None:
        dq, da, db, dk = affine.scores_backward(x, d, s)
        return (dq, dk, d.V, da, db), D
    q, k, _, _, b, _ = operands
    Q, B, K = (wy.chunks(y.to(D.dtype), C) for y in (q, b, k))
    dq, da, db, dk, dg = fading.backward(Q, B, K, f, d, s)
    return (dq, dk, d.V, da, db, dg), D
